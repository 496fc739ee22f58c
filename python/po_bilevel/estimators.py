"""scikit-learn estimators whose reward is learned from the data that they are fitted to.

Fitting has two stages. The reward: K policies, one for each fold, are trained by entropy-regularised policy gradient on
the rows outside their fold, and the reward is moved along the hypergradient of the likelihood of the rows inside. No
likelihood is read on rows that its policy was trained on, so memorising them does not pass for knowing the answer.
The policy: one more, trained on all rows under that reward.

Rows that occur more than once are put together and their weights added, and the rest of the fit sees the rows in an
order of their own. So an integer weight is that many copies to the last bit, and the order of the rows does not matter.
Folds share out the weight, a unit at a time: copies are observations of their own, and a fold that had all of them
would take from the others what they know of that x.

The entropy weight λ is 1: rewards and λ matter through their ratio only.
"""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar, cast, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn
from tqdm import tqdm

from . import crossfit
from .crossfit import RowLoss, Rows, likelihood, network_of, policy_gradient
from .errors import UsageError
from .heuristics import optimal_precision, residual_covariance
from .losses import Batch
from .hypergradients import ImplicitCG, Tensors
from .optimizers import lbfgs
from .policies import CategoricalPolicy, GaussianPolicy, Policy
from .rewards import MahalanobisReward, OneHotMahalanobisReward, PrecisionKind, TableReward, one_hot_table
from .trainer import BilevelTrainer, OuterStep
from .training import BatchStream, train

E = TypeVar("E", bound="_Bilevel")

# The classifier's U before anything is learned: right and wrong answers differ by 4 nats.
START = 2.0
# Added to the inner Hessian, whose null direction is the equal shift of a softmax policy's intercepts.
DAMPING = 1e-6
# Of the hypergradient's linear solve.
CG_TOLERANCE, CG_ITERATIONS = 1e-3, 100
# How much less exactly than the last training those before it are solved: they start from each other, and an error of
# theirs is one of the hypergradient, not of the model.
ROUGHLY = 10.0
# Outer steps end where the hypergradient is shorter than this, in nats a row for a relative change of the reward.
OUTER_SOLVED = 1e-4
# Or where a step gains less, in nats a row: what cross-validated likelihood knows is far less exact.
OUTER_ENOUGH = 1e-5
# Standard deviation of the prior of arsinh φ around its start.
PRIOR = 3.0
# Added to the variances of standardised residuals: a perfect fit has none.
RIDGE = 1e-6


