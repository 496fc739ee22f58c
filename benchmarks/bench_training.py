"""How times grow with the batch, the group and the threads, what a call costs, and whole training steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from po_bilevel import (
    Batch,
    CategoricalPolicy,
    MahalanobisReward,
    MLPGaussian,
    OneHotMahalanobisReward,
    PolicyGradient,
    train_policy_gradient,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import po_kernels as pk
from benchmarks import peers
from benchmarks.bench_losses import ENTROPY
from benchmarks.harness import check, compare, gaussian_inputs, gradients, versions


def loss(group: int) -> Callable[..., Any]:
    return partial(pk.gaussian_policy_loss, entropy_coef=ENTROPY, estimator="dice", num_samples=group)


def report(benchmark: Any, run: Callable[[], Any], **info: Any) -> None:
    benchmark.extra_info.update(versions(), **info)
    benchmark.pedantic(run, rounds=3)


@pytest.mark.parametrize("what", ["rows", "samples"])
def bench_growth(benchmark, what):
    """64 times the rows, or the samples: the ratio of times, over 64."""
    inputs = gaussian_inputs(4096, 17)
    small = partial(gradients, loss(16), inputs)
    if what == "rows":
        large = partial(gradients, loss(16), gaussian_inputs(64 * 4096, 17))
    else:
        large = partial(gradients, loss(64 * 16), inputs)
    growth = compare(small, large)
    report(benchmark, small, shape=f"64 times the {what}", growth=growth._replace(median=growth.median / 64)._asdict())


@pytest.mark.parametrize("rows", [4096, 65536])
def bench_threads(benchmark, rows):
    """One thread against as many as torch uses."""
    inputs = gaussian_inputs(rows, 17)
    threads = torch.get_num_threads()

    def on(count: int) -> None:
        torch.set_num_threads(count)
        gradients(loss(16), inputs)

    try:
        ratio = compare(partial(on, threads), partial(on, 1))
    finally:
        torch.set_num_threads(threads)
    report(benchmark, partial(on, threads), shape=f"{rows} x 17, G = 16", one_thread=ratio._asdict())


class _Smallest(torch.autograd.Function):
    """What any operation of four tensors with a gradient written in Python costs."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, cotangent):
        mean, log_std, _, precision = ctx.saved_tensors
        return mean, log_std, None, precision


def bench_call(benchmark):
    """Forward and backward at one row, against an autograd.Function that does nothing, and against eager torch."""
    inputs = gaussian_inputs(1, 17)
    ours = partial(gradients, loss(5), inputs)
    least = compare(ours, partial(gradients, _Smallest.apply, inputs))
    eager = compare(ours, partial(gradients, partial(peers.gaussian_dice, entropy_coef=ENTROPY, group=5), inputs))
    report(
        benchmark, ours, shape="1 x 17, G = 5", smallest_function=least._asdict(), eager=eager._asdict(),
        microseconds=least.seconds * 1e6,
    )  # fmt: skip


class Update:
    """One update of a 64-64 network on 50 000 rows of 17 outputs with 5 samples each."""

    rows, dim, group = 50_000, 17, 5

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.data = Batch(torch.randn(self.rows, self.dim), torch.randn(self.rows, self.dim))
        self.policy = MLPGaussian(self.dim, self.dim)
        self.reward = MahalanobisReward(self.dim, "full")

    def network(self) -> None:
        """Forward and backward of the network alone."""
        mean, log_std = self.policy(self.data.inputs)
        torch.autograd.backward((mean, log_std), (torch.ones_like(mean), torch.ones_like(log_std)))
        self.policy.zero_grad()

    def fused(self) -> None:
        mean, log_std = self.policy(self.data.inputs)
        loss(self.group)(mean, log_std, self.data.target, self.reward.precision()).backward()
        self.policy.zero_grad()
        self.reward.zero_grad()


class StepByStep(MLPGaussian):
    """The same policy, whose loop runs in Python: its network through torch, its loss in a kernel."""

    def fused_network(self) -> None:
        return None


