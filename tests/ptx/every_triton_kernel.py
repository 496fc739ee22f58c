"""The PTX of every Triton kernel, in both orders, against the reference: `make test-ptx` runs this."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.ops import bounds
from tests.ops.cases import ADVANTAGES, DIFFERENTIABLE, ESTIMATORS, LOSSES, REDUCTIONS, Case, derivatives, draw

pytest.importorskip("triton", reason="triton is not installed")

from po_kernels.backends import triton as backend
from po_kernels.backends.triton import lanes, launch, mvn, rescale, token
from tests.ops import triton_interpreted as interpreted

from .calls import simulated
from .machine import Machine
from .triton_calls import TritonCalls, lines_of

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_tokens_in_half_precision(dtype, capability, softcap, monkeypatch):
    """As they lie in memory, in blocks of columns; the gradient is rounded to them."""
    monkeypatch.setattr(token, "_LARGEST_BLOCK", 256)
    case = draw("token_log_prob", 2, lead=(3,), dim=301, mask=False, softcap=softcap, ignore_index=None).to(dtype)
    right = derivatives(case, "reference")
    with simulated(TritonCalls(capability)):
        found = derivatives(case, "triton")
    for order in right:
        for x, y in zip(found[order], right[order], strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x.float(), y.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("op", LOSSES)
def test_groups_in_chunks_and_programs_of_many_blocks(op, monkeypatch):
    """On sm_90: every loop is taken more than once."""
    if "categorical" not in op:
        for name in ("tile", "drawn_tile"):
            monkeypatch.setattr(launch, name, interpreted.in_chunks_of_two)
    monkeypatch.setattr(launch, "_USUAL_PROGRAMS", 2)
    monkeypatch.setattr(launch, "_SMALLEST_TILE", 32)
    options = {"precision_kind": "diagonal", "advantage": "standardized", "estimator": "dice", "reduction": "mean"}
    agrees(draw(op, 2, torch.float32, lead=(ROWS,), dim=2, group=3, mask=False, **options), 90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_categorical_samples(dtype):
    case = draw("categorical_sample", 1, dtype, lead=(ROWS,), dim=17, group=5)
    with simulated(TritonCalls(90)):
        found = case(backend="triton")
    assert torch.equal(found, case())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_is_summed_by_products_of_matrices(dtype):
    options = {"estimator": "dice", "advantage": "mean", "reduction": "sum", "mask": False}
    agrees(draw("categorical_policy_loss", 3, dtype, lead=(ROWS,), dim=17, group=3, **options), 90)


@pytest.mark.parametrize("sums", ["test_sums_over_chunks", "test_sums_over_rows"])
def test_runs_in_float64(sums, monkeypatch):
    """What is summed over more terms than a run."""
    for name in ("tile", "drawn_tile"):
        monkeypatch.setattr(launch, name, interpreted.in_chunks_of_two)
    monkeypatch.setattr(launch, "RUN", 4)
    monkeypatch.setattr(launch, "_MOST_SUMS", 1)
    with simulated(TritonCalls()):
        getattr(interpreted, sums)()


@pytest.mark.parametrize("op", ["categorical_policy_loss", "mvn_surrogate_loss"])
def test_copies_of_sums_in_memory_are_not_used(op, monkeypatch):
    """Of threads that read the same, all but the first get nan: what `TritonCalls.rules` lets pass changes nothing."""
    sources = (*lines_of(lanes.accumulate, "tl.load"), *lines_of(mvn.add_gradient, "tl.load"))
    load, spoiled = Machine.load, 0

    def spoiling(self: Machine, address: np.ndarray, mask: np.ndarray | None, *rest: Any) -> list[np.ndarray]:
        nonlocal spoiled
        found = load(self, address, mask, *rest)
        if rest[-1][2].startswith(sources):
            threads = self.threads if mask is None else self.threads[mask]
            _, first = np.unique(address[threads], return_index=True)
            copies = np.delete(threads, first)
            spoiled += len(copies)
            for x in found:
                x[copies] = np.array([-1], f"i{x.itemsize}").view(x.dtype)[0]
        return found

    monkeypatch.setattr(Machine, "load", spoiling)
    if op.startswith("mvn"):
        for name in ("tile", "drawn_tile"):
            monkeypatch.setattr(launch, name, interpreted.in_chunks_of_two)
    options = {"precision_kind": "diagonal", "advantage": "standardized", "estimator": "dice", "reduction": "mean"}
    agrees(draw(op, 2, torch.float32, lead=(ROWS,), dim=2, group=3, mask=False, **options), 90)
    assert spoiled > 0


def test_gradients_times_a_cotangent():
    x, y = torch.randn(5000), torch.randn(3)
    right = 1.7 * x, 1.7 * y
    TritonCalls(80).run(
        rescale.rescale, (2,), 4, x0=x, x1=y, x2=x, x3=x, n0=len(x), n1=len(y), n2=0, n3=0, factor=torch.tensor(1.7),
        BLOCK=4096,
    )  # fmt: skip
    assert torch.equal(x, right[0])
    assert torch.equal(y, right[1])
