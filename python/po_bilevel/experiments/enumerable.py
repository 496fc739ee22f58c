"""The policy whose completions can all be enumerated: what hypergradients of samples are, to the last digit.

Strings of three tokens of a vocabulary of three in a few contexts, a table of logits for each prefix, embeddings of the
strings, and data that are p* ∝ exp(r_U/β) of a diagonal U. The policy is at its inner optimum for each U tried, so that
U is learned from the outer loss alone; at its end it is the U that made the data.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from ..hypergradients import FisherCG, MomentMatching, SampledObjective, Tensors
from ..hypergradients.interface import HypergradientMethod
from ..rewards import MahalanobisReward
from ..training import norm_of
from .runs import Clock, Outcome

VOCABULARY = LENGTH = 3
CONTEXTS, DIM = 4, 3
STRINGS = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
# Of each context, for the hypergradient from samples.
SAMPLES = 64


class Enumerable:
    """A data set of a seed.

    Args:
        coefficient: β.
        seed: of the embeddings, the answers and the true U.

    Attributes:
        true: U that made the data, (DIM,).
        data: (S, C), probabilities of all strings in each context.
    """

    def __init__(self, coefficient: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.coefficient = coefficient
        self.embedding: Tensor = torch.randn(len(STRINGS), DIM, dtype=torch.float64, generator=generator)
        self.answer: Tensor = self.embedding[torch.randint(len(STRINGS), (CONTEXTS,), generator=generator)]
        self.true: Tensor = coefficient * (0.05 + 0.1 * torch.rand(DIM, dtype=torch.float64, generator=generator))
        self.data: Tensor = self.optimum(MahalanobisReward(DIM, "diagonal", self.true)).exp().detach()
        # The logits of a token: the row of its context and of the tokens before it.
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCABULARY), repeat=n)]
        place = {prefix: row for row, prefix in enumerate(prefixes)}
        self._rows = torch.tensor([[place[s[:t]] for t in range(LENGTH)] for s in STRINGS])
        self._tokens = torch.tensor(STRINGS)

    def rewards(self, reward: MahalanobisReward) -> Tensor:
        """(S, C), of all strings in each context."""
        return reward(self.embedding[:, None], self.answer)

    def optimum(self, reward: MahalanobisReward) -> Tensor:
        """log p*, (S, C)."""
        return (self.rewards(reward) / self.coefficient).log_softmax(dim=0)

    def theta(self, reward: MahalanobisReward) -> Tensor:
        """The table of logits (C, prefixes, V) of p*, which is the inner optimum."""
        p = self.optimum(reward).detach().exp().reshape(*[VOCABULARY] * LENGTH, CONTEXTS)
        tables = []
        for depth in range(1, LENGTH + 1):
            # Probabilities of the first tokens: the last of these is drawn given those before it.
            start = p.sum(dim=tuple(range(depth, LENGTH))) if depth < LENGTH else p
            tables.append(start.reshape(-1, VOCABULARY, CONTEXTS))
        return torch.cat(tables).log().permute(2, 0, 1).contiguous()

    def log_prob(self, theta: Tensors) -> Tensor:
        """log p_θ, (S, C), of all strings."""
        steps = theta[0].log_softmax(dim=-1)[:, self._rows]
        return steps.gather(-1, self._tokens.expand(CONTEXTS, -1, -1)[..., None])[..., 0].sum(dim=-1).T

    def outer(self, theta: Tensors, phi: Tensors) -> Tensor:
        """The data's negative log-likelihood, nats a string."""
        return -(self.data * self.log_prob(theta)).sum() / CONTEXTS

    def objective(self, reward: MahalanobisReward, theta: Tensor, seed: int | None = None) -> SampledObjective:
        """The inner problem through all strings, or through some that are drawn."""
        p = self.log_prob((theta,)).detach().exp()
        shared: dict[str, Any] = {"coefficient": self.coefficient}
        if seed is None:
            return SampledObjective(
                self.log_prob, lambda phi: self.rewards(reward), advantage="none", weight=p / CONTEXTS,
                data_reward=lambda phi: (self.data * self.rewards(reward)).sum() / CONTEXTS, **shared,
            )  # fmt: skip
        drawn = torch.multinomial(p.T, SAMPLES, replacement=True, generator=torch.Generator().manual_seed(seed)).T
        return SampledObjective(
            lambda theta: self.log_prob(theta).gather(0, drawn), lambda phi: self.rewards(reward).gather(0, drawn),
            **shared,
        )  # fmt: skip


