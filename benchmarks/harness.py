"""Ratios of interleaved runs in one process: machines are shared and noisy, and absolute times say little."""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import po_kernels as pk

# Seconds that a comparison of two runs may take.
BUDGET = float(os.environ.get("PO_KERNELS_BENCH_SECONDS", "2"))


class Ratio(NamedTuple):
    """How many times as long a peer takes.

    Attributes:
        median: of the ratios of neighbouring runs.
        spread: half the range between their quartiles, relative to the median.
        seconds: median time of our run.
    """

    median: float
    spread: float
    seconds: float


def host_clock(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def compare(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    budget: float = BUDGET,
    clock: Callable[[Callable[[], Any]], float] = host_clock,
) -> Ratio:
    """Runs both as A B B A A B ..., after a warm-up, for about `budget` seconds but at least nine pairs."""
    for _ in range(2):
        ours(), peer()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times[0]) < 9:
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for which in order:
            times[which].append(clock((ours, peer)[which]))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, 0.5 * (high - low) / median, statistics.median(times[0]))


def check(found: Sequence[Tensor], expected: Sequence[Tensor], what: str, tolerance: float = 1e-3) -> None:
    """Refuses to time a wrong answer: float32 against float64, relative to the largest entry."""
    for x, y in zip(found, expected, strict=True):
        error = float((x.double() - y.double()).abs().max() / (y.double().abs().max() + 1e-12))
        if not error <= tolerance:
            raise AssertionError(f"{what}: relative error {error:.2g}")


def peak_extra_bytes(run: Callable[[], Sequence[Tensor]]) -> int | None:
    """The most memory that a run has at once besides what it returns, from the kernel's count; None elsewhere."""
    counters, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not counters.exists():
        return None

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    counters.write_text("5")  # the peak is what there is now
    before = kilobytes("VmRSS")
    outputs = run()
    returned = sum(x.numel() * x.element_size() for x in outputs)
    return max(0, (kilobytes("VmHWM") - before) * 1024 - returned)


def versions() -> dict[str, Any]:
    return {
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
        "simd": pk.status()["simd"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "po_kernels": pk.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gaussian_inputs(rows: int, dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    root = torch.randn(dim, dim) / dim**0.5
    tensors = (
        torch.randn(rows, dim),
        0.1 * torch.randn(rows, dim),
        torch.randn(rows, dim),
        root @ root.mT + torch.eye(dim),
    )
    mean, log_std, target, precision = tensors
    return [mean.requires_grad_(), log_std.requires_grad_(), target, precision.requires_grad_()]


def mvn_inputs(rows: int, dim: int) -> list[Tensor]:
    mean, _, target, precision = gaussian_inputs(rows, dim)
    tril = torch.tril(0.2 * torch.randn(rows, dim, dim), -1) + torch.diag_embed(0.5 + torch.rand(rows, dim))
    return [mean, tril.requires_grad_(), target, precision]


def categorical_inputs(rows: int, classes: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(rows, classes, requires_grad=True),
        torch.randint(classes, (rows,)),
        torch.randn(classes, classes, requires_grad=True),
    ]


def gradients(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*inputs)
    return (value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad]))


def products(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Hessian-vector and mixed products along the gradient's own part of the first two."""
    wanted = [x for x in inputs if x.requires_grad]
    first = torch.autograd.grad(loss(*inputs), wanted[:2], create_graph=True)
    return torch.autograd.grad(first, wanted, [g.detach() for g in first])
