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
    _, lead, mean, scale = _policy(family, op, 0, (), mean, scale)
    num_samples = _check.integer(op, "num_samples", num_samples, 1, _check.MOST_SAMPLES)
    row_offset = _check.integer(op, "row_offset", row_offset, 0)
    config = OpConfig(num_samples=num_samples, row_offset=row_offset)
    samples, _ = evaluate(op, backend, (mean, scale), (_check.seed_tensor(op, seed, stream),), config)
    return samples.to(dtype).reshape(num_samples, *lead, mean.shape[1])


def log_prob(
    family: Family, mean: Tensor, scale: Tensor, value: Tensor, entropy: bool, backend: str | None
) -> Tensor | tuple[Tensor, Tensor]:
    op = f"{family.name}_log_prob"
    _, lead, mean, rows, value = _policy(family, op, 0, ("value",), mean, scale, value)
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
    batch_dims: int,
    *given: Any,
) -> Tensor | tuple[Tensor, LossStats]:
    """`given` is what `_loss.options` takes."""
    op = f"{family.name}_policy_loss"
    chosen = _loss.options(op, *given)
    if isinstance(precision, Tensor):
        batch, lead, mean, scale, target, precision = _policy(
            family, op, batch_dims, ("target", "precision"), mean, scale, target, precision
        )
    else:
        batch, lead, mean, scale, target = _policy(family, op, batch_dims, ("target",), mean, scale, target)
        precision = torch.tensor(_check.real(op, "precision", precision), dtype=mean.dtype, device=mean.device)
        precision = precision.expand(batch)
    dim = mean.shape[-1]
    _check.has_shape(op, "target", target, (*batch, *lead, dim))
    _check.has_shape(op, "precision", precision, batch, (*batch, dim), (*batch, dim, dim))
    if batch:
        precision = precision.flatten(0, len(batch) - 1)
    inputs = (mean, scale, _check.rows(target, *mean.shape), precision)
    return _loss.loss(op, chosen, lead, inputs, (_loss.seed(op, chosen, seed, stream, batch),), batch)


def surrogate_loss(
    family: Family, mean: Tensor, scale: Tensor, samples: Tensor, rewards: Tensor, *given: Any
) -> Tensor | tuple[Tensor, LossStats]:
    """`given` is what `_loss.surrogate` takes."""
    op = f"{family.name}_surrogate_loss"
    names = ("samples", "rewards")
    _, lead, mean, scale, samples, rewards = _policy(family, op, 0, names, mean, scale, samples, rewards)
    chosen, samples, rewards = _loss.surrogate(op, samples, rewards, lead, (mean.shape[1],), *given)
    return _loss.loss(op, chosen, lead, (mean, scale, rewards), (samples,))


def _policy(family: Family, op: str, batch_dims: int, names: Sequence[str], *tensors: Tensor) -> tuple[Any, ...]:
    """The dimensions of problems, the leading ones of rows, mean (B, D), the scale (B, D) or (B, D, D), and the others
    as they are. Of a batch of problems mean and scale have one axis more, ahead."""
    # Cast before the scale is expanded, for its gradient to be summed over rows in the dtype that is computed with.
    mean, scale, *rest = _check.floating(op, ("mean", family.scale, *names), *tensors)
    if not mean.shape or mean.shape[-1] < 1:
        raise ValueError(f"{op}: mean: expected shape (*, D) with D of at least 1, got {_check.shape_of(mean)}")
    batch, lead, dim = _check.batch(op, batch_dims, "mean", mean), mean.shape[batch_dims:-1], mean.shape[-1]
    event = (dim,) * family.axes
    _check.has_shape(op, family.scale, scale, (*batch, *lead, *event), (*batch, *event))
    shared = scale.ndim == len(batch) + family.axes
    if len(lead) != 1 or shared or batch:
        rows, ahead = math.prod(lead), (math.prod(batch),) if batch else ()
        if shared:
            scale = _check.rows(scale, *ahead, 1, *event).expand(*ahead, rows, *event)
        mean, scale = _check.rows(mean, *ahead, rows, dim), _check.rows(scale, *ahead, rows, *event)
    return batch, lead, mean, scale, *rest
