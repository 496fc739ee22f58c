"""Policies that train together, each on its own weight of the rows, and what the others' rows say of their reward.

`Networks` trains them by L-BFGS on the fused losses; `linear` has second-order methods for linear policies.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from . import crossfit
from .crossfit import RowLoss, Rows, network_of, policy_gradient
from .hypergradients import ImplicitCG, Tensors
from .policies import Policy
from .training import check_finite

# Added to the inner Hessian, whose null direction is the equal shift of a softmax policy's intercepts.
DAMPING = 1e-6
# Of the hypergradient's linear solve.
CG_TOLERANCE, CG_ITERATIONS = 1e-3, 100
# Pairs of steps and gradients: networks' losses are badly conditioned, and so many save iterations.
HISTORY = 50
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
        self, policy: Policy, rows: Rows, inside: Tensor, *, first: RowLoss, held_out: RowLoss, tol: float,
        max_iter: int,
    ) -> None:  # fmt: skip
        self.policy, self._first, self._tol, self._most = policy, first, tol, max_iter
        self._batch = crossfit.repeated(rows, len(inside))
        outside = (rows.weight - inside).clamp(min=0.0)
        self._total = outside.sum(dim=1)
        self._share = outside / self._total[:, None]
        self._held_out = lambda: (inside * held_out(policy, self._batch)).sum() / rows.weight.sum()
        self._solution: Tensors | None = None
        self.keep()

    def begin(self, l2: float) -> None:
        self._train(lambda: self._objective(self._first, l2))
        self.keep()

    def train(self, phi: Learned) -> int:
        self.policy.load_state_dict(self._kept)
        return self._train(lambda: self._under(phi))

    def evaluate(self, phi: Learned) -> tuple[float, Tensors]:
        self.train(phi)
        found = ImplicitCG(DAMPING, CG_TOLERANCE, CG_ITERATIONS)(
            lambda *_: self._under(phi), lambda *_: self._held_out(), tuple(self.policy.parameters()),
            tuple(phi.parameters()), start=self._solution,
        )  # fmt: skip
        self._solution = found.solution
        return found.outer_loss, found.gradient

    def keep(self) -> None:
        self._kept = copy.deepcopy(self.policy.state_dict())

    def train_early(self, phi: Learned, enough: float) -> tuple[float, int]:
        """Trains up to where the rows inside each fold are likeliest, by gains of at least `enough`.

        Returns:
            their loss there, and how many steps it took to know.
        """
        least, at, best = math.inf, 0, copy.deepcopy(self.policy.state_dict())

        def watch(step: int) -> bool:
            nonlocal least, at, best
            with torch.no_grad():
                value = float(self._held_out())
            if value < least - enough:
                least, at, best = value, step, copy.deepcopy(self.policy.state_dict())
            return step - at >= PATIENCE

        watch(0)
        steps = self._train(lambda: self._under(phi), watch)
        self.policy.load_state_dict(best)
        return least, steps

    def _train(self, loss: Callable[[], Tensor], watch: Callable[[int], bool] | None = None) -> int:
        """Minimises the loss; returns how many iterations it took. It ends before where `watch` says so after one."""
        parameters = list(self.policy.parameters())
        taken, norm = 0, math.inf

        def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal norm
            nn.utils.vector_to_parameters(torch.from_numpy(point), parameters)
            value = loss()
            check_finite("the loss", float(value.detach()))
            gradient = crossfit.flat(torch.autograd.grad(value, parameters))
            norm = float(np.linalg.norm(gradient))
            return float(value.detach()), gradient

        def after(point: np.ndarray) -> None:
            nonlocal taken
            taken += 1
            if norm <= self._tol or (watch is not None and watch(taken)):
                raise StopIteration

        found = optimize.minimize(
            evaluate, crossfit.flat(parameters), jac=True, method="L-BFGS-B", callback=after,
            options={"maxiter": self._most, "maxfun": math.inf, "maxcor": HISTORY, "maxls": 25, "ftol": 0, "gtol": 0},
        )  # fmt: skip
        nn.utils.vector_to_parameters(torch.from_numpy(found.x), parameters)
        return taken

    def _under(self, phi: Learned) -> Tensor:
        return self._objective(policy_gradient(phi.reward), phi.l2())

    def _objective(self, loss: RowLoss, l2: Tensor | float) -> Tensor:
        """Σ over members of their weighted mean loss and their penalty (l2/2W) ‖weights‖², W their weight's sum."""
        penalty = 0.5 * l2 * (network_of(self.policy).squares() / self._total).sum()
        return (self._share * loss(self.policy, self._batch)).sum() + penalty
