"""The path that every loss op takes from checked, flattened tensors to a reduced loss."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import OpConfig
from . import _autograd, _check

HALF = (torch.bfloat16, torch.float16)


class LossStats(NamedTuple):
    """Detached statistics of a loss, per row of shape (*) with reduction="none", else means over rows ().

    Attributes:
        reward_mean: mean reward of the row's samples (after `rbf_gamma`); its expectation for a closed form.
        reward_std: standard deviation of the same, with G in the denominator.
        entropy: entropy of the policy, in nats, summed over dimensions.
        log_prob: log-probability of the target, in nats: its negated mean is the outer loss. A surrogate
            loss has no target and reports the mean log-probability of its samples.
        advantage_std: standard deviation of the advantages; for a closed form that of r - E[r].
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


def options(op: str, **given: Any) -> LossOptions:
    """`_options`, remembered: a training loop asks for the same ones at each step."""
    if torch.compiler.is_compiling():
        return _options(op, **given)
    try:
        return _remembered(op, **given)
    except TypeError:  # what cannot be hashed is no option: the error should say so
        return _options(op, **given)


def _options(
    op: str,
    *,
    estimator: str,
    allowed: tuple[str, ...],
    closed_form: str | None,
    num_samples: int | None,
    advantage: str,
    rbf_gamma: float | None,
    entropy_coef: float,
    reduction: str,
    row_offset: int,
    return_stats: bool,
    backend: str | None,
) -> LossOptions:
    _check.choice(op, "estimator", estimator, allowed)
    _check.choice(op, "advantage", advantage, _check.ADVANTAGES)
    _check.choice(op, "reduction", reduction, _check.REDUCTIONS)
    if estimator == closed_form:
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
    config = OpConfig(
        estimator,
        num_samples,
        advantage,
        None if rbf_gamma is None else _check.real(op, "rbf_gamma", rbf_gamma),
        _check.real(op, "entropy_coef", entropy_coef),
        reduction,
        _check.integer(op, "row_offset", row_offset, 0),
    )
    return LossOptions(config, _check.flag(op, "return_stats", return_stats), backend)


_remembered = functools.lru_cache(maxsize=256, typed=True)(_options)


def computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Floating tensors in the dtype they are computed with: half-precision inputs are read as such, then float32."""
    return tuple([x.float() if x.dtype in HALF else x for x in tensors])


def evaluate(
    op: str,
    chosen: LossOptions,
    lead: Sequence[int],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    row_axis: tuple[int | None, ...],
) -> Tensor | tuple[Tensor, LossStats]:
    """Runs op on flattened rows.

    Args:
        lead: the leading dimensions that the rows were flattened from.
        inputs: the differentiable tensors; all have one dtype and one device.
        constants: labels or samples, then the seed if samples are drawn.
        row_axis: the axis of each input that counts rows, None if shared.
    """
    inputs, constants = computed(*inputs), computed(*constants)
    config = chosen.config
    backend = dispatch.select(op, inputs[0].device.type, inputs[0].dtype, chosen.backend)
    # Plain torch would differentiate `reinforce` twice, wrongly; a compiled function refuses that by itself.
    if backend == "reference" and (config.estimator != "reinforce" or torch.compiler.is_compiling()):
        rows, *statistics = dispatch.plain(op)(inputs, constants, config)
        loss = reduce(rows, config.reduction)
        averaged = "none" if config.reduction == "none" else "mean"
        stats = tuple(reduce(column, averaged) for column in statistics)
    else:
        call = _autograd.Call(op, backend, config, chosen.return_stats, row_axis)
        loss, stacked = _autograd.value(call, inputs, constants)
        stats = stacked.unbind(0) if chosen.return_stats else ()
    if config.reduction == "none":
        loss = _check.rows(loss, *lead)
        stats = tuple(_check.rows(column, *lead) for column in stats)
    return (loss, LossStats(*stats)) if chosen.return_stats else loss


def reduce(rows: Tensor, reduction: str) -> Tensor:
    """(B,) -> () or, for "none", (B,). The mean of no rows is zero."""
    if reduction == "none":
        return rows
    total = rows.sum()
    return total / max(rows.shape[0], 1) if reduction == "mean" else total


def precision_tensor(op: str, precision: Any, mean: Tensor) -> Tensor:
    """`precision` as a tensor like mean (*, D), of shape (), (D,) or (D, D)."""
    if isinstance(precision, Tensor):
        _check.floating(op, mean=mean, precision=precision)
    else:
        precision = torch.tensor(_check.real(op, "precision", precision), dtype=mean.dtype, device=mean.device)
    dim = mean.shape[-1]
    _check.has_shape(op, "precision", precision, (), (dim,), (dim, dim))
    return precision


def no_rbf_in_closed_form(op: str, chosen: LossOptions, closed_form: str) -> None:
    if chosen.config.estimator == closed_form and chosen.config.rbf_gamma is not None:
        raise ValueError(
            f"{op}: rbf_gamma: expected None with estimator={closed_form!r}, which is the expectation of the "
            f"plain reward, got {chosen.config.rbf_gamma}; use a sampled estimator"
        )


def surrogate(
    op: str,
    samples: Tensor,
    rewards: Tensor,
    lead: Sequence[int],
    event: tuple[int, ...],
    *,
    allowed: tuple[str, ...],
    estimator: str,
    advantage: str,
    rbf_gamma: float | None,
    entropy_coef: float,
    reduction: str,
    return_stats: bool,
    backend: str | None,
) -> tuple[LossOptions, Tensor, Tensor]:
    """Checked options, samples (G, B, *event) and rewards (G, B) of a surrogate loss."""
    if rewards.ndim < 1:
        raise ValueError(f"{op}: rewards: expected shape (G, *), got ()")
    num_samples = rewards.shape[0]
    _check.has_shape(op, "rewards", rewards, (num_samples, *lead))
    _check.has_shape(op, "samples", samples, (num_samples, *lead, *event))
    _check.choice(op, "advantage", advantage, _check.ADVANTAGES)
    _check.group_size(op, "rewards", num_samples, advantage)
    chosen = options(
        op, estimator=estimator, allowed=allowed, closed_form=None, num_samples=num_samples, advantage=advantage,
        rbf_gamma=rbf_gamma, entropy_coef=entropy_coef, reduction=reduction, row_offset=0,
        return_stats=return_stats, backend=backend,
    )  # fmt: skip
    rows = math.prod(lead)
    return chosen, _check.rows(samples, num_samples, rows, *event), _check.rows(rewards, num_samples, rows)
