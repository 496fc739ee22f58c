"""Compiles the launches that a call of an op would make, without a GPU."""

import contextlib
import io
import re
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


def launches_of(
    monkeypatch: Any,
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

    monkeypatch.setattr(launch.Call, "run", record)
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
    options = {"num_warps": warps, "enable_fp_fusion": True}
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