class _Bilevel(BaseEstimator, ABC):
    """What both estimators have in common: the two stages of fitting."""

    _rewards: ClassVar[tuple[str, ...]]
    # Of scikit-learn's validation of y.
    _target_options: ClassVar[dict[str, Any]] = {}
    policy_: Policy
    _reward: Any
    _model: dict[str, Any]
    _scaler: StandardScaler

    def __init__(
        self, reward: str = "diagonal", *, hidden_layer_sizes: tuple[int, ...] = (), l2: float = 1.0, folds: int = 5,
        outer_steps: int = 30, outer_learning_rate: float = 0.3, max_iter: int = 500, tol: float = 1e-4,
        warm_start: bool = False, random_state: Any = None, verbose: int = 0,
    ) -> None:  # fmt: skip
        self.reward = reward
        self.hidden_layer_sizes = hidden_layer_sizes
        self.l2 = l2
        self.folds = folds
        self.outer_steps = outer_steps
        self.outer_learning_rate = outer_learning_rate
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    def fit(self: E, X: Any, y: Any, sample_weight: Any = None) -> E:
        """Learns the reward and the policy.

        Args:
            X: (N, F), an array or a DataFrame of finite numbers.
            y: labels (N,) of at least two classes for a classifier; for a regressor finite numbers, (N,) or (N, D).
            sample_weight: (N,), at least 0; a row of weight 2 is that row twice.

        Raises:
            ValueError: data or a parameter that cannot be used.
            NonFiniteError: training diverged.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64, **self._target_options)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        X, target, weight = crossfit.distinct(X, self._columns(y, weight), weight)
        target, outputs, strata = self._standardised(target, weight)
        self._scaler = StandardScaler().fit(X, sample_weight=weight)
        inputs = self._scaler.transform(X)
        self._fit(Rows(*map(torch.from_numpy, (inputs, target, weight))), outputs, strata)
        with torch.no_grad():
            self._publish()
        return self

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
        name = type(self).__name__
        if not isinstance(self.reward, str) or self.reward not in self._rewards:
            raise UsageError(
                f"{name}: reward: expected one of {', '.join(map(repr, self._rewards))}, got {self.reward!r}"
            )
        for option, least in (("folds", 2), ("outer_steps", 0), ("max_iter", 1)):
            value = getattr(self, option)
            if not isinstance(value, Integral) or value < least:
                raise UsageError(f"{name}: {option}: expected an integer of at least {least}, got {value!r}")
        for option in ("l2", "outer_learning_rate", "tol"):
            value = getattr(self, option)
            if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
                raise UsageError(f"{name}: {option}: expected a finite number of at least 0, got {value!r}")
        if not isinstance(self.hidden_layer_sizes, (tuple, list, np.ndarray)) or any(
            not isinstance(width, Integral) or width < 1 for width in self.hidden_layer_sizes
        ):
            raise UsageError(
                f"{name}: hidden_layer_sizes: expected a sequence of integers of at least 1, got "
                f"{self.hidden_layer_sizes!r}"
            )

    def _begin(self, features: int, outputs: int) -> tuple[bool, dict[str, Any]]:
        """Whether this fit goes on from the last, and what model it is of; what else the last one left is forgotten.

        Raises:
            UsageError: warm_start, and the last fit was of another model.
        """
        model = {
            "reward": self.reward, "hidden_layer_sizes": tuple(self.hidden_layer_sizes), "features": features,
            "outputs": outputs,
        }  # fmt: skip
        warm = self.warm_start and hasattr(self, "policy_")
        if warm and model != self._model:
            raise UsageError(
                f"{type(self).__name__}: warm_start: expected the model of the last fit, {self._model}, got {model}"
            )
        for name in ("precision_", "outer_losses_"):
            if hasattr(self, name):
                delattr(self, name)
        return warm, model

    @abstractmethod
    def _policy(self, members: int, features: int, outputs: int, seed: int) -> Policy:
        """M policies that start the same."""

    @abstractmethod
    def _first_loss(self) -> "RowLoss":
        """The loss that the policies are trained under before there is a reward."""

    @abstractmethod
    def _first_reward(self, policy: Policy, together: Policy, rows: Rows, inside: Tensor) -> tuple[nn.Module, Rows]:
        """The reward to start from, and the rows in the units that it is for.

        Args:
            policy: trained on all rows under `_first_loss`.
            together: with a member for each fold, trained on the other folds.
            rows: standardised.
            inside: (M, N), what of each row's weight is in each fold.
        """

    def _held_out(self, policy: Policy, batch: Batch) -> Tensor:
        """The loss of each row that a reward is judged by, (M, N), in nats."""
        return likelihood(policy, batch)

    def _fit(self, rows: Rows, outputs: int, strata: np.ndarray) -> None:
        """Learns the reward, then the policy.

        Args:
            rows: standardised.
            outputs: of the network: classes, or dimensions of y.
            strata: (N,) int64, of which each fold gets its share.
        """
        warm, model = self._begin(rows.inputs.shape[1], outputs)
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        features = rows.inputs.shape[1]
        inside = torch.from_numpy(crossfit.deal(strata, rows.weight.numpy(), self.folds, random))
        members = len(inside)
        outside = (rows.weight - inside).clamp(min=0.0)
        together = self._policy(members, features, outputs, seed)
        if warm:
            policy, reward = copy.deepcopy(self.policy_), copy.deepcopy(self._reward)
            crossfit.spread(policy, together)
            rows = rows._replace(target=crossfit.in_units(rows.target, network_of(policy).unit))
        else:
            policy = self._policy(1, features, outputs, seed)
            self._train(policy, rows, rows.weight[None], self._first_loss(), ROUGHLY * self.tol)
            self._train(together, rows, outside, self._first_loss(), ROUGHLY * self.tol)
            reward, rows = self._first_reward(policy, together, rows, inside)
        if self.outer_steps > 0:
            self._learn(reward, together, rows, inside, outside)
        loss = policy_gradient(reward)
        self.n_iter_ = self._train(policy, rows, rows.weight[None], loss, self.tol)
        if self.n_iter_ == self.max_iter:
            warnings.warn(
                f"{type(self).__name__}: the policy's training stopped after max_iter={self.max_iter} steps, its "
                f"gradient possibly above tol={self.tol}; raise max_iter, l2 or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.policy_, self._reward, self._model = policy, reward, model

    def _learn(self, reward: nn.Module, policy: Policy, rows: Rows, inside: Tensor, outside: Tensor) -> None:
        """Moves the reward to where the policies, each trained on its row of `outside` (M, N), are likeliest inside."""
        batch, inner = crossfit.repeated(rows, len(inside)), self._objective(rows, outside)
        # What L-BFGS remembers of the curvature belongs to the reward of before.
        trainer = BilevelTrainer(
            policy, reward, inner_data=batch, outer_data=batch,
            inner_optimizer=lambda parameters: lbfgs(parameters, ROUGHLY * self.tol),
            outer_optimizer=torch.optim.SGD(reward.parameters()), inner_steps=self.max_iter,
            inner_loss=lambda policy, reward, batch, _: inner(policy, batch, policy_gradient(reward)),
            outer_loss=lambda policy, batch: (inside * self._held_out(policy, batch)).sum() / rows.weight.sum(),
            hypergradient=ImplicitCG(DAMPING, CG_TOLERANCE, CG_ITERATIONS), inner_tolerance=ROUGHLY * self.tol,
            keep_inner_state=False, progress=False,
        )  # fmt: skip
        self.outer_losses_ = []
        with tqdm(total=self.outer_steps, desc="outer steps", disable=not self.verbose, leave=False) as bar:

            def evaluate() -> tuple[float, Tensors]:
                step, gradient = trainer.evaluate()
                self.outer_losses_.append(step.outer_loss)
                bar.set_postfix_str(f"held-out NLL {step.outer_loss:.4f}", refresh=False)
                bar.update()
                return step.outer_loss, gradient

            left = crossfit.quasi_newton(reward, evaluate, self.outer_steps, OUTER_SOLVED, OUTER_ENOUGH, 1.0 / (PRIOR**2 * float(rows.weight.sum())))
        if left > OUTER_SOLVED:
            warnings.warn(
                f"{type(self).__name__}: the reward is not where the cross-validated likelihood is greatest after "
                f"outer_steps={self.outer_steps}: its slope is {left:.1e} nats a row, tolerance {OUTER_SOLVED:.0e}; "
                "raise outer_steps",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _train(self, policy: Policy, rows: Rows, weight: Tensor, loss: RowLoss, tolerance: float) -> int:
        """Trains all members at once, each on its row of weight (M, N); returns how many steps it took."""
        objective = self._objective(rows, weight)
        _, steps = train(
            policy, lambda policy, batch, _: objective(policy, batch, loss),
            BatchStream(crossfit.repeated(rows, len(weight)), None, 0), lbfgs(policy.parameters(), tolerance),
            self.max_iter, tolerance=tolerance,
        )  # fmt: skip
        return steps

    def _objective(self, rows: Rows, weight: Tensor) -> Callable[[Policy, Batch, RowLoss], Tensor]:
        """Σ over members of their weighted mean loss and their penalty (l2/2W) ‖weights‖², W their weight's sum."""
        total = weight.sum(dim=1, keepdim=True)
        share = weight / total

        def objective(policy: Policy, batch: Batch, loss: RowLoss) -> Tensor:
            penalty = 0.5 * self.l2 * (network_of(policy).squares() / total[:, 0]).sum()
            return (share * loss(policy, batch)).sum() + penalty

        return objective


