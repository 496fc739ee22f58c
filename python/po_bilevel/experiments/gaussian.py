"""The paper's Gaussian experiments (arXiv 2510.07624, sections 4 and 5): where the outer optimum is known.

Figure 1: the moments and the likelihood that training ends with, for likelihood and for policy gradient under a reward
that is and one that is not U*, over many random targets. Figure 2: the densities learned for one target. Figure 3: the
path of a reward learned by bilevel optimisation from u = 1 to u* = λ n / (2 tr Σ).

Data of figure 3: y = x + 6 + ε, n-dimensional, at `inputs` distinct x, each observed `observations` times. The outer
loss reads a second draw of the same size, at x of its own: a mean network that memorises its inputs would otherwise
pass its training residuals, which are too small, for the noise, and u for too large. What it memorises all the same
makes the mean wrong on the second draw, and u too small, by the square of that error; weight decay keeps it near 1%.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import hypergradients as h
from ..errors import UsageError
from ..heuristics import marginal_covariance, optimal_precision, residual_covariance
from ..losses import Batch, NegativeLogLikelihood, PolicyGradient
from ..optimizers import lbfgs
from ..policies import FullGaussianPolicy, LinearFullGaussian, MLPFullGaussian, MLPGaussian
from ..rewards import MahalanobisReward, PrecisionKind, diagonal
from ..trainer import BilevelTrainer
from ..training import train_nll, train_policy_gradient
from . import plots, runs
from .results import Row
from .runs import Clock, Experiment, Options, Outcome, imperfect, learn, named, shown, threads

Method = Literal["nll", "pg_identity", "pg_other", "pg_optimal"]
METHODS: tuple[Method, ...] = get_args(Method)
Hypergradients = Literal[
    "cg", "normal-cg", "neumann", "fixed-point", "dense", "identity", "single-loop", "unrolled", "recompute",
    "truncated", "finite-difference", "penalty", "bome", "evolution-strategies",
]  # fmt: skip

# Gaussian noise in y of figure 3, and what is added to x.
NOISE_STD, OFFSET = 1.25, 6.0
# Weight decay of the policy, which in the linear solve is damping: the Hessian of (decay/2)‖θ‖² is decay times I.
DECAY = 1e-2
# Added to it, in units of λ: an unfinished network's Hessian, and that of five samples, has negative curvature of this
# order. Along log σ, where the reward acts, the curvature is 2λ: the damping shortens the hypergradient by a fifth.
DAMPING = 0.5
# An error of figure 3 that is said.
FAR = 0.03
# Where a deterministic problem of figures 1 and 2 counts as solved: the Euclidean norm of the gradient.
SOLVED = 1e-6


@dataclasses.dataclass(frozen=True)
class GaussianConfig(Options):
    """Reproduce the Gaussian experiments whose outer optimum is known in closed form."""

    figure: Literal[1, 2, 3] = 3
    """1: moments and likelihood over random targets; 2: learned densities; 3: the path of a learned reward."""
    targets: int = 150
    """Figure 1: how many random targets."""
    dim: int = 2
    """n, the dimension of y."""
    estimator: Literal["analytic", "reparam", "dice"] = "analytic"
    """Expectation over answers in closed form, along the path of samples, or by the score function."""
    num_samples: int | None = None
    """G, samples a row; by default 5 for --estimator reparam and dice."""
    hypergradient: Hypergradients = "cg"
    """Figure 3: how the derivative of the inner solution is come by, see docs/hypergradients.md."""
    reward: PrecisionKind = "isotropic"
    """Figure 3: form of the learned U; full comes with a policy of full covariance."""
    correlation: float = 0.0
    """Figure 3: ρ in the covariance of the noise, 1.25² ρ^|i-j|."""
    entropy_coef: float = 1.0
    """λ, in units of reward a nat."""
    inputs: int = 100
    """Figure 3: distinct x."""
    observations: int = 10
    """Figure 3: observations of y at each x. Figures 1 and 2: a hundred times that, of one target."""
    hidden: tuple[int, ...] = (64, 64)
    """Figure 3: widths of the mean network's hidden layers."""
    outer_steps: int = 100
    """Figure 3: updates of the reward."""
    inner_steps: int = 50
    """Figure 3: optimiser steps between updates of the reward."""
    learning_rate: float = 5e-3
    """Figure 3: of adam for the policy at first; falls to a tenth between two updates of the reward."""
    outer_learning_rate: float = 0.07
    """Figure 3: of adam for the reward's parameters at first; falls linearly to a tenth."""
    device: str = "cpu"
    """Figure 3: where everything is computed, such as cuda or cuda:1. No inner step waits for it."""


