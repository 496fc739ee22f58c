"""What a trainer tells of its steps."""

from dataclasses import dataclass

from torch import Tensor


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
        residual_norm, num_products, converged, negative_curvature, problems, inner_gradient_norm, stationarity: as in
            `Hypergradient`.
        native: the inner loop ran in native calls, see `train`, but for an optimiser's first step.
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