def run(coefficient: float, seeds: int, first_seed: int) -> Outcome:
    """Learns U by both methods, and compares every hypergradient on the way with the exact one.

    Returns:
        rows with u_error, the relative error of the learned U, hypergradient_error, the largest relative error of a
        hypergradient, and cosine, with the exact one, of one from 64 samples a context at the start.
    """
    methods: dict[str, HypergradientMethod] = {
        "pg_learned_fisher": FisherCG(tolerance=1e-12, max_iterations=200), "pg_learned_moments": MomentMatching(),
    }  # fmt: skip
    outcome = Outcome([], {"steps": []}, [])
    for seed, (name, method) in itertools.product(range(first_seed, first_seed + seeds), methods.items()):
        problem = Enumerable(coefficient, seed)
        with Clock() as clock:
            u, worst, path = learned(problem, method)
        cosine = None
        if name == "pg_learned_fisher":
            cosine = from_samples(problem, seed)
        outcome.rows.append({
            "dataset": f"strings of {LENGTH} of {VOCABULARY} tokens", "method": name, "seed": seed,
            "u_error": float((u - problem.true).norm() / problem.true.norm()), "hypergradient_error": worst,
            "cosine": cosine, "seconds": clock.seconds,
        })  # fmt: skip
        outcome.curves["steps"].append({"method": name, "seed": seed, "u": path, "true": problem.true.tolist()})
    return outcome


def learned(problem: Enumerable, method: HypergradientMethod) -> tuple[Tensor, float, list[list[float]]]:
    """U learned from half of that which made the data, the largest relative error of a hypergradient, and U's path."""
    reward = MahalanobisReward(DIM, "diagonal", 0.5 * problem.true)
    phi = tuple(reward.parameters())
    optimizer = torch.optim.LBFGS(
        phi, max_iter=25, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )
    worst, first, path = 0.0, 0.0, []

    def closure() -> float:
        nonlocal worst, first
        theta = problem.theta(reward).requires_grad_()
        found = method(problem.objective(reward, theta), problem.outer, (theta,), phi)
        exact = torch.autograd.grad(-(problem.data * problem.optimum(reward)).sum() / CONTEXTS, phi)
        size = norm_of(exact)
        first = first or size
        # At the end both are rounding.
        if size > 0.01 * first:
            worst = max(worst, norm_of([a - b for a, b in zip(found.gradient, exact, strict=True)]) / size)
        for parameter, gradient in zip(phi, found.gradient, strict=True):
            parameter.grad = gradient
        path.append(reward.precision().tolist())
        return found.outer_loss

    optimizer.step(closure)
    return reward.precision().detach(), worst, path


def from_samples(problem: Enumerable, seed: int) -> float:
    """The cosine of a hypergradient from samples with the exact one, at half of the U that made the data."""
    reward = MahalanobisReward(DIM, "diagonal", 0.5 * problem.true)
    phi, theta = tuple(reward.parameters()), problem.theta(reward).requires_grad_()
    method = FisherCG(damping=1e-3 * problem.coefficient)
    found = method(problem.objective(reward, theta, seed), problem.outer, (theta,), phi).gradient[0]
    (exact,) = torch.autograd.grad(-(problem.data * problem.optimum(reward)).sum() / CONTEXTS, phi)
    return float(torch.nn.functional.cosine_similarity(found, exact, dim=0))
