"""GPU kernels written in Triton."""

import importlib.util
from typing import Any

import torch


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return f"it serves CUDA tensors, not {device_type}"
    return None if op in KERNELS else f"it has no kernel for {op}"


KERNELS: dict[str, dict[str, Any]] = {}
