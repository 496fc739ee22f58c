"""Policies that train together, each on its own weight of the rows, and what the others' rows say of their reward.

`Networks` trains them by L-BFGS on the fused losses; `linear` has second-order methods for linear policies.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import crossfit
from .crossfit import RowLoss, Rows, network_of, policy_gradient
from .hypergradients import Tensors
from .policies import Policy
from .training import check_finite

# The most pairs of steps and gradients that L-BFGS keeps.
HISTORY = 20
# Halvings of a step, and what of a loss is rounding in single precision.
TRIES, ROUNDED = 12, 1e-6
# Iterations without a gain on the held-out rows after which training stops early.
PATIENCE = 20


class Learned(nn.Module):
    """φ: a reward, and the penalty (l2/2) ‖weights‖² that goes with it.

    Args:
        l2: its strength, or where it starts.
        free: it is learned too, by its logarithm.
    """

    log_factor: Tensor

    def __init__(self, reward: nn.Module, l2: float, free: bool) -> None:
        super().__init__()
        self.reward = reward
        self._start = float(l2)
        factor = torch.zeros((), dtype=torch.float64)
        if free:
            self.log_factor = nn.Parameter(factor)
        else:
            self.register_buffer("log_factor", factor)

    def l2(self) -> Tensor:
        """()."""
        return self._start * self.log_factor.exp()


class Members(ABC):
    """M policies that are trained together, each on what of the rows' weight is outside its fold.

    Attributes:
        policy: all of them, in one module.
    """

    policy: Policy

    @abstractmethod
    def begin(self, l2: float) -> None:
        """Trains to the optimum of the loss that a reward is learned from, likelihood for a classifier."""

    @abstractmethod
    def train(self, phi: Learned) -> int:
        """Trains to the optimum that is next to what was kept; returns how many steps it took."""

    @abstractmethod
    def evaluate(self, phi: Learned) -> tuple[float, Tensors]:
        """Trains.

        Returns:
            F(φ), the loss of the rows inside the folds, nats a row, and dF/dφ, a tensor for each of its parameters.
        """

    @abstractmethod
    def keep(self) -> None:
        """The next trainings start from what the policies are now: some rewards lead to where none comes back from."""


class Networks:
    """Policies with hidden layers, whose training stops where the rows inside the folds are likeliest.

    Each member takes steps of L-BFGS of its own, all at once, in single precision.

    Args:
        policy: with a member for each row of `inside`.
        rows: standardised.
        inside: (M, N), what of each row's weight is in each fold.
        held_out: (policy, batch) -> (M, N), what the rows inside are judged by.
        tol, max_iter: as the estimators have them.
    """

    def __init__(
        self, policy: Policy, rows: Rows, inside: Tensor, *, held_out: RowLoss, tol: float, max_iter: int
    ) -> None:  # fmt: skip
        self._policy, self._held_out, self._tol, self._most = policy, held_out, tol, max_iter
        outside = (rows.weight - inside).clamp(min=0.0)
        total = outside.sum(dim=1)
        self._share, self._by_total = (outside / total[:, None]).float(), (1.0 / total).float()
        self._inside = (inside / rows.weight.sum()).float()
        labels = rows.target if not rows.target.is_floating_point() else rows.target.float()
        self._batch = crossfit.repeated(rows._replace(inputs=rows.inputs.float(), target=labels), len(inside))

    def train(self, reward: nn.Module | None, l2: float, enough: float) -> tuple[float, int]:
        """Trains under the reward, or by likelihood, and stops where gains of `enough` inside the folds have ended.

        Returns:
            the loss of the rows inside there, nats a row, and how many steps it took to know.
        """
        policy = copy.deepcopy(self._policy).float()
        loss = crossfit.likelihood if reward is None else policy_gradient(copy.deepcopy(reward).float())
        parameters = list(policy.parameters())
        sizes = [parameter[0].numel() for parameter in parameters]
        network = network_of(policy)

        def evaluate(point: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
            """Of parameters (M, P): losses (M,), their gradients (M, P), and the loss of the rows inside the folds."""
            with torch.no_grad():
                for parameter, part in zip(parameters, torch.from_numpy(point).split(sizes, dim=1), strict=True):
                    parameter.copy_(part.reshape(parameter.shape))
            with network.once(self._batch.inputs):
                values = (self._share * loss(policy, self._batch)).sum(dim=1)
                with torch.no_grad():
                    held_out_loss = float((self._inside * self._held_out(policy, self._batch)).sum())
            values = values + 0.5 * l2 * self._by_total * network.squares()
            gradient = torch.autograd.grad(values.sum(), parameters)
            return values.detach().numpy(), joined(gradient), held_out_loss

        def joined(tensors: Sequence[Tensor]) -> np.ndarray:
            return torch.cat([tensor.detach().flatten(1) for tensor in tensors], dim=1).numpy()

        point = best_point = joined(parameters)
        value, slope, best_loss = evaluate(point)
        best_step = step = 0
        curvature = crossfit.Curvature(1.0, HISTORY)
        while step < self._most and step - best_step < PATIENCE and np.linalg.norm(slope) > self._tol:
            check_finite("the loss", float(value.sum()))
            step += 1
            direction = -curvature.inverse_product(slope)
            if step == 1:
                direction /= np.maximum(1.0, np.linalg.norm(slope, axis=1, keepdims=True))
            descent = (direction * slope).sum(axis=1)
            rate = np.ones_like(value)
            for _ in range(TRIES):
                tried = point + rate[:, None] * direction
                tried_value, tried_slope, held_out_loss = evaluate(tried)
                worse = ~(tried_value <= value + 1e-4 * rate * descent + ROUNDED * np.abs(value))
                if not worse.any():
                    break
                rate[worse] *= 0.5
            curvature.add(tried - point, tried_slope - slope, rescale=True)
            point, value, slope = tried, tried_value, tried_slope
            if held_out_loss < best_loss - enough:
                best_loss, best_step, best_point = held_out_loss, step, point
        evaluate(best_point)
        self._policy.load_state_dict(policy.state_dict())
        return best_loss, step
