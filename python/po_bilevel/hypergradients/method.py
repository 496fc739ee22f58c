"""What the methods have in common: options that are checked, θ and φ that are checked."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from .interface import Hypergradient, Loss, Tensors
from .problem import ImplicitProblem, inner_parameters, parameters
from .repeatable import repeatable

Start = Tensors | None
# Options that count something; the others are positive numbers, but for the seed, and a damping may be zero.
COUNTS = ("steps", "backward_steps", "terms", "max_iterations", "max_size", "pairs")


class Method(ABC):
    """A `HypergradientMethod` whose options are the fields of a dataclass, checked by their names."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name = field.name
            value: Any = getattr(self, name)
            if name == "seed" or (value is None and field.default is None):
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
        self, inner_loss: Loss, outer_loss: Loss, theta: Sequence[Tensor], phi: Sequence[Tensor],
        *, start: Start = None,
    ) -> Hypergradient:  # fmt: skip
        """See `HypergradientMethod.__call__`."""
        theta, phi = inner_parameters(theta), parameters("phi", phi)
        with repeatable(theta + phi, inner_loss=inner_loss, outer_loss=outer_loss) as (inner, outer):
            result = self._at(inner, outer, theta, phi, start)
        noise = (*inner.problems, *outer.problems)
        return dataclasses.replace(result, converged=False, problems=noise + result.problems) if noise else result

    @abstractmethod
    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Tensors, start: Start) -> Hypergradient:
        """The hypergradient at leaves θ and φ."""


class ImplicitMethod(Method):
    """A method by the implicit function theorem, which finds v."""

    damping: float = 0.0

    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Tensors, start: Start) -> Hypergradient:
        return self.solve(ImplicitProblem(inner_loss, outer_loss, theta, phi, self.damping), start)

    @abstractmethod
    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        """The hypergradient from v."""
