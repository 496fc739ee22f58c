"""Derivatives of the opaque kernels, to second order, in reverse and forward mode.

With f the value of an op and x all its differentiable inputs, four Functions close the calculus:

    value       f(x)                     reverse -> gradient          forward -> derivative
    gradient    g ∇f(x)                  reverse and forward -> product
    derivative  ∂f(x)·v                  reverse -> product           forward -> product
    product     g ∇²f(x) v + ġ ∇f(x)     any derivative raises

g has the shape of f. A loss that is reduced to a scalar, and the row inputs of one that is not, compute ∇f along
with f, so that the first derivative costs a multiplication.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import OPS, OpConfig
from . import _library, _modes


class Call(NamedTuple):
    """Everything about a call of a kernel but its tensors.

    `problems` is 0, or says how many problems it is of, as many as the first axis of every tensor then has.
    """

    op: str
    backend: str
    config: OpConfig
    want_stats: bool
    problems: int = 0


def value(call: Call, inputs: Sequence[Tensor], constants: Sequence[Tensor | None], compiling: bool) -> Sequence[Any]:
    """The value, and of a loss the statistics (5, ...) if they are wanted."""
    track = torch.is_grad_enabled()
    needs = [track and x.requires_grad for x in inputs]
    if compiling:
        early = _library.known_early(OPS[call.op], needs, call.config)
        found, stats, *_ = run(call, inputs, constants, needs=early, want_stats=call.want_stats)
        return found, stats.detach()
    if not _modes.may_call_directly(*inputs, *constants):
        outputs = _Value.apply(call, needs, *inputs, *constants)
    elif True in needs or _modes.in_forward_mode():
        outputs = _modes.applied(_PlainValue)(call, needs, [*map(_modes.kept, constants)], *map(_modes.kept, inputs))
    else:
        outputs = _direct(call, inputs, constants, None, None, None, needs, call.want_stats)
    return outputs[:2]


def run(
    call: Call,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None] | None = None,
    cotangent: Tensor | None = None,
    cotangent_tangent: Tensor | None = None,
    *,
    needs: Sequence[bool],
    want_stats: bool = False,
) -> Sequence[Any]:
    """[value, statistics, *gradients] of the kernel, or their derivatives: `po_kernels.backends.contract`."""
    op, moved = call.op, tangents or ()
    if call.problems and not _modes.may_call_directly(*inputs, *constants, *moved, cotangent, cotangent_tangent):
        return _one_by_one(call, inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats)
    if not torch.compiler.is_compiling():
        if any(map(_is_batched, (*moved, cotangent))):
            raise RuntimeError(
                f"{op}: batches of cotangents are not available through is_grads_batched=True or vectorize=True; "
                "use torch.func.vmap, or torch.func.jacrev and torch.func.hessian"
            )
        if _modes.may_call_directly(*inputs, *constants, *moved, cotangent, cotangent_tangent):
            return _direct(call, inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats)
    return _library.call(
        op, inputs, constants, moved, cotangent, cotangent_tangent, needs, want_stats, call.backend, call.config
    )


def _direct(
    call: Call, inputs: Any, constants: Any, tangents: Any, cotangent: Any, moved: Any, needs: Any, want_stats: bool
) -> Sequence[Any]:
    request = OPS[call.op].request(inputs, constants, tangents, cotangent, moved, needs, want_stats, call.config)
    kernel = dispatch.kernel(call.op, call.backend)
    if not call.problems:
        return kernel(request)
    batch = getattr(kernel, "batch", None)
    if batch is not None:
        return batch(request, call.problems)
    return _one_by_one(call, inputs, constants, tangents, cotangent, moved, needs, want_stats)


def _one_by_one(
    call: Call, inputs: Any, constants: Any, tangents: Any, cotangent: Any, moved: Any, needs: Any, want_stats: bool
) -> list[Tensor | None]:
    """A batch where a kernel takes one problem a call."""
    row, one = OPS[call.op], call._replace(problems=0)
    batch = row.request(inputs, constants, tangents, cotangent, moved, needs, want_stats, call.config)
    found = []
    for i in range(call.problems):
        *tensors, needs, want_stats, _ = row.problem(batch, i)
        found.append(run(one, *tensors, needs=needs, want_stats=want_stats))
    return [None if column[0] is None else torch.stack(column) for column in zip(*found, strict=True)]


def _is_batched(x: Tensor | None) -> bool:
    """What `is_grads_batched=True` and `vectorize=True` make, which no Function can have a rule for."""
    return x is not None and _modes.is_legacy_batch(x)


def _is_one(x: Tensor) -> bool:
    return x.item() == 1.0 if not x.ndim else bool((x == 1.0).all())


def _split(call: Call, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    count = OPS[call.op].count
    return tensors[:count], tensors[count:]


def _ones(call: Call, inputs: Any, constants: Any) -> Tensor:
    op = OPS[call.op]
    lead = (call.problems,) if call.problems else ()
    inputs, constants = ([x[0] if lead and x is not None else x for x in tensors] for tensors in (inputs, constants))
    shape = op.value_shape(op.Inputs(*inputs), op.Constants(*constants), call.config)
    return inputs[0].new_ones((*lead, *shape), dtype=op.value_dtype(inputs[0].dtype))


def _filled(call: Call, found: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor | None, ...]:
    """An empty tensor for what was not asked for, where a transform sees the outputs."""
    if not _modes.transforms_active():
        return tuple(found)
    shape = (call.problems, 0) if call.problems else (0,)
    return tuple([like.new_empty(shape) if x is None else x for x in found])


def _batch_size(op: str, info: Any) -> int:
    if info.batch_size == 0:
        raise ValueError(f"{op}: torch.vmap: expected a batch of at least 1, got 0")
    return int(info.batch_size)


def _batch(function: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    """vmap of a function whose first argument is a call: the same function of a batch of problems, or of as many times
    more of them."""
    call = args[0]
    size = _batch_size(call.op, info)

    def folded(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1) if call.problems else x

    problems = size * max(call.problems, 1)
    found = function.apply(call._replace(problems=problems), *map(folded, args[1:], in_dims[1:]))
    single = isinstance(found, Tensor)
    each = [
        x.unflatten(0, (size, call.problems)) if call.problems and x is not None else x
        for x in ((found,) if single else found)
    ]
    return (each[0], 0) if single else (tuple(each), tuple(None if x is None else 0 for x in each))


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(call, needs, *tensors):
        inputs, constants = _split(call, tensors)
        early = _library.known_early(OPS[call.op], needs, call.config)
        found = run(call, inputs, constants, needs=early, want_stats=call.want_stats)
        return _filled(call, found, found[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        call, _, *tensors = inputs
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in output[1:] if x is not None])
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.save_for_forward(*tensors, *output[2:])

    @staticmethod
    def backward(ctx, cotangent, *_):
        call, saved = ctx.call, ctx.saved_tensors
        count = OPS[call.op].count
        needs = ctx.needs_input_grad[2 : 2 + count]
        found = (None,) * count
        if cotangent is not None:
            gradient = _modes.applied(_Gradient) if _modes.is_differentiated() else _gradient
            found = gradient(call, needs, cotangent, *saved)
            found = [g if needed else None for g, needed in zip(found, needs, strict=True)]
        return (None, None, *found, *(None,) * (len(saved) - 2 * count))

    @staticmethod
    def jvp(ctx, _call, _needs, *tangents):
        count = OPS[ctx.call.op].count
        derivative = _directional(ctx.call, ctx.saved_tensors[:-count], tangents)
        return (derivative, *(None,) * (count + 1))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _batch(_Value, info, in_dims, *args)


def _directional(call: Call, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """∂f(x)·v, from (*x, *constants) and (*v, ...)."""
    inputs, _ = _split(call, tuple(tensors))
    moved = tangents[: len(inputs)]
    filled = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, moved, strict=True)]
    return _modes.applied(_Derivative)(call, *filled, *tensors)


class _PlainValue(torch.autograd.Function):
    """`_Value` where only autograd is at work: without what it leaves out a small call takes half the time.

    The backward pass hands out the gradients of the forward pass themselves, multiplied in place. Asked again of a
    graph that is kept, it computes them anew.
    """

    @staticmethod
    def forward(ctx, call, needs, constants, *inputs):
        row, config = OPS[call.op], call.config
        early = needs if config.reduction != "none" else _library.known_early(row, needs, config)
        value, stats, *known = _direct(call, inputs, constants, None, None, None, early, call.want_stats)
        ctx.call, ctx.known = call, known
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *row.knowing(constants, value))
        if _modes.in_forward_mode():
            ctx.save_for_forward(*inputs, *constants)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return value, stats

    @staticmethod
    def backward(ctx, cotangent, _):
        call, needs = ctx.call, ctx.needs_input_grad[3:]
        if cotangent is None:
            return (None,) * (3 + len(needs))
        # One pass has them at a time: another thread may be in the same graph, and what is handed out is not ours.
        known = ctx.__dict__.pop("known", None)
        differentiated = _modes.is_differentiated()
        whole = call.config.reduction != "none" and not _modes.is_legacy_batch(cotangent)
        if known is not None and whole and not differentiated:
            there = [k for k in known if k is not None]
            one = cotangent.is_cpu and _is_one(cotangent)
            plain = not call.problems and _modes.may_call_directly(cotangent)
            if not one and not (plain and dispatch.rescale(there, cotangent)):
                for k in there:
                    k.mul_(_library.along(cotangent, None, k.ndim, bool(call.problems)))
            return (None, None, None, *known)
        tensors = ctx.saved_tensors
        if OPS[call.op].knows:
            tensors = *tensors[:-1], tensors[-1].detach()
        gradient = _modes.applied(_Gradient) if differentiated else _gradient
        found = gradient(call, needs, cotangent, *tensors, *(known or [None] * len(needs)))
        found = [g if needed else None for g, needed in zip(found, needs, strict=True)]
        if known is not None:
            ctx.known = known
        return (None, None, None, *found)

    @staticmethod
    def jvp(ctx, _call, _needs, _constants, *tangents):
        return _directional(ctx.call, ctx.saved_tensors, tangents), None


def _gradient(call: Call, needs: Any, cotangent: Tensor, *tensors: Tensor) -> list[Tensor | None]:
    """g ∇f(x) where needed, from (*x, *constants, *known)."""
    op = OPS[call.op]
    inputs, rest = _split(call, tensors)
    constants, known = rest[: -op.count], rest[-op.count :]

    def compute(missing: list[bool]) -> Sequence[Tensor | None]:
        return run(call, inputs, constants, None, cotangent, needs=missing)[2:]

    return _library.gradient(op, needs, inputs, cotangent, known, compute, lead=bool(call.problems))


class _Gradient(torch.autograd.Function):
    """`_gradient` with derivatives."""

    @staticmethod
    def forward(call, needs, cotangent, *tensors):
        return _filled(call, _gradient(call, needs, cotangent, *tensors), cotangent)

    @staticmethod
    def setup_context(ctx, inputs, output):
        call, needs, *tensors = inputs
        ctx.call, ctx.needs = call, needs
        ctx.set_materialize_grads(False)
        count = OPS[call.op].count
        ctx.count = len(tensors)
        tensors = tensors[:-count]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        unasked = [x for x, needed in zip(output, needs, strict=True) if not needed]
        ctx.mark_non_differentiable(*[x for x in unasked if x is not None])

    @staticmethod
    def backward(ctx, *cotangents):
        call = ctx.call
        _library.check_second_derivative(call.op, call.config)
        cotangent, *tensors = ctx.saved_tensors
        inputs, constants = _split(call, tuple(tensors))
        tangents = [v if needed else None for v, needed in zip(cotangents, ctx.needs, strict=True)]
        needs = ctx.needs_input_grad[3 : 3 + len(inputs)]
        product = _modes.applied(_Product) if _modes.is_differentiated() else _product
        derivative, *products = product(call, needs, cotangent, None, *tangents, *inputs, *constants)
        products = [p if needed else None for p, needed in zip(products, needs, strict=True)]
        return (None, None, derivative, *products, *(None,) * (ctx.count - 1 - len(products)))

    @staticmethod
    def jvp(ctx, _call, _needs, cotangent_tangent, *tangents):
        call = ctx.call
        _library.check_second_derivative(call.op, call.config)
        cotangent, *tensors = ctx.saved_tensors
        inputs, constants = _split(call, tuple(tensors))
        moved = tangents[: len(inputs)]
        _, *products = _Product.apply(call, ctx.needs, cotangent, cotangent_tangent, *moved, *inputs, *constants)
        return tuple(p if needed else None for p, needed in zip(products, ctx.needs, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _batch(_Gradient, info, in_dims, *args)


class _Derivative(torch.autograd.Function):
    """∂f(x)·v, from (*v, *x, *constants)."""

    @staticmethod
    def forward(call, *tensors):
        tangents, rest = _split(call, tensors)
        inputs, constants = _split(call, rest)
        needs = [False] * len(inputs)
        unit = _ones(call, inputs, constants)
        return run(call, inputs, constants, tangents, unit, needs=needs)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        call, *tensors = inputs
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, cotangent):
        call = ctx.call
        _library.check_second_derivative(call.op, call.config)
        tangents, rest = _split(call, ctx.saved_tensors)
        inputs, constants = _split(call, rest)
        needs = (True,) * len(inputs)
        _, *products = _Product.apply(call, needs, cotangent, None, *tangents, *inputs, *constants)
        empty = [x.new_empty(0) for x in inputs]
        gradients = _Gradient.apply(call, needs, cotangent, *inputs, *constants, *empty)
        return (None, *gradients, *products, *(None,) * len(constants))

    @staticmethod
    def jvp(ctx, _call, *moved):
        call = ctx.call
        _library.check_second_derivative(call.op, call.config)
        tangents, rest = _split(call, ctx.saved_tensors)
        inputs, constants = _split(call, rest)
        second, first = _split(call, moved)
        filled = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, second, strict=True)]
        result = _Derivative.apply(call, *filled, *inputs, *constants)
        unit = _ones(call, inputs, constants)
        if unit.ndim > bool(call.problems):
            raise RuntimeError(
                f"{call.op}: forward over forward mode is not available for a value that is no scalar; "
                "use reverse mode for one of the two derivatives, or backend='reference'"
            )
        needs = (True,) * len(inputs)
        _, *products = _Product.apply(call, needs, unit, None, *tangents, *inputs, *constants)
        for product, direction in zip(products, first[: len(inputs)], strict=True):
            if direction is not None:
                result = result + (product * direction).flatten(result.ndim).sum(dim=-1)
        return result

    @staticmethod
    def vmap(info, in_dims, *args):
        return _batch(_Derivative, info, in_dims, *args)


def _product(
    call: Call, needs: Any, cotangent: Tensor, cotangent_tangent: Tensor | None, *tensors: Any
) -> tuple[Tensor, ...]:
    """(∂f(x)·v, g ∇²f(x) v + ġ ∇f(x)), from (g, ġ, *v, *x, *constants); ġ and any of v may be None, for zero."""
    tangents, rest = _split(call, tensors)
    inputs, constants = _split(call, rest)
    derivative, _, *products = run(call, inputs, constants, tangents, cotangent, cotangent_tangent, needs=needs)
    return derivative, *_filled(call, products, cotangent)


class _Product(torch.autograd.Function):
    """`_product`, of which there is no derivative."""

    @staticmethod
    def forward(call, needs, cotangent, cotangent_tangent, *tensors):
        return _product(call, needs, cotangent, cotangent_tangent, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0].op

    @staticmethod
    def backward(ctx, *_):
        _Product._raise(ctx)

    @staticmethod
    def jvp(ctx, *_):
        _Product._raise(ctx)

    @staticmethod
    def _raise(ctx):
        raise _library.no_third_derivative(ctx.op)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _batch(_Product, info, in_dims, *args)


class _WithoutDerivative(torch.autograd.Function):
    """A transform sees what `forward` of a subclass does problem by problem, and no derivative of it."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.count = len(inputs)
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, _):
        return (None,) * ctx.count

    @staticmethod
    def jvp(ctx, *_):
        return None


