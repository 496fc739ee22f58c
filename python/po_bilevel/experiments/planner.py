"""Model-predictive control with a learned model, by the cross-entropy method, on tasks whose reward is known."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .transitions import environment, episode

# s (N, O), a (N, A) -> s' (N, O).
Step = Callable[[Tensor, Tensor], Tensor]
# s (N, O), a (N, A), s' (N, O) -> the reward, (N,).
Reward = Callable[[Tensor, Tensor, Tensor], Tensor]


def _pendulum(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """Of Pendulum-v1: observation (cos θ, sin θ, dθ/dt)."""
    angle = torch.atan2(observation[:, 1], observation[:, 0])
    return -(angle.square() + 0.1 * observation[:, 2].square() + 1e-3 * action[:, 0].square())


def _inverted_pendulum(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """Of InvertedPendulum-v5, one while |θ| < 0.2, made smooth so that a plan can be better than another."""
    return 1.0 - (following[:, 1] / 0.2).square() - 0.01 * following[:, 0].square()


def _reacher(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """Of Reacher-v5: the last two of the observation are from the target to the fingertip."""
    return -following[:, -2:].norm(dim=1) - action.square().sum(dim=1)


REWARDS: dict[str, Reward] = {
    "Pendulum-v1": _pendulum,
    "InvertedPendulum-v5": _inverted_pendulum,
    "Reacher-v5": _reacher,
}


def plan(
    step: Step, reward: Reward, observation: Tensor, start: Tensor, bounds: tuple[Tensor, Tensor],
    generator: torch.Generator, *, population: int = 64, elites: int = 8, rounds: int = 3,
) -> Tensor:  # fmt: skip
    """Actions that a model expects most of: the mean of the elites after the last round.

    Args:
        step: the model.
        reward: of s, a and s'.
        observation: s, (O,).
        start: actions to search around, (T, A).
        bounds: least and largest action, (A,) each.
        generator: of the candidates.
        population, elites, rounds: candidates a round, how many of them are kept, and how often.

    Returns:
        actions, (T, A).
    """
    low, high = bounds
    mean, std = start, (0.5 * (high - low)).expand_as(start)
    for _ in range(rounds):
        noise = torch.randn(population, *start.shape, generator=generator, dtype=start.dtype)
        actions = (mean + std * noise).clamp(low, high)
        state = observation.expand(population, -1)
        total = torch.zeros(population, dtype=start.dtype)
        for time in range(len(start)):
            following = step(state, actions[:, time])
            total += reward(state, actions[:, time], following)
            state = following
        # A model that runs off into infinity is no reason to follow it.
        best = actions[torch.nan_to_num(total, nan=-torch.inf).topk(elites).indices]
        mean, std = best.mean(dim=0), best.std(dim=0)
    return mean


@torch.no_grad()
def control(step: Step, name: str, *, seed: int, steps: int = 200, horizon: int = 15) -> float:
    """The return of one episode in the real environment, planned anew at each step.

    Args:
        step: the model.
        name: one of REWARDS.
        seed: of the environment and of the planner.
        steps: the most of the episode.
        horizon: steps that are planned.

    Raises:
        UsageError: no reward is known of that environment.
        MissingDependencyError: gymnasium or MuJoCo is not installed.
    """
    if name not in REWARDS:
        raise UsageError(f"--plan-episodes: expected 0, or an environment of {', '.join(REWARDS)}, got {name!r}")
    generator = torch.Generator().manual_seed(seed)
    with environment(name) as env:
        low, high = (
            torch.tensor(bound, dtype=torch.float32) for bound in (env.action_space.low, env.action_space.high)
        )
        actions = torch.zeros(horizon, len(low))

        def act(observation: np.ndarray) -> np.ndarray:
            nonlocal actions
            state = torch.from_numpy(np.asarray(observation, dtype=np.float32))
            # The rest of the last plan is a good start.
            start = torch.cat([actions[1:], torch.zeros(1, len(low))])
            actions = plan(step, REWARDS[name], state, start, (low, high), generator)
            return actions[0].numpy()

        return sum(reward for *_, reward in episode(env, act, steps, seed))
