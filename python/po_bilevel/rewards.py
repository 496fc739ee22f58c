"""Rewards r_φ: modules that give the tensor the fused losses take, or that score samples.

Each is a `Reward`. A `MatrixReward` has `precision()`, for Gaussian policies: r(ŷ, y) = -(ŷ-y)ᵀ U (ŷ-y).
A `TabularReward` has `table()`, for categorical policies: r(ŷ, y) = R[ŷ, y].
A `SampledReward` is any other function of samples, r(ŷ, y) or r(x, ŷ, y), for both; labels come to it as one-hot rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from .networks import mlp

PrecisionKind = Literal["isotropic", "diagonal", "full"]

# Added to every precision, so that it stays positive when softplus underflows or L loses rank.
MIN_PRECISION = 1e-6


class PositivePrecision(nn.Module):
    """A learned symmetric positive definite matrix U, positive whatever the values of its parameters.

    isotropic: softplus(raw) + ε, one number; diagonal: the same for D numbers; full: L Lᵀ + ε I with L lower
    triangular, ε growing with the trace so that rounding leaves it positive.

    Args:
        dim: D.
        kind: "isotropic", "diagonal" or "full".
        start: U to start from, a number or a tensor of shape (), (D,) or (D, D); the identity if None. It must be
            of the kind, or simpler: (D,) serves "diagonal" and "full", a number all three.

    Raises:
        ValueError: an unknown kind, a start of another shape, or one that is not positive definite.

    Example:
        >>> import torch
        >>> PositivePrecision(2, "diagonal", start=torch.tensor([1.0, 3.0]))().detach().round()
        tensor([1., 3.])
    """

    def __init__(self, dim: int, kind: PrecisionKind = "diagonal", start: Tensor | float | None = None) -> None:
        super().__init__()
        if kind not in get_args(PrecisionKind):
            raise ValueError(f"kind: expected one of {', '.join(map(repr, get_args(PrecisionKind)))}, got {kind!r}")
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        self.dim = dim
        self.kind = kind
        u = torch.as_tensor(1.0 if start is None else start)
        u = u.detach().to(u.dtype if u.is_floating_point() else torch.get_default_dtype())
        shapes: dict[str, list[tuple[int, ...]]] = {
            "isotropic": [()],
            "diagonal": [(), (dim,)],
            "full": [(), (dim,), (dim, dim)],
        }
        if not u.isfinite().all():
            raise ValueError(f"precision: expected finite values, got {u.tolist()}")
        if tuple(u.shape) not in shapes[kind]:
            expected = " or ".join(map(str, shapes[kind]))
            raise ValueError(f"precision: expected shape {expected} for kind={kind!r}, got {tuple(u.shape)}")
        self.raw: nn.Parameter = nn.Parameter(self._invert(u))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kind={self.kind!r}"

    def forward(self) -> Tensor:
        """U as the fused losses take it: () isotropic, (D,) diagonal, (D, D) full."""
        if self.kind == "full":
            factor = torch.tril(self.raw)
            share = MIN_PRECISION + _relative(factor.dtype) * factor.square().sum()
            return factor @ factor.mT + share * torch.eye(self.dim, dtype=factor.dtype, device=factor.device)
        return functional.softplus(self.raw) + MIN_PRECISION

    def _invert(self, u: Tensor) -> Tensor:
        """The raw parameters that give u."""
        if self.kind != "full":
            excess = (u if self.kind == "isotropic" else u.expand(self.dim)) - MIN_PRECISION
            if not (excess > 0).all():
                raise ValueError(f"precision: expected finite values above {MIN_PRECISION}, got {u.tolist()}")
            return excess + torch.log(-torch.expm1(-excess))
        matrix = as_matrix(u, self.dim)
        scale = matrix.abs().amax()
        if not torch.allclose(matrix, matrix.mT, rtol=0.0, atol=1e-6 * float(scale)):
            raise ValueError("precision: expected a symmetric matrix, got one that is not")
        relative = _relative(u.dtype)
        trace = (matrix.trace() - self.dim * MIN_PRECISION) / (1.0 + self.dim * relative)
        share = MIN_PRECISION + relative * trace
        excess = 0.5 * (matrix + matrix.mT) - share * torch.eye(self.dim, dtype=u.dtype, device=u.device)
        factor, failed = torch.linalg.cholesky_ex(excess)
        if failed or not factor.isfinite().all():
            raise ValueError(
                f"precision: expected a positive definite matrix with eigenvalues above {MIN_PRECISION}, "
                f"got eigenvalues {torch.linalg.eigvalsh(matrix).tolist()}"
            )
        return factor


def _relative(dtype: torch.dtype) -> float:
    """What is added to the diagonal of L Lᵀ in units of its trace: a few roundings of the largest entry."""
    return 8.0 * torch.finfo(dtype).eps


class Reward(nn.Module, ABC):
    """What rewards have in common.

    Example:
        >>> reward = MahalanobisReward(2)
        >>> isinstance(reward, Reward), reward.shown().round()
        (True, tensor([1., 1.]))
    """

    def shown(self) -> Tensor | None:
        """What the reward is, as a detached tensor: its precision, or else its table; None if it has neither."""
        return None


class MatrixReward(Reward):
    """A reward that a Gaussian policy's fused loss takes as a precision."""

    def shown(self) -> Tensor:
        """U."""
        return self.precision().detach().clone()

    @abstractmethod
    def precision(self) -> Tensor:
        """U of shape (), (D,) or (D, D), positive definite, differentiable in the parameters."""

    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        """The reward of answers (..., D) for targets that broadcast with them, (...)."""
        residual = answer - target
        u = self.precision()
        if u.ndim == 2:
            return -(residual @ u * residual).sum(dim=-1)
        return -(residual.square() * u).sum(dim=-1)


