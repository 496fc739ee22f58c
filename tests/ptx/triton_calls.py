"""The launches of Triton ops, as the PTX that Triton compiles them to."""

import inspect
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks import ahead_of_time
from po_kernels.backends import triton as backend
from po_kernels.backends.triton import lanes, launch, mvn

from .calls import Calls, Edit
from .machine import Rules
from .memory import Memory

CACHE = Path(__file__).parents[2] / "build" / "ptx"  # of Triton, for kernels that ptxas has not seen
PACKED = {"i1": "?", "i8": "b", "u8": "B", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}
SCRATCH = 2  # parameters that Triton adds, addresses of memory that no kernel here asks for


def compiled(launched: ahead_of_time.Launch, capability: int) -> tuple[str, int]:
    """PTX and the bytes of shared memory."""
    source = ahead_of_time.source_of(launched, capability)
    target, options = GPUTarget("cuda", capability, 32), ahead_of_time.options_of(launched)
    with triton.knobs.cache.scope(), mock.patch.object(CUDABackend, "make_cubin", return_value=b""):
        triton.knobs.cache.dir = str(CACHE)
        found = triton.compile(source, target=target, options=options)
    return found.asm["ptx"], found.metadata.shared


def leaves(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """Arguments that are handed to the kernel, and their types."""
    if isinstance(kind, tuple):
        for one, of in zip(value, kind, strict=True):
            yield from leaves(one, of)
    elif kind != "constexpr":
        yield value, kind


def lines_of(function: Any, text: str) -> list[str]:
    """As sources of PTX tell them."""
    lines, first = inspect.getsourcelines(function.fn)
    file = Path(inspect.getsourcefile(function.fn)).name
    return [f"{file}:{first + i}:" for i, line in enumerate(lines) if text in line]


class TritonCalls(Calls):
    backend = backend
    # Sums in memory. Threads with copies read what one of them is to store, perhaps when it has: theirs is not used.
    # A test of every_triton_kernel.py holds that.
    rules = Rules(copied=(*lines_of(lanes.accumulate, "tl.store"), *lines_of(mvn.add_gradient, "before +")))

    def __init__(self, capability: int = 80, edit: Edit = str) -> None:
        super().__init__(edit)
        self.capability = capability

    def serve(self, request: Any, op: str) -> Any:
        def run(_: launch.Call, *given: Any, **named: Any) -> None:
            self.run(*given, **named)

        with mock.patch.object(launch.Call, "run", run), mock.patch.object(torch, "empty", self.as_fresh(torch.empty)):
            return backend.KERNELS[op](request)

    def run(
        self, kernel: Any, grid: tuple[int, ...], warps: int, registers: int | None = None, **arguments: Any
    ) -> None:
        launched = ahead_of_time.Launch(kernel, arguments, warps, registers)
        text, shared = compiled(launched, self.capability)
        source = ahead_of_time.source_of(launched, self.capability)
        memory, packed = Memory(), b""
        for value, kind in (x for name, kinds in source.signature.items() for x in leaves(arguments[name], kinds)):
            if isinstance(value, Tensor):
                self.add(memory, value)
                value, kind = value.data_ptr(), "u64"
            packed += b"\0" * (-len(packed) % struct.calcsize(PACKED[kind])) + struct.pack(PACKED[kind], value)
        packed += b"\0" * (-len(packed) % 8 + 8 * SCRATCH)
        self.launch(text, 32 * warps, memory, grid, packed, shared)
