"""CPU kernels in C++, part of the compiled extension."""

from typing import Any

import torch

from ... import extension
from . import categorical, gaussian


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


KERNELS: dict[str, dict[str, Any]] = {
    "gaussian_policy_loss": {"first": gaussian.policy_loss_first, "second": gaussian.policy_loss_second},
    "categorical_policy_loss": {"first": categorical.policy_loss_first, "second": categorical.policy_loss_second},
}
