"""Categorical in plain torch. Rows are flattened: logits (B, C), -inf masks a class."""

from typing import cast

import torch
from torch import Tensor

from ..contract import OpConfig
from . import philox
from .losses import RowLoss, sampled_loss, transform_rewards


def sample(logits: Tensor, *, seed: Tensor, num_samples: int, row_offset: int) -> Tensor:
    """(G, B) int64."""
    return philox.categorical(logits, seed, num_samples, row_offset)


def log_prob(logits: Tensor, value: Tensor) -> Tensor:
    """(..., B) labels -> (..., B)."""
    normalised = torch.log_softmax(logits, dim=-1)
    return normalised.expand(*value.shape, -1).gather(-1, value.unsqueeze(-1)).squeeze(-1)


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p and log p, the latter 0 where masked so that p log p and its derivatives are 0 there."""
    normalised = torch.log_softmax(logits, dim=-1)
    return normalised.exp(), torch.where(torch.isneginf(logits), 0.0, normalised)


def entropy(logits: Tensor) -> Tensor:
    """(B, C) -> (B,)."""
    p, log_p = _probabilities(logits)
    return -(p * log_p).sum(dim=-1)


def policy_loss(
    logits: Tensor,
    reward_table: Tensor,
    target: Tensor,
    seed: Tensor | None,
    config: OpConfig,
) -> RowLoss:
    target_log_prob = log_prob(logits, target).detach()
    column = reward_table.t()[target]  # (B, C): the reward of each class given the row's label
    h = entropy(logits)
    if config.estimator == "exact":
        rewards = transform_rewards(column, config.rbf_gamma)
        p = torch.softmax(logits, dim=-1)
        mean = (p * rewards).sum(dim=-1)
        std = (p * (rewards - mean.unsqueeze(-1)).square()).sum(dim=-1).detach().sqrt()
        return RowLoss(-(mean + config.entropy_coef * h), mean.detach(), std, h.detach(), target_log_prob, std)
    samples = sample(logits, seed=cast(Tensor, seed), num_samples=config.num_samples, row_offset=config.row_offset)
    return sampled_loss(
        column.gather(-1, samples.t()).t(),
        log_prob(logits, samples),
        h,
        target_log_prob,
        config,
    )


def surrogate_loss(
    logits: Tensor,
    rewards: Tensor,
    samples: Tensor,
    config: OpConfig,
) -> RowLoss:
    """rewards and samples (G, B)."""
    sample_log_prob = log_prob(logits, samples)
    return sampled_loss(
        rewards,
        sample_log_prob if config.estimator != "reparam" else None,
        entropy(logits),
        sample_log_prob.detach().mean(dim=0),
        config,
    )
