"""The PTX of every CUDA C++ kernel, in both orders, against the reference: `make test-ptx` runs this."""

import re

import pytest
import torch

from po_kernels.backends.cuda import kernels
from tests.ops import bounds
from tests.ops.cases import (
    DIFFERENTIABLE,
    ESTIMATORS,
    GAUSSIAN_LOSSES,
    LOSSES,
    PRECISIONS,
    REDUCTIONS,
    Case,
    derivatives,
    draw,
)

from . import cuda_calls
from .calls import simulated
from .memory import Fault

pytestmark = pytest.mark.skipif(cuda_calls.missing() is not None, reason=str(cuda_calls.missing()))

DIMENSIONS = (1, 3, 17)
OPS = [op for op in DIFFERENTIABLE if op.startswith(cuda_calls.FAMILIES)]
CALLS = [
    (op, estimator) for op in OPS for estimator in ESTIMATORS.get(op, ("",)) if estimator != "reinforce"
]  # fmt: skip


def agrees(case: Case) -> None:
    right = bounds.expected(case)
    with simulated(cuda_calls.CudaCalls()):
        lines = right.complaints(derivatives(case, "cuda", second=right.second))
    assert not lines, "\n".join(lines)


def drawn(op: str, estimator: str, number: int, dtype: torch.dtype, **how) -> Case:
    options = {"estimator": estimator, "precision_kind": PRECISIONS[number], "reduction": REDUCTIONS[number]}
    return draw(op, number, dtype, **{**(options if op in LOSSES else {}), **how})


@pytest.mark.parametrize("number", range(3), ids=[f"D{dim}" for dim in DIMENSIONS])
@pytest.mark.parametrize(("op", "estimator"), CALLS)
def test_first_and_second_order(op, estimator, number, monkeypatch):
    """Five rows by one warp each, or by blocks of three."""
    for dtype, most in ((torch.float32, 2), (torch.float64, kernels._MOST_BLOCKS)):
        monkeypatch.setattr(kernels, "_MOST_BLOCKS", most)
        agrees(drawn(op, estimator, number, dtype, lead=(5,), dim=DIMENSIONS[number], group=3 + 2 * number))


@pytest.mark.parametrize(("op", "estimator"), [(op, "dice" if op in LOSSES else "") for op in OPS])
def test_more_samples_than_threads(op, estimator):
    agrees(drawn(op, estimator, 0, torch.float32, lead=(2,), dim=3, group=70))


@pytest.mark.parametrize(
    ("pattern", "replacement", "complaint"),
    [
        (r"bar\.sync\s+0", "//", "race"),
        (r"bar\.warp\.sync", "//", "race"),
        (r"setp\.ge\.s64", "setp.gt.s64", "out of bounds"),
        (r"(st\.global\.f32\s+\[%rd\d+)\]", r"\1+4]", "out of bounds|race"),
        (r"(ld\.global\.f32\s+%f\d+, \[%rd\d+)\]", r"\1+4]", "out of bounds"),
    ],
    ids=["barrier-of-block", "barrier-of-warp", "one-more", "store-off-by-one", "load-off-by-one"],
)
@pytest.mark.parametrize("op", GAUSSIAN_LOSSES)
def test_faults(op, pattern, replacement, complaint, monkeypatch):
    monkeypatch.setattr(kernels, "_MOST_BLOCKS", 2)
    case = drawn(op, "dice", 2, torch.float32, lead=(5,), dim=6, group=7, reduction="mean")
    calls = cuda_calls.CudaCalls(lambda text: re.sub(pattern, replacement, text))
    with simulated(calls), pytest.raises(Fault, match=f"^({complaint})"):
        torch.autograd.grad(case(*(inputs := case.inputs), backend="cuda").sum(), inputs)
