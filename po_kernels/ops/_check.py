"""Argument checks of the public operations: each raises an error that names the op and the argument."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends.advantages import ADVANTAGES
from ..backends.contract import HALF
from . import _modes

# Samples have a word of the random numbers' counter to themselves.
MOST_SAMPLES = 2**32
FLOATING = (torch.float32, torch.float64, *HALF)


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def floating(op: str, names: Sequence[str], *tensors: Tensor, reads_half: bool = False) -> Sequence[Tensor]:
    """The tensors of these names, in the dtype that they are computed with, or kernels read: half precision in float32.

    All have one of FLOATING as dtype, and one device. Under autocast, where casts are torch's to make, dtypes may
    differ and the widest is taken.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(f"{op}: torch.jit.trace does not see what the kernels do; use torch.export or torch.compile")
    first, mixed = "", False
    kind: Any = None
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
        found = dtype, device, layout = tensor.dtype, tensor.device, tensor.layout
        if kind is None and dtype in FLOATING and layout is torch.strided and not tensor.is_nested:
            first, kind = name, found
        elif found != kind or tensor.is_nested:
            if dtype not in FLOATING:
                allowed = "float32, float64, bfloat16 or float16"
                raise TypeError(f"{op}: {name}: expected a floating tensor ({allowed}), got {dtype}")
            _dense(op, name, tensor)
            if device != kind[1]:
                raise ValueError(f"{op}: {name}: expected a tensor on {kind[1]} like {first}, got one on {device}")
            if not dispatch.has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
                raise TypeError(f"{op}: {name}: expected {kind[0]} like {first}, got {dtype}")
            mixed = True
    if mixed:
        double = any(x.dtype == torch.float64 for x in tensors)
        return [x.double() if double else x.float() for x in tensors]
    return [x.float() for x in tensors] if kind[0] in HALF and not reads_half else tensors


def _dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name}: expected a dense (strided) tensor, got a {kind} one")


def integral(op: str, name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """An integer tensor on the device of `like`, as int64."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected an integer tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{op}: {name}: expected an integer tensor, got {tensor.dtype}")
    _dense(op, name, tensor)
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name}: expected a tensor on {like.device}, got one on {tensor.device}")
    return tensor.long()


def constant(op: str, name: str, tensor: Any) -> None:
    """Anything but a tensor with a derivative, which would be dropped."""
    if isinstance(tensor, Tensor) and _modes.has_derivative(tensor):
        raise ValueError(
            f"{op}: {name}: expected a constant, got a tensor that requires grad, whose derivative would be dropped; "
            f"hand in {name}.detach()"
        )


def zero_or_one(op: str, name: str, tensor: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """A mask of the shape and on the device of `like`, as bool; and () whether it is one, where this cannot be read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
    constant(op, name, tensor)
    has_shape(op, name, tensor, like.shape)
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name}: expected a tensor on {like.device}, got one on {tensor.device}")
    if tensor.dtype == torch.bool:
        return tensor, None
    valid = ((tensor == 0) | (tensor == 1)).all()
    if dispatch.is_true(~valid):
        other = tensor[(tensor != 0) & (tensor != 1)][0].item()
        raise ValueError(f"{op}: {name}: expected True and False, or 0 and 1, got {other}")
    return tensor != 0, valid


def has_shape(op: str, name: str, tensor: Tensor, *allowed: Sequence[int]) -> None:
    shape = tensor.shape
    for each in allowed:
        # Lengths first: torch.compile would otherwise learn that a batch size differs from what it is compared with.
        if len(shape) == len(each) and shape == each:
            return
    expected = " or ".join(str(tuple(each)) for each in allowed)
    raise ValueError(f"{op}: {name}: expected shape {expected}, got {shape_of(tensor)}")


def rows(tensor: Tensor, *shape: int) -> Tensor:
    """tensor.reshape(shape), without a node in the graph where it has that shape already."""
    return tensor if len(tensor.shape) == len(shape) and tensor.shape == shape else tensor.reshape(shape)


def batch(op: str, batch_dims: int, name: str, tensor: Tensor) -> torch.Size:
    """The dimensions of `tensor` that count problems, the first `batch_dims`; the last is none of them."""
    if batch_dims == 0 and type(batch_dims) is int:
        return tensor.shape[:0]
    found = tensor.shape[: integer(op, "batch_dims", batch_dims, 0, tensor.ndim - 1)]
    if 0 in found:
        raise ValueError(f"{op}: {name}: expected at least one problem, got shape {shape_of(tensor)}")
    return found


def batch_before(op: str, name: str, tensor: Tensor, event: Iterable[int]) -> torch.Size:
    """The dimensions of `tensor` before `event`, with which its shape must end."""
    event = tuple(event)
    split = tensor.ndim - len(event)
    if split < 0 or tuple(tensor.shape[split:]) != event:
        expected = ", ".join(("...", *map(str, event)))
        raise ValueError(f"{op}: {name}: expected shape ({expected}), got {shape_of(tensor)}")
    return tensor.shape[:split]


def choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
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
    # As a comparison, which torch.compile takes of a number that it knows by a symbol.
    if not -math.inf < number < math.inf:
        raise ValueError(f"{op}: {name}: expected a finite number, got {value}")
    return number


def positive(op: str, name: str, value: Any) -> float:
    number = real(op, name, value)
    if not number > 0.0:
        raise ValueError(f"{op}: {name}: expected a positive number, got {value}")
    return number


def coefficient(op: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """entropy_coef: a number that has been checked, or a tensor (), in the dtype and on the device of `like`."""
    if not isinstance(value, Tensor):
        return value
    floating(op, ("entropy_coef",), value)
    has_shape(op, "entropy_coef", value, ())
    if value.device not in (like.device, torch.device("cpu")):
        raise ValueError(
            f"{op}: entropy_coef: expected a tensor on {like.device} or the CPU, got one on {value.device}"
        )
    if dispatch.is_true(~value.detach().isfinite()):
        raise ValueError(f"{op}: entropy_coef: expected a finite number, got {value.item()}")
    return value.to(like.device, like.dtype)


def flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name}: expected True or False, got {type(value).__name__} {value!r}")
    return value


def seed_tensor(op: str, seed: int | Tensor | None, stream: int, batch: Sequence[int] = ()) -> Tensor:
    """The 64-bit key of the random numbers as an int64 scalar tensor: the seed itself in stream 0.

    None draws a seed from torch's default CPU generator. A batch of problems, of that shape, may have a seed for each.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or (seed.ndim != 0 and seed.shape != batch) or seed.device.type == "meta":
            what = f"{seed.dtype} of shape {shape_of(seed)} on {seed.device}"
            wanted = f"tensor of shape () or {tuple(batch)}" if batch else "scalar tensor"
            raise TypeError(f"{op}: seed: expected an int64 {wanted} with a value, got {what}")
    elif seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, batch, dtype=torch.int64, device="cpu")
    else:
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise TypeError(
                f"{op}: seed: expected an integer, an int64 scalar tensor or None, got {type(seed).__name__}"
            )
        seed = int(seed)
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"{op}: seed: expected a 64-bit integer, got {seed}")
        seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")
    if stream == 0 and type(stream) is int:
        return seed
    stream = integer(op, "stream", stream, 0)
    return dispatch.stream_key(seed, stream) if stream else seed


def group_size(op: str, name: str, size: int, advantage: str) -> None:
    least = ADVANTAGES[advantage].least
    if size < least:
        what = "1 sample" if least == 1 else f"{least} samples for advantage={advantage!r}"
        raise ValueError(f"{op}: {name}: expected at least {what}, got {size}")
