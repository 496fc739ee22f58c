"""Hypergradients dF(θ*(φ), φ)/dφ of a bilevel problem, behind one interface.

    outer   min_φ F(θ*(φ), φ)        inner   θ*(φ) = argmin_θ L(θ, φ)

A method is called with the two losses as functions of (θ, φ) and returns a `Hypergradient`: the gradient, and
what there is to know about how it was come by. The losses have to be deterministic functions: a method that
evaluates them more than once must see the same batch and the same random numbers each time, so fix both outside
(the sampled losses of `po_kernels` take a `seed`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import NonFiniteError

Tensors = tuple[Tensor, ...]
Loss = Callable[[Tensors, Tensors], Tensor]


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and its diagnosis.

    Attributes:
        gradient: dF/dφ, one tensor for each of φ, of its shape.
        inner_loss, outer_loss: L and F at the point.
        residual_norm: ‖b - (H + δI) v‖ / ‖b‖ of the linear solve, measured, not estimated; 0 for b = 0.
        num_products: how many products with the Hessian H of the inner loss were computed.
        converged: the residual is within the tolerance asked for.
        min_curvature: the least vᵀHv/vᵀv met, without damping; None if none was looked at. Below zero the inner
            loss is not at a minimum, and the implicit function theorem promises nothing.
        problems: for people, one sentence for each thing that makes the gradient less than it should be.
        solution: v, the solution of the linear system, one tensor for each of θ: the start of the next solve.
    """

    gradient: Tensors
    inner_loss: float
    outer_loss: float
    residual_norm: float
    num_products: int
    converged: bool
    min_curvature: float | None
    problems: tuple[str, ...]
    solution: Tensors | None

    @property
    def negative_curvature(self) -> bool:
        return self.min_curvature is not None and self.min_curvature < 0


class HypergradientMethod(Protocol):
    """How every hypergradient is asked for."""

    def __call__(
        self, inner_loss: Loss, outer_loss: Loss, theta: Sequence[Tensor], phi: Sequence[Tensor],
        *, start: Tensors | None = None,
    ) -> Hypergradient:  # fmt: skip
        """The hypergradient at (θ, φ).

        Args:
            inner_loss: L(θ, φ) -> (), twice differentiable in θ and in θ and φ jointly.
            outer_loss: F(θ, φ) -> ().
            theta: θ, near a minimum of L(·, φ) for the methods that rely on it. Tensors that require grad.
            phi: φ, tensors that require grad. No tensor's `.grad` is written.
            start: `solution` of an earlier call close by, where the method solves a linear system.

        Raises:
            ValueError: θ or φ does not require grad; a loss does not depend on θ; φ does not reach the gradient of
                the inner loss; the inner loss has no second derivative; a start of other shapes.
            NonFiniteError: a loss or a gradient is infinite or not a number.
            RuntimeError: a fused loss refuses a second derivative, as estimator="reinforce" does.
        """


