"""Categorical policies, given by logits; -inf masks a class."""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from .. import dispatch
from ..backends.contract import OPS, OpConfig
from . import _check, _loss
from ._evaluate import evaluate
from ._loss import LossStats
from ._types import Advantage, Backend, CategoricalEstimator, PolicyOptions, Reduction, SurrogateOptions

__all__ = ["categorical_log_prob", "categorical_policy_loss", "categorical_sample", "categorical_surrogate_loss"]


def categorical_sample(
    logits: Tensor,
    num_samples: int,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    row_offset: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Draws labels by inversion of the distribution function, random numbers as in `gaussian_sample`.

    A label is the first class whose distribution function, in float64, is above a uniform number of 53 bits, so that
    rare classes of a vocabulary are drawn and all backends draw the same labels, but for rounding, once in 10**13.

    Args:
        logits: (*, C), one policy a row; -inf masks a class.
        num_samples: G, samples a row.
        seed, stream, row_offset, backend: as in `gaussian_sample`.

    Returns:
        labels, (G, *) int64.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; a row that is all -inf.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, po_kernels as pk
        >>> labels = pk.categorical_sample(torch.tensor([[0.0, 0.0, -torch.inf]]), 1000, seed=0)
        >>> labels.shape, int(labels.max())
        (torch.Size([1000, 1]), 1)
    """
    op = "categorical_sample"
    _, lead, logits = _policy(op, 0, (), logits)
    num_samples = _check.integer(op, "num_samples", num_samples, 1, _check.MOST_SAMPLES)
    config = OpConfig(num_samples=num_samples, row_offset=_check.integer(op, "row_offset", row_offset, 0))
    labels, _ = evaluate(op, backend, (logits,), (_check.seed_tensor(op, seed, stream),), config)
    return labels.reshape(num_samples, *lead)


@overload
def categorical_log_prob(
    logits: Tensor, value: Tensor, *, entropy: Literal[False] = False, backend: Backend | None = None
) -> Tensor: ...
@overload
def categorical_log_prob(
    logits: Tensor, value: Tensor, *, entropy: Literal[True], backend: Backend | None = None
) -> tuple[Tensor, Tensor]: ...
def categorical_log_prob(
    logits: Tensor, value: Tensor, *, entropy: bool = False, backend: Backend | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(value), in nats.

    Args:
        logits: (*, C); -inf masks a class.
        value: integer labels, (..., *), with any dimensions before those of logits, such as the G of samples.
        entropy: also return the entropy of the policy, in nats.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        log p(value), value.shape; float32 for half-precision logits. With entropy, (log_prob, entropy), the entropy of
        shape (*).

    Raises:
        TypeError, ValueError: an argument of another type or shape, a label out of range, a row that is all -inf.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, po_kernels as pk
        >>> pk.categorical_log_prob(torch.zeros(2, 4), torch.tensor([0, 3])).exp()
        tensor([0.2500, 0.2500])
    """
    op = "categorical_log_prob"
    _, lead, logits = _policy(op, 0, (), logits)
    value = _check.integral(op, "value", value, logits)
    batch = _check.batch_before(op, "value", value, lead)
    value = value.reshape(math.prod(batch), logits.shape[0])
    found = evaluate(op, backend, (logits,), (value,), OpConfig())[0].reshape((*batch, *lead))
    if not _check.flag(op, "entropy", entropy):
        return found
    return found, dispatch.entropy(OPS[op].Inputs(logits), "none").reshape(lead)


@overload
def categorical_policy_loss(
    logits: Tensor, target: Tensor, reward_table: Tensor, *,
    estimator: CategoricalEstimator = "exact", return_stats: Literal[False] = False,
    **options: Unpack[PolicyOptions],
) -> Tensor:  # fmt: skip
    ...
@overload
def categorical_policy_loss(
    logits: Tensor, target: Tensor, reward_table: Tensor, *,
    estimator: CategoricalEstimator = "exact", return_stats: Literal[True], **options: Unpack[PolicyOptions],
) -> tuple[Tensor, LossStats]:  # fmt: skip
    ...
@overload
def categorical_policy_loss(
    logits: Tensor, target: Tensor, reward_table: Tensor, *,
    estimator: CategoricalEstimator = "exact", return_stats: bool, **options: Unpack[PolicyOptions],
) -> Tensor | tuple[Tensor, LossStats]:  # fmt: skip
    ...
def categorical_policy_loss(
    logits: Tensor,
    target: Tensor,
    reward_table: Tensor,
    *,
    entropy_coef: float | Tensor = 0.0,
    estimator: CategoricalEstimator = "exact",
    num_samples: int | None = None,
    advantage: Advantage = "loo",
    rbf_gamma: float | None = None,
    reduction: Reduction = "mean",
    seed: int | Tensor | None = None,
    stream: int = 0,
    row_offset: int = 0,
    batch_dims: int = 0,
    return_stats: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Entropy-regularised policy-gradient loss of a categorical under a table of rewards.

    L = -(1/B) Σ_b { E[R[ŷ, y_b]] + λ H_b }   (arXiv 2510.07624, eq. 2)

    with the expectation by enumeration ("exact", derivatives exact) or over G samples: "dice" (score
    function, right to second order; Foerster et al. 2018, arXiv 1802.05098) or "reinforce" (first order;
    a second derivative raises). `logits` and `reward_table` are differentiable, twice.

    Args:
        logits: (*, C), one policy a row, B rows in all; -inf masks a class.
        target: (*) integer labels y in [0, C).
        reward_table: R, (C, C): R[i, j] is the reward of answering i where the label is j.
        estimator: "exact", "dice" or "reinforce".
        rbf_gamma: replaces r by exp(rbf_gamma · r), for all estimators.
        batch_dims: as in `gaussian_policy_loss`: logits (*P, *, C), target (*P, *), reward_table (*P, C, C).
        entropy_coef, num_samples, advantage, reduction, seed, stream, row_offset, return_stats, backend:
            as in `gaussian_policy_loss`.

    Returns:
        loss, () or (*) with reduction="none", and with batch_dims (*P) or (*P, *); float32 for half-precision inputs.
        With return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range; a label out of range; a row
            that is all -inf. Values of device tensors are not read.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, po_kernels as pk
        >>> logits, target = torch.zeros(3, 2, requires_grad=True), torch.tensor([0, 1, 1])
        >>> pk.categorical_policy_loss(logits, target, torch.eye(2) - 1.0).backward()  # a wrong answer costs one
        >>> logits.grad  # of minus the mean reward
        tensor([[-0.0833,  0.0833],
                [ 0.0833, -0.0833],
                [ 0.0833, -0.0833]])
    """
    op = "categorical_policy_loss"
    chosen = _loss.options(
        op, entropy_coef, estimator, num_samples, advantage, rbf_gamma, reduction, row_offset, return_stats, backend
    )
    batch, lead, logits, reward_table = _policy(op, batch_dims, ("reward_table",), logits, reward_table)
    *rows, classes = logits.shape
    target = _check.integral(op, "target", target, logits)
    _check.has_shape(op, "target", target, (*batch, *lead))
    _check.has_shape(op, "reward_table", reward_table, (*batch, classes, classes))
    if batch:
        reward_table = _check.rows(reward_table, rows[0], classes, classes)
    constants = (_check.rows(target, *rows), _loss.seed(op, chosen, seed, stream, batch))
    return _loss.loss(op, chosen, lead, (logits, reward_table), constants, batch)


@overload
def categorical_surrogate_loss(
    logits: Tensor, samples: Tensor, rewards: Tensor, *,
    estimator: Literal["dice", "reinforce"] = "dice", return_stats: Literal[False] = False,
    **options: Unpack[SurrogateOptions],
) -> Tensor:  # fmt: skip
    ...
@overload
def categorical_surrogate_loss(
    logits: Tensor, samples: Tensor, rewards: Tensor, *,
    estimator: Literal["dice", "reinforce"] = "dice", return_stats: Literal[True],
    **options: Unpack[SurrogateOptions],
) -> tuple[Tensor, LossStats]:  # fmt: skip
    ...
@overload
def categorical_surrogate_loss(
    logits: Tensor, samples: Tensor, rewards: Tensor, *,
    estimator: Literal["dice", "reinforce"] = "dice", return_stats: bool, **options: Unpack[SurrogateOptions],
) -> Tensor | tuple[Tensor, LossStats]:  # fmt: skip
    ...
def categorical_surrogate_loss(
    logits: Tensor,
    samples: Tensor,
    rewards: Tensor,
    *,
    entropy_coef: float | Tensor = 0.0,
    estimator: Literal["dice", "reinforce"] = "dice",
    advantage: Advantage = "loo",
    rbf_gamma: float | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """The loss of `categorical_policy_loss` from given samples and rewards: the way in for any reward.

    Args:
        logits: (*, C); -inf masks a class.
        samples: (G, *) integer labels.
        rewards: (G, *), of the samples; differentiable.
        estimator: "dice" or "reinforce".
        entropy_coef, advantage, rbf_gamma, reduction, return_stats, backend: as in `gaussian_policy_loss`.

    Returns:
        loss, () or (*) with reduction="none"; with return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range; a label out of range; a row
            that is all -inf.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, po_kernels as pk
        >>> logits = torch.zeros(3, 2, requires_grad=True)
        >>> samples = pk.categorical_sample(logits, 8, seed=0)
        >>> rewards = (samples == torch.tensor([0, 1, 1])).float()  # whatever can be computed of samples
        >>> pk.categorical_surrogate_loss(logits, samples, rewards, entropy_coef=0.1).backward()
    """
    op = "categorical_surrogate_loss"
    _, lead, logits, rewards = _policy(op, 0, ("rewards",), logits, rewards)
    samples = _check.integral(op, "samples", samples, logits)
    chosen, samples, rewards = _loss.surrogate(
        op, samples, rewards, lead, (), entropy_coef, estimator, advantage, rbf_gamma, reduction, return_stats, backend
    )
    return _loss.loss(op, chosen, lead, (logits, rewards), (samples,))


def _policy(op: str, batch_dims: int, names: Sequence[str], *tensors: Tensor) -> tuple[Any, ...]:
    """The dimensions of problems, the leading ones of rows, logits (B, C), with an axis of problems ahead if there are
    any, and the others as they are."""
    logits, *rest = _check.floating(op, ("logits", *names), *tensors)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits: expected shape (*, C) with C of at least 1, got {_check.shape_of(logits)}")
    batch, lead = _check.batch(op, batch_dims, "logits", logits), logits.shape[batch_dims:-1]
    ahead = (math.prod(batch),) if batch else ()
    return batch, lead, _check.rows(logits, *ahead, math.prod(lead), logits.shape[-1]), *rest
