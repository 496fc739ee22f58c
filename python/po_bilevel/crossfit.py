"""What the estimators cross-fit with: policies that train together, one for each fold, and the folds."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from .hypergradients import Tensors
from .losses import Batch
from .policies import CategoricalPolicy, FullGaussianPolicy, GaussianPolicy, Policy

# Of arsinh φ while a reward is learned: rewards of e²⁰ make a policy as certain as doubles can tell.
FARTHEST = 20.0
# The longest step there.
LONGEST = 1.0
# Of the loss, its curvature in any of them before one is known: 0.1 to 1 on a dozen data sets.
CURVATURE = 0.3

RowLoss = Callable[[Policy, Batch], Tensor]


class Rows(NamedTuple):
    """Distinct rows: inputs (N, F), target (N,) labels or (N, D) values, weight (N,), positive; float64 but labels."""

    inputs: Tensor
    target: Tensor
    weight: Tensor


class Stack(nn.Module):
    """M tanh networks (linear without hidden layers) of the same shape, evaluated together: (N, F) -> (M, N, out).

    Attributes:
        unit: F (out, out), lower triangular: outputs z stand for F z, which is what the penalty is of.

    Args:
        members: M.
        sizes: F, the widths of the hidden layers, out.
        seed: of the initial weights, the same for all members; a linear network starts at zero.
    """

    unit: Tensor

    def __init__(self, members: int, sizes: list[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("unit", torch.eye(sizes[-1], dtype=torch.float64))
        self._given: Tensor | None = None
        self.weights: nn.ParameterList = nn.ParameterList()
        self.biases: nn.ParameterList = nn.ParameterList()
        for width, out in pairwise(sizes):
            weight = torch.zeros(width, out, dtype=torch.float64)
            if len(sizes) > 2:
                nn.init.xavier_uniform_(weight, generator=generator)
            self.weights.append(nn.Parameter(weight.repeat(members, 1, 1)))
            self.biases.append(nn.Parameter(torch.zeros(members, 1, out, dtype=torch.float64)))

    def forward(self, inputs: Tensor) -> Tensor:
        if self._given is not None:
            return self._given
        # For the first layer einsum makes one matrix of all members' weights, matmul copies the inputs for each.
        hidden = torch.einsum("nf,mfo->mno", inputs, self.weights[0]) + self.biases[0]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            hidden = torch.matmul(hidden.tanh(), weight) + bias
        return hidden

    @contextmanager
    def once(self, inputs: Tensor) -> Iterator[None]:
        """Inside it the outputs are those for the inputs, evaluated once for whatever is made of them."""
        self._given = self(inputs)
        try:
            yield
        finally:
            self._given = None

    def squares(self) -> Tensor:
        """‖weights‖² of each member for the outputs that they stand for, without intercepts, (M,)."""
        *hidden, last = self.weights
        return torch.stack([weight.square().sum(dim=(1, 2)) for weight in (*hidden, last @ self.unit.mT)]).sum(dim=0)

    def measure_in(self, unit: Tensor) -> None:
        """Gives the outputs in units of unit (out, out), itself in the units of before."""
        with torch.no_grad():
            for parameter in (self.weights[-1], self.biases[-1]):
                parameter.copy_(in_units(parameter, unit))
            self.unit.copy_(self.unit @ unit)


class LogStd(nn.Module):
    """One log σ for each member and dimension, the same for all x: (N, F) -> (M, N, D)."""

    def __init__(self, members: int, dim: int) -> None:
        super().__init__()
        self.value: nn.Parameter = nn.Parameter(torch.zeros(members, 1, dim, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.value.expand(-1, inputs.shape[0], -1)


class FullStack(FullGaussianPolicy):
    """`FullGaussianPolicy` with a covariance for each of M members; forward gives (M, N, D) and (M, N, D, D)."""

    def __init__(self, mean_network: Stack, members: int, dim: int) -> None:
        super().__init__(mean_network, dim)
        self.log_diagonal: nn.Parameter = nn.Parameter(torch.zeros(members, dim, dtype=torch.float64))
        self.below_diagonal: nn.Parameter = nn.Parameter(torch.zeros(members, dim, dim, dtype=torch.float64))

    def scale_tril(self) -> Tensor:
        """L, (M, D, D)."""
        return torch.tril(self.below_diagonal, -1) + torch.diag_embed(self.log_diagonal.exp())

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean_network(inputs), self.scale_tril()[:, None].expand(-1, inputs.shape[0], -1, -1)


def network_of(policy: Policy) -> Stack:
    return cast(Stack, policy.network if isinstance(policy, CategoricalPolicy) else policy.mean_network)


def likelihood(policy: Policy, batch: Batch) -> Tensor:
    """Negative log-likelihood of each row, (M, N)."""
    return -policy.log_prob(*batch)


def policy_gradient(reward: nn.Module) -> RowLoss:
    """The policy-gradient loss of each row under the reward, (M, N), with λ = 1."""
    return lambda policy, batch: policy.policy_loss(*batch, reward, entropy_coef=1.0, reduction="none", seed=0)


def beliefs(logits: Tensor, table: Tensor) -> Tensor:
    """q(y|x) under which a policy of these logits (*, C) is optimal for the rewards R (C, C): R q = logits + c, Σq = 1.

    Below zero, where the policy errs, it is set to zero and the others are scaled to sum to one.
    """
    border = torch.ones(len(table), 1, dtype=table.dtype)
    system = torch.cat([torch.cat([table, border], dim=1), torch.cat([border.mT, torch.zeros_like(border[:1])], dim=1)])
    # Where the reward tells some answers not apart, the least q that solves it.
    known = torch.cat([logits, torch.ones_like(logits[..., :1])], dim=-1)
    q = (known @ torch.linalg.pinv(system, rtol=1e-9).mT)[..., :-1].clamp(min=0.0)
    return q / q.sum(dim=-1, keepdim=True)


def answers(logits: Tensor, table: Tensor, likely: Tensor) -> Tensor:
    """Log-probabilities (3, *, C): the policy's own, its beliefs, and those of the logits that likelihood trained."""
    return torch.stack(
        [torch.log_softmax(logits, dim=-1), beliefs(logits, table).log(), torch.log_softmax(likely, dim=-1)]
    )


