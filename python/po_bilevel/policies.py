"""Policies p_θ(y|x): modules whose forward gives the distribution parameters that the `po_kernels` ops take.

Each family also knows its log-likelihood, `log_prob`, and its policy-gradient loss, `policy_loss`, so that
training code is the same for all of them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

import po_kernels as pk

from . import fused
from .networks import mlp
from .rewards import MatrixReward, SampledReward, TabularReward

# Where log σ starts: σ = 1 before any data are seen.
INITIAL_LOG_STD = 0.0
# Of a bounded log σ, for standardised values.
LOG_STD_BOUNDS = (-5.0, 2.0)

Std = Literal["learned", "fixed", "bounded"]


class Policy(nn.Module, ABC):
    """A conditional distribution p_θ(y|x) with a likelihood and a policy-gradient loss.

    `target` has a row for each of `inputs`, or has R of them: then it has R in front, and the network runs once for
    all observations of a row.
    """

    @abstractmethod
    def log_prob(self, inputs: Tensor, target: Tensor) -> Tensor:
        """log p_θ(target | inputs) in nats, one for each observation."""

    @abstractmethod
    def policy_loss(self, inputs: Tensor, target: Tensor, reward: nn.Module, **options: Any) -> Tensor:
        """The entropy-regularised policy-gradient loss under `reward`, ().

        Args:
            inputs: x, (*, in_features).
            target: y, of the shape that `log_prob` takes.
            reward: r_φ: one that the family has a fused loss for, or a `SampledReward`.
            options: keyword arguments of the fused loss: entropy_coef, estimator, num_samples, seed, ...

        Raises:
            TypeError: the family has no fused loss for this kind of reward.
            ValueError: a closed form asked for with a reward that has to be sampled.
        """

    def sample(self, inputs: Tensor, shape: Sequence[int], *, seed: int | None = None) -> Tensor:
        """Constant samples (*shape, *, ...) for the rows of inputs (*, in_features).

        `log_prob` takes them with the dimensions of shape as one.

        Raises:
            NotImplementedError: a policy of another family, which says nothing of how to sample it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sample, which methods that score samples need")

    def fused_network(self) -> pk.Network | None:
        """The policy as `po_kernels` trains it in native calls; None of one whose forward is not known to be such."""
        return None


class _Ops(NamedTuple):
    sample: Any
    log_prob: Any
    policy_loss: Any
    surrogate_loss: Any


