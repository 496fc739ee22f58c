"""Loss and all gradients, and second-order products, of the fused ops against what a user would write.

`make bench` runs these; each checks its answer against the reference in float64 before it is timed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import po_kernels as pk
from benchmarks import peers
from benchmarks.harness import (
    categorical_inputs,
    check,
    compare,
    gaussian_inputs,
    gradients,
    mvn_inputs,
    peak_extra_bytes,
    products,
    versions,
)  # fmt: skip
from po_kernels import extension

ENTROPY = 0.5


class Case(NamedTuple):
    """One loss of one shape.

    Attributes:
        fused: takes (*inputs, **options), with a seed among the options if it draws samples.
        eager: the peer; to_compile what torch.compile gets, None if it gets nothing.
        group: G, 0 for a closed form.
        family: whose random numbers it draws, None for labels or none.
    """

    name: str
    fused: Callable[..., Any]
    eager: Callable[..., Tensor]
    to_compile: Callable[..., Any] | None
    inputs: Callable[[], list[Tensor]]
    group: int = 0
    second: bool = False
    family: str | None = None

    def elements(self, inputs: Sequence[Tensor]) -> int:
        """Sample elements, or elements of the policy's first parameter: what a time is divided by."""
        return inputs[0].numel() * max(self.group, 1)


def gaussian(rows: int, dim: int, group: int, *, second: bool = False, advantage: str = "loo") -> Case:
    fused = partial(
        pk.gaussian_policy_loss, entropy_coef=ENTROPY, estimator="dice", num_samples=group, advantage=advantage
    )
    if advantage == "min":
        eager = partial(peers.authors_gaussian, entropy_coef=ENTROPY, group=group)
        to_compile = None
    else:
        eager = partial(peers.gaussian_dice, entropy_coef=ENTROPY, group=group)
        to_compile = peers.second_order(eager) if second else eager
    name = "second order" if second else "dice" if to_compile else "dice, the authors' loss as peer"
    return Case(
        f"gaussian {name} {rows} x {dim}, G = {group}", fused, eager, to_compile, partial(gaussian_inputs, rows, dim),
        group, second, "gaussian",
    )  # fmt: skip


CASES = [
    gaussian(256, 17, 5),
    gaussian(4096, 17, 16),
    gaussian(4096, 17, 64),
    gaussian(65536, 17, 16),
    gaussian(4096, 2, 50),
    gaussian(4096, 17, 16, second=True),
    gaussian(4096, 17, 16, advantage="min"),
    Case(
        "gaussian analytic 65536 x 17",
        partial(pk.gaussian_policy_loss, entropy_coef=ENTROPY),
        partial(peers.gaussian_analytic, entropy_coef=ENTROPY),
        partial(peers.gaussian_analytic, entropy_coef=ENTROPY),
        partial(gaussian_inputs, 65536, 17),
    ),
    Case(
        "mvn dice 4096 x 8, G = 16",
        partial(pk.mvn_policy_loss, entropy_coef=ENTROPY, estimator="dice", num_samples=16),
        partial(peers.mvn_dice, entropy_coef=ENTROPY, group=16),
        partial(peers.mvn_dice, entropy_coef=ENTROPY, group=16),
        partial(mvn_inputs, 4096, 8),
        group=16,
        family="gaussian",
    ),
    Case(
        "categorical exact 65536 x 10",
        partial(pk.categorical_policy_loss, entropy_coef=ENTROPY),
        partial(peers.categorical_exact, entropy_coef=ENTROPY),
        partial(peers.categorical_exact_to_compile, entropy_coef=ENTROPY),
        partial(categorical_inputs, 65536, 10),
    ),
    Case(
        "categorical dice 4096 x 10, G = 50",
        partial(pk.categorical_policy_loss, entropy_coef=ENTROPY, estimator="dice", num_samples=50),
        partial(peers.categorical_dice, entropy_coef=ENTROPY, group=50),
        partial(peers.categorical_dice, entropy_coef=ENTROPY, group=50),
        partial(categorical_inputs, 4096, 10),
        group=50,
    ),
]
QUICK = {"gaussian dice 4096 x 17, G = 16", "categorical exact 65536 x 10"}
PARAMETERS = [
    pytest.param(case, id=case.name, marks=[pytest.mark.quick] if case.name in QUICK else []) for case in CASES
]


