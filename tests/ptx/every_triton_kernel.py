"""The PTX of every Triton kernel, in both orders, against the reference: `make test-ptx` runs this."""

import pytest
import torch

from tests.ops import bounds
from tests.ops.cases import ADVANTAGES, DIFFERENTIABLE, ESTIMATORS, LOSSES, REDUCTIONS, Case, derivatives, draw

pytest.importorskip("triton", reason="triton is not installed")

from po_kernels.backends import triton as backend
from po_kernels.backends.triton import launch, token

from .calls import simulated
from .triton_calls import TritonCalls

DIMENSIONS = (1, 3, 17)
KINDS = ("scalar", "full", "diagonal")  # a full one of 17 dimensions takes most of a minute to compile
ROWS = 5  # no multiple of a block's
OPS = [op for op in DIFFERENTIABLE if op in backend.KERNELS]


def agrees(case: Case, capability: int = 80) -> TritonCalls:
    """Within the bounds of the reference's own tests, and with nothing reported."""
    right = bounds.expected(case)
    with simulated(TritonCalls(capability)) as calls:
        lines = right.complaints(derivatives(case, "triton", second=right.second))
    assert not lines, "\n".join(lines)
    return calls


def variants(op: str) -> list[dict]:
    """reinforce has the kernels of dice."""
    estimators = [estimator for estimator in ESTIMATORS.get(op, ()) if estimator != "reinforce"]
    return [{"estimator": estimator} for estimator in estimators] or [{}]


@pytest.mark.parametrize(("number", "dim"), [*enumerate(DIMENSIONS)], ids=[f"D{dim}" for dim in DIMENSIONS])
@pytest.mark.parametrize(
    ("op", "options"),
    [pytest.param(op, options, id="-".join([op, *options.values()])) for op in OPS for options in variants(op)],
)
def test_first_and_second_order(op, options, number, dim):
    dtype = (torch.float32, torch.float64)[number % 2]
    if op in LOSSES:
        names = [name for name, each in ADVANTAGES.items() if each.least <= 3]
        turn = {"advantage": names[(number + len(op)) % len(names)], "reduction": REDUCTIONS[number]}
        options = {**turn, "precision_kind": KINDS[number], "mask": False, **options}
    agrees(draw(op, number, dtype, lead=(ROWS,), dim=dim, group=3 + 2 * number, **options))
