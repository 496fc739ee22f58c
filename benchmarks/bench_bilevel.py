"""Hypergradients and the Figure 3 run of `po-bilevel gaussian` against what a user would write.

`make bench` runs these; each checks its answer before it is timed. The comparisons with torchopt and with JAX are
skipped where these are not installed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from po_bilevel import Batch, ImplicitCG, MLPGaussian
from po_bilevel.experiments import gaussian
from po_bilevel.experiments.gaussian import DAMPING, DECAY, GaussianConfig
from torch import Tensor
from torch.func import functional_call

import po_kernels as pk
from benchmarks import peers
from benchmarks.harness import check, compare, versions

ENTROPY = 1.0
CONFIG = GaussianConfig(progress=False, outer_steps=1_000_000)


class Figure3:
    """The problem of Figure 3 with the fused losses, as functions of (θ, φ); φ is u."""

    def __init__(self, *, repeat: bool = False) -> None:
        self.inner_data, self.outer_data = gaussian.draw(CONFIG, 0)
        if repeat:
            self.inner_data, self.outer_data = _repeated(self.inner_data), _repeated(self.outer_data)
        torch.manual_seed(0)
        self.policy = MLPGaussian(2, 2)
        self.names = [name for name, _ in self.policy.named_parameters()]
        self.theta = tuple(self.policy.parameters())
        self.phi = (torch.ones((), requires_grad=True),)

    def _call(self, theta: tuple[Tensor, ...], data: Batch) -> tuple[Tensor, Tensor]:
        mean, log_std = functional_call(self.policy, dict(zip(self.names, theta, strict=True)), (data.inputs,))
        return mean.expand(data.target.shape), log_std

    def inner(self, theta: tuple[Tensor, ...], phi: tuple[Tensor, ...]) -> Tensor:
        mean, log_std = self._call(theta, self.inner_data)
        return pk.gaussian_policy_loss(mean, log_std, self.inner_data.target, phi[0], entropy_coef=ENTROPY)

    def outer(self, theta: tuple[Tensor, ...], phi: tuple[Tensor, ...]) -> Tensor:
        mean, log_std = self._call(theta, self.outer_data)
        return -pk.gaussian_log_prob(mean, log_std, self.outer_data.target).mean()


def _repeated(data: Batch) -> Batch:
    """A row of inputs for each observation."""
    inputs = data.inputs.expand(*data.target.shape[:-1], data.inputs.shape[-1])
    return Batch(inputs.flatten(0, 1), data.target.flatten(0, 1))


@pytest.mark.parametrize("products", [5, 10, 20])
def bench_hypergradient_is_its_products(benchmark, products):
    """A hypergradient of K products against the two gradients, K Hessian products and one mixed one in it."""
    problem = Figure3()
    trainer = gaussian.trainer(CONFIG, 0)
    for _ in range(10):
        trainer.step()
    problem.policy.load_state_dict(trainer.policy.state_dict())
    # No tolerance to reach: K - 1 products in the solve, and the last with the mixed one.
    method = ImplicitCG(damping=2.0, tolerance=1e-30, max_iterations=products - 1)

    def ours() -> Any:
        return method(problem.inner, problem.outer, problem.theta, problem.phi)

    assert ours().num_products == products

    def bare() -> None:
        vector = torch.autograd.grad(problem.outer(problem.theta, problem.phi), problem.theta)
        gradient = torch.autograd.grad(problem.inner(problem.theta, problem.phi), problem.theta, create_graph=True)
        for _ in range(products):
            torch.autograd.grad(gradient, problem.theta, vector, retain_graph=True)
        torch.autograd.grad(gradient, problem.phi, vector, retain_graph=True)

    benchmark.extra_info.update(versions(), products=compare(ours, bare)._asdict())
    benchmark.pedantic(ours, rounds=5)


def bench_figure_3(benchmark):
    """The whole run, 100 × 50 steps, in seconds: the table's only absolute time."""

    def run() -> None:
        gaussian.trainer(GaussianConfig(progress=False), 0).fit(100)

    benchmark.extra_info.update(versions())
    benchmark.pedantic(run, rounds=3)


