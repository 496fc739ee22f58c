"""The definition of what `po_bilevel.linear` computes in closed forms: the fused losses, differentiated by autograd."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from po_bilevel import crossfit
from po_bilevel.crossfit import RowLoss, Rows, network_of, policy_gradient
from po_bilevel.hypergradients import ImplicitCG, Tensors
from po_bilevel.linear import DAMPING
from po_bilevel.members import Learned, Members
from po_bilevel.policies import Policy
from po_bilevel.training import check_finite
from scipy import optimize
from torch import Tensor, nn

CG_TOLERANCE, CG_ITERATIONS = 1e-3, 100
# Pairs of steps and gradients.
HISTORY = 50


class Reference(Members):
    """Any policies, by L-BFGS on the fused losses in double precision and by implicit differentiation.

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

    def _train(self, loss: Callable[[], Tensor]) -> int:
        """Minimises the loss; returns how many iterations it took."""
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
            if norm <= self._tol:
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
