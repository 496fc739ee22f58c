"""The closed-form optimal reward U* of a Gaussian model, and the covariances that it is computed from.

With the policy centred on E[y|x] and λ the entropy weight, the outer loss is least at U* = (λ/2) Σ⁻¹
(arXiv 2510.07624), Σ the covariance of y given x. `marginal_covariance` ignores x and so overstates Σ;
`residual_covariance` takes y minus a fitted mean, on rows that the fit has not seen unless it cannot overfit.
"""

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from .rewards import PrecisionKind


def marginal_covariance(target: Tensor) -> Tensor:
    """Covariance of y, ignoring x: y (N, D) -> (D, D), with N in the denominator.

    Raises:
        ValueError: another shape, or no rows.

    Example:
        >>> import torch
        >>> marginal_covariance(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        tensor([[1., 0.],
                [0., 0.]])
    """
    _rows("marginal_covariance", target)
    centred = target - target.mean(dim=0)
    return centred.mT @ centred / target.shape[0]


def residual_covariance(residual: Tensor) -> Tensor:
    """Second moment of y - mean(x) about zero: residual (N, D) -> (D, D).

    Not centred: a residual whose mean is not zero is an error of the fitted mean, and counts as spread.

    Raises:
        ValueError: another shape, or no rows.

    Example:
        >>> import torch
        >>> residual_covariance(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        tensor([[2., 1.],
                [1., 1.]])
    """
    _rows("residual_covariance", residual)
    return residual.mT @ residual / residual.shape[0]


def optimal_precision(
    covariance: Tensor, entropy_coef: float, kind: PrecisionKind = "full", *, ridge: float | None = 0.0
) -> Tensor:
    """U* for a covariance Σ.

    isotropic: u* = λ D / (2 tr Σ);  diagonal: u_j* = λ / (2 Σ_jj);  full: U* = (λ/2) Σ⁻¹.

    Args:
        covariance: Σ, (D, D), symmetric positive semidefinite.
        entropy_coef: λ, positive.
        kind: "isotropic", "diagonal" or "full".
        ridge: added to the diagonal of Σ first, in the units of Σ. None, for "full" only, takes the pseudo-inverse:
            one-hot labels sum to one, so their covariance has the null direction (1, ..., 1).

    Returns:
        U*, () isotropic, (D,) diagonal, (D, D) full: what the fused losses take as `precision`. With the
        pseudo-inverse it is only semidefinite.

    Raises:
        TypeError: Σ is not floating.
        ValueError: a bad shape, λ, kind or ridge; Σ is not finite, symmetric and semidefinite; or, with its ridge, is
            singular where it has to be inverted.

    Example:
        >>> import torch
        >>> optimal_precision(torch.diag(torch.tensor([0.25, 1.0])), 0.5, "diagonal")  # λ / 2Σ
        tensor([1.0000, 0.2500])
    """
    op = "optimal_precision"
    dim = _check_covariance(op, covariance)
    if not 0 < entropy_coef < math.inf:
        raise ValueError(f"{op}: entropy_coef: expected a finite positive number, got {entropy_coef}")
    if kind not in get_args(PrecisionKind):
        raise ValueError(f"{op}: kind: expected one of {', '.join(map(repr, get_args(PrecisionKind)))}, got {kind!r}")
    if ridge is None:
        if kind != "full":
            raise ValueError(f"{op}: ridge: expected a number with kind={kind!r}, which inverts no matrix, got None")
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        # Summing many rows leaves a null direction's eigenvalue at some multiple of eps, which torch's own cut-off of
        # D eps may let pass and invert.
        cutoff = 100.0 * dim * torch.finfo(covariance.dtype).eps * eigenvalues[-1]
        if not eigenvalues[-1] > 0 or eigenvalues[0] < -cutoff:
            raise ValueError(
                f"{op}: covariance: expected a positive semidefinite matrix that is not zero, got eigenvalues "
                f"{eigenvalues.tolist()}"
            )
        inverse = torch.where(eigenvalues > cutoff, 1.0 / eigenvalues, 0.0)
        return 0.5 * entropy_coef * (vectors * inverse) @ vectors.mT
    if not 0 <= ridge < math.inf:
        raise ValueError(f"{op}: ridge: expected a finite number of at least 0 or None, got {ridge}")
    variance = covariance.diagonal() + ridge
    if kind == "isotropic":
        _positive(op, variance.sum())
        return entropy_coef * dim / (2.0 * variance.sum())
    if kind == "diagonal":
        _positive(op, variance)
        return entropy_coef / (2.0 * variance)
    regular = covariance + ridge * torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    factor, failed = torch.linalg.cholesky_ex(0.5 * (regular + regular.mT))
    # A pivot lost to rounding leaves a factor, but not one whose inverse means anything.
    floor = torch.finfo(covariance.dtype).eps * dim * variance
    if failed or not (factor.diagonal().square() > floor).all():
        raise ValueError(
            f"{op}: covariance: expected a positive definite matrix for kind='full', got a singular one; "
            "give a ridge, or ridge=None for the pseudo-inverse"
        )
    return 0.5 * entropy_coef * torch.cholesky_inverse(factor)


