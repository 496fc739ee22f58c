"""scikit-learn estimators whose reward is learned from the data that they are fitted to; `fitting` says how."""

import copy
import math
from collections.abc import Sequence
from numbers import Integral, Number
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from . import crossfit
from .crossfit import Rows, likelihood, network_of
from .errors import UsageError
from .fitting import OUTER_ENOUGH, BilevelEstimator, fit_to
from .heuristics import residual_covariance
from .linear import Ridge, Softmax
from .losses import Batch
from .members import Learned, Members, Networks
from .policies import CategoricalPolicy, GaussianPolicy, Policy
from .rewards import (
    MahalanobisReward,
    MatrixReward,
    OneHotMahalanobisReward,
    PrecisionKind,
    TableReward,
    TabularReward,
    one_hot_table,
)

# The classifier's U before anything is learned: right and wrong answers differ by 6 nats.
START = 3.0
# That networks are tried with if it is learned: their early ends leave no gradient in it.
PENALTIES = (1.0, 3.0, 10.0)
# Of the data, for each class and for each entry of a table of rewards, before a table is tried.
ROWS_A_CLASS, ROWS_AN_ENTRY = 100, 10
# Standard errors by which the table has to be better.
SURE = 2.0
# Rows of which only the policy, its beliefs or likelihood knows the answer, beside the held-out rows. Beliefs can hold
# everything impossible, and are given none to speak of.
KNOWN = (0.5, 1e-3, 0.5)
# U* = Σ⁻¹/2 where Σ is one.
HALF = torch.tensor(0.5, dtype=torch.float64)
# Added to the residuals' variances, of standardised y: a perfect fit has none.
RIDGE = 1e-6


