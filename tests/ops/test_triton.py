"""The Triton backend without a GPU: its kernels in Triton's interpreter, and compiled ahead of time.

The interpreter is chosen when kernels are declared, so that it needs a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from po_kernels.backends import triton as backend
from po_kernels.backends.contract import OpConfig

from .cases import LOG_PROBS, LOSSES, POLICY_LOSSES, SAMPLES

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import ahead_of_time

FOLDER = Path(__file__).parent


def interpreted(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PO_KERNELS_BACKEND", None)
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_in_the_interpreter():
    interpreted(str(FOLDER / "triton_interpreted.py"))


def test_random_numbers_in_the_interpreter():
    """Integers to the bit; of the half precisions, which draw from the same thresholds, none again."""
    interpreted(str(FOLDER / "test_philox.py"), "-k", "triton and not distribution and not dtype2 and not dtype3")


def test_the_interpreter_serves_cpu_tensors_by_name_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable() is None
    assert backend.refuses("gaussian_policy_loss", "cpu", torch.float32) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA" in backend.refuses("gaussian_policy_loss", "cpu", torch.float32)


# Compilation: rows do not matter, and shapes are typical of their op.
ROWS = 64
SHAPES = {"gaussian": ((17, 64), (64, 16)), "mvn": ((8, 16), (32, 16)), "categorical": ((32, 16),), "group": ((1, 64),)}
# Of second order: what is unrolled takes a minute to compile at 17 dimensions.
FEW = {"gaussian": (8, 16), "mvn": (4, 8)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def compile_all(
    op: str, order: str, shape: tuple[int, int], dtype: torch.dtype, config: OpConfig, *capabilities: int
) -> list:
    dim, group = shape
    inputs, constants = ahead_of_time.tensors(op, ROWS, dim, group, dtype)
    if config.estimator in ("analytic", "exact"):
        constants = constants[:-1]
    compute = torch.float32 if dtype == torch.bfloat16 else dtype
    wide = op in LOG_PROBS or op == "group_advantage"
    cotangent = torch.ones((group, ROWS, dim) if op in SAMPLES else (group, ROWS) if wide else (), dtype=compute)
    launches = ahead_of_time.launches_of(
        op, order, inputs, constants, config, cotangent, want_stats=order == "first" and op in LOSSES
    )
    assert launches
    return [ahead_of_time.compiled(each, capability) for each in launches for capability in capabilities]


def config_of(op: str, estimator: str, group: int) -> OpConfig:
    closed = estimator in ("analytic", "exact")
    return OpConfig(estimator, 0 if closed else group, "standardized", None if closed else 0.1, 0.5, "mean", 0)


ESTIMATORS = {"policy_loss": ("dice", "reparam", "analytic"), "surrogate_loss": ("dice",)}
CALLS = [
    (op, estimator)
    for op in (*LOSSES, *LOG_PROBS, *SAMPLES, "group_advantage")
    for estimator in next((found for what, found in ESTIMATORS.items() if op.endswith(what)), ("",))
]
CALLS = [
    (op, "exact" if op.startswith("categorical") and estimator == "analytic" else estimator)
    for op, estimator in CALLS
    if not (op == "categorical_policy_loss" and estimator == "reparam")
]


def record(request, shape: tuple[int, int], kernel, resources: ahead_of_time.Resources) -> None:
    """In the report of --junitxml; the fixture for it warns of the format."""
    name = f"{shape} {kernel.metadata.name} sm_{kernel.metadata.target.arch}"
    request.node.user_properties.append((name, resources._asdict()))


# Below its limit of 255 registers a thread ptxas may put a few bytes aside for more threads to fit a multiprocessor.
FEW_BYTES = 16


@pytest.mark.parametrize(("op", "estimator"), CALLS)
def test_first_order_compiles_without_spills(op, estimator, request):
    order = "sample" if op == "categorical_sample" else "first"
    for shape in SHAPES[op.split("_")[0]][: 2 if estimator == "dice" else 1]:
        config = config_of(op, estimator, shape[1])
        for kernel, resources in compile_all(op, order, shape, torch.float32, config, 80, 90):
            record(request, shape, kernel, resources)
            assert resources.spills <= (FEW_BYTES if resources.registers < 255 else 0), (shape, resources)


@pytest.mark.parametrize(
    ("op", "estimator"), [call for call in CALLS if call[0] != "categorical_sample" and call[1] != "reparam"]
)
def test_second_order_compiles(op, estimator, request):
    shape = FEW.get(op.split("_")[0]) or SHAPES[op.split("_")[0]][0]
    config = config_of(op, estimator, shape[1])
    for kernel, resources in compile_all(op, "second", shape, torch.float32, config, 80, 90):
        record(request, shape, kernel, resources)


EVERY = (*LOSSES, *LOG_PROBS, *SAMPLES, "group_advantage")
OTHERS = [(op, torch.float64, (80, 90)) for op in EVERY] + [(op, torch.bfloat16, (90,)) for op in EVERY]
OTHERS += [(op, torch.float16, (80,)) for op in POLICY_LOSSES]


@pytest.mark.parametrize(("op", "dtype", "capabilities"), OTHERS, ids=str)
def test_other_dtypes_compile(op, dtype, capabilities):
    order = "sample" if op == "categorical_sample" else "first"
    compile_all(op, order, (4, 4), dtype, config_of(op, "dice", 4), *capabilities)


def test_a_row_more_takes_no_new_kernel():
    """What a launch is specialised on does not change with the number of rows."""
    keys = set()
    for rows in (1, 2, 16, 1000, 4096):
        inputs, constants = ahead_of_time.tensors("gaussian_surrogate_loss", rows, 5, 4, torch.float32)
        for each in ahead_of_time.launches_of(
            "gaussian_surrogate_loss", "first", inputs, constants, config_of("", "dice", 4)
        ):
            keys.add(ahead_of_time.specialisation(each))
    assert len(keys) == 2  # the loss, and the sum over programs
