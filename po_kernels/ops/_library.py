"""The opaque kernels as torch.library operators: schema, fake and derivative of every op of the table.

`torch.ops.po_kernels.<op>` takes what a `Request` has, flat, and the name of the backend. No tangents, an empty
list, ask for first order. One operator serves both orders and is closed under reverse mode: with value f and gradients
g ∇f, the cotangents ġ of the value and v of the gradients give ġ ∇f + g ∇²f v for the inputs and ∇f·v for g, which is
the operator with tangents v. This is what `torch.compile` differentiates; eager calls go through `_autograd`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import NUM_STATS, OPS, Op, OpConfig
from . import _modes

_SCHEMA = (
    "(Tensor[] inputs, Tensor?[] constants, Tensor?[] tangents, Tensor? cotangent, Tensor? cotangent_tangent, "
    "bool[] needs, bool want_stats, str backend, str estimator, int num_samples, str advantage, float? rbf_gamma, "
    "str reduction, int row_offset, float? softcap, int chunk_rows, float temperature, float entropy_coef, "
    "Tensor? annealed) -> Tensor[]"
)

_library = torch.library.Library("po_kernels", "DEF")


def _define(op: Op) -> None:
    _library.define(op.name + _SCHEMA)

    def run(inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, backend, *options):
        if any(map(_modes.has_tangent, (*inputs, *constants, *tangents, cotangent, cotangent_tangent))):
            raise RuntimeError(
                f"{op.name}: a function compiled by torch.compile has no derivative in forward mode from outside; "
                "compile torch.func.jvp of the function, or use reverse mode"
            )
        resolved = _modes.resolved
        config = _config(*options[:-1])
        if options[-1] is not None:
            temperature, entropy_coef = options[-1].tolist()
            config = config._replace(temperature=temperature, entropy_coef=entropy_coef)
        request = op.request(
            map(resolved, inputs), map(resolved, constants), map(resolved, tangents) if tangents else None,
            resolved(cotangent), resolved(cotangent_tangent), needs, want_stats, config,
        )  # fmt: skip
        with _modes.autograd_on():
            found = dispatch.kernel(op.name, backend)(request)
        return [inputs[0].new_empty(0) if x is None else x for x in found]  # for what was not asked for

    def fake(inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, backend, *options):
        head = inputs[0]
        shape = op.value_shape(op.Inputs(*inputs), op.Constants(*constants), _config(*options[:-1]))
        value = head.new_empty(shape, dtype=op.value_dtype(head.dtype))
        stats = head.new_empty((NUM_STATS, *shape) if want_stats else (0,))
        return [value, stats, *_gradients(inputs, needs)]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, constants, ctx.tangents, cotangent, _, ctx.needs, _, ctx.backend, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.absent = any(x is None for x in constants)
        if not ctx.tangents:
            constants = op.knowing(constants, output[0].detach())
        ctx.save_for_backward(*tensors, *constants, cotangent, *output[2:])

    def backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
        if ctx.tangents:
            raise no_third_derivative(op.name)
        count = op.count
        saved, config = ctx.saved_tensors, _config(*ctx.options[:-1])
        inputs, constants, g, known = saved[:count], saved[count : -count - 1], saved[-count - 1], saved[-count:]
        moved, _, *tangents = cotangents
        tangents = [v if needed else None for v, needed in zip(tangents, ctx.needs, strict=True)]
        needs = ctx.needs_input_grad[0]
        along: Tensor | None = None
        found: list[Any] = [None] * count

        def again(tangents: Any, g: Tensor | None, moved: Tensor | None, needs: list[bool]) -> list[Tensor]:
            return OPERATORS[op.name](inputs, constants, tangents, g, moved, needs, False, ctx.backend, *ctx.options)

        if any(v is not None for v in tangents):
            check_second_derivative(op.name, config)
            if g is None:
                shape = op.value_shape(op.Inputs(*inputs), op.Constants(*constants), config)
                g = inputs[0].new_ones(shape, dtype=op.value_dtype(inputs[0].dtype))
            along, _, *found = again(tangents, g, moved, needs)
        elif moved is not None:
            known = known if g is None else [None] * count
            found = gradient(op, needs, inputs, moved, known, lambda missing: again([], moved, None, missing)[2:])
        found = [x if needed else None for x, needed in zip(found, needs, strict=True)]
        empty = None if ctx.absent else [None] * len(constants)  # torch takes no list where one was None
        along = along if ctx.needs_input_grad[3] else None
        return (found, empty, [], along, None, None, None, None, *[None] * len(ctx.options))

    _library.impl(op.name, run, "CPU")
    _library.impl(op.name, run, "CUDA")
    torch.library.register_fake(f"po_kernels::{op.name}", fake, lib=_library)
    if op.differentiable:
        torch.library.register_autograd(f"po_kernels::{op.name}", backward, setup_context=keep, lib=_library)


def gradient(
    op: Op,
    needs: Sequence[bool],
    inputs: Sequence[Tensor],
    cotangent: Tensor,
    known: Sequence[Any],
    compute: Callable[[list[bool]], Sequence[Tensor | None]],
    lead: bool = False,
) -> list[Tensor | None]:
    """g ∇f where needed.

    Args:
        known: ∇f where the forward pass had reason to compute it, an empty tensor or None elsewhere.
        compute: gives g ∇f for the inputs asked for.
        lead: the first axis of every tensor counts problems.
    """
    missing = [needed and (k is None or k.shape != x.shape) for needed, k, x in zip(needs, known, inputs, strict=True)]
    result: list[Any] = list(compute(missing)) if any(missing) else [None] * len(missing)
    for i, axis in enumerate(op.row_axis):
        if needs[i] and not missing[i]:
            # Nothing, such as a bias that is absent, has the gradient that it is.
            result[i] = known[i] * along(cotangent, axis, inputs[i].ndim, lead) if inputs[i].numel() else known[i]
    return result


def along(cotangent: Tensor, axis: int | None, ndim: int, lead: bool) -> Tensor:
    """A cotangent () or (B,) to multiply a gradient with whose axis `axis` counts rows."""
    if cotangent.ndim == lead:
        return cotangent.reshape([-1] + [1] * (ndim - 1)) if lead else cotangent
    if axis is None:
        return cotangent
    ahead = cotangent.shape[:1] if lead else ()
    return cotangent.reshape([*ahead, *[-1 if i == axis else 1 for i in range(ndim - lead)]])


def known_early(op: Op, needs: Sequence[bool], config: OpConfig) -> Sequence[bool]:
    """Which of the gradients needed the forward pass can compute, not knowing the cotangent."""
    if config.reduction != "none":
        return needs
    return [needed and axis is not None for needed, axis in zip(needs, op.row_axis, strict=True)]


def check_second_derivative(op: str, config: OpConfig) -> None:
    if config.estimator == "reinforce":
        raise RuntimeError(
            f"{op}: estimator='reinforce' is right to first order only, so it has no second derivative; "
            "use estimator='dice', which has the same gradient and the right Hessian"
        )


def no_third_derivative(op: str) -> RuntimeError:
    return RuntimeError(
        f"{op}: a third derivative was asked for, and the fused kernels have two; use backend='reference'"
    )


def _gradients(inputs: list[Tensor], needs: list[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape) if needed else x.new_empty(0) for x, needed in zip(inputs, needs, strict=True)]


for _op in OPS.values():
    _define(_op)


def call(
    op: str,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    cotangent: Tensor | None,
    cotangent_tangent: Tensor | None,
    needs: Sequence[bool],
    want_stats: bool,
    backend: str,
    config: OpConfig,
) -> list[Tensor]:
    """The operator of `op`.

    On the CPU numbers that are annealed go in a tensor: torch.compile would make a graph for each of their values.
    On a device they stay numbers, for a tensor on the CPU would keep the call out of a CUDA graph.
    """
    numbers, annealed = (config.temperature, config.entropy_coef), None
    if inputs[0].device.type == "cpu":
        # As products, which stay open in torch's graphs; it would fill a tensor with a constant.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        annealed = torch.stack([one * x for x in numbers])
        numbers = 1.0, 0.0
    return OPERATORS[op](
        list(inputs), list(constants), list(tangents), cotangent, cotangent_tangent, list(needs), want_stats, backend,
        config.estimator, config.num_samples, config.advantage, config.rbf_gamma, config.reduction, config.row_offset,
        config.softcap, config.chunk_rows, *numbers, annealed,
    )  # fmt: skip


def _config(
    estimator: str, num_samples: int, advantage: str, rbf_gamma: float | None, reduction: str, row_offset: int,
    softcap: float | None, chunk_rows: int, temperature: float, entropy_coef: float,
) -> OpConfig:  # fmt: skip
    return OpConfig(
        estimator, num_samples, advantage, rbf_gamma, entropy_coef, reduction, row_offset, temperature, softcap,
        chunk_rows,
    )  # fmt: skip


OPERATORS = {op: getattr(torch.ops.po_kernels, op).default for op in OPS}


# The identity of `_first_order`, and its zero, for torch.compile.


def _define_first_order() -> None:
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return cotangent + torch.ops.po_kernels.lost.default(*ctx.saved_tensors, ctx.why), None

    def refuse(ctx: Any, _: Tensor) -> None:
        raise RuntimeError(ctx.why)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.why = inputs
        ctx.save_for_backward(x)

    for name, value, derivative in (("first_order", torch.clone, backward), ("lost", torch.zeros_like, refuse)):
        _library.define(f"{name}(Tensor x, str why) -> Tensor")
        _library.impl(name, lambda x, why, value=value: value(x), "CompositeExplicitAutograd")
        torch.library.register_fake(f"po_kernels::{name}", lambda x, why: torch.empty_like(x), lib=_library)
        torch.library.register_autograd(f"po_kernels::{name}", derivative, setup_context=keep, lib=_library)


_define_first_order()
FIRST_ORDER = torch.ops.po_kernels.first_order.default
