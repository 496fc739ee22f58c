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
from po_kernels.backends.contract import OPS, OpConfig

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import ahead_of_time, instructions

FOLDER = Path(__file__).parent


def test_in_the_interpreter():
    """Of random numbers integers to the bit; none again in half precision, which draws from the same thresholds."""
    chosen = [
        str(FOLDER / "triton_interpreted.py"),
        str(FOLDER / "test_philox.py"),
        "-k",
        "triton and not distribution and not dtype2 and not dtype3",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--durations=10", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PO_KERNELS_BACKEND", None)
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout)
    assert " passed" in done.stdout


def test_the_interpreter_serves_cpu_tensors_by_name_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable() is None
    assert backend.unserved("cpu", torch.float32) is None
    assert backend.must_be_asked("gaussian_policy_loss", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA" in backend.unserved("cpu", torch.float32)


# Compilation: rows do not matter, and shapes are typical of their op. The numbers are dimensions and samples.
SHAPES = {
    "gaussian": ((17, 64), (64, 16)), "mvn": ((8, 16), (32, 16)), "categorical": ((32, 16),), "group": ((1, 64),),
    "token": ((49152, 1),), "linear": ((5000, 4),), "gae": ((1, 128),),
}  # fmt: skip
# Of second order, and of pathwise derivatives: what is unrolled takes a minute to compile at larger ones.
FEW = {"gaussian": (8, 16), "mvn": (4, 8)}
CALLS = [  # reinforce has the kernels of dice
    (op, estimator)
    for op, row in OPS.items()
    if op in backend.KERNELS
    for estimator in row.estimators or ("",)
    if estimator != "reinforce" and (estimator != "reparam" or op.endswith("policy_loss"))
]


def request_of(op: str, estimator: str, shape: tuple[int, int], rows: int = 64, **how) -> ahead_of_time.Request:
    closed = bool(estimator) and estimator == OPS[op].closed_form
    config = OpConfig(estimator, 0 if closed else shape[1], "standardized", None if closed else 0.1, 0.5, "mean", 0)
    return ahead_of_time.request(op, rows, *shape, config, **how)


def compiled(node, op: str, estimator: str, shape: tuple[int, int], *capabilities: int, **how) -> list:
    """What a call's kernels take, which goes to the report of --junitxml; the fixture for it warns of the format."""
    found = []
    for launched in ahead_of_time.launches_of(op, request_of(op, estimator, shape, **how)):
        for capability in capabilities:
            kernel, resources = ahead_of_time.compiled(launched, capability)
            found.append(resources)
            name = f"{op} {estimator} {shape} {kernel.metadata.name} sm_{capability}"
            node.user_properties.append((name, resources._asdict()))
    assert found
    return found


# Below its limit of 255 registers a thread ptxas may put a few bytes aside for more threads to fit a multiprocessor.
FEW_BYTES = 16
# Where a bound on registers, for more warps to wait at once, was measured to be worth more.
BOUNDED = {("categorical_policy_loss", "exact"): 640}


@pytest.mark.parametrize(("op", "estimator"), CALLS)
def test_first_order_compiles_without_spills(op, estimator, request):
    policy = op.split("_")[0]
    shapes = SHAPES[policy][: 2 if estimator == "dice" else 1]
    if estimator == "reparam":
        shapes = (FEW[policy],)
    for shape in shapes:
        for resources in compiled(request.node, op, estimator, shape, 80, 90, want_stats=OPS[op].is_loss):
            allowed = BOUNDED.get((op, estimator), FEW_BYTES if resources.registers < 255 else 0)
            assert resources.spills <= allowed, (shape, resources)


@pytest.mark.parametrize(
    ("op", "estimator"), [call for call in CALLS if OPS[call[0]].differentiable and call[1] != "reparam"]
)
def test_second_order_compiles(op, estimator, request):
    policy = op.split("_")[0]
    compiled(request.node, op, estimator, FEW.get(policy) or SHAPES[policy][0], 80, second=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_compile_in_half_precision(dtype, request):
    for second in (False, True):
        for resources in compiled(request.node, "token_log_prob", "", (151936, 1), 80, 90, dtype=dtype, second=second):
            assert resources.spills == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("order", "read", "written"), [("forward", 1, 0), ("backward", 1, 1), ("second", 4, 1)])
def test_bytes_of_a_row_of_logits(dtype, order, read, written):
    """As a thread's loads and stores say. The floor, which a second order of two passes does not reach, is 3 there."""
    for capability in (80, 90):
        assert instructions.token_row(dtype, 151_936, order, capability)[:2] == (read, written)


@pytest.mark.parametrize("op", backend.KERNELS)
def test_float64_compiles(op, request):
    compiled(request.node, op, "dice" if OPS[op].is_loss else "", (4, 4), 90, dtype=torch.float64)


@pytest.mark.parametrize(("op", "estimator"), CALLS)
def test_a_row_more_takes_no_new_kernel(op, estimator):
    """What a launch is specialised on does not change with the number of rows."""
    keys = set()
    for rows in (1, 2, 16, 1000, 4096, 2**16 + 1):
        for each in ahead_of_time.launches_of(op, request_of(op, estimator, (5, 4), rows)):
            keys.add((ahead_of_time.source_of(each, 90).hash(), each.warps))
    assert len(keys) == (3 if OPS[op].is_loss else 1)  # the loss, and the sums over few programs and over many
