"""Hypergradients of a policy that samples, which ask for no second derivative of it.

With completions ŷ_i of the policy, their log-probabilities S_i(θ), rewards r_i(φ) and advantages A_i, and the inner
problem max_θ E[r_φ] − β KL(p_θ ‖ p_0), or with β H(p_θ),

    dF/dφ = ∂F/∂φ + Σ_i w_i (∂A_i/∂φ) s_i,    s_i = ⟨∇S_i, v⟩,    β (Σ_i w_i ∇S_i ∇S_iᵀ) v = ∇F

for H = β · Fisher at the inner optimum where the policy can represent it, and is positive semi-definite elsewhere. A
product is a derivative of the log-probabilities along a direction and one backward pass, so that networks whose second
derivative is missing or dear, such as transformers with fused attention, serve. The first equation is implicit
differentiation; the Fisher matrix stands for the Hessian as in natural gradients (Amari 1998).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

import po_kernels as pk

from .implicit import ImplicitCG
from .interface import Hypergradient, Loss, Tensors
from .method import Method, Start
from .problem import (
    Average,
    ImplicitProblem,
    all_finite,
    all_reached,
    filled,
    flat,
    length,
    outer_gradients,
    same,
    unflat,
)
from .repeatable import repeatable
from .trees import Leaves, Point, Structure, Tree

How = Literal["forward mode", "differences"]

# By how much of vᵀFv a derivative by differences may be off from that of the backward pass: in single precision their
# error is some thousandths, while a derivative of something else is off by more.
DIFFERENCES_AGREE = 0.05


def check_advantage(name: str, kind: str) -> None:
    """Refuses a baseline under which a reward cannot be learned."""
    if kind not in ("loo", "mean", "none"):
        why = ", which divides a reward by its own scale: that cannot be learned then; use 'loo'"
        raise ValueError(
            f"{name}: expected 'loo', 'mean' or 'none' where a reward is learned, got {kind!r}"
            + why * (kind == "standardized")
        )


@dataclass(frozen=True)
class SampledObjective:
    """The inner problem max_θ E[r_φ] − β KL(p_θ ‖ p_0) through completions that were drawn at θ.

    Attributes:
        log_prob: θ -> (G, *), log p_θ of G completions for each context, in nats, summed over their tokens. It has one
            derivative, and gives the same numbers each time: no dropout.
        reward: φ -> (G, *), their rewards, differentiable in φ.
        coefficient: β, in units of reward a nat: of the KL divergence to a reference, or of the entropy.
        advantage: baseline of the rewards within the G completions of a context, "loo", "mean" or "none".
        reference: log p_0 of the completions, (G, *); None where β weighs entropy. It tells `inner_loss`, no gradient.
        weight: of each completion, (G, *), adding up to one, such as the probabilities of all there are over the number
            of contexts; None for equal ones. With it the baseline is of no use: "none".
        data_reward: φ -> rewards of the data's own completions, of any shape; `MomentMatching` asks for it.
        index: (N,), the context of each of N completions, whose numbers may differ: log_prob, reward, reference and
            weight are (N,) then. A completion that is the only one of its context tells nothing.
        average: of a tensor over processes that have completions, and rows of the outer loss, of their own, as many
            each; of all processes at once. As it stands, of one.

    Raises:
        ValueError: standardised advantages, which erase the scale of a reward that is to be learned; or a weight with a
            baseline; a coefficient that is not positive; when it is called, weights or a reference of another shape
            than the completions.
    """

    log_prob: Callable[[Tensors], Tensor]
    reward: Callable[[Tensors], Tensor]
    coefficient: float
    advantage: pk.Advantage = "loo"
    reference: Tensor | None = None
    weight: Tensor | None = None
    data_reward: Callable[[Tensors], Tensor] | None = field(default=None)
    index: Tensor | None = None
    average: Average = same

    def __post_init__(self) -> None:
        check_advantage("SampledObjective: advantage", self.advantage)
        if not 0 < self.coefficient < math.inf:
            raise ValueError(f"SampledObjective: coefficient: expected a positive number, got {self.coefficient}")
        if self.weight is not None and self.advantage != "none":
            raise ValueError(f"SampledObjective: advantage: expected 'none' with a weight, got {self.advantage!r}")

    def flat(self, theta: Structure, phi: Structure) -> "SampledObjective":
        """The same with functions of tuples."""
        data = self.data_reward
        return replace(
            self, log_prob=lambda tensors: self.log_prob(theta.filled(tensors)),
            reward=lambda tensors: self.reward(phi.filled(tensors)),
            data_reward=None if data is None else lambda tensors: data(phi.filled(tensors)),
        )  # fmt: skip

    def weights(self, like: Tensor) -> Tensor:
        """Of completions whose log-probabilities or rewards are `like`, (G, *)."""
        if self.weight is None:
            count = self.average(torch.tensor(float(like.numel()), dtype=torch.float64, device=like.device))
            return torch.full_like(like, 1.0 / max(float(count), 1.0))
        return self._of_shape("weight", self.weight, like).to(like)

    @staticmethod
    def _of_shape(name: str, given: Tensor, like: Tensor) -> Tensor:
        """Refuses what would be broadcast: (G,) beside (G, 1) is a matrix."""
        if given.shape != like.shape:
            raise ValueError(
                f"SampledObjective: {name}: expected shape {tuple(like.shape)} like the completions, got "
                f"{tuple(given.shape)}"
            )
        return given

    def __call__(self, theta: Tensors, phi: Tensors) -> Tensor:
        """L = −Σ w (r − β log p_θ/p_0), without the derivative that it would have through the samples."""
        with torch.no_grad():
            return self.value(self.log_prob(theta), self.reward(phi))

    def value(self, log_prob: Tensor, rewards: Tensor) -> Tensor:
        """L from the completions' log-probabilities and rewards."""
        ratio = log_prob if self.reference is None else log_prob - self._of_shape("reference", self.reference, log_prob)
        return self.average(-(self.weights(ratio) * (rewards - self.coefficient * ratio)).sum())

    def advantages(self, rewards: Tensor) -> Tensor:
        """Of the completions, like their rewards."""
        return pk.group_advantage(rewards, self.advantage, index=self.index)