def mixed(logs: Tensor, shares: np.ndarray) -> Tensor:
    """log Σ_k shares_k exp(logs_k), for (K, *)."""
    return torch.logsumexp(logs + torch.from_numpy(shares).log().reshape(-1, *[1] * (logs.ndim - 1)), dim=0)


def shares_of(logs: Tensor, inside: Tensor, known: Sequence[float]) -> np.ndarray:
    """Shares (K,) of log-probabilities of the rows' labels (K, M, N) that make the rows inside each fold likeliest.

    Args:
        logs: (K, M, N).
        inside: (M, N), what of each row's weight is in each fold.
        known: (K,), positive: counted beside the rows are so many whose label only that one of the K holds possible.
            They keep its share above zero, so that nothing is impossible that it holds possible, and few rows decide
            with caution.
    """
    used = inside > 0
    some, weight, more = logs[:, used], inside[used].numpy(), np.asarray(known)
    chances = (some - some.max(dim=0).values).exp().numpy()
    total, count = float(weight.sum() + more.sum()), len(more)

    def loss(shares: np.ndarray) -> float:
        # With the sum of the shares added no condition on it is needed: it is one where this is least.
        return float(shares.sum() - (weight @ np.log(shares @ chances) + more @ np.log(shares)) / total)

    # Newton's method, convex, in the interior.
    shares = np.full(count, 1.0 / count)
    for _ in range(100):
        relative = chances / (shares @ chances)
        slope = 1.0 - (relative @ weight + more / shares) / total
        if np.abs(slope * shares).max() < 1e-8:
            break
        step = -np.linalg.solve(((relative * weight) @ relative.T + np.diag(more / shares**2)) / total, slope)
        step *= min(1.0, 0.9 / float((-step / shares).max().clip(min=1e-12)))
        least = loss(shares)
        while loss(shares + step) > least and np.abs(step / shares).max() > 1e-9:
            step *= 0.5
        shares = shares + step
    return shares / shares.sum()


def set_covariance(policy: Policy, covariance: Tensor) -> None:
    """Gives a Gaussian policy's members the covariance (D, D), or its diagonal, in the outputs' unit."""
    if isinstance(policy, FullStack):
        factor = torch.linalg.cholesky(covariance)
        policy.log_diagonal.copy_(factor.diagonal().log())
        policy.below_diagonal.copy_(factor.tril(-1))
    else:
        cast(LogStd, cast(GaussianPolicy, policy).log_std_network).value.copy_(0.5 * covariance.diagonal().log())


def repeated(rows: Rows, members: int) -> Batch:
    """The rows once for each member: targets (M, N) or (M, N, D)."""
    return Batch(rows.inputs, rows.target.expand(members, *rows.target.shape))


def in_units(target: Tensor, unit: Tensor) -> Tensor:
    """z with F z the values (*, N, D) and F the unit (D, D); labels have none."""
    if not target.is_floating_point():
        return target
    return torch.linalg.solve_triangular(unit.mT, target, upper=True, left=False)


def spread(policy: Policy, together: Policy) -> None:
    """Each member of `together` becomes a copy of the last member of `policy`."""
    with torch.no_grad():
        for source, parameter in zip(policy.parameters(), together.parameters(), strict=True):
            parameter.copy_(source[-1:].expand_as(parameter))
        network_of(together).unit.copy_(network_of(policy).unit)