class BilevelClassifier(ClassifierMixin, BilevelEstimator):
    """Softmax classifier trained by policy gradient under a reward for each pair of answer and label, learned too.

    With its defaults a linear model that differs from `LogisticRegression()` in the loss, which asks for the confidence
    that cross-validated likelihood finds right, and in the penalty, which is learned beside it. Its probabilities are a
    mixture of the policy's, of the P(y|x) that it is optimal for, and of the same model's trained by likelihood, whose
    shares held-out rows decide: where a reward says less than likelihood does, the answers are mostly the latter's.
    docs/estimators.md has the mathematics, and how likely held-out rows are beside `LogisticRegression()`.

    Args:
        reward: what is learned: "isotropic", "diagonal" or "full" for the matrix U of the reward
            -(e_ŷ-e_y)ᵀU(e_ŷ-e_y) of one-hot labels (1, C or C² numbers), "table" for any reward R[ŷ, y]; "auto" for a
            diagonal U, and from 100 rows for each class on a table too, where cross-validation is sure of its gain and
            there are no hidden layers.
        hidden_layer_sizes: widths of a tanh network's hidden layers; none for a linear model. Training stops where the
            held-out rows are likeliest, and `warm_start` starts from nothing: no fold may have seen its held-out rows.
        l2: penalty (l2/2) ‖weights‖² beside the sum of the losses over rows, 1/C of `LogisticRegression`; intercepts
            are free. Inputs are standardised first. "auto" starts at 1 and is learned with the reward; with hidden
            layers it is 1, 3 or 10.
        folds: of the reward's cross-validation; fewer if there are fewer rows.
        reward_rows: the most distinct rows that the reward is learned from, chosen at random in every class; the policy
            is trained on all of them. None for all, and so with hidden layers.
        outer_steps: the most rewards to try, which warns if none is the best; 0 keeps the one that it starts from.
        max_iter: the most Newton steps in one training of a policy, L-BFGS iterations with hidden layers.
        tol: Euclidean norm of the gradient, in nats a row, at which a training ends.
        class_weight: factors of the rows' weights by their class, or "balanced" for n / (C · rows of the class): what
            is likely, and the reward, are then those of data with these shares.
        warm_start: the next `fit` starts from the policy and the reward of the last.
        random_state: of the folds, and of a network's initial weights.
        n_jobs: the most threads, -1 for one on each processor, None for those that torch has; small data have one.
        verbose: 1 for a progress bar.

    Attributes:
        classes_: (C,) labels.
        reward_: (C, C), reward_[i, j] of the answer classes_[i] where the label is classes_[j], in nats.
        precision_: U, () or (C,) or (C, C); not there for a table.
        l2_: the penalty that was learned, or given.
        belief_share_: how much of the probabilities is P(y|x) as the policy's optimality tells it, from 0 to 1.
        likelihood_share_: how much of them is that of the same model trained by likelihood, under the penalty l2 or 1
            for "auto"; the rest is the policy itself. See docs/estimators.md.
        outer_losses_: cross-validated NLL of the policies under each reward that was tried, nats a row; the least is
            the one that was taken, but for a prior.
        coef_, intercept_: of a linear policy, (C, F) and (C,), or (1, F) and (1,) of two classes: logits, or the
            log-odds of the second class. They are the policy's own, whose share in the probabilities is the rest of
            those above.
        policy_: the trained policy, on standardised inputs.
        n_iter_: steps or iterations of its training.
        n_features_in_, feature_names_in_: of the inputs, as everywhere in scikit-learn.
    """

    _learns_l2 = True
    _parameter_constraints: ClassVar = BilevelEstimator._parameter_constraints | {
        "reward": [StrOptions({"auto", *get_args(PrecisionKind), "table"})],
        "l2": [*BilevelEstimator._parameter_constraints["l2"], StrOptions({"auto"})],
        "reward_rows": [None, Interval(Integral, 2, None, closed="left")],
        "class_weight": [None, dict, StrOptions({"balanced"})],
    }
    classes_: np.ndarray
    belief_share_: float
    likelihood_share_: float
    # Trained by likelihood: a member for each fold while the shares are sought, then one on all rows.
    _likely: Policy

    def __init__(
        self, reward: PrecisionKind | Literal["auto", "table"] = "auto", *,
        hidden_layer_sizes: int | Sequence[int] = (), l2: float | Literal["auto"] = "auto", folds: int = 5,
        reward_rows: int | None = 20_000, outer_steps: int = 30, max_iter: int = 500, tol: float = 1e-4,
        class_weight: dict[Any, float] | Literal["balanced"] | None = None, warm_start: bool = False,
        random_state: Any = None, n_jobs: int | None = None, verbose: int = 0,
    ) -> None:  # fmt: skip
        self.reward_rows = reward_rows
        self.class_weight = class_weight
        super().__init__(
            cast(PrecisionKind, reward), hidden_layer_sizes=hidden_layer_sizes, l2=cast(float, l2), folds=folds,
            outer_steps=outer_steps, max_iter=max_iter, tol=tol, warm_start=warm_start, random_state=random_state,
            n_jobs=n_jobs, verbose=verbose,
        )  # fmt: skip

    def _check_target(self, y: Any) -> None:
        values = np.atleast_1d(np.asarray([] if y is None else y))
        missing = [place for place, value in np.ndenumerate(values) if value is None] if values.dtype == object else []
        if missing:
            raise UsageError(f"BilevelClassifier: y: expected labels, got None in row {missing[0][0]}")

    def _of_class(self, columns: np.ndarray) -> np.ndarray:
        return self._class_weight[columns[:, 0].astype(np.int64)]

    def _columns(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        self._class_weight = compute_class_weight(self.class_weight, classes=classes, y=y)
        present = len(np.unique(labels[weight * self._class_weight[labels] > 0]))
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

    def _for_reward(self, rows: Rows, strata: np.ndarray, random: np.random.RandomState) -> tuple[Rows, np.ndarray]:
        if self.reward_rows is None or self.reward_rows >= len(strata):
            return rows, strata
        # Every so many of the rows of a class: none loses its share.
        order = random.permutation(len(strata))
        order = order[np.argsort(strata[order], kind="stable")]
        chosen = np.sort(order[np.linspace(0, len(order) - 1, self.reward_rows).astype(np.int64)])
        return Rows(*(column[torch.from_numpy(chosen)] for column in rows)), strata[chosen]

    def _refined(self, phi: Learned, folds: Members, rows: Rows, inside: Tensor) -> Learned:
        folds.train(phi)
        diagonal_scores, shares = self._scores_and_shares(phi, folds.policy, rows, inside)
        self.belief_share_, self.likelihood_share_ = shares
        classes, total = len(self.classes_), float(rows.weight.sum())
        simple = self.reward == "auto" and isinstance(phi.reward, OneHotMahalanobisReward)
        if not simple or self.outer_steps == 0 or total < max(ROWS_A_CLASS * classes, ROWS_AN_ENTRY * classes**2):
            return phi
        losses, policy = self.outer_losses_, copy.deepcopy(folds.policy.state_dict())
        table = copy.deepcopy(phi)
        table.reward = TableReward(cast(TabularReward, phi.reward).table().detach())
        # Numbers more gain half a nat each by chance.
        chance = 0.5 * max(1, classes * (classes - 2)) / total
        self._learn(table, folds, total, enough=max(OUTER_ENOUGH, 0.1 * chance))
        self.outer_losses_ = losses + self.outer_losses_
        folds.train(table)
        table_scores, shares = self._scores_and_shares(table, folds.policy, rows, inside)
        gain = table_scores - diagonal_scores
        mean = float((inside * gain).sum()) / total
        error = math.sqrt(float((inside * (gain - mean).square()).sum())) / total
        if mean > max(SURE * error, chance):
            self.belief_share_, self.likelihood_share_ = shares
            return table
        folds.policy.load_state_dict(policy)
        return phi

    def _scores_and_shares(
        self, phi: Learned, policy: Policy, rows: Rows, inside: Tensor
    ) -> tuple[Tensor, tuple[float, float]]:  # fmt: skip
        """Of the folds' policies under a reward.

        Returns:
            log-probabilities of the rows' labels (M, N) by the likeliest mixture of policy and beliefs, which judge the
            reward without the share of likelihood; and the shares of beliefs and of likelihood in the mixture of three.
        """
        with torch.no_grad():
            table = cast(TabularReward, phi.reward).table()
            logs = crossfit.answers(policy(rows.inputs), table, self._likely(rows.inputs))
            logs = logs.gather(-1, rows.target.expand(*logs.shape[:2], -1)[..., None])[..., 0]
        without_likelihood = crossfit.shares_of(logs[:2], inside, KNOWN[:2])
        _, belief, likely = crossfit.shares_of(logs, inside, KNOWN)
        return crossfit.mixed(logs[:2], without_likelihood), (float(belief), float(likely))

    def _complete(self, rows: Rows) -> None:
        together, features = self._likely, rows.inputs.shape[1]
        self._likely = self._policy(1, features, len(self.classes_), 0)
        crossfit.spread(together, self._likely)
        self._on_all(self._likely, rows).begin(self._l2()[0])

    def _publish(self) -> None:
        self.l2_: float = float(self._phi.l2())
        self.reward_: np.ndarray = cast(TabularReward, self._phi.reward).table().numpy()
        if isinstance(self._phi.reward, OneHotMahalanobisReward):
            self.precision_: np.ndarray = self._phi.reward.precision().numpy()
        if not self._hidden():
            coefficients, intercept = self._linear()
            if len(intercept) == 2:
                coefficients, intercept = np.diff(coefficients, axis=0), np.diff(intercept)
            self.coef_: np.ndarray = coefficients
            self.intercept_: np.ndarray = intercept

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Log-probabilities of the classes, (N, C), in nats."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            inputs = torch.from_numpy(self._scaler.transform(X))
            logs = crossfit.answers(
                self.policy_(inputs)[0], torch.from_numpy(self.reward_), self._likely(inputs)[0]
            )  # fmt: skip
        own = max(0.0, 1.0 - self.belief_share_ - self.likelihood_share_)
        return crossfit.mixed(logs, np.array([own, self.belief_share_, self.likelihood_share_])).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, (N, C), in the order of `classes_`."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, (N,)."""
        answer = self.predict_log_proba(X).argmax(axis=1)
        return self.classes_[answer]

    def _policy(self, members: int, features: int, outputs: int, seed: int) -> CategoricalPolicy:
        return CategoricalPolicy(crossfit.Stack(members, [features, *self._hidden(), outputs], seed))

    def _members(self, policy: Policy, rows: Rows, inside: Tensor) -> Members:
        return Softmax(cast(CategoricalPolicy, policy), rows, inside, tol=self.tol, max_iter=self.max_iter)

    def _learn_early(self, policy: Policy, rows: Rows, inside: Tensor) -> Learned:
        # Off a minimum there is no hypergradient; for the beliefs that were reached the best U is a small problem.
        networks = Networks(policy, rows, inside, held_out=likelihood, tol=self.tol, max_iter=self.max_iter)
        total, start = float(rows.weight.sum()), copy.deepcopy(policy.state_dict())
        l2, learned = self._l2()
        least, self.n_iter_ = math.inf, 0
        for tried in PENALTIES if learned else (l2,):
            policy.load_state_dict(start)
            loss, steps = networks.train(None, tried, OUTER_ENOUGH)
            self.n_iter_: int = max(self.n_iter_, steps)
            if loss < least:
                least, l2, self._likely = loss, tried, copy.deepcopy(policy)
        phi = Learned(self._start(), l2, False)
        with torch.no_grad():
            believed = torch.softmax(self._likely(rows.inputs), dim=-1)
        policy.load_state_dict(start)
        losses: list[float] = []
        for _ in self._bar_over(losses):
            if self.outer_steps > 0:
                fit_to(phi, believed, rows, inside)
            loss, steps = networks.train(phi.reward, l2, OUTER_ENOUGH)
            self.n_iter_ = max(self.n_iter_, steps)
            losses.append(loss)
            with torch.no_grad():
                believed = crossfit.beliefs(policy(rows.inputs), cast(TabularReward, phi.reward).table())
            # Half a nat, in all, is what one number learned from the rows gains by chance.
            if len(losses) > 1 and losses[-2] - losses[-1] < 0.5 / total:
                break
        else:
            self._warn_of_reward(f"its last step still gained more than {0.5 / total:.1e} nats a row")
        if self.outer_steps > 0:
            self.outer_losses_: list[float] = losses
        _, (self.belief_share_, self.likelihood_share_) = self._scores_and_shares(phi, policy, rows, inside)
        together, self._likely = self._likely, self._policy(1, rows.inputs.shape[1], len(self.classes_), 0)
        crossfit.spread(together, self._likely)
        return phi

    def _first_reward(self, folds: Members) -> nn.Module:
        self._likely = copy.deepcopy(folds.policy)
        return self._start()

    def _start(self) -> nn.Module:
        classes = len(self.classes_)
        if self.reward == "table":
            return TableReward(one_hot_table(torch.tensor(START, dtype=torch.float64), classes))
        kind = "diagonal" if self.reward == "auto" else self.reward
        return OneHotMahalanobisReward(classes, cast(PrecisionKind, kind), START).double()


class BilevelRegressor(MultiOutputMixin, RegressorMixin, BilevelEstimator):
    """Gaussian regression N(mean(x), Σ), trained by policy gradient under the reward -(ŷ-y)ᵀU(ŷ-y), U learned too.

    U sets the spread, Σ = U⁻¹/2, and how much a residual counts beside the penalty. A standard deviation is never below
    a thousandth of y's. With hidden layers training stops where the held-out rows are likeliest, U is the closed form
    for the residuals there, and `warm_start` starts from nothing: no fold may have seen its held-out rows.
    docs/estimators.md has more.

    Args:
        reward: form of U: "isotropic" (one number in units of each output's standard deviation), "diagonal", or "full",
            which comes with a full Σ.
        hidden_layer_sizes, folds, outer_steps, max_iter, tol, warm_start, random_state, n_jobs, verbose: as in
            `BilevelClassifier`.
        l2: penalty (l2/2) ‖weights‖² beside the sum of the losses over rows, of standardised inputs and outputs: a
            Gaussian prior of variance 1/l2. Intercepts are free.

    Attributes:
        precision_: U, (D,) or, for "full", (D, D), in units of 1/y²; y (N,) is D = 1.
        outer_losses_: cross-validated NLL under each reward that was tried, nats a row.
        coef_, intercept_: of a linear model, (F,) and (), or (D, F) and (D,): the mean is X @ coef_.T + intercept_.
        policy_: the trained policy, on standardised inputs and outputs.
        n_iter_, n_features_in_, feature_names_in_: as in `BilevelClassifier`.
    """

    _parameter_constraints: ClassVar = BilevelEstimator._parameter_constraints | {
        "reward": [StrOptions(set(get_args(PrecisionKind)))],
    }
    _target_options: ClassVar = {"multi_output": True, "y_numeric": True, "ensure_min_samples": 2}
    _output_scaler: StandardScaler

    def _check_target(self, y: Any) -> None:
        values = np.asarray(y)
        # Texts and times would become numbers in silence: '7' is seven, a date its nanoseconds.
        if values.ndim > 0 and values.dtype.kind in "OSUmM":
            for place, value in np.ndenumerate(values):
                if not isinstance(value, Number) or isinstance(value, np.timedelta64):
                    columns = getattr(y, "columns", None)
                    where = f"column {columns[place[1]]!r}, " if columns is not None and len(place) == 2 else ""
                    raise UsageError(
                        f"BilevelRegressor: y: expected numbers, got {value!r} ({type(value).__name__}) in {where}"
                        f"row {place[0]}"
                    )

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
        u, inverse = cast(MatrixReward, self._phi.reward).precision().numpy(), np.linalg.inv(unit)
        self.precision_: np.ndarray = inverse.T @ u @ inverse if u.ndim == 2 else u * inverse.diagonal() ** 2
        if not self._hidden():
            coefficients, intercept = self._linear()
            coefficients, intercept = unit @ coefficients, self._output_scaler.mean_ + unit @ intercept
            self.coef_: np.ndarray = coefficients[0] if self._one_output else coefficients
            self.intercept_: np.ndarray = self._shaped(intercept)

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
        network = crossfit.Stack(members, [features, *self._hidden(), outputs], seed)
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

    def _members(self, policy: Policy, rows: Rows, inside: Tensor) -> Members:
        return Ridge(cast(Any, policy), rows, inside, noise=RIDGE)

    def _learn_early(self, policy: Policy, rows: Rows, inside: Tensor) -> Learned:
        # Off a minimum there is no hypergradient; for the means that were reached U* has a closed form.
        phi = Learned(self._half(rows.target.shape[1]), *self._l2())
        losses: list[float] = []
        outputs, total = rows.target.shape[1], float(rows.weight.sum())
        self.n_iter_ = 0
        for _ in self._bar_over(losses):
            here = rows._replace(target=crossfit.in_units(rows.target, network_of(policy).unit))
            networks = Networks(
                policy, here, inside, held_out=self._held_out, tol=self.tol, max_iter=self.max_iter
            )  # fmt: skip
            loss, steps = networks.train(phi.reward, self._l2()[0], OUTER_ENOUGH)
            self.n_iter_: int = max(self.n_iter_, steps)
            losses.append(loss + _log_volume(policy))
            with torch.no_grad():
                # Each around the mean of the member that did not train on it.
                residual = (inside.sqrt()[:, :, None] * (here.target - policy(rows.inputs)[0])).flatten(0, 1)
                unit = network_of(policy).unit
                self._measure(policy, unit @ residual_covariance(residual) @ unit.mT * (len(residual) / total))
                crossfit.set_covariance(policy, torch.eye(outputs, dtype=torch.float64))
            # The loss is now what it is where the residuals have the covariance of the policy. It was half a nat more,
            # in all, if the reward was as far from its best as one number learned from these rows is anyway.
            if losses[-1] < 0.5 * outputs * (math.log(2.0 * math.pi) + 1.0) + _log_volume(policy) + 0.5 / total:
                break
        else:
            self._warn_of_reward(f"its last step still gained more than {0.5 / total:.1e} nats a row")
        if self.outer_steps > 0:
            self.outer_losses_: list[float] = [loss - _log_volume(policy) for loss in losses]
        return phi

    def _first_reward(self, folds: Members) -> nn.Module:
        covariance = cast(Ridge, folds).residual()
        self._measure(folds.policy, covariance)
        return self._half(len(covariance))

    def _half(self, outputs: int) -> nn.Module:
        return MahalanobisReward(outputs, cast(PrecisionKind, self.reward), HALF)

    def _measure(self, policy: Policy, covariance: Tensor) -> None:
        """Takes for the outputs' unit what makes the covariance (D, D) of the held-out residuals one.

        There the mean's weights and Σ have the same curvature, however good the fit and however near to singular the
        noise, and U* = Σ⁻¹/2 is half the identity.
        """
        variance = covariance.diagonal() + RIDGE
        if self.reward == "isotropic":
            variance = variance.mean().expand(len(variance))
        unit = torch.diag(variance.sqrt())
        if self.reward == "full":
            unit = torch.linalg.cholesky(covariance + RIDGE * torch.eye(len(variance), dtype=torch.float64))
        network = network_of(policy)
        network.measure_in(torch.linalg.solve_triangular(network.unit, unit, upper=False))


def _log_volume(policy: Policy) -> float:
    """log det of the units that the policy's outputs are in."""
    return float(network_of(policy).unit.diagonal().log().sum())
