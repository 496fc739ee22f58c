"""Tabular classification: maximum likelihood beside policy gradient under fixed and learned rewards.

All methods train the same policy from the same initial weights on the same rows, with the same optimiser, the same
number of steps and the same L2 penalty; they differ in the loss. What a method needs beyond that, it takes from the
training rows: `pg_heuristic` its covariance, `pg_heuristic_residual` and `pg_learned` a reward found with part of
the training rows held out of the inner problem. `pg_learned_isotropic`, `..._diagonal`, `..._full` and `..._table` are
`pg_learned` with a reward of that form whatever `reward` says; `pg_learned_cv` is `BilevelClassifier`, which holds out
each fifth of the training rows in turn and chooses the form itself, and `logistic_regression` is scikit-learn's, to
compare that with. Of `nll`, `pg_identity` and `pg_heuristic` there are `..._cv`, whose penalty is chosen on such
fifths, and `..._early`, whose number of steps is: a penalty that suits clean labels is no fair one under noise. No
choice reads a test row.

The categorical policy under reward table R and entropy weight λ has the inner objective λ KL(p ‖ softmax(R[·, y]/λ)):
R sets how sure of the label the policy is asked to be, and the outer loss learns that from held-out likelihood.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from ..errors import UsageError
from ..heuristics import marginal_covariance, optimal_precision, residual_covariance
from ..hypergradients import ImplicitCG
from ..losses import Batch, NegativeLogLikelihood, PolicyGradient
from ..optimizers import SOLVED, lbfgs
from ..optional import require
from ..policies import CategoricalPolicy, LinearCategorical, MLPCategorical
from ..rewards import OneHotMahalanobisReward, PrecisionKind, TableReward, TabularReward, diagonal, one_hot_table
from ..steps import OuterStep
from ..trainer import BilevelTrainer
from ..training import train_nll, train_policy_gradient
from . import data, metrics, plots, runs
from .runs import SKLEARN, Clock, Experiment, OptionsInParts, Outcome, each_run, imperfect, learn, named, threads

Method = Literal[
    "nll", "nll_cv", "nll_early", "pg_identity", "pg_identity_cv", "pg_identity_early", "pg_heuristic",
    "pg_heuristic_cv", "pg_heuristic_early", "pg_heuristic_residual", "pg_learned", "pg_learned_isotropic",
    "pg_learned_diagonal", "pg_learned_full", "pg_learned_table", "pg_learned_cv", "logistic_regression",
]  # fmt: skip
# Methods that are estimators, with an optimiser of their own.
ESTIMATORS = ("pg_learned_cv", "logistic_regression")
# Values of l2 that cross-validation chooses from, in this order.
PENALTIES = tuple(10.0 ** (0.5 * power) for power in range(6, -5, -1))

DEFAULT_STEPS = {"lbfgs": 300, "adam": 400}
DEFAULT_DAMPING = {"exact": 1e-4, "dice": 3e-2}
DEFAULT_INNER_STEPS = {"lbfgs": 100, "adam": 40}


@dataclasses.dataclass(frozen=True)
class ClassifyConfig(OptionsInParts):
    """Compare likelihood with policy gradient under fixed and learned rewards on tabular data."""

    dataset: tuple[str, ...] = ("wine",)
    """wine, iris, breast_cancer, digits; spambase, credit_default, poker of openml.org, from its cache if it is there;
    or the path of a CSV or Parquet file. Several run one after the other."""
    target: str | None = None
    """Column of the file that holds the classes."""
    encoding: data.Encoding = "none"
    """Of a file's columns of text: a column of zeros and ones for each text, or its place in alphabetical order."""
    max_rows: int | None = None
    """A stratified random choice of so many rows, the same for all seeds, where a data set has more."""
    methods: tuple[Method, ...] = (
        "nll", "nll_cv", "pg_identity", "pg_heuristic", "pg_heuristic_residual", "pg_learned",
    )  # fmt: skip
    """Methods to compare."""
    reward: PrecisionKind = "diagonal"
    """Form of U, of the heuristic and of the learned reward."""
    policy: Literal["linear", "mlp"] = "linear"
    """Multinomial logistic regression, or a tanh network."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the network's hidden layers."""
    entropy_coef: float = 1.0
    """λ, in units of reward a nat. U and λ matter through U/λ, so the learned reward makes up for it."""
    l2: float = 1.0
    """Penalty (l2/2N) ‖θ‖² on N rows, times λ for policy gradient: with the same curvature, the same prior. That of
    `_cv` methods is chosen."""
    choose_by: Literal["nll", "accuracy"] = "nll"
    """What of held-out training rows `_cv` methods choose their penalty by, and `_early` methods their steps."""
    estimator: Literal["exact", "dice"] = "exact"
    """Expectation over classes by enumeration, or over samples."""
    num_samples: int | None = None
    """G, samples a row; for --estimator dice."""
    optimizer: Literal["auto", "lbfgs", "adam"] = "auto"
    """The policy's optimiser in every method; auto is lbfgs for exact losses, adam for sampled ones."""
    learning_rate: float = 0.05
    """Of adam for the policy; lbfgs searches its step."""
    steps: int | None = None
    """Optimiser steps of every method's final training; by default 300 of lbfgs, 400 of adam."""
    batch_size: int | None = None
    """Rows of a training batch; by default all. For --optimizer adam."""
    outer_steps: int = 40
    """Updates of the learned reward."""
    outer_learning_rate: float = 0.3
    """Of adam for the reward's parameters."""
    inner_steps: int | None = None
    """The most optimiser steps between updates of the reward; by default 100 of lbfgs, 40 of adam."""
    damping: float | None = None
    """Added to the inner Hessian in the hypergradient's linear solve; by default 0.0001 for --estimator exact, and 0.03
    for dice, whose Hessian has noise of about that size."""
    cg_tolerance: float = 1e-4
    """Relative residual at which the linear solve stops."""
    cg_iterations: int = 200
    """The most iterations of the linear solve."""
    test_fraction: float = 0.2
    """Of all rows."""
    held_out_fraction: float = 0.25
    """Of the training rows: the outer loss reads these while the reward is learned."""


