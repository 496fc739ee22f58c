"""Methods that differentiate the inner optimiser's steps: dF(θ_T)/dφ with θ_{t+1} = θ_t - α ∂L/∂θ(θ_t, φ), or Adam's.

They start at the θ they are called with, which need not be a minimum, or at a function of φ, and hand θ_T back in
`Hypergradient.theta`. The hypergradient is that of θ_T as a function of φ; it tends to the implicit one as T grows if
the steps converge. How far it is from that they cannot know (`converged` is None); `inner_gradient_norm` is that of
θ_T.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import Self

from .interface import Hypergradient, Loss, Tensors
from .method import Method, Start
from .problem import add, all_finite, all_reached, filled, flat, inner_gradient, length, outer_gradients
from .trees import Leaves, Point, Tree
from .updates import OptimizerFactory, Rule, gradient_descent, rules


class _Unrolling(Method):
    equations = True
    steps: int
    learning_rate: float | None
    optimizer: OptimizerFactory | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.learning_rate is None) == (self.optimizer is None):
            raise ValueError(f"{type(self).__name__}: learning_rate: expected it or an optimizer, got both or neither")

    def at(self, point: Point) -> Self:
        """See `Method.at`."""
        make = self.optimizer
        if make is None:
            return self
        return replace(self, optimizer=lambda given, phi: make(given, point.tree_of_phi(phi)))  # type: ignore[type-var]

    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Leaves, start: Start) -> Hypergradient:
        lengths = self._lengths()
        steps = _Steps(inner_loss, self.learning_rate, self.optimizer)
        with torch.enable_grad():
            made = self._initial(phi)
        number, reached, pieces = 0, steps.begin(made or theta, phi), []
        for before, each in zip([self.steps - sum(lengths), *lengths], lengths, strict=False):
            reached = steps.take(reached, phi, number, before)
            number += before
            pieces.append((reached, number, each))
        return _backward(steps, outer_loss, made, pieces, phi)

    def _initial(self, phi: Tensors) -> Tensors:
        """θ_0, if it is a function of φ."""
        return ()

    @abstractmethod
    def _lengths(self) -> list[int]:
        """Of the pieces that the last steps are differentiated in, one at a time."""


@dataclass(frozen=True)
class Unrolled(_Unrolling):
    """Backpropagation through all steps (Maclaurin et al. 2015; Franceschi et al. 2017, reverse mode).

    Memory grows with steps: the graph of each is kept.

    Attributes:
        steps: T.
        learning_rate: α of gradient descent; None with an optimizer.
        optimizer: (parameters, φ) -> a `torch.optim` SGD, Adam or AdamW of the parameters, any hyperparameter of which
            may be a tensor computed from φ. Its state is empty at θ_0. The parameters are those of θ, in the order of
            its tree; what is in none of its groups stays as it is.
        initial: φ -> θ_0, as for MAML (Finn et al. 2017); the θ of the call only says its form. None for that θ.

    Example:
        >>> import torch
        >>> phi = {"weight": torch.tensor(1.0, requires_grad=True), "lr": torch.tensor(0.1, requires_grad=True)}
        >>> method = Unrolled(
        ...     1, optimizer=lambda parameters, phi: torch.optim.SGD(parameters, lr=phi["lr"]),
        ...     initial=lambda phi: phi["weight"],
        ... )
        >>> method(lambda w, phi: w.square(), lambda w, phi: w, torch.tensor(0.0, requires_grad=True), phi).gradient
        {'weight': tensor(0.8000), 'lr': tensor(-2.)}
    """

    steps: int
    learning_rate: float | None = None
    optimizer: OptimizerFactory | None = field(default=None, kw_only=True)
    initial: Callable[[Tree], Tree] | None = field(default=None, kw_only=True)

    def at(self, point: Point) -> Self:
        """See `Method.at`."""
        method, make = super().at(point), self.initial
        if make is None:
            return method
        what = f"{type(self).__name__}: initial"
        return replace(method, initial=lambda phi: point.theta_of(what, make(point.tree_of_phi(phi))))

    def _initial(self, phi: Tensors) -> Tensors:
        return () if self.initial is None else self.initial(phi)

    def _lengths(self) -> list[int]:
        return [self.steps]


@dataclass(frozen=True)
class Truncated(_Unrolling):
    """Backpropagation through the last steps only (Shaban et al. 2019).

    Memory grows with backward_steps. What is left out falls with (1 - α λ_min)^backward_steps.

    Attributes:
        steps: T, taken in all.
        backward_steps: how many of them, the last, are differentiated.
        learning_rate, optimizer: as for `Unrolled`.
    """

    steps: int
    backward_steps: int
    learning_rate: float | None = None
    optimizer: OptimizerFactory | None = field(default=None, kw_only=True)

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
        steps, learning_rate, optimizer, initial: as for `Unrolled`.
    """

    def _lengths(self) -> list[int]:
        length = math.isqrt(self.steps - 1) + 1
        whole, left = divmod(self.steps, length)
        return [length] * whole + [left] * (left > 0)


