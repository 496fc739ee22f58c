"""What only the Numba backend has to hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from po_kernels.backends import numba
from po_kernels.backends.contract import OPS

MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks" / "baselines" / "numba.json").read_text())


@pytest.mark.parametrize("op", OPS)
def test_it_has_to_be_asked_unless_it_was_measured_faster_than_the_reference(op):
    faster = op in MEASURED and min(MEASURED[op].values()) >= 1
    assert (numba.must_be_asked(op, "cpu") is None) == (faster or op in numba._SMALLER)


def test_its_kernels_know_nothing_of_llvm():
    for path in Path(numba.__file__).parent.glob("*.py"):
        assert "llvm" not in path.read_text().replace("LLVM makes", ""), path


def test_nowhere_to_keep_compiled_kernels():
    """As of a read-only install without a writable home: they are compiled in the process."""
    program = """
import numba.core.caching as caching, torch
caching.CacheImpl._locator_classes = caching.FunctionCache._impl_class._locator_classes = []
import po_kernels as pk
mean = torch.zeros(2, 3)
found = pk.gaussian_sample(mean, mean, 2, seed=1, backend="numba")
assert torch.allclose(found, pk.gaussian_sample(mean, mean, 2, seed=1, backend="reference"), atol=1e-6)
import po_kernels.backends.numba.gaussian as gaussian
assert type(gaussian._sample_kernel._cache).__name__ == "NullCache"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
