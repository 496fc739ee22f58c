"""What the methods have in common: options that are checked, θ and φ that are checked."""

import dataclasses
import math
from abc import ABC, abstractmethod
from numbers import Integral, Real
from typing import Any, ClassVar

from typing_extensions import Self

from .equations import RootProblem
from .interface import Hypergradient, Loss, Tensors
from .problem import ImplicitProblem
from .repeatable import repeatable
from .trees import Leaves, Point, Structure, Tree

Start = Tensors | None
# Options that count something; the others are positive numbers, but for the seed, and a damping may be zero.
FUNCTIONS = ("initial", "optimizer", "solver")
UNCHECKED = ("seed", "warm_start", "preconditioner", "inverse")
COUNTS = ("steps", "backward_steps", "terms", "max_iterations", "max_size", "pairs")


class Method(ABC):
    """A `HypergradientMethod` whose options are the fields of a dataclass, checked by their names.

    Attributes:
        equations: it takes a `RootProblem` in place of the inner loss.
    """

    equations: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name = field.name
            value: Any = getattr(self, name)
            if name in UNCHECKED or (value is None and field.default is None):
                continue
            if name in FUNCTIONS:
                if not callable(value):
                    raise TypeError(f"{type(self).__name__}: {name}: expected a function, got {type(value).__name__}")
                continue
            if name in COUNTS:
                right = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
                expected = "an integer of at least 1"
            else:
                zero = name == "damping"
                right = isinstance(value, Real) and math.isfinite(value) and (float(value) > 0 or (zero and value == 0))
                expected = "a finite number of at least 0" if zero else "a finite positive number"
            if not right:
                raise ValueError(f"{type(self).__name__}: {name}: expected {expected}, got {value!r}")

    def __call__(
        self, inner_loss: Loss | RootProblem, outer_loss: Loss, theta: Tree, phi: Tree, *, start: Tree = None
    ) -> Hypergradient:
        """See `HypergradientMethod.__call__`."""
        point = Point(where := Structure("theta", theta), Structure("phi", phi))
        if isinstance(inner_loss, RootProblem):
            if not self.equations:
                raise ValueError(
                    f"{type(self).__name__}: inner_loss: expected a loss, got a {type(inner_loss).__name__}; use a "
                    "method by the implicit function theorem, or one that unrolls"
                )
            flat = inner_loss.flat(where, point)
        else:
            flat = point.flat(inner_loss)
        with repeatable(point, inner_loss=flat, outer_loss=point.flat(outer_loss)) as (inner, outer):
            result = point.result(self.at(point)._at(inner, outer, point.theta, point.phi, point.start(start)))
        noise = (*inner.problems, *outer.problems)
        return dataclasses.replace(result, converged=False, problems=noise + result.problems) if noise else result

    def at(self, point: Point) -> Self:
        """Itself, with functions of tuples for options that are functions of trees."""
        return self

    @abstractmethod
    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Leaves, start: Start) -> Hypergradient:
        """The hypergradient at leaves θ and φ."""


class ImplicitMethod(Method):
    """A method by the implicit function theorem, which finds v."""

    equations = True
    damping: float = 0.0

    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Leaves, start: Start) -> Hypergradient:
        return self.solve(ImplicitProblem(inner_loss, outer_loss, theta, phi, self.damping), start)

    def elsewhere(self) -> Self:
        """The method for the same H in a problem whose θ and φ are others."""
        return self

    @abstractmethod
    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        """The hypergradient from v."""