def completion_credit(
    log_prob: Callable[[Tensors], Tensor], theta: Sequence[Tensor], vector: Sequence[Tensor]
) -> tuple[Tensor, How]:  # fmt: skip
    """s = ⟨∇_θ log p_θ, v⟩ of each completion: by one derivative in forward mode, or by two evaluations.

    Args:
        log_prob: θ -> (*), once differentiable.
        theta: θ.
        vector: v, a tensor for each of θ.

    Returns:
        s, (*), detached, and how it was come by: "differences" (θ ± εv, an error of ε²) where something in the policy,
        such as fused attention, has no derivative in forward mode.

    Example:
        >>> import torch
        >>> completion_credit(lambda theta: theta[0].square(), [torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 0.5])])
        (tensor([2., 3.]), 'forward mode')
    """
    theta = tuple(t.detach() for t in theta)
    with torch.no_grad():
        try:
            with forward_ad.dual_level():
                out = log_prob(tuple(forward_ad.make_dual(t, v.to(t)) for t, v in zip(theta, vector, strict=True)))
                tangent = forward_ad.unpack_dual(out).tangent
            if tangent is not None:
                return tangent.clone(), "forward mode"
            # Nothing reached the result: it is constant, or operators dropped what they have no forward mode for.
        except RuntimeError as error:  # NotImplementedError is one
            if "forward" not in str(error):
                raise
    return _differences(log_prob, theta, vector), "differences"


