"""A PPO update of a Gaussian policy, and advantages of trajectories, against what a user would write."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import po_kernels as pk
from benchmarks.harness import check, compare, gaussian_inputs, gradients, versions

ENTROPY = 0.01
GAMMA, LAM = 0.99, 0.95


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


def gae_by_steps(rewards: Tensor, values: Tensor, dones: Tensor) -> Tensor:
    """A loop over steps, as CleanRL has it but for a list, which autograd goes back through sooner."""
    advantages, last = [], torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        goes_on = 1.0 - dones[t]
        delta = rewards[t] + GAMMA * values[t + 1] * goes_on - values[t]
        last = delta + GAMMA * LAM * goes_on * last
        advantages.append(last)
    return torch.stack(advantages[::-1])


def gae_by_doubling(rewards: Tensor, values: Tensor, dones: Tensor) -> Tensor:
    """As one vectorises a scan: after k passes a step has the sum over 2^k steps."""
    goes_on = 1.0 - dones
    total = rewards + GAMMA * values[1:] * goes_on - values[:-1]
    factor, step = GAMMA * LAM * goes_on, 1
    while step < len(rewards):
        total = torch.cat([total[:-step] + factor[:-step] * total[step:], total[-step:]])
        factor = torch.cat([factor[:-step] * factor[step:], torch.zeros_like(factor[-step:])])
        step *= 2
    return total


def fused_gae(rewards: Tensor, values: Tensor, dones: Tensor) -> Tensor:
    return pk.gae(rewards, values, dones, gamma=GAMMA, lam=LAM)[0]


def _compare_gae(benchmark: Any, what: str, run: Callable[..., Sequence[Tensor]], inputs: list[Tensor]) -> None:
    exact = run(gae_by_steps, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])
    check(run(fused_gae, inputs), exact, what)
    benchmark.extra_info.update(versions(), shape=f"{what} {' x '.join(map(str, inputs[0].shape))}")
    ours = partial(run, fused_gae, inputs)
    for name, peer in {"eager": gae_by_steps, "vectorised": gae_by_doubling}.items():
        benchmark.extra_info[name] = compare(ours, partial(run, peer, inputs))._asdict()
    benchmark.pedantic(ours, rounds=3)


def _trajectories(steps: int, columns: int) -> list[Tensor]:
    torch.manual_seed(0)
    dones = (torch.rand(steps, columns) < 0.01).float()
    return [torch.randn(steps, columns), torch.randn(steps + 1, columns), dones]


@pytest.mark.parametrize(("steps", "columns"), [(2048, 64)])
def bench_gae(benchmark, steps, columns):
    """Advantages, against a loop and against a scan in plain torch."""
    _compare_gae(benchmark, "gae", lambda gae, inputs: [gae(*inputs)], _trajectories(steps, columns))


@pytest.mark.parametrize(("steps", "columns"), [(2048, 64)])
def bench_gae_gradient(benchmark, steps, columns):
    """The same, and the gradient of their sum of squares in rewards and values."""
    rewards, values, dones = _trajectories(steps, columns)

    def run(gae: Callable[..., Tensor], inputs: list[Tensor]) -> Sequence[Tensor]:
        return gradients(lambda *x: gae(*x).square().sum(), inputs)

    _compare_gae(benchmark, "gae, gradient", run, [rewards.requires_grad_(), values.requires_grad_(), dones])
