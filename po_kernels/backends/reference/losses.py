"""What every policy family shares: advantages, the surrogate of the three sampled estimators, rewards."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..advantages import ADVANTAGES, group_std
from ..contract import OpConfig


class RowLoss(NamedTuple):
    """Per-row results, each of shape (B,); the statistics are detached."""

    loss: Tensor
    reward_mean: Tensor
    reward_std: Tensor
    entropy: Tensor
    log_prob: Tensor
    advantage_std: Tensor


def transform_rewards(rewards: Tensor, rbf_gamma: float | None) -> Tensor:
    return rewards if rbf_gamma is None else torch.exp(rbf_gamma * rewards)


def sampled_loss(
    rewards: Tensor,
    sample_log_prob: Tensor | None,
    entropy: Tensor,
    target_log_prob: Tensor,
    config: OpConfig,
) -> RowLoss:
    """The loss of a row from its samples' rewards.

    Args:
        rewards: (G, B).
        sample_log_prob: (G, B) log-density of the samples held constant; None for `reparam`.
        entropy: (B,).
        target_log_prob: (B,), reported in the statistics.
    """
    rewards = transform_rewards(rewards, config.rbf_gamma)
    advantages = ADVANTAGES[config.advantage].define(rewards)
    objective = rewards
    if config.estimator != "reparam":
        assert sample_log_prob is not None
        log_weight = sample_log_prob - sample_log_prob.detach()
        excess = torch.expm1(log_weight) if config.estimator == "dice" else log_weight
        objective = rewards + excess * advantages
    loss = -(objective.mean(dim=0) + config.entropy_coef * entropy)
    return RowLoss(
        loss,
        rewards.detach().mean(dim=0),
        group_std(rewards.detach()),
        entropy.detach(),
        target_log_prob.detach(),
        group_std(advantages.detach()),
    )


def reduced(rows: Tensor, reduction: str) -> Tensor:
    """(B,) -> () or, for "none", (B,). The mean of no rows is zero."""
    if reduction == "none":
        return rows
    total = rows.sum()
    return total / max(rows.shape[0], 1) if reduction == "mean" else total


def symmetric(precision: Tensor) -> Tensor:
    return 0.5 * (precision + precision.mT) if precision.ndim == 2 else precision


def quadratic_form(residual: Tensor, precision: Tensor) -> Tensor:
    """residualᵀ U residual over the last axis, (*, D) -> (*)."""
    if precision.ndim == 2:
        return (residual @ symmetric(precision) * residual).sum(dim=-1)
    return (residual.square() * precision).sum(dim=-1)


def diagonal(precision: Tensor, dim: int) -> Tensor:
    """diag U, (D,)."""
    return precision.diagonal() if precision.ndim == 2 else precision.expand(dim)
