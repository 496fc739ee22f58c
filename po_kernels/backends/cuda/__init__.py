"""GPU kernels written in CUDA C++, part of the compiled extension.

With PO_KERNELS_CUDA_EMULATE=1 in the environment the same kernels run on the host, on CPU tensors, for calls that ask
for this backend by name: a check of them where there is no GPU. With `backward` in place of 1, what the threads of a
warp do at once is done in the opposite order, which must change nothing.
"""

import json
from pathlib import Path
from typing import Any

import torch

from ... import extension
from . import kernels
from .kernels import KERNELS

_MOST_SAMPLES = 1024  # whose rewards surely fit the shared memory of a block
_LEAST_CAPABILITY = (8, 0)  # of the code that CMakeLists.txt builds

# By op the least rows and samples, and the most dimensions, from which on these kernels have been measured to take 5%
# less time than Triton's in both orders, as CUDA graphs in float32: `benchmarks/gpu.sh` writes it.
MEASURED: dict[str, Any] = json.loads(Path(__file__).with_name("measured.json").read_text())


def unavailable() -> str | None:
    if extension.module is None:
        return extension.missing
    if not extension.build["cuda"]:
        return f"the extension was built without CUDA: {extension.build['cuda_reason']}"
    if kernels.emulated():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    state = extension.module.cuda_state()
    if state["error"]:
        runtime, driver = (f"{n // 1000}.{n % 1000 // 10}" for n in (state["runtime_version"], state["driver_version"]))
        return (
            f"the extension is linked to the CUDA runtime {runtime}, which finds no device with a driver for CUDA "
            f"{driver}: {state['error']}"
        )
    capability = max(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if capability < _LEAST_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or higher, not {}.{}".format(*capability)
    return None


def unserved(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda" and not (device_type == "cpu" and kernels.emulated()):
        return f"it serves CUDA tensors, not {device_type}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {dtype}"
    return None


def must_be_asked(op: str, device_type: str) -> str | None:
    return (
        "the emulator is slow"
        if device_type == "cpu"
        else "it was not measured to be faster than triton for all shapes"
    )


def is_faster(op: str, rows: int, dim: int, num_samples: int) -> bool:
    """Whether a call in float32 is of a class of shapes where these kernels are the fastest measured.

    The class is that of sizes alone: estimators, precisions and GPUs other than those measured count too.
    """
    known = MEASURED["faster"].get(op)
    return bool(
        known and rows >= known["rows"] and known["num_samples"] <= num_samples <= _MOST_SAMPLES and dim <= known["dim"]
    )


__all__ = ["KERNELS", "MEASURED", "is_faster", "must_be_asked", "unavailable", "unserved"]
