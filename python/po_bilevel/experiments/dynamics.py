"""Models of dynamics (arXiv 2510.07624, section 6.2): regression, likelihood, and policy gradient under a reward.

A model predicts s' - s from s and a as a Gaussian. Inputs and outputs are standardised by the rows that it is trained
on, and dimensions that do not change are dropped, which is said. All methods train the same network from the same
weights with the same optimiser for as many steps; `pg_*` start with the spread that U asks for. U is known before that:
from the covariance of s' - s ("marginal"), from that of the residuals of a regression on rows that it has not seen
("residual"), or learned on those rows around the regression's mean.

The split is by episodes, so that no row has its neighbour on the other side.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from ..errors import UsageError
from ..heuristics import marginal_covariance, optimal_precision, residual_covariance
from ..hypergradients import ImplicitCG
from ..losses import Batch, PolicyGradient
from ..optimizers import lbfgs
from ..policies import FullGaussianPolicy, GaussianPolicy, MLPFullGaussian, MLPGaussian, Policy
from ..rewards import MahalanobisReward, PrecisionKind, as_matrix, diagonal
from ..streams import BatchStream
from ..trainer import BilevelTrainer
from ..training import InnerLoss, train, train_policy_gradient
from . import planner, runs, transitions
from .runs import Clock, Experiment, Once, OptionsInParts, Outcome, each_run, imperfect, learn, named, threads
from .transitions import Behaviour, Transitions

Method = Literal[
    "mse", "nll", "nll_state", "beta_nll", "pg_identity", "pg_isotropic_marginal", "pg_isotropic_residual",
    "pg_diagonal_marginal", "pg_diagonal_residual", "pg_full_marginal", "pg_full_residual", "pg_learned_isotropic",
    "pg_learned_diagonal", "pg_learned_full",
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)

# Steps ahead of the open-loop error, and the most places to start from.
HORIZONS = (1, 5, 20, 50)
STARTS = 200
# Of the likelihood that weighs rows by σ^2β (Seitzer et al. 2022, arXiv 2203.09168).
BETA = 0.5
# Central intervals whose share of targets is counted, and their half-width in standard deviations.
INTERVALS = {"coverage_50": 0.6745, "coverage_90": 1.6449}
# A dimension that varies less than this, relative to its size, is constant.
CONSTANT = 1e-8
# Added to the covariance, in units of the targets' variance.
RIDGE = 1e-6
# Where the spread counts as trained while U is learned: the Euclidean norm of the gradient.
SOLVED = 1e-4
# Where a learned U counts as found: the norm of the hypergradient, in nats a row.
LEARNED = 0.05


@dataclasses.dataclass(frozen=True)
class DynamicsConfig(OptionsInParts):
    """Learn models of an environment's dynamics, and measure what they are good for."""

    env: str = "HalfCheetah-v5"
    """Environment of gymnasium with vectors of observations and actions."""
    minari: str | None = None
    """Name of a Minari data set to read instead, from this machine or its remote."""
    behaviour: Behaviour = "random"
    """Uniform random actions, or noise around a controller."""
    controller: Path | None = None
    """File of a linear controller, .npz with weight and bias; by default one is trained."""
    noise: float = 0.3
    """Standard deviation around the controller, in units of half the range of an action."""
    transitions: int = 10000
    """How many are collected, or read."""
    horizon: int = 200
    """Steps after which an episode is ended."""
    methods: tuple[Method, ...] = METHODS
    """Methods to compare."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh network's hidden layers."""
    steps: int = 5000
    """Steps of adam of every method's final training."""
    learning_rate: float = 1e-2
    """Of adam for the policy at first; falls linearly to a hundredth."""
    weight_decay: float = 1e-4
    """Of adam for the policy."""
    batch_size: int = 256
    """Rows of a training batch."""
    outer_steps: int = 40
    """Updates of a learned reward."""
    inner_steps: int = 25
    """The most iterations of L-BFGS, on the spread, between updates of a learned reward."""
    outer_learning_rate: float = 0.2
    """Of adam for the reward's parameters at first; falls linearly to a tenth."""
    entropy_coef: float = 1.0
    """λ, in units of reward a nat."""
    test_fraction: float = 0.2
    """Of all episodes."""
    held_out_fraction: float = 0.1
    """Of the other episodes: read for the residuals and by the outer loss, while the reward is found."""
    plan_episodes: int = 0
    """Episodes of model-predictive control with each model; for Pendulum-v1, InvertedPendulum-v5 and Reacher-v5."""
    plan_steps: int = 200
    """The most steps of such an episode."""


