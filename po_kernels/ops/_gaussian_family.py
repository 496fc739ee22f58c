"""What the diagonal and the full-covariance Gaussian share: all but the shape of the scale."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import OPS, OpConfig
from . import _check, _loss
from ._evaluate import evaluate
from ._loss import LossStats


class Family(NamedTuple):
    """A family of Gaussian policies.

    Attributes:
        name: what its ops begin with.
        scale: the name of its scale.
        axes: how many of the scale's axes are a row's: (D,) or (D, D).
    """

    name: str
    scale: str
    axes: int


def sample(
    family: Family,
    mean: Tensor,
    scale: Tensor,
    num_samples: int,
    seed: int | Tensor | None,
    stream: int,
    row_offset: int,
    backend: str | None,
) -> Tensor:
    op = f"{family.name}_sample"
    dtype = mean.dtype if isinstance(mean, Tensor) else None
    lead, mean, scale = _policy(family, op, (), mean, scale)
    num_samples = _check.integer(op, "num_samples", num_samples, 1, _check.MOST_SAMPLES)
    row_offset = _check.integer(op, "row_offset", row_offset, 0)
    config = OpConfig(num_samples=num_samples, row_offset=row_offset)
    samples, _ = evaluate(op, backend, (mean, scale), (_check.seed_tensor(op, seed, stream),), config)
    return samples.to(dtype).reshape(num_samples, *lead, mean.shape[1])


def log_prob(
    family: Family, mean: Tensor, scale: Tensor, value: Tensor, entropy: bool, backend: str | None
) -> Tensor | tuple[Tensor, Tensor]:
    op = f"{family.name}_log_prob"
    lead, mean, rows, value = _policy(family, op, ("value",), mean, scale, value)
    batch = _check.batch_before(op, "value", value, (*lead, mean.shape[1]))
    value = value.reshape(math.prod(batch), *mean.shape)
    found = evaluate(op, backend, (mean, rows, value), (), OpConfig())[0].reshape((*batch, *lead))
    if not _check.flag(op, "entropy", entropy):
        return found
    # That of a scale that all rows share is one number.
    once = rows if scale.ndim != family.axes else scale.to(rows.dtype).unsqueeze(0)
    bonus = dispatch.entropy(OPS[op].Inputs(mean, once, value), "none")
    return found, bonus.expand(mean.shape[0]).reshape(lead)


def policy_loss(
    family: Family,
    mean: Tensor,
    scale: Tensor,
    target: Tensor,
    precision: Any,
    seed: int | Tensor | None,
    stream: int,
    *given: Any,
) -> Tensor | tuple[Tensor, LossStats]:
    """`given` is what `_loss.options` takes."""
    op = f"{family.name}_policy_loss"
    chosen = _loss.options(op, *given)
    if isinstance(precision, Tensor):
        lead, mean, scale, target, precision = _policy(
            family, op, ("target", "precision"), mean, scale, target, precision
        )
    else:
        lead, mean, scale, target = _policy(family, op, ("target",), mean, scale, target)
        precision = torch.tensor(_check.real(op, "precision", precision), dtype=mean.dtype, device=mean.device)
    dim = mean.shape[1]
    _check.has_shape(op, "target", target, (*lead, dim))
    _check.has_shape(op, "precision", precision, (), (dim,), (dim, dim))
    inputs = (mean, scale, _check.rows(target, *mean.shape), precision)
    return _loss.loss(op, chosen, lead, inputs, (_loss.seed(op, chosen, seed, stream),))


def surrogate_loss(
    family: Family, mean: Tensor, scale: Tensor, samples: Tensor, rewards: Tensor, *given: Any
) -> Tensor | tuple[Tensor, LossStats]:
    """`given` is what `_loss.surrogate` takes."""
    op = f"{family.name}_surrogate_loss"
    lead, mean, scale, samples, rewards = _policy(family, op, ("samples", "rewards"), mean, scale, samples, rewards)
    chosen, samples, rewards = _loss.surrogate(op, samples, rewards, lead, (mean.shape[1],), *given)
    return _loss.loss(op, chosen, lead, (mean, scale, rewards), (samples,))


def _policy(family: Family, op: str, names: Sequence[str], *tensors: Tensor) -> tuple[Any, ...]:
    """The leading dimensions, mean (B, D), the scale (B, D) or (B, D, D), and the others as they are."""
    # Cast before the scale is expanded, for its gradient to be summed over rows in the dtype that is computed with.
    mean, scale, *rest = _check.floating(op, ("mean", family.scale, *names), *tensors)
    if not mean.shape or mean.shape[-1] < 1:
        raise ValueError(f"{op}: mean: expected shape (*, D) with D of at least 1, got {_check.shape_of(mean)}")
    lead, dim = mean.shape[:-1], mean.shape[-1]
    event = (dim,) * family.axes
    _check.has_shape(op, family.scale, scale, (*lead, *event), event)
    if len(lead) != 1 or scale.ndim == family.axes:
        rows = math.prod(lead)
        if scale.ndim == family.axes:
            scale = scale.expand(rows, *event)
        mean, scale = _check.rows(mean, rows, dim), _check.rows(scale, rows, *event)
    return lead, mean, scale, *rest
