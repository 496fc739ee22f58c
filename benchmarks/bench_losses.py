"""Loss and all gradients, and second-order products, of the fused ops against what a user would write.

`make bench` runs these; each checks its answer against the reference in float64 before it is timed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import po_kernels as pk
from benchmarks import peers
from benchmarks.harness import check, compare, versions

ENTROPY = 0.5


def gaussian_inputs(rows: int, dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    root = torch.randn(dim, dim) / dim**0.5
    tensors = (
        torch.randn(rows, dim),
        0.1 * torch.randn(rows, dim),
        torch.randn(rows, dim),
        root @ root.mT + torch.eye(dim),
    )
    mean, log_std, target, precision = tensors
    return [mean.requires_grad_(), log_std.requires_grad_(), target, precision.requires_grad_()]


def mvn_inputs(rows: int, dim: int) -> list[Tensor]:
    mean, _, target, precision = gaussian_inputs(rows, dim)
    tril = torch.tril(0.2 * torch.randn(rows, dim, dim), -1) + torch.diag_embed(0.5 + torch.rand(rows, dim))
    return [mean, tril.requires_grad_(), target, precision]


def categorical_inputs(rows: int, classes: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(rows, classes, requires_grad=True),
        torch.randint(classes, (rows,)),
        torch.randn(classes, classes, requires_grad=True),
    ]


def gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*inputs)
    return (value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad]))


def products(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Hessian-vector and mixed products along the gradient's own policy part."""
    wanted = [x for x in inputs if x.requires_grad]
    first = torch.autograd.grad(loss(*inputs), wanted[:2], create_graph=True)
    inner = sum((g * g.detach()).sum() for g in first)
    return torch.autograd.grad(inner, wanted)


def run(
    benchmark: Any, run_of: Callable[..., Any], fused: Callable[..., Tensor], peer: Callable[..., Tensor],
    inputs: list[Tensor], backend: str, elements: int, to_compile: Callable[..., Tensor] | None = None,
) -> None:  # fmt: skip
    seed = {"seed": 1} if "seed" in fused.__code__.co_varnames else {}

    def ours(*x: Tensor, **options: Any) -> Tensor:
        return fused(*x, backend=backend, **options)

    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    right = run_of(lambda *x: fused(*x, backend="reference", **seed), exact)
    check(run_of(lambda *x: ours(*x, **seed), inputs), right, f"{fused.__name__} on {backend}")

    eager = compare(lambda: run_of(ours, inputs), lambda: run_of(peer, inputs))
    benchmark.extra_info.update(versions(), eager=eager._asdict(), ns_per_element=eager.seconds * 1e9 / elements)
    if to_compile is not None:
        torch._dynamo.reset()
        faster = torch.compile(to_compile)
        benchmark.extra_info["compiled"] = compare(
            lambda: run_of(ours, inputs), lambda: run_of(faster, inputs)
        )._asdict()
    benchmark.pedantic(run_of, (ours, inputs), rounds=5)


@pytest.fixture(params=["native", "numba"])
def backend(request):
    return request.param


GAUSSIAN = [(256, 17, 5), (4096, 17, 16), (4096, 17, 64), (65536, 17, 16), (4096, 2, 50)]


@pytest.mark.parametrize("shape", GAUSSIAN, ids=str)
def bench_gaussian_dice(benchmark, backend, shape):
    rows, dim, group = shape

    def fused(mean, log_std, target, precision, backend, seed=None):
        return pk.gaussian_policy_loss(
            mean, log_std, target, precision, entropy_coef=ENTROPY, estimator="dice", num_samples=group, seed=seed,
            backend=backend,
        )  # fmt: skip

    def eager(mean, log_std, target, precision):
        return peers.gaussian_dice(mean, log_std, target, precision, ENTROPY, group)

    run(benchmark, gradients, fused, eager, gaussian_inputs(rows, dim), backend, rows * dim * group, eager)


