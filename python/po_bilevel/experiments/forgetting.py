"""Forgetting: a policy learns task A, then task B from where it is; what is left of A?

"digits": ten classes, A is the digits 0 to 4 and B 5 to 9, a tanh network. "regression": y = sin(2x) + x/2 + noise in
one dimension, A is x from -3 to 0 and B from 0 to 3, a tanh network with one σ.

All methods take the same steps of adam from the same weights, on A and on B. `pg_heuristic` has U* of the marginal
covariance of labels, or of the residuals of a regression on rows that it has not seen; `pg_learned` the U that the
outer loop learns from there on rows held out. `nll_cv` has a penalty (l2/2N) ‖θ‖² that cross-validation on each task's
training rows chooses. `nll_replay` sees the rows of A and those of B: the upper line.

Methods learn B at different speeds, so that "kept" at the end compares different things. `kept_at_target` is what is
left of A at the first step at which B is as good as `target_accuracy` or `target_rmse` ask for, None if it never is.
"""

import copy
import dataclasses
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..heuristics import marginal_covariance, optimal_precision, residual_covariance
from ..hypergradients import ImplicitCG
from ..losses import Batch, NegativeLogLikelihood, PolicyGradient
from ..policies import GaussianPolicy, MLPCategorical, MLPGaussian, Policy
from ..rewards import MahalanobisReward, OneHotMahalanobisReward
from ..trainer import BilevelTrainer
from ..training import train_nll, train_policy_gradient
from . import data, runs
from .runs import SKLEARN, Clock, Experiment, OptionsInParts, Outcome, each_run, imperfect, learn, named, threads

Name = Literal["digits", "regression"]
Method = Literal["nll", "nll_cv", "pg_identity", "pg_heuristic", "pg_learned", "nll_replay"]

# Standard deviation of the noise of the regression.
NOISE_STD = 0.1
# Added to the inner Hessian, which is indefinite in a network's weights.
DAMPING = 0.1
# Values of l2 that `nll_cv` chooses from.
PENALTIES = (0.0, 0.01, 0.1, 1.0, 10.0)
# How often the tasks are looked at while B is learned.
LOOKS = 50


@dataclasses.dataclass(frozen=True)
class ForgettingConfig(OptionsInParts):
    """Learn one task, then another, and measure what is left of the first."""

    tasks: tuple[Name, ...] = ("digits", "regression")
    """Digits 0 to 4 and then 5 to 9; a curve left and then right of zero."""
    methods: tuple[Method, ...] = get_args(Method)
    """Methods to compare."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the network's hidden layers."""
    steps: int = 500
    """Steps of adam on each task."""
    learning_rate: float = 3e-3
    """Of adam for the policy."""
    outer_steps: int = 20
    """Updates of the learned reward."""
    inner_steps: int = 20
    """Steps of adam between updates of the learned reward."""
    outer_learning_rate: float = 0.2
    """Of adam for the reward's parameters."""
    target_accuracy: float = 0.9
    """Accuracy on B at which what is left of A is compared."""
    target_rmse: float = 0.2
    """RMSE on B at which what is left of A is compared."""


class Task(NamedTuple):
    """Rows to fit, rows held out for the reward, and rows to test on."""

    fit: Batch
    held_out: Batch
    test: Batch

    @property
    def train(self) -> Batch:
        return self.fit.joined(self.held_out)


def check(config: ForgettingConfig) -> None:
    """See `Experiment`."""
    runs.check_options(config, zero=("first_seed",))


def run(config: ForgettingConfig) -> Outcome:
    """Runs every method on every pair of tasks and seed.

    Returns:
        rows with "a_before", "kept" (of A after B), "won" (of B after B) and "kept_at_target": accuracy for digits,
        RMSE for the regression; "kl_moved", KL(policy after A ‖ policy after B) on A's test inputs, nats a row. Curves
        {data set: {method: [{"step", "a", "b"}, ...]}}.
    """
    check(config)
    outcome = Outcome([], {}, [])
    with threads(config.threads):
        for seed, name, method in each_run(config, config.tasks, config.methods):
            with named(name, f"seed {seed}", method):
                _Run(config, name, seed, method, outcome).run()
    return outcome