def iterated_precision(
    residuals: Callable[[Tensor], Tensor], start: Tensor, entropy_coef: float, kind: PrecisionKind = "full",
    *, ridge: float | None = 0.0, rounds: int = 10, tolerance: float = 1e-3,
) -> tuple[Tensor, int]:  # fmt: skip
    """U* from the residuals of the policy that U* itself leads to: U ← U*(Σ(residuals(U))) until it stays.

    Where U shapes the fitted mean, as it does that of a regularised policy, the residual covariance depends on U and
    one round is not enough.

    Args:
        residuals: U -> y - mean(x), (N, D), of a policy trained under U, on rows that it has not seen.
        start: U of the first training, such as `optimal_precision` of the marginal covariance.
        entropy_coef, kind, ridge: as in `optimal_precision`.
        rounds: the most trainings.
        tolerance: stop at a change of U of at most this, relative to its norm.

    Returns:
        U of the shape of its kind, and how many rounds it took.

    Raises:
        ValueError: rounds is below 1, or as `residual_covariance` and `optimal_precision`.

    Example:
        >>> import torch
        >>> fitted = lambda precision: torch.tensor([[0.5, 1.0], [-0.5, -1.0]])  # of a policy under this U
        >>> iterated_precision(fitted, torch.ones(2), 0.5, kind="diagonal")
        (tensor([1.0000, 0.2500]), 2)
    """
    if rounds < 1:
        raise ValueError(f"iterated_precision: rounds: expected at least 1, got {rounds}")
    precision = start
    taken, still = 0, False
    while taken < rounds and not still:
        covariance = residual_covariance(residuals(precision))
        previous, precision = precision, optimal_precision(covariance, entropy_coef, kind, ridge=ridge)
        still = previous.shape == precision.shape and bool(
            (precision - previous).norm() <= tolerance * precision.norm()
        )
        taken += 1
    return precision, taken


def _rows(op: str, values: Tensor) -> None:
    if values.ndim != 2 or values.shape[0] < 1:
        raise ValueError(f"{op}: expected shape (N, D) with N of at least 1, got {tuple(values.shape)}")


def _check_covariance(op: str, covariance: Tensor) -> int:
    """Refuses what is no covariance, but for its definiteness; returns D."""
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or covariance.shape[0] < 1:
        raise ValueError(f"{op}: covariance: expected shape (D, D), got {tuple(covariance.shape)}")
    if not covariance.is_floating_point():
        raise TypeError(f"{op}: covariance: expected a floating tensor, got {covariance.dtype}")
    if not covariance.isfinite().all():
        raise ValueError(f"{op}: covariance: expected finite values, got others")
    largest = covariance.abs().amax()
    if not ((covariance - covariance.mT).abs() <= 1e-4 * largest).all():
        raise ValueError(f"{op}: covariance: expected a symmetric matrix, got one that is not")
    return covariance.shape[0]


def _positive(op: str, variance: Tensor) -> None:
    if not (variance > 0).all():
        raise ValueError(f"{op}: covariance: expected a positive variance, got {variance.tolist()}; give a ridge")
