"""A PPO update of a Gaussian policy, and advantages of trajectories, against what a user would write."""

from functools import partial

import pytest
import torch
from torch import Tensor

import po_kernels as pk
from benchmarks.harness import check, compare, gaussian_inputs, gradients, versions

ENTROPY = 0.01


def fused_update(mean: Tensor, log_std: Tensor, actions: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    log_prob, entropy = pk.gaussian_log_prob(mean, log_std, actions, entropy=True)
    return pk.policy_loss(log_prob, advantages, old_log_prob=old, entropy=entropy, entropy_coef=ENTROPY)


def eager_update(mean: Tensor, log_std: Tensor, actions: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """As CleanRL's ppo_continuous_action.py has it, without its diagnostics."""
    policy = torch.distributions.Normal(mean, log_std.expand_as(mean).exp())
    ratio = (policy.log_prob(actions).sum(1) - old).exp()
    clipped = -advantages * torch.clamp(ratio, 0.8, 1.2)
    return torch.max(-advantages * ratio, clipped).mean() - ENTROPY * policy.entropy().sum(1).mean()


@pytest.mark.parametrize("rows", [4096])
def bench_ppo_update(benchmark, rows):
    """Loss and gradients of a Gaussian policy with 17 outputs and one log_std for all rows."""
    mean, _, actions, _ = gaussian_inputs(rows, 17)
    log_std = torch.zeros(17, requires_grad=True)
    with torch.no_grad():
        old = pk.gaussian_log_prob(mean, log_std, actions) + 0.2 * torch.randn(rows)
    inputs = [mean, log_std, actions, old, torch.randn(rows)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    ours = partial(gradients, fused_update, inputs)
    check(ours(), gradients(eager_update, exact), "PPO update")
    peers = {"eager": eager_update, "compiled": torch.compile(eager_update)}
    benchmark.extra_info.update(versions(), shape=f"PPO update, gaussian {rows} x 17")
    for name, peer in peers.items():
        benchmark.extra_info[name] = compare(ours, partial(gradients, peer, inputs))._asdict()
    benchmark.pedantic(ours, rounds=3)


def gae_by_steps(rewards: Tensor, values: Tensor, dones: Tensor, gamma: float, lam: float) -> Tensor:
    """A loop over steps, as CleanRL has it."""
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        goes_on = 1.0 - dones[t]
        delta = rewards[t] + gamma * values[t + 1] * goes_on - values[t]
        advantages[t] = last = delta + gamma * lam * goes_on * last
    return advantages


@pytest.mark.parametrize(("steps", "columns"), [(2048, 64)])
def bench_gae(benchmark, steps, columns):
    """Advantages alone, and with the gradient of the values, against a loop and against the scan in plain torch."""
    torch.manual_seed(0)
    rewards, values = torch.randn(steps, columns), torch.randn(steps + 1, columns)
    dones = (torch.rand(steps, columns) < 0.01).float()

    def ours() -> Tensor:
        return pk.gae(rewards, values, dones, gamma=0.99, lam=0.95, backend="native")[0]

    def vectorised() -> Tensor:
        return pk.gae(rewards, values, dones, gamma=0.99, lam=0.95, backend="reference")[0]

    loop = partial(gae_by_steps, rewards, values, dones, 0.99, 0.95)
    exact = gae_by_steps(rewards.double(), values.double(), dones.double(), 0.99, 0.95)
    check([ours()], [exact], "gae")
    benchmark.extra_info.update(versions(), shape=f"gae {steps} x {columns}")
    for name, peer in {"eager": loop, "vectorised": vectorised}.items():
        benchmark.extra_info[name] = compare(ours, peer)._asdict()
    benchmark.pedantic(ours, rounds=3)
