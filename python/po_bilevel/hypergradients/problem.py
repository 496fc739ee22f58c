"""A bilevel problem at a point: losses, gradients and products, each checked once and for all methods.

What is not finite raises a NonFiniteError, a loss or a tensor that cannot be used a ValueError or a TypeError.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .equations import Residual, RootProblem
from .interface import Hypergradient, Loss, Tensors
from .trees import Leaves

Average = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """The average over processes where there is one."""
    return x


class Curvature:
    """The least Rayleigh quotient vᵀHv/vᵀv seen, where one that is zero but for rounding counts as zero."""

    def __init__(self) -> None:
        self._least: float | None = None
        self._most = 0.0
        self._lowest: tuple[Tensor, Tensor] | None = None

    def observe(self, vector: Tensor, image: Tensor, squared: float | None = None) -> float:
        """vᵀHv/vᵀv of a vector (P,), its image Hv (P,), and vᵀv if it is known; 0 of zero."""
        if squared is None:
            size = length(vector)
            if size == 0.0:
                return 0.0
            value = float((vector / size) @ (image / size))
        else:
            value = float(vector @ image) / squared
        if not math.isfinite(value):
            raise NonFiniteError("a product with the Hessian of the inner loss is not finite")
        self._most = max(self._most, abs(value))
        if abs(value) <= 10.0 * torch.finfo(vector.dtype).eps * self._most:
            value = 0.0
        self._least = value if self._least is None else min(self._least, value)
        return value

    def search(self, vector: Tensor, image: Tensor) -> None:
        """`observe`, over all combinations of the vector and the lowest one so far.

        The directions of a solver that does not mind negative curvature need not have any, where their combinations
        do. Rayleigh-Ritz in two dimensions at each step (Knyazev 2001) finds it without storing them.
        """
        unit: Tensor | float = length(vector)
        if unit == 0.0:
            return
        vector, image = vector / unit, image / unit
        if self._lowest is not None:
            lowest, lowest_image = self._lowest
            overlap = lowest @ vector
            vector, image = vector - overlap * lowest, image - overlap * lowest_image
            unit = vector.norm()
            # All that rounding leaves of a vector along the other has no direction.
            if float(unit) < torch.finfo(vector.dtype).eps ** 0.5:
                return
            vector, image = vector / unit, image / unit
            cross = lowest @ image
            projected = torch.stack([lowest @ lowest_image, cross, cross, vector @ image]).reshape(2, 2)
            first, second = torch.linalg.eigh(projected).eigenvectors[:, 0]
            vector, image = first * lowest + second * vector, first * lowest_image + second * image
        self._lowest = vector, image
        self.observe(vector, image)

    @property
    def least(self) -> float | None:
        return self._least

    @property
    def most(self) -> float:
        """The largest |vᵀHv/vᵀv| seen."""
        return self._most


class Best:
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


class ImplicitProblem:
    """(H + δI) v = ∂F/∂θ and dF/dφ = ∂F/∂φ - (∂²L/∂φ∂θ) v at one point, matrix-free.

    The inner loss is evaluated once and its gradient's graph is used for every product, so that batch and random
    numbers are the same throughout, and memory does not depend on how many steps led to θ.

    Attributes:
        right: b = ∂F/∂θ, flat, (P,), in units of a power of two that brings its entries near one: squares of those of
            a loss in small units would underflow. v is in these units too, but for what `start` takes and `result`
            gives.
        scale: ‖b‖.
        num_products: with H, so far.
        curvature: of what was multiplied so far.
        equation: that takes the place of ∂L/∂θ = 0, if one does; H is (∂g/∂θ)ᵀ then.
    """

    equation: RootProblem | None = None

    def __init__(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Leaves, damping: float) -> None:
        self.begin(outer_loss, theta, phi, damping)
        self._parts = getattr(inner_loss, "parts", ())
        if self._parts:
            # Of many batches no graph outlives its use.
            found = [self._part(part) for part in self._parts]
            self._inner = torch.stack([loss for loss, _ in found]).mean()
            self._inner_norm: float | None = length(torch.stack([gradient for _, gradient in found]).mean(0))
            return
        self._inner, gradients = inner_gradient(inner_loss, theta, phi, create_graph=True)
        self._gradient = _differentiable(gradients)
        self._inner_norm = length(flat(gradients, theta))
        if isinstance(gradients, Residual):
            self.equation = gradients.equation
            self._inner_norm = None if gradients.measured else self._inner_norm
        self._pulled: tuple[Tensor, Tensor] | None = None

    def _part(self, loss: Loss) -> tuple[Tensor, Tensor]:
        """The value of one and its gradient, flat."""
        value, gradients = inner_gradient(loss, self._theta, self._phi)
        return value.detach(), flat(gradients, self._theta)

    def begin(
        self, outer_loss: Loss, theta: Tensors, phi: Leaves, damping: float, average: Average = same
    ) -> None:  # fmt: skip
        """What does not depend on how the Hessian is come by; the outer loss is the average over processes."""
        self._theta, self._phi = theta, phi
        outer, by_theta, direct = outer_gradients(outer_loss, self._theta, self._phi)
        self._by_outer = direct
        self._outer, self._direct = average(outer.detach()), tuple(map(average, filled(direct, self._phi)))
        self._damping = damping
        right = average(flat(by_theta, self._theta))
        # A power of two changes no bit of what follows.
        self._unit = 2.0 ** math.frexp(float(right.abs().max()))[1]
        self.right: Tensor = right / self._unit
        self.scale: float = length(self.right)
        self.num_products: int = 0
        self.curvature: Curvature = Curvature()

    @property
    def place(self) -> tuple[Tensors, Tensors]:
        """θ and φ."""
        return self._theta, self._phi

    def start(self, start: Tensors | None) -> Tensor | None:
        """A warm start, flat."""
        return None if start is None else flat(start, self._theta) / self._unit

    def product(self, vector: Tensor) -> Tensor:
        """H v, without damping, flat: (P,) -> (P,)."""
        self.num_products += 1
        return flat(self._contracted(self._theta, vector), self._theta)

    def _contracted(self, inputs: Tensors, vector: Tensor) -> Sequence[Tensor | None]:
        """vᵀ ∂(∂L/∂θ)/∂inputs, None where the inner gradient does not depend on an input; the mean over batches."""
        parts = unflat(vector, self._theta)
        if not self._parts:
            return _contract(self._gradient, inputs, parts)
        total: list[Tensor | None] = [None] * len(inputs)
        for loss in self._parts:
            graph = _differentiable(inner_gradient(loss, self._theta, self._phi, create_graph=True)[1])
            add(total, [None if each is None else each / len(self._parts) for each in _contract(graph, inputs, parts)])
            del graph
        return total

    @property
    def symmetric(self) -> bool:
        """H is."""
        return self.equation is None or self.equation.symmetric

    @property
    def matrix(self) -> str:
        """For people."""
        return "the Hessian of the inner loss" if self.equation is None else "the Jacobian of the inner equation"

    def transposed(self, vector: Tensor) -> Tensor:
        """Hᵀ v, without damping, flat: the derivative of Hu along v by u, which is twice a product's work."""
        if self.symmetric:
            return self.product(vector)
        self.num_products += 1
        if self._pulled is None:
            at = torch.zeros_like(vector, requires_grad=True)
            with torch.enable_grad():
                pulled = _contract(self._gradient, self._theta, unflat(at, self._theta), create_graph=True)
                self._pulled = at, flat(pulled, self._theta)
        at, image = self._pulled
        return torch.autograd.grad(image, at, vector, retain_graph=True)[0]

    def image_and_mixed(self, solution: Tensor) -> tuple[Tensor, Tensors]:
        """H v, flat, and (∂²L/∂φ∂θ) v, by one backward pass."""
        both = self._contracted(self._theta + self._phi, solution)
        self.num_products += 1
        mixed = all_reached(both[len(self._theta) :], self._phi, self._by_outer)
        return flat(both[: len(self._theta)], self._theta), mixed

    def stationarity(self) -> tuple[float | None, tuple[str, ...]]:
        """How far θ is from a minimum of L, None where its gradient is not known, and the problem if it is one."""
        if self._inner_norm is None:
            return None, ()
        return no_minimum(self._theta, self._inner_norm, self.curvature.most, self.equation is not None)

    def _rounding(self, solution: Tensor) -> float:
        """The relative residual that the rounding of one product leaves, with a few roundings for each entry."""
        if self.scale == 0:
            return 0.0
        size = (self.curvature.most + self._damping) * length(solution)
        return 8.0 * torch.finfo(solution.dtype).eps * size / self.scale

    def result(
        self, solution: Tensor, *, tolerance: float | None, problems: Sequence[str] = (),
        next_step: float | None = None, condition: float | None = None,
    ) -> Hypergradient:  # fmt: skip
        """The hypergradient from v, with its residual measured, and how far θ is from a minimum.

        Args:
            solution: v, (P,).
            tolerance: of the relative residual; None if none was asked for. What rounding leaves of it is forgiven.
            problems: what went wrong in the solve.
            next_step: ρ, to hand on v + ρ (b - (H + δI) v) instead of v as the next start; θ moves as v does then, and
                need not be at a minimum.
            condition: of H + δI, if it is known.
        """
        image, mixed = self.image_and_mixed(solution)
        self.curvature.observe(solution, image)
        residual = self.right - image - self._damping * solution
        residual_norm = length(residual) / self.scale if self.scale > 0 else 0.0
        if tolerance is not None and 1.0 < residual_norm < math.inf:
            # No answer to the system is a better one, as after one step of a series that diverges.
            more = f"the solve ended at a relative residual of {residual_norm:.1e}, and zero took its place"
            return self.result(torch.zeros_like(solution), tolerance=tolerance, problems=(*problems, more))
        if not math.isfinite(residual_norm):
            raise NonFiniteError("a product with the Hessian of the inner loss is not finite")
        # A recurrence that has reached the tolerance knows nothing of the rounding of what is measured.
        solved = tolerance is None or residual_norm <= tolerance + self._rounding(solution)
        found = list(problems)
        if not solved and not found:
            found.append(
                f"the linear solve ended at a relative residual of {residual_norm:.1e}, tolerance {tolerance:.1e}"
            )
        stationarity: float | None = None
        far: tuple[str, ...] = ()
        if next_step is None and self.curvature.most > 0:
            stationarity, far = self.stationarity()
            found.extend(far)
        least = self.curvature.least if self.symmetric else None
        if least is not None and least < 0:
            found.append(
                f"{self.matrix} has curvature {least:.3g} along a direction, without the damping "
                f"{self._damping:.3g}: θ is not at a minimum"
            )
        if next_step is not None:
            solution = solution + next_step * residual
        gradient = tuple(d - self._unit * m for d, m in zip(self._direct, mixed, strict=True))
        return Hypergradient(
            gradient=all_finite(gradient), inner_loss=float(self._inner.detach()), outer_loss=float(self._outer),
            residual_norm=residual_norm, num_products=self.num_products,
            converged=None if tolerance is None else solved and not far, min_curvature=least, problems=tuple(found),
            solution=unflat(self._unit * solution, self._theta), inner_gradient_norm=self._inner_norm,
            stationarity=stationarity, condition=condition,
        )  # fmt: skip