def check(config: GaussianConfig) -> None:
    """See `Experiment`."""
    runs.check_options(config, free=("correlation",))
    if not -1 < config.correlation < 1:
        raise UsageError(f"--correlation: expected a number between -1 and 1, got {config.correlation}")
    if config.estimator == "analytic" and config.num_samples is not None:
        raise UsageError(f"--num-samples: expected none with --estimator analytic, got {config.num_samples}")
    if config.estimator == "dice" and config.num_samples == 1:
        raise UsageError("--num-samples: expected at least 2 with --estimator dice, got 1")
    runs.check_device(config.device)
    if config.figure == 2 and config.dim != 2:
        raise UsageError(f"--dim: expected 2 with --figure 2, which draws densities in a plane, got {config.dim}")


def run(config: GaussianConfig) -> Outcome:
    """Runs the experiment of one figure.

    Returns:
        the rows, and the curves that the figure draws.
    """
    check(config)
    with threads(config.threads), torch.random.fork_rng(devices=[]):
        return {1: _moments, 2: _densities, 3: _paths}[config.figure](config)


def _loss(config: GaussianConfig) -> PolicyGradient:
    group = None if config.estimator == "analytic" else config.num_samples or 5
    return PolicyGradient(entropy_coef=config.entropy_coef, estimator=config.estimator, num_samples=group)


class Target(NamedTuple):
    """A random Gaussian and data from it.

    Attributes:
        mean: (D,).
        covariance: (D, D).
        data: inputs (1, 1), which are zero, and target (R, 1, D).
    """

    mean: Tensor
    covariance: Tensor
    data: Batch


def _target(config: GaussianConfig, seed: int) -> Target:
    """Mean of standard normal entries times two; eigenvalues of the covariance from 0.2 to 2, in random directions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    spectrum = 0.2 * 10.0 ** torch.rand(config.dim, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(normal(config.dim, config.dim)).Q
    covariance = basis @ torch.diag(spectrum) @ basis.mT
    mean = 2.0 * normal(config.dim)
    count = 100 * config.observations
    samples = mean + normal(count, config.dim) @ torch.linalg.cholesky(covariance).mT
    inputs = torch.zeros(1, 1, dtype=torch.float64)
    return Target(mean, covariance, Batch(inputs, samples[:, None]))


def _fitted(config: GaussianConfig, target: Target, method: Method, seed: int) -> FullGaussianPolicy:
    """A Gaussian without inputs, trained by one method."""
    policy = LinearFullGaussian(1, config.dim).double()
    with torch.no_grad():
        for parameter in policy.mean_network.parameters():
            parameter.zero_()
    noisy = config.estimator != "analytic"
    if method == "nll" or not noisy:
        optimizer: Optimizer = lbfgs(policy.parameters(), SOLVED)
        options: dict[str, Any] = {"steps": 200, "tolerance": SOLVED}
    else:
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
        options = {"steps": 600, "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 600)}
    if method == "nll":
        train_nll(policy, target.data, optimizer, seed=seed, **options)
        return policy
    reward = MahalanobisReward(config.dim, "full", _precision(config, target, method, seed)).double()
    train_policy_gradient(policy, reward, target.data, optimizer, loss=_loss(config), seed=seed, **options)
    return policy


def _precision(config: GaussianConfig, target: Target, method: Method, seed: int) -> Tensor:
    """U: I, U* of the data, or that of another random target."""
    if method == "pg_identity":
        return torch.eye(config.dim, dtype=torch.float64)
    if method == "pg_other":
        return optimal_precision(_target(config, seed + 1_000_003).covariance, config.entropy_coef)
    return optimal_precision(marginal_covariance(target.data.target.flatten(0, 1)), config.entropy_coef)


def _measured(config: GaussianConfig, target: Target, method: Method, seed: int) -> tuple[FullGaussianPolicy, Row]:
    """A policy trained by one method, and its row of the results."""
    with Clock() as clock:
        policy = _fitted(config, target, method, seed)
    row = {"dataset": "gaussian", "method": method, "seed": seed}
    return policy, row | _errors(policy, target) | {"seconds": clock.seconds}


def _moments(config: GaussianConfig) -> Outcome:
    rows: list[Row] = []
    for seed in shown(config, range(config.targets), "targets"):
        target = _target(config, seed)
        rows += [_measured(config, target, method, seed)[1] for method in METHODS]
    return Outcome(rows, {}, [])


def _errors(policy: FullGaussianPolicy, target: Target) -> dict[str, float]:
    """Errors of the moments relative to the target's, and the likelihood of its density."""
    with torch.no_grad():
        mean, factor = policy(target.data.inputs)
        covariance = factor @ factor.mT
        difference = mean[0] - target.mean
        # Closed form of E[-log p] under the target: no sampling error of a test set.
        solved = torch.linalg.solve(covariance, target.covariance + difference[:, None] * difference)
        nll = 0.5 * (solved.trace() + torch.logdet(covariance) + len(difference) * math.log(2.0 * math.pi))
        return {
            "mean_error": float(difference.norm() / target.covariance.trace().sqrt()),
            "covariance_error": float((covariance - target.covariance).norm() / target.covariance.norm()),
            "nll": float(nll),
        }


