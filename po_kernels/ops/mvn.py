"""Gaussian policies with a full covariance Σ = L Lᵀ, given by L (`scale_tril`)."""

from collections.abc import Sequence

from torch import Tensor

from ..backends.contract import OpConfig
from . import _check, _loss, _value
from ._loss import LossStats

_ESTIMATORS = ("analytic", "reparam", "dice", "reinforce")


def mvn_sample(
    mean: Tensor,
    scale_tril: Tensor,
    num_samples: int,
    *,
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Draws ŷ = mean + L ε, ε ~ N(0, I), differentiable along the path; random numbers as in `gaussian_sample`.

    Args:
        mean: (*, D), one policy a row.
        scale_tril: L, (*, D, D) or (D, D), lower triangular with a positive diagonal.
        num_samples: G, samples a row.
        seed, row_offset, backend: as in `gaussian_sample`.

    Returns:
        samples, (G, *, D).

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; L not triangular, or singular.
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "mvn_sample"
    dtype = mean.dtype if isinstance(mean, Tensor) else None
    mean, scale_tril, lead = _policy(op, mean, scale_tril)
    num_samples = _check.integer(op, "num_samples", num_samples, 1, _check.MOST_SAMPLES)
    row_offset = _check.integer(op, "row_offset", row_offset, 0)
    config = OpConfig(num_samples=num_samples, row_offset=row_offset)
    samples = _value.evaluate(op, backend, (mean, scale_tril), (_check.seed_tensor(op, seed),), config)
    return samples.to(dtype).reshape(num_samples, *lead, mean.shape[1])


def mvn_log_prob(mean: Tensor, scale_tril: Tensor, value: Tensor, *, backend: str | None = None) -> Tensor:
    """Joint log-density of `value`, in nats.

    Args:
        mean: (*, D).
        scale_tril: (*, D, D) or (D, D), lower triangular with a positive diagonal.
        value: (..., *, D), with any dimensions before those of mean, such as the G of samples.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        log p(value), value.shape[:-1]; float32 for half-precision inputs.

    Raises:
        TypeError, ValueError: an argument of another type or shape; L not triangular, or singular.
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "mvn_log_prob"
    mean, scale_tril, lead = _policy(op, mean, scale_tril, value=value)
    batch = _check.batch_before(op, "value", value, (*lead, mean.shape[1]))
    (value,) = _loss.computed(value.reshape(batch.numel(), *mean.shape))
    return _value.evaluate(op, backend, (mean, scale_tril, value), (), OpConfig()).reshape((*batch, *lead))


def mvn_policy_loss(
    mean: Tensor,
    scale_tril: Tensor,
    target: Tensor,
    precision: Tensor | float,
    *,
    entropy_coef: float = 0.0,
    estimator: str = "analytic",
    num_samples: int | None = None,
    advantage: str = "loo",
    rbf_gamma: float | None = None,
    reduction: str = "mean",
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """`gaussian_policy_loss` for a policy N(mean, L Lᵀ).

    Args:
        mean: (*, D), one policy a row, B rows in all.
        scale_tril: L, (*, D, D) or (D, D), lower triangular with a positive diagonal.
        target, precision and all options: as in `gaussian_policy_loss`.

    Returns:
        loss, () or (*) with reduction="none"; float32 for half-precision inputs. With return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range; L not triangular, or singular.
            Values of device tensors are not read.
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "mvn_policy_loss"
    original = mean
    mean, scale_tril, lead = _policy(op, mean, scale_tril, target=target)
    _check.has_shape(op, "target", target, original.shape)
    precision = _loss.precision_tensor(op, precision, original)
    options = _loss.options(
        op, estimator=estimator, allowed=_ESTIMATORS, closed_form="analytic", num_samples=num_samples,
        advantage=advantage, rbf_gamma=rbf_gamma, entropy_coef=entropy_coef, reduction=reduction,
        row_offset=row_offset, return_stats=return_stats, backend=backend,
    )  # fmt: skip
    _loss.no_rbf_in_closed_form(op, options, "analytic")
    constants = [_check.seed_tensor(op, seed)] if options.config.num_samples else []
    inputs = (mean, scale_tril, _check.rows(target, *mean.shape), precision)
    return _loss.evaluate(op, options, lead, inputs, constants, (0, 0, 0, None))


def mvn_surrogate_loss(
    mean: Tensor,
    scale_tril: Tensor,
    samples: Tensor,
    rewards: Tensor,
    *,
    entropy_coef: float = 0.0,
    estimator: str = "dice",
    advantage: str = "loo",
    rbf_gamma: float | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """`gaussian_surrogate_loss` for a policy N(mean, L Lᵀ).

    Args:
        mean: (*, D).
        scale_tril: L, (*, D, D) or (D, D), lower triangular with a positive diagonal.
        samples, rewards and all options: as in `gaussian_surrogate_loss`.

    Returns:
        loss, () or (*) with reduction="none"; with return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range; L not triangular, or singular.
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "mvn_surrogate_loss"
    mean, scale_tril, lead = _policy(op, mean, scale_tril, samples=samples, rewards=rewards)
    options, samples, rewards = _loss.surrogate(
        op, samples, rewards, lead, (mean.shape[1],), allowed=_check.SURROGATES, estimator=estimator,
        advantage=advantage, rbf_gamma=rbf_gamma, entropy_coef=entropy_coef, reduction=reduction,
        return_stats=return_stats, backend=backend,
    )  # fmt: skip
    return _loss.evaluate(op, options, lead, (mean, scale_tril, rewards), (samples,), (0, 0, 1))


def _policy(op: str, mean: Tensor, scale_tril: Tensor, **others: Tensor) -> tuple[Tensor, Tensor, Sequence[int]]:
    """mean (B, D), scale_tril (B, D, D), and the leading dimensions."""
    _check.floating(op, mean=mean, scale_tril=scale_tril, **others)
    if mean.ndim < 1 or mean.shape[-1] < 1:
        raise ValueError(f"{op}: mean: expected shape (*, D) with D of at least 1, got {_check.shape_of(mean)}")
    lead, dim = mean.shape[:-1], mean.shape[-1]
    _check.has_shape(op, "scale_tril", scale_tril, (*lead, dim, dim), (dim, dim))
    rows = lead.numel()
    # Before scale_tril is expanded, for its gradient to be summed over rows in the dtype that is computed with.
    mean, scale_tril = _loss.computed(mean, scale_tril)
    if scale_tril.ndim == 2 and lead:
        matrices = scale_tril.expand(rows, dim, dim)
    else:
        matrices = _check.rows(scale_tril, rows, dim, dim)
    return _check.rows(mean, rows, dim), matrices, lead