class TabularReward(Reward):
    """A reward that a categorical policy's fused loss takes as a table.

    Example:
        >>> import torch
        >>> class Ordinal(TabularReward):  # an answer costs its distance on an ordered scale, times what is learned
        ...     def __init__(self, num_classes):
        ...         super().__init__()
        ...         self.log_price, self.levels = torch.nn.Parameter(torch.zeros(())), torch.arange(num_classes)
        ...
        ...     def table(self):
        ...         return -self.log_price.exp() * (self.levels[:, None] - self.levels).abs()
        >>> Ordinal(3)(torch.tensor(0), torch.tensor(2)).item()
        -2.0
    """

    def shown(self) -> Tensor:
        """R."""
        return self.table().detach().clone()

    @abstractmethod
    def table(self) -> Tensor:
        """R of shape (C, C): R[i, j] rewards the answer i where the label is j. Differentiable."""

    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        """The reward of integer answers for integer labels of a shape that broadcasts with theirs."""
        return self.table()[answer, target]


class SampledReward(Reward):
    """A reward known by its values: policies sample and score the samples.

    Attributes:
        uses_inputs: the reward depends on x. If it does not, a categorical policy can make a table of it.
    """

    uses_inputs = False

    @abstractmethod
    def forward(self, answer: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        """The rewards of samples, twice differentiable in them and in the parameters.

        Args:
            answer: ŷ, (..., D).
            target: y, (..., D), of a shape that broadcasts with it.
            inputs: x, (..., in_features), of leading dimensions that broadcast with theirs.

        Returns:
            (...), the leading dimensions broadcast.
        """


class MLPReward(SampledReward):
    """r = network(ŷ, y), a tanh network.

    Nothing makes it fall for answers far from y, so that an entropy bonus lets a Gaussian policy wander off: give the
    policy a bounded standard deviation.

    Args:
        dim: D, of ŷ and of y; the number of classes for labels.
        hidden: widths of the hidden layers.

    Example:
        >>> import torch
        >>> MLPReward(2, hidden=(8,))(torch.zeros(5, 4, 2), torch.ones(4, 2), torch.zeros(4, 3)).shape
        torch.Size([5, 4])
    """

    def __init__(self, dim: int, *, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.network: nn.Sequential = mlp(2 * dim, hidden, 1)

    def forward(self, answer: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        """See `SampledReward.forward`; inputs are not used."""
        return self.network(_beside(answer, target)).squeeze(-1)


class ConditionalMLPReward(SampledReward):
    """r = network(x, ŷ, y), a tanh network.

    Args:
        in_features: size of x.
        dim: D, of ŷ and of y; the number of classes for labels.
        hidden: widths of the hidden layers.

    Example:
        >>> import torch
        >>> ConditionalMLPReward(3, 2, hidden=(8,))(torch.zeros(5, 4, 2), torch.ones(4, 2), torch.zeros(4, 3)).shape
        torch.Size([5, 4])
    """

    uses_inputs = True

    def __init__(self, in_features: int, dim: int, *, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.network: nn.Sequential = mlp(in_features + 2 * dim, hidden, 1)

    def forward(self, answer: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        """See `SampledReward.forward`."""
        return self.network(_beside(inputs, answer, target)).squeeze(-1)


class CosineReward(SampledReward):
    """r = cos(e(ŷ), e(y)) between embeddings by one tanh network, from -1 to 1.

    Args:
        dim: D, of ŷ and of y; the number of classes for labels.
        embedding: size of e.
        hidden: widths of the hidden layers.

    Example:
        >>> import torch
        >>> CosineReward(2)(torch.ones(4, 2), torch.ones(4, 2), torch.zeros(4, 3)).detach().round(decimals=3)
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, dim: int, *, embedding: int = 16, hidden: Sequence[int] = (64,)) -> None:
        super().__init__()
        self.network: nn.Sequential = mlp(dim, hidden, embedding)

    def forward(self, answer: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        """See `SampledReward.forward`; inputs are not used."""
        return functional.cosine_similarity(self.network(answer), self.network(target), dim=-1)


class EmbeddingMahalanobisReward(SampledReward):
    """r = -(e(ŷ)-e(y))ᵀ U (e(ŷ)-e(y)), the Mahalanobis reward of embeddings by a tanh network; at most 0.

    Args:
        dim: D, of ŷ and of y; the number of classes for labels.
        embedding: size of e.
        hidden: widths of the hidden layers.
        kind: of U, as in `PositivePrecision`.

    Example:
        >>> import torch
        >>> EmbeddingMahalanobisReward(2)(torch.ones(4, 2), torch.ones(4, 2), torch.zeros(4, 3)).abs().max().item()
        0.0
    """

    def __init__(
        self, dim: int, *, embedding: int = 16, hidden: Sequence[int] = (64,), kind: PrecisionKind = "diagonal"
    ) -> None:
        super().__init__()
        self.network: nn.Sequential = mlp(dim, hidden, embedding)
        self.distance: MahalanobisReward = MahalanobisReward(embedding, kind)

    def forward(self, answer: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        """See `SampledReward.forward`; inputs are not used."""
        return self.distance(self.network(answer), self.network(target))


class MahalanobisReward(MatrixReward):
    """r(ŷ, y) = -(ŷ-y)ᵀ U (ŷ-y), the reward family of arXiv 2510.07624.

    Args:
        dim, kind, start: as in `PositivePrecision`.

    Example:
        >>> import torch
        >>> reward = MahalanobisReward(2, "diagonal", start=torch.tensor([1.0, 3.0]))
        >>> round(reward(torch.ones(2), torch.zeros(2)).item(), 3)
        -4.0
    """

    def __init__(self, dim: int, kind: PrecisionKind = "diagonal", start: Tensor | float | None = None) -> None:
        super().__init__()
        self.matrix: PositivePrecision = PositivePrecision(dim, kind, start)

    def precision(self) -> Tensor:
        """U: () isotropic, (D,) diagonal, (D, D) full."""
        return self.matrix()


class OneHotMahalanobisReward(TabularReward):
    """The Mahalanobis reward of one-hot labels: R[i, j] = -(e_i-e_j)ᵀ U (e_i-e_j), 0 for the right answer.

    U is seen through differences of one-hot vectors only, so adding a multiple of the all-ones matrix to it
    changes nothing: a full U has one direction that no data can determine.

    Args:
        num_classes: C, the dimension of U.
        kind, start: as in `PositivePrecision`.

    Example:
        >>> OneHotMahalanobisReward(3).table().detach().round()
        tensor([[ 0., -2., -2.],
                [-2.,  0., -2.],
                [-2., -2.,  0.]])
    """

    def __init__(self, num_classes: int, kind: PrecisionKind = "diagonal", start: Tensor | float | None = None) -> None:
        super().__init__()
        self.matrix: PositivePrecision = PositivePrecision(num_classes, kind, start)

    def precision(self) -> Tensor:
        """U over the one-hot dimensions: () isotropic, (C,) diagonal, (C, C) full."""
        return self.matrix()

    def shown(self) -> Tensor:
        """U, which R is made of."""
        return self.precision().detach().clone()

    def table(self) -> Tensor:
        """R, (C, C)."""
        return one_hot_table(self.precision(), self.matrix.dim)


class TableReward(TabularReward):
    """A free table of rewards: every entry is a parameter.

    Args:
        table: R to start from, (C, C).

    Raises:
        TypeError, ValueError: no floating tensor, or one of another shape.

    Example:
        >>> import torch
        >>> TableReward(torch.eye(3))(torch.tensor([0, 1]), torch.tensor([0, 2])).tolist()
        [1.0, 0.0]
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError(f"table: expected a floating tensor, got {getattr(table, 'dtype', type(table).__name__)}")
        if table.ndim != 2 or table.shape[0] != table.shape[1]:
            raise ValueError(f"table: expected shape (C, C), got {tuple(table.shape)}")
        self.values: nn.Parameter = nn.Parameter(table.detach().clone())

    def table(self) -> Tensor:
        """R, (C, C)."""
        return self.values


def _beside(*parts: Tensor) -> Tensor:
    """Parts (..., D_i) beside each other along the last dimension, their leading dimensions broadcast."""
    lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], dim=-1)


def one_hot_table(precision: Tensor, num_classes: int) -> Tensor:
    """R[i, j] = -(e_i-e_j)ᵀ U (e_i-e_j) = -(U_ii + U_jj - 2 U_ij), which is 0 where i = j.

    Args:
        precision: U, of shape (), (C,) or (C, C), positive semidefinite.
        num_classes: C.

    Returns:
        R, (C, C).

    Raises:
        ValueError: a precision of another shape.

    Example:
        >>> import torch
        >>> one_hot_table(torch.tensor([1.0, 3.0]), 2)
        tensor([[ 0., -4.],
                [-4.,  0.]])
    """
    if tuple(precision.shape) not in ((), (num_classes,), (num_classes, num_classes)):
        raise ValueError(
            f"one_hot_table: precision: expected shape (), ({num_classes},) or ({num_classes}, {num_classes}), "
            f"got {tuple(precision.shape)}"
        )
    matrix = as_matrix(precision, num_classes)
    weight = matrix.diagonal()
    return matrix + matrix.mT - weight[:, None] - weight[None, :]


def diagonal(tensor: Tensor) -> Tensor:
    """The diagonal of a precision or a table, (D,): of () the number alone, of (D,) itself."""
    return tensor.diagonal() if tensor.ndim == 2 else tensor.reshape(-1)


def as_matrix(precision: Tensor, dim: int) -> Tensor:
    """U of shape (), (D,) or (D, D) as a matrix (D, D)."""
    return precision if precision.ndim == 2 else torch.diag(precision.expand(dim))
