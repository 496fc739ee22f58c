"""Diagonal Gaussian policies."""

from typing import Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from . import _gaussian_family
from ._loss import LossStats
from ._types import Advantage, Backend, GaussianEstimator, PolicyOptions, Reduction, Sampled, SurrogateOptions

__all__ = ["gaussian_log_prob", "gaussian_policy_loss", "gaussian_sample", "gaussian_surrogate_loss"]

_FAMILY = _gaussian_family.Family("gaussian", "log_std", axes=1)


def gaussian_sample(
    mean: Tensor,
    log_std: Tensor,
    num_samples: int,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    row_offset: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Draws ŷ = mean + exp(log_std) ε, ε ~ N(0, I), differentiable along the path.

    Random numbers are counter-based (Philox4x32-10, Salmon et al. 2011, and Box-Muller): the same seed
    gives the same samples on every backend and device, to rounding (1e-6 of them in float32), for any number of
    threads, batch or shard; on one backend to the bit.

    Args:
        mean: (*, D), one policy a row.
        log_std: (*, D) or (D,), log of the standard deviation.
        num_samples: G, samples a row.
        seed: 64-bit seed, or an int64 scalar tensor; None draws one from torch's default CPU generator. Under
            torch.func.vmap a seed is that of every problem, a batch of seeds has one for each, and None draws as the
            `randomness` of vmap says.
        stream: keeps apart what shares a seed, such as the two heads of a policy: other numbers for each stream.
        row_offset: number of the first row, for a shard of a larger batch.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        samples, (G, *, D).

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, po_kernels as pk
        >>> mean, log_std = torch.zeros(6, 2), torch.zeros(2)
        >>> samples = pk.gaussian_sample(mean, log_std, 5, seed=0)
        >>> shard = pk.gaussian_sample(mean[3:], log_std, 5, seed=0, row_offset=3)
        >>> samples.shape, bool((samples[:, 3:] == shard).all())
        (torch.Size([5, 6, 2]), True)
    """
    return _gaussian_family.sample(_FAMILY, mean, log_std, num_samples, seed, stream, row_offset, backend)


@overload
def gaussian_log_prob(
    mean: Tensor, log_std: Tensor, value: Tensor, *, entropy: Literal[False] = False, backend: Backend | None = None
) -> Tensor: ...
@overload
def gaussian_log_prob(
    mean: Tensor, log_std: Tensor, value: Tensor, *, entropy: Literal[True], backend: Backend | None = None
) -> tuple[Tensor, Tensor]: ...
def gaussian_log_prob(
    mean: Tensor, log_std: Tensor, value: Tensor, *, entropy: bool = False, backend: Backend | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Joint log-density of `value`, in nats: a sum over the D dimensions.

    Args:
        mean: (*, D).
        log_std: (*, D) or (D,).
        value: (..., *, D), with any dimensions before those of mean, such as the G of samples.
        entropy: also return the entropy of the policy, in nats.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        log p(value), value.shape[:-1]; float32 for half-precision inputs. With entropy, (log_prob, entropy), the
        latter of shape (*).

    Raises:
        TypeError, ValueError: an argument of another type or shape.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, po_kernels as pk
        >>> pk.gaussian_log_prob(torch.zeros(2), torch.zeros(2), torch.zeros(2))  # -log 2π
        tensor(-1.8379)
    """
    return _gaussian_family.log_prob(_FAMILY, mean, log_std, value, entropy, backend)


@overload
def gaussian_policy_loss(
    mean: Tensor, log_std: Tensor, target: Tensor, precision: Tensor | float, *,
    estimator: GaussianEstimator = "analytic", return_stats: Literal[False] = False,
    **options: Unpack[PolicyOptions],
) -> Tensor:  # fmt: skip
    ...
@overload
def gaussian_policy_loss(
    mean: Tensor, log_std: Tensor, target: Tensor, precision: Tensor | float, *,
    estimator: GaussianEstimator = "analytic", return_stats: Literal[True], **options: Unpack[PolicyOptions],
) -> tuple[Tensor, LossStats]:  # fmt: skip
    ...
@overload
def gaussian_policy_loss(
    mean: Tensor, log_std: Tensor, target: Tensor, precision: Tensor | float, *,
    estimator: GaussianEstimator = "analytic", return_stats: bool, **options: Unpack[PolicyOptions],
) -> Tensor | tuple[Tensor, LossStats]:  # fmt: skip
    ...
def gaussian_policy_loss(
    mean: Tensor,
    log_std: Tensor,
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
        entropy_coef: λ, in units of reward per nat: a number, or a () tensor, which is differentiable and may change
            from call to call without a new graph of torch.compile.
        estimator: "analytic", "reparam", "dice" or "reinforce".
        num_samples: G, required by the sampled estimators; at least 2 with advantage="loo".
        advantage: baseline of the score function, a kind of `group_advantage`; "analytic" and "reparam" have no use
            for it.
        rbf_gamma: replaces r by exp(rbf_gamma · r); sampled estimators only.
        reduction: "mean" or "sum" over rows, or "none".
        seed: 64-bit seed, or an int64 scalar tensor; None draws one from torch's default CPU generator.
        stream: keeps apart what shares a seed, such as the two heads of a policy: other numbers for each stream.
        row_offset: number of the first row, for a shard of a larger batch.
        batch_dims: how many dimensions of every tensor count problems, ahead of its others: with *P for these, mean and
            target (*P, *, D), log_std (*P, *, D) or (*P, D), precision a number, (*P), (*P, D) or (*P, D, D). There is
            then a loss for each problem, and all are one call of the native kernel, as under torch.func.vmap. What
            problems share can be expanded. Rows are numbered anew in each problem. A seed is that of every problem, a
            tensor (*P) has one for each, and None draws as many.
        return_stats: also return `LossStats`.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        loss, () or (*) with reduction="none", and with batch_dims (*P) or (*P, *); float32 for half-precision inputs.
        With return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range. Values of device tensors
            are not read.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        Sixteen rows under each of three precisions, a problem each.

        >>> import torch, po_kernels as pk
        >>> mean, target = torch.zeros(3, 16, 2), torch.ones(3, 16, 2)
        >>> pk.gaussian_policy_loss(mean, torch.zeros(3, 2), target, torch.tensor([1.0, 2.0, 3.0]), batch_dims=1)
        tensor([ 4.,  8., 12.])
    """
    return _gaussian_family.policy_loss(
        _FAMILY, mean, log_std, target, precision, seed, stream, batch_dims, entropy_coef, estimator, num_samples,
        advantage, rbf_gamma, reduction, row_offset, return_stats, backend,
    )  # fmt: skip


@overload
def gaussian_surrogate_loss(
    mean: Tensor, log_std: Tensor, samples: Tensor, rewards: Tensor, *,
    estimator: Sampled = "dice", return_stats: Literal[False] = False, **options: Unpack[SurrogateOptions],
) -> Tensor:  # fmt: skip
    ...
@overload
def gaussian_surrogate_loss(
    mean: Tensor, log_std: Tensor, samples: Tensor, rewards: Tensor, *,
    estimator: Sampled = "dice", return_stats: Literal[True], **options: Unpack[SurrogateOptions],
) -> tuple[Tensor, LossStats]:  # fmt: skip
    ...
@overload
def gaussian_surrogate_loss(
    mean: Tensor, log_std: Tensor, samples: Tensor, rewards: Tensor, *,
    estimator: Sampled = "dice", return_stats: bool, **options: Unpack[SurrogateOptions],
) -> Tensor | tuple[Tensor, LossStats]:  # fmt: skip
    ...
def gaussian_surrogate_loss(
    mean: Tensor,
    log_std: Tensor,
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

    Example:
        >>> import torch, po_kernels as pk
        >>> mean, log_std = torch.zeros(6, 2, requires_grad=True), torch.zeros(2)
        >>> samples = pk.gaussian_sample(mean.detach(), log_std, 8, seed=0)
        >>> rewards = -(samples - 1.0).abs().sum(-1).round()  # whatever can be computed of samples
        >>> pk.gaussian_surrogate_loss(mean, log_std, samples, rewards, entropy_coef=0.1).backward()
    """
    return _gaussian_family.surrogate_loss(
        _FAMILY, mean, log_std, samples, rewards, entropy_coef, estimator, advantage, rbf_gamma, reduction,
        return_stats, backend,
    )  # fmt: skip