@pytest.mark.parametrize(
    ("rows", "dim", "hidden", "estimator"),
    [(100, 2, (64, 64), "analytic"), (1000, 17, (64, 64), "analytic"), (1000, 17, (64, 64), "dice"),
     (1000, 17, (256, 256), "analytic")],
)  # fmt: skip
def bench_inner_loop(benchmark, rows, dim, hidden, estimator):
    """Steps of Adam in native calls, against the same steps in Python."""
    objective = PolicyGradient(
        entropy_coef=ENTROPY, estimator=estimator, num_samples=None if estimator == "analytic" else 5
    )
    torch.manual_seed(0)
    data, reward = Batch(torch.randn(rows, dim), torch.randn(rows, dim)), MahalanobisReward(dim, "full")

    def loop(kind: type[MLPGaussian]) -> Callable[[], Any]:
        torch.manual_seed(0)
        policy = kind(dim, dim, hidden=hidden)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
        return lambda: train_policy_gradient(policy, reward, data, optimizer, 100, loss=objective)[0]

    ours, theirs = loop(MLPGaussian), loop(StepByStep)
    check([torch.tensor(ours())], [torch.tensor(theirs())], "the loss after a hundred steps", tolerance=1e-3)
    shape = f"{rows} x {dim}, {'-'.join(map(str, hidden))}, {estimator}"
    report(benchmark, ours, shape=shape, step_by_step=compare(ours, theirs)._asdict())


def compiled_and_not(
    rows: int, width: int, device: str = "cpu", autocast: torch.dtype | None = None
) -> list[Callable[[], float]]:  # fmt: skip
    """Ten steps of Adam on a network with LayerNorm, which native calls do not take: compiled, or not."""
    torch.manual_seed(0)
    data = Batch(torch.randn(rows, 17, device=device), torch.randint(10, (rows,), device=device))
    reward, objective = OneHotMahalanobisReward(10).to(device), PolicyGradient(entropy_coef=ENTROPY)

    def loop(compiles: bool) -> Callable[[], float]:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(17, width)]
        for _ in range(3):
            layers += [nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)]
        policy = CategoricalPolicy(nn.Sequential(*layers, nn.Linear(width, 10))).to(device)
        if compiles:
            policy.compile()
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
        return lambda: train_policy_gradient(
            policy, reward, data, optimizer, 10, loss=objective, autocast=autocast
        )[0]  # fmt: skip

    return [loop(True), loop(False)]


@pytest.mark.parametrize(("rows", "width"), [(4096, 256)])
def bench_compiled_policy(benchmark, rows, width):
    """`BilevelTrainer(compile=True)`: inner steps of a compiled network, against the same in eager torch."""
    ours, eager = compiled_and_not(rows, width)
    check([torch.tensor(ours())], [torch.tensor(eager())], "the loss after ten steps", tolerance=1e-3)
    report(benchmark, ours, shape=f"{rows} x 17, four layers of {width}", not_compiled=compare(ours, eager)._asdict())


def bench_update(benchmark):
    """Network and fused loss, against the network alone."""
    case = Update()
    ratio = compare(case.network, case.fused)
    report(benchmark, case.fused, shape="50000 x 17, G = 5", over_network=ratio._asdict())


def bench_epoch(benchmark):
    """An epoch of the trainer, one full batch, against the paper's released code.

    That reads the rows one by one through torch's DataLoader, as it does the parameters of the distribution that they
    were drawn from, builds torch.distributions and reports errors, log-likelihood and entropy of each batch.
    """
    case = Update()
    optimizer = torch.optim.Adam(case.policy.parameters(), lr=1e-3)
    objective = PolicyGradient(entropy_coef=ENTROPY, estimator="dice", num_samples=case.group)
    their_policy = nn.Sequential(nn.Linear(17, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 34))
    their_optimizer = torch.optim.Adam(their_policy.parameters(), lr=1e-3)
    precision = case.reward.precision().detach()
    true_mean, true_std = torch.zeros_like(case.data.target), torch.ones_like(case.data.target)
    rows = TensorDataset(case.data.inputs, case.data.target, true_mean, true_std)
    loader = DataLoader(rows, batch_size=case.rows, shuffle=True)

    def ours() -> None:
        train_policy_gradient(case.policy, case.reward, case.data, optimizer, 1, loss=objective)

    def authors() -> None:
        for inputs, target, mean_of_data, std_of_data in loader:
            mean, log_std = their_policy(inputs).chunk(2, dim=-1)
            loss = peers.authors_gaussian(mean, log_std, target, precision, ENTROPY, case.group)
            policy = torch.distributions.Normal(mean, log_std.exp())
            torch.sqrt(nn.functional.mse_loss(mean, mean_of_data)).item()
            torch.linalg.norm(log_std.exp() - std_of_data, dim=-1).mean().item()
            policy.log_prob(target).mean().item()
            policy.entropy().mean().item()
            their_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(their_policy.parameters(), 1e5).item()
            their_optimizer.step()

    network = compare(case.network, ours)
    report(
        benchmark, ours, shape="50000 x 17, G = 5", authors=compare(ours, authors)._asdict(),
        over_network=network._asdict(),
    )  # fmt: skip
