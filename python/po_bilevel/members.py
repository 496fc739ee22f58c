"""Policies that train together, each on its own weight of the rows, and what the others' rows say of their reward.

`Networks` trains them by L-BFGS on the fused losses; `linear` has second-order methods for linear policies.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import crossfit
from .crossfit import RowLoss, Rows, network_of, policy_gradient
from .hypergradients import ImplicitCG, Tensors
from .optimizers import lbfgs
from .policies import Policy
from .trainer import BilevelTrainer
from .training import BatchStream, train

# Added to the inner Hessian, whose null direction is the equal shift of a softmax policy's intercepts.
DAMPING = 1e-6
# Of the hypergradient's linear solve.
CG_TOLERANCE, CG_ITERATIONS = 1e-3, 100
# Pairs of steps and gradients: networks' losses are badly conditioned, and so many halve the iterations.
HISTORY = 100
# Iterations without a gain on the held-out rows after which training stops early.
PATIENCE = 20


class Members(ABC):
    """M policies that are trained together, each on what of the rows' weight is outside its fold.

    Attributes:
        policy: all of them, in one module.
    """

    policy: Policy

    @abstractmethod
    def begin(self) -> None:
        """Trains under the loss from which a reward is learned."""

    @abstractmethod
    def train(self, reward: nn.Module) -> int:
        """Trains to the optimum under the reward; returns how many steps it took."""

    @abstractmethod
    def evaluate(self, reward: nn.Module) -> tuple[float, Tensors]:
        """Trains under the reward.

        Returns:
            F(φ), the loss of the rows inside the folds, nats a row, and dF/dφ, a tensor for each of its parameters.
        """


class Networks(Members):
    """Policies with hidden layers.

    Args:
        policy: with a member for each row of `inside`.
        rows: standardised.
        inside: (M, N), what of each row's weight is in each fold.
        first: the loss that `begin` trains under.
        held_out: (policy, batch) -> (M, N), what the rows inside are judged by.
        l2, tol, max_iter: as the estimators have them.
    """

    def __init__(
        self, policy: Policy, rows: Rows, inside: Tensor, *, first: RowLoss, held_out: RowLoss, l2: float, tol: float,
        max_iter: int,
    ) -> None:  # fmt: skip
        self.policy, self._first, self._l2, self._tol, self._most = policy, first, l2, tol, max_iter
        self._batch = crossfit.repeated(rows, len(inside))
        outside = (rows.weight - inside).clamp(min=0.0)
        self._total = outside.sum(dim=1)
        self._share = outside / self._total[:, None]
        self._held_out = lambda: (inside * held_out(policy, self._batch)).sum() / rows.weight.sum()
        self._trainer: BilevelTrainer | None = None

    def begin(self) -> None:
        self._train(self._first)

    def train(self, reward: nn.Module) -> int:
        return self._train(policy_gradient(reward))

    def evaluate(self, reward: nn.Module) -> tuple[float, Tensors]:
        if self._trainer is None or self._trainer.reward is not reward:
            # What L-BFGS remembers of the curvature belongs to the reward of before.
            self._trainer = BilevelTrainer(
                self.policy, reward, inner_data=self._batch, outer_data=self._batch, inner_optimizer=self._optimizer,
                outer_optimizer=torch.optim.SGD(reward.parameters()), inner_steps=self._most,
                inner_loss=lambda policy, reward, batch, _: self._objective(policy_gradient(reward)),
                outer_loss=lambda policy, batch: self._held_out(),
                hypergradient=ImplicitCG(DAMPING, CG_TOLERANCE, CG_ITERATIONS), inner_tolerance=self._tol,
                keep_inner_state=False, progress=False,
            )  # fmt: skip
        step, gradient = self._trainer.evaluate()
        return step.outer_loss, gradient

    def train_early(self, reward: nn.Module, enough: float) -> tuple[float, int]:
        """Trains up to where the rows inside each fold are likeliest, by gains of at least `enough`.

        Returns:
            their loss there, and how many steps it took to know.
        """
        least, at, best = math.inf, 0, copy.deepcopy(self.policy.state_dict())

        def watch(step: int, _: float = math.nan) -> bool:
            nonlocal least, at, best
            with torch.no_grad():
                value = float(self._held_out())
            if value < least - enough:
                least, at, best = value, step, copy.deepcopy(self.policy.state_dict())
            return step - at >= PATIENCE

        watch(-1)
        steps = self._train(policy_gradient(reward), watch)
        self.policy.load_state_dict(best)
        return least, steps

    def _optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return lbfgs(parameters, self._tol, HISTORY)

    def _train(self, loss: RowLoss, callback: Callable[[int, float], Any] | None = None) -> int:
        _, steps = train(
            self.policy, lambda policy, batch, _: self._objective(loss), BatchStream(self._batch, None, 0),
            self._optimizer(self.policy.parameters()), self._most, tolerance=self._tol, callback=callback,
        )  # fmt: skip
        return steps

    def _objective(self, loss: RowLoss) -> Tensor:
        """Σ over members of their weighted mean loss and their penalty (l2/2W) ‖weights‖², W their weight's sum."""
        penalty = 0.5 * self._l2 * (network_of(self.policy).squares() / self._total).sum()
        return (self._share * loss(self.policy, self._batch)).sum() + penalty
