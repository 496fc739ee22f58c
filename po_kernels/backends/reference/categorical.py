"""Categorical in plain torch. Rows are flattened: logits (B, C), -inf masks a class."""

from typing import Any

import torch
from torch import Tensor

from ..contract import Definitions, OpConfig
from . import philox
from .losses import RowLoss, sampled_loss, transform_rewards


def sample(logits: Tensor, seed: Tensor, config: OpConfig) -> Tensor:
    """(G, B) int64."""
    return philox.categorical(logits, seed, config.num_samples, config.row_offset)


def indices(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Labels that index, and what to add to what they index: nan for one that is none.

    Only on a device, where values are not checked, may there be such a label, and after an index out of range nothing
    works there any more.
    """
    if labels.device.type == "cpu":
        return labels, torch.zeros((), device="cpu")
    known = (labels >= 0) & (labels < classes)
    return labels.where(known, 0), torch.zeros(labels.shape, device=labels.device).masked_fill(~known, float("nan"))


def log_prob(logits: Tensor, value: Tensor) -> Tensor:
    """(..., B) labels -> (..., B)."""
    normalised = torch.log_softmax(logits, dim=-1)
    index, wrong = indices(value, logits.shape[-1])
    return normalised.expand(*value.shape, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1) + wrong


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p and log p, the latter 0 where masked so that p log p and its derivatives are 0 there."""
    normalised = torch.log_softmax(logits, dim=-1)
    return normalised.exp(), torch.where(torch.isneginf(logits), 0.0, normalised)


def entropy(logits: Tensor) -> Tensor:
    """(B, C) -> (B,)."""
    p, log_p = _probabilities(logits)
    return -(p * log_p).sum(dim=-1)


def policy_loss(inputs: Any, constants: Any, config: OpConfig) -> RowLoss:
    (logits, reward_table), target = inputs, constants.target
    target_log_prob = log_prob(logits, target).detach()
    # (B, C): the reward of each class given the row's label. In float64, in which autograd then adds up the rows.
    index, wrong = indices(target, logits.shape[-1])
    column = reward_table.t().double()[index].to(reward_table.dtype) + wrong.unsqueeze(-1)
    h = entropy(logits)
    if config.estimator == "exact":
        rewards = transform_rewards(column, config.rbf_gamma)
        p = torch.softmax(logits, dim=-1)
        mean = (p * rewards).sum(dim=-1)
        deviations = (rewards - mean.unsqueeze(-1)).detach().double()  # whose squares vanish in float32
        std = (p.detach() * deviations.square()).sum(dim=-1).sqrt().to(p.dtype)
        return RowLoss(-(mean + config.entropy_coef * h), mean.detach(), std, h.detach(), target_log_prob, std)
    samples = sample(logits, constants.seed, config)
    return sampled_loss(
        column.gather(-1, samples.t()).t(),
        log_prob(logits, samples),
        h,
        target_log_prob,
        config,
    )


def surrogate_loss(inputs: Any, constants: Any, config: OpConfig) -> RowLoss:
    logits, rewards = inputs
    sample_log_prob = log_prob(logits, constants.samples)
    return sampled_loss(
        rewards,
        sample_log_prob if config.estimator != "reparam" else None,
        entropy(logits),
        sample_log_prob.detach().mean(dim=0),
        config,
    )


DEFINITIONS: Definitions = {
    "categorical_policy_loss": policy_loss,
    "categorical_surrogate_loss": surrogate_loss,
    "categorical_log_prob": lambda inputs, constants, config: log_prob(inputs.logits, constants.value),
    "categorical_sample": lambda inputs, constants, config: sample(inputs.logits, constants.seed, config),
}
