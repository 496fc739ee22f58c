"""What every hypergradient method takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Tensors = tuple[Tensor, ...]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and its diagnosis.

    Attributes:
        gradient: dF/dφ, of the form of φ.
        inner_loss, outer_loss: L and F where the gradient was taken: at `theta` for a method that unrolls, else at θ as
            it came. Of an equation g = 0, L is ½‖g‖², and g takes the place of ∂L/∂θ.
        residual_norm: how far the method's own equation is from being solved, measured, not estimated: ‖b - (H + δI) v‖
            / ‖b‖ of a linear system, 0 for b = 0. None for a method that solves no equation.
        num_products: how many products with the Hessian H of the inner loss were computed; a backward pass through a
            step of gradient descent is one.
        converged: the method's own equation is solved within the tolerance asked for, or what rounding leaves of it, at
            a θ that is near enough to a minimum of L. None for a method that is asked for no tolerance: what it leaves
            out it cannot know, such as the steps that an unrolled descent did not take.
        min_curvature: the least vᵀHv/vᵀv met, without damping; None if none was looked at, or H is not symmetric. Below
            zero the inner loss is not at a minimum, and the implicit function theorem promises nothing.
        problems: for people, one sentence for each thing that makes the gradient less than it should be.
        solution: what the next call close by can start from, of the form of θ: v of a linear system, or the minimiser
            of a penalised problem. None for a method that has no use for one.
        theta: where a method that moves θ moved it to, detached. None for the others.
        inner_gradient_norm: ‖∂L/∂θ‖ where `inner_loss` was taken; None where it is not computed.
        stationarity: it, relative to λ max(‖θ‖, 1) with λ the largest curvature of L that was met: the relative error
            of θ as a solution of ∂L/∂θ = 0. Above 0.005, where hypergradients are some per cent off, it is a problem.
            None of a method that does not take θ for a minimum, or knows no curvature.
        condition: of H + δI, its largest eigenvalue over its least, for a method that computes them; else None.
    """

    gradient: Any
    inner_loss: float
    outer_loss: float
    residual_norm: float | None = None
    num_products: int = 0
    converged: bool | None = None
    min_curvature: float | None = None
    problems: tuple[str, ...] = ()
    solution: Any = None
    theta: Any = None
    inner_gradient_norm: float | None = None
    stationarity: float | None = None
    condition: float | None = None

    @property
    def negative_curvature(self) -> bool:
        return self.min_curvature is not None and self.min_curvature < 0


class HypergradientMethod(Protocol):
    """How every hypergradient is asked for."""

    def __call__(self, inner_loss: Any, outer_loss: Loss, theta: Any, phi: Any, *, start: Any = None) -> Hypergradient:
        """The hypergradient at (θ, φ).

        The methods of this package evaluate the losses with torch's default generators at the same state each time:
        dropout is one mask, and another in the next call. Each loss is evaluated twice at the first point, and a
        difference, such as other generators make, is a problem.

        θ and φ are any pytrees of tensors, which the losses are given as they are, and `gradient`, `solution` and
        `theta` have their forms; a list or an iterator of tensors counts as a tuple. Tensors in them that do not
        require grad are constants: None in `gradient` and `solution`.

        Args:
            inner_loss: L(θ, φ) -> (), twice differentiable in θ and in θ and φ jointly; once for a first-order method.
                A method by the implicit function theorem, or one that unrolls, takes a `RootProblem`, such as a
                `FixedPointProblem`, too; one of samples takes a `SampledObjective` only.
            outer_loss: F(θ, φ) -> ().
            theta: θ, near a minimum of L(·, φ) for the methods that rely on it.
            phi: φ. No tensor's `.grad` is written. The inner loss, the outer loss or both may depend on each.
            start: `solution` of an earlier call close by, where the method has one.

        Raises:
            TypeError: θ or φ has a leaf that is no tensor, or a loss is no tensor.
            ValueError: nothing of θ or of φ requires grad; a loss does not depend on θ; a part of φ that reaches
                neither the gradient of the inner loss nor the outer loss; the inner loss has no second derivative; a
                start of other shapes; a `RootProblem` for a method that takes none.
            NonFiniteError: a loss or a gradient is infinite or not a number.
            RuntimeError: a fused loss refuses a second derivative, as estimator="reinforce" does.
        """
