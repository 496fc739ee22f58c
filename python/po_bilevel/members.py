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
SCALE = 1.0


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
        return self._start * (SCALE * self.log_factor).exp()


class Members(ABC):
    """M policies that are trained together, each on what of the rows' weight is outside its fold.

    Attributes:
        policy: all of them, in one module.
    """

    policy: Policy

    @abstractmethod
    def begin(self, l2: float) -> None:
        """Trains under the loss from which a reward is learned."""

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


class Networks(Members):
    """Policies with hidden layers.

    Args:
        policy: with a member for each row of `inside`.
        rows: standardised.
        inside: (M, N), what of each row's weight is in each fold.
        first: the loss that `begin` trains under.
        held_out: (policy, batch) -> (M, N), what the rows inside are judged by.
        tol, max_iter: as the estimators have them.
    """

    def __init__(
        self, policy: Policy, rows: Rows, inside: Tensor, *, first: RowLoss, held_out: RowLoss, tol: float, max_iter: int
    ) -> None:  # fmt: skip
        self.policy, self._first, self._tol, self._most = policy, first, tol, max_iter
        self._batch = crossfit.repeated(rows, len(inside))
        outside = (rows.weight - inside).clamp(min=0.0)
        self._total = outside.sum(dim=1)
        self._share = outside / self._total[:, None]
        self._held_out = lambda: (inside * held_out(policy, self._batch)).sum() / rows.weight.sum()
        self._trainer: BilevelTrainer | None = None
        self.keep()

    def begin(self, l2: float) -> None:
        self._train(lambda: self._objective(self._first, l2))
        self.keep()

    def train(self, phi: Learned) -> int:
        self.policy.load_state_dict(self._kept)
        return self._train(lambda: self._objective(policy_gradient(phi.reward), phi.l2()))

    def evaluate(self, phi: Learned) -> tuple[float, Tensors]:
        if self._trainer is None or self._trainer.reward is not phi:
            # What L-BFGS remembers of the curvature belongs to the reward of before.
            self._trainer = BilevelTrainer(
                self.policy, phi, inner_data=self._batch, outer_data=self._batch, inner_optimizer=self._optimizer,
                outer_optimizer=torch.optim.SGD(phi.parameters()), inner_steps=self._most,
                inner_loss=lambda policy, phi, *_: self._objective(policy_gradient(phi.reward), phi.l2()),
                outer_loss=lambda *_: self._held_out(),
                hypergradient=ImplicitCG(DAMPING, CG_TOLERANCE, CG_ITERATIONS), inner_tolerance=self._tol,
                keep_inner_state=False, progress=False,
            )  # fmt: skip
        self.policy.load_state_dict(self._kept)
        step, gradient = self._trainer.evaluate()
        return step.outer_loss, gradient

    def keep(self) -> None:
        self._kept = copy.deepcopy(self.policy.state_dict())

    def train_early(self, phi: Learned, enough: float) -> tuple[float, int]:
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
        steps = self._train(lambda: self._objective(policy_gradient(phi.reward), phi.l2()), watch)
        self.policy.load_state_dict(best)
        return least, steps

    def _optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return lbfgs(parameters, self._tol, HISTORY)

    def _train(self, loss: Callable[[], Tensor], callback: Callable[[int, float], Any] | None = None) -> int:
        _, steps = train(
            self.policy, lambda *_: loss(), BatchStream(self._batch, None, 0),
            self._optimizer(self.policy.parameters()), self._most, tolerance=self._tol, callback=callback,
        )  # fmt: skip
        return steps

    def _objective(self, loss: RowLoss, l2: Tensor | float) -> Tensor:
        """Σ over members of their weighted mean loss and their penalty (l2/2W) ‖weights‖², W their weight's sum."""
        penalty = 0.5 * l2 * (network_of(self.policy).squares() / self._total).sum()
        return (self._share * loss(self.policy, self._batch)).sum() + penalty
