"""Plain torch: the definition the other backends are tested against, differentiable to any order.

`evaluate` is that definition. `KERNELS` are made of it by autograd: for an estimator whose second derivative has to
raise, and for the second order of backends that have only the first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..contract import OPS, Kernel, OpConfig, Request
from . import advantage, categorical, gaussian, mvn
from .losses import RowLoss, reduced

DEFINITIONS: dict[str, Callable[[Any, Any, OpConfig], Any]] = {
    **gaussian.DEFINITIONS,
    **mvn.DEFINITIONS,
    **categorical.DEFINITIONS,
    **advantage.DEFINITIONS,
}


def unavailable() -> str | None:
    return None


def unserved(device_type: str, dtype: torch.dtype) -> str | None:
    return None


def must_be_asked(op: str, device_type: str) -> str | None:
    return None


def evaluate(op: str, inputs: Any, constants: Any, config: OpConfig) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value, and the statistics of a loss; both have derivatives by autograd. Autocast changes neither."""
    checks.values(OPS[op], inputs, constants)
    with torch.autocast(inputs[0].device.type, enabled=False):
        found = DEFINITIONS[op](inputs, constants, config)
    if not isinstance(found, RowLoss):
        return found, ()
    loss, *statistics = found
    averaged = "none" if config.reduction == "none" else "mean"
    return reduced(loss, config.reduction), tuple(reduced(column, averaged) for column in statistics)


def entropy(op: str, inputs: Any, reduction: str) -> Tensor:
    """The entropy of a policy whose inputs begin as those of `op`, reduced as its loss is."""
    family = op.split("_")[0]
    if family == "categorical":
        rows = categorical.entropy(inputs[0])
    else:
        rows = (gaussian if family == "gaussian" else mvn).entropy(inputs[1])
    return reduced(rows, reduction)


def _kernel(op: str) -> Kernel:
    def kernel(request: Request) -> list[Any]:
        second = request.tangents is not None
        with torch.enable_grad():
            wanted = [second or needed for needed in request.needs]
            # Copies: what an operator returns may share no memory with what it is given.
            inputs = [x.detach().clone().requires_grad_(each) for x, each in zip(request.inputs, wanted, strict=True)]
            named = type(request.inputs)(*inputs)
            value, statistics = evaluate(op, named, request.constants, request.config)
            if not OPS[op].differentiable:
                return [value, None, *(None for _ in inputs)]
            cotangent = torch.ones_like(value) if request.cotangent is None else request.cotangent.detach().clone()
            if second:
                return _second(request, inputs, value, cotangent)
            gradients = _gradients(value, inputs, request.needs, cotangent)
        stats = torch.stack(statistics).detach() if request.want_stats else None
        return [value.detach(), stats, *gradients]

    return kernel


def _second(request: Request, inputs: list[Tensor], value: Tensor, cotangent: Tensor) -> list[Any]:
    """∂f·v and g ∇²f v + ġ ∇f, as derivatives of g ∇f·v in g and in the inputs."""
    cotangent.requires_grad_()
    moved = [v is not None for v in request.tangents or ()]
    gradients = _gradients(value, inputs, moved, cotangent, create_graph=True)
    along = [(g * v.detach()).sum() for g, v in zip(gradients, request.tangents or (), strict=True) if v is not None]
    if not along:
        along = [0.0 * cotangent.sum()]
    inner = torch.stack(along).sum()
    needs = [any(request.needs) and needed for needed in request.needs]
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
    if not wanted or not value.requires_grad:
        return [torch.zeros_like(x) if needed else None for x, needed in zip(inputs, needs, strict=True)]
    found = iter(
        torch.autograd.grad(
            value, wanted, cotangent, create_graph=create_graph, retain_graph=True, materialize_grads=True
        )
    )
    return [next(found).contiguous() if needed else None for needed in needs]


KERNELS: dict[str, Kernel] = {op: _kernel(op) for op in DEFINITIONS}
