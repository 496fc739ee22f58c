"""Transitions of an environment, collected from gymnasium or read from a Minari data set.

What cannot be used is a UsageError, what is not installed a MissingDependencyError.
"""

import contextlib
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import UsageError
from ..optional import require
from .data import refuse_non_finite

Behaviour = Literal["random", "controller"]


@dataclass(frozen=True)
class Transitions:
    """Transitions (s, a, s') in the order in which they were made.

    Attributes:
        name: of the environment or data set.
        observations, following: s and s', (N, O) float64.
        actions: (N, A) float64.
        episodes: (N,) int64, equal for transitions that follow each other.
    """

    name: str
    observations: np.ndarray
    actions: np.ndarray
    following: np.ndarray
    episodes: np.ndarray

    def check(self, option: str) -> "Transitions":
        """Itself, if all its numbers are finite; a UsageError names the option, the row and the column."""
        for what in ("observations", "actions", "following"):
            refuse_non_finite(f"{option}: {what} of {self.name}", getattr(self, what))
        return self


@dataclass(frozen=True)
class Controller:
    """a = clip(W s + b), in units of the action space's bounds.

    Attributes:
        weight: W, (A, O).
        bias: b, (A,).
    """

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """s (O,) -> a (A,) from -1 to 1."""
        return np.clip(self.weight @ observation + self.bias, -1.0, 1.0)


@contextlib.contextmanager
def environment(name: str) -> Iterator[Any]:
    """A gymnasium environment with continuous observations (O,) and bounded actions (A,), closed at the end."""
    gymnasium = require("gymnasium", "mbrl")
    with warnings.catch_warnings(), _elsewhere():
        # Of old versions of environments and of MuJoCo's deprecations: nothing that a user could do about.
        warnings.simplefilter("ignore")
        try:
            made = gymnasium.make(name)
        except gymnasium.error.DependencyNotInstalled:
            require("mujoco", "mbrl")
            raise
        except gymnasium.error.Error as error:
            raise UsageError(f"--env: expected an environment of gymnasium, got {name!r}: {error}") from None
    box = gymnasium.spaces.Box
    spaces = (made.observation_space, made.action_space)
    with contextlib.closing(made):
        if not all(isinstance(space, box) and len(space.shape) == 1 for space in spaces):
            raise UsageError(f"--env: expected observations and actions that are vectors, got {name!r} with {spaces}")
        yield made


def episode(
    env: Any, act: Callable[[np.ndarray], np.ndarray], steps: int, seed: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, float]]:  # fmt: skip
    """The steps (s, a, s', reward) of an episode, at most so many.

    Args:
        env: as `environment` makes it.
        act: s (O,) -> a (A,).
        steps: after which it is ended, if it has not ended itself.
        seed: of the environment; None to go on from where its generator is.
    """
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        action = act(observation)
        following, reward, terminated, truncated, _ = env.step(action.astype(env.action_space.dtype))
        # Copies, for an environment may hand out a buffer of its own.
        yield np.array(observation), action, np.array(following), float(reward)
        if terminated or truncated:
            return
        observation = following


def collect(
    name: str, count: int, *, horizon: int, behaviour: Behaviour, noise: float, seed: int,
    controller: Controller | None = None,
) -> Transitions:  # fmt: skip
    """Steps through an environment.

    Args:
        name: such as "HalfCheetah-v5".
        count: of transitions.
        horizon: steps after which an episode is ended, if it has not ended itself.
        behaviour: "random", uniform actions; "controller", Gaussian noise around a controller.
        noise: its standard deviation, in units of half the action's range.
        seed: of the environment and of the actions.
        controller: None to train one, see `train_controller`.
    """
    random = np.random.default_rng(seed)
    with environment(name) as env:
        middle, half = _range(env)
        if behaviour == "controller" and controller is None:
            controller = train_controller(env, horizon=horizon, seed=seed)
        shape = (len(half), env.observation_space.shape[0])
        if controller is not None and controller.weight.shape != shape:
            raise UsageError(f"--controller: expected a weight of shape {shape}, got {controller.weight.shape}")

        def act(observation: np.ndarray) -> np.ndarray:
            if controller is None:
                return middle + half * random.uniform(-1.0, 1.0, len(half))
            unit = controller(observation) + noise * random.standard_normal(len(half))
            return middle + half * np.clip(unit, -1.0, 1.0)

        endless = (
            (*step[:3], number)
            for number in itertools.count()
            for step in episode(env, act, horizon, None if number else seed)
        )
        *steps, episodes = zip(*itertools.islice(endless, count), strict=True)
    before, actions, after = (np.array(part, dtype=np.float64) for part in steps)
    return Transitions(name, before, actions, after, np.array(episodes)).check("--env")