def distinct(X: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct rows of positive weight, sorted, and the sums of their weights: (N', F), (N', D), (N',)."""
    # Adding zero makes -0 and 0 the same row.
    rows = np.column_stack([X, y])[weight > 0] + 0.0
    rows, index = np.unique(rows, axis=0, return_inverse=True)
    return rows[:, : X.shape[1]], rows[:, X.shape[1] :], np.bincount(index.reshape(-1), weight[weight > 0])


def deal(strata: np.ndarray, weight: np.ndarray, folds: int, random: np.random.RandomState) -> np.ndarray:
    """What of each row's weight is in each fold, (M, N), M at most `folds`.

    Rows of a stratum are shuffled and laid end to end, each as long as its weight; units of that length go to the folds
    in turn. A unit is an observation, of weight one, or of the mean weight if that is less.
    """
    order = random.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    ends = np.cumsum(weight[order]) / min(1.0, weight.mean())
    members = min(folds, max(2, math.floor(ends[-1])))
    # Of what lies below a place a fold has its units of whole rounds, and what the last round has reached of the next.
    edges = np.concatenate([[0.0], ends])
    rounds = np.floor(edges / members)
    below = rounds + np.clip(edges - members * rounds - np.arange(members)[:, None], 0.0, 1.0)
    dealt = np.empty((members, len(strata)))
    dealt[:, order] = np.diff(below, axis=1) * min(1.0, weight.mean())
    return dealt


def quasi_newton(
    learned: nn.Module, evaluate: Callable[[], tuple[float, Tensors]], keep: Callable[[], None], most: int, *,
    tolerance: float, enough: float, prior: float,
) -> float:  # fmt: skip
    """BFGS on the parameters φ of a module, which are left where the loss was least.

    It moves arsinh φ: a step is relative where φ is large and absolute where it is small. None is longer than `LONGEST`
    in any of them, for the losses far away are no guide.

    Args:
        evaluate: the loss at the parameters as they are, and its gradient.
        keep: called after an evaluation that the next ones are to start from.
        most: evaluations.
        tolerance: of the gradient's largest entry, at which to end.
        enough: end where a step is to lower the loss by less, or has twice lowered it by less.
        prior: (prior/2) ‖arsinh φ - arsinh φ₀‖² is added to the loss, φ₀ where it starts.

    Returns:
        the gradient's largest entry where the loss was least, or 0 if the steps had come to gain too little.
    """
    phi = list(learned.parameters())
    start = point = np.arcsinh(flat(phi))

    def value(point: np.ndarray) -> tuple[float, np.ndarray]:
        nn.utils.vector_to_parameters(torch.from_numpy(np.sinh(point)), phi)
        loss, gradient = evaluate()
        loss += 0.5 * prior * float(np.square(point - start).sum())
        return loss, flat(gradient) * np.cosh(point) + prior * (point - start)

    loss, slope = value(point)
    keep()
    left, small = most - 1, 0
    curvature, known = Curvature(1.0 / (CURVATURE * abs(loss))), False
    while left > 0 and np.abs(slope).max() > tolerance and small < 2:
        step = -curvature.inverse_product(slope)
        step *= min(1.0, LONGEST / np.abs(step).max())
        step = np.clip(point + step, -FARTHEST, FARTHEST) - point
        gain = -float(step @ slope)
        if 0.5 * gain < enough:
            small = 2
            break
        left -= 1
        tried, tried_slope = value(point + step)
        change = tried_slope - slope
        if step @ change > 0:
            # A step that led nowhere says why, and the next one is shorter.
            curvature.add(step, change, rescale=not known)
            known = True
        elif tried >= loss:
            curvature.scale *= 0.25
        if tried < loss:
            small = small + 1 if loss - tried < enough else 0
            point, loss, slope = point + step, tried, tried_slope
            keep()
    nn.utils.vector_to_parameters(torch.from_numpy(np.sinh(point)), phi)
    return 0.0 if small >= 2 else float(np.abs(slope).max())


class Curvature:
    """BFGS's inverse Hessian of the loss in (*, P), from steps and changes of the slope, for each * on its own.

    Args:
        scale: the multiple of the identity that it starts from.
        most: pairs that it keeps.
    """

    def __init__(self, scale: float, most: int | None = None) -> None:
        self.scale: float | np.ndarray = scale
        self._pairs: deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = deque(maxlen=most)

    def add(self, step: np.ndarray, change: np.ndarray, rescale: bool) -> None:
        """A step along which the slope did not grow tells nothing."""
        curvature, length = _dot(step, change), _dot(change, change)
        known = curvature > 0
        if rescale:
            self.scale = np.where(known, curvature / np.where(known, length, 1.0), self.scale)
        self._pairs.append((step, change, np.where(known, 1.0 / np.where(known, curvature, 1.0), 0.0)))

    def inverse_product(self, slope: np.ndarray) -> np.ndarray:
        product, shares = slope.copy(), []
        for step, change, inverse in reversed(self._pairs):
            shares.append(inverse * _dot(step, product))
            product -= shares[-1] * change
        product *= self.scale
        for (step, change, inverse), share in zip(self._pairs, reversed(shares), strict=True):
            product += (share - inverse * _dot(change, product)) * step
        return product


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.einsum("...p,...p->...", left, right)[..., None]


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    """The tensors' entries, one after another."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).numpy()
