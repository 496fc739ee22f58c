"""Autocast changes no number of an op."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Asked once, for torch 2.11 cannot trace its own function.
_KINDS = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")))


def available(kind: str) -> bool:
    """Whether devices of this kind have autocast at all: meta tensors have none."""
    return kind in _KINDS


def disabled(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on the device of x, if that has it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if available(kind) else nullcontext()
