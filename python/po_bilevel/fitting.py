"""How an estimator's reward is learned from the data that it is fitted to, and its policy under that reward.

Fitting has two stages. The reward: K policies, one for each fold, are trained by entropy-regularised policy gradient on
the rows outside their fold, and the reward is moved along the hypergradient of the likelihood of the rows inside. No
likelihood is read on rows that its policy was trained on, so memorising them does not pass for knowing the answer.
The policy: one more, trained on all rows under that reward. Networks, which stop before they get to a minimum, learn
the reward from what they reached instead, and their policy trains beside the folds'.

Rows that occur more than once are put together and their weights added, and the rest of the fit sees the rows in an
order of their own. So an integer weight is that many copies to the last bit, and the order of the rows does not matter.
Folds share out the copies: they are observations of their own, and a fold that had all of them would take from the
others what they know of that x. Weights that are no whole numbers stay with their row.

The entropy weight λ is 1: rewards and λ matter through their ratio only.
"""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from joblib import effective_n_jobs
from sklearn.base import BaseEstimator, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _check_sample_weight, validate_data
from torch import Tensor, nn
from tqdm import tqdm

from . import crossfit
from .crossfit import Rows
from .errors import UsageError
from .hypergradients import Tensors
from .members import Learned, Members
from .policies import Policy
from .rewards import PrecisionKind, TabularReward
from .threads import threads_for

E = TypeVar("E", bound="BilevelEstimator")

# Outer steps end where the hypergradient is shorter than this, in nats a row for a relative change of the reward.
OUTER_SOLVED = 1e-4
# Or where a step gains less, in nats a row: what cross-validated likelihood knows is far less exact.
OUTER_ENOUGH = 3e-5
# Standard deviation of the prior of arsinh φ around its start.
PRIOR = 1.0
# Multiplications in a pass over all folds from which it may have threads.
PARALLEL = 10**8


