"""Methods by the implicit function theorem: dF/dφ = ∂F/∂φ - (∂²L/∂φ∂θ) v with (∂²L/∂θ² + δI) v = ∂F/∂θ.

They differ in how v is come by. θ has to be near a minimum of the inner loss; how it got there does not matter.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .interface import Hypergradient
from .method import ImplicitMethod, Start
from .problem import ImplicitProblem, length


@dataclass(frozen=True)
class ImplicitCG(ImplicitMethod):
    """Conjugate gradients on the Hessian (Pedregosa 2016; Rajeswaran et al. 2019).

    Costs `num_products` Hessian products, the last of which comes with the mixed product in one backward pass. For a
    Hessian that is positive definite with its damping: the method to begin with.

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

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        solution, residual = _begin(problem, problem.start(start), self.damping)
        goal = self.tolerance * problem.scale
        problems: list[str] = []
        direction = residual.clone()
        squared = float(residual @ residual)
        best = _Best(solution, squared**0.5)
        for _ in range(self.max_iterations):
            if squared**0.5 <= goal:
                break
            image = problem.product(direction)
            squares = float(direction @ direction)
            curvature = problem.curvature.observe(direction, image, squares)
            if curvature + self.damping <= 0:
                problems.append(
                    f"the linear solve stopped after {problem.num_products} products, at curvature {curvature:.3g} "
                    f"with damping {self.damping:.3g}; train the inner problem further or raise the damping"
                )
                break
            step = squared / ((curvature + self.damping) * squares)
            solution.add_(direction, alpha=step)
            residual.sub_(image, alpha=step).sub_(direction, alpha=step * self.damping)
            previous, squared = squared, float(residual @ residual)
            best.offer(solution, squared**0.5)
            direction.mul_(squared / previous).add_(residual)
        else:
            if squared**0.5 > goal:
                problems.append(_ran_out(squared**0.5 / problem.scale, self.max_iterations, self.tolerance))
        solution = best.instead_of(solution, squared**0.5, problem.scale)
        return problem.result(solution, tolerance=self.tolerance, problems=problems)


@dataclass(frozen=True)
class NormalCG(ImplicitMethod):
    """Conjugate gradients on the normal equations, (H + δI)² v = (H + δI) ∂F/∂θ (Hestenes and Stiefel 1952).

    Two Hessian products an iteration, and the condition number is squared; in return the system may be indefinite, as
    the Hessian of a sampled loss or away from a minimum is. Negative curvature is reported as for `ImplicitCG`, for
    the implicit function theorem still promises nothing there.

    Attributes:
        damping, tolerance, max_iterations: as for `ImplicitCG`.
    """

    damping: float = 0.0
    tolerance: float = 1e-6
    max_iterations: int = 100

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        def product(vector: Tensor) -> Tensor:
            image = problem.product(vector)
            problem.curvature.search(vector, image)
            return image + self.damping * vector

        solution, residual = _begin(problem, problem.start(start), self.damping)
        goal = self.tolerance * problem.scale
        problems: list[str] = []
        norm = float(residual.norm())
        if norm > goal:
            # H is symmetric, so that its transpose is another product. This is CGLS: it recurs on the residual of the
            # system itself, and so does not square the rounding too.
            gradient = product(residual)
            direction = gradient.clone()
            squared = _squared(gradient)
            for _ in range(self.max_iterations):
                image = product(direction)
                curved = _squared(image)
                step = squared / curved if curved > 0 else 0.0
                left = residual - step * image
                before, norm = norm, float(left.norm())
                # The residual falls at each step until what is left of it is outside the Hessian's range, when the
                # gradient is rounding and so is the direction.
                rounding = 4.0 * torch.finfo(residual.dtype).eps * (problem.curvature.most + self.damping) * before
                if not norm < before or squared**0.5 <= rounding:
                    problems.append(
                        f"the inner Hessian is singular along {before / problem.scale:.1e} of ∂F/∂θ; regularise the "
                        "inner loss or give a damping"
                    )
                    break
                solution, residual = solution + step * direction, left
                if norm <= goal:
                    break
                gradient = product(residual)
                previous, squared = squared, _squared(gradient)
                direction = gradient + (squared / previous) * direction
            else:
                problems.append(_ran_out(norm / problem.scale, self.max_iterations, self.tolerance))
        return problem.result(solution, tolerance=self.tolerance, problems=problems)


