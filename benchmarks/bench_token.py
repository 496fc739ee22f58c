"""Token statistics against what a user would write, at the sizes of vocabularies."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import po_kernels as pk
from benchmarks.harness import check, compare, gradients, peak_extra_bytes, versions

# Both results weigh in what is differentiated.
ENTROPY = 0.1


class Case(NamedTuple):
    name: str
    rows: int
    classes: int
    dtype: torch.dtype


ROWS = [
    Case("256 x 49152", 256, 49152, torch.float32),
    Case("64 x 151936, bfloat16", 64, 151936, torch.bfloat16),
]
PARAMETERS = [pytest.param(case, id=case.name) for case in ROWS]


def logits_of(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = 2 * torch.randn(case.rows, case.classes)
    return logits.to(case.dtype).requires_grad_(), torch.randint(case.classes, (case.rows,))


def eager(logits: Tensor, ids: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (log_p.gather(-1, ids[:, None])[:, 0] + ENTROPY * entropy).sum()


def fused(logits: Tensor, ids: Tensor, **options: Any) -> Tensor:
    found = pk.token_log_prob(logits, ids, entropy=True, **options)
    return (found.log_prob + ENTROPY * found.entropy).sum()


def without_gradient(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return function(*inputs)


def product(function: Callable[..., Tensor], logits: Tensor, ids: Tensor, direction: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(function(logits, ids), logits, create_graph=True)
    (found,) = torch.autograd.grad(gradient, logits, direction)
    return found


def report(benchmark: Any, run: Callable[[], Any], **info: Any) -> None:
    benchmark.extra_info.update(versions(), **info)
    benchmark.pedantic(run, rounds=3)


@pytest.mark.parametrize("case", PARAMETERS)
def bench_token_gradient(benchmark, case):
    """Log-probability, entropy and gradient; `copy` is how long a copy into new memory takes beside it."""
    logits, ids = logits_of(case)
    ours = partial(gradients, fused, (logits, ids))
    right = gradients(partial(fused, backend="reference"), (logits.detach().double().requires_grad_(), ids))
    check(ours(), right, case.name, 1e-2 if case.dtype == torch.bfloat16 else 1e-3)
    copies = compare(logits.detach().clone, ours)  # into new memory, as the gradient is
    report(
        benchmark, ours, shape=f"{case.name}, gradient",
        eager=compare(ours, partial(gradients, eager, (logits, ids)))._asdict(), copy=copies._asdict(),
    )  # fmt: skip


@pytest.mark.parametrize("case", PARAMETERS)
def bench_token_forward(benchmark, case):
    """Without a gradient, against eager torch, torch.compile, and reading the logits once for their largest."""
    logits, ids = logits_of(case)
    ours = partial(without_gradient, fused, logits, ids)
    check([ours()], [without_gradient(eager, logits.double(), ids)], case.name)
    torch._dynamo.reset()
    compiled = torch.compile(eager)
    reading = logits.detach().view(torch.int32 if case.dtype == torch.bfloat16 else case.dtype)
    report(
        benchmark, ours, shape=f"{case.name}, forward",
        eager=compare(ours, partial(without_gradient, eager, logits, ids))._asdict(),
        compiled=compare(ours, partial(without_gradient, compiled, logits, ids))._asdict(),
        read=compare(reading.amax, ours)._asdict(),
    )  # fmt: skip


def bench_token_product(benchmark):
    """A product with the Hessian."""
    logits, ids = logits_of(ROWS[0])
    direction = torch.randn_like(logits)
    ours = partial(product, fused, logits, ids, direction)
    double = logits.detach().double().requires_grad_()
    check([ours()], [product(eager, double, ids, direction.double())], "product")
    peer = partial(product, eager, logits, ids, direction)
    report(benchmark, ours, shape=f"{ROWS[0].name}, product", eager=compare(ours, peer)._asdict())


def bench_linear_token(benchmark):
    """From hidden states: time and memory against eager torch, and torch's own chunks, which have no entropy."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 576).requires_grad_(), (0.05 * torch.randn(49152, 576)).requires_grad_()
    ids = torch.randint(49152, (512,))

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        found = pk.linear_token_log_prob(hidden, weight, ids, entropy=True)
        return (found.log_prob + ENTROPY * found.entropy).sum()

    def peer(hidden: Tensor, weight: Tensor) -> Tensor:
        return eager(hidden @ weight.mT, ids)

    run, other = partial(gradients, ours, (hidden, weight)), partial(gradients, peer, (hidden, weight))
    check(run(), other(), "linear head")
    info: dict[str, Any] = {"eager": compare(run, other)._asdict()}
    if hasattr(functional, "linear_cross_entropy"):
        chunked = partial(functional.linear_cross_entropy, target=ids, reduction="sum")
        info["linear_cross_entropy"] = compare(run, partial(gradients, chunked, (hidden, weight)))._asdict()
    sizes = {"peak_extra_mb": peak_extra_bytes(run), "eager_peak_extra_mb": peak_extra_bytes(other)}
    info |= {name: None if size is None else size / 2**20 for name, size in sizes.items()}
    report(benchmark, run, shape="512 x 576 by 49152 x 576", **info)
