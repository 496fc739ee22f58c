"""CPU kernels in C++, part of the compiled extension."""

import torch

from ... import extension
from .kernels import KERNELS


def unavailable() -> str | None:
    return extension.missing


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it serves CPU tensors, not {device_type}"
    if op not in KERNELS:
        return f"it has no kernel for {op}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {dtype}"
    return None


def must_be_asked(device_type: str) -> str | None:
    return None


__all__ = ["KERNELS", "refuses", "unavailable"]