def _each(function: Any, info: Any, in_dims: Any, op: str, *tensors: Any) -> Any:
    """vmap of a check, problem by problem."""
    for i in range(_batch_size(op, info)):
        one = [x if x is None or dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims[1:], strict=True)]
        found = function.apply(op, *one)
    return found, None


class _Refusals(_WithoutDerivative):
    """The refusals of values that a transform hides; nothing is returned."""

    @staticmethod
    def forward(op, *tensors):
        row = OPS[op]
        dispatch.refuse_values(row, row.Inputs(*tensors[: row.count]), row.Constants(*tensors[row.count :]))
        return tensors[0].new_empty(0)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _each(_Refusals, info, in_dims, *args)


class _Drawn(_WithoutDerivative):
    """Labels, within a transform."""

    @staticmethod
    def forward(call, *tensors):
        inputs, constants = _split(call, tensors)
        return run(call, inputs, constants, needs=[False] * len(inputs))[0]

    @staticmethod
    def vmap(info, in_dims, *args):
        return _batch(_Drawn, info, in_dims, *args)


def drawn(call: Call, inputs: Sequence[Tensor], constants: Sequence[Tensor | None]) -> Tensor:
    """The labels of an op that has no derivative, within a transform."""
    return _Drawn.apply(call, *inputs, *constants)


def refuse_hidden_values(op: str, inputs: Sequence[Tensor], constants: Sequence[Tensor | None]) -> None:
    """Refuses within a transform what the reference refuses without one."""
    _Refusals.apply(op, *inputs, *constants)


# Function.apply asks for the signature of `forward` at each call; reading it from the source takes longer than
# a small kernel does.
for _function in (_Refusals, _Drawn, _Value, _Gradient, _Derivative, _Product):
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010