def check(config: DynamicsConfig) -> None:
    """See `Experiment`."""
    fractions = ("test_fraction", "held_out_fraction")
    runs.check_options(config, fractions=fractions, zero=("noise", "weight_decay", "plan_episodes", "first_seed"))
    if config.plan_episodes > 0 and (config.minari is not None or config.env not in planner.REWARDS):
        raise UsageError(
            f"--plan-episodes: expected 0, or --env one of {', '.join(planner.REWARDS)}, "
            f"got {config.plan_episodes} with {config.minari or config.env}"
        )


def run(config: DynamicsConfig) -> Outcome:
    """Runs every method on every seed.

    Returns:
        rows with "rmse" (of one step, in standard deviations of s' - s), "nll_per_dim", "coverage_50", "coverage_90",
        "rmse_k" (k steps open loop, in standard deviations of s), "u", "seconds" and, if asked for, "return"; curves
        with "per_dimension" {method: [{"rmse", "nll"}, ...]}, a list over seeds.
    """
    check(config)
    outcome = Outcome([], {"per_dimension": {}}, [])
    recorded = None if config.minari is None else transitions.load_minari(config.minari, config.transitions)
    controller = None if config.controller is None else transitions.load_controller(config.controller)
    with threads(config.threads):
        problem: _Problem | None = None
        for seed, method in each_run(config, config.methods):
            if problem is None or problem.seed != seed:
                data = recorded or transitions.collect(
                    config.env, config.transitions, horizon=config.horizon, behaviour=config.behaviour,
                    noise=config.noise, seed=seed, controller=controller,
                )  # fmt: skip
                problem = _Problem(config, data, seed)
                if seed == config.first_seed and problem.dropped:
                    outcome.warnings.append(f"{data.name}: {problem.dropped}")
            with named(data.name, f"seed {seed}", method):
                row, per_dimension = problem.evaluate(method, outcome)
            outcome.rows.append(row)
            outcome.curves["per_dimension"].setdefault(method, []).append(per_dimension)
    return outcome


class _Scale(NamedTuple):
    """Which of the columns vary, and their mean and standard deviation; float32."""

    kept: Tensor
    mean: Tensor
    std: Tensor

    def apply(self, values: Tensor) -> Tensor:
        return (values[..., self.kept] - self.mean) / self.std