@pytest.mark.parametrize("shape", [(4096, 17, 16)], ids=str)
def bench_gaussian_against_the_authors(benchmark, backend, shape):
    rows, dim, group = shape

    def fused(mean, log_std, target, precision, backend, seed=None):
        return pk.gaussian_policy_loss(
            mean, log_std, target, precision, entropy_coef=ENTROPY, estimator="dice", advantage="min",
            num_samples=group, seed=seed, backend=backend,
        )  # fmt: skip

    def authors(mean, log_std, target, precision):
        return peers.authors_gaussian(mean, log_std, target, precision, ENTROPY, group)

    run(benchmark, gradients, fused, authors, gaussian_inputs(rows, dim), backend, rows * dim * group)


@pytest.mark.parametrize("shape", [(4096, 17, 16)], ids=str)
def bench_gaussian_second_order(benchmark, backend, shape):
    rows, dim, group = shape

    def fused(mean, log_std, target, precision, backend, seed=None):
        return pk.gaussian_policy_loss(
            mean, log_std, target, precision, entropy_coef=ENTROPY, estimator="dice", num_samples=group, seed=seed,
            backend=backend,
        )  # fmt: skip

    def eager(mean, log_std, target, precision):
        return peers.gaussian_dice(mean, log_std, target, precision, ENTROPY, group)

    run(benchmark, products, fused, eager, gaussian_inputs(rows, dim), backend, rows * dim * group)


@pytest.mark.parametrize("shape", [(65536, 17)], ids=str)
def bench_gaussian_analytic(benchmark, backend, shape):
    def fused(mean, log_std, target, precision, backend):
        return pk.gaussian_policy_loss(mean, log_std, target, precision, entropy_coef=ENTROPY, backend=backend)

    def eager(mean, log_std, target, precision):
        return peers.gaussian_analytic(mean, log_std, target, precision, ENTROPY)

    run(benchmark, gradients, fused, eager, gaussian_inputs(*shape), backend, shape[0] * shape[1], eager)


@pytest.mark.parametrize("shape", [(4096, 8, 16)], ids=str)
def bench_mvn_dice(benchmark, backend, shape):
    rows, dim, group = shape

    def fused(mean, scale_tril, target, precision, backend, seed=None):
        return pk.mvn_policy_loss(
            mean, scale_tril, target, precision, entropy_coef=ENTROPY, estimator="dice", num_samples=group, seed=seed,
            backend=backend,
        )  # fmt: skip

    def eager(mean, scale_tril, target, precision):
        return peers.mvn_dice(mean, scale_tril, target, precision, ENTROPY, group)

    run(benchmark, gradients, fused, eager, mvn_inputs(rows, dim), backend, rows * dim * group, eager)


@pytest.mark.parametrize("shape", [(65536, 10)], ids=str)
def bench_categorical_exact(benchmark, backend, shape):
    def fused(logits, target, table, backend):
        return pk.categorical_policy_loss(logits, target, table, entropy_coef=ENTROPY, backend=backend)

    def eager(logits, target, table):
        return peers.categorical_exact(logits, target, table, ENTROPY)

    def to_compile(logits, target, table):
        return peers.categorical_exact_to_compile(logits, target, table, ENTROPY)

    run(benchmark, gradients, fused, eager, categorical_inputs(*shape), backend, shape[0] * shape[1], to_compile)


@pytest.mark.parametrize("shape", [(4096, 10, 50)], ids=str)
def bench_categorical_dice(benchmark, backend, shape):
    rows, classes, group = shape

    def fused(logits, target, table, backend, seed=None):
        return pk.categorical_policy_loss(
            logits, target, table, entropy_coef=ENTROPY, estimator="dice", num_samples=group, seed=seed, backend=backend
        )

    def eager(logits, target, table):
        return peers.categorical_dice(logits, target, table, ENTROPY, group)

    run(benchmark, gradients, fused, eager, categorical_inputs(rows, classes), backend, rows * group, eager)
