"""What only the Numba backend has to hold."""

import json
from pathlib import Path

import pytest

from po_kernels.backends import numba
from po_kernels.backends.contract import OPS

MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks" / "baselines" / "numba.json").read_text())


@pytest.mark.parametrize("op", OPS)
def test_it_has_to_be_asked_unless_it_was_measured_faster_than_the_reference(op):
    faster = op in MEASURED and min(MEASURED[op].values()) >= 1
    assert (numba.must_be_asked(op, "cpu") is None) == faster


def test_its_kernels_know_nothing_of_llvm():
    for path in Path(numba.__file__).parent.glob("*.py"):
        assert "llvm" not in path.read_text().replace("LLVM makes", ""), path
