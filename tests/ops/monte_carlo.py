"""Monte-Carlo estimates against what they estimate."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def within_four_standard_errors(estimates: Tensor, truth: Tensor) -> None:
    """estimates: (N, *), independent; truth: (*)."""
    error = estimates.std(dim=0) / math.sqrt(estimates.shape[0])
    excess = (estimates.mean(dim=0) - truth).abs() - 4 * error - 1e-12
    assert (excess <= 0).all(), (estimates.mean(dim=0), truth, error)


def first_and_second(loss: Callable[..., Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    """The value, the gradients, and the gradient of gradients·tangents, of a scalar."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    inner = sum((g * v).sum() for g, v in zip(gradients, tangents, strict=True))
    products = torch.autograd.grad(inner, inputs)
    return [value.detach(), *[g.detach() for g in gradients], *products]


def monte_carlo(
    estimate: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor], seeds: int = 48
) -> None:
    """Value, gradients and Hessian-vector product of `estimate(*inputs, seed=...)`, over independent seeds."""
    generator = torch.Generator().manual_seed(0)
    tangents = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in inputs]
    exact = first_and_second(truth, inputs, tangents)
    draws = [first_and_second(lambda *xs, s=seed: estimate(*xs, seed=s), inputs, tangents) for seed in range(seeds)]
    for estimates, expected in zip(zip(*draws, strict=True), exact, strict=True):
        within_four_standard_errors(torch.stack(estimates), expected)