@dataclass(frozen=True)
class ImplicitCG:
    """Implicit differentiation with conjugate gradients, matrix-free (Pedregosa 2016; Lorraine et al. 2020).

        dF/dφ = ∂F/∂φ - (∂²L/∂φ∂θ) v,    (∂²L/∂θ² + δ I) v = ∂F/∂θ

    The inner loss is evaluated once and its gradient's graph is used for every product, so batch and random numbers
    are the same throughout. Costs `num_products` Hessian products, the last of which comes with the mixed product
    in one backward pass; memory does not depend on the number of inner steps.

    Curvature that is not positive ends the solve at the last good iterate, and is reported; so is a solve that ran
    out of iterations.

    Attributes:
        damping: δ, in units of the inner loss's curvature. Needed where the Hessian is singular, as for softmax
            policies without an L2 penalty.
        tolerance: of the residual, relative to ‖∂F/∂θ‖.
        max_iterations: of conjugate gradients.
    """

    damping: float = 0.0
    tolerance: float = 1e-6
    max_iterations: int = 100

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"ImplicitCG: damping: expected a number of at least 0, got {self.damping}")
        if not self.tolerance > 0:
            raise ValueError(f"ImplicitCG: tolerance: expected a positive number, got {self.tolerance}")
        if not self.max_iterations >= 1:
            raise ValueError(f"ImplicitCG: max_iterations: expected at least 1, got {self.max_iterations}")

    def __call__(
        self, inner_loss: Loss, outer_loss: Loss, theta: Sequence[Tensor], phi: Sequence[Tensor],
        *, start: Tensors | None = None,
    ) -> Hypergradient:  # fmt: skip
        """See `HypergradientMethod.__call__`."""
        theta, phi = _parameters("theta", theta), _parameters("phi", phi)
        outer, outer_theta, direct = _outer_gradients(outer_loss, theta, phi)
        inner, inner_gradient = _differentiable_gradient(inner_loss, theta, phi)

        def product(vector: Tensor) -> Tensor:
            return _flat(_contract(inner_gradient, theta, _unflat(vector, theta)), theta)

        right = _flat(outer_theta, theta)
        solve = _conjugate_gradients(
            product, right, None if start is None else _start(start, theta),
            self.damping, self.tolerance, self.max_iterations,
        )  # fmt: skip
        solution = _unflat(solve.solution, theta)
        # One backward pass gives the mixed product and, for the residual, the Hessian product with the solution.
        both = _contract(inner_gradient, theta + phi, solution)
        mixed = _all_reached(both[len(theta) :])
        residual = right - _flat(both[: len(theta)], theta) - self.damping * solve.solution
        scale = float(right.norm())
        residual_norm = float(residual.norm()) / scale if scale > 0 else 0.0
        converged = residual_norm <= self.tolerance
        problems = list(solve.problems)
        if not converged and not problems:
            problems.append(
                f"the linear solve stopped at a relative residual of {residual_norm:.1e} after "
                f"{self.max_iterations} iterations, tolerance {self.tolerance:.1e}"
            )
        gradient = tuple(
            (torch.zeros_like(p) if d is None else d) - m for p, d, m in zip(phi, direct, mixed, strict=True)
        )
        if not all(g.isfinite().all() for g in gradient):
            raise NonFiniteError("the hypergradient is not finite")
        return Hypergradient(
            gradient=gradient,
            inner_loss=float(inner.detach()),
            outer_loss=float(outer.detach()),
            residual_norm=residual_norm,
            num_products=solve.num_products + 1,
            converged=converged,
            min_curvature=solve.min_curvature,
            problems=tuple(problems),
            solution=solution,
        )


@dataclass(frozen=True)
class _Solve:
    solution: Tensor
    num_products: int
    min_curvature: float | None
    problems: tuple[str, ...]


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, start: Tensor | None,
    damping: float, tolerance: float, max_iterations: int,
) -> _Solve:  # fmt: skip
    """Solves (H + δI) v = right from products with H; vectors are flat, (P,)."""
    solution = torch.zeros_like(right) if start is None else start.clone()
    residual = right.clone()
    num_products = 0
    if start is not None:
        residual -= product(start) + damping * start
        num_products += 1
    goal = tolerance * float(right.norm())
    # Rayleigh quotients this small against the largest are zero but for rounding.
    rounding = 10.0 * torch.finfo(right.dtype).eps
    least, most = float("inf"), 0.0
    problems: tuple[str, ...] = ()
    direction = residual.clone()
    squared = float(residual @ residual)
    for _ in range(max_iterations):
        if squared**0.5 <= goal:
            break
        image = product(direction)
        num_products += 1
        length = float(direction @ direction)
        curvature = float(direction @ image) / length
        most = max(most, abs(curvature))
        if abs(curvature) <= rounding * most:
            curvature = 0.0
        least = min(least, curvature)
        if curvature + damping <= 0:
            problems = (
                f"the inner Hessian has curvature {curvature:.3g} along a search direction, damping {damping:.3g}: "
                f"the linear solve stopped after {num_products} products; train the inner problem further or "
                "raise the damping",
            )
            break
        step = squared / ((curvature + damping) * length)
        solution += step * direction
        residual -= step * (image + damping * direction)
        previous, squared = squared, float(residual @ residual)
        direction = residual + (squared / previous) * direction
    if least < 0 and not problems:
        problems = (
            f"the inner Hessian has curvature {least:.3g} along a search direction; the damping {damping:.3g} "
            "made the system positive",
        )
    return _Solve(solution, num_products, least if least < float("inf") else None, problems)


