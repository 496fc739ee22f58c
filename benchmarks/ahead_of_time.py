"""Compiles the launches that a call of a Triton op would make, without a GPU."""

import contextlib
import io
import re
import unittest.mock
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from po_kernels.backends.contract import OpConfig
from po_kernels.backends.triton import kernels, launch


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    warps: int


class Resources(NamedTuple):
    """What a launch takes: registers a thread, spilled bytes a thread, shared memory in bytes a block."""

    registers: int
    spills: int
    shared: int


def tensors(
    op: str, rows: int, dim: int, group: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and constants of an op; of their values only those matter that would be refused."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    family = op.split("_")[0]
    labels = {"policy": (rows,), "surrogate": (group, rows), "log": (group, rows)}
    seed = torch.tensor(1)
    if op == "group_advantage":
        return [empty(group, rows)], []
    if family == "categorical":
        what = op.split("_")[1]
        extra = {"policy": [empty(dim, dim)], "surrogate": [empty(group, rows)]}.get(what, [])
        constants = [torch.zeros(labels[what], dtype=torch.int64)] if what in labels else []
        return [empty(rows, dim), *extra], [*constants, *([seed] if what in ("policy", "sample") else [])]
    unit = torch.eye(dim, dtype=dtype)
    policy = [empty(rows, dim), unit.repeat(rows, 1, 1) if family == "mvn" else empty(rows, dim)]
    if op.endswith("policy_loss"):
        return [*policy, empty(rows, dim), unit], [seed]
    if op.endswith("surrogate_loss"):
        return [*policy, empty(group, rows)], [empty(group, rows, dim)]
    if op.endswith("log_prob"):
        return [*policy, empty(group, rows, dim)], []
    return policy, [seed]


def launches_of(
    op: str,
    order: str,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    config: OpConfig,
    cotangent: Tensor | None = None,
    want_stats: bool = False,
) -> list[Launch]:
    """The launches of a call with all gradients; none of them runs."""
    found: list[Launch] = []

    def record(self: Any, kernel: Any, grid: tuple[int, ...], warps: int, **arguments: Any) -> None:
        assert all(0 < size < 2**31 for size in grid)
        found.append(Launch(kernel, arguments, warps))

    with unittest.mock.patch.object(launch.Call, "run", record):
        needs = [True] * len(inputs)
        functions = kernels.KERNELS[op]
        if order == "sample":
            functions["sample"](*inputs, *constants, config.num_samples, config.row_offset)
        elif order == "first":
            functions["first"](inputs, constants, cotangent, needs, want_stats, config)
        else:
            tangents = [torch.ones_like(x) for x in inputs]
            functions["second"](inputs, constants, tangents, cotangent, torch.ones_like(cotangent), needs, config)
    return found


def specialisation(launched: Launch) -> tuple[Any, ...]:
    """What Triton compiles a kernel for anew: types, constants, and which arguments are multiples of 16 or one."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launched.kernel.params):
        given = launched.arguments[parameter.name]
        specialised = isinstance(given, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or given is None or (specialised and given == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = given
            continue
        if isinstance(given, Tensor):
            signature[parameter.name] = "*" + _TYPES[given.dtype]
        else:
            signature[parameter.name] = parameter.annotation_type or ("fp32" if isinstance(given, float) else "i32")
        if isinstance(given, Tensor) or (specialised and given % 16 == 0):
            attributes[(index,)] = (("tt.divisibility", 16),)
    return (
        launched.kernel, launched.warps, *(tuple(sorted(x.items())) for x in (signature, constants, attributes)),
    )  # fmt: skip


def compiled(launched: Launch, capability: int) -> tuple[Any, Resources]:
    """The kernel as cubin for a compute capability, specialised as Triton's launcher does."""
    kernel, warps, signature, constants, attributes = specialisation(launched)
    source = ASTSource(
        fn=kernel,
        signature={name: dict(signature)[name] for name in kernel.arg_names},
        constexprs=dict(constants),
        attrs={index: [list(pair) for pair in pairs] for index, pairs in attributes},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # what comes from the cache has no log
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = (
        int(re.search(rf"(\d+) {what}", log.getvalue())[1]) for what in ("registers", "bytes spill stores")
    )
    return result, Resources(registers, spills, result.metadata.shared)


_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}
