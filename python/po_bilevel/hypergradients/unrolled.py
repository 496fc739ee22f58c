"""Methods that differentiate gradient descent on the inner loss: dF(θ_T)/dφ with θ_{t+1} = θ_t - α ∂L/∂θ(θ_t, φ).

They start at the θ they are called with, which need not be a minimum, and hand θ_T back in `Hypergradient.theta`. The
hypergradient is that of θ_T as a function of φ; it tends to the implicit one as T grows if gradient descent converges.
How far it is from that they cannot know (`converged` is None); `inner_gradient_norm` is that of θ_T.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import Hypergradient, Loss, Tensors
from .method import Method, Start
from .problem import all_finite, all_reached, filled, flat, inner_gradient, length, outer_gradients


class _Unrolling(Method):
    steps: int
    learning_rate: float

    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Tensors, start: Start) -> Hypergradient:
        lengths = self._lengths()
        begins = [descend(inner_loss, theta, phi, self.steps - sum(lengths), self.learning_rate)]
        for each in lengths[:-1]:
            begins.append(descend(inner_loss, begins[-1], phi, each, self.learning_rate))
        return _backward(inner_loss, outer_loss, begins, lengths, phi, self.learning_rate)

    @abstractmethod
    def _lengths(self) -> list[int]:
        """Of the pieces that the last steps are differentiated in, one at a time."""


@dataclass(frozen=True)
class Unrolled(_Unrolling):
    """Backpropagation through all steps (Maclaurin et al. 2015; Franceschi et al. 2017, reverse mode).

    Memory grows with steps: the graph of each is kept.

    Attributes:
        steps: T.
        learning_rate: α.
    """

    steps: int
    learning_rate: float

    def _lengths(self) -> list[int]:
        return [self.steps]


@dataclass(frozen=True)
class Truncated(_Unrolling):
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
        super().__post_init__()
        if self.backward_steps > self.steps:
            raise ValueError(
                f"Truncated: backward_steps: expected at most steps = {self.steps}, got {self.backward_steps}"
            )

    def _lengths(self) -> list[int]:
        return [self.backward_steps]


@dataclass(frozen=True)
class Recompute(Unrolled):
    """`Unrolled` with the steps recomputed in reverse, √T at a time (Griewank 1992; Chen et al. 2016).

    The same gradient, in memory that grows with √T, for one more inner gradient a step.

    Attributes:
        steps, learning_rate: as for `Unrolled`.
    """

    def _lengths(self) -> list[int]:
        length = math.isqrt(self.steps - 1) + 1
        whole, left = divmod(self.steps, length)
        return [length] * whole + [left] * (left > 0)


def descend(inner_loss: Loss, theta: Tensors, phi: Tensors, steps: int, learning_rate: float) -> Tensors:
    """θ after steps of gradient descent, without a graph; new tensors that require grad."""
    constant = tuple(p.detach() for p in phi)
    for _ in range(steps):
        _, gradients = inner_gradient(inner_loss, theta, constant)
        theta = tuple((t.detach() - learning_rate * g).requires_grad_() for t, g in zip(theta, gradients, strict=True))
    return theta


def _differentiable_steps(inner_loss: Loss, theta: Tensors, phi: Tensors, steps: int, learning_rate: float) -> Tensors:
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
                total = list(filled(direct, phi))
            pulled = torch.autograd.grad(reached, leaves + phi, adjoint, allow_unused=True)
            adjoint = filled(pulled[: len(leaves)], leaves)
            for index, part in enumerate(all_reached(pulled[len(leaves) :], phi, direct)):
                total[index] = total[index] + part
    inner, left = inner_gradient(inner_loss, end, phi)
    return Hypergradient(
        gradient=all_finite(tuple(total)), inner_loss=float(inner.detach()), outer_loss=float(outer.detach()),
        num_products=sum(lengths), theta=tuple(t.detach() for t in end), inner_gradient_norm=length(flat(left, end)),
    )  # fmt: skip
