"""Calls of Triton ops on CPU tensors, each launch of which runs as the PTX that Triton compiles it to."""

import contextlib
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks import ahead_of_time
from po_kernels import dispatch
from po_kernels.backends import triton as backend
from po_kernels.backends.triton import launch

from .machine import Counts
from .machine import launch as run
from .memory import Memory
from .parse import parse
from .translate import Program

CACHE = Path(__file__).parents[2] / "build" / "ptx"  # of Triton, of kernels that ptxas has not seen
PACKED = {"i1": "?", "i8": "b", "u8": "B", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}

Edit = Callable[[str], str]


def compiled(launched: ahead_of_time.Launch, capability: int) -> tuple[str, int]:
    """PTX and the bytes of shared memory."""
    source = ahead_of_time.source_of(launched, capability)
    target, options = GPUTarget("cuda", capability, 32), ahead_of_time.options_of(launched)
    with triton.knobs.cache.scope(), mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""):
        triton.knobs.cache.dir = str(CACHE)
        found = triton.compile(source, target=target, options=options)
    return found.asm["ptx"], found.metadata.shared


@lru_cache(maxsize=64)
def program(text: str, threads: int) -> Program:
    (kernel,) = parse(text).values()
    return Program(kernel, threads)


def leaves(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """Arguments that are handed to the kernel, and their types."""
    if isinstance(kind, tuple):
        for one, of in zip(value, kind, strict=True):
            yield from leaves(one, of)
    elif kind != "constexpr":
        yield value, kind


class Simulated:
    """Runs launches, and remembers what torch.empty gave, of which nothing is written until a kernel does it.

    Attributes:
        capability: of the device that is compiled for.
        edit: changes the PTX, to plant a fault.
        counts: by kernel, of the last launch.
    """

    def __init__(self, capability: int = 80, edit: Edit = str) -> None:
        self.capability, self.edit = capability, edit
        self.counts: dict[str, Counts] = {}
        self.empties: dict[int, tuple[Tensor, dict[int, Any]]] = {}
        self._empty = torch.empty

    def empty(self, *shape: Any, **how: Any) -> Tensor:
        found = self._empty(*shape, **how)
        self.empties[found.data_ptr()] = found, {}  # kept, so that no other tensor gets its place
        return found

    def launch(self, kernel: Any, grid: tuple[int, ...], warps: int, **arguments: Any) -> None:
        launched = ahead_of_time.Launch(kernel, arguments, warps)
        text, shared = compiled(launched, self.capability)
        source = ahead_of_time.source_of(launched, self.capability)
        memory, packed = Memory(), b""
        given = [x for name, kind in source.signature.items() for x in leaves(arguments[name], kind)]
        for value, kind in given:
            if isinstance(value, Tensor):
                self.add(memory, value)
                value, kind = value.data_ptr(), "u64"
            packed += b"\0" * (-len(packed) % struct.calcsize(PACKED[kind])) + struct.pack(PACKED[kind], value)
        to_run = program(self.edit(text), 32 * warps)
        assert len(to_run.kernel.of("param")) == len(given) + 2, (len(to_run.kernel.of("param")), given)
        self.counts[to_run.kernel.name] = run(to_run, memory, grid, packed + bytes(24), shared)

    def add(self, memory: Memory, tensor: Tensor) -> None:
        """Its bytes, from the first to the last; what overlaps is one allocation."""
        if tensor.numel() == 0:
            return
        size = tensor.element_size()
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        base, end = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * size
        for region in [region for region in memory.regions if region.base < end and base < region.end]:
            base, end = min(base, region.base), max(end, region.end)
            memory.regions.remove(region)
            memory.bases.remove(region.base)
        kept = self.empties.get(base)
        name = f"a tensor of {tuple(tensor.shape)}"
        region = memory.add("global", name, base, end - base, size, None, kept is None)
        if kept is not None:
            region.written = kept[1].setdefault(size, region.written)


@contextlib.contextmanager
def simulated(capability: int = 80, edit: Edit = str) -> Iterator[Simulated]:
    """Within the block backend "triton" serves CPU tensors, by the interpreter of PTX."""
    found, unpatched = Simulated(capability, edit), dispatch.kernel

    def served(request: Any, op: str) -> Any:
        with mock.patch.object(torch, "empty", found.empty):
            return backend.KERNELS[op](request)

    def kernel(op: str, name: str) -> Any:
        return partial(served, op=op) if name == "triton" else unpatched(op, name)

    with (
        mock.patch.object(backend, "unavailable", lambda: None),
        mock.patch.object(backend, "unserved", lambda *_: None),
        mock.patch.object(dispatch, "kernel", kernel),
        mock.patch.object(launch.Call, "run", lambda call, *given, **named: found.launch(*given, **named)),
    ):
        yield found
