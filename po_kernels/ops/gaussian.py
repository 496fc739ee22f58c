"""Diagonal Gaussian policies."""

from collections.abc import Sequence

from torch import Tensor

from ..backends.contract import OpConfig
from . import _check, _loss, _value
from ._loss import LossStats

_ESTIMATORS = ("analytic", "reparam", "dice", "reinforce")


def gaussian_sample(
    mean: Tensor,
    log_std: Tensor,
    num_samples: int,
    *,
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Draws ŷ = mean + exp(log_std) ε, ε ~ N(0, I), differentiable along the path.

    Random numbers are counter-based (Philox4x32-10, Salmon et al. 2011, and Box-Muller): the same seed
    gives the same samples on every backend and device, for any number of threads, batch or shard.

    Args:
        mean: (*, D), one policy a row.
        log_std: (*, D) or (D,), log of the standard deviation.
        num_samples: G, samples a row.
        seed: 64-bit seed, or an int64 scalar tensor; None draws one from torch's default CPU generator.
        row_offset: number of the first row, for a shard of a larger batch.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        samples, (G, *, D).

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "gaussian_sample"
    dtype = mean.dtype if isinstance(mean, Tensor) else None
    mean, log_std, lead = _policy(op, mean, log_std)
    num_samples = _check.integer(op, "num_samples", num_samples, 1, _check.MOST_SAMPLES)
    row_offset = _check.integer(op, "row_offset", row_offset, 0)
    config = OpConfig(num_samples=num_samples, row_offset=row_offset)
    samples = _value.evaluate(op, backend, (mean, log_std), (_check.seed_tensor(op, seed),), config)
    return samples.to(dtype).reshape(num_samples, *lead, mean.shape[1])


def gaussian_log_prob(mean: Tensor, log_std: Tensor, value: Tensor, *, backend: str | None = None) -> Tensor:
    """Joint log-density of `value`, in nats: a sum over the D dimensions.

    Args:
        mean: (*, D).
        log_std: (*, D) or (D,).
        value: (..., *, D), with any dimensions before those of mean, such as the G of samples.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        log p(value), value.shape[:-1]; float32 for half-precision inputs.

    Raises:
        TypeError, ValueError: an argument of another type or shape.
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "gaussian_log_prob"
    mean, log_std, lead = _policy(op, mean, log_std, value=value)
    batch = _check.batch_before(op, "value", value, (*lead, mean.shape[1]))
    (value,) = _loss.computed(value.reshape(batch.numel(), *mean.shape))
    return _value.evaluate(op, backend, (mean, log_std, value), (), OpConfig()).reshape((*batch, *lead))


def gaussian_policy_loss(
    mean: Tensor,
    log_std: Tensor,
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
    """Entropy-regularised policy-gradient loss of a diagonal Gaussian under a Mahalanobis reward.

    L = -(1/B) Σ_b { E[r(ŷ, y_b)] + λ H_b },  r(ŷ, y) = -(ŷ-y)ᵀ U (ŷ-y)   (arXiv 2510.07624, eq. 2)

    with the expectation in closed form ("analytic") or over G samples. The value is the same estimate for
    each sampled estimator; they differ in their derivatives:

    - "analytic": exact; "reparam": through the samples, which are differentiable;
    - "dice": score function, right to second order (Foerster et al. 2018, arXiv 1802.05098);
    - "reinforce": score function, first order (Williams 1992); a second derivative raises.

    All floating tensors are differentiable, twice, in reverse and forward mode: `precision` is how the
    outer loop of bilevel training reaches this loss.

    Args:
        mean: (*, D), one policy a row, B rows in all.
        log_std: (*, D) or (D,), log of the standard deviation.
        target: (*, D), the observed y.
        precision: U, positive: () or a number for u·I, (D,) for a diagonal, (D, D) for its symmetric part.
        entropy_coef: λ, in units of reward per nat.
        estimator: "analytic", "reparam", "dice" or "reinforce".
        num_samples: G, required by the sampled estimators; at least 2 with advantage="loo".
        advantage: baseline of the score function: "none", "min", "mean", "loo" or "standardized";
            "analytic" and "reparam" have no use for it.
        rbf_gamma: replaces r by exp(rbf_gamma · r); sampled estimators only.
        reduction: "mean" or "sum" over rows, or "none".
        seed: 64-bit seed, or an int64 scalar tensor; None draws one from torch's default CPU generator.
        row_offset: number of the first row, for a shard of a larger batch.
        return_stats: also return `LossStats`.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        loss, () or (*) with reduction="none"; float32 for half-precision inputs. With return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range. Values of device tensors
            are not read.
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "gaussian_policy_loss"
    original = mean
    mean, log_std, lead = _policy(op, mean, log_std, target=target)
    _check.has_shape(op, "target", target, original.shape)
    precision = _loss.precision_tensor(op, precision, original)
    options = _loss.options(
        op, estimator=estimator, allowed=_ESTIMATORS, closed_form="analytic", num_samples=num_samples,
        advantage=advantage, rbf_gamma=rbf_gamma, entropy_coef=entropy_coef, reduction=reduction,
        row_offset=row_offset, return_stats=return_stats, backend=backend,
    )  # fmt: skip
    _loss.no_rbf_in_closed_form(op, options, "analytic")
    constants = [_check.seed_tensor(op, seed)] if options.config.num_samples else []
    inputs = (mean, log_std, _check.rows(target, *mean.shape), precision)
    return _loss.evaluate(op, options, lead, inputs, constants, (0, 0, 0, None))


def gaussian_surrogate_loss(
    mean: Tensor,
    log_std: Tensor,
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
    """The loss of `gaussian_policy_loss` from given samples and rewards: the way in for any reward.

    Args:
        mean: (*, D).
        log_std: (*, D) or (D,).
        samples: (G, *, D), held constant: no derivative reaches them here.
        rewards: (G, *), of the samples; differentiable. With "dice" and "reinforce" score detached samples,
            or the path through the samples counts twice; with "reparam" (w = 1) that path is the gradient.
        entropy_coef, advantage, rbf_gamma, reduction, return_stats, backend: as in `gaussian_policy_loss`.
        estimator: "dice", "reinforce" or "reparam".

    Returns:
        loss, () or (*) with reduction="none"; with return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range.
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "gaussian_surrogate_loss"
    mean, log_std, lead = _policy(op, mean, log_std, samples=samples, rewards=rewards)
    options, samples, rewards = _loss.surrogate(
        op, samples, rewards, lead, (mean.shape[1],), allowed=_check.SURROGATES, estimator=estimator,
        advantage=advantage, rbf_gamma=rbf_gamma, entropy_coef=entropy_coef, reduction=reduction,
        return_stats=return_stats, backend=backend,
    )  # fmt: skip
    return _loss.evaluate(op, options, lead, (mean, log_std, rewards), (samples,), (0, 0, 1))


def _policy(op: str, mean: Tensor, log_std: Tensor, **others: Tensor) -> tuple[Tensor, Tensor, Sequence[int]]:
    """mean and log_std as (B, D), and the leading dimensions."""
    _check.floating(op, mean=mean, log_std=log_std, **others)
    if mean.ndim < 1 or mean.shape[-1] < 1:
        raise ValueError(f"{op}: mean: expected shape (*, D) with D of at least 1, got {_check.shape_of(mean)}")
    lead, dim = mean.shape[:-1], mean.shape[-1]
    _check.has_shape(op, "log_std", log_std, mean.shape, (dim,))
    # Before log_std is expanded, for its gradient to be summed over rows in the dtype that is computed with.
    mean, log_std = _loss.computed(mean, log_std)
    mean = _check.rows(mean, lead.numel(), dim)
    if log_std.shape != mean.shape:
        log_std = log_std.reshape(-1, dim).expand(mean.shape)
    return mean, log_std, lead