def _differences(log_prob: Callable[[Tensors], Tensor], theta: Tensors, vector: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        size = length(torch.cat([v.reshape(-1) for v in vector]))
        if size == 0.0:
            return torch.zeros_like(log_prob(theta))
        scale = max(1.0, length(torch.cat([t.reshape(-1) for t in theta])))
        step = torch.finfo(theta[0].dtype).eps ** (1 / 3) * scale / size
        ends = [
            log_prob(tuple(t + sign * step * v for t, v in zip(theta, vector, strict=True))) for sign in (1.0, -1.0)
        ]
        return (ends[0] - ends[1]) / (2.0 * step)


class FisherProblem(ImplicitProblem):
    """β Fisher in place of the inner Hessian: a product is one derivative along v and one backward pass."""

    num_products: int

    def __init__(
        self, objective: SampledObjective, outer_loss: Loss, theta: Tensors, phi: Leaves, damping: float
    ) -> None:  # fmt: skip
        self.begin(outer_loss, theta, phi, damping, objective.average)
        self._objective = objective
        with torch.enable_grad():
            self._log_prob = objective.log_prob(theta)
            rewards = objective.reward(phi)
            self._advantages = objective.advantages(rewards)
        if self._log_prob.shape != rewards.shape or not self._log_prob.requires_grad:
            raise ValueError(
                f"SampledObjective: log_prob: expected shape {tuple(rewards.shape)} like the rewards, with a "
                f"derivative in theta, got {tuple(self._log_prob.shape)}"
            )
        self._weights = objective.weights(self._log_prob.detach())
        self._some = bool(objective.average(self._weights.sum()))
        self._inner = objective.value(self._log_prob.detach(), rewards.detach())
        self._inner_norm = None
        self.how: set[How] = set()
        self._largest = 0.0

    def product(self, vector: Tensor) -> Tensor:
        """See `ImplicitProblem.product`."""
        return self._product(vector)[1]

    def _product(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """s, and β Fisher v, after both have been seen to give the same vᵀ(β Fisher)v.

        An operator that silently drops a tangent, as custom ones do, shows there, and so does a log-probability that
        draws.
        """
        self.num_products += 1
        parts = unflat(vector, self._theta)
        credit, how = completion_credit(self._objective.log_prob, self._theta, parts)
        image = self._back(credit)
        exact = torch.finfo(credit.dtype).eps ** 0.5
        # Where all is dropped both sides are zero.
        nothing = not self._objective.average(credit.abs().sum()) and self._some and bool(vector.any())
        if how == "forward mode" and (nothing or not self._agree(vector, credit, image, exact)):
            theta = tuple(t.detach() for t in self._theta)
            credit, how = _differences(self._objective.log_prob, theta, parts), "differences"
            image = self._back(credit)
        if how == "differences" and not self._agree(vector, credit, image, DIFFERENCES_AGREE):
            raise ValueError(
                "SampledObjective: log_prob: expected the same numbers each time and one derivative, got one along a "
                "direction that is not the one of its backward pass; look for dropout, and for a detach() in it"
            )
        self.how.add(how)
        return credit, image

    def _agree(self, vector: Tensor, credit: Tensor, image: Tensor, tolerance: float) -> bool:
        local = (self._weights * credit.square()).sum()
        forward = self._objective.coefficient * float(self._objective.average(local))
        backward, squared = float(vector @ image), float(vector @ vector)
        if not (math.isfinite(forward) and math.isfinite(backward)):
            return True  # is said where the product is looked at
        self._largest = max(self._largest, backward / squared if squared > 0 else 0.0)
        # Along a direction without curvature both are what rounding leaves.
        rounding = 256.0 * torch.finfo(vector.dtype).eps * self._largest * squared
        return abs(forward - backward) <= tolerance * (abs(forward) + abs(backward)) + rounding

    def _back(self, credit: Tensor) -> Tensor:
        found = torch.autograd.grad(
            self._log_prob, self._theta, self._objective.coefficient * self._weights * credit, retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
        return self._objective.average(flat(found, self._theta))

    def image_and_mixed(self, solution: Tensor) -> tuple[Tensor, Tensors]:
        """See `ImplicitProblem.image_and_mixed`."""
        credit, image = self._product(solution)
        by_phi = torch.autograd.grad(
            self._advantages, self._phi, -self._weights * credit, retain_graph=True, allow_unused=True
        )
        return image, tuple(map(self._objective.average, all_reached(by_phi, self._phi, self._by_outer)))


class SampledMethod(Method):
    """A method whose inner loss is a `SampledObjective`, which `BilevelTrainer` makes of a `PolicyGradient`."""

    def __call__(
        self, inner_loss: Any, outer_loss: Loss, theta: Tree, phi: Tree, *, start: Tree = None
    ) -> Hypergradient:
        """See `HypergradientMethod.__call__`.

        Raises:
            TypeError: an inner loss that is no `SampledObjective`.
        """
        if not isinstance(inner_loss, SampledObjective):
            raise TypeError(
                f"{type(self).__name__}: inner_loss: expected a SampledObjective, got {type(inner_loss).__name__}"
            )
        point = Point(where := Structure("theta", theta), what := Structure("phi", phi))
        with repeatable(point, outer_loss=point.flat(outer_loss)) as (outer,):
            found = self._at(inner_loss.flat(where, what), outer, point.theta, point.phi, point.start(start))
            return point.result(found)


@dataclass(frozen=True)
class FisherCG(SampledMethod):
    """Conjugate gradients on β · Fisher, whose products need one derivative of log-probabilities each.

    A natural gradient of the outer loss, back through the rewards. Costs K products, the last with the gradient in φ;
    memory is that of one forward and backward pass, whatever K. Damping against the Fisher matrix's small eigenvalues
    costs accuracy: a thousandth against eigenvalues up to 0.06 is 13%.

    Attributes:
        damping: δ, in units of β · Fisher. Needed where there are fewer completions than parameters.
        tolerance: of the residual, relative to ‖∂F/∂θ‖.
        max_iterations: of conjugate gradients.

    Example:
        >>> import torch
        >>> logits, rewards = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
        >>> all_three = SampledObjective(
        ...     lambda theta: theta[0].log_softmax(0)[:, None], lambda phi: phi[0][:, None], coefficient=1.0,
        ...     advantage="none", weight=torch.full((3, 1), 1 / 3),
        ... )
        >>> outer = lambda theta, phi: -theta[0].log_softmax(0)[0]  # the first is in the data
        >>> FisherCG()(all_three, outer, (logits,), (rewards,)).gradient
        (tensor([-0.6667,  0.3333,  0.3333]),)
    """

    damping: float = 0.0
    tolerance: float = 1e-6
    max_iterations: int = 100

    def _at(self, inner_loss: Any, outer_loss: Loss, theta: Tensors, phi: Leaves, start: Start) -> Hypergradient:
        problem = FisherProblem(inner_loss, outer_loss, theta, phi, self.damping)
        result = ImplicitCG(self.damping, self.tolerance, self.max_iterations).solve(problem, start)
        if problem.how == {"forward mode"}:
            return result
        by_differences = "log-probabilities have no derivative in forward mode: differences took its place"
        return replace(result, problems=(*result.problems, by_differences))


@dataclass(frozen=True)
class MomentMatching(SampledMethod):
    """dF/dφ = ∂F/∂φ − (1/β) (E_data[∂r/∂φ] − E_p[∂r/∂φ]): no solve at all.

    For an outer loss that is the negative log-likelihood of the data whose rewards `SampledObjective.data_reward` has,
    and an inner problem that has been solved by a policy that can represent its optimum p ∝ p_0 exp(r/β): the gradient
    of an energy-based model's likelihood (Ackley, Hinton and Sejnowski 1985).

    Example:
        >>> import torch
        >>> phi = torch.tensor([0.0, 1.0], requires_grad=True)  # the rewards of two answers
        >>> theta = phi.detach().clone().requires_grad_()  # logits: the optimum for β = 1
        >>> drawn = torch.tensor([0, 1, 1, 1])[:, None]
        >>> objective = SampledObjective(
        ...     log_prob=lambda theta: torch.log_softmax(theta, 0)[drawn], coefficient=1.0,
        ...     reward=lambda phi: phi[drawn], data_reward=lambda phi: phi[0],
        ... )
        >>> MomentMatching()(objective, lambda theta, phi: -torch.log_softmax(theta, 0)[0], theta, phi).gradient
        tensor([-0.7500,  0.7500])
    """

    def _at(self, inner_loss: Any, outer_loss: Loss, theta: Tensors, phi: Leaves, start: Start) -> Hypergradient:
        if inner_loss.data_reward is None:
            raise ValueError("MomentMatching: SampledObjective.data_reward: expected rewards of the data, got None")
        outer, _, direct = outer_gradients(outer_loss, theta, phi)
        with torch.enable_grad():
            data, samples = inner_loss.data_reward(phi).mean(), inner_loss.reward(phi)
            apart = (data - (inner_loss.weights(samples.detach()) * samples).sum()) / inner_loss.coefficient
        by_phi = all_reached(torch.autograd.grad(apart, phi, allow_unused=True), phi, direct)
        average = inner_loss.average
        gradient = tuple(average(d - g) for d, g in zip(filled(direct, phi), by_phi, strict=True))
        return Hypergradient(
            gradient=all_finite(gradient), inner_loss=float(inner_loss(theta, phi)),
            outer_loss=float(average(outer.detach())),
        )  # fmt: skip
