"""Argument checks of the public operations: each raises an error that names the op and the argument."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..backends.advantages import ADVANTAGES

# Samples have a word of the random numbers' counter to themselves.
MOST_SAMPLES = 2**32
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def floating(op: str, **tensors: Tensor) -> None:
    """Every tensor is one of FLOATING, and all have one dtype and one device."""
    first_name, first = None, None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{op}: {name}: expected a floating tensor (float32, float64, bfloat16 or float16), got {tensor.dtype}"
            )
        if first is None:
            first_name, first = name, tensor
        elif tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name}: expected {first.dtype} like {first_name}, got {tensor.dtype}")
        elif tensor.device != first.device:
            raise ValueError(
                f"{op}: {name}: expected a tensor on {first.device} like {first_name}, got one on {tensor.device}"
            )


def integral(op: str, name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """An integer tensor on the device of `like`, as int64."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected an integer tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{op}: {name}: expected an integer tensor, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name}: expected a tensor on {like.device}, got one on {tensor.device}")
    return tensor.long()


def has_shape(op: str, name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    if tensor.shape not in allowed:
        expected = " or ".join(str(tuple(shape)) for shape in allowed)
        raise ValueError(f"{op}: {name}: expected shape {expected}, got {shape_of(tensor)}")


def rows(tensor: Tensor, *shape: int) -> Tensor:
    """tensor.reshape(shape), without a node in the graph where it has that shape already."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def batch_before(op: str, name: str, tensor: Tensor, event: Iterable[int]) -> torch.Size:
    """The dimensions of `tensor` before `event`, with which its shape must end."""
    event = tuple(event)
    split = tensor.ndim - len(event)
    if split < 0 or tuple(tensor.shape[split:]) != event:
        expected = ", ".join(("...", *map(str, event)))
        raise ValueError(f"{op}: {name}: expected shape ({expected}), got {shape_of(tensor)}")
    return tensor.shape[:split]


def choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def integer(op: str, name: str, value: Any, minimum: int, maximum: int = 2**63 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name}: expected an integer, got {type(value).__name__} {value!r}")
    value = int(value)
    if value < minimum:
        raise ValueError(f"{op}: {name}: expected an integer of at least {minimum}, got {value}")
    if value > maximum:
        raise ValueError(f"{op}: {name}: expected an integer of at most {maximum}, got {value}")
    return value


def real(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name}: expected a real number, got {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{op}: {name}: expected a finite number, got {value}")
    return number


def flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name}: expected True or False, got {type(value).__name__} {value!r}")
    return value


def seed_tensor(op: str, seed: int | Tensor | None) -> Tensor:
    """The 64-bit seed as an int64 scalar tensor; None draws one from torch's default CPU generator."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 0:
            raise TypeError(f"{op}: seed: expected an int64 scalar tensor, got {seed.dtype} of shape {shape_of(seed)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"{op}: seed: expected an integer, an int64 scalar tensor or None, got {type(seed).__name__}")
    seed = int(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed: expected a 64-bit integer, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")


def group_size(op: str, name: str, size: int, advantage: str) -> None:
    least = ADVANTAGES[advantage].least
    if size < least:
        what = "1 sample" if least == 1 else f"{least} samples for advantage={advantage!r}"
        raise ValueError(f"{op}: {name}: expected at least {what}, got {size}")
