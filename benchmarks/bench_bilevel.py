"""Hypergradients and the Figure 3 run of `po-bilevel gaussian` against what a user would write.

`make bench` runs these; each checks its answer before it is timed. The comparison with torchopt needs torchopt, and is
skipped where it is not installed.
"""

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

    def __init__(self) -> None:
        self.inner_data, self.outer_data = gaussian.draw(CONFIG, 0)
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


@pytest.mark.parametrize("products", [5, 10, 20])
def bench_hypergradient_is_its_products(benchmark, products):
    """A whole hypergradient of K products against K Hessian products and one mixed one, of a graph that is there."""
    problem = Figure3()
    # No tolerance to reach: K - 1 products in the solve, and the last with the mixed one.
    method = ImplicitCG(damping=50.0, tolerance=1e-30, max_iterations=products - 1)

    def ours() -> Any:
        return method(problem.inner, problem.outer, problem.theta, problem.phi)

    assert ours().num_products == products
    gradient = torch.autograd.grad(problem.inner(problem.theta, problem.phi), problem.theta, create_graph=True)
    vector = tuple(torch.randn_like(t) for t in problem.theta)

    def bare() -> None:
        for _ in range(products):
            torch.autograd.grad(gradient, problem.theta, vector, retain_graph=True)
        torch.autograd.grad(gradient, problem.phi, vector, retain_graph=True)

    ratio = compare(ours, bare)
    benchmark.extra_info.update(versions(), products=ratio._asdict(), overhead=1.0 / ratio.median)
    benchmark.pedantic(ours, rounds=5)


def bench_figure_3(benchmark):
    """The whole run, 100 × 50 steps, in seconds: the table's only absolute time."""

    def run() -> None:
        gaussian.trainer(GaussianConfig(progress=False), 0).fit(100)

    benchmark.extra_info.update(versions())
    benchmark.pedantic(run, rounds=3)


def torchopt_run(torchopt: Any, accelerated: bool) -> tuple[Callable[[], None], Callable[[], float]]:
    """Figure 3 as the documentation of torchopt has it: `custom_root` around an inner loop on an eager loss.

    Data, network, both optimisers with their states kept, weight decay, damping, tolerance and iterations are ours.

    Returns:
        one outer step; and u.
    """
    problem = Figure3()
    raw = torch.tensor(math.log(math.expm1(1.0)), requires_grad=True)
    outer_optimizer = torch.optim.Adam([raw], lr=CONFIG.outer_learning_rate, betas=(0.5, 0.9))
    optimizer = torchopt.adam(lr=CONFIG.learning_rate, weight_decay=DECAY, use_accelerated_op=accelerated)
    precision = torch.eye(2)
    kept: dict[str, Any] = {"theta": tuple(t.detach().clone().requires_grad_() for t in problem.theta)}
    kept["state"] = optimizer.init(kept["theta"])

    def objective(theta: tuple[Tensor, ...], raw: Tensor) -> Tensor:
        mean, log_std = problem._call(theta, problem.inner_data)
        u = torch.nn.functional.softplus(raw) * precision
        return peers.gaussian_analytic(mean, log_std, problem.inner_data.target, u, ENTROPY)

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
        outer_optimizer.step()
        kept["theta"] = tuple(t.detach().requires_grad_() for t in theta)

    return step, lambda: float(torch.nn.functional.softplus(raw.detach()))


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def bench_figure_3_against_torchopt(benchmark, accelerated):
    """An outer step with its 50 inner ones, after the two have been seen to take the same path."""
    torchopt = pytest.importorskip("torchopt")
    theirs, their_u = torchopt_run(torchopt, accelerated)
    trainer = gaussian.trainer(CONFIG, 0)
    for _ in range(40):
        theirs()
        trainer.step()
    # The solves end at their tolerance and Adam divides by noise at first: the paths agree to about a percent.
    check([torch.tensor(their_u())], [trainer.reward.precision().detach()], "u of torchopt", tolerance=0.03)
    benchmark.extra_info.update(versions(), eager=compare(trainer.step, theirs, budget=20.0)._asdict())
    benchmark.pedantic(trainer.step, rounds=5)
