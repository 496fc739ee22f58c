"""Plain torch: the definition the other backends are tested against, differentiable to any order.

`evaluate` is that definition. `KERNELS` are made of it by autograd: for an estimator whose second derivative has to
raise, and for the second order of backends that have only the first.
"""

from typing import Any

import torch
from torch import Tensor

from .. import autocast, checks
from ..contract import OPS, Definitions, Kernel, OpConfig, Request
from . import advantage, categorical, gae, gaussian, mvn, token
from .losses import RowLoss, reduced

DEFINITIONS: Definitions = {
    **gaussian.DEFINITIONS,
    **mvn.DEFINITIONS,
    **categorical.DEFINITIONS,
    **advantage.DEFINITIONS,
    **gae.DEFINITIONS,
    **token.DEFINITIONS,
}


def unavailable() -> str | None:
    return None


def unserved(device_type: str, dtype: torch.dtype) -> str | None:
    return None


def must_be_asked(op: str, device_type: str) -> str | None:
    return None


def evaluate(op: str, inputs: Any, constants: Any, config: OpConfig) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value, and the statistics of a loss; both have derivatives by autograd. Autocast changes neither.

    Under autocast all is computed in float64, which autocast does not touch: passes that differentiate it may run
    there too, and it would take their matrix products in half precision.
    """
    checks.values(OPS[op], inputs, constants)
    kind, dtype = inputs[0].device.type, inputs[0].dtype
    if autocast.available(kind) and torch.is_autocast_enabled(kind):
        with autocast.disabled(inputs[0]):
            value, statistics = _evaluate(op, type(inputs)(*(x.double() for x in inputs)), constants, config)
            return value.to(OPS[op].value_dtype(dtype)), tuple(x.to(dtype) for x in statistics)
    return _evaluate(op, inputs, constants, config)


def _evaluate(op: str, inputs: Any, constants: Any, config: OpConfig) -> tuple[Tensor, tuple[Tensor, ...]]:
    found = DEFINITIONS[op](inputs, constants, config)
    if not isinstance(found, RowLoss):
        return found, ()
    loss, *statistics = found
    averaged = "none" if config.reduction == "none" else "mean"
    return reduced(loss, config.reduction), tuple(reduced(column, averaged) for column in statistics)


def entropy(inputs: Any, reduction: str) -> Tensor:
    """The entropy of the policy that a loss has these inputs of, reduced as the loss is."""
    if "logits" in inputs._fields:
        rows = categorical.entropy(inputs.logits)
    else:
        rows = (mvn if inputs.scale.ndim == 3 else gaussian).entropy(inputs.scale)
    return reduced(rows, reduction)


def _kernel(op: str) -> Kernel:
    def kernel(request: Request) -> list[Any]:
        second = request.tangents is not None
        with torch.inference_mode(False), torch.enable_grad(), autocast.disabled(request.inputs[0]):
            # Copies: autograd may keep them, and what an operator returns shares no memory with what it is given.
            request = _copied(request)
            inputs = [
                x.requires_grad_(second or needed) for x, needed in zip(request.inputs, request.needs, strict=True)
            ]
            value, statistics = evaluate(op, request.inputs, request.constants, request.config)
            if not OPS[op].differentiable:
                return [value, None, *(None for _ in inputs)]
            cotangent = torch.ones_like(value) if request.cotangent is None else request.cotangent
            if second:
                return _second(request, inputs, value, cotangent)
            gradients = _gradients(value, inputs, request.needs, cotangent)
        stats = torch.stack(statistics).detach() if request.want_stats else None
        return [value.detach(), stats, *gradients]

    return kernel


def _copied(request: Request) -> Request:
    def copied(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().clone()
        return type(x)(*map(copied, x)) if isinstance(x, tuple) else x

    return Request._make([*map(copied, request[:5]), *request[5:]])


def _second(request: Request, inputs: list[Tensor], value: Tensor, cotangent: Tensor) -> list[Any]:
    """∂f·v and g ∇²f v + ġ ∇f, as derivatives of g ∇f·v in g and in the inputs."""
    cotangent.requires_grad_()
    moved = [v is not None for v in request.tangents or ()]
    gradients = _gradients(value, inputs, moved, cotangent, create_graph=True)
    along = [(g * v).sum() for g, v in zip(gradients, request.tangents or (), strict=True) if v is not None]
    if not along:
        along = [0.0 * cotangent.sum()]
    inner = torch.stack(along).sum()
    needs = list(request.needs)
    derivative, *products = _gradients(inner, [cotangent, *inputs], [True, *needs], torch.ones_like(inner))
    if request.cotangent_tangent is not None:
        turned = _gradients(value, inputs, request.needs, request.cotangent_tangent)
        products = [None if p is None else p + t for p, t in zip(products, turned, strict=True)]
    return [derivative, None, *products]


def _gradients(
    value: Tensor, inputs: list[Tensor], needs: Any, cotangent: Tensor, create_graph: bool = False
) -> list[Any]:
    """g ∇f for each input asked for, None for the others."""
    wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed]
    if not wanted:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            value, wanted, cotangent, create_graph=create_graph, retain_graph=True, materialize_grads=True
        )
    )
    return [next(found).contiguous() if needed else None for needed in needs]


KERNELS: dict[str, Kernel] = {op: _kernel(op) for op in DEFINITIONS}