class _Run:
    """One method on one pair of tasks and seed."""

    def __init__(self, config: ForgettingConfig, name: str, seed: int, method: Method, outcome: Outcome) -> None:
        self.config, self.name, self.seed, self.method, self.outcome = config, name, seed, method, outcome
        self.labels = name == "digits"
        self.first, self.second = _digits(seed) if self.labels else _regression(seed)

    def run(self) -> None:
        """Trains on A, then on B, and adds the row and the curve to the outcome."""
        clock = Clock()
        policy = self._policy()
        with clock:
            self._train(policy, self.first, self.first.train, None)
        before = copy.deepcopy(policy)
        curve: dict[str, list[float]] = {"step": [0], "a": [self._score(policy, self.first)],
                                         "b": [self._score(policy, self.second)]}  # fmt: skip
        every = max(1, self.config.steps // LOOKS)

        def watch(step: int, _: float) -> None:
            if (step + 1) % every == 0 or step + 1 == self.config.steps:
                with clock.paused():
                    curve["step"].append(step + 1)
                    curve["a"].append(self._score(policy, self.first))
                    curve["b"].append(self._score(policy, self.second))

        rows = self.second.train
        if self.method == "nll_replay":
            rows = rows.joined(self.first.train)
        with clock:
            self._train(policy, self.second, rows, watch)
        target = self.config.target_accuracy if self.labels else self.config.target_rmse
        reached = [
            a for a, b in zip(curve["a"], curve["b"], strict=True) if (b >= target if self.labels else b <= target)
        ]
        self.outcome.rows.append({
            "dataset": self.name, "method": self.method, "seed": self.seed, "a_before": curve["a"][0],
            "kept": curve["a"][-1], "won": curve["b"][-1], "kept_at_target": reached[0] if reached else None,
            "kl_moved": self._divergence(before, policy), "seconds": clock.seconds,
        })  # fmt: skip
        self.outcome.curves.setdefault(self.name, {}).setdefault(self.method, []).append(curve)

    def _train(self, policy: Policy, task: Task, rows: Batch, callback: Any) -> None:
        config = self.config
        options: dict[str, Any] = {"seed": self.seed, "callback": callback}
        if self.method.startswith("nll"):
            loss = NegativeLogLikelihood(self._penalty(policy, rows) if self.method == "nll_cv" else 0.0)
            train_nll(policy, rows, self._optimizer(policy.parameters()), config.steps, loss=loss, **options)
            return
        reward = self._reward(policy, task)
        train_policy_gradient(policy, reward, rows, self._optimizer(policy.parameters()), config.steps, **options)

    def _penalty(self, policy: Policy, rows: Batch) -> float:
        """The l2, a row, under which training from the policy makes each held-out fifth of the rows likeliest."""
        parts = data.folds(rows, self.seed)

        def held_out_loss(l2: float) -> float:
            total = 0.0
            for fit, held_out in parts:
                other, loss = copy.deepcopy(policy), NegativeLogLikelihood(l2 / len(fit.inputs))
                train_nll(other, fit, self._optimizer(other.parameters()), self.config.steps, loss=loss, seed=self.seed)
                with torch.no_grad():
                    total -= float(other.log_prob(*held_out).sum())
            return total

        return min(PENALTIES, key=held_out_loss) / len(rows.inputs)

    def _reward(self, policy: Policy, task: Task) -> nn.Module:
        if self.method == "pg_identity":
            return self._of_precision(torch.ones(()))
        if self.labels:
            one_hot = functional.one_hot(task.train.target, 10).float()
            # A diagonal U would be infinite in the classes that the task does not have.
            start = optimal_precision(marginal_covariance(one_hot), 1.0, "isotropic")
        else:
            other = copy.deepcopy(policy)
            train_nll(other, task.fit, self._optimizer(other.parameters()), self.config.steps, seed=self.seed)
            with torch.no_grad():
                residual = task.held_out.target - cast(GaussianPolicy, other)(task.held_out.inputs)[0]
            start = optimal_precision(residual_covariance(residual), 1.0, "isotropic")
        reward = self._of_precision(start)
        if self.method == "pg_learned":
            outer = torch.optim.Adam(reward.parameters(), lr=self.config.outer_learning_rate)
            trainer = BilevelTrainer(
                copy.deepcopy(policy), reward, inner_data=task.fit, outer_data=task.held_out,
                inner_optimizer=self._optimizer, outer_optimizer=outer, inner_steps=self.config.inner_steps,
                inner_loss=PolicyGradient(), outer_loss=NegativeLogLikelihood(),
                hypergradient=ImplicitCG(DAMPING, 1e-2, 10), seed=self.seed, progress=False,
            )  # fmt: skip
            history = learn(trainer, self.config.outer_steps)
            self.outcome.warnings.extend(imperfect(f"{self.name}, seed {self.seed}", history))
        return reward

    def _of_precision(self, u: Tensor) -> nn.Module:
        return OneHotMahalanobisReward(10, "isotropic", u) if self.labels else MahalanobisReward(1, "isotropic", u)

    def _policy(self) -> Policy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.labels:
                return MLPCategorical(64, 10, hidden=self.config.hidden)
            return MLPGaussian(1, 1, hidden=self.config.hidden)

    def _optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.config.learning_rate, fused=True)

    @torch.no_grad()
    def _score(self, policy: Policy, task: Task) -> float:
        """Accuracy of labels, RMSE of values, on the task's test rows."""
        if self.labels:
            return float((policy(task.test.inputs).argmax(dim=1) == task.test.target).float().mean())
        return float((policy(task.test.inputs)[0] - task.test.target).square().mean().sqrt())

    @torch.no_grad()
    def _divergence(self, before: Policy, after: Policy) -> float:
        inputs = self.first.test.inputs
        if self.labels:
            first, second = (torch.log_softmax(policy(inputs).double(), dim=1) for policy in (before, after))
            return float((first.exp() * (first - second)).sum(dim=1).mean())
        (mean, log_std), (other, other_log_std) = before(inputs), after(inputs)
        ratio = (2.0 * (log_std - other_log_std)).exp()
        moved = ((mean - other) / other_log_std.exp()).square()
        return float((0.5 * (ratio + moved - 1.0) + other_log_std - log_std).sum(dim=1).mean())


