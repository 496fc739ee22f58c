"""Full-covariance Gaussian in plain torch. Rows are flattened: mean (B, D), scale_tril (B, D, D)."""

from typing import Any

import torch
from torch import Tensor

from ..contract import Definitions, OpConfig
from . import philox
from .gaussian import LOG_2PI
from .losses import RowLoss, quadratic_form, sampled_loss, symmetric


def sample(mean: Tensor, scale_tril: Tensor, seed: Tensor, config: OpConfig) -> Tensor:
    """(G, B, D), pathwise differentiable in mean and scale_tril."""
    noise = philox.normal(seed, config.num_samples, mean.shape[0], mean.shape[1], config.row_offset, mean)
    return mean + (torch.tril(scale_tril) @ noise.unsqueeze(-1)).squeeze(-1)


def log_prob(mean: Tensor, scale_tril: Tensor, value: Tensor) -> Tensor:
    """Joint log-density, (..., B, D) -> (..., B)."""
    residual = (value - mean).movedim(-2, 0).reshape(mean.shape[0], value.shape[:-2].numel(), mean.shape[1])
    whitened = torch.linalg.solve_triangular(scale_tril, residual.mT, upper=False)
    square = whitened.square().sum(dim=-2).reshape(mean.shape[0], *value.shape[:-2]).movedim(0, -1)
    return -0.5 * (square + mean.shape[1] * LOG_2PI) - log_determinant(scale_tril)


def log_determinant(scale_tril: Tensor) -> Tensor:
    """log det L, (B, D, D) -> (B,)."""
    return scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)


def entropy(scale_tril: Tensor) -> Tensor:
    """(B, D, D) -> (B,)."""
    return log_determinant(scale_tril) + 0.5 * scale_tril.shape[-1] * (LOG_2PI + 1.0)


def policy_loss(inputs: Any, constants: Any, config: OpConfig) -> RowLoss:
    mean, scale_tril, target, precision = inputs
    target_log_prob = log_prob(mean, scale_tril, target).detach()
    if config.estimator == "analytic":
        delta = mean - target
        tril = torch.tril(scale_tril)
        weighted = _apply(precision, tril)
        reward = -quadratic_form(delta, precision) - (tril * weighted).sum(dim=(-2, -1))
        std = _reward_std(delta.detach(), tril.detach(), precision.detach())
        h = entropy(scale_tril)
        return RowLoss(-(reward + config.entropy_coef * h), reward.detach(), std, h.detach(), target_log_prob, std)
    samples = sample(mean, scale_tril, constants.seed, config)
    if config.estimator != "reparam":
        samples = samples.detach()
    return sampled_loss(
        -quadratic_form(samples - target, precision),
        None if config.estimator == "reparam" else log_prob(mean, scale_tril, samples),
        entropy(scale_tril),
        target_log_prob,
        config,
    )


def _apply(precision: Tensor, tril: Tensor) -> Tensor:
    """U L, (B, D, D)."""
    if precision.ndim == 2:
        return symmetric(precision) @ tril
    return (precision.unsqueeze(-1) if precision.ndim == 1 else precision) * tril


def _reward_std(delta: Tensor, tril: Tensor, precision: Tensor) -> Tensor:
    """Standard deviation of dᵀUd for d ~ N(delta, LLᵀ): Var = 2 ‖LᵀUL‖² + 4 ‖LᵀUδ‖²."""
    weighted = _apply(precision, tril)
    trace = (tril.mT @ weighted).square().sum(dim=(-2, -1))
    linear = (weighted.mT @ delta.unsqueeze(-1)).square().sum(dim=(-2, -1))
    return torch.sqrt(2.0 * trace + 4.0 * linear)


def surrogate_loss(inputs: Any, constants: Any, config: OpConfig) -> RowLoss:
    mean, scale_tril, rewards = inputs
    sample_log_prob = log_prob(mean, scale_tril, constants.samples.detach())
    return sampled_loss(
        rewards,
        None if config.estimator == "reparam" else sample_log_prob,
        entropy(scale_tril),
        sample_log_prob.detach().mean(dim=0),
        config,
    )


DEFINITIONS: Definitions = {
    "mvn_policy_loss": policy_loss,
    "mvn_surrogate_loss": surrogate_loss,
    "mvn_log_prob": lambda inputs, constants, config: log_prob(*inputs),
    "mvn_sample": lambda inputs, constants, config: sample(inputs.mean, inputs.scale, constants.seed, config),
}
