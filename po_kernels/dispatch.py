"""Chooses the backend that serves a call, and remembers why the others could not."""

import contextlib
import contextvars
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import autocast, checks, reference
from .backends.contract import Kernel, Op, OpConfig, Request
from .backends.reference import philox

BACKENDS = ("native", "numba", "cuda", "triton", "reference")
ENVIRONMENT_VARIABLE = "PO_KERNELS_BACKEND"

# What `os.environ` wraps, in CPython, and the name of the variable there.
_SET_VARIABLES = getattr(os.environ, "_data", None)
_VARIABLE: Any = ENVIRONMENT_VARIABLE.encode() if os.name == "posix" else ENVIRONMENT_VARIABLE

_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("po_kernels_backend", default=None)


class Decision(NamedTuple):
    """Which backend serves an op, and why each one before it in the order did not."""

    backend: str
    refused: dict[str, str]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every op runs on the backend `name` or raises.

    It holds for the thread, or the task of asyncio, that enters the block: threads that are started within have to
    enter one of their own. Functions compiled by `torch.compile` keep the backend that they were traced with.

    Args:
        name: one of "native", "numba", "cuda", "triton", "reference".

    Raises:
        ValueError: no backend has that name.
    """
    _known("use_backend", "name", name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def select(op: str, device_type: str, dtype: torch.dtype, backend: str | None) -> str:
    """The name of the backend for a call; `backend` is what the caller asked for by name.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend asked for cannot serve the call.
    """
    source, name = requested(op, backend)
    if name is None:
        known = _decisions.get((op, device_type, dtype))
        return known.backend if known is not None else _automatic(op, device_type, dtype).backend
    reason = refusal(op, name, device_type, dtype)
    if reason is not None:
        raise RuntimeError(f"{op}: {source}: backend {name!r} was asked for, but {reason}")
    return name


def by_shape(op: str, name: str, backend: str | None, inputs: Sequence[torch.Tensor], num_samples: int) -> str:
    """The backend for a call on a device that `select` gave to `name`: another one if nobody asked for that, and shapes
    are of a class for which the other has been measured to be faster."""
    head = inputs[0]
    if name != "triton" or head.dtype != torch.float32 or head.ndim != 2 or requested(op, backend)[1] is not None:
        return name
    faster = module("cuda").is_faster(op, *head.shape, num_samples) and _cuda_serves(op)
    return "cuda" if faster else name


@cache
def _cuda_serves(op: str) -> bool:
    return refusal(op, "cuda", "cuda", torch.float32) is None


def requested(op: str, backend: str | None) -> tuple[str, str | None]:
    """What asks for a backend, the argument before the context and the environment, and the name that it asks for."""
    source, name = "backend", backend
    if name is None:
        source, name = "use_backend", _requested.get()
    if name is None:
        source, name = ENVIRONMENT_VARIABLE, _environment()
    if name is not None:
        _known(op, source, name)
    return source, name


def _environment() -> str | None:
    """The variable's value, None if it is not set or empty.

    `os.environ.get` raises and catches an exception where it is not set, which is much of a small call's time.
    """
    if _SET_VARIABLES is not None and _VARIABLE not in _SET_VARIABLES:
        return None
    return os.environ.get(ENVIRONMENT_VARIABLE) or None


def refusal(op: str, name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the backend `name` cannot serve such a call, or None."""
    backend = module(name)
    reason = backend.unavailable() or backend.unserved(device_type, dtype)
    if reason is None and op not in backend.KERNELS:
        reason = f"it has no kernel for {op}"
    return reason


@cache
def kernel(op: str, name: str) -> Kernel:
    """What serves `op` on a backend that does not refuse it, in both orders."""
    found = module(name).KERNELS[op]
    if name not in first_order_only():
        return found
    second = reference.KERNELS[op]

    def both(request: Request) -> Sequence[torch.Tensor | None]:
        return found(request) if request.tangents is None else second(request)

    return both


def first_order_only() -> dict[str, str]:
    """The backends whose second order the reference serves, and why."""
    limits = {name: getattr(module(name), "FIRST_ORDER_ONLY", None) for name in BACKENDS}
    return {name: reason for name, reason in limits.items() if reason is not None}


# The definition of an op, which autograd differentiates and torch.compile traces.
plain: Callable[[str, Any, Any, OpConfig], tuple[Tensor, tuple[Tensor, ...]]] = reference.evaluate
entropy: Callable[[Any, str], Tensor] = reference.entropy
refuse_values: Callable[[Op, Any, Any], None] = checks.values
refuse_precision: Callable[[str, Tensor], None] = checks.precision
has_autocast: Callable[[str], bool] = autocast.available
is_true: Callable[[Tensor], bool] = checks.is_true
stream_key: Callable[[Tensor, int], Tensor] = philox.stream_key


def serve_natively(op: str, device_type: str, dtype: torch.dtype) -> None:
    """Remembers that the native backend, which alone has the op, serves it."""
    _decisions.setdefault((op, device_type, dtype), Decision("native", {}))


def rescale(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> bool:
    """Multiplies all in place by a factor on a device, if a kernel there can, and says so."""
    if not factor.is_cuda or not tensors or not all(x.is_contiguous() for x in tensors):
        return False
    kernel = _rescale()
    if kernel is not None:
        kernel(tensors, factor)
    return kernel is not None


@cache
def _rescale() -> Any:
    """Triton's kernel, which reads the factor on the device and mostly has nothing to do; None without Triton."""
    if module("triton").unavailable() is not None:
        return None
    return importlib.import_module("po_kernels.backends.triton.rescale").in_place


def decisions() -> dict[tuple[str, str, torch.dtype], Decision]:
    """What automatic dispatch has decided so far in this process."""
    return dict(_decisions)


@cache
def module(name: str) -> Any:
    return importlib.import_module(f"po_kernels.backends.{name}")


_decisions: dict[tuple[str, str, torch.dtype], Decision] = {}


def _automatic(op: str, device_type: str, dtype: torch.dtype) -> Decision:
    refused: dict[str, str] = {}
    for name in BACKENDS:
        reason = refusal(op, name, device_type, dtype) or module(name).must_be_asked(op, device_type)
        if reason is None:
            return _decisions.setdefault((op, device_type, dtype), Decision(name, refused))
        refused[name] = reason
    raise RuntimeError(f"{op}: no backend serves {dtype} on {device_type}: {refused}")


def _known(op: str, source: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{op}: {source}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
