"""Gaussian policies with a full covariance Σ = L Lᵀ, given by L (`scale_tril`)."""

from typing import Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from . import _gaussian_family
from ._loss import LossStats
from ._types import Advantage, Backend, GaussianEstimator, PolicyOptions, Reduction, Sampled, SurrogateOptions

__all__ = ["mvn_log_prob", "mvn_policy_loss", "mvn_sample", "mvn_surrogate_loss"]

_FAMILY = _gaussian_family.Family("mvn", "scale_tril", axes=2)


def mvn_sample(
    mean: Tensor,
    scale_tril: Tensor,
    num_samples: int,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    row_offset: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Draws ŷ = mean + L ε, ε ~ N(0, I), differentiable along the path; random numbers as in `gaussian_sample`.

    Args:
        mean: (*, D), one policy a row.
        scale_tril: L, (*, D, D) or (D, D), lower triangular with a positive diagonal.
        num_samples: G, samples a row.
        seed, stream, row_offset, backend: as in `gaussian_sample`.

    Returns:
        samples, (G, *, D).

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; L not triangular, or singular.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, po_kernels as pk
        >>> pk.mvn_sample(torch.zeros(6, 2), torch.eye(2), 5, seed=0).shape
        torch.Size([5, 6, 2])
    """
    return _gaussian_family.sample(_FAMILY, mean, scale_tril, num_samples, seed, stream, row_offset, backend)


@overload
def mvn_log_prob(
    mean: Tensor, scale_tril: Tensor, value: Tensor, *, entropy: Literal[False] = False, backend: Backend | None = None
) -> Tensor: ...
@overload
def mvn_log_prob(
    mean: Tensor, scale_tril: Tensor, value: Tensor, *, entropy: Literal[True], backend: Backend | None = None
) -> tuple[Tensor, Tensor]: ...
def mvn_log_prob(
    mean: Tensor, scale_tril: Tensor, value: Tensor, *, entropy: bool = False, backend: Backend | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Joint log-density of `value`, in nats.

    Args:
        mean: (*, D).
        scale_tril: (*, D, D) or (D, D), lower triangular with a positive diagonal.
        value: (..., *, D), with any dimensions before those of mean, such as the G of samples.
        entropy: also return the entropy of the policy, in nats.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        log p(value), value.shape[:-1]; float32 for half-precision inputs. With entropy, (log_prob, entropy), the
        latter of shape (*).

    Raises:
        TypeError, ValueError: an argument of another type or shape; L not triangular, or singular.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, po_kernels as pk
        >>> pk.mvn_log_prob(torch.zeros(2), torch.eye(2), torch.zeros(2))  # -log 2π
        tensor(-1.8379)
    """
    return _gaussian_family.log_prob(_FAMILY, mean, scale_tril, value, entropy, backend)


@overload
def mvn_policy_loss(
    mean: Tensor, scale_tril: Tensor, target: Tensor, precision: Tensor | float, *,
    estimator: GaussianEstimator = "analytic", return_stats: Literal[False] = False,
    **options: Unpack[PolicyOptions],
) -> Tensor:  # fmt: skip
    ...
@overload
def mvn_policy_loss(
    mean: Tensor, scale_tril: Tensor, target: Tensor, precision: Tensor | float, *,
    estimator: GaussianEstimator = "analytic", return_stats: Literal[True], **options: Unpack[PolicyOptions],
) -> tuple[Tensor, LossStats]:  # fmt: skip
    ...
@overload
def mvn_policy_loss(
    mean: Tensor, scale_tril: Tensor, target: Tensor, precision: Tensor | float, *,
    estimator: GaussianEstimator = "analytic", return_stats: bool, **options: Unpack[PolicyOptions],
) -> Tensor | tuple[Tensor, LossStats]:  # fmt: skip
    ...
def mvn_policy_loss(
    mean: Tensor,
    scale_tril: Tensor,
    target: Tensor,
    precision: Tensor | float,
    *,
    entropy_coef: float | Tensor = 0.0,
    estimator: GaussianEstimator = "analytic",
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
    """`gaussian_policy_loss` for a policy N(mean, L Lᵀ).

    Args:
        mean: (*, D), one policy a row, B rows in all.
        scale_tril: L, (*, D, D) or (D, D), lower triangular with a positive diagonal.
        target, precision and all options: as in `gaussian_policy_loss`; with batch_dims scale_tril is (*P, *, D, D) or
            (*P, D, D).

    Returns:
        loss, () or (*) with reduction="none", and with batch_dims (*P) or (*P, *); float32 for half-precision inputs.
        With return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range; L not triangular, or singular.
            Values of device tensors are not read.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, po_kernels as pk
        >>> mean, target = torch.zeros(6, 2), torch.ones(6, 2)
        >>> pk.mvn_policy_loss(mean, torch.eye(2), target, torch.eye(2))  # |mean - target|² + tr U Σ
        tensor(4.)
    """
    return _gaussian_family.policy_loss(
        _FAMILY, mean, scale_tril, target, precision, seed, stream, batch_dims, entropy_coef, estimator, num_samples,
        advantage, rbf_gamma, reduction, row_offset, return_stats, backend,
    )  # fmt: skip


@overload
def mvn_surrogate_loss(
    mean: Tensor, scale_tril: Tensor, samples: Tensor, rewards: Tensor, *,
    estimator: Sampled = "dice", return_stats: Literal[False] = False, **options: Unpack[SurrogateOptions],
) -> Tensor:  # fmt: skip
    ...
@overload
def mvn_surrogate_loss(
    mean: Tensor, scale_tril: Tensor, samples: Tensor, rewards: Tensor, *,
    estimator: Sampled = "dice", return_stats: Literal[True], **options: Unpack[SurrogateOptions],
) -> tuple[Tensor, LossStats]:  # fmt: skip
    ...
@overload
def mvn_surrogate_loss(
    mean: Tensor, scale_tril: Tensor, samples: Tensor, rewards: Tensor, *,
    estimator: Sampled = "dice", return_stats: bool, **options: Unpack[SurrogateOptions],
) -> Tensor | tuple[Tensor, LossStats]:  # fmt: skip
    ...
def mvn_surrogate_loss(
    mean: Tensor,
    scale_tril: Tensor,
    samples: Tensor,
    rewards: Tensor,
    *,
    entropy_coef: float | Tensor = 0.0,
    estimator: Sampled = "dice",
    advantage: Advantage = "loo",
    rbf_gamma: float | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    backend: Backend | None = None,
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

    Example:
        >>> import torch, po_kernels as pk
        >>> mean, scale_tril = torch.zeros(6, 2, requires_grad=True), torch.eye(2)
        >>> samples = pk.mvn_sample(mean.detach(), scale_tril, 8, seed=0)
        >>> rewards = -(samples - 1.0).abs().sum(-1).round()  # whatever can be computed of samples
        >>> pk.mvn_surrogate_loss(mean, scale_tril, samples, rewards, entropy_coef=0.1).backward()
    """
    return _gaussian_family.surrogate_loss(
        _FAMILY, mean, scale_tril, samples, rewards, entropy_coef, estimator, advantage, rbf_gamma, reduction,
        return_stats, backend,
    )  # fmt: skip
