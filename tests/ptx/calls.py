"""Calls of a backend for GPUs on CPU tensors, each launch of which runs as PTX."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from po_kernels import dispatch

from .machine import Counts, Rules, launch
from .memory import Array, Memory
from .parse import parse
from .translate import Program

Edit = Callable[[str], str]


@lru_cache(maxsize=256)
def program(text: str, threads: int) -> Program:
    """Of a text with one kernel."""
    (kernel,) = parse(text).values()
    return Program(kernel, threads)


class Calls(ABC):
    """Serves the ops of a backend, and remembers tensors of which nothing is written until a kernel does it.

    Attributes:
        edit: changes the PTX, to plant a fault.
        counts: of the launches, with the names of their kernels.
    """

    backend: ModuleType
    rules = Rules()

    def __init__(self, edit: Edit = str) -> None:
        self.edit = edit
        self.counts: list[tuple[str, Counts]] = []
        self.fresh: dict[int, tuple[Tensor, Array | None]] = {}

    @abstractmethod
    def serve(self, request: Any, op: str) -> Any:
        """What the backend gives for a request of an op."""

    def as_fresh(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*given: Any, **named: Any) -> Tensor:
            found = allocate(*given, **named)
            self.fresh[found.data_ptr()] = found, None  # kept, so that no other tensor gets its place
            return found

        return allocated

    def launch(
        self, text: str, threads: int, memory: Memory, grid: tuple[int, ...], parameters: bytes, shared: int
    ) -> None:
        to_run = program(self.edit(text), threads)
        self.counts.append((to_run.kernel.name, launch(to_run, memory, grid, parameters, shared, self.rules)))

    def add(self, memory: Memory, tensor: Tensor) -> None:
        """Its bytes, from the first to the last; tensors that overlap are one allocation."""
        if tensor.numel() == 0:
            return
        size = tensor.element_size()
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        base, end = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * size
        for region in [region for region in memory.regions if region.base < end and base < region.end]:
            base, end = min(base, region.base), max(end, region.end)
            memory.regions.remove(region)
            memory.bases.remove(region.base)
        owner, written = self.fresh.get(base, (None, None))
        region = memory.add("global", f"a tensor of {tuple(tensor.shape)}", base, end - base, size, None, owner is None)
        if owner is not None:
            if written is not None:
                region.written = written
            self.fresh[base] = owner, region.written


@contextlib.contextmanager
def simulated(calls: Calls) -> Iterator[Calls]:
    """Within the block the backend serves CPU tensors."""
    unpatched, refusal = dispatch.kernel, dispatch.refusal
    (name,) = (name for name in dispatch.BACKENDS if dispatch.module(name) is calls.backend)

    def kernel(op: str, asked: str) -> Any:
        return partial(calls.serve, op=op) if asked == name else unpatched(op, asked)

    def refused(op: str, asked: str, *rest: Any) -> str | None:
        return None if asked == name else refusal(op, asked, *rest)

    with (
        mock.patch.object(dispatch, "refusal", refused),
        mock.patch.object(dispatch, "kernel", kernel),
    ):
        yield calls