def train_controller(
    env: Any, *, horizon: int, seed: int, rounds: int = 8, candidates: int = 16, elites: int = 4
) -> Controller:
    """A linear controller by the cross-entropy method on an environment's return: not good, but not random.

    Args:
        env: as `environment` makes it.
        horizon: steps of an episode.
        seed: of the candidates and of the environment.
        rounds, candidates, elites: how often, out of how many, how many go on.
    """
    random = np.random.default_rng(seed)
    middle, half = _range(env)
    size = (len(half), env.observation_space.shape[0] + 1)
    mean, std = np.zeros(size), np.full(size, 0.5)

    def value(tried: np.ndarray) -> float:
        controller = Controller(tried[:, :-1], tried[:, -1])
        steps = episode(env, lambda s: middle + half * controller(s), horizon, seed)
        return sum(reward for *_, reward in steps)

    for _ in range(rounds):
        tried = mean + std * random.standard_normal((candidates, *size))
        best = tried[np.argsort([value(each) for each in tried])[-elites:]]
        mean, std = best.mean(axis=0), best.std(axis=0) + 0.05
    return Controller(mean[:, :-1], mean[:, -1])


def load_controller(path: Path) -> Controller:
    """A controller from a NumPy archive with `weight` (A, O) and `bias` (A,)."""
    try:
        with path.open("rb") as file, np.load(file) as archive:
            found = Controller(np.asarray(archive["weight"], np.float64), np.asarray(archive["bias"], np.float64))
    except Exception as error:
        # What zip files and arrays that are broken in whatever way raise.
        raise UsageError(
            f"--controller: expected an .npz file with weight and bias, got {str(path)!r}: {error}"
        ) from None
    if found.weight.ndim != 2 or found.bias.shape != found.weight.shape[:1]:
        raise UsageError(
            f"--controller: expected a weight (A, O) and a bias (A,), got shapes {found.weight.shape} and "
            f"{found.bias.shape}"
        )
    refuse_non_finite(f"--controller: weight of {path}", found.weight)
    refuse_non_finite(f"--controller: bias of {path}", found.bias[:, None])
    return found


def load_minari(name: str, count: int | None = None) -> Transitions:
    """The first `count` transitions of a Minari data set, all for None; downloaded if it is not there."""
    minari = require("minari", "mbrl")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = minari.load_dataset(name, download=True)
    except Exception as error:
        # It has no errors of its own: whatever its storage and its client of the network raise.
        raise UsageError(
            f"--minari: expected a data set that is here or can be downloaded, got {name!r}: {error}"
        ) from error
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    episodes: list[np.ndarray] = []
    total = 0
    for episode in dataset.iterate_episodes():
        for what, values in (("observations", episode.observations), ("actions", episode.actions)):
            vectors = isinstance(values, np.ndarray) and values.ndim == 2 and np.issubdtype(values.dtype, np.floating)
            if not vectors:
                raise UsageError(f"--minari: expected {what} that are vectors of real numbers, got {name!r} without")
        seen = episode.observations.astype(np.float64)
        actions = episode.actions.astype(np.float64)
        parts.append((seen[:-1], actions, seen[1:]))
        episodes.append(np.full(len(actions), len(episodes)))
        total += len(actions)
        if count is not None and total >= count:
            break
    if not parts:
        raise UsageError(f"--minari: expected episodes in {name!r}, got none")
    before, actions, after = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
    return Transitions(name, before, actions, after, np.concatenate(episodes)[:count]).check("--minari")


def _range(env: Any) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half-width of the action space, (A,); of -1 to 1 where it has no bounds."""
    space = env.action_space
    low, high = (np.where(np.isfinite(b), b, s) for b, s in ((space.low, -1.0), (space.high, 1.0)))
    return (0.5 * (low + high)).astype(np.float64), (0.5 * (high - low)).astype(np.float64)


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """In a folder that is thrown away: MuJoCo, on reading a model, may write a MUJOCO_LOG.TXT to where it is."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
