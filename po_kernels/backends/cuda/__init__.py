"""GPU kernels written in CUDA C++, part of the compiled extension."""

from typing import Any

import torch

from ... import extension


def unavailable() -> str | None:
    if extension.module is None:
        return extension.missing
    if not extension.build["cuda"]:
        return f"the extension was built without CUDA: {extension.build['cuda_reason']}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return f"it serves CUDA tensors, not {device_type}"
    return None if op in KERNELS else f"it has no kernel for {op}"


def must_be_asked(device_type: str) -> str | None:
    return None


KERNELS: dict[str, dict[str, Any]] = {}