# Of θ as a solution of ∂L/∂θ = 0: hypergradients of softmax and Gaussian policies are off by some ten times as much.
STATIONARY = 5e-3


def no_minimum(
    theta: Tensors, norm: float, curvature: float, equation: bool = False
) -> tuple[float, tuple[str, ...]]:  # fmt: skip
    """`Hypergradient.stationarity` at θ with ‖∂L/∂θ‖ = norm and a positive curvature, and the problem if it is one."""
    relative = norm / (curvature * max(length(flat(theta, theta)), 1.0))
    if relative <= STATIONARY:
        return relative, ()
    what = "solution of the inner equation, whose residual" if equation else "minimum of the inner loss, whose gradient"
    sentence = f"θ is no {what} has norm {norm:.2g} there, {relative:.1e} relative"
    return relative, (
        f"{sentence} to its curvature and θ, where {STATIONARY:.0e} will do; train the inner "
        "problem further, or take more rows and samples",
    )


def length(vector: Tensor) -> float:
    """The Euclidean norm, of squares that neither underflow nor overflow in float32."""
    return float(torch.linalg.vector_norm(vector.detach(), dtype=torch.float64))


def outer_gradients(
    outer_loss: Loss, theta: Tensors, phi: Tensors
) -> tuple[Tensor, Tensors, tuple[Tensor | None, ...]]:
    """F, ∂F/∂θ with zeros where F does not depend on it, and ∂F/∂φ with None there; means over batches."""
    losses: list[Tensor] = []
    gradients: list[Tensor | None] = [None] * (len(theta) + len(phi))
    parts = getattr(outer_loss, "parts", ()) or (outer_loss,)
    for part in parts:
        with torch.enable_grad():
            loss = part(theta, phi)
        scalar("outer_loss", loss)
        found = torch.autograd.grad(loss, theta + phi, allow_unused=True)
        add(gradients, found if len(parts) == 1 else [None if g is None else g / len(parts) for g in found])
        losses.append(loss.detach())
    by_theta, by_phi = gradients[: len(theta)], gradients[len(theta) :]
    if all(g is None for g in by_theta):
        raise ValueError("outer_loss: expected a loss that depends on theta, got one that does not")
    filled_up = filled(by_theta, theta)
    if not _finite(filled_up):
        raise NonFiniteError("the gradient of the outer loss is not finite")
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean(), filled_up, tuple(by_phi)


