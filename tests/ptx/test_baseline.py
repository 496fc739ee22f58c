"""The gate on what the kernels take."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

from .__main__ import worse


def test_a_kernel_that_takes_more_than_its_baseline_is_named():
    kernels = {
        "op triton float32 sm_80": {"instructions": 100.0, "spills": 0},
        "op triton float32 sm_90": {"spills": 8},
    }
    baseline = {"triton": triton.__version__, "kernels": kernels}
    assert worse(kernels, baseline) == []
    found = {
        "op triton float32 sm_80": {"instructions": 106.0, "spills": 4},
        "other triton float32 sm_80": {"spills": 0},
    }
    assert worse(found, baseline) == [
        "op triton float32 sm_80: instructions 106, was 100", "op triton float32 sm_80: spills 4, was 0",
        "op triton float32 sm_90: only in the baseline", "other triton float32 sm_80: not in the baseline",
    ]  # fmt: skip
    assert "--renew" in worse(found, baseline | {"triton": "0"})[0]
