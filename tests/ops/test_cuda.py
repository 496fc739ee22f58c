"""The CUDA C++ backend. Without a GPU its kernels run on the host, which needs a process of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import po_kernels as pk
from po_kernels import dispatch, extension
from po_kernels.backends import cuda as backend

from .cases import DEVICE

FOLDER = Path(__file__).parent

built = pytest.mark.skipif(
    extension.module is None or not extension.build["cuda"], reason="the extension was built without CUDA"
)
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, and --device cuda")


def emulated(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PO_KERNELS_CUDA_EMULATE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PO_KERNELS_BACKEND", None)
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@built
@pytest.mark.slow
def test_on_the_host():
    """What is written for it, and the suite of the ops, in one process."""
    names = ("test_contract", "test_numbers", "test_derivatives", "test_philox", "test_gaussian", "test_mvn")
    # Two threads, or a fork, share nothing here; of groups in the thousands shared memory does not hold the rewards.
    without = "threads or fork or 25_eps or monte_carlo or spread"
    files = [str(FOLDER / f"{name}.py") for name in ("cuda_emulated", *names)]
    emulated(*files, "-k", f"cuda_emulated or (cuda and not ({without}))")


@built
def test_the_host_serves_cpu_tensors_by_name_only(monkeypatch):
    monkeypatch.setenv("PO_KERNELS_CUDA_EMULATE", "1")
    assert backend.unavailable() is None
    assert backend.unserved("cpu", torch.float32) is None
    assert "emulator" in backend.must_be_asked("gaussian_policy_loss", "cpu")
    monkeypatch.setenv("PO_KERNELS_CUDA_EMULATE", "0")
    assert "CUDA" in backend.unserved("cpu", torch.float32)


def test_what_it_refuses():
    assert "categorical_policy_loss" not in backend.KERNELS
    assert "bfloat16" in backend.unserved("cuda", torch.bfloat16)
    assert backend.unserved("cuda", torch.float64) is None


def test_triton_or_the_reference_is_chosen_unasked(monkeypatch):
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backend, "KERNELS", {"gaussian_policy_loss": None})  # also where there is no nvcc
    monkeypatch.setattr(dispatch, "_decisions", {})
    decision = dispatch._automatic("gaussian_policy_loss", "cuda", torch.float32)
    assert decision.backend in ("triton", "reference")
    assert "faster than triton" in decision.refused["cuda"]


class Extension:
    """An extension that says this of the machine."""

    def __init__(self, error: str) -> None:
        self.error = error

    def cuda_state(self) -> dict:
        return {"devices": 0, "runtime_version": 13000, "driver_version": 12020, "error": self.error}


@pytest.mark.parametrize(
    ("cuda", "visible", "error", "capability", "reason"),
    [
        ("", True, "", (9, 0), "built without CUDA: no nvcc"),
        ("sm_90", False, "", (9, 0), "torch sees no CUDA device"),
        (
            "sm_90",
            True,
            "driver is insufficient",
            (9, 0),
            r"runtime 13.0, .* driver for CUDA 12.2: driver is insuffici",
        ),
        ("sm_90", True, "", (7, 5), "8.0 or higher, not 7.5"),
        ("sm_90", True, "", (12, 0), None),
    ],
)
def test_why_it_is_unavailable(cuda, visible, error, capability, reason, monkeypatch):
    monkeypatch.delenv("PO_KERNELS_CUDA_EMULATE", raising=False)
    monkeypatch.setattr(extension, "build", {"cuda": cuda, "cuda_reason": "no nvcc"})
    monkeypatch.setattr(extension, "module", Extension(error))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = backend.unavailable()
    assert found == reason if reason is None else re.search(reason, found)


def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match=r"^gaussian_policy_loss: log_std: .* on cpu like mean, got one on meta"):
        pk.gaussian_policy_loss(
            torch.zeros(2, 3, device="cpu"), torch.zeros(3, device="meta"), torch.zeros(2, 3, device="cpu"), 1.0,
            backend="cuda",
        )  # fmt: skip


def cuobjdump() -> str | None:
    """The tool of the CUDA toolkit, which Triton ships too."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(shipped) if shipped.exists() else None)


def dumped(what: str) -> str:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump, of the CUDA toolkit or of Triton, is not here")
    return subprocess.run([tool, what, extension.module.__file__], capture_output=True, text=True, check=True).stdout


@built
def test_first_order_kernels_spill_nothing(request):
    """Of each kernel and architecture in the extension: registers and stack a thread. What is spilled lies there."""
    kernels = {}
    architecture = ""
    for line in dumped("-res-usage").splitlines():
        if found := re.match(r"arch = (\S+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif "REG:" in line and (found := re.search(r"([A-Z]\w+Rows)I(\w*?)NS\w*?_\d+([A-Z]\w*?Scale)E(\w*?)EE", name)):
            value = found[2].replace("NS0_4DualI", "dual ").strip("E")
            usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line))
            kernels[architecture, found[1] + found[4], value, found[3]] = {
                key: int(number) for key, number in usage.items()
            }
    assert {key[0] for key in kernels} == {"sm_80", "sm_90"}
    assert len(kernels) == 2 * 5 * 4 * 2, sorted(kernels)
    for key, usage in kernels.items():
        request.node.user_properties.append((" ".join(key), usage))
        if "dual" not in key[2]:
            assert usage["STACK"] == 0, (key, usage)
            assert usage["LOCAL"] == 0, (key, usage)


@built
def test_newer_devices_compile_it_themselves():
    assert "sm_90.ptx" in dumped("-lptx")


# ---- On a GPU ----


def loss_and_gradients(inputs: list[torch.Tensor], seed: torch.Tensor) -> list[torch.Tensor]:
    loss = pk.gaussian_policy_loss(*inputs, estimator="dice", num_samples=16, seed=seed, backend="cuda")
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def policy_inputs(device: str) -> list[torch.Tensor]:
    rows, dim = 100, 5
    inputs = [torch.randn(rows, dim, device=device) for _ in range(3)]
    return [x.requires_grad_() for x in (*inputs, torch.eye(dim, device=device))]


@on_a_gpu
def test_a_captured_step_replays_with_a_fresh_seed():
    inputs, seed = policy_inputs("cuda"), torch.tensor(1, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_and_gradients(inputs, seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(inputs, seed)
    for number in (1, 2, 3):
        seed.fill_(number)
        graph.replay()
        for found, expected in zip(captured, loss_and_gradients(inputs, seed), strict=True):
            assert torch.equal(found, expected)


@on_a_gpu
def test_a_seed_may_be_on_the_cpu():
    inputs = policy_inputs("cuda")
    results = [loss_and_gradients(inputs, torch.tensor(3, device=device)) for device in ("cpu", "cuda")]
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    first = [x.detach().to("cuda:0").requires_grad_() for x in policy_inputs("cpu")]
    second = [x.detach().to("cuda:1").requires_grad_() for x in first]
    with torch.cuda.device(0):
        results = [loss_and_gradients(x, torch.tensor(3, device=x[0].device)) for x in (first, second)]
        assert torch.cuda.current_device() == 0
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found.cpu(), expected.cpu())
