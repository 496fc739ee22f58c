"""Autocast changes no number of an op."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def disabled(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on the device of x, if that has autocast at all: meta tensors have none."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
