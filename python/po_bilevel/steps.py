"""What a trainer tells of its steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from .hypergradients import Hypergradient
from .rewards import Reward
from .training import norm_of


@dataclass(frozen=True)
class OuterStep:
    """What one outer step did; the losses and the reward are those before its update of the reward.

    Attributes:
        step: its number, from 0.
        inner_loss, outer_loss: L and F at the policy that the inner loop arrived at.
        inner_steps: optimiser steps taken on the policy.
        reward: `Reward.shown`; None of a module that is no `Reward`.
        reward_norm: ‖φ‖.
        gradient_norm: ‖dF/dφ‖.
        residual_norm, num_products, converged, negative_curvature: as in `Hypergradient`.
        problems, inner_gradient_norm, stationarity, min_curvature: as there.
        native: the inner loop ran in native calls, see `train`, but for an optimiser's first step.

    Example:
        >>> import torch
        >>> from po_bilevel import Batch, BilevelTrainer, LinearGaussian, MahalanobisReward
        >>> reward, data = MahalanobisReward(2), Batch(torch.randn(50, 3), torch.randn(50, 2))
        >>> trainer = BilevelTrainer(
        ...     LinearGaussian(3, 2), reward, inner_data=data, outer_data=data, inner_steps=5,
        ...     inner_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        ...     outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.1),
        ... )
        >>> done = trainer.step()
        >>> isinstance(done, OuterStep), done.step, done.reward.round()
        (True, 0, tensor([1., 1.]))
    """

    step: int
    inner_loss: float
    outer_loss: float
    inner_steps: int
    reward: Tensor | None
    reward_norm: float
    gradient_norm: float
    residual_norm: float | None
    num_products: int
    converged: bool | None
    negative_curvature: bool
    problems: tuple[str, ...]
    inner_gradient_norm: float | None = None
    stationarity: float | None = None
    native: bool = False
    min_curvature: float | None = None

    @classmethod
    def of(cls, number: int, result: Hypergradient, reward: nn.Module, **more: Any) -> Self:
        """A step that took this hypergradient of the parameters of a reward that require grad."""
        return cls(
            step=number, inner_loss=result.inner_loss, outer_loss=result.outer_loss,
            reward=reward.shown() if isinstance(reward, Reward) else None,
            reward_norm=norm_of([p.detach() for p in reward.parameters() if p.requires_grad]),
            gradient_norm=norm_of(result.gradient), residual_norm=result.residual_norm,
            num_products=result.num_products, converged=result.converged,
            negative_curvature=result.negative_curvature, problems=result.problems,
            inner_gradient_norm=result.inner_gradient_norm, stationarity=result.stationarity,
            min_curvature=result.min_curvature, **more,
        )  # fmt: skip


def imperfect(history: Sequence[OuterStep]) -> str:
    """How many hypergradients of these steps had not converged or met negative curvature, and why; empty if none."""
    flawed = [step for step in history if step.problems and (step.negative_curvature or not step.converged)]
    many = f"{len(flawed)} of the last {len(history)} outer steps had an imperfect hypergradient"
    return f"{many}; the last, step {flawed[-1].step}: {flawed[-1].problems[0]}" if flawed else ""