def _parameters(name: str, tensors: Sequence[Tensor]) -> Tensors:
    tensors = tuple(tensors)
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    for index, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            raise ValueError(f"{name}[{index}]: expected a tensor that requires grad, got one that does not")
    return tensors


def _scalar(name: str, loss: Tensor) -> None:
    if loss.ndim != 0:
        raise ValueError(f"{name}: expected a loss of shape (), got {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"{name}: expected a loss that depends on theta, got one that is detached from everything")
    if not loss.detach().isfinite():
        raise NonFiniteError(f"{name} is not finite: {float(loss.detach())}")


def _outer_gradients(
    outer_loss: Loss, theta: Tensors, phi: Tensors
) -> tuple[Tensor, Tensors, tuple[Tensor | None, ...]]:
    """F, ∂F/∂θ with zeros where F does not depend on it, and ∂F/∂φ with None there."""
    with torch.enable_grad():
        loss = outer_loss(theta, phi)
    _scalar("outer_loss", loss)
    gradients = torch.autograd.grad(loss, theta + phi, allow_unused=True)
    by_theta, by_phi = gradients[: len(theta)], gradients[len(theta) :]
    if all(g is None for g in by_theta):
        raise ValueError("outer_loss: expected a loss that depends on theta, got one that does not")
    filled = tuple(torch.zeros_like(t) if g is None else g for t, g in zip(theta, by_theta, strict=True))
    if not all(g.isfinite().all() for g in filled):
        raise NonFiniteError("the gradient of the outer loss is not finite")
    return loss, filled, by_phi


def _differentiable_gradient(inner_loss: Loss, theta: Tensors, phi: Tensors) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """L, and the parts of ∂L/∂θ that can be differentiated again, each with its index in θ."""
    with torch.enable_grad():
        loss = inner_loss(theta, phi)
        _scalar("inner_loss", loss)
        gradients = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
    if all(g is None for g in gradients):
        raise ValueError("inner_loss: expected a loss that depends on theta, got one that does not")
    if not all(g is None or g.detach().isfinite().all() for g in gradients):
        raise NonFiniteError("the gradient of the inner loss is not finite")
    again = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    if not again:
        raise ValueError("inner_loss: expected a twice differentiable loss, got one whose gradient is constant")
    return loss, again


def _contract(gradient: list[tuple[int, Tensor]], inputs: Tensors, vector: Tensors) -> tuple[Tensor | None, ...]:
    """vᵀ ∂(∂L/∂θ)/∂inputs, None where the inner gradient does not depend on an input."""
    return torch.autograd.grad(
        [g for _, g in gradient], inputs, [vector[i] for i, _ in gradient], retain_graph=True, allow_unused=True
    )


def _all_reached(mixed: Sequence[Tensor | None]) -> Tensors:
    reached = []
    for index, part in enumerate(mixed):
        if part is None:
            raise ValueError(
                f"phi[{index}]: expected a tensor that the gradient of the inner loss depends on, got one that does "
                "not reach it; look for a detach() or a no_grad() between the reward and the inner loss"
            )
        reached.append(part)
    return tuple(reached)


def _start(start: Tensors, theta: Tensors) -> Tensor:
    expected, came = ([tuple(t.shape) for t in tensors] for tensors in (theta, start))
    if came != expected:
        raise ValueError(f"start: expected shapes {expected} like theta, got {came}")
    return _flat(start, theta)


def _flat(tensors: Sequence[Tensor | None], like: Tensors) -> Tensor:
    """One vector, (P,), with zeros for None."""
    return torch.cat(
        [(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, like, strict=True)]
    )


def _unflat(vector: Tensor, like: Tensors) -> Tensors:
    parts = vector.split([t.numel() for t in like])
    return tuple(part.view_as(t) for part, t in zip(parts, like, strict=True))