@dataclass(frozen=True)
class Neumann(ImplicitMethod):
    """A truncated Neumann series, v = α Σ_{k<K} (I - α(H + δI))ᵏ ∂F/∂θ (Lorraine et al. 2020, algorithm 3).

    What backpropagation through the last K steps of gradient descent of size α gives, without storing them. K
    products, or fewer if rounding is reached; no warm start. Converges if 0 < α λ < 2 for all eigenvalues λ, which for
    an indefinite H no α does.

    Attributes:
        terms: K.
        learning_rate: α, in units of 1/curvature; None measures the largest curvature, with `POWER_ITERATIONS` more
            products.
        damping: δ.
        tolerance: of the relative residual that the series is meant to reach; reported if it does not.
    """

    terms: int = 20
    learning_rate: float | None = None
    damping: float = 0.0
    tolerance: float = 1e-2

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        solution, problems = _richardson(problem, None, self.damping, self.learning_rate, 0.0, self.terms)
        return problem.result(solution, tolerance=self.tolerance, problems=problems)


@dataclass(frozen=True)
class FixedPoint(ImplicitMethod):
    """The fixed point of v = v - α((H + δI) v - ∂F/∂θ), warm-started (Grazzi et al. 2020, eq. 11).

    The Neumann series continued from where the last solve ended until the residual is small. One product an
    iteration; linear convergence at rate 1 - 1/κ where conjugate gradients have 1 - 2/√κ.

    Attributes:
        learning_rate: α; None measures the largest curvature, with `POWER_ITERATIONS` more products.
        damping, tolerance, max_iterations: as for `ImplicitCG`.
    """

    learning_rate: float | None = None
    damping: float = 0.0
    tolerance: float = 1e-6
    max_iterations: int = 1000

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        solution, problems = _richardson(
            problem, problem.start(start), self.damping, self.learning_rate, self.tolerance, self.max_iterations
        )
        return problem.result(solution, tolerance=self.tolerance, problems=problems)


@dataclass(frozen=True)
class Dense(ImplicitMethod):
    """The Hessian itself, by P products, and its eigenvalues: what the others are tested against.

    O(P²) memory and O(P³) time; the eigenvalues in float64. A direction whose curvature is less than what rounding has
    left of the products, which shows in how far they are from symmetric, is left out of the solution (the
    pseudo-inverse), and is reported if ∂F/∂θ has a part along it; so is a solution that rounding has a hundredth of.

    Attributes:
        damping: δ.
        max_size: the most inner parameters P it is prepared to take: 2000 are 32 MB of Hessian in float64.
    """

    damping: float = 0.0
    max_size: int = 2000

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        size = problem.right.numel()
        if size > self.max_size:
            raise ValueError(
                f"Dense: theta: expected at most max_size = {self.max_size} parameters, got {size}, whose Hessian has "
                f"{size * size} entries; use ImplicitCG, which stores none of them, or raise max_size"
            )
        basis = torch.eye(size, dtype=problem.right.dtype, device=problem.right.device)
        hessian = torch.stack([problem.product(unit) for unit in basis])
        if not hessian.isfinite().all():
            raise NonFiniteError("the Hessian of the inner loss is not finite")
        eps = torch.finfo(hessian.dtype).eps
        hessian = hessian.double()
        eigenvalues, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
        largest = float(eigenvalues.abs().amax())
        # Of independent errors of the entries the symmetric part has a norm like that of the other one, ‖H - Hᵀ‖/√P.
        rounding = 4.0 * eps * largest + 2.0 * float((hessian - hessian.mT).norm()) / size**0.5
        eigenvalues = torch.where(eigenvalues.abs() > rounding, eigenvalues, 0.0)
        for index in (-1, 0):
            problem.curvature.observe(vectors[:, index], eigenvalues[index] * vectors[:, index])
        regular = eigenvalues + self.damping
        kept = regular.abs() > rounding
        coordinates = vectors.mT @ problem.right.double()
        along = torch.where(kept, coordinates / torch.where(kept, regular, 1.0), 0.0)
        lost = float(coordinates[~kept].norm())
        problems = []
        # What rounding leaves of b along a null direction is more than its own: its sums cancel.
        if lost > eps**0.75 * problem.scale:
            problems.append(
                f"the inner Hessian is singular along {int((~kept).sum())} directions that the outer loss depends on; "
                "regularise the inner loss or give a damping"
            )
        smallest = float(regular.abs().amin())
        condition = float(regular.abs().amax()) / smallest if smallest > rounding else math.inf
        unsure = float((along * rounding / torch.where(kept, regular, 1.0)).norm() / along.norm())
        if unsure > 0.01:
            problems.append(
                f"the inner Hessian's condition number of {condition:.1e} makes up to {100.0 * unsure:.0f}% of the "
                "solution of what rounding left of its products; compute the losses in float64 or raise the damping"
            )
        solution = (vectors @ along).to(problem.right.dtype)
        return problem.result(solution, tolerance=eps**0.5, problems=problems, condition=condition)


