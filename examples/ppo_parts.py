"""What ppo.py stands on: environments of gymnasium side by side, and an actor with a critic."""

import gymnasium
import torch
from gymnasium import wrappers
from torch import nn

# Observations and rewards of continuous tasks have any size: running means and variances make them of one.
NORMALISE = [
    wrappers.ClipAction,
    wrappers.NormalizeObservation,
    lambda env: wrappers.TransformObservation(env, lambda x: x.clip(-10, 10), env.observation_space),
    wrappers.NormalizeReward,
    lambda env: wrappers.TransformReward(env, lambda r: max(-10.0, min(r, 10.0))),
]


def is_discrete(name):
    return isinstance(gymnasium.make(name).action_space, gymnasium.spaces.Discrete)


class Agent(nn.Module):
    """An actor, whose `head` is (logits,) or (mean, log_std), and a critic."""

    def __init__(self, inputs, outputs, discrete):
        super().__init__()
        self.actor, self.critic = network(inputs, outputs, 0.01), network(inputs, 1, 1.0)
        self.log_std = None if discrete else nn.Parameter(torch.zeros(outputs))

    def head(self, x):
        return (self.actor(x),) if self.log_std is None else (self.actor(x), self.log_std)

    def act(self, x):
        if self.log_std is None:
            return torch.multinomial(self.actor(x).softmax(-1), 1)[:, 0]
        return torch.normal(self.actor(x), self.log_std.exp().expand(len(x), -1))


def network(inputs, outputs, gain):
    made = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
    for layer, each in zip(made[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, each)
        nn.init.zeros_(layer.bias)
    return made


class Rollouts:
    """What `number` environments do, and in `returns` the return of each episode and the number of steps at its end."""

    def __init__(self, name, number, seed):
        discrete = is_discrete(name)
        around = [wrappers.RecordEpisodeStatistics, *([] if discrete else NORMALISE)]
        mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
        self.envs = gymnasium.make_vec(name, number, vectorization_mode="sync", vector_kwargs=mode, wrappers=around)
        (inputs,), space = self.envs.single_observation_space.shape, self.envs.single_action_space
        self.shape = inputs, int(space.n) if discrete else space.shape[0], discrete
        self.state = torch.as_tensor(self.envs.reset(seed=seed)[0], dtype=torch.float32)
        self.steps, self.returns = 0, []

    @torch.no_grad()
    def collect(self, length, agent, gamma):
        """States (length + 1, number, inputs), actions, rewards and ends (length, number, ...)."""
        states, actions, rewards, dones = [self.state], [], [], []
        for _ in range(length):
            actions.append(agent.act(self.state))
            after, reward, ended, cut, info = self.envs.step(actions[-1].numpy())
            self.steps += len(after)
            for i in (ended | cut).nonzero()[0]:
                self.returns.append((self.steps, float(info["final_info"]["episode"]["r"][i])))
                if not ended[i]:  # the state that was cut off has a value; the next one is of another episode
                    reward[i] += gamma * agent.critic(torch.as_tensor(info["final_obs"][i], dtype=torch.float32)).item()
            self.state = torch.as_tensor(after, dtype=torch.float32)
            states.append(self.state)
            rewards.append(torch.as_tensor(reward, dtype=torch.float32))
            dones.append(torch.as_tensor(ended | cut))
        return tuple(map(torch.stack, (states, actions, rewards, dones)))