def _digits(seed: int) -> tuple[Task, Task]:
    splits = data.split(data.load("digits"), test_fraction=0.2, held_out_fraction=0.25, seed=seed)

    def of(rows: Batch, low: int) -> Batch:
        chosen = ((rows.target >= low) & (rows.target < low + 5)).nonzero()[:, 0]
        return Batch(rows.inputs[chosen].float(), rows.target[chosen])

    first, second = (Task(*(of(part, low) for part in (splits.fit, splits.held_out, splits.test))) for low in (0, 5))
    return first, second


def _regression(seed: int) -> tuple[Task, Task]:
    generator = torch.Generator().manual_seed(seed)

    def of(count: int, low: float) -> Batch:
        x = low + 3.0 * torch.rand(count, 1, generator=generator)
        return Batch(x, torch.sin(2.0 * x) + 0.5 * x + NOISE_STD * torch.randn(count, 1, generator=generator))

    first, second = (Task(of(150, low), of(50, low), of(200, low)) for low in (-3.0, 0.0))
    return first, second


EXPERIMENT = Experiment(
    "forgetting", ForgettingConfig, check, run, needs=lambda config: SKLEARN if "digits" in config.tasks else (),
    reproduced={"forgetting": ({}, {"seeds": 1, "steps": 20, "outer_steps": 2, "inner_steps": 5})},
)  # fmt: skip