def _densities(config: GaussianConfig) -> Outcome:
    target = _target(config, 0)
    rows: list[Row] = []
    curves: dict[str, Any] = {
        "samples": target.data.target[:300, 0].tolist(),
        "densities": {"target": {"mean": target.mean.tolist(), "covariance": target.covariance.tolist()}},
    }
    for method in METHODS:
        policy, row = _measured(config, target, method, 0)
        rows.append(row)
        with torch.no_grad():
            mean, factor = policy(target.data.inputs)
        curves["densities"][method] = {"mean": mean[0].tolist(), "covariance": (factor @ factor.mT).tolist()}
    return Outcome(rows, curves, [])


def noise_covariance(config: GaussianConfig) -> Tensor:
    """Σ of figure 3, (n, n) float64: 1.25² ρ^|i-j|."""
    index = torch.arange(config.dim)
    return NOISE_STD**2 * config.correlation ** (index[:, None] - index).abs().double()


def draw(config: GaussianConfig, seed: int) -> tuple[Batch, Batch]:
    """The data of figure 3 for the inner and for the outer loss, float32: the same sizes, nothing in common."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.linalg.cholesky(noise_covariance(config)).float()

    def part() -> Batch:
        x = torch.randn(config.inputs, config.dim, generator=generator)
        noise = torch.randn(config.observations, config.inputs, config.dim, generator=generator) @ factor.mT
        return Batch(x.to(config.device), (x + OFFSET + noise).to(config.device))

    return part(), part()


def _paths(config: GaussianConfig) -> Outcome:
    outcome = Outcome([], {"paths": [], "optimum": _optimum(config, noise_covariance(config)).tolist()}, [])
    for seed in shown(config, range(config.seeds), "seeds"):
        with named(f"seed {seed}"):
            _learn(config, seed, outcome)
    return outcome


def trainer(config: GaussianConfig, seed: int) -> BilevelTrainer:
    """The bilevel problem of figure 3 for a seed, from u = 1 and an untrained policy."""
    inner_data, outer_data = draw(config, seed)
    torch.manual_seed(seed)
    make = MLPFullGaussian if config.reward == "full" else MLPGaussian
    policy = make(config.dim, config.dim, hidden=config.hidden).to(config.device)
    reward = MahalanobisReward(config.dim, config.reward).to(config.device)
    # The first averages of a gradient are of an untrained policy and of no use for long.
    outer = torch.optim.Adam(reward.parameters(), lr=config.outer_learning_rate, betas=(0.5, 0.9))
    return BilevelTrainer(
        policy,
        reward,
        inner_data=inner_data,
        outer_data=outer_data,
        inner_optimizer=lambda parameters: torch.optim.Adam(
            parameters, lr=config.learning_rate, weight_decay=DECAY, fused=True
        ),
        # Samples keep the policy moving about its optimum by an amount that goes with the learning rate, which the
        # outer loss, not linear in the policy, would make a bias of u.
        inner_scheduler=lambda inner: torch.optim.lr_scheduler.LinearLR(inner, 1.0, 0.1, config.inner_steps),
        outer_optimizer=outer,
        outer_scheduler=torch.optim.lr_scheduler.LinearLR(outer, 1.0, 0.1, config.outer_steps),
        # The steps of the method itself, where it moves the policy.
        inner_steps=0 if config.hypergradient == "bome" else config.inner_steps,
        inner_loss=_loss(config),
        outer_loss=NegativeLogLikelihood(),
        # That of u = 1 and a trained policy; while the policy is not yet there it is a hundred times that.
        max_outer_grad_norm=1.0,
        hypergradient=_method(config),
        seed=seed,
        progress=config.progress,
        description=f"seed {seed}",
    )


def _learn(config: GaussianConfig, seed: int, outcome: Outcome) -> None:
    learner = trainer(config, seed)
    reward = cast(MahalanobisReward, learner.reward)
    outer_data = draw(config, seed)[1]
    with Clock() as clock:
        history = learn(learner, config.outer_steps)
    with torch.no_grad():
        residual = outer_data.target - learner.policy(outer_data.inputs)[0]
        nll = float(learner.policy.log_prob(*outer_data).mean().neg())
    learned = reward.precision().detach().double().cpu()
    # What the outer loss can know: the covariance of its own rows around the policy's mean.
    best = _optimum(config, residual_covariance(residual.flatten(0, 1).double().cpu()))
    true = _optimum(config, noise_covariance(config))
    outcome.rows.append({
        "dataset": "y = x + 6 + ε", "method": f"pg_learned, {config.estimator}, {config.hypergradient}", "seed": seed,
        "u": float(diagonal(learned).mean()), "u_optimal": float(diagonal(best).mean()),
        "error": float((learned - best).norm() / best.norm()),
        "error_true": float((learned - true).norm() / true.norm()), "nll": nll, "seconds": clock.seconds,
    })  # fmt: skip
    path = [diagonal(step.reward).tolist() for step in history if step.reward is not None]
    outcome.curves["paths"].append({
        "u": [*path, diagonal(learned).tolist()],
        "inner_loss": [step.inner_loss for step in history], "outer_loss": [step.outer_loss for step in history],
        "products": [step.num_products for step in history],
    })  # fmt: skip
    error = outcome.rows[-1]["error"]
    if isinstance(error, float) and error > FAR:
        outcome.warnings.append(
            f"seed {seed}: u ended {100 * error:.0f}% from the optimum of its outer data; more --outer-steps or "
            "another --outer-learning-rate may get it there"
        )
    # While the policy is being found the Hessian is indefinite and the damping is there for that.
    outcome.warnings.extend(imperfect(f"seed {seed}", history[len(history) // 2 :]))


def _summary(config: GaussianConfig, outcome: Outcome) -> str:
    """The path of u over outer steps, mean over seeds and dimensions, as text; empty if none was learned."""
    if "paths" not in outcome.curves:
        return ""
    paths = torch.tensor([path["u"] for path in outcome.curves["paths"]], dtype=torch.float64).mean(dim=(0, 2))
    optimum = torch.tensor(outcome.curves["optimum"], dtype=torch.float64)
    shown = sorted({*range(0, len(paths), max(1, (len(paths) - 1) // 10)), len(paths) - 1})
    return (
        f"u over outer steps, to u* = {float(diagonal(optimum).mean()):.4g}: "
        + ", ".join(f"{step}: {float(paths[step]):.4f}" for step in shown)
    )  # fmt: skip


def _method(config: GaussianConfig) -> h.HypergradientMethod:
    damping = DECAY + DAMPING * config.entropy_coef
    # One over the curvature along log σ, which is 2λ. That along the weights of the untrained network is a hundred
    # times 2u, of u = 1 at first.
    scale = 0.5 / config.entropy_coef
    small = 0.02 / max(1.0, config.entropy_coef)
    form = {"isotropic": 1, "diagonal": config.dim, "full": config.dim**2}[config.reward]
    methods: dict[str, h.HypergradientMethod] = {
        "cg": h.ImplicitCG(damping, 1e-2, 20),
        "normal-cg": h.NormalCG(damping, 1e-2, 10),
        "neumann": h.Neumann(20, None, damping, 0.5),
        "fixed-point": h.FixedPoint(None, damping, 1e-1, 30),
        "dense": h.Dense(damping, max_size=10_000),
        "identity": h.Identity(scale),
        "single-loop": h.SingleLoop(small, damping),
        "unrolled": h.Unrolled(10, small),
        "recompute": h.Recompute(10, small),
        "truncated": h.Truncated(10, 5, small),
        "finite-difference": h.FiniteDifference(scale),
        "penalty": h.Penalty(20.0, 20, small),
        "bome": h.BOME(config.inner_steps, small, 2.5 * small),
        "evolution-strategies": h.EvolutionStrategies(form, 0.1, 20, 0.5 * small, seed=0),
    }
    return methods[config.hypergradient]


def _optimum(config: GaussianConfig, covariance: Tensor) -> Tensor:
    return optimal_precision(covariance, config.entropy_coef, config.reward)


EXPERIMENT = Experiment(
    "gaussian", GaussianConfig, check, run, "gaussian_figure{figure}",
    figure=lambda config, outcome: plots.figure_of_gaussian(outcome, config.figure), summary=_summary, baselines=(),
    reproduced={
        "gaussian1": ({"figure": 1}, {"targets": 5}),
        "gaussian2": ({"figure": 2}, {}),
        "gaussian3": ({"figure": 3}, {"seeds": 1, "outer_steps": 3, "inner_steps": 10}),
    },
)  # fmt: skip
