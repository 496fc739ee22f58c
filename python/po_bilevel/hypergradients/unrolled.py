"""Methods that differentiate gradient descent on the inner loss: dF(θ_T)/dφ with θ_{t+1} = θ_t - α ∂L/∂θ(θ_t, φ).

They start at the θ they are called with, which need not be a minimum, and hand θ_T back in `Hypergradient.theta`. The
hypergradient is that of θ_T as a function of φ; it tends to the implicit one as T grows if gradient descent converges.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .interface import Hypergradient, Loss, Tensors
from .problem import all_finite, all_reached, inner_gradient, inner_parameters, outer_gradients, parameters


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through all steps (Maclaurin et al. 2015; Franceschi et al. 2017, reverse mode).

    Memory grows with steps: the graph of each is kept.

    Attributes:
        steps: T.
        learning_rate: α.
    """

    steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        checks.count(self, "steps", self.steps)
        checks.positive(self, "learning_rate", self.learning_rate)

    def __call__(
        self, inner_loss: Loss, outer_loss: Loss, theta: Sequence[Tensor], phi: Sequence[Tensor],
        *, start: Tensors | None = None,
    ) -> Hypergradient:  # fmt: skip
        """See `HypergradientMethod.__call__`; start is not used."""
        begin, phi = inner_parameters(theta), parameters("phi", phi)
        return _backward(inner_loss, outer_loss, [begin], [self.steps], phi, self.learning_rate)


@dataclass(frozen=True)
class Truncated:
    """Backpropagation through the last steps only (Shaban et al. 2019).

    Memory grows with backward_steps. What is left out falls with (1 - α λ_min)^backward_steps.

    Attributes:
        steps: T, taken in all.
        backward_steps: how many of them, the last, are differentiated.
        learning_rate: α.
    """

    steps: int
    backward_steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        checks.count(self, "steps", self.steps)
        checks.count(self, "backward_steps", self.backward_steps)
        if self.backward_steps > self.steps:
            raise ValueError(
                f"Truncated: backward_steps: expected at most steps = {self.steps}, got {self.backward_steps}"
            )
        checks.positive(self, "learning_rate", self.learning_rate)

    def __call__(
        self, inner_loss: Loss, outer_loss: Loss, theta: Sequence[Tensor], phi: Sequence[Tensor],
        *, start: Tensors | None = None,
    ) -> Hypergradient:  # fmt: skip
        """See `HypergradientMethod.__call__`; start is not used."""
        begin, phi = inner_parameters(theta), parameters("phi", phi)
        begin = descend(inner_loss, begin, phi, self.steps - self.backward_steps, self.learning_rate)
        return _backward(inner_loss, outer_loss, [begin], [self.backward_steps], phi, self.learning_rate)


@dataclass(frozen=True)
class Recompute:
    """`Unrolled` with the steps recomputed in reverse, √T at a time (Griewank 1992; Chen et al. 2016).

    The same gradient, in memory that grows with √T, for one more inner gradient a step.

    Attributes:
        steps: T.
        learning_rate: α.
    """

    steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        checks.count(self, "steps", self.steps)
        checks.positive(self, "learning_rate", self.learning_rate)

    def __call__(
        self, inner_loss: Loss, outer_loss: Loss, theta: Sequence[Tensor], phi: Sequence[Tensor],
        *, start: Tensors | None = None,
    ) -> Hypergradient:  # fmt: skip
        """See `HypergradientMethod.__call__`; start is not used."""
        begin, phi = inner_parameters(theta), parameters("phi", phi)
        length = math.isqrt(self.steps - 1) + 1
        lengths = [length] * (self.steps // length)
        if self.steps % length:
            lengths.append(self.steps % length)
        begins = [begin]
        for each in lengths[:-1]:
            begins.append(descend(inner_loss, begins[-1], phi, each, self.learning_rate))
        return _backward(inner_loss, outer_loss, begins, lengths, phi, self.learning_rate)


def descend(inner_loss: Loss, theta: Tensors, phi: Tensors, steps: int, learning_rate: float) -> Tensors:
    """θ after steps of gradient descent, without a graph; new tensors that require grad."""
    constant = tuple(p.detach() for p in phi)
    for _ in range(steps):
        _, gradients = inner_gradient(inner_loss, theta, constant)
        theta = tuple((t.detach() - learning_rate * g).requires_grad_() for t, g in zip(theta, gradients, strict=True))
    return theta


def _differentiable_steps(
    inner_loss: Loss, theta: Tensors, phi: Tensors, steps: int, learning_rate: float
) -> Tensors:  # fmt: skip
    """θ after steps of gradient descent, as a function of theta and phi."""
    for _ in range(steps):
        _, gradients = inner_gradient(inner_loss, theta, phi, create_graph=True)
        theta = tuple(t - learning_rate * g for t, g in zip(theta, gradients, strict=True))
    return theta


def _backward(
    inner_loss: Loss, outer_loss: Loss, begins: list[Tensors], lengths: list[int], phi: Tensors, learning_rate: float
) -> Hypergradient:  # fmt: skip
    """The hypergradient through consecutive pieces of a trajectory, of which one at a time has its graph.

    Args:
        begins: θ at the start of each piece.
        lengths: steps of each piece.
    """
    adjoint: Tensors | None = None
    total: list[Tensor] = []
    end: Tensors = ()
    with torch.enable_grad():
        for begin, steps in zip(reversed(begins), reversed(lengths), strict=True):
            leaves = tuple(t.detach().requires_grad_() for t in begin)
            reached = _differentiable_steps(inner_loss, leaves, phi, steps, learning_rate)
            if adjoint is None:
                end = tuple(t.detach().requires_grad_() for t in reached)
                outer, adjoint, direct = outer_gradients(outer_loss, end, phi)
                total = [torch.zeros_like(p) if d is None else d for p, d in zip(phi, direct, strict=True)]
            pulled = torch.autograd.grad(reached, leaves + phi, adjoint, allow_unused=True)
            adjoint = tuple(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, pulled, strict=False))
            for index, part in enumerate(all_reached(pulled[len(leaves) :])):
                total[index] = total[index] + part
    with torch.no_grad():
        inner = inner_loss(end, phi)
    return Hypergradient(
        gradient=all_finite(tuple(total)),
        inner_loss=float(inner),
        outer_loss=float(outer.detach()),
        residual_norm=None,
        num_products=sum(lengths),
        converged=True,
        min_curvature=None,
        problems=(),
        solution=None,
        theta=tuple(t.detach() for t in end),
    )