class _Gaussian(Policy):
    """What Gaussians have in common. `forward` gives the mean, and a spread that the family's ops take."""

    _ops: ClassVar["_Ops"]
    # Of a spread that is the same for all rows.
    _spread_ndim: ClassVar[int]

    def log_prob(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Joint log-density of target (*, D) or (R, *, D), a sum over dimensions, (*) or (R, *)."""
        return self._ops.log_prob(*self(inputs), target)

    def sample(self, inputs: Tensor, shape: Sequence[int], *, seed: int | None = None) -> Tensor:
        """See `Policy.sample`; (*shape, *, D)."""
        with torch.no_grad():
            mean, spread = self(inputs)
            return self._ops.sample(mean, spread, math.prod(shape), seed=seed).unflatten(0, tuple(shape))

    def policy_loss(self, inputs: Tensor, target: Tensor, reward: nn.Module, **options: Any) -> Tensor:
        """See `Policy.policy_loss`; target is (*, D) or (R, *, D), the reward a `MatrixReward` or a `SampledReward`."""
        _accepted(self, reward, MatrixReward, "a MahalanobisReward")
        if isinstance(reward, MatrixReward):
            loss = fused.policy_loss(self.fused_network(), inputs, target, reward.precision(), options)
            if loss is not None:
                return loss
        mean, spread = self(inputs)
        if _repeated(self, target, mean.shape):
            mean = mean.expand(target.shape)
            if spread.ndim > self._spread_ndim:
                spread = spread.expand(*target.shape[:-1], *spread.shape[-self._spread_ndim :])
        if isinstance(reward, MatrixReward):
            return self._ops.policy_loss(mean, spread, target, reward.precision(), **options)
        samples, rewards, options = _scored(self, self._ops.sample, (mean, spread), inputs, target, reward, options)
        return self._ops.surrogate_loss(mean, spread, samples, rewards, **options)


class GaussianPolicy(_Gaussian):
    """Diagonal Gaussian N(mean(x), diag σ²); forward gives (mean, log_std).

    Args:
        mean_network: (*, in_features) -> (*, D).
        log_std_network: (*, in_features) -> (*, D) for a state-dependent std; None for one vector log_std (D,).
        dim: D.
        std: "learned", free; "fixed" at initial_log_std, a constant; "bounded", learned between the bounds:
            log σ = low + (high - low) sigmoid(s). Clamping would stop the gradient at a bound, and two softpluses, one
            for each bound, let the one through that is applied first; this can pass neither.
        initial_log_std: where log σ is, or starts, for all x.
        log_std_bounds: (low, high), of "bounded" only; (-5, 2) by default.

    Raises:
        ValueError: an unknown std; fixed and state-dependent; bounds without "bounded", or bounds that leave
            initial_log_std outside.

    Example:
        >>> import torch
        >>> policy = GaussianPolicy(torch.nn.Linear(3, 2), None, 2, std="bounded", log_std_bounds=(-3.0, 1.0))
        >>> x, y = torch.zeros(5, 3), torch.zeros(5, 2)
        >>> policy.log_prob(x, y).shape, policy.policy_loss(x, y, MahalanobisReward(2), entropy_coef=0.5).shape
        (torch.Size([5]), torch.Size([]))
    """

    _ops = _Ops(pk.gaussian_sample, pk.gaussian_log_prob, pk.gaussian_policy_loss, pk.gaussian_surrogate_loss)
    _spread_ndim = 1

    def __init__(
        self, mean_network: nn.Module, log_std_network: nn.Module | None, dim: int, *, std: Std = "learned",
        initial_log_std: float = INITIAL_LOG_STD, log_std_bounds: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if std not in get_args(Std):
            raise ValueError(f"std: expected one of {', '.join(map(repr, get_args(Std)))}, got {std!r}")
        if std == "fixed" and log_std_network is not None:
            raise ValueError("std: expected 'learned' or 'bounded' for a state-dependent std, got 'fixed'")
        if std != "bounded" and log_std_bounds is not None:
            raise ValueError(f"log_std_bounds: expected None with std={std!r}, got {log_std_bounds}")
        if not math.isfinite(initial_log_std):
            raise ValueError(f"initial_log_std: expected a finite number, got {initial_log_std}")
        low, high = log_std_bounds or LOG_STD_BOUNDS
        if std == "bounded" and not -math.inf < low < initial_log_std < high < math.inf:
            raise ValueError(
                f"log_std_bounds: expected finite bounds on both sides of initial_log_std = {initial_log_std}, "
                f"got {(low, high)}"
            )
        self.mean_network = mean_network
        self.log_std_network = log_std_network
        self.std = std
        self.log_std_bounds: tuple[float, float] | None = (low, high) if std == "bounded" else None
        start = initial_log_std
        if std == "bounded":
            start = float(torch.logit(torch.tensor((initial_log_std - low) / (high - low), dtype=torch.float64)))
        self._start = start
        if std == "fixed":
            self.register_buffer("log_std", torch.full((dim,), start))
        elif log_std_network is None:
            self.log_std: nn.Parameter = nn.Parameter(torch.full((dim,), start))

    def extra_repr(self) -> str:
        return f"std={self.std!r}" + (f", log_std_bounds={self.log_std_bounds}" if self.log_std_bounds else "")

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """x (*, in_features) -> mean (*, D), and log_std (*, D) if state-dependent, else (D,)."""
        log_std = self.log_std if self.log_std_network is None else self.log_std_network(inputs)
        if self.log_std_bounds is not None:
            low, high = self.log_std_bounds
            log_std = low + (high - low) * torch.sigmoid(log_std)
        return self.mean_network(inputs), log_std

    def fused_network(self) -> pk.Network | None:
        """See `Policy.fused_network`."""
        if _differs(self, GaussianPolicy, "forward", "log_prob", "policy_loss", "_ops"):
            return None
        spread = () if self.log_std_network is not None else (self.log_std,)
        return fused.network(
            self, "gaussian", self.mean_network, spread, spread_module=self.log_std_network, bounds=self.log_std_bounds
        )


class LinearGaussian(GaussianPolicy):
    """mean(x) = W x + b.

    Args:
        in_features: size of x.
        dim: D, size of y.
        state_dependent_std: log σ is linear in x too (before its bounds, if it has any), else one vector (D,).
        options: std, initial_log_std, log_std_bounds, as in `GaussianPolicy`.

    Example:
        >>> import torch
        >>> mean, log_std = LinearGaussian(3, 2, state_dependent_std=True)(torch.zeros(5, 3))
        >>> mean.shape, log_std.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(self, in_features: int, dim: int, *, state_dependent_std: bool = False, **options: Any) -> None:
        log_std = nn.Linear(in_features, dim) if state_dependent_std else None
        super().__init__(nn.Linear(in_features, dim), log_std, dim, **options)
        if log_std is not None:
            _initially_constant(log_std, self._start)


class MLPGaussian(GaussianPolicy):
    """mean(x) is a tanh network.

    Args:
        in_features: size of x.
        dim: D, size of y.
        hidden: widths of the hidden layers.
        state_dependent_std: log σ is a network of x of its own, else one vector (D,).
        options: std, initial_log_std, log_std_bounds, as in `GaussianPolicy`.

    Example:
        >>> import torch
        >>> MLPGaussian(3, 2, hidden=(16,)).sample(torch.zeros(5, 3), (10,)).shape
        torch.Size([10, 5, 2])
    """

    def __init__(
        self, in_features: int, dim: int, *, hidden: Sequence[int] = (64, 64), state_dependent_std: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        log_std = mlp(in_features, hidden, dim) if state_dependent_std else None
        super().__init__(mlp(in_features, hidden, dim), log_std, dim, **options)
        if log_std is not None:
            _initially_constant(cast(nn.Linear, log_std[-1]), self._start)


class FullGaussianPolicy(_Gaussian):
    """Gaussian N(mean(x), L Lᵀ) with one full covariance for all x; forward gives (mean, scale_tril).

    L is lower triangular with diagonal exp(log_diagonal), so positive definite whatever the parameters.

    Args:
        mean_network: (*, in_features) -> (*, D).
        dim: D.

    Example:
        >>> import torch
        >>> FullGaussianPolicy(torch.nn.Linear(3, 2), 2).scale_tril().shape
        torch.Size([2, 2])
    """

    _ops = _Ops(pk.mvn_sample, pk.mvn_log_prob, pk.mvn_policy_loss, pk.mvn_surrogate_loss)
    _spread_ndim = 2

    def __init__(self, mean_network: nn.Module, dim: int) -> None:
        super().__init__()
        self.mean_network = mean_network
        self.log_diagonal: nn.Parameter = nn.Parameter(torch.full((dim,), INITIAL_LOG_STD))
        self.below_diagonal: nn.Parameter = nn.Parameter(torch.zeros(dim, dim))

    def scale_tril(self) -> Tensor:
        """L, (D, D)."""
        return torch.tril(self.below_diagonal, -1) + torch.diag(self.log_diagonal.exp())

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """x (*, in_features) -> mean (*, D), scale_tril (D, D)."""
        return self.mean_network(inputs), self.scale_tril()

    def fused_network(self) -> pk.Network | None:
        """See `Policy.fused_network`."""
        if _differs(self, FullGaussianPolicy, "forward", "scale_tril", "log_prob", "policy_loss", "_ops"):
            return None
        return fused.network(self, "mvn", self.mean_network, (self.log_diagonal, self.below_diagonal))


class LinearFullGaussian(FullGaussianPolicy):
    """mean(x) = W x + b, x of size in_features, y of size dim.

    Example:
        >>> import torch
        >>> LinearFullGaussian(3, 2).log_prob(torch.zeros(5, 3), torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__(nn.Linear(in_features, dim), dim)


class MLPFullGaussian(FullGaussianPolicy):
    """mean(x) is a tanh network with the given hidden widths.

    Example:
        >>> import torch
        >>> MLPFullGaussian(3, 2, hidden=(16,)).log_prob(torch.zeros(5, 3), torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, in_features: int, dim: int, *, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__(mlp(in_features, hidden, dim), dim)


class CategoricalPolicy(Policy):
    """Categorical over C classes; forward gives logits.

    The logits of all classes are free, so adding one number to all of them changes nothing: the Hessian of any
    loss of such a policy is singular along that direction unless the loss is regularised (an L2 penalty does).

    Args:
        network: (*, in_features) -> (*, C).

    Example:
        >>> import torch
        >>> policy = CategoricalPolicy(torch.nn.Linear(3, 4))
        >>> policy.log_prob(torch.zeros(5, 3), torch.tensor([0, 1, 2, 3, 0])).shape
        torch.Size([5])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """x (*, in_features) -> logits (*, C)."""
        return self.network(inputs)

    def log_prob(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Log-probability of the integer labels target (*) or (R, *), of its shape."""
        return pk.categorical_log_prob(self(inputs), target)

    def sample(self, inputs: Tensor, shape: Sequence[int], *, seed: int | None = None) -> Tensor:
        """See `Policy.sample`; labels (*shape, *)."""
        with torch.no_grad():
            return pk.categorical_sample(self(inputs), math.prod(shape), seed=seed).unflatten(0, tuple(shape))

    def policy_loss(self, inputs: Tensor, target: Tensor, reward: nn.Module, **options: Any) -> Tensor:
        """See `Policy.policy_loss`; target is (*) or (R, *) integer labels, the reward a `TabularReward` or a
        `SampledReward`. One of the latter that does not use x is tabulated where the estimator is exact."""
        _accepted(self, reward, TabularReward, "a OneHotMahalanobisReward")
        if isinstance(reward, TabularReward):
            loss = fused.policy_loss(self.fused_network(), inputs, target, reward.table(), options)
            if loss is not None:
                return loss
        logits = self(inputs)
        classes = logits.shape[-1]
        if _repeated(self, target, logits.shape[:-1]):
            logits = logits.expand(*target.shape, classes)
        table = None
        if isinstance(reward, TabularReward):
            table = reward.table()
        elif isinstance(reward, SampledReward) and not reward.uses_inputs and options.get("estimator") in _CLOSED:
            one_hot = torch.eye(classes, dtype=logits.dtype, device=logits.device)
            table = reward(one_hot[:, None], one_hot, inputs.new_empty(1, 1, 0))
        if table is not None:
            return cast(Tensor, pk.categorical_policy_loss(logits, target, table, **options))
        if target.is_floating_point() or target.dtype == torch.bool:
            raise TypeError(f"{type(self).__name__}.policy_loss: target: expected integer labels, got {target.dtype}")
        if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classes:
            raise ValueError(
                f"{type(self).__name__}.policy_loss: target: expected labels from 0 to {classes - 1}, got labels from "
                f"{int(target.min())} to {int(target.max())}"
            )
        labels = functional.one_hot(target.long(), classes).to(logits.dtype)
        samples, rewards, options = _scored(self, pk.categorical_sample, (logits,), inputs, labels, reward, options)
        return cast(Tensor, pk.categorical_surrogate_loss(logits, samples, rewards, **options))

    def fused_network(self) -> pk.Network | None:
        """See `Policy.fused_network`."""
        if _differs(self, CategoricalPolicy, "forward", "log_prob", "policy_loss"):
            return None
        return fused.network(self, "categorical", self.network)


class LinearCategorical(CategoricalPolicy):
    """logits = W x + b: multinomial logistic regression.

    Example:
        >>> import torch
        >>> LinearCategorical(3, 4)(torch.zeros(5, 3)).shape
        torch.Size([5, 4])
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(nn.Linear(in_features, num_classes))


class MLPCategorical(CategoricalPolicy):
    """Logits from a tanh network with the given hidden widths.

    Example:
        >>> import torch
        >>> MLPCategorical(3, 4, hidden=(16,)).sample(torch.zeros(5, 3), (10,)).shape
        torch.Size([10, 5])
    """

    def __init__(self, in_features: int, num_classes: int, *, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__(mlp(in_features, hidden, num_classes))


def _differs(policy: Policy, family: type[Policy], *names: str) -> bool:
    """Whether its class, or the object itself, has something else of these names than the family."""
    return any(getattr(type(policy), name) is not getattr(family, name) or name in vars(policy) for name in names)


def _repeated(policy: Policy, target: Tensor, shape: torch.Size) -> bool:
    """Whether a target has several observations of each row, R in front of the shape of one."""
    if target.ndim - len(shape) not in (0, 1) or target.shape[target.ndim - len(shape) :] != shape:
        raise ValueError(
            f"{type(policy).__name__}.policy_loss: target: expected shape {tuple(shape)} or (R, *{tuple(shape)}) for "
            f"these inputs, got {tuple(target.shape)}"
        )
    return target.ndim > len(shape)


def _accepted(policy: Policy, reward: nn.Module, closed: type[nn.Module], such_as: str) -> None:
    if not isinstance(reward, (closed, SampledReward)):
        raise TypeError(
            f"{type(policy).__name__}.policy_loss: reward: expected {such_as} or another {closed.__name__}, or a "
            f"SampledReward, got {type(reward).__name__}"
        )


# Estimators that take no samples, None being the default of the fused losses.
_CLOSED = (None, "exact", "analytic")


def _scored(
    policy: Policy, sample: Any, parameters: tuple[Tensor, ...], inputs: Tensor, target: Tensor, reward: nn.Module,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    """Samples (G, *, ...), constant, their rewards (G, *), and what is left of the options for a surrogate loss.

    With "reparam" the rewards depend on the parameters through the samples, which is where its derivatives come from;
    with the others that path would count twice.
    """
    options = dict(options)
    estimator, group, seed = (options.pop(key, None) for key in ("estimator", "num_samples", "seed"))
    if estimator in _CLOSED or group is None:
        raise ValueError(
            f"{type(policy).__name__}.policy_loss: estimator: expected 'reparam', 'dice' or 'reinforce' with "
            f"num_samples for a {type(reward).__name__}, which has no closed form, got {estimator!r} and "
            f"num_samples={group}"
        )
    path = estimator == "reparam"
    samples = sample(*(p if path else p.detach() for p in parameters), group, seed=seed)
    answers = samples
    if not samples.is_floating_point():
        answers = functional.one_hot(samples, target.shape[-1]).to(target.dtype)
    rewards = reward(answers, target, inputs)
    return samples.detach(), rewards, options | {"estimator": estimator}


def _initially_constant(linear: nn.Linear, value: float) -> None:
    """Makes the layer's output the value for every input."""
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, value)