def check(config: ClassifyConfig) -> None:
    """See `Experiment`."""
    fractions = ("test_fraction", "held_out_fraction")
    runs.check_options(config, fractions=fractions, zero=("l2", "damping", "first_seed"))
    if config.l2 == 0 and config.damping == 0 and any(method.startswith("pg_learned") for method in config.methods):
        raise UsageError(
            "--damping: expected a positive number with --l2 0, got 0: adding the same number to all logits changes "
            "nothing, so the inner Hessian is singular"
        )
    if config.estimator == "exact" and config.num_samples is not None:
        raise UsageError(f"--num-samples: expected none with --estimator exact, got {config.num_samples}")
    if config.estimator == "dice" and (config.num_samples is None or config.num_samples < 2):
        raise UsageError(
            f"--num-samples: expected an integer of at least 2 with --estimator dice, got {config.num_samples}"
        )
    noisy = config.estimator == "dice" or config.batch_size is not None
    if config.optimizer == "lbfgs" and noisy:
        raise UsageError(
            "--optimizer: expected adam with --estimator dice or --batch-size, got lbfgs, whose line search needs a "
            "loss without noise"
        )


def run(config: ClassifyConfig) -> Outcome:
    """Runs every method on every data set and seed.

    Returns:
        rows; "curves", for each data set and method a list over seeds of {"step", "nll", "accuracy"}, lists over
        optimiser steps of the final training, on the test rows; "reward_paths", for each data set a list over seeds of
        {"outer_loss", "precision"}, lists over outer steps, where the precision is the diagonal of U (of length C, or 1
        if isotropic), or of the table. Those of other methods than pg_learned are under "data set, method".
    """
    check(config)
    tables = [data.subset(data.load(name, config.target, config.encoding), config.max_rows) for name in config.dataset]
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        raise UsageError(f"--dataset: expected files of different names, got {' '.join(names)}")
    outcome = new_outcome()
    with threads(config.threads):
        for table in tables:
            splits = functools.lru_cache(maxsize=1)(functools.partial(splits_of, config, table))
            for seed, method in each_run(config, config.methods, label=table.name):
                run_method(config, table.name, len(table.classes), splits(seed), seed, method, outcome)
    return outcome


def new_outcome() -> Outcome:
    """One for `run_method` to add to."""
    return Outcome([], {"curves": {}, "reward_paths": {}}, [])


