"""The solution of an inner problem as an operation of autograd, differentiable to any order."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import NonFiniteError
from .eager import eagerly
from .equations import FixedPointProblem, Residual, RootProblem
from .implicit import FixedPoint, ImplicitCG, NormalCG
from .interface import Loss, Tensors
from .method import ImplicitMethod
from .problem import filled, flat, inner_gradient, length
from .repeatable import repeatable
from .trees import Leaves, Point, Structure, Tree


def solve(
    problem: Loss | RootProblem, theta: Tree, phi: Tree, *, solver: Callable[[Tree, Tree], Tree] | None = None,
    method: ImplicitMethod | None = None, tolerance: float = 1e-6, max_iterations: int = 1000,
) -> Tree:  # fmt: skip
    """θ*(φ) as a differentiable function of φ, by the implicit function theorem: memory does not depend on the solver.

    Derivatives of any order: with `create_graph=True` the backward pass is differentiable, for the linear system that
    it solves is another equation of this kind. Random numbers from torch's default generators are the same in each
    evaluation, and in the backward pass.

    Args:
        problem: a `FixedPointProblem`, a `RootProblem`, or a loss (θ, φ) -> () of which θ* is the minimum.
        theta: where to start, a pytree of floating tensors. θ* does not depend on it, so that it gets no derivative.
        phi: a pytree of tensors. θ* has derivatives by those that require grad, as by nothing else.
        solver: (θ, φ) -> θ*, run without a graph. None iterates the map of a `FixedPointProblem`, and takes theta
            itself for the solution of the others.
        method: of the linear system of the backward pass. None is `FixedPoint` for a map, `ImplicitCG` for a loss or
            what is symmetric, `NormalCG` else, each to the tolerance.
        tolerance: of ‖T(θ) - θ‖ relative to max(‖θ‖, 1), and of the backward pass.
        max_iterations: of the map.

    Returns:
        θ*, of the form of theta.

    Raises:
        TypeError: a method that is not by the implicit function theorem.
        ValueError: the map does not contract; a solver returns another shape; a part of φ that the problem does not
            depend on; the problem depends on a tensor that requires grad and is not in φ, whose derivative would be
            lost; two evaluations at one point differ. In the backward pass: the linear solve is no better than zero.
        NonFiniteError: a solver or the problem returns what is infinite or not a number.

    Warns:
        RuntimeWarning: each of the `Hypergradient.problems` of a backward pass, such as a θ* that is no solution.

    Example:
        >>> import torch
        >>> cosine = FixedPointProblem(lambda x, a: torch.cos(a * x))
        >>> a = torch.tensor(0.5, requires_grad=True, dtype=torch.float64)
        >>> x = solve(cosine, torch.tensor(1.0, dtype=torch.float64), a, tolerance=1e-12)
        >>> (slope,) = torch.autograd.grad(x, a, create_graph=True)
        >>> expected = -x * torch.sin(a * x) / (1 + a * torch.sin(a * x))
        >>> torch.allclose(slope, expected)
        True
    """
    equation = problem if isinstance(problem, RootProblem) else None
    if method is None:
        if equation is None or equation.symmetric:
            method = ImplicitCG(tolerance=tolerance)
        else:
            method = FixedPoint(tolerance=tolerance) if equation.step else NormalCG(tolerance=tolerance)
    if not isinstance(method, ImplicitMethod):
        raise TypeError(f"solve: method: expected one by the implicit function theorem, got {type(method).__name__}")
    where = Structure("theta", theta, Tensor.is_floating_point)
    learned = torch.is_grad_enabled() and any(isinstance(p, Tensor) and p.requires_grad for p in tree_leaves(phi))
    what = Structure("phi", phi, (lambda p: p.requires_grad) if learned else Tensor.is_floating_point)
    point = Point(where, what)
    method = method.at(point)
    inner: Any = point.flat(problem) if equation is None else equation.flat(where, point)
    found, fixed = (tuple(t.detach() for t in each) for each in (where.leaves, what.leaves))
    with repeatable(point, problem=inner) as (same,):
        with torch.enable_grad():
            value = same(found, fixed)
        if same.problems:
            raise ValueError(f"solve: {same.problems[0]}")
        if any(getattr(v, "requires_grad", False) for v in (value if isinstance(value, Residual) else (value,))):
            raise ValueError(
                "solve: problem: expected a function of theta and phi, got one that depends on another tensor that "
                "requires grad; give it in phi, or detach it"
            )
        # What draws nothing needs no guard.
        evaluate: Any = same if same.draws else inner
        if solver is not None:
            with torch.no_grad():
                found = where.taken("solve: solver", solver(where.filled(found), what.filled(fixed)))
            found = tuple(t.detach() for t in found)
            if not bool(flat(found, found).isfinite().all()):
                raise NonFiniteError("solve: solver: expected finite numbers, got some that are not")
        elif isinstance(problem, FixedPointProblem):
            found = _iterated(evaluate, found, fixed, tolerance, max_iterations)
        if learned:
            _check_reached(evaluate, found, what.leaves)
            found = Solution.apply(evaluate, method, len(found), *found, *what.leaves)
    return where.filled(found)


class Solution(torch.autograd.Function):
    """θ* as it is, whose backward pass is a hypergradient of ⟨θ*, what is given⟩."""

    @staticmethod
    def forward(ctx: Any, inner: Loss, method: ImplicitMethod, size: int, *tensors: Tensor) -> Tensors:
        """Of θ*, as many as size, and φ."""
        theta = tuple(t.detach() for t in tensors[:size])
        ctx.inner, ctx.method, ctx.size = inner, method, size
        ctx.save_for_backward(*theta, *tensors[size:])
        return theta

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Any, ...]:
        theta, phi = ctx.saved_tensors[: ctx.size], ctx.saved_tensors[ctx.size :]

        def outer(theta: Tensors, phi: Tensors) -> Tensor:
            # Nothing of φ, so that what happens not to be reached has a derivative of zero.
            nothing = flat(phi, phi)[:0].sum().to(theta[0].dtype)
            return sum(((t * b.detach()).sum() for t, b in zip(theta, given, strict=True)), start=nothing)

        at, by = (tuple(t.detach().requires_grad_() for t in each) for each in (theta, phi))
        with eagerly():
            result = ctx.method._at(ctx.inner, outer, at, Leaves(by), None)
        if result.residual_norm >= 1.0:
            raise ValueError(
                "solve: method: expected one that solves the linear system of the backward pass, got "
                f"{type(ctx.method).__name__} with a relative residual of {result.residual_norm:.1e}, no better than "
                f"zero: {'; '.join(result.problems)}"
            )
        for sentence in result.problems:
            warnings.warn(f"solve: {sentence}", RuntimeWarning, stacklevel=2)
        gradient = result.gradient
        if torch.is_grad_enabled():
            # v as the solution of a linear equation, and what it is multiplied with, as functions of θ*, φ and b.
            adjoint, method = _adjoint(ctx.inner, ctx.size, len(phi)), ctx.method.elsewhere()
            v = Solution.apply(adjoint, method, ctx.size, *result.solution, *theta, *phi, *given)
            # By φ alone, not by θ* as a function of it.
            held = tuple(p.view_as(p) for p in phi)
            _, equations = inner_gradient(ctx.inner, theta, held, create_graph=True)
            gradient = _pulled(equations, held, tuple(-each for each in v))
        return (None,) * (3 + ctx.size) + gradient


def _adjoint(inner: Loss, size: int, count: int) -> Callable[[Tensors, Tensors], Residual]:
    """(∂g/∂θ)ᵀ v - b as a function of v and of θ, φ and b."""

    def residual(v: Tensors, given: Tensors) -> Residual:
        theta = tuple(t.view_as(t) for t in given[:size])
        _, equations = inner_gradient(inner, theta, given[size : size + count], create_graph=True)
        pulled = _pulled(equations, theta, v)
        found = Residual(p - b for p, b in zip(pulled, given[size + count :], strict=True))
        found.measured = True
        found.equation = equations.equation if isinstance(equations, Residual) else _HESSIAN
        return found

    return residual


_HESSIAN = RootProblem(lambda theta, phi: theta, symmetric=True)


def _pulled(equations: Tensors, inputs: Tensors, v: Tensors) -> Tensors:
    """vᵀ ∂g/∂inputs, differentiable; zeros for inputs that are constants, such as b of a sum."""
    again = [(g, each) for g, each in zip(equations, v, strict=True) if g.requires_grad]
    learned = [each for each in inputs if each.requires_grad]
    found = iter(torch.autograd.grad(
        [g for g, _ in again], learned, [each for _, each in again], create_graph=True, allow_unused=True
    ))  # fmt: skip
    return filled([next(found) if each.requires_grad else None for each in inputs], inputs)


def _check_reached(inner: Loss, theta: Tensors, phi: Leaves) -> None:
    """Refuses a part of φ that the equation does not depend on."""
    at, by = (tuple(t.detach().requires_grad_() for t in each) for each in (theta, phi))
    _, equations = inner_gradient(inner, at, by, create_graph=True)
    parts = [g.sum() for g in equations if g.requires_grad]
    reached = torch.autograd.grad(parts, by, allow_unused=True) if parts else [None] * len(by)
    for name, part in zip(phi.names, reached, strict=True):
        if part is None:
            raise ValueError(
                f"solve: {name}: expected a tensor that the map, the equation or the loss's gradient depends on, got "
                "one that does not reach it; look for a detach() or a no_grad(), or let it not require grad"
            )


def _iterated(
    evaluate: Callable[[Tensors, Tensors], Tensors], theta: Tensors, phi: Tensors, tolerance: float, most: int
) -> Tensors:
    """The fixed point of a map by iterating it."""
    norms: list[float] = []
    # Below a few roundings there is nothing to be had.
    tolerance = max(tolerance, 4.0 * torch.finfo(theta[0].dtype).eps)
    with torch.no_grad():
        for _ in range(most):
            try:
                residual = evaluate(theta, phi)
            except NonFiniteError:
                break
            norms.append(length(flat(residual, theta)))
            size = length(flat(theta, theta))
            theta = tuple(t - r for t, r in zip(theta, residual, strict=True))
            if norms[-1] <= tolerance * max(size, 1.0):
                return theta
    half = len(norms) // 2
    rate = (norms[-1] / norms[half]) ** (1.0 / max(len(norms) - 1 - half, 1))
    raise ValueError(
        f"FixedPointProblem: function: expected a map that contracts, got one with ‖T(θ) - θ‖ of {norms[-1]:.1e} after "
        f"{len(norms)} iterations from {norms[0]:.1e}, {rate:.3g} times as much at each; give a solver, or more "
        "iterations if it is less than one"
    )
