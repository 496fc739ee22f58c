"""Methods that take no second derivative: any inner loss will do, estimator="reinforce" too."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import Hypergradient, Loss, Tensors
from .method import Method, Start
from .problem import (
    all_finite,
    all_reached,
    depends,
    filled,
    flat,
    inner_gradient,
    length,
    no_minimum,
    outer_gradients,
    scalar,
    unflat,
)
from .trees import Leaves
from .unrolled import descend


@dataclass(frozen=True)
class FiniteDifference(Method):
    """The Hessian as I/scale and the mixed product by central differences (DARTS, Liu et al. 2019, eq. 8).

        dF/dφ = ∂F/∂φ - [∂L/∂φ(θ + εv) - ∂L/∂φ(θ - εv)] / 2ε,    v = scale · ∂F/∂θ,  ε = radius/‖v‖

    Two gradients of the inner loss. SAMA (Choe et al. 2023) is this with v scaled by the inner optimiser's state.

    Attributes:
        scale: 1/curvature, the inner learning rate in DARTS.
        radius: ‖εv‖, in units of θ. The error is O(radius²) from the third derivative and O(rounding/radius).
    """

    scale: float = 1.0
    radius: float = 1e-2

    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Leaves, start: Start) -> Hypergradient:
        outer, by_theta, direct = outer_gradients(outer_loss, theta, phi)
        norm = length(flat(by_theta, theta))
        gradient = list(filled(direct, phi))
        # Where ∂F/∂θ is zero there is no direction, and nothing to subtract.
        shift = self.radius / norm if norm > 0 else 0.0
        values, slopes, ends = [], [], []
        for sign in (1.0, -1.0):
            moved = tuple(t.detach() + sign * shift * g for t, g in zip(theta, by_theta, strict=True))
            value, by_moved, by_phi = _gradients(inner_loss, moved, phi, direct)
            values.append(value)
            slopes.append(flat(by_moved, theta))
            ends.append(by_phi)
        if norm > 0:
            for index, (plus, minus) in enumerate(zip(*(filled(end, phi) for end in ends), strict=True)):
                gradient[index] = gradient[index] - self.scale * (plus - minus) / (2.0 * shift)
        # The mean of both ends is right to second order.
        inner_norm = length(0.5 * (slopes[0] + slopes[1]))
        stationarity, far = no_minimum(theta, inner_norm, 1.0 / self.scale)
        return dataclasses.replace(
            _first_order(gradient, 0.5 * sum(values), outer), inner_gradient_norm=inner_norm, stationarity=stationarity,
            problems=(*far, *(_unmoved(phi, *ends) if norm > 0 else ())),
        )  # fmt: skip


@dataclass(frozen=True)
class Penalty(Method):
    """The value-function penalty (F2SA, Kwon et al. 2023, algorithm 1).

        dF/dφ ≈ ∂F/∂φ(y) + μ [∂L/∂φ(y) - ∂L/∂φ(θ)],    y = argmin L + F/μ

    Right to O(1/μ); what y and θ lack in accuracy is multiplied by μ, so that both have to be minima as good as
    `tolerance` says. y takes gradient steps from where it ended the last time, θ is the minimum of L that it is called
    with. steps + 3 gradients of L.

    Attributes:
        multiplier: μ.
        steps: of gradient descent on y.
        learning_rate: of it, in units of 1/curvature of the inner loss.
        tolerance: of ‖∂(L + F/μ)/∂y‖ and of ‖∂L/∂θ‖, both relative to ‖∂F/∂y‖/μ.
    """

    multiplier: float
    steps: int
    learning_rate: float
    tolerance: float = 1e-1

    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Leaves, start: Start) -> Hypergradient:
        y = tuple(t.detach().requires_grad_() for t in (theta if start is None else start))

        def penalised(theta: Tensors, phi: Tensors) -> Tensor:
            return inner_loss(theta, phi) + outer_loss(theta, phi) / self.multiplier

        # Said here, for the descent would take an outer loss that is no good for the inner one.
        scalar("outer_loss", outer_loss(y, phi))
        y = descend(penalised, y, phi, self.steps, self.learning_rate)
        outer, by_y, direct = outer_gradients(outer_loss, y, phi)
        _, left = inner_gradient(penalised, y, phi)
        inner, slope, at_theta = _gradients(inner_loss, theta, phi, direct)
        _, _, at_y = _gradients(inner_loss, y, phi, direct)
        scale = length(flat(by_y, y)) / self.multiplier
        inner_norm = length(flat(slope, theta))
        residual, stationarity = (n / scale if scale > 0 else 0.0 for n in (length(flat(left, y)), inner_norm))
        parts = zip(*(filled(each, phi) for each in (direct, at_y, at_theta)), strict=True)
        gradient = [d + self.multiplier * (a - b) for d, a, b in parts]
        problems = []
        if residual > self.tolerance:
            problems.append(
                f"the penalised problem stopped at a relative gradient of {residual:.1e} after {self.steps} steps, "
                f"tolerance {self.tolerance:.1e}; take more steps"
            )
        if stationarity > self.tolerance:
            problems.append(
                f"θ is no minimum of the inner loss, whose gradient has norm {inner_norm:.2g} there, "
                f"{stationarity:.1e} relative to ‖∂F/∂θ‖/μ, tolerance {self.tolerance:.1e}; train the inner "
                "problem further"
            )
        return dataclasses.replace(
            _first_order(gradient, inner, outer), residual_norm=residual, converged=not problems,
            problems=(*problems, *_unmoved(phi, at_y, at_theta)), solution=tuple(t.detach() for t in y),
            inner_gradient_norm=inner_norm, stationarity=stationarity,
        )  # fmt: skip


@dataclass(frozen=True)
class BOME(Method):
    """Bilevel optimisation made easy (Ye et al. 2022, algorithm 1): one joint step of (φ, θ) that lowers F and L - L*.

        q(φ, θ) = L(θ, φ) - L(θ^(T), φ),    direction ∇F + μ∇q,    μ = max(0, η - ⟨∇F, ∇q⟩/‖∇q‖²)

    θ^(T) is θ after T steps of gradient descent, a constant in ∇q. The direction's φ part is handed out as the
    gradient, its θ part moves `theta`: the method is an inner loop of its own, so train with no other inner steps. At
    a θ that already is a minimum of L, q and so the pull of L on φ vanish. T + 2 gradients of L.

    Attributes:
        steps: T.
        learning_rate: of the T steps.
        step: ξ, of θ along the direction.
        control: η, how much of ‖∇q‖² a step should at least descend.
    """

    steps: int
    learning_rate: float
    step: float
    control: float = 0.5

    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Leaves, start: Start) -> Hypergradient:
        outer, f_theta, direct = outer_gradients(outer_loss, theta, phi)
        f_phi = filled(direct, phi)
        inner, q_theta, here = _gradients(inner_loss, theta, phi, direct)
        lower = descend(inner_loss, theta, phi, self.steps, self.learning_rate)
        _, _, there = _gradients(inner_loss, lower, phi, direct)
        q_phi = tuple(a - b for a, b in zip(filled(here, phi), filled(there, phi), strict=True))
        f, q = flat(f_phi + f_theta, phi + theta), flat(q_phi + q_theta, phi + theta)
        size = length(q)
        weight = max(0.0, self.control - float((f / size) @ (q / size))) if size > 0 else 0.0
        direction = unflat(f + weight * q, phi + theta)
        moved = tuple(t.detach() - self.step * d for t, d in zip(theta, direction[len(phi) :], strict=True))
        return dataclasses.replace(
            _first_order(direction[: len(phi)], inner, outer), theta=moved, problems=_unmoved(phi, here, there),
            inner_gradient_norm=length(flat(q_theta, theta)),
        )  # fmt: skip


@dataclass(frozen=True)
class EvolutionStrategies(Method):
    """The gradient of F(θ_T(φ)) smoothed over φ, by antithetic pairs (Salimans et al. 2017; Metz et al. 2019).

        dF/dφ ≈ (1/N) Σ_i ε_i [F(θ_T(φ + σε_i)) - F(θ_T(φ - σε_i))] / 2σ

    θ_T is θ after T steps of gradient descent from the θ given. The ε_i are Gaussian directions made orthogonal within
    blocks as large as φ (Choromanski et al. 2018), of length √P: with N a multiple of the size P of φ the gradient of a
    quadratic function comes out exactly. Takes nothing from L or F but values and ∂L/∂θ, at 2 N T gradients; for few φ.

    Attributes:
        pairs: N.
        radius: σ, in units of φ.
        steps: T.
        learning_rate: of the T steps.
        seed: of the directions, the same at each call, so that with fewer pairs than P φ moves among them only; None
            draws one from torch's default generator at each call.
    """

    pairs: int
    radius: float
    steps: int
    learning_rate: float
    seed: int | None = None

    def _at(self, inner_loss: Loss, outer_loss: Loss, theta: Tensors, phi: Leaves, start: Start) -> Hypergradient:
        outer, _, direct = outer_gradients(outer_loss, theta, phi)
        inner = self._checked(inner_loss, theta, phi, direct)
        centre = flat(tuple(p.detach() for p in phi), phi)
        total = torch.zeros_like(centre)
        for direction in self._directions(centre):
            ends = []
            for sign in (1.0, -1.0):
                moved = unflat(centre + sign * self.radius * direction, phi)
                reached = descend(inner_loss, theta, moved, self.steps, self.learning_rate)
                with torch.no_grad():
                    ends.append(float(outer_loss(reached, moved)))
            total += direction * (ends[0] - ends[1])
        return _first_order(unflat(total / (2.0 * self.radius * self.pairs), phi), inner, outer)

    def _checked(self, inner_loss: Loss, theta: Tensors, phi: Leaves, direct: Sequence[Tensor | None]) -> float:
        """L, where all of φ makes a difference to it or F; differences of F would make nothing of one that does not."""
        with torch.enable_grad():
            loss = inner_loss(theta, phi)
        scalar("inner_loss", loss)
        reached = list(torch.autograd.grad(loss, phi, allow_unused=True))
        for index, part in enumerate(reached):
            if part is None:
                moved = tuple(p + self.radius if i == index else p for i, p in enumerate(phi))
                with torch.no_grad():
                    if not torch.equal(inner_loss(theta, moved), loss):
                        reached[index] = torch.zeros_like(phi[index])
        all_reached(reached, phi, direct)
        return float(loss.detach())

    def _directions(self, like: Tensor) -> Tensor:
        """(N, P)."""
        size = like.numel()
        seed = int(torch.randint(2**62, (), device="cpu")) if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(seed)
        blocks = []
        for begin in range(0, self.pairs, size):
            gaussian = torch.randn(
                size, min(size, self.pairs - begin), dtype=torch.float64, generator=generator, device="cpu"
            )
            blocks.append(torch.linalg.qr(gaussian).Q.mT)
        return size**0.5 * torch.cat(blocks).to(like)


def _gradients(
    inner_loss: Loss, theta: Tensors, phi: Leaves, direct: Sequence[Tensor | None]
) -> tuple[float, Tensors, Sequence[Tensor | None]]:  # fmt: skip
    """L, ∂L/∂θ and ∂L/∂φ, at θ as a constant; None for a part of φ that only the outer loss depends on."""
    leaves = tuple(t.detach().requires_grad_() for t in theta)
    with torch.enable_grad():
        loss = inner_loss(leaves, phi)
        scalar("inner_loss", loss)
        found = torch.autograd.grad(loss, leaves + phi, allow_unused=True)
    by_phi = found[len(leaves) :]
    all_reached(by_phi, phi, direct)
    return float(loss.detach()), depends(found[: len(leaves)], leaves), by_phi


def _unmoved(
    phi: Leaves, first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> tuple[str, ...]:  # fmt: skip
    """What it means where ∂L/∂φ is the same, to the bit, at two θ."""
    return tuple(
        f"{name}: ∂L/∂φ does not change with θ, so that φ may not reach the minimum of the inner loss"
        for name, a, b in zip(phi.names, first, second, strict=True)
        if a is not None and b is not None and torch.equal(a, b)
    )


def _first_order(gradient: Sequence[Tensor], inner: float, outer: Tensor) -> Hypergradient:
    return Hypergradient(all_finite(tuple(gradient)), inner, float(outer.detach()))