def inner_gradient(
    inner_loss: Loss, theta: Tensors, phi: Tensors, *, create_graph: bool = False
) -> tuple[Tensor, Tensors]:
    """L and ∂L/∂θ, with zeros where L does not depend on it; of an equation ½‖g‖² and g."""
    with torch.enable_grad():
        loss = inner_loss(theta, phi)
        if isinstance(loss, Residual):
            value = 0.5 * flat(loss, theta).detach().square().sum()
            return value, loss if create_graph else tuple(g.detach() for g in loss)
        scalar("inner_loss", loss)
        gradients = torch.autograd.grad(loss, theta, create_graph=create_graph, allow_unused=True)
    return loss, depends(gradients, theta)


def depends(gradients: Sequence[Tensor | None], theta: Tensors) -> Tensors:
    """∂L/∂θ, with zeros where L does not depend on it, if it depends on any and is finite."""
    if all(g is None for g in gradients):
        raise ValueError("inner_loss: expected a loss that depends on theta, got one that does not")
    filled_up = filled(gradients, theta)
    if not _finite(filled_up):
        raise NonFiniteError("the gradient of the inner loss is not finite")
    return filled_up


def scalar(name: str, loss: Tensor) -> None:
    """Refuses a loss that is no scalar tensor, is detached or is not finite."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name}: expected a loss that is a tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise ValueError(f"{name}: expected a loss of shape (), got {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"{name}: expected a loss that depends on theta, got one that is detached from everything")
    if not loss.detach().isfinite():
        raise NonFiniteError(f"{name} is not finite: {float(loss.detach())}")


def all_reached(by_phi: Sequence[Tensor | None], phi: Leaves, direct: Sequence[Tensor | None]) -> Tensors:
    """Derivatives by φ of the inner problem, with zeros for what only the outer loss depends on.

    Args:
        by_phi: derivatives of something of the inner problem, None where it does not depend on φ.
        direct: ∂F/∂φ, None likewise.

    Raises:
        ValueError: a part of φ that reaches neither.
    """
    for index, parts in enumerate(zip(by_phi, direct, strict=True)):
        if parts == (None, None):
            raise ValueError(
                f"{phi.names[index]}: expected a tensor that the gradient of the inner loss, or the outer loss, "
                "depends on, got one that does not reach either; look for a detach() or a no_grad() on the way"
            )
    return filled(by_phi, phi)


def add(total: list[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    """Adds to sums, in which None is zero, where they are."""
    for index, part in enumerate(parts):
        known = total[index]
        total[index] = part if known is None else known if part is None else known + part


def all_finite(gradient: Tensors) -> Tensors:
    """The hypergradient."""
    if not _finite(gradient):
        raise NonFiniteError("the hypergradient is not finite")
    return gradient


def flat(tensors: Sequence[Tensor | None], like: Tensors) -> Tensor:
    """One vector, (P,), with zeros for None."""
    return torch.cat([t.reshape(-1) for t in filled(tensors, like)])


def filled(tensors: Sequence[Tensor | None], like: Tensors) -> Tensors:
    """The tensors, with zeros for None."""
    return tuple(torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True))


def unflat(vector: Tensor, like: Tensors) -> Tensors:
    """The parts of a vector (P,) in the shapes of `like`."""
    parts = vector.split([t.numel() for t in like])
    return tuple(part.view_as(t) for part, t in zip(parts, like, strict=True))


def _finite(tensors: Tensors) -> bool:
    """All of them, in one reading: many small ones would cost more in calls than in arithmetic."""
    return bool(torch.cat([t.detach().reshape(-1) for t in tensors]).isfinite().all())


def _differentiable(gradients: Tensors) -> list[tuple[int, Tensor]]:
    """The parts of ∂L/∂θ that can be differentiated again, each with its index in θ."""
    again = [(i, g) for i, g in enumerate(gradients) if g.requires_grad]
    if not again:
        raise ValueError("inner_loss: expected a twice differentiable loss, got one whose gradient is constant")
    return again


def _contract(
    gradient: list[tuple[int, Tensor]], inputs: Tensors, vector: Tensors, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """vᵀ ∂(∂L/∂θ)/∂inputs, None where the inner gradient does not depend on an input."""
    return torch.autograd.grad(
        [g for _, g in gradient], inputs, [vector[i] for i, _ in gradient], retain_graph=True,
        create_graph=create_graph, allow_unused=True,
    )  # fmt: skip
