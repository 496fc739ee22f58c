"""Methods by the implicit function theorem: dF/dφ = ∂F/∂φ - (∂²L/∂φ∂θ) v with (∂²L/∂θ² + δI) v = ∂F/∂θ.

They differ in how v is come by. θ has to be near a minimum of the inner loss; how it got there does not matter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import NonFiniteError
from .interface import Hypergradient
from .method import ImplicitMethod, Start
from .preconditioners import Preconditioner
from .problem import Best, ImplicitProblem, flat, length, unflat
from .trees import Point, Tree


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
        preconditioner: `Nystrom()`, `Jacobi()`, or M⁻¹ as a function of v, of the form of θ, which has to be symmetric
            and positive definite; `num_products` has what it takes too. A ValueError says where it is not positive.
    """

    damping: float = 0.0
    tolerance: float = 1e-6
    max_iterations: int = 100
    preconditioner: Preconditioner | Callable[[Tree], Tree] | None = None

    def at(self, point: Point) -> Self:
        """See `Method.at`."""
        made = self.preconditioner
        if made is None:
            return self
        return replace(self, preconditioner=made.at(point) if isinstance(made, Preconditioner) else point.map(made))

    def elsewhere(self) -> Self:
        """See `ImplicitMethod.elsewhere`."""
        made = self.preconditioner
        return replace(self, preconditioner=made.elsewhere()) if isinstance(made, Preconditioner) else self

    def _inverse(self, problem: ImplicitProblem) -> Callable[[Tensor], Tensor]:
        made: Any = self.preconditioner
        if isinstance(made, Preconditioner):
            return made.inverse(problem, self.damping)
        return lambda vector: flat(made(unflat(vector, problem.place[0])), problem.place[0])

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        if not problem.symmetric:
            raise ValueError(
                f"{type(self).__name__}: inner_loss: expected a loss or a RootProblem that is symmetric, got a "
                f"{type(problem.equation).__name__} that is not; use FixedPoint, NormalCG or Dense"
            )
        solution, residual = _begin(problem, problem.start(start), self.damping)
        goal = self.tolerance * problem.scale
        # A start that will do needs no preconditioner.
        needless = self.preconditioner is None or float(residual.norm()) <= goal
        inverse = _same if needless else self._inverse(problem)
        problems: list[str] = []
        shaped, squared, along = self._shaped(inverse, residual)
        direction = shaped.clone()
        best = Best(solution, squared**0.5)
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
            step = along / ((curvature + self.damping) * squares)
            solution.add_(direction, alpha=step)
            residual.sub_(image, alpha=step).sub_(direction, alpha=step * self.damping)
            before = along
            shaped, squared, along = self._shaped(inverse, residual)
            best.offer(solution, squared**0.5)
            direction.mul_(along / before).add_(shaped)
        else:
            if squared**0.5 > goal:
                problems.append(_ran_out(squared**0.5 / problem.scale, self.max_iterations, self.tolerance))
        solution = best.instead_of(solution, squared**0.5, problem.scale)
        return problem.result(solution, tolerance=self.tolerance, problems=problems)

    def _shaped(self, inverse: Callable[[Tensor], Tensor], residual: Tensor) -> tuple[Tensor, float, float]:
        """M⁻¹ r, rᵀr and rᵀM⁻¹r."""
        squared = float(residual @ residual)
        if self.preconditioner is None:
            return residual, squared, squared
        shaped = inverse(residual)
        along = float(residual @ shaped)
        if not along > 0 and squared > 0:
            raise ValueError(
                f"ImplicitCG: preconditioner: expected a positive definite one, got rᵀM⁻¹r of {along / squared:.3g} rᵀr"
            )
        return shaped, squared, along


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
        def damped(product: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
            image = product(vector)
            (problem.curvature.search if problem.symmetric else problem.curvature.observe)(vector, image)
            return image + self.damping * vector

        solution, residual = _begin(problem, problem.start(start), self.damping)
        goal = self.tolerance * problem.scale
        problems: list[str] = []
        norm = float(residual.norm())
        if norm > goal:
            # This is CGLS: it recurs on the residual of the system itself, and so does not square the rounding too.
            gradient = damped(problem.transposed, residual)
            direction = gradient.clone()
            squared = _squared(gradient)
            for _ in range(self.max_iterations):
                image = damped(problem.product, direction)
                curved = _squared(image)
                step = squared / curved if curved > 0 else 0.0
                left = residual - step * image
                before, norm = norm, float(left.norm())
                # The residual falls at each step until what is left of it is outside the Hessian's range, when the
                # gradient is rounding and so is the direction.
                rounding = 4.0 * torch.finfo(residual.dtype).eps * (problem.curvature.most + self.damping) * before
                if not norm < before or squared**0.5 <= rounding:
                    problems.append(
                        f"{problem.matrix} is singular along {before / problem.scale:.1e} of ∂F/∂θ; regularise the "
                        "inner loss or give a damping"
                    )
                    break
                solution, residual = solution + step * direction, left
                if norm <= goal:
                    break
                gradient = damped(problem.transposed, residual)
                previous, squared = squared, _squared(gradient)
                direction = gradient + (squared / previous) * direction
            else:
                problems.append(_ran_out(norm / problem.scale, self.max_iterations, self.tolerance))
        return problem.result(solution, tolerance=self.tolerance, problems=problems)


@dataclass(frozen=True)
class Neumann(ImplicitMethod):
    """A truncated Neumann series, v = α Σ_{k<K} (I - α(H + δI))ᵏ ∂F/∂θ (Lorraine et al. 2020, algorithm 3).

    What backpropagation through the last K steps of gradient descent of size α gives, without storing them. K
    products, or fewer if rounding is reached. Converges if 0 < α λ < 2 for all eigenvalues λ, which for
    an indefinite H no α does.

    Attributes:
        terms: K.
        learning_rate: α, in units of 1/curvature; None measures the largest curvature, with `POWER_ITERATIONS` more
            products.
        damping: δ.
        tolerance: of the relative residual that the series is meant to reach; reported if it does not.
        warm_start: go on from the v that the call is given to start from, where other methods always do.
    """

    terms: int = 20
    learning_rate: float | None = None
    damping: float = 0.0
    tolerance: float = 1e-2
    warm_start: bool = False

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        begin = problem.start(start) if self.warm_start else None
        solution, problems = _richardson(problem, begin, self.damping, self.learning_rate, 0.0, self.terms)
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
        hessian = torch.stack([problem.product(unit) for unit in basis]).mT
        if not hessian.isfinite().all():
            raise NonFiniteError(f"{problem.matrix} is not finite")
        eps = torch.finfo(hessian.dtype).eps
        hessian = hessian.double()
        if problem.symmetric:
            eigenvalues, right = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
            left = right
            largest = float(eigenvalues.abs().amax())
            # Of independent errors of the entries the symmetric part has a norm like that of the other, ‖H - Hᵀ‖/√P.
            rounding = 4.0 * eps * largest + 2.0 * float((hessian - hessian.mT).norm()) / size**0.5
            eigenvalues = torch.where(eigenvalues.abs() > rounding, eigenvalues, 0.0)
            for index in (-1, 0):
                problem.curvature.observe(right[:, index], eigenvalues[index] * right[:, index])
            regular = eigenvalues + self.damping
        else:
            left, regular, transposed = torch.linalg.svd(hessian + self.damping * basis.double())
            right = transposed.mT
            # Independent errors of the entries, of a few roundings of a product each.
            rounding = 8.0 * eps * float(regular[0]) * size**0.5
        kept = regular.abs() > rounding
        coordinates = left.mT @ problem.right.double()
        along = torch.where(kept, coordinates / torch.where(kept, regular, 1.0), 0.0)
        lost = float(coordinates[~kept].norm())
        problems = []
        # What rounding leaves of b along a null direction is more than its own: its sums cancel.
        if lost > eps**0.75 * problem.scale:
            problems.append(
                f"{problem.matrix} is singular along {int((~kept).sum())} directions that the outer loss depends on; "
                "regularise the inner loss or give a damping"
            )
        smallest = float(regular.abs().amin())
        condition = float(regular.abs().amax()) / smallest if smallest > rounding else math.inf
        unsure = float((along * rounding / torch.where(kept, regular, 1.0)).norm() / along.norm())
        if unsure > 0.01:
            problems.append(
                f"{problem.matrix} has a condition number of {condition:.1e}, which makes up to {100.0 * unsure:.0f}% "
                "of the solution of what rounding left of its products; compute the losses in float64 or raise the "
                "damping"
            )
        solution = (right @ along).to(problem.right.dtype)
        return problem.result(solution, tolerance=eps**0.5, problems=problems, condition=condition)


@dataclass(frozen=True)
class LinearSolver(ImplicitMethod):
    """The linear system by a solver of one's own, with the signature of those in `scipy.sparse.linalg`.

    Attributes:
        solver: (A, b) or (A, b, x0=...) -> x or (x, info), in NumPy arrays of shape (P,); A has `shape`, `dtype`,
            `matvec` and `rmatvec`, as `scipy.sparse.linalg.aslinearoperator` asks for, and info is zero where it has
            converged. Such as `scipy.sparse.linalg.minres`, or a `functools.partial` of it.
        damping: δ, which A has.
        tolerance: of the relative residual that the solver is meant to reach, which is measured; reported if it does
            not.
        warm_start: give the solver x0 where there is a solution of an earlier call.
    """

    solver: Callable[..., Any]
    damping: float = 0.0
    tolerance: float = 1e-4
    warm_start: bool = True

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        """See `ImplicitMethod.solve`.

        Raises:
            ValueError: the solver returns another shape.
            NonFiniteError: it returns what is not finite.
        """
        operator = _Operator(problem, self.damping)
        begin = problem.start(start) if self.warm_start else None
        more = {} if begin is None else {"x0": begin.cpu().numpy()}
        found = self.solver(operator, problem.right.cpu().numpy(), **more)
        found, info = found if isinstance(found, tuple) else (found, 0)
        solution = torch.as_tensor(found).to(problem.right)
        if solution.shape != problem.right.shape:
            raise ValueError(
                f"LinearSolver: solver: expected shape {tuple(problem.right.shape)}, got {tuple(solution.shape)}"
            )
        if not bool(solution.isfinite().all()):
            raise NonFiniteError("LinearSolver: solver: expected finite numbers, got some that are not")
        said = [] if info == 0 else [f"the linear solver says that it has not converged: {info}"]
        return problem.result(solution, tolerance=self.tolerance, problems=said)


class _Operator:
    """H + δI for NumPy."""

    def __init__(self, problem: ImplicitProblem, damping: float) -> None:
        self._problem, self._damping = problem, damping
        self.shape = (problem.right.numel(),) * 2
        self.dtype = problem.right.cpu().numpy().dtype

    def matvec(self, vector: Any) -> Any:
        return self._damped(self._problem.product, vector)

    def rmatvec(self, vector: Any) -> Any:
        return self._damped(self._problem.transposed, vector)

    def _damped(self, product: Callable[[Tensor], Tensor], vector: Any) -> Any:
        given = torch.tensor(vector).to(self._problem.right).reshape(-1)
        image = product(given)
        if self._problem.symmetric:
            self._problem.curvature.search(given, image)
        return (image + self._damping * given).cpu().numpy()


@dataclass(frozen=True)
class Identity(ImplicitMethod):
    """The Hessian taken as I/scale, v = scale · ∂F/∂θ: T1-T2 (Luketina et al. 2016), or as an approximation M.

    One backward pass. A descent direction as long as the Hessian is not far from a multiple of the identity, and zero
    where the hypergradient is zero only if it is one. `residual_norm` says how far from it.

    Attributes:
        scale: 1/curvature; the inner learning rate in the paper.
        inverse: M⁻¹ in place of I, such as `Nystrom()` (Hataya and Yamada 2023) or `QuasiNewton(optimizer)`.
        damping: δ that M has.
    """

    scale: float = 1.0
    inverse: Preconditioner | None = None
    damping: float = 0.0

    def at(self, point: Point) -> Self:
        """See `Method.at`."""
        return self if self.inverse is None else replace(self, inverse=self.inverse.at(point))

    def solve(self, problem: ImplicitProblem, start: Start) -> Hypergradient:
        inverse = _same if self.inverse is None else self.inverse.inverse(problem, self.damping)
        return problem.result(self.scale * inverse(problem.right), tolerance=None)


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
        return replace(result, problems=(*result.problems, diverging))


# Enough for a largest curvature that is right within the tenth that the step leaves.
POWER_ITERATIONS = 10


def _begin(problem: ImplicitProblem, start: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
    """The first v and its residual b - (H + δI) v; a start further from the solution than zero is left unused."""
    if start is not None:
        residual = problem.right - problem.product(start) - damping * start
        if float(residual.norm()) < problem.scale:
            return start.clone(), residual
    return torch.zeros_like(problem.right), problem.right.clone()


def _richardson(
    problem: ImplicitProblem, start: Tensor | None, damping: float, learning_rate: float | None, tolerance: float,
    iterations: int,
) -> tuple[Tensor, list[str]]:  # fmt: skip
    """v ← v + α (b - (H + δI) v), and what went wrong."""
    solution, residual = _begin(problem, start, damping)
    step = _step(problem, damping) if learning_rate is None else learning_rate
    first = norm = float(residual.norm())
    best = Best(solution, norm)
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
            if problem.equation is not None:
                return best.instead_of(solution, norm, problem.scale), [
                    f"the series diverges: {problem.equation.noun}: expected a map that contracts, got one whose "
                    f"transposed Jacobian made {norm / first:.1e} of a vector; "
                    "NormalCG and Dense solve the system all the same"
                ]
            return best.instead_of(solution, norm, problem.scale), [
                f"the series diverges: learning_rate {step:.3g} with curvature {curvature:.3g}; it converges for "
                "learning_rate · curvature between 0 and 2, so lower the learning rate, or raise the damping if the "
                "curvature is negative"
            ]
    return best.instead_of(solution, norm, problem.scale), []


def _step(problem: ImplicitProblem, damping: float) -> float:
    """A step below 1/λ_max, from the power method started along b; of a map, that which iterates it."""
    if problem.equation is not None and problem.equation.step is not None:
        return problem.equation.step / (1.0 + damping)
    vector = problem.right
    largest = 0.0
    for _ in range(POWER_ITERATIONS):
        norm = float(vector.norm())
        if norm == 0.0:
            break
        vector = problem.product(vector / norm)
        largest = float(vector.norm())
    return 1.0 / (1.1 * largest + damping) if largest + damping > 0 else 1.0


def _same(vector: Tensor) -> Tensor:
    return vector


def _squared(vector: Tensor) -> float:
    """‖v‖², of an image of an image."""
    return length(vector) ** 2


def _ran_out(residual: float, iterations: int, tolerance: float) -> str:
    return (
        f"the linear solve stopped at a relative residual of {residual:.1e} after {iterations} iterations, "
        f"tolerance {tolerance:.1e}"
    )
