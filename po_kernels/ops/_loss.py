"""What all loss ops share: their options, statistics and shapes."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..backends.advantages import ADVANTAGES
from ..backends.contract import OPS, REDUCTIONS, OpConfig
from . import _check, _modes
from ._evaluate import evaluate


class LossStats(NamedTuple):
    """Detached statistics of a loss, per row of shape (*) with reduction="none", else means over rows ().

    Attributes:
        reward_mean: mean reward of the row's samples (after `rbf_gamma`); its expectation for a closed form.
        reward_std: standard deviation of the same, with G in the denominator.
        entropy: entropy of the policy, in nats, summed over dimensions.
        log_prob: log-probability of the target, in nats: its negated mean is the outer loss. A surrogate
            loss has no target and reports the mean log-probability of its samples.
        advantage_std: standard deviation of the advantages; for a closed form that of r - E[r].

    Example:
        >>> import torch, po_kernels as pk
        >>> mean, target = torch.zeros(4, 2), torch.ones(4, 2)
        >>> loss, stats = pk.gaussian_policy_loss(mean, torch.zeros(2), target, 1.0, return_stats=True)
        >>> isinstance(stats, pk.LossStats), stats.reward_mean
        (True, tensor(-4.))
    """

    reward_mean: Tensor
    reward_std: Tensor
    entropy: Tensor
    log_prob: Tensor
    advantage_std: Tensor


class LossOptions(NamedTuple):
    """What all loss ops take besides their tensors, checked by `options`."""

    config: OpConfig
    return_stats: bool
    backend: str | None
    entropy_coef: Tensor | None = None


def options(op: str, entropy_coef: float | Tensor, *given: Any) -> LossOptions:
    """`_options`, remembered: a training loop asks for the same ones at each step.

    A tensor for entropy_coef stays apart from the kernels' options, which are numbers.
    """
    if isinstance(entropy_coef, Tensor):
        return options(op, 0.0, *given)._replace(entropy_coef=entropy_coef)
    if torch.compiler.is_compiling():
        return _options(op, entropy_coef, *given)
    try:
        return _remembered(op, entropy_coef, *given)
    except TypeError:  # what cannot be hashed is no option: the error should say so
        return _options(op, entropy_coef, *given)


def _options(
    op: str,
    entropy_coef: float,
    estimator: str,
    num_samples: int | None,
    advantage: str,
    rbf_gamma: float | None,
    reduction: str,
    row_offset: int,
    return_stats: bool,
    backend: str | None,
) -> LossOptions:
    table = OPS[op]
    _check.choice(op, "estimator", estimator, table.estimators)
    _check.choice(op, "advantage", advantage, tuple(ADVANTAGES))
    _check.choice(op, "reduction", reduction, tuple(REDUCTIONS))
    if estimator == table.closed_form:
        if num_samples is not None:
            raise ValueError(
                f"{op}: num_samples: expected None with estimator={estimator!r}, which draws no samples, "
                f"got {num_samples!r}"
            )
        num_samples = 0
    else:
        if num_samples is None:
            raise ValueError(f"{op}: num_samples: expected an integer with estimator={estimator!r}, got None")
        num_samples = _check.integer(op, "num_samples", num_samples, 1, _check.MOST_SAMPLES)
        if estimator != "reparam":
            _check.group_size(op, "num_samples", num_samples, advantage)
        elif num_samples < ADVANTAGES[advantage].least:
            advantage = "mean"  # of no use but to the statistics, where one sample deviates by nothing
    gamma = None if rbf_gamma is None else _check.real(op, "rbf_gamma", rbf_gamma)
    if estimator == "analytic" and gamma is not None:
        raise ValueError(
            f"{op}: rbf_gamma: expected None with estimator='analytic', which is the expectation of the "
            f"plain reward, got {gamma}; use a sampled estimator"
        )
    config = OpConfig(
        estimator,
        num_samples,
        advantage,
        gamma,
        _check.real(op, "entropy_coef", entropy_coef),
        reduction,
        _check.integer(op, "row_offset", row_offset, 0),
    )
    return LossOptions(config, _check.flag(op, "return_stats", return_stats), backend)


_remembered = functools.lru_cache(maxsize=256, typed=True)(_options)


def loss(
    op: str,
    chosen: LossOptions,
    lead: Sequence[int],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor | None],
    batch: Sequence[int] = (),
) -> Tensor | tuple[Tensor, LossStats]:
    """Runs op on flattened rows, whose leading dimensions were `lead`, of problems whose dimensions were `batch`."""
    config, return_stats, backend, coefficient = chosen
    weight = None if coefficient is None else _check.coefficient(op, coefficient, inputs[0])
    value, stats = evaluate(op, backend, inputs, constants, config, return_stats, math.prod(batch) if batch else 0)
    if weight is not None:

        def entropy(*inputs: Tensor) -> Tensor:
            return dispatch.entropy(OPS[op].Inputs(*inputs), config.reduction)

        value = value - weight * (torch.func.vmap(entropy) if batch else entropy)(*inputs)
    if config.reduction == "none" or batch:
        shape = (*batch, *lead) if config.reduction == "none" else batch
        value = _check.rows(value, *shape)
        stats = tuple([_check.rows(column, *shape) for column in stats])
    return (value, LossStats(*stats)) if return_stats else value


def seed(
    op: str, chosen: LossOptions, given: int | Tensor | None, stream: int, batch: Sequence[int] = ()
) -> Tensor | None:
    """The key of an estimator that draws samples, and of a batch of problems one for each."""
    if chosen.config.num_samples or given is not None or stream:
        key = _check.seed_tensor(op, given, stream, batch)
        if batch:
            key = key.reshape(-1).expand(math.prod(batch))
        return key if chosen.config.num_samples else None
    return None


def surrogate(
    op: str,
    samples: Tensor,
    rewards: Tensor,
    lead: Sequence[int],
    event: tuple[int, ...],
    entropy_coef: float | Tensor,
    estimator: str,
    advantage: str,
    *others: Any,
) -> tuple[LossOptions, Tensor, Tensor]:
    """Checked options, samples (G, B, *event) and rewards (G, B) of a surrogate loss.

    Args:
        others: rbf_gamma, reduction, return_stats and backend.
    """
    if rewards.ndim < 1:
        raise ValueError(f"{op}: rewards: expected shape (G, *), got ()")
    num_samples = rewards.shape[0]
    _check.has_shape(op, "rewards", rewards, (num_samples, *lead))
    _check.has_shape(op, "samples", samples, (num_samples, *lead, *event))
    _check.choice(op, "advantage", advantage, tuple(ADVANTAGES))
    _check.choice(op, "estimator", estimator, OPS[op].estimators)
    if estimator != "reparam":
        _check.group_size(op, "rewards", num_samples, advantage)
        if _modes.has_derivative(samples):
            raise ValueError(
                f"{op}: samples: expected constants with estimator={estimator!r}, got a tensor that requires grad, "
                "whose derivative would be dropped; score samples.detach(), or use estimator='reparam'"
            )
    rbf_gamma, reduction, *rest = others
    chosen = options(op, entropy_coef, estimator, num_samples, advantage, rbf_gamma, reduction, 0, *rest)
    rows = math.prod(lead)
    return chosen, _check.rows(samples, num_samples, rows, *event), _check.rows(rewards, num_samples, rows)