class BilevelClassifier(ClassifierMixin, _Bilevel):
    """Softmax classifier trained by policy gradient under a reward for each pair of answer and label, learned too.

    With its defaults a linear model with the prior of `LogisticRegression()`: it differs in the loss, which asks for
    the confidence that cross-validated likelihood finds right. See the module for how it is fitted. Time goes with the
    folds and the updates, a hundred trainings of a linear model or more; with many classes of a dozen rows each a
    reward says less than likelihood does, and `LogisticRegression` is better.

    Args:
        reward: what is learned: "isotropic", "diagonal" or "full" for the matrix U of the reward
            -(e_ŷ-e_y)ᵀU(e_ŷ-e_y) of one-hot labels (1, C or C² numbers), "table" for any reward R[ŷ, y].
        hidden_layer_sizes: widths of a tanh network's hidden layers; none for a linear model.
        l2: penalty (l2/2) ‖weights‖² beside the sum of the losses over rows, 1/C of `LogisticRegression`; intercepts
            are free. Inputs are standardised first.
        folds: of the reward's cross-validation; fewer if there are fewer rows.
        outer_steps: the most updates of the reward; 0 keeps the one that it starts from.
        outer_learning_rate: of Adam for the reward at first; falls to a tenth.
        max_iter: the most L-BFGS iterations in one training of a policy.
        tol: Euclidean norm of the gradient, in nats a row, at which a training ends.
        warm_start: the next `fit` starts from the policy and the reward of the last.
        random_state: of the folds, and of a network's initial weights.
        verbose: 1 for a progress bar.

    Attributes:
        classes_: (C,) labels.
        reward_: (C, C), reward_[i, j] of the answer classes_[i] where the label is classes_[j], in nats.
        precision_: U, () or (C,) or (C, C); not there for "table".
        outer_losses_: cross-validated NLL before each update of the reward, nats a row.
        policy_: the trained policy, on standardised inputs.
        n_iter_: L-BFGS iterations of its training.
        n_features_in_, feature_names_in_: of the inputs, as everywhere in scikit-learn.
    """

    _rewards = (*get_args(PrecisionKind), "table")
    classes_: np.ndarray

    def _columns(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        present = len(np.unique(labels[weight > 0]))
        if present < 2:
            raise UsageError(f"BilevelClassifier: y: expected at least two classes with weight, got {present} class")
        if self.warm_start and hasattr(self, "policy_") and not np.array_equal(classes, self.classes_):
            raise UsageError(
                f"BilevelClassifier: y: expected the classes of the last fit with warm_start, {self.classes_}, "
                f"got {classes}"
            )
        self.classes_ = classes
        return labels[:, None]

    def _standardised(self, target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        labels = target[:, 0].astype(np.int64)
        return labels, len(self.classes_), labels

    def _publish(self) -> None:
        self.reward_ = self._reward.table().numpy()
        if isinstance(self._reward, OneHotMahalanobisReward):
            self.precision_ = self._reward.precision().numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Log-probabilities of the classes, (N, C), in nats."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            logits = self.policy_(torch.from_numpy(self._scaler.transform(X)))[0]
            return torch.log_softmax(logits, dim=-1).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, (N, C), in the order of `classes_`."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, (N,)."""
        answer = self.predict_log_proba(X).argmax(axis=1)
        return self.classes_[answer]

    def _policy(self, members: int, features: int, outputs: int, seed: int) -> CategoricalPolicy:
        return CategoricalPolicy(crossfit.Stack(members, [features, *self.hidden_layer_sizes, outputs], seed))

    def _first_loss(self) -> RowLoss:
        return likelihood

    def _first_reward(self, policy: Policy, together: Policy, rows: Rows, inside: Tensor) -> tuple[nn.Module, Rows]:
        classes = len(self.classes_)
        if self.reward == "table":
            return TableReward(one_hot_table(torch.tensor(START, dtype=torch.float64), classes)), rows
        return OneHotMahalanobisReward(classes, cast(PrecisionKind, self.reward), START).double(), rows


class BilevelRegressor(MultiOutputMixin, RegressorMixin, _Bilevel):
    """Gaussian regression N(mean(x), Σ), trained by policy gradient under the reward -(ŷ-y)ᵀU(ŷ-y), U learned too.

    U sets the spread, Σ = U⁻¹/2, and how much a residual counts beside the penalty. See the module for how it is
    fitted.

    Args:
        reward: form of U: "isotropic" (one number in units of each output's standard deviation), "diagonal", or "full",
            which comes with a full Σ.
        hidden_layer_sizes, folds, outer_steps, outer_learning_rate, max_iter, tol, warm_start, random_state: as in
            `BilevelClassifier`.
        verbose: 1 for a progress bar.
        l2: penalty (l2/2) ‖weights‖² beside the sum of the losses over rows, of standardised inputs and outputs: a
            Gaussian prior of variance 1/l2. Intercepts are free.

    Attributes:
        precision_: U, (D,) or, for "full", (D, D), in units of 1/y²; y (N,) is D = 1.
        outer_losses_: cross-validated NLL before each update of the reward, nats a row.
        policy_: the trained policy, on standardised inputs and outputs.
        n_iter_, n_features_in_, feature_names_in_: as in `BilevelClassifier`.
    """

    _rewards = get_args(PrecisionKind)
    _target_options: ClassVar = {"multi_output": True, "y_numeric": True, "ensure_min_samples": 2}
    _output_scaler: StandardScaler

    def __init__(
        self, reward: str = "diagonal", *, hidden_layer_sizes: tuple[int, ...] = (), l2: float = 1.0, folds: int = 5,
        outer_steps: int = 10, outer_learning_rate: float = 0.1, max_iter: int = 500, tol: float = 1e-4,
        warm_start: bool = False, random_state: Any = None, verbose: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(
            reward, hidden_layer_sizes=hidden_layer_sizes, l2=l2, folds=folds, outer_steps=outer_steps,
            outer_learning_rate=outer_learning_rate, max_iter=max_iter, tol=tol, warm_start=warm_start,
            random_state=random_state, verbose=verbose,
        )  # fmt: skip

    def _columns(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        self._one_output = y.ndim == 1
        return y.reshape(len(y), -1).astype(np.float64)

    def _standardised(self, target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        if len(target) < 2:
            raise UsageError(f"BilevelRegressor: X, y: expected at least two distinct samples, got {len(target)}")
        self._output_scaler = StandardScaler().fit(target, sample_weight=weight)
        return self._output_scaler.transform(target), target.shape[1], np.zeros(len(target), dtype=np.int64)

    def _publish(self) -> None:
        unit = self._output_unit()
        if self.outer_steps > 0:
            self.outer_losses_ = [loss + float(np.log(unit.diagonal()).sum()) for loss in self.outer_losses_]
        u, inverse = self._reward.precision().numpy(), np.linalg.inv(unit)
        self.precision_ = inverse.T @ u @ inverse if u.ndim == 2 else u * inverse.diagonal() ** 2

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The mean of y, (N,) or (N, D); with return_std also the standard deviations, of the same shape."""
        mean, factor = self._distribution(X)
        if not return_std:
            return self._shaped(mean)
        return self._shaped(mean), self._shaped(np.sqrt(np.square(factor).sum(axis=-1)))

    def sample(self, X: Any, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draws from the predictive distribution, (n_samples, N) or (n_samples, N, D).

        Args:
            X: (N, F).
            n_samples: draws for each row.
            random_state: of the draws.

        Raises:
            UsageError: n_samples is no integer of at least 1.
        """
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise UsageError(f"BilevelRegressor: n_samples: expected an integer of at least 1, got {n_samples!r}")
        mean, factor = self._distribution(X)
        noise = check_random_state(random_state).standard_normal((n_samples, *mean.shape))
        return self._shaped(mean + np.einsum("nij,snj->sni", factor, noise))

    def _distribution(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean (N, D) and a factor L of the covariance L Lᵀ (N, D, D), in units of y."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            mean, spread = self.policy_(torch.from_numpy(self._scaler.transform(X)))
            factor = self._factor(spread)[0].numpy()
        unit = self._output_unit()
        return self._output_scaler.mean_ + mean[0].numpy() @ unit.T, unit @ factor

    def _output_unit(self) -> np.ndarray:
        """(D, D), lower triangular: what takes the policy's outputs to y, but for its mean."""
        return self._output_scaler.scale_[:, None] * network_of(self.policy_).unit.numpy()

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        return values[..., 0] if self._one_output else values

    def _policy(self, members: int, features: int, outputs: int, seed: int) -> Policy:
        network = crossfit.Stack(members, [features, *self.hidden_layer_sizes, outputs], seed)
        if self.reward == "full":
            return crossfit.FullStack(network, members, outputs)
        return GaussianPolicy(network, crossfit.LogStd(members, outputs), outputs)

    def _held_out(self, policy: Policy, batch: Batch) -> Tensor:
        """Expected over values with noise of variance RIDGE added: of values that are met exactly no Σ is too small."""
        unit = network_of(policy).unit
        factor = unit @ self._factor(policy(batch.inputs[:1])[1])
        noise = torch.linalg.inv(factor).square().sum(dim=(-2, -1))
        return likelihood(policy, batch) + 0.5 * RIDGE * noise

    @staticmethod
    def _factor(spread: Tensor) -> Tensor:
        """A factor L of the covariance L Lᵀ (*, D, D) from what a policy gives, log σ (*, D) or L (M, N, D, D)."""
        return spread if spread.ndim == 4 else torch.diag_embed(spread.exp())

    def _first_loss(self) -> RowLoss:
        return policy_gradient(MahalanobisReward(1, "isotropic").double())

    def _first_reward(self, policy: Policy, together: Policy, rows: Rows, inside: Tensor) -> tuple[nn.Module, Rows]:
        with torch.no_grad():
            # Each around the mean of the member that did not train on it.
            residual = (inside.sqrt()[:, :, None] * (rows.target - together(rows.inputs)[0])).flatten(0, 1)
        covariance = residual_covariance(residual) * (len(residual) / rows.weight.sum())
        kind = cast(PrecisionKind, self.reward)
        # Residuals whose covariance is one give the mean's weights and Σ the same curvature, however good the fit and
        # however near to singular the noise. There U* = Σ⁻¹/2 is half the identity.
        covariance = covariance + RIDGE * torch.eye(len(covariance), dtype=torch.float64)
        unit = torch.linalg.cholesky(covariance) if kind == "full" else torch.diag(covariance.diagonal().sqrt())
        if kind == "isotropic":
            unit = torch.eye(len(covariance), dtype=torch.float64) * covariance.diagonal().mean().sqrt()
        for each in (policy, together):
            network_of(each).measure_in(unit)
        reward = MahalanobisReward(len(unit), kind, torch.tensor(0.5, dtype=torch.float64))
        return reward, rows._replace(target=crossfit.in_units(rows.target, unit))
