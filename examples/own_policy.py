"""A policy-gradient loop of your own: your network, your reward, the fused loss: `python examples/own_policy.py`."""

import torch
from torch import nn

import po_kernels as pk


def reward(samples, y):
    """Whatever you can compute of samples (G, B, D); it needs no derivative: a distance in steps of a tenth."""
    return -(samples - y).abs().sum(-1).mul(10).round().div(10)


def train(steps=400, seed=0):
    """The mean reward before and after."""
    torch.manual_seed(seed)
    x = torch.randn(512, 3)
    y = torch.sin(x @ torch.randn(3, 2))
    policy = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 4))  # mean and log standard deviation
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    rewards = []
    for step in range(steps):
        mean, log_std = policy(x).chunk(2, dim=-1)
        with torch.no_grad():
            samples = pk.gaussian_sample(mean, log_std, num_samples=16, seed=step)
            found = reward(samples, y)
        # dice is right to second order too; the baseline of a sample is the mean reward of the others of its row.
        loss = pk.gaussian_surrogate_loss(
            mean, log_std, samples, found, estimator="dice", advantage="loo", entropy_coef=0.01
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(found.mean().item())
    return sum(rewards[:20]) / 20, sum(rewards[-20:]) / 20


if __name__ == "__main__":
    before, after = train()
    print(f"mean reward {before:.3f} at first, {after:.3f} at last")
