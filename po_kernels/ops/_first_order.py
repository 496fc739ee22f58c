"""The identity, whose first derivative is right and whose second raises.

A gradient that was stopped leaves a function whose second derivative exists and is wrong. It goes by way of this
identity: a backward pass that is itself differentiated hands on, beside its cotangent g, a zero that depends on the
input and whose own derivative raises. What depends on g in other ways, such as the mixed derivative, does not meet it.
"""

from typing import Any

import torch
from torch import Tensor

from . import _library, _modes


def first_order(x: Tensor, why: str) -> Tensor:
    """x; `why` is the message of the RuntimeError that a second derivative raises."""
    if not torch.compiler.is_compiling():
        return _FirstOrder.apply(x, why)
    if _modes.traced_by_a_transform():
        raise RuntimeError(f"{why}; under torch.compile torch.func would differentiate twice without notice")
    return _library.FIRST_ORDER(x, why)


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, why):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.why = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, cotangent):
        return _with_lost(cotangent, *ctx.saved_tensors, ctx.why), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _with_lost(tangent, *ctx.saved_tensors, ctx.why)


def _with_lost(derivative: Tensor, x: Tensor, why: str) -> Tensor:
    return derivative + _Lost.apply(x, why) if _modes.is_differentiated() else derivative


class _Lost(torch.autograd.Function):
    """Zero in place of what a stopped gradient leaves out of a second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, why):
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.why = inputs[1]

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(ctx.why)

    @staticmethod
    def jvp(ctx, *_: Any):
        raise RuntimeError(ctx.why)