def splits_of(config: ClassifyConfig, table: data.Table, seed: int) -> data.Splits:
    """The splits of a seed."""
    fractions = {"test_fraction": config.test_fraction, "held_out_fraction": config.held_out_fraction}
    return data.split(table, seed=seed, **fractions)


def run_method(
    config: ClassifyConfig, name: str, num_classes: int, splits: data.Splits, seed: int, method: Method,
    outcome: Outcome,
) -> None:  # fmt: skip
    """Runs one method on one split, and adds what it found to the outcome under that name.

    Raises:
        NonFiniteError: training diverged.
    """
    outcome.curves["curves"].setdefault(name, {}).setdefault(method, [])
    with named(name, f"seed {seed}", method):
        _Run(config, name, num_classes, splits, seed, method, outcome).run()


@dataclasses.dataclass
class _Run:
    """One method on one data set and seed."""

    config: ClassifyConfig
    name: str
    num_classes: int
    splits: data.Splits
    seed: int
    method: Method
    outcome: Outcome

    def __post_init__(self) -> None:
        config = self.config
        noisy = config.estimator == "dice" or config.batch_size is not None
        self.optimizer = config.optimizer if config.optimizer != "auto" else "adam" if noisy else "lbfgs"
        self.tolerance = 0.0 if noisy else SOLVED
        self.damping = DEFAULT_DAMPING[config.estimator] if config.damping is None else config.damping
        self.steps = config.steps or DEFAULT_STEPS[self.optimizer]
        self.l2 = config.l2
        base, _, choice = self.method.rpartition("_")
        chosen = choice in ("cv", "early") and self.method not in ESTIMATORS
        self.base, self.choice = (base, choice) if chosen else (self.method, "")
        self.clock = Clock()

    def run(self) -> None:
        """Trains, and adds the row and the learning curve to the outcome."""
        if self.method in ESTIMATORS:
            self._estimator()
            return
        curve: dict[str, list[float]] = {"step": [], "nll": [], "accuracy": []}
        policy = self._policy()

        def watch(step: int, _: float) -> None:
            with self.clock.paused():
                found = self._evaluate(policy)
                for metric, value in (("step", step + 1), ("nll", found["nll"]), ("accuracy", found["accuracy"])):
                    curve[metric].append(value)

        with self.clock:
            table, u = self._reward()
            self._choose(table)
            self._train(policy, table, self.splits.train, watch)
        self._record(self._evaluate(policy), u, curve)

    def _record(self, found: dict[str, float], u: float | None, curve: dict[str, Any]) -> None:
        row = {"dataset": self.name, "method": self.method, "seed": self.seed}
        self.outcome.rows.append(row | found | {"u": u, "seconds": self.clock.seconds})
        self.outcome.curves["curves"][self.name][self.method].append(curve | {"l2": self.l2})

    def _estimator(self) -> None:
        """Fits an estimator to the training rows; its curve is the one point that it ends at."""
        config = self.config
        train, test = self.splits.train, self.splits.test
        model: Any
        if self.method == "logistic_regression":
            model = require("sklearn.linear_model", "sklearn").LogisticRegression(
                C=1.0 / config.l2 if config.l2 > 0 else math.inf, max_iter=1000
            )
        else:
            # scikit-learn is optional, and so is not imported with this module.
            from ..estimators import BilevelClassifier

            model = BilevelClassifier(
                hidden_layer_sizes=config.hidden if config.policy == "mlp" else (), l2=config.l2,
                outer_steps=config.outer_steps, random_state=self.seed,
            )  # fmt: skip
        # scikit-learn's own threads are those of its BLAS, as many as the machine has cores if nothing is said.
        limited = require("threadpoolctl", "sklearn").threadpool_limits(config.threads)
        with limited, warnings.catch_warnings(record=True) as said, self.clock:
            warnings.simplefilter("always")
            model.fit(train.inputs.numpy(), train.target.numpy())
        where = f"{self.name}, seed {self.seed}, {self.method}"
        self.outcome.warnings.extend(f"{where}: {warning.message}" for warning in said)
        found = metrics.classification(torch.from_numpy(model.predict_log_proba(test.inputs.numpy())), test.target)
        u = float(diagonal(torch.from_numpy(model.precision_)).mean()) if hasattr(model, "precision_") else None
        curve = {"step": [float(np.max(model.n_iter_))], "nll": [found["nll"]], "accuracy": [found["accuracy"]]}
        self._record(found, u, curve)

    def _train(
        self, policy: CategoricalPolicy, table: Tensor | None, rows: Batch,
        callback: Callable[[int, float], None] | None = None,
    ) -> None:  # fmt: skip
        """Policy gradient under the table of rewards; likelihood for None."""
        options: dict[str, Any] = {
            "batch_size": self.config.batch_size, "tolerance": self.tolerance, "seed": self.seed, "callback": callback,
        }  # fmt: skip
        optimizer = self._optimizer(list(policy.parameters()))
        if table is None:
            loss = NegativeLogLikelihood(self._l2(rows))
            train_nll(policy, rows, optimizer, self.steps, loss=loss, **options)
        else:
            reward = TableReward(table)
            train_policy_gradient(policy, reward, rows, optimizer, self.steps, loss=self._inner_loss(rows), **options)

    def _choose(self, table: Tensor | None) -> None:
        """Sets the penalty of a `_cv`, the number of steps of an `_early`: what does best on held-out training rows.

        A fifth of them is held out at a time, and what counts is the sum over all fifths.
        """
        if not self.choice:
            return
        parts = data.folds(self.splits.train, self.seed)
        if self.choice == "early":
            curves = [self._held_out(table, *part) for part in parts]
            # A fold that was solved keeps its last loss.
            length = max(map(len, curves))
            total = np.sum([curve + curve[-1:] * (length - len(curve)) for curve in curves], axis=0)
            self.steps = int(total.argmin()) + 1
            return
        losses: dict[float, float] = {}
        for self.l2 in PENALTIES:
            losses[self.l2] = sum(self._held_out(table, *part)[-1] for part in parts)
            # Weak penalties take most of the time. Counts of errors, and networks that learn nothing, have plateaus.
            smooth = self.config.choose_by == "nll" and self.config.policy == "linear"
            if smooth and min(list(losses.values())[-2:]) > min(losses.values()):
                break
        self.l2 = min(losses, key=losses.__getitem__)

    def _held_out(self, table: Tensor | None, fit: Batch, held_out: Batch) -> list[float]:
        """What counts of the held-out rows, a sum over them, after each step on the others; of `_cv` after the last."""
        policy, found = self._policy(), []

        @torch.no_grad()
        def watch(*_: Any) -> None:
            if self.config.choose_by == "accuracy":
                found.append(float((policy(held_out.inputs).argmax(dim=1) != held_out.target).sum()))
            else:
                found.append(-float(policy.log_prob(*held_out).sum()))

        self._train(policy, table, fit, watch if self.choice == "early" else None)
        watch()
        return found

    def _reward(self) -> tuple[Tensor | None, float | None]:
        """The method's table of rewards, detached, and the mean of U's diagonal; None and None for likelihood."""
        if self.base == "nll":
            return None, None
        if self.method.startswith("pg_learned"):
            reward = self._learned()
            table = reward.table().detach()
            if isinstance(reward, OneHotMahalanobisReward):
                return table, float(diagonal(reward.precision().detach()).mean())
            # A right and a wrong answer of a table u I differ by 2u.
            gap = table.diagonal().mean() - table[~torch.eye(self.num_classes, dtype=torch.bool)].mean()
            return table, 0.5 * float(gap)
        precision = self._fixed_precision()
        return one_hot_table(precision, self.num_classes), float(diagonal(precision).mean())

    def _fixed_precision(self) -> Tensor:
        if self.base == "pg_identity":
            return torch.ones((), dtype=torch.float64)
        if self.base == "pg_heuristic":
            return self._optimal(marginal_covariance(self._one_hot(self.splits.train)))
        # Residuals of rows that the policy was trained on would be too small.
        policy = self._policy()
        self._train(policy, None, self.splits.fit)
        with torch.no_grad():
            predicted = torch.softmax(policy(self.splits.held_out.inputs), dim=-1)
        return self._optimal(residual_covariance(self._one_hot(self.splits.held_out) - predicted))

    def _learned(self) -> TabularReward:
        config = self.config
        form = config.reward if self.method == "pg_learned" else self.method.removeprefix("pg_learned_")
        reward: TabularReward
        if form == "table":
            reward = TableReward(one_hot_table(torch.ones((), dtype=torch.float64), self.num_classes))
        else:
            reward = OneHotMahalanobisReward(self.num_classes, cast(PrecisionKind, form)).double()
        trainer = BilevelTrainer(
            self._policy(), reward, inner_data=self.splits.fit, outer_data=self.splits.held_out,
            inner_optimizer=self._optimizer,
            outer_optimizer=torch.optim.Adam(reward.parameters(), lr=config.outer_learning_rate),
            inner_steps=config.inner_steps or DEFAULT_INNER_STEPS[self.optimizer],
            inner_loss=self._inner_loss(self.splits.fit), outer_loss=NegativeLogLikelihood(),
            hypergradient=ImplicitCG(self.damping, config.cg_tolerance, config.cg_iterations),
            inner_tolerance=self.tolerance, keep_inner_state=self.optimizer == "adam", batch_size=config.batch_size,
            seed=self.seed, progress=config.progress, description=f"{self.name}, seed {self.seed}: reward",
        )  # fmt: skip
        self._record_path(learn(trainer, config.outer_steps))
        return reward

    def _record_path(self, history: list[OuterStep]) -> None:
        path = {
            "outer_loss": [step.outer_loss for step in history],
            "precision": [diagonal(step.reward).tolist() for step in history if step.reward is not None],
        }
        key = self.name if self.method == "pg_learned" else f"{self.name}, {self.method}"
        self.outcome.curves["reward_paths"].setdefault(key, []).append(path)
        self.outcome.warnings.extend(imperfect(f"{self.name}, seed {self.seed}, {self.method}", history))

    def _optimal(self, covariance: Tensor) -> Tensor:
        # One-hot labels sum to one, so the covariance is singular and "full" takes the pseudo-inverse.
        ridge = None if self.config.reward == "full" else 0.0
        return optimal_precision(covariance, self.config.entropy_coef, self.config.reward, ridge=ridge)

    def _one_hot(self, rows: Batch) -> Tensor:
        return functional.one_hot(rows.target, self.num_classes).to(rows.inputs.dtype)

    def _policy(self) -> CategoricalPolicy:
        """The initial policy: the same for every method of a seed."""
        features = self.splits.train.inputs.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.config.policy == "linear":
                return LinearCategorical(features, self.num_classes).double()
            return MLPCategorical(features, self.num_classes, hidden=self.config.hidden).double()

    def _optimizer(self, parameters: list[torch.nn.Parameter]) -> Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.config.learning_rate)
        return lbfgs(parameters)

    def _inner_loss(self, rows: Batch) -> PolicyGradient:
        config = self.config
        return PolicyGradient(
            entropy_coef=config.entropy_coef, estimator=config.estimator, num_samples=config.num_samples,
            l2=config.entropy_coef * self._l2(rows),
        )  # fmt: skip

    def _l2(self, rows: Batch) -> float:
        return self.l2 / rows.inputs.shape[0]

    def _evaluate(self, policy: CategoricalPolicy) -> dict[str, float]:
        with torch.no_grad():
            log_probabilities = torch.log_softmax(policy(self.splits.test.inputs), dim=-1)
        return metrics.classification(log_probabilities, self.splits.test.target)


# The data sets of docs/experiments.md, and the quick version of a run on them.
_SETS = {"dataset": ("wine", "iris", "breast_cancer", "digits")}
_QUICK = {"dataset": ("iris",), "seeds": 2, "outer_steps": 2, "steps": 20, "inner_steps": 10}
_FIXED = ("nll", "nll_cv", "pg_identity", "pg_heuristic", "pg_heuristic_cv", "pg_heuristic_residual")
_FORMS = ("pg_learned_isotropic", "pg_learned_diagonal", "pg_learned_full", "pg_learned_table", "pg_learned_cv")

EXPERIMENT = Experiment(
    "classify", ClassifyConfig, check, run, "classification", needs=lambda config: SKLEARN,
    figure=lambda config, outcome: plots.figure_of_classification(outcome),
    reproduced={
        "classification": (_SETS | {"methods": (*_FIXED, *_FORMS)}, _QUICK),
        "estimators": (
            _SETS | {"methods": ("nll", "nll_cv", "logistic_regression", "pg_learned_cv"), "outer_steps": 30}, _QUICK
        ),
    },
)  # fmt: skip
