"""CPU kernels compiled by Numba, for machines without a C++ compiler."""

import importlib.util
from typing import Any

import torch


def unavailable() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    return None


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it serves CPU tensors, not {device_type}"
    return None if op in KERNELS else f"it has no kernel for {op}"


KERNELS: dict[str, dict[str, Any]] = {}