class _Steps:
    """Steps on the inner loss. What they carry along is θ, and behind it the state of the optimiser."""

    def __init__(
        self, inner_loss: Loss, learning_rate: float | None, optimizer: OptimizerFactory | None = None
    ) -> None:  # fmt: skip
        self.inner_loss = inner_loss
        self._learning_rate, self._optimizer = learning_rate, optimizer

    def _rules(self, theta: Tensors, phi: Tensors) -> list[Rule]:
        if self._optimizer is not None:
            return rules(self._optimizer, theta, phi)
        assert self._learning_rate is not None
        return [gradient_descent(self._learning_rate)] * len(theta)

    def begin(self, theta: Tensors, phi: Tensors) -> Tensors:
        """θ without a graph, and an empty state."""
        rules = zip(theta, self._rules(theta, phi), strict=True)
        states = [torch.zeros_like(t) for t, rule in rules for _ in range(rule.size)]
        self._size = len(theta)
        return (*(t.detach().requires_grad_() for t in theta), *states)

    def theta(self, carried: Tensors) -> Tensors:
        return carried[: self._size]

    def take(self, carried: Tensors, phi: Tensors, first: int, count: int, *, create_graph: bool = False) -> Tensors:
        """What is carried after steps, the first of which has the number first; with a graph if asked, else without."""
        if not create_graph:
            phi = tuple(p.detach() for p in phi)
        updates = self._rules(self.theta(carried), phi)
        for number in range(first + 1, first + 1 + count):
            theta, rest = self.theta(carried), carried[self._size :]
            gradients = inner_gradient(self.inner_loss, theta, phi, create_graph=create_graph)[1]
            moved, states = [], []
            for parameter, gradient, rule in zip(theta, gradients, updates, strict=True):
                if not create_graph:
                    parameter = parameter.detach()
                new, *state = rule.update(parameter, gradient, rest[: rule.size], number)
                rest = rest[rule.size :]
                moved.append(new if create_graph else new.detach().requires_grad_())
                states.extend(state)
            carried = (*moved, *states)
        return carried


def descend(inner_loss: Loss, theta: Tensors, phi: Tensors, steps: int, learning_rate: float) -> Tensors:
    """θ after steps of gradient descent, without a graph; new tensors that require grad."""
    taken = _Steps(inner_loss, learning_rate)
    return taken.take(taken.begin(theta, phi), phi, 0, steps)


def _backward(
    steps: _Steps, outer_loss: Loss, made: Tensors, pieces: list[tuple[Tensors, int, int]], phi: Leaves
) -> Hypergradient:  # fmt: skip
    """The hypergradient through consecutive pieces of a trajectory, of which one at a time has its graph.

    Args:
        made: θ_0 with its graph, if it is a function of φ.
        pieces: what is carried at the start of each, the number of steps before it, and that of its own.
    """
    adjoint: Tensors = ()
    by_phi: list[Tensor | None] = [None] * len(phi)
    end: Tensors = ()
    with torch.enable_grad():
        for begin, number, count in reversed(pieces):
            leaves = tuple(t.detach().requires_grad_() for t in begin)
            reached = steps.take(leaves, phi, number, count, create_graph=True)
            if not adjoint:
                end = tuple(t.detach().requires_grad_() for t in steps.theta(reached))
                outer, by_theta, direct = outer_gradients(outer_loss, end, phi)
                # No loss sees the state at the end.
                adjoint = (*by_theta, *map(torch.zeros_like, reached[len(end) :]))
            pulled = torch.autograd.grad(reached, leaves + phi, adjoint, allow_unused=True)
            adjoint = filled(pulled[: len(leaves)], leaves)
            add(by_phi, pulled[len(leaves) :])
        learned = [(t, a) for t, a in zip(made, adjoint, strict=False) if t.requires_grad]
        if learned:
            add(by_phi, torch.autograd.grad([t for t, _ in learned], phi, [a for _, a in learned], allow_unused=True))
    through = all_reached(by_phi, phi, direct)
    total = tuple(d + t for d, t in zip(filled(direct, phi), through, strict=True))
    inner, left = inner_gradient(steps.inner_loss, end, phi)
    return Hypergradient(
        gradient=all_finite(total), inner_loss=float(inner.detach()), outer_loss=float(outer.detach()),
        num_products=sum(count for _, _, count in pieces), theta=tuple(t.detach() for t in end),
        inner_gradient_norm=length(flat(left, end)),
    )  # fmt: skip