class _Problem:
    """The data of a seed, split and standardised, and the methods on it."""

    def __init__(self, config: DynamicsConfig, data: Transitions, seed: int) -> None:
        self.config, self.data, self.seed = config, data, seed
        inputs = np.concatenate([data.observations, data.actions], axis=1)
        change = data.following - data.observations
        fit, held_out, test = _split(data.episodes, config.test_fraction, config.held_out_fraction, seed)
        train = fit | held_out
        self.input_scale, self.output_scale = _scale(inputs[train]), _scale(change[train])
        self.observation_std = torch.from_numpy(data.observations[train].std(axis=0)).float()
        self.dropped = _dropped(self.input_scale.kept, self.output_scale.kept, data.observations.shape[1])
        self.constant_change = torch.from_numpy(change[train].mean(axis=0)).float()
        x = self.input_scale.apply(torch.from_numpy(inputs).float())
        y = self.output_scale.apply(torch.from_numpy(change).float())
        self.train, self.fit, self.held_out, self.test = (
            Batch(x[mask], y[mask]) for mask in map(torch.from_numpy, (train, fit, held_out, test))
        )
        self.test_rows = np.flatnonzero(test)
        self.dim = y.shape[1]
        # Of the rows of `fit`, for what is computed from its residuals.
        self._regression = Once(lambda: self._trained("mse", self.fit, None))

    def evaluate(self, method: Method, outcome: Outcome) -> tuple[dict, dict[str, list[float]]]:
        """Trains a method; its row of the results, and RMSE and NLL of each dimension."""
        with Clock() as clock:
            precision = self._precision(method, outcome, clock)
            policy = self._trained(method, self.train, precision)
        with torch.no_grad():
            mean, variance = self._moments(policy, method, self.test.inputs)
            error = self.test.target - mean
            # Of the marginals, so that a full covariance is compared with a diagonal one on the same footing.
            nll = 0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi)).mean(dim=0)
            rmse = error.square().mean(dim=0).sqrt()
            found: dict[str, float | None] = {
                "rmse": float(error.square().mean().sqrt()),
                "nll_per_dim": float(nll.mean()),
            }
            for name, width in INTERVALS.items():
                found[name] = float((error.abs() <= width * variance.sqrt()).float().mean())
            found |= self._open_loop(policy)
        u = None if precision is None else float(diagonal(precision).mean())
        row = {"dataset": self.data.name, "method": method, "seed": self.seed} | found
        row |= {"u": u, "seconds": clock.seconds}
        if self.config.plan_episodes:
            returns = [
                planner.control(lambda s, a: self._step(policy, s, a), self.config.env, seed=1000 * self.seed + episode,
                                steps=self.config.plan_steps)
                for episode in range(self.config.plan_episodes)
            ]  # fmt: skip
            row["return"] = float(np.mean(returns))
        return row, {"rmse": rmse.tolist(), "nll": nll.tolist()}

    def _precision(self, method: Method, outcome: Outcome, clock: Clock) -> Tensor | None:
        """U of the method, detached; None where there is none."""
        if not method.startswith("pg_"):
            return None
        if method == "pg_identity":
            return torch.ones(())
        _, first, second = method.split("_")
        if first == "learned":
            return self._learned(cast(PrecisionKind, second), outcome, clock)
        if second == "marginal":
            covariance = marginal_covariance(self.train.target)
        else:
            # Of rows that the regression has not seen.
            covariance = residual_covariance(self.held_out.target - self._mean(self.held_out, clock))
        return optimal_precision(covariance, self.config.entropy_coef, cast(PrecisionKind, first), ridge=RIDGE)

    @torch.no_grad()
    def _mean(self, rows: Batch, clock: Clock) -> Tensor:
        """What the regression says of rows."""
        return self._regression(clock)(rows.inputs)[0]

    def _learned(self, kind: PrecisionKind, outcome: Outcome, clock: Clock) -> Tensor:
        """U that makes the held-out rows likeliest around the regression's mean, from U of its residuals in training.

        The mean is held: at a minimum it does not depend on U. A network that is stopped before one would fit better
        under any larger U, which the implicit function theorem takes for a reason to raise it without end.
        """
        config = self.config
        fit, held_out = (Batch(self._mean(rows, clock), rows.target) for rows in (self.fit, self.held_out))
        covariance = residual_covariance(fit.target - fit.inputs)
        # In units of the residuals U starts at λ/2 in all dimensions, whose ends are as far for one rate of Adam's.
        variance = covariance.diagonal() + RIDGE
        unit = (variance.mean().expand(self.dim) if kind == "isotropic" else variance).sqrt()
        fit, held_out = (Batch(rows.inputs / unit, rows.target / unit) for rows in (fit, held_out))
        start = optimal_precision(covariance / torch.outer(unit, unit), config.entropy_coef, kind, ridge=RIDGE)
        reward = MahalanobisReward(self.dim, kind, start)
        # Their inputs are the regression's means already.
        family = FullGaussianPolicy if kind == "full" else partial(GaussianPolicy, log_std_network=None)
        policy = family(mean_network=torch.nn.Identity(), dim=self.dim)
        _spread_under(policy, start, config.entropy_coef)
        outer = torch.optim.Adam(reward.parameters(), lr=config.outer_learning_rate, betas=(0.5, 0.9))
        trainer = BilevelTrainer(
            policy, reward, inner_data=fit, outer_data=held_out,
            inner_optimizer=lambda parameters: lbfgs(parameters, SOLVED), outer_optimizer=outer,
            outer_scheduler=LinearLR(outer, 1.0, 0.1, config.outer_steps), inner_steps=config.inner_steps,
            inner_loss=cast(InnerLoss, PolicyGradient(config.entropy_coef)), inner_tolerance=SOLVED,
            keep_inner_state=False, hypergradient=ImplicitCG(0.0, 1e-3, 50), seed=self.seed, progress=False,
        )  # fmt: skip
        history = learn(trainer, config.outer_steps)
        where = f"{self.data.name}, seed {self.seed}, pg_learned_{kind}"
        outcome.warnings.extend(imperfect(where, history))
        if history[-1].gradient_norm > LEARNED:
            outcome.warnings.append(
                f"{where}: the reward is not at its optimum, where its gradient has norm "
                f"{history[-1].gradient_norm:.2g}; raise --outer-steps or --outer-learning-rate"
            )
        u = reward.precision().detach()
        return u / (unit[0].square() if kind == "isotropic" else torch.outer(unit, unit) if kind == "full" else unit**2)

    def _trained(self, method: Method, rows: Batch, precision: Tensor | None) -> Policy:
        """A policy trained by the method, under the precision if it has one."""
        config, policy = self.config, self._policy(method)
        optimizer = torch.optim.Adam(
            policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        scheduler = LinearLR(optimizer, 1.0, 0.01, config.steps)
        if precision is not None:
            _spread_under(policy, precision, config.entropy_coef)
            reward = MahalanobisReward(self.dim, _kind(precision), precision)
            train_policy_gradient(
                policy, reward, rows, optimizer, config.steps, loss=PolicyGradient(config.entropy_coef),
                batch_size=config.batch_size, seed=self.seed, scheduler=scheduler,
            )  # fmt: skip
        else:
            loss = {"mse": _squared_error, "beta_nll": _beta_nll}.get(method, _negative_log_likelihood)
            stream = BatchStream(rows, config.batch_size, self.seed)
            train(policy, loss, stream, optimizer, config.steps, scheduler=scheduler)
        return policy

    def _policy(self, method: Method) -> Policy:
        """The initial policy: the same mean for every method of a seed."""
        features = self.train.inputs.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if "full" in method:
                return MLPFullGaussian(features, self.dim, hidden=self.config.hidden)
            return MLPGaussian(features, self.dim, hidden=self.config.hidden,
                               state_dependent_std=method in ("nll_state", "beta_nll"))  # fmt: skip

    def _moments(self, policy: Policy, method: Method, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of standardised changes, (N, D)."""
        if method == "mse":
            # A regression has no spread of its own: it gets that of its residuals where it was trained.
            residual = self.train.target - policy(self.train.inputs)[0]
            return policy(inputs)[0], residual.square().mean(dim=0).expand(len(inputs), -1)
        if isinstance(policy, FullGaussianPolicy):
            mean, factor = policy(inputs)
            return mean, factor.square().sum(dim=1).expand_as(mean)
        mean, log_std = policy(inputs)
        return mean, (2.0 * log_std).exp().expand_as(mean)

    def _step(self, policy: Policy, observation: Tensor, action: Tensor) -> Tensor:
        """s (N, O), a (N, A) -> the mean of s', (N, O)."""
        inputs = self.input_scale.apply(torch.cat([observation, action], dim=1))
        change = self.constant_change.repeat(len(observation), 1)
        change[:, self.output_scale.kept] = policy(inputs)[0] * self.output_scale.std + self.output_scale.mean
        return observation + change

    def _open_loop(self, policy: Policy) -> dict[str, float | None]:
        """RMSE after k steps along the recorded actions, in standard deviations of s, for each k of HORIZONS."""
        rows, episodes = self.test_rows, self.data.episodes
        found: dict[str, float | None] = {}
        varying = self.observation_std > CONSTANT
        for horizon in HORIZONS:
            starts = rows[(rows + horizon <= len(episodes)) & np.isin(rows + horizon - 1, rows)]
            starts = starts[episodes[starts] == episodes[starts + horizon - 1]]
            if len(starts) == 0:
                found[f"rmse_{horizon}"] = None
                continue
            starts = starts[np.linspace(0, len(starts) - 1, min(STARTS, len(starts))).astype(int)]
            state = torch.from_numpy(self.data.observations[starts]).float()
            for ahead in range(horizon):
                state = self._step(policy, state, torch.from_numpy(self.data.actions[starts + ahead]).float())
            truth = torch.from_numpy(self.data.following[starts + horizon - 1]).float()
            error = ((state - truth) / self.observation_std)[:, varying]
            # What is further off than a hundred standard deviations is lost, by whatever factor.
            error = error.nan_to_num(nan=100.0).clamp(-100.0, 100.0)
            found[f"rmse_{horizon}"] = float(error.square().mean().sqrt())
        return found


def _negative_log_likelihood(policy: Policy, batch: Batch, seed: int) -> Tensor:
    return -policy.log_prob(*batch).mean()


def _squared_error(policy: Policy, batch: Batch, seed: int) -> Tensor:
    return (cast(GaussianPolicy, policy)(batch.inputs)[0] - batch.target).square().sum(dim=1).mean()


def _beta_nll(policy: Policy, batch: Batch, seed: int) -> Tensor:
    """Σ_j stop(σ_j^2β) (-log p_j), the mean over rows."""
    mean, log_std = cast(GaussianPolicy, policy)(batch.inputs)
    nll = 0.5 * ((batch.target - mean) / log_std.exp()).square() + log_std
    return ((2.0 * BETA * log_std).exp().detach() * nll).sum(dim=1).mean()


@torch.no_grad()
def _spread_under(policy: Policy, precision: Tensor, entropy_coef: float) -> None:
    """Gives the policy the spread that is optimal under U, Σ = (λ/2) U⁻¹.

    Known before training, and far for adam: the gradient by log σ is of order U σ² at first, and its average with it.
    """
    if isinstance(policy, FullGaussianPolicy):
        matrix = as_matrix(precision, len(policy.log_diagonal))
        factor = torch.linalg.cholesky(0.5 * entropy_coef * torch.linalg.inv(matrix))
        policy.log_diagonal.copy_(factor.diagonal().log())
        policy.below_diagonal.copy_(factor.tril(-1))
    else:
        log_std = cast(GaussianPolicy, policy).log_std
        log_std.copy_(0.5 * (0.5 * entropy_coef / precision).log().expand_as(log_std))


def _kind(precision: Tensor) -> PrecisionKind:
    return ("isotropic", "diagonal", "full")[precision.ndim]


def _scale(values: np.ndarray) -> _Scale:
    std = values.std(axis=0)
    kept = std > CONSTANT * (1.0 + np.abs(values.mean(axis=0)))
    if not kept.any():
        raise UsageError("--env: expected transitions in which something changes, got none")
    return _Scale(
        torch.from_numpy(np.flatnonzero(kept)), torch.from_numpy(values.mean(axis=0)[kept]).float(),
        torch.from_numpy(std[kept]).float(),
    )  # fmt: skip


def _dropped(inputs: Tensor, outputs: Tensor, observations: int) -> str:
    """What of the inputs and outputs is left out, in words; empty if nothing is."""
    sizes = {"s' - s": (outputs, observations), "s": (inputs[inputs < observations], observations)}
    parts = []
    for name, (kept, size) in sizes.items():
        constant = sorted(set(range(size)) - set(kept.tolist()))
        if constant:
            parts.append(f"dimensions {', '.join(map(str, constant))} of {name} do not change and were dropped")
    return "; ".join(parts)


def _split(
    episodes: np.ndarray, test_fraction: float, held_out_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows are of the fitted, the held-out and the test episodes, (N,) bool each."""
    names = np.random.default_rng(seed).permutation(np.unique(episodes))
    if len(names) < 3:
        raise UsageError(f"--transitions: expected at least three episodes, one for each part, got {len(names)}")
    tested = min(max(1, round(test_fraction * len(names))), len(names) - 2)
    held = min(max(1, round(held_out_fraction * (len(names) - tested))), len(names) - tested - 1)
    parts = names[tested + held :], names[tested : tested + held], names[:tested]
    fit, held_out, test = (np.isin(episodes, part) for part in parts)
    return fit, held_out, test


_QUICK = {"seeds": 1, "transitions": 600, "steps": 50, "outer_steps": 2}

EXPERIMENT = Experiment(
    "dynamics", DynamicsConfig, check, run,
    needs=lambda config: (("minari" if config.minari else "gymnasium", "mbrl"),),
    reproduced={
        "dynamics": ({}, _QUICK | {"horizon": 60, "inner_steps": 5}),
        "planning": (
            {
                "env": "Pendulum-v1", "transitions": 2000, "steps": 2000, "seeds": 3, "plan_episodes": 2,
                "methods": ("mse", "nll", "pg_diagonal_residual", "pg_learned_diagonal"),
            },
            _QUICK | {"plan_episodes": 1, "plan_steps": 3},
        ),
    },
)  # fmt: skip
