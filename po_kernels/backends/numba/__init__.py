"""CPU kernels compiled by Numba, for machines without a C++ compiler. Numba is imported at the first call."""

import importlib
import importlib.util
from typing import Any

import torch

# Than the reference, by benchmarks/baselines/numba.json.
_FASTER = (
    "gaussian_policy_loss", "gaussian_surrogate_loss", "gaussian_sample", "mvn_policy_loss", "mvn_surrogate_loss",
    "mvn_log_prob", "mvn_sample", "categorical_policy_loss", "categorical_surrogate_loss", "categorical_sample", "gae",
)  # fmt: skip
_SMALLER = ("linear_token_log_prob",)  # than the reference, which has all logits at once
FIRST_ORDER_ONLY = "its kernels compute values and gradients"


def unavailable() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    return None


def unserved(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it serves CPU tensors, not {device_type}"
    if dtype not in (torch.float32, torch.float64):
        return f"it serves float32 and float64, not {dtype}"
    return None


def must_be_asked(op: str, device_type: str) -> str | None:
    return None if op in _FASTER + _SMALLER else "no measurement has it faster than plain torch"


def __getattr__(name: str) -> Any:
    if name == "KERNELS":
        files = [
            importlib.import_module(f"{__name__}.{file}")
            for file in ("gaussian", "categorical", "token", "advantage", "gae")
        ]
        globals()[name] = {op: kernel for file in files for op, kernel in file.KERNELS.items()}
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