@pytest.mark.parametrize("case", PARAMETERS)
def bench_native(benchmark, case):
    """Against eager torch and torch.compile, with the memory that both need and the time of the random numbers."""
    run, inputs = _prepared(case, "native")
    ours = partial(run, partial(case.fused, backend="native"), inputs)
    eager = partial(run, case.eager, inputs)
    ratio = compare(ours, eager)
    info = benchmark.extra_info
    info.update(versions(), shape=case.name, eager=ratio._asdict())
    info["ns_per_element"] = ratio.seconds * 1e9 / case.elements(inputs)
    info["peak_extra_mb"] = _megabytes(peak_extra_bytes(ours))
    info["eager_peak_extra_mb"] = _megabytes(peak_extra_bytes(eager))
    if case.family:
        numbers = partial(_random_numbers_alone, inputs[0], case.group)
        info["random_numbers_share"] = 1 / compare(numbers, ours).median * (2 if case.second else 1)
    if case.to_compile is not None:
        torch._dynamo.reset()
        compiled = torch.compile(case.to_compile)
        wanted = [x.detach() for x in inputs]
        peer = partial(compiled, *wanted) if case.second else partial(run, compiled, inputs)
        info["compiled"] = compare(ours, peer)._asdict()
    benchmark.pedantic(ours, rounds=3)


@pytest.mark.parametrize("case", [each for each in PARAMETERS if not each.values[0].second])
def bench_numba(benchmark, case):
    """Against the native backend: how much of its speed is there without a compiler; the first order is all it has."""
    run, inputs = _prepared(case, "numba")
    ours = partial(run, partial(case.fused, backend="numba"), inputs)
    ratio = compare(ours, partial(run, partial(case.fused, backend="native"), inputs))
    benchmark.extra_info.update(versions(), shape=case.name, native=ratio._asdict())
    benchmark.extra_info["ns_per_element"] = ratio.seconds * 1e9 / case.elements(inputs)
    benchmark.pedantic(ours, rounds=3)


def bench_memory(benchmark):
    """Four million rows times samples times 17: what is needed at once besides inputs and outputs."""
    case = gaussian(65536, 17, 64)
    inputs = case.inputs()
    ours, eager = partial(gradients, case.fused, inputs), partial(gradients, case.eager, inputs)
    ours()
    benchmark.extra_info.update(
        versions(), shape=case.name, peak_extra_mb=_megabytes(peak_extra_bytes(ours)),
        eager_peak_extra_mb=_megabytes(peak_extra_bytes(eager)),
    )  # fmt: skip
    benchmark.pedantic(ours, rounds=3)


def _prepared(case: Case, backend: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """What is run, and on what; the answer has been checked against the reference."""
    run = products if case.second else gradients
    inputs = case.inputs()
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    seed = {"seed": 1} if case.group else {}
    right = run(partial(case.fused, backend="reference", **seed), exact)
    check(run(partial(case.fused, backend=backend, **seed), inputs), right, f"{case.name} on {backend}")
    return run, inputs


def _random_numbers_alone(like: Tensor, group: int) -> None:
    """The normals of (G, B, D) samples, made and dropped: what no sampled loss can be faster than."""
    rows, dim = like.shape
    extension.module.gaussian_sample(
        is_double=False, dual=False, rows=rows, dim=dim, num_samples=group, threads=torch.get_num_threads(), seed=1,
        row_offset=0, mean=like.data_ptr(), mean_stride=dim, scale=like.data_ptr(), scale_stride=dim,
    )  # fmt: skip


def _megabytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20
