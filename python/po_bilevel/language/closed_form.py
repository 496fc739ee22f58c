"""U* of embeddings of text in closed form, where the inner problem has a KL divergence to a reference policy.

The optimum of E[r] − β KL(p ‖ p_ref) is p* ∝ p_ref exp(r/β). Were embeddings of answers Gaussian, of one mean under
the data and the reference, the reward −(e(ŷ)−e(y))ᵀ U (e(ŷ)−e(y)) would give p* the precision Σ_ref⁻¹ + (2/β) U, and
with it the data's at U* = (β/2)(Σ_data⁻¹ − Σ_ref⁻¹). The entropy's U* = (λ/2) Σ⁻¹ (arXiv 2510.07624) is the limit of a
reference that is spread out without end.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..heuristics import optimal_precision, residual_covariance
from ..optional import require
from ..rewards import MIN_PRECISION
from .embedders import as_rows

Kind = Literal["isotropic", "diagonal", "low_rank", "full"]


class EmbeddingPrecision(NamedTuple):
    """What `embedding_precision` finds.

    Attributes:
        precision: U*, () isotropic, (n,) diagonal, (n, n) low rank or full, positive definite: `U` of a
            `TextEmbeddingReward` of kind "isotropic", "diagonal", or else "full".
        condition: of the data's covariance as estimated, infinite where it is singular, and of it shrunk.
        shrinkage: Ledoit and Wolf's weights of the identity, in [0, 1], for data and reference.
        clipped: how many eigenvalues, or entries, of U* were raised to the floor: the reference is no wider there.

    Example:
        >>> found = embedding_precision(torch.eye(2), 0.1)
        >>> isinstance(found, EmbeddingPrecision), found.precision
        (True, tensor([0.1000, 0.1000]))
    """

    precision: Tensor
    condition: tuple[float, float]
    shrinkage: tuple[float, float | None]
    clipped: int


def marginal(embeddings: Tensor) -> Tensor:
    """Embeddings (N, n) less their mean: rows for `embedding_precision` that ignore prompts.

    Example:
        >>> marginal(torch.tensor([[1.0], [3.0]]))
        tensor([[-1.],
                [ 1.]])
    """
    embeddings = as_rows("marginal: embeddings", embeddings)
    return embeddings - embeddings.mean(dim=0)


def residuals(embeddings: Tensor, index: Tensor) -> Tensor:
    """Embeddings (N, n) less the mean of their prompt's answers, times √(k/(k−1)) for k answers: what a prompt leaves
    open. `index`, (N,) integers, is the prompt of each. Prompts with one answer are left out; that all have one is a
    ValueError, as are other shapes.

    Example:
        >>> residuals(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([5, 5, 8]))
        tensor([[-1.4142],
                [ 1.4142]])
    """
    embeddings = as_rows("residuals: embeddings", embeddings)
    if index.shape != embeddings.shape[:1] or index.is_floating_point():
        raise ValueError(
            f"residuals: index: expected integers of shape ({len(embeddings)},), got {index.dtype}, "
            f"{tuple(index.shape)}"
        )
    group, count = torch.unique(index, return_inverse=True, return_counts=True)[1:]
    total = embeddings.new_zeros(len(count), embeddings.shape[1]).index_add(0, group, embeddings)
    size = count[group, None].to(embeddings)
    keep = count[group] > 1
    if not keep.any():
        raise ValueError("residuals: index: expected a prompt with two answers, got one answer for each")
    return ((embeddings - total[group] / size) * (size / (size - 1.0)).sqrt())[keep]


def embedding_precision(
    data: Tensor, coefficient: float, kind: Kind = "diagonal", *, reference: Tensor | None = None,
    rank: int | None = None,
) -> EmbeddingPrecision:  # fmt: skip
    """U* = (β/2)(Σ_data⁻¹ − Σ_ref⁻¹), of covariances that are shrunk (Ledoit and Wolf 2004).

    Both covariances are brought to the kind first: isotropic takes the mean of the diagonal, diagonal the diagonal,
    low_rank the leading eigenvectors, their eigenvalues less the mean of the others (probabilistic principal
    components, Tipping and Bishop 1999), and of what they leave the diagonal.

    Eigenvalues (entries) are raised to a floor, the least that `PositivePrecision` holds: 2e-6, and for matrices 32 eps
    times the trace of (β/2) Σ_data⁻¹ more, eps that of the data's dtype or of float32. Where the two covariances hardly
    differ their sampling errors decide the sign, and a full U may be raised in most directions.

    Args:
        data: rows about zero, (N, n), such as `marginal` or `residuals` of embeddings of the data's answers.
        coefficient: β, of the KL divergence, in units of reward a nat.
        kind: "isotropic", "diagonal", "low_rank" or "full".
        reference: the same of answers of the reference policy, (M, n). None for one without structure: the entropy's
            U*, for heuristics.
        rank: of "low_rank", 1 to n - 1.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        ValueError, TypeError: a bad kind, coefficient or rank; rows that are not floating, finite, of one width and two
            at least, or are all zero.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> found = embedding_precision(rows, 0.1, "diagonal", reference=2.0 * rows)
        >>> found.precision, found.clipped
        (tensor([0.0310, 0.0290]), 0)
    """
    op = "embedding_precision"
    if kind not in get_args(Kind):
        raise ValueError(f"{op}: kind: expected one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}")
    if not 0 < coefficient < math.inf:
        raise ValueError(f"{op}: coefficient: expected a finite positive number, got {coefficient}")
    data = as_rows(f"{op}: data", data)
    dim = data.shape[1]
    if not (rank is not None and 1 <= rank < dim if kind == "low_rank" else rank is None):
        raise ValueError(f"{op}: rank: expected 1 to {dim - 1} with kind='low_rank', None without, got {rank}")
    dtype = torch.promote_types(data.dtype, torch.float32)
    covariance, weight, condition = _shrunk(f"{op}: data", data, dim)
    u = _precision(covariance, coefficient, kind, rank or 0)
    floor, other = 2.0 * MIN_PRECISION, None
    if u.ndim == 2:
        floor += 32.0 * torch.finfo(dtype).eps * float(u.trace())
    if reference is not None:
        covariance, other, _ = _shrunk(f"{op}: reference", as_rows(f"{op}: reference", reference), dim)
        u = u - _precision(covariance, coefficient, kind, rank or 0)
    values, vectors = torch.linalg.eigh(u) if u.ndim == 2 else (u, None)
    raised = values.clamp_min(floor)
    clipped = int((values < floor).sum())
    if clipped:
        u = raised if vectors is None else (vectors * raised) @ vectors.mT
    return EmbeddingPrecision(u.to(data.device, dtype), condition, (weight, other), clipped)


def _precision(covariance: Tensor, coefficient: float, kind: Kind, rank: int) -> Tensor:
    """(β/2) Σ⁻¹ of a covariance of the kind."""
    if kind != "low_rank":
        return optimal_precision(covariance, coefficient, kind)
    values, vectors = torch.linalg.eigh(covariance)
    leading = (vectors[:, -rank:] * (values[-rank:] - values[:-rank].mean())) @ vectors[:, -rank:].mT
    rest = (covariance - leading).diagonal()
    return optimal_precision(leading + rest.diag(), coefficient, "full")


def _shrunk(where: str, rows: Tensor, dim: int) -> tuple[Tensor, float, tuple[float, float]]:
    """Ledoit and Wolf's covariance in double precision, its shrinkage, condition numbers before and after."""
    rows = rows.detach().double().cpu()
    if rows.shape[1] != dim or len(rows) < 2 or not rows.any():
        got = f"{tuple(rows.shape)}, {'all zero' if not rows.any() else 'not all zero'}"
        raise ValueError(f"{where}: expected shape (N, {dim}), N of at least 2, and not all zero, got {got}")
    fitted = require("sklearn.covariance", "sklearn").LedoitWolf(assume_centered=True).fit(rows.numpy())
    covariance = torch.from_numpy(fitted.covariance_)
    return covariance, float(fitted.shrinkage_), (_condition(residual_covariance(rows)), _condition(covariance))


def _condition(covariance: Tensor) -> float:
    values = torch.linalg.eigvalsh(covariance)
    # Below this an eigenvalue is rounding.
    singular = values[0] <= len(values) * torch.finfo(values.dtype).eps * values[-1]
    return math.inf if singular else float(values[-1] / values[0])