class BilevelEstimator(BaseEstimator, ABC):
    """What both estimators have in common: the two stages of fitting."""

    # What scikit-learn checks; a class adds its forms of reward.
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "l2": [Interval(Real, 0, None, closed="left")],
        "folds": [Interval(Integral, 2, None, closed="left")],
        "outer_steps": [Interval(Integral, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "n_jobs": [None, Integral],
        "verbose": ["verbose"],
    }
    _learns_l2: ClassVar[bool] = False
    # Of scikit-learn's validation of y.
    _target_options: ClassVar[dict[str, Any]] = {}
    policy_: Policy
    outer_losses_: list[float]
    n_iter_: int
    _phi: Learned
    _model: dict[str, Any]
    _scaler: StandardScaler

    def __init__(
        self, reward: PrecisionKind = "diagonal", *, hidden_layer_sizes: int | Sequence[int] = (), l2: float = 1.0,
        folds: int = 5, outer_steps: int = 30, max_iter: int = 500, tol: float = 1e-4, warm_start: bool = False,
        random_state: Any = None, n_jobs: int | None = None, verbose: int = 0,
    ) -> None:  # fmt: skip
        self.reward = reward
        self.hidden_layer_sizes = hidden_layer_sizes
        self.l2 = l2
        self.folds = folds
        self.outer_steps = outer_steps
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self: E, X: Any, y: Any, sample_weight: Any = None) -> E:
        """Learns the reward and the policy.

        Args:
            X: (N, F), an array or a DataFrame of finite numbers.
            y: labels (N,) of at least two classes for a classifier; for a regressor finite numbers, (N,) or (N, D).
            sample_weight: (N,), at least 0; a row of weight 2 is that row twice.

        Raises:
            ValueError: data or a parameter that cannot be used.
            TypeError: X is sparse.
            NonFiniteError: training diverged.
            KeyboardInterrupt: it was interrupted. In both of these cases the estimator is not fitted.
        """
        with self._all_or_nothing():
            self._fit_all(X, y, sample_weight)
        return self

    def _fit_all(self, X: Any, y: Any, sample_weight: Any) -> None:
        self._check_parameters()
        self._check_target(y)
        X, y = validate_data(self, X, y, dtype=np.float64, **self._target_options)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        columns = self._columns(y, weight)
        X, target, weight = crossfit.distinct(X, columns, weight * (self._of_class(columns) > 0))
        target, outputs, strata = self._standardised(target, weight)
        weight = weight * self._of_class(strata[:, None])
        self._scaler = StandardScaler().fit(X, sample_weight=weight)
        inputs = self._scaler.transform(X)
        widths = [inputs.shape[1], *self._hidden(), outputs]
        work = self.folds * len(inputs) * sum(a * b for a, b in pairwise(widths))
        most = None if self.n_jobs is None else effective_n_jobs(self.n_jobs)
        with threads_for(work, PARALLEL, most):
            self._fit(Rows(*map(torch.from_numpy, (inputs, target, weight))), outputs, strata)
        with torch.no_grad():
            self._publish()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Nothing that was fitted is left of a fit that is interrupted or diverges, nor of those before."""
        try:
            yield
        except (ValueError, TypeError):
            # Data or a parameter that cannot be used, before anything was fitted.
            raise
        except BaseException as error:
            for name in [each for each in vars(self) if each not in self.get_params(deep=False)]:
                if name != "_metadata_request":
                    delattr(self, name)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"{type(self).__name__}: the fit was interrupted: it is not fitted") from None
            raise

    def _hidden(self) -> tuple[int, ...]:
        sizes = self.hidden_layer_sizes
        return tuple(sizes) if isinstance(sizes, Sequence | np.ndarray) else (int(sizes),)

    def _of_class(self, columns: np.ndarray) -> np.ndarray:
        """The factor of each row's weight that is its class's, (N,), from y as numbers."""
        return np.ones(len(columns))

    def _check_target(self, y: Any) -> None:
        """Refuses what scikit-learn would let pass."""

    @abstractmethod
    def _columns(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """y as numbers, (N, D), once it is known to be usable."""

    @abstractmethod
    def _standardised(self, target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        """What the network is trained on, how many outputs it has, and (N,) strata, of which each fold gets a share."""

    @abstractmethod
    def _publish(self) -> None:
        """Sets the attributes that say what was learned."""

    def _check_parameters(self) -> None:
        """What scikit-learn's constraints do not say."""
        if any(not isinstance(width, Integral) or width < 1 for width in self._hidden()):
            raise UsageError(
                f"{type(self).__name__}: hidden_layer_sizes: expected integers of at least 1, got "
                f"{self.hidden_layer_sizes!r}"
            )

    def _begin(self, features: int, outputs: int) -> tuple[bool, dict[str, Any]]:
        """Whether this fit goes on from the last, and what model it is of; what else the last one left is forgotten.

        Raises:
            UsageError: warm_start, and the last fit was of another model.
        """
        model = {
            "reward": self.reward, "hidden_layer_sizes": self._hidden(), "features": features,
            "outputs": outputs,
        }  # fmt: skip
        warm = self.warm_start and hasattr(self, "policy_")
        if warm and model != self._model:
            raise UsageError(
                f"{type(self).__name__}: warm_start: expected the model of the last fit, {self._model}, got {model}"
            )
        for name in ("precision_", "outer_losses_", "coef_", "intercept_"):
            if hasattr(self, name):
                delattr(self, name)
        return warm, model

    @abstractmethod
    def _policy(self, members: int, features: int, outputs: int, seed: int) -> Policy:
        """M policies that start the same."""

    @abstractmethod
    def _members(self, policy: Policy, rows: Rows, inside: Tensor) -> Members:
        """What trains a policy with a member for each row of `inside` (M, N)."""

    def _on_all(self, policy: Policy, rows: Rows) -> Members:
        """What trains a policy of one member on all rows."""
        return self._members(policy, rows, torch.zeros_like(rows.weight[None]))

    def _complete(self, rows: Rows) -> None:
        """Trains what else predictions are made of, on all rows."""

    @abstractmethod
    def _first_reward(self, folds: Members) -> nn.Module:
        """The reward to start from."""

    def _l2(self) -> tuple[float, bool]:
        """The penalty, or where it starts, and whether it is learned."""
        return (1.0, True) if isinstance(self.l2, str) else (float(self.l2), False)

    @abstractmethod
    def _learn_early(self, policy: Policy, rows: Rows, inside: Tensor) -> Learned:
        """The reward of networks, whose training ends where the held-out rows are likeliest, which is no minimum.

        The policy, with a member for each row of `inside` (M, N), is trained too; its last member sees all rows.
        """

    def _refined(self, phi: Learned, folds: Members, rows: Rows, inside: Tensor) -> Learned:
        """A better reward than the one learned, or that one, to which the folds' policies have been trained."""
        return phi

    def _for_reward(self, rows: Rows, strata: np.ndarray, random: np.random.RandomState) -> tuple[Rows, np.ndarray]:
        """The rows that the reward is learned from, and their strata."""
        return rows, strata

    def _fit(self, rows: Rows, outputs: int, strata: np.ndarray) -> None:
        """Learns the reward, then the policy.

        Args:
            rows: standardised.
            outputs: of the network: classes, or dimensions of y.
            strata: (N,) int64, of which each fold gets its share.
        """
        features = rows.inputs.shape[1]
        warm, model = self._begin(features, outputs)
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        early = len(self._hidden()) > 0
        some, strata = (rows, strata) if early else self._for_reward(rows, strata, random)
        # Only whole numbers are copies, which folds share out. Of a row whose weight, or its class's, is something else
        # part would be held out from policies that see the rest.
        factor = self._of_class(strata[:, None])
        weight = some.weight.numpy() / factor
        copies = weight.round()
        if (np.abs(weight - copies) > 1e-9 * weight).any():
            factor, copies = some.weight.numpy(), np.ones_like(copies)
        inside = torch.from_numpy(crossfit.deal(strata, copies, self.folds, random) * factor)
        if early:
            # What the last fit ended with has seen the rows that are to be held out, and would stop at once.
            warm = False
            # One more member sees all rows, and so goes the way of the others for as long as they do.
            inside = torch.cat([inside, torch.zeros_like(inside[:1])])
        together = self._policy(len(inside), features, outputs, seed)
        policy = copy.deepcopy(self.policy_) if warm else self._policy(1, features, outputs, seed)
        if early:
            phi = self._learn_early(together, some, inside)
            crossfit.spread(together, policy)
        else:
            folds = self._members(together, some, inside)
            folds.begin(self._l2()[0])
            phi = Learned(self._first_reward(folds), *self._l2())
            if warm:
                phi = copy.deepcopy(self._phi)
                crossfit.spread(policy, together)
                folds = self._members(together, some, inside)
            if self.outer_steps > 0:
                self._learn(phi, folds, float(some.weight.sum()))
            phi = self._refined(phi, folds, some, inside)
            crossfit.spread(together, policy)
            self.n_iter_ = self._on_all(policy, rows).train(phi)
            self._complete(rows)
        if self.n_iter_ >= self.max_iter:
            warnings.warn(
                f"{type(self).__name__}: the policy's training stopped after max_iter={self.max_iter} steps, its "
                f"gradient possibly above tol={self.tol}; raise max_iter, l2 or tol",
                ConvergenceWarning,
                stacklevel=5,
            )
        self.n_iter_ = max(1, self.n_iter_)
        self.policy_, self._phi, self._model = policy, phi, model

    def _learn(self, phi: Learned, folds: Members, total: float, enough: float = OUTER_ENOUGH) -> None:
        """Moves the reward to where the folds' policies are likeliest inside them; `total` is the rows' weight."""
        self.outer_losses_ = []
        with self._bar(self.outer_steps) as bar:

            def evaluate() -> tuple[float, Tensors]:
                loss, gradient = folds.evaluate(phi)
                self.outer_losses_.append(loss)
                bar.set_postfix_str(f"held-out NLL {loss:.4f}", refresh=False)
                bar.update()
                return loss, gradient

            left = crossfit.quasi_newton(
                phi, evaluate, folds.keep, self.outer_steps, tolerance=OUTER_SOLVED, enough=enough,
                prior=1.0 / (PRIOR**2 * total),
            )  # fmt: skip
        if left > OUTER_SOLVED:
            self._warn_of_reward(f"its slope is {left:.1e} nats a row, tolerance {OUTER_SOLVED:.0e}")

    def _bar(self, total: int) -> tqdm:
        return tqdm(total=total, desc="outer steps", disable=not self.verbose, leave=False)

    def _bar_over(self, losses: list[float]) -> Iterator[None]:
        """Behind a bar, once for each outer step, or once for none; the losses are those of the steps so far."""
        with self._bar(self.outer_steps) as bar:
            for _ in range(max(1, self.outer_steps)):
                yield
                bar.set_postfix_str(f"held-out NLL {losses[-1]:.4f}", refresh=False)
                bar.update()

    def _linear(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights (out, F) and intercepts (out,) of the policy's one layer, for inputs that are not standardised."""
        network = crossfit.network_of(self.policy_)
        weights = network.weights[0][0].numpy().T / self._scaler.scale_
        return weights, network.biases[0][0, 0].numpy() - weights @ self._scaler.mean_

    def _warn_of_reward(self, how: str) -> None:
        """Nobody asked for an optimum with outer_steps=0."""
        if self.outer_steps > 0:
            warnings.warn(
                f"{type(self).__name__}: the reward is not where the cross-validated likelihood is greatest after "
                f"outer_steps={self.outer_steps}: {how}; raise outer_steps",
                ConvergenceWarning,
                stacklevel=7,
            )


def fit_to(phi: Learned, believed: Tensor, rows: Rows, inside: Tensor) -> None:
    """Moves the reward to where policies that are optimal for the beliefs (M, N, C) are likeliest inside the folds."""
    total, labels = float(rows.weight.sum()), rows.target.expand(len(inside), -1)[..., None]

    def evaluate() -> tuple[float, Tensors]:
        own = torch.log_softmax(believed @ cast(TabularReward, phi.reward).table().mT, dim=-1)
        loss = -(inside * own.gather(-1, labels)[..., 0]).sum() / total
        return float(loss.detach()), torch.autograd.grad(loss, list(phi.parameters()))

    crossfit.quasi_newton(
        phi, evaluate, lambda: None, 30, tolerance=OUTER_SOLVED, enough=0.1 * OUTER_ENOUGH,
        prior=1.0 / (PRIOR**2 * total),
    )  # fmt: skip
