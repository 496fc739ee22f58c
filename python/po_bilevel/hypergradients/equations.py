"""Inner problems that are equations g(θ, φ) = 0, of which ∂L/∂θ = 0 is one.

A method that relies on the implicit function theorem, or that unrolls, takes one in place of the inner loss: with
A = (∂g/∂θ)ᵀ it solves (A + δI) v = ∂F/∂θ, and dF/dφ = ∂F/∂φ - (∂g/∂φ)ᵀ v.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .interface import Tensors
from .trees import Point, Structure, Tree


class Residual(tuple[Tensor, ...]):
    """g, a tensor for each of θ; it is told by its type from a loss.

    Attributes:
        equation: which it is of.
        size: the norm of the function's value, (), which tells whether it is the same twice.
        measured: how far θ is from a solution was measured where it was solved for, and needs no saying.
    """

    equation: "RootProblem"
    size: Tensor
    measured = False


@dataclass(frozen=True)
class RootProblem:
    """θ as a root of g(·, φ), such as optimality conditions (Blondel et al. 2022, eq. 2).

    Attributes:
        function: (θ, φ) -> g, of the form of θ.
        symmetric: ∂g/∂θ is symmetric, as of the gradient of a loss, so that `ImplicitCG` serves.

    Example:
        >>> import torch
        >>> square = RootProblem(lambda theta, phi: theta.square() - phi)
        >>> phi = torch.tensor([4.0, 9.0], requires_grad=True)
        >>> root = solve(square, phi.detach().sqrt(), phi)
        >>> torch.autograd.grad(root.sum(), phi)  # 1 / (2√φ)
        (tensor([0.2500, 0.1667]),)
    """

    function: Callable[[Tree, Tree], Tree]
    symmetric: bool = False
    # Of the iteration v ← v - α (A v - b), if it is known to converge.
    step: ClassVar[float | None] = None
    noun: ClassVar[str] = "RootProblem: function"

    def __call__(self, theta: Tree, phi: Tree) -> Tree:
        """What `flat` makes g of."""
        return self.function(theta, phi)

    def residual(self, theta: Tensors, value: Tensors) -> Tensors:
        """g from the value of the function."""
        return value

    def flat(self, where: Structure, point: Point) -> Callable[[Any, Any], Any]:
        """g as a function of tuples, of which shape and finiteness are checked."""
        function = point.flat(self)

        def of_tuples(theta: Tensors, phi: Tensors) -> Residual:
            value = where.taken(self.noun, function(theta, phi))
            if not all(bool(v.detach().isfinite().all()) for v in value):
                raise NonFiniteError(f"{self.noun}: expected finite numbers, got some that are not")
            found = Residual(self.residual(theta, value))
            found.equation = self
            found.size = torch.stack([v.detach().norm() for v in value]).norm()
            return found

        return of_tuples


@dataclass(frozen=True)
class FixedPointProblem(RootProblem):
    """θ as the fixed point of a map, θ = T(θ, φ), such as an equilibrium network (Bai et al. 2019) or Sinkhorn's.

    Here g = θ - T(θ, φ). `Unrolled(steps, 1.0)` differentiates iterations of the map, `FixedPoint()` and
    `Neumann(terms, 1.0)` iterate the transposed Jacobian, `Identity()` leaves it out (Fung et al. 2022).

    Attributes:
        function: T, (θ, φ) -> θ. For what iterates, a contraction: of the spectral radius of ∂T/∂θ, below one.

    Example:
        >>> import torch
        >>> babylonian = FixedPointProblem(lambda theta, phi: 0.5 * (theta + phi / theta))
        >>> phi = torch.tensor([4.0, 9.0], requires_grad=True)
        >>> solve(babylonian, torch.ones(2), phi)
        tensor([2., 3.], grad_fn=<SolutionBackward>)
    """

    step: ClassVar[float | None] = 1.0
    noun: ClassVar[str] = "FixedPointProblem: function"

    def residual(self, theta: Tensors, value: Tensors) -> Tensors:
        """See `RootProblem.residual`."""
        return tuple(t - v for t, v in zip(theta, value, strict=True))
