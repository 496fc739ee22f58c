"""GPU kernels written in Triton, which is imported at the first call.

With TRITON_INTERPRET=1 in the environment before Triton is imported, its interpreter runs the kernels on CPU tensors
too, slowly: a check of their arithmetic where there is no GPU, for calls that ask for this backend by name.
"""

import importlib
import importlib.util
import os
from typing import Any

import torch


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def unserved(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type == "cuda" or (device_type == "cpu" and _interpreted()):
        return None
    return f"it serves CUDA tensors, not {device_type}"


def must_be_asked(op: str, device_type: str) -> str | None:
    return "the interpreter is slow" if device_type == "cpu" else None


def __getattr__(name: str) -> Any:
    if name == "KERNELS":
        files = [
            importlib.import_module(f"{__name__}.{file}")
            for file in ("family", "categorical", "token", "advantage", "gae")
        ]
        globals()[name] = {op: kernel for file in files for op, kernel in file.KERNELS.items()}
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
