"""Diagonal Gaussian in plain torch. Rows are flattened: mean and log_std are (B, D)."""

import math
from typing import Any

import torch
from torch import Tensor

from ..contract import Definitions, OpConfig
from . import philox
from .losses import RowLoss, diagonal, quadratic_form, sampled_loss, symmetric

LOG_2PI = math.log(2.0 * math.pi)


def sample(mean: Tensor, log_std: Tensor, seed: Tensor, config: OpConfig) -> Tensor:
    """(G, B, D), pathwise differentiable in mean and log_std."""
    noise = philox.normal(seed, config.num_samples, mean.shape[0], mean.shape[1], config.row_offset, mean)
    return mean + torch.exp(log_std) * noise


def log_prob(mean: Tensor, log_std: Tensor, value: Tensor) -> Tensor:
    """Joint log-density, (..., B, D) -> (..., B)."""
    # 1 / σ of a subnormal σ would be inf: a power of two goes with the residual.
    lifted = log_std.detach() < (-80.0 if log_std.dtype == torch.float32 else -700.0)
    lift = torch.where(lifted, 2.0**64, 1.0).to(log_std.dtype)
    whitened = (value - mean) * lift * torch.exp(-torch.where(lifted, log_std + 64.0 * math.log(2.0), log_std))
    return (-0.5 * whitened.square() - log_std - 0.5 * LOG_2PI).sum(dim=-1)


def entropy(log_std: Tensor) -> Tensor:
    """(B, D) -> (B,)."""
    return (log_std + 0.5 * (LOG_2PI + 1.0)).sum(dim=-1)


def policy_loss(inputs: Any, constants: Any, config: OpConfig) -> RowLoss:
    mean, log_std, target, precision = inputs
    target_log_prob = log_prob(mean, log_std, target).detach()
    if config.estimator == "analytic":
        delta = mean - target
        variance = torch.exp(2.0 * log_std)
        reward = -quadratic_form(delta, precision) - (diagonal(precision, mean.shape[1]) * variance).sum(-1)
        std = _reward_std(delta.detach(), variance.detach(), precision.detach())
        h = entropy(log_std)
        return RowLoss(-(reward + config.entropy_coef * h), reward.detach(), std, h.detach(), target_log_prob, std)
    samples = sample(mean, log_std, constants.seed, config)
    if config.estimator != "reparam":
        samples = samples.detach()
    return sampled_loss(
        -quadratic_form(samples - target, precision),
        None if config.estimator == "reparam" else log_prob(mean, log_std, samples),
        entropy(log_std),
        target_log_prob,
        config,
    )


def _reward_std(delta: Tensor, variance: Tensor, precision: Tensor) -> Tensor:
    """Standard deviation of dᵀUd for d ~ N(delta, diag(variance)): Var = 2 tr(UΣUΣ) + 4 δᵀUΣUδ."""
    if precision.ndim == 2:
        u = symmetric(precision)
        trace = ((variance @ u.square()) * variance).sum(dim=-1)
        linear = ((delta @ u).square() * variance).sum(dim=-1)
    else:
        trace = (precision * variance).square().sum(dim=-1)
        linear = ((precision * delta).square() * variance).sum(dim=-1)
    return torch.sqrt(2.0 * trace + 4.0 * linear)


def surrogate_loss(inputs: Any, constants: Any, config: OpConfig) -> RowLoss:
    mean, log_std, rewards = inputs
    sample_log_prob = log_prob(mean, log_std, constants.samples.detach())
    return sampled_loss(
        rewards,
        None if config.estimator == "reparam" else sample_log_prob,
        entropy(log_std),
        sample_log_prob.detach().mean(dim=0),
        config,
    )


DEFINITIONS: Definitions = {
    "gaussian_policy_loss": policy_loss,
    "gaussian_surrogate_loss": surrogate_loss,
    "gaussian_log_prob": lambda inputs, constants, config: log_prob(*inputs),
    "gaussian_sample": lambda inputs, constants, config: sample(inputs.mean, inputs.scale, constants.seed, config),
}
