"""What the diagonal and the full-covariance Gaussian share: all but the shape of the scale."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import OpConfig
from . import _check, _loss
from ._evaluate import HALF, evaluate
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
    row_offset: int,
    backend: str | None,
) -> Tensor:
    op = f"{family.name}_sample"
    dtype = mean.dtype if isinstance(mean, Tensor) else None
    mean, scale, lead = _policy(family, op, mean, scale)
    num_samples = _check.integer(op, "num_samples", num_samples, 1, _check.MOST_SAMPLES)
    row_offset = _check.integer(op, "row_offset", row_offset, 0)
    config = OpConfig(num_samples=num_samples, row_offset=row_offset)
    samples, _ = evaluate(op, backend, (mean, scale), (_check.seed_tensor(op, seed),), config)
    return samples.to(dtype).reshape(num_samples, *lead, mean.shape[1])


def log_prob(family: Family, mean: Tensor, scale: Tensor, value: Tensor, backend: str | None) -> Tensor:
    op = f"{family.name}_log_prob"
    mean, scale, lead = _policy(family, op, mean, scale, value=value)
    batch = _check.batch_before(op, "value", value, (*lead, mean.shape[1]))
    value = value.reshape(batch.numel(), *mean.shape)
    return evaluate(op, backend, (mean, scale, value), (), OpConfig())[0].reshape((*batch, *lead))


def policy_loss(
    family: Family,
    mean: Tensor,
    scale: Tensor,
    target: Tensor,
    precision: Tensor | float,
    seed: int | Tensor | None,
    *given: Any,
) -> Tensor | tuple[Tensor, LossStats]:
    """`given` is what `_loss.options` takes."""
    op = f"{family.name}_policy_loss"
    chosen = _loss.options(op, *given)
    if isinstance(precision, Tensor):
        mean, scale, lead = _policy(family, op, mean, scale, target=target, precision=precision)
    else:
        mean, scale, lead = _policy(family, op, mean, scale, target=target)
        precision = torch.tensor(_check.real(op, "precision", precision), dtype=target.dtype, device=target.device)
    dim = mean.shape[1]
    _check.has_shape(op, "target", target, (*lead, dim))
    _check.has_shape(op, "precision", precision, (), (dim,), (dim, dim))
    inputs = (mean, scale, _check.rows(target, *mean.shape), precision)
    return _loss.loss(op, chosen, lead, inputs, (_loss.seed(op, chosen, seed),))


def surrogate_loss(
    family: Family, mean: Tensor, scale: Tensor, samples: Tensor, rewards: Tensor, *given: Any
) -> Tensor | tuple[Tensor, LossStats]:
    """`given` is what `_loss.surrogate` takes."""
    op = f"{family.name}_surrogate_loss"
    mean, scale, lead = _policy(family, op, mean, scale, samples=samples, rewards=rewards)
    chosen, samples, rewards = _loss.surrogate(op, samples, rewards, lead, (mean.shape[1],), *given)
    return _loss.loss(op, chosen, lead, (mean, scale, rewards), (samples,))


def _policy(
    family: Family, op: str, mean: Tensor, scale: Tensor, **others: Tensor
) -> tuple[Tensor, Tensor, torch.Size]:
    """mean (B, D), the scale (B, D) or (B, D, D), and the leading dimensions."""
    _check.floating(op, **{"mean": mean, family.scale: scale}, **others)
    if mean.ndim < 1 or mean.shape[-1] < 1:
        raise ValueError(f"{op}: mean: expected shape (*, D) with D of at least 1, got {_check.shape_of(mean)}")
    lead, dim = mean.shape[:-1], mean.shape[-1]
    event = (dim,) * family.axes
    _check.has_shape(op, family.scale, scale, (*lead, *event), event)
    rows = lead.numel()
    # Before the scale is expanded, for its gradient to be summed over rows in the dtype that is computed with.
    if mean.dtype in HALF:
        mean, scale = mean.float(), scale.float()
    if scale.ndim == family.axes:
        scale = scale.expand(rows, *event)
    return _check.rows(mean, rows, dim), _check.rows(scale, rows, *event), lead
