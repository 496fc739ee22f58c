"""The inner and the outer loss of reward learning (arXiv 2510.07624, eq. 2), for any policy of this package."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import po_kernels as pk

from . import fused
from .policies import Policy
from .rewards import MatrixReward, TabularReward


class Batch(NamedTuple):
    """Rows of data: inputs x (N, in_features) and targets y, (N,) labels or (N, D) values.

    There may be R observations of each row: integer labels (R, N), values (R, N, D).
    """

    inputs: Tensor
    target: Tensor

    @property
    def row_axis(self) -> int:
        """The axis of the target that counts rows."""
        return int(self.target.ndim == (3 if self.target.is_floating_point() else 2))

    def check(self, name: str) -> "Batch":
        """Itself, if it has rows, a target for each, and no number that is not finite.

        Raises:
            TypeError: what it has are no tensors.
            ValueError: it has not; names the argument `name`, and the place of such a number.
        """
        for field, values in zip(self._fields, self, strict=True):
            if not isinstance(values, Tensor):
                kind = f"{type(values).__module__}.{type(values).__name__}".removeprefix("builtins.")
                raise TypeError(f"{name}: expected {field} that are a tensor, got {kind}; torch.as_tensor makes one")
        if self.inputs.ndim < 1 or len(self.inputs) < 1:
            raise ValueError(f"{name}: expected at least one row, got inputs of shape {tuple(self.inputs.shape)}")
        if self.target.ndim < 1 or self.target.shape[self.row_axis] != len(self.inputs):
            raise ValueError(
                f"{name}: expected a target for each of {len(self.inputs)} rows of inputs, got targets of shape "
                f"{tuple(self.target.shape)}"
            )
        for field, values in zip(self._fields, self, strict=True):
            if values.is_floating_point() and not (finite := values.isfinite()).all():
                place = (~finite).nonzero()[0].tolist()
                value = float(values[tuple(place)])
                raise ValueError(f"{name}: expected finite numbers, got {value} at {field}{place}")
        return self

    def check_for(self, policy: Policy, name: str, *, autocast: bool = False) -> None:
        """Refuses inputs of another type or size than a policy of linear layers takes, with or without autocast.

        Raises:
            ValueError: they are: names the argument `name`, and what to do.
        """
        network = policy.fused_network()
        if network is None:
            return
        weight = network.layers[0][0]
        if self.inputs.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{name}: expected inputs of the policy's {weight.shape[1]} features, got shape "
                f"{tuple(self.inputs.shape)}"
            )
        types = {self.inputs.dtype, weight.dtype}
        # Autocast leaves double precision alone.
        cast = autocast or torch.is_autocast_enabled(self.inputs.device.type)
        if len(types) > 1 and not (cast and torch.float64 not in types):
            raise ValueError(
                f"{name}: expected inputs of {weight.dtype} as the policy has, got {self.inputs.dtype}; give "
                f"x.to({weight.dtype}), and y likewise, or policy.to({self.inputs.dtype})"
            )

    def rows(self, index: Tensor) -> "Batch":
        """The rows at the integer positions index (M,)."""
        return Batch(self.inputs[index], self.target.index_select(self.row_axis, index))

    def joined(self, other: "Batch") -> "Batch":
        """Its rows and those of another batch, which have as many observations each."""
        target = torch.cat([self.target, other.target], dim=self.row_axis)
        return Batch(torch.cat([self.inputs, other.inputs]), target)

    def split(self, fraction: float, seed: int) -> tuple["Batch", "Batch"]:
        """The rows in two disjoint parts, such as those of the inner and of the outer loss.

        Args:
            fraction: of the rows that the second part gets, rounded; each part gets at least one.
            seed: of the random choice.

        Raises:
            ValueError: a fraction outside (0, 1), or fewer than two rows.
        """
        count = self.inputs.shape[0]
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction}")
        if count < 2:
            raise ValueError(f"split: expected at least two rows, got {count}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
        order = order.to(self.inputs.device)
        size = min(max(round(fraction * count), 1), count - 1)
        return self.rows(order[size:].sort().values), self.rows(order[:size].sort().values)


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """F(θ) = -(1/N) Σ log p_θ(y|x) + (l2/2) ‖θ‖², in nats a row.

    Attributes:
        l2: strength of the penalty on all parameters of the policy, biases too.

    Example:
        >>> import torch
        >>> from po_bilevel import LinearGaussian
        >>> NegativeLogLikelihood(l2=0.1)(LinearGaussian(3, 2), Batch(torch.randn(50, 3), torch.randn(50, 2))).shape
        torch.Size([])
    """

    l2: float = 0.0

    def __post_init__(self) -> None:
        _check_l2(self, self.l2)

    def __call__(self, policy: Policy, batch: Batch) -> Tensor:
        loss = fused.policy_loss(policy.fused_network(), batch.inputs, batch.target, None, {})
        if loss is None:
            loss = -policy.log_prob(batch.inputs, batch.target).mean()
        return penalized(loss, policy, self.l2)


@dataclass(frozen=True)
class Likelihood:
    """A `NegativeLogLikelihood` as `train` takes it, (policy, batch, seed) -> ()."""

    loss: NegativeLogLikelihood

    def __call__(self, policy: Policy, batch: Batch, seed: int) -> Tensor:
        return self.loss(policy, batch)

    def steps(
        self, policy: Policy, data: Batch, optimizer: Optimizer, max_grad_norm: float | None
    ) -> fused.Steps | None:  # fmt: skip
        """See `PolicyGradientUnder.steps`."""
        if type(self.loss) is not NegativeLogLikelihood:
            return None
        return fused.Steps.of(policy, data, None, {"l2": self.loss.l2}, optimizer, max_grad_norm)


@dataclass(frozen=True)
class PolicyGradient:
    """L(θ, φ) = -(1/N) Σ { E[r_φ(ŷ, y)] + λ H } + (l2/2) ‖θ‖², through the policy's fused loss.

    Attributes:
        entropy_coef: λ, in units of reward a nat.
        estimator: as the fused loss names it; None for the closed form, "analytic" or "exact".
        num_samples: G, samples a row, for the sampled estimators.
        advantage: baseline of the score-function estimators.
        l2: strength of the penalty on all parameters of the policy, biases too. It makes the inner Hessian of a
            softmax policy regular, which is singular along equal shifts of all logits.
    """

    entropy_coef: float = 1.0
    estimator: pk.Estimator | None = None
    num_samples: int | None = None
    advantage: pk.Advantage = "loo"
    l2: float = 0.0

    def __post_init__(self) -> None:
        _check_l2(self, self.l2)

    def __call__(self, policy: Policy, reward: nn.Module, batch: Batch, seed: int) -> Tensor:
        loss = policy.policy_loss(batch.inputs, batch.target, reward, seed=seed, **self._options())
        return penalized(loss, policy, self.l2)

    def under(self, reward: nn.Module) -> "PolicyGradientUnder":
        """The loss of (policy, batch, seed) under the reward as it is now: its precision or table is computed once."""
        with torch.no_grad():
            if isinstance(reward, MatrixReward):
                reward = _Precision(reward.precision())
            elif isinstance(reward, TabularReward):
                reward = _Table(reward.table())
        return PolicyGradientUnder(self, reward)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"entropy_coef": self.entropy_coef, "advantage": self.advantage}
        if self.estimator is not None:
            options["estimator"] = self.estimator
        if self.num_samples is not None:
            options["num_samples"] = self.num_samples
        return options


@dataclass(frozen=True)
class PolicyGradientUnder:
    """A `PolicyGradient` under a reward that stays as it is: (policy, batch, seed) -> ()."""

    loss: PolicyGradient
    reward: nn.Module

    def __call__(self, policy: Policy, batch: Batch, seed: int) -> Tensor:
        return self.loss(policy, self.reward, batch, seed)

    def steps(
        self, policy: Policy, data: Batch, optimizer: Optimizer, max_grad_norm: float | None
    ) -> fused.Steps | None:  # fmt: skip
        """The optimiser's steps under this loss in native calls, or None where they have to be taken one by one."""
        if type(self.loss) is not PolicyGradient or not isinstance(self.reward, (_Precision, _Table)):
            return None
        options = self.loss._options() | {"l2": self.loss.l2}
        return fused.Steps.of(policy, data, self.reward.value, options, optimizer, max_grad_norm)


class _Precision(MatrixReward):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def precision(self) -> Tensor:
        return self.value


class _Table(TabularReward):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def table(self) -> Tensor:
        return self.value


def _check_l2(loss: object, l2: float) -> None:
    if not 0 <= l2 < math.inf:
        raise ValueError(f"{type(loss).__name__}: l2: expected a finite number of at least 0, got {l2}")


def penalized(loss: Tensor, policy: nn.Module, l2: float) -> Tensor:
    """loss + (l2/2) ‖θ‖², over all parameters of the policy."""
    if l2 == 0:
        return loss
    # One vector: many small parameters would cost more in calls than in arithmetic.
    vector = torch.cat([p.reshape(-1) for p in policy.parameters()])
    # Not as a product, which autocast would compute in few digits.
    return loss + 0.5 * l2 * vector.square().sum()
