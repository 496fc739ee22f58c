"""Policies p_θ(y|x): modules whose forward gives the distribution parameters that the `po_kernels` ops take.

Each family also knows its log-likelihood, `log_prob`, and its policy-gradient loss, `policy_loss`, so that
training code is the same for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import po_kernels as pk

from .rewards import MatrixReward, TabularReward

# Where log σ starts: σ = 1 before any data are seen.
INITIAL_LOG_STD = 0.0


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Linear layers with tanh between them: (*, in_features) -> (*, out_features).

    tanh has the continuous second derivatives that implicit hypergradients need; ReLU has none at its kinks.
    """
    layers: list[nn.Module] = []
    width = in_features
    for size in hidden:
        layers += [nn.Linear(width, size), nn.Tanh()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, out_features))


class Policy(nn.Module, ABC):
    """A conditional distribution p_θ(y|x) with a likelihood and a policy-gradient loss."""

    @abstractmethod
    def log_prob(self, inputs: Tensor, target: Tensor) -> Tensor:
        """log p_θ(target | inputs) in nats, one a row, (*)."""

    @abstractmethod
    def policy_loss(self, inputs: Tensor, target: Tensor, reward: nn.Module, **options: Any) -> Tensor:
        """The entropy-regularised policy-gradient loss under `reward`, ().

        Args:
            inputs: x, (*, in_features).
            target: y, of the shape that `log_prob` takes.
            reward: r_φ, of the kind that the family has a fused loss for.
            options: keyword arguments of the fused loss: entropy_coef, estimator, num_samples, seed, ...

        Raises:
            TypeError: the family has no fused loss for this kind of reward.
        """


class GaussianPolicy(Policy):
    """Diagonal Gaussian N(mean(x), diag σ²); forward gives (mean, log_std).

    Args:
        mean_network: (*, in_features) -> (*, D).
        log_std_network: (*, in_features) -> (*, D) for a state-dependent std; None for one vector log_std (D,).
        dim: D.
    """

    def __init__(self, mean_network: nn.Module, log_std_network: nn.Module | None, dim: int) -> None:
        super().__init__()
        self.mean_network = mean_network
        self.log_std_network = log_std_network
        if log_std_network is None:
            self.log_std = nn.Parameter(torch.full((dim,), INITIAL_LOG_STD))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """x (*, in_features) -> mean (*, D), and log_std (*, D) if state-dependent, else (D,)."""
        log_std = self.log_std if self.log_std_network is None else self.log_std_network(inputs)
        return self.mean_network(inputs), log_std

    def log_prob(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Joint log-density of target (*, D), a sum over dimensions, (*)."""
        mean, log_std = self(inputs)
        return pk.gaussian_log_prob(mean, log_std, target)

    def policy_loss(self, inputs: Tensor, target: Tensor, reward: nn.Module, **options: Any) -> Tensor:
        """See `Policy.policy_loss`; target is (*, D) and the reward a `MahalanobisReward`."""
        if not isinstance(reward, MatrixReward):
            raise TypeError(
                f"{type(self).__name__}.policy_loss: reward: expected one with a precision(), such as "
                f"MahalanobisReward, got {type(reward).__name__}"
            )
        mean, log_std = self(inputs)
        return cast(Tensor, pk.gaussian_policy_loss(mean, log_std, target, reward.precision(), **options))


class LinearGaussian(GaussianPolicy):
    """mean(x) = W x + b.

    Args:
        in_features: size of x.
        dim: D, size of y.
        state_dependent_std: log σ is linear in x too, else one learned vector (D,).
    """

    def __init__(self, in_features: int, dim: int, *, state_dependent_std: bool = False) -> None:
        log_std = nn.Linear(in_features, dim) if state_dependent_std else None
        if log_std is not None:
            _initially_constant(log_std)
        super().__init__(nn.Linear(in_features, dim), log_std, dim)


class MLPGaussian(GaussianPolicy):
    """mean(x) is a tanh network.

    Args:
        in_features: size of x.
        dim: D, size of y.
        hidden: widths of the hidden layers.
        state_dependent_std: log σ is a network of x of its own, else one learned vector (D,).
    """

    def __init__(
        self, in_features: int, dim: int, *, hidden: Sequence[int] = (64, 64), state_dependent_std: bool = False
    ) -> None:
        log_std = None
        if state_dependent_std:
            log_std = mlp(in_features, hidden, dim)
            _initially_constant(cast(nn.Linear, log_std[-1]))
        super().__init__(mlp(in_features, hidden, dim), log_std, dim)


class CategoricalPolicy(Policy):
    """Categorical over C classes; forward gives logits.

    The logits of all classes are free, so adding one number to all of them changes nothing: the Hessian of any
    loss of such a policy is singular along that direction unless the loss is regularised (an L2 penalty does).

    Args:
        network: (*, in_features) -> (*, C).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """x (*, in_features) -> logits (*, C)."""
        return self.network(inputs)

    def log_prob(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Log-probability of the integer labels target (*), (*)."""
        return pk.categorical_log_prob(self(inputs), target)

    def policy_loss(self, inputs: Tensor, target: Tensor, reward: nn.Module, **options: Any) -> Tensor:
        """See `Policy.policy_loss`; target is (*) integer labels and the reward one with a table()."""
        if not isinstance(reward, TabularReward):
            raise TypeError(
                f"{type(self).__name__}.policy_loss: reward: expected one with a table(), such as "
                f"OneHotMahalanobisReward, got {type(reward).__name__}"
            )
        return cast(Tensor, pk.categorical_policy_loss(self(inputs), target, reward.table(), **options))


class LinearCategorical(CategoricalPolicy):
    """logits = W x + b: multinomial logistic regression."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(nn.Linear(in_features, num_classes))


class MLPCategorical(CategoricalPolicy):
    """Logits from a tanh network with the given hidden widths."""

    def __init__(self, in_features: int, num_classes: int, *, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__(mlp(in_features, hidden, num_classes))


def _initially_constant(linear: nn.Linear) -> None:
    """Makes the layer's output INITIAL_LOG_STD for every input."""
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, INITIAL_LOG_STD)
