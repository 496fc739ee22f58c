"""Compiles the launches that a call of a Triton op would make, without a GPU."""

import contextlib
import io
import re
import unittest.mock
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from po_kernels.backends import triton as backend
from po_kernels.backends.contract import NUM_TOKEN_STATS, OPS, OpConfig, Request
from po_kernels.backends.triton import launch


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    warps: int
    registers: int | None = None


class Resources(NamedTuple):
    """What a launch takes: registers a thread, spilled bytes a thread, shared memory in bytes a block."""

    registers: int
    spills: int
    shared: int


def request(
    op: str,
    rows: int,
    dim: int,
    group: int,
    config: OpConfig,
    dtype: torch.dtype = torch.float32,
    second: bool = False,
    want_stats: bool = False,
) -> Request:
    """A call with all gradients, on tensors of those sizes and of values that are not refused."""
    row = OPS[op]
    sizes = {"B": rows, "D": dim, "C": dim, "G": group, "N": group, "H": group, "T": group, "U": group + 1}
    sizes |= {"S": NUM_TOKEN_STATS}

    def tensor(name: str, letters: str) -> Tensor:
        if name == "precision":
            return torch.eye(dim, dtype=dtype)
        if name == "bias":
            return torch.zeros(dim, dtype=dtype)
        if letters == "BDD":
            return torch.eye(dim, dtype=dtype).repeat(rows, 1, 1)
        kinds = {row.labels: torch.int64, "seed": torch.int64, "dones": torch.uint8, "known": row.value_dtype(dtype)}
        kind = kinds.get(name, dtype)
        return torch.zeros([sizes[letter] for letter in letters], dtype=kind)

    inputs = row.Inputs(*(tensor(name, row.axes[name]) for name in row.Inputs._fields))
    constants = row.Constants(*(tensor(name, row.axes[name]) for name in row.Constants._fields))
    if config.estimator == row.closed_form and "seed" in constants._fields:
        constants = constants._replace(seed=None)
    needed = row.differentiable
    cotangent = torch.ones([sizes[letter] for letter in row.value], dtype=row.value_dtype(dtype)) if needed else None
    return Request(
        inputs,
        constants,
        row.Inputs(*(torch.ones_like(x) for x in inputs)) if second else None,
        cotangent,
        cotangent if second else None,
        row.Inputs(*[needed] * len(inputs)),
        want_stats,
        config,
    )


def launches_of(op: str, call: Request) -> list[Launch]:
    """The launches of a call; none of them runs."""
    found: list[Launch] = []

    def record(
        self: Any, kernel: Any, grid: tuple[int, ...], warps: int, registers: int | None = None, **arguments: Any
    ) -> None:
        assert all(0 < size < most for size, most in zip(grid, (2**31, 2**16, 2**16), strict=False))
        found.append(Launch(kernel, arguments, warps, registers))

    with unittest.mock.patch.object(launch.Call, "run", record):
        backend.KERNELS[op](call)
    return found


def source_of(launched: Launch, capability: int) -> ASTSource:
    """What Triton's launcher would compile: types, constants, and which arguments are multiples of 16 or one."""
    kernel, options = launched.kernel, options_of(launched)
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound = bind(**launched.arguments, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, *bound)
    return ASTSource(kernel, signature, constants, attributes)


def compiled(launched: Launch, capability: int) -> tuple[Any, Resources]:
    """The kernel as cubin for a compute capability, and what it takes; a kernel is compiled once in a process."""
    source = source_of(launched, capability)
    key = (source.hash(), launched.warps, launched.registers, capability)
    if key in _compiled:
        return _compiled[key]
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # what comes from the cache has no log
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options_of(launched))
    registers, spills = (
        int(re.search(rf"(\d+) {what}", log.getvalue())[1]) for what in ("registers", "bytes spill stores")
    )
    return _compiled.setdefault(key, (result, Resources(registers, spills, result.metadata.shared)))


_compiled: dict[Any, tuple[Any, Resources]] = {}


def options_of(launched: Launch) -> dict[str, Any]:
    return {"num_warps": launched.warps, "maxnreg": launched.registers, "enable_fp_fusion": False}