@dataclass(frozen=True)
class Identity(ImplicitMethod):
    """The Hessian taken as I/scale, v = scale · ∂F/∂θ: T1-T2 (Luketina et al. 2016).

    One backward pass. A descent direction as long as the Hessian is not far from a multiple of the identity, and zero
    where the hypergradient is zero only if it is one. `residual_norm` says how far from it.

    Attributes:
        scale: 1/curvature; the inner learning rate in the paper.
    """

    scale: float = 1.0

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        return problem.result(self.scale * problem.right, tolerance=None)


@dataclass(frozen=True)
class SingleLoop(ImplicitMethod):
    """One step of the linear system for each call: SOBA (Dagréou et al. 2022, algorithm 1).

        dF/dφ = ∂F/∂φ - (∂²L/∂φ∂θ) v,    v ← v - ρ((H + δI) v - ∂F/∂θ)

    θ, v and φ each take one step at a time, from the same point: with one inner step an outer step, and small outer
    steps. The first call has v = 0 and so only the direct part of the gradient. One backward pass a call.

    Attributes:
        learning_rate: ρ, in units of 1/curvature; below 2/λ_max.
        damping: δ.
    """

    learning_rate: float
    damping: float = 0.0

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        vector = problem.start(start)
        result = problem.result(
            torch.zeros_like(problem.right) if vector is None else vector, tolerance=None, next_step=self.learning_rate
        )
        # Zero, where v starts, has a residual of one.
        if result.residual_norm is None or result.residual_norm <= 10.0:
            return result
        diverging = f"v diverges, at a relative residual of {result.residual_norm:.1e}; lower the learning rate"
        return dataclasses.replace(result, problems=(*result.problems, diverging))


# Enough for a largest curvature that is right within the tenth that the step leaves.
POWER_ITERATIONS = 10


def _begin(problem: ImplicitProblem, start: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
    """The first v and its residual b - (H + δI) v; a start further from the solution than zero is left unused."""
    if start is not None:
        residual = problem.right - problem.product(start) - damping * start
        if float(residual.norm()) < problem.scale:
            return start.clone(), residual
    return torch.zeros_like(problem.right), problem.right.clone()


class _Best:
    """The iterate with the least residual: what a solve gives where its last has a longer one than zero has."""

    def __init__(self, solution: Tensor, residual: float) -> None:
        self._solution, self._residual = solution.clone(), residual

    def offer(self, solution: Tensor, residual: float) -> None:
        if residual < self._residual:
            self._solution.copy_(solution)
            self._residual = residual

    def instead_of(self, solution: Tensor, residual: float, zero: float) -> Tensor:
        """The solution to give; `zero` is the residual of zero."""
        return self._solution if residual > zero else solution


def _richardson(
    problem: ImplicitProblem, start: Tensor | None, damping: float, learning_rate: float | None, tolerance: float,
    iterations: int,
) -> tuple[Tensor, list[str]]:  # fmt: skip
    """v ← v + α (b - (H + δI) v), and what went wrong."""
    solution, residual = _begin(problem, start, damping)
    step = _step(problem, damping) if learning_rate is None else learning_rate
    first = norm = float(residual.norm())
    best = _Best(solution, norm)
    # Below rounding there is nothing to be had, and squares of what is left would underflow.
    goal = max(tolerance, torch.finfo(residual.dtype).eps) * problem.scale
    for remaining in reversed(range(iterations)):
        if norm <= goal:
            break
        solution += step * residual
        if remaining == 0:
            break
        image = problem.product(residual)
        curvature = problem.curvature.observe(residual, image)
        residual = residual - step * (image + damping * residual)
        norm = float(residual.norm())
        best.offer(solution, norm)
        # Eigenvalues inside (0, 2/α) make the residual fall at every step.
        if not norm <= 10.0 * first:
            return best.instead_of(solution, norm, problem.scale), [
                f"the series diverges: learning_rate {step:.3g} with curvature {curvature:.3g}; it converges for "
                "learning_rate · curvature between 0 and 2, so lower the learning rate, or raise the damping if the "
                "curvature is negative"
            ]
    return best.instead_of(solution, norm, problem.scale), []


def _step(problem: ImplicitProblem, damping: float) -> float:
    """A step below 1/λ_max, from the power method started along b."""
    vector = problem.right
    largest = 0.0
    for _ in range(POWER_ITERATIONS):
        norm = float(vector.norm())
        if norm == 0.0:
            break
        vector = problem.product(vector / norm)
        largest = float(vector.norm())
    return 1.0 / (1.1 * largest + damping) if largest + damping > 0 else 1.0


def _squared(vector: Tensor) -> float:
    """‖v‖², of an image of an image."""
    return length(vector) ** 2


def _ran_out(residual: float, iterations: int, tolerance: float) -> str:
    return (
        f"the linear solve stopped at a relative residual of {residual:.1e} after {iterations} iterations, "
        f"tolerance {tolerance:.1e}"
    )