def torchopt_run(torchopt: Any, estimator: str, repeat: bool) -> tuple[Callable[[], None], Callable[[], float]]:
    """Figure 3 as the documentation of torchopt has it: `custom_root` around an inner loop on an eager loss.

    Data, network, both optimisers with their states kept and their schedules, weight decay, clipping, damping,
    tolerance and iterations are ours.

    Returns:
        one outer step; and u.
    """
    problem = Figure3(repeat=repeat)
    raw = torch.tensor(math.log(math.expm1(1.0)), requires_grad=True)
    outer_optimizer = torch.optim.Adam([raw], lr=CONFIG.outer_learning_rate, betas=(0.5, 0.9))

    def rate(count: Any) -> Any:
        return CONFIG.learning_rate * (1.0 - 0.9 * (count % CONFIG.inner_steps) / CONFIG.inner_steps)

    optimizer = torchopt.adam(lr=rate, weight_decay=DECAY)
    precision = torch.eye(2)
    kept: dict[str, Any] = {"theta": tuple(t.detach().clone().requires_grad_() for t in problem.theta)}
    kept["state"] = optimizer.init(kept["theta"])

    def objective(theta: tuple[Tensor, ...], raw: Tensor) -> Tensor:
        mean, log_std = problem._call(theta, problem.inner_data)
        u = torch.nn.functional.softplus(raw) * precision
        target = problem.inner_data.target
        if estimator == "dice":
            return peers.gaussian_dice(mean, log_std.expand_as(mean), target, u, ENTROPY, 5)
        return peers.gaussian_analytic(mean, log_std, target, u, ENTROPY)

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(objective, argnums=0),
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(ridge=DECAY + DAMPING, maxiter=10, rtol=1e-2, atol=0.0),
    )
    def solve(theta: tuple[Tensor, ...], raw: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            for _ in range(CONFIG.inner_steps):
                gradients = torch.autograd.grad(objective(theta, raw), theta)
                updates, kept["state"] = optimizer.update(gradients, kept["state"], params=theta, inplace=True)
                theta = torchopt.apply_updates(theta, updates, inplace=True)
        return theta

    def step() -> None:
        theta = solve(kept["theta"], raw)
        mean, log_std = problem._call(theta, problem.outer_data)
        loss = -torch.distributions.Normal(mean, log_std.exp()).log_prob(problem.outer_data.target).sum(-1).mean()
        outer_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([raw], 1.0)
        outer_optimizer.step()
        kept["theta"] = tuple(t.detach().requires_grad_() for t in theta)

    return step, lambda: float(torch.nn.functional.softplus(raw.detach()))


@pytest.mark.parametrize("repeat", [False, True], ids=["observations together", "a row each"])
@pytest.mark.parametrize("estimator", ["analytic", "dice"])
def bench_figure_3_against_torchopt(benchmark, estimator, repeat):
    """An outer step with its 50 inner ones, after the two have been seen to get to the same u.

    With "a row each" the network of torchopt's run sees every x as often as it is observed, which is how such data
    come; else it sees it once, as ours does.
    """
    torchopt = pytest.importorskip("torchopt")
    _against(benchmark, "eager", estimator, *torchopt_run(torchopt, estimator, repeat))


@pytest.mark.parametrize("estimator", ["analytic", "dice"])
def bench_figure_3_against_jax(benchmark, estimator):
    """The same with an outer step compiled by JAX, whose compilation is not counted."""
    pytest.importorskip("jax")
    from benchmarks.peers_jax import figure_3  # imports it

    problem = Figure3()
    parameters = {name: t.detach().numpy() for name, t in zip(problem.names, problem.theta, strict=True)}
    log_std = parameters.pop("log_std")
    values = list(parameters.values())
    data = [(part.inputs.numpy(), part.target.numpy()) for part in (problem.inner_data, problem.outer_data)]
    step, their_u = figure_3(
        list(zip(values[::2], values[1::2], strict=True)), log_std, *data, group=5 if estimator == "dice" else 0,
        entropy_coef=ENTROPY, inner_steps=CONFIG.inner_steps, learning_rate=CONFIG.learning_rate,
        outer_learning_rate=CONFIG.outer_learning_rate, decay=DECAY, damping=DAMPING,
    )  # fmt: skip
    _against(benchmark, "jax", estimator, step, their_u)


def _against(
    benchmark: Any, name: str, estimator: str, theirs: Callable[[], None], their_u: Callable[[], float]
) -> None:
    """Compares outer steps, after as many of both as get them to the optimum."""
    trainer = gaussian.trainer(dataclasses.replace(CONFIG, estimator=estimator), 0)
    for _ in range(70):
        theirs()
        trainer.step()
    # How exactly depends on where each solve ended, and on the samples.
    check(
        [torch.tensor(their_u())], [trainer.reward.precision().detach()], "u of the peer",
        tolerance=0.02 if estimator == "analytic" else 0.1,
    )  # fmt: skip
    benchmark.extra_info.update(versions(), **{name: compare(trainer.step, theirs, budget=10.0)._asdict()})
    benchmark.pedantic(trainer.step, rounds=5)
