"""A hypergradient of a policy of texts against the products, the derivative and the backward pass in it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from po_bilevel.hypergradients import FisherCG, completion_credit
from po_bilevel.language import Decoder, Pairs, RewardLearner, Sampling, TextEmbeddingReward, TokenPolicy
from po_bilevel.language.rollouts import rollout
from po_bilevel.resumable import named
from po_bilevel.substitution import Substitution

from benchmarks.harness import compare, versions

VOCABULARY, PROMPTS, GROUP, LENGTH = 1024, 8, 8, 16


class Numbers:
    """Texts are numbers, the tokens themselves."""

    end = 0

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def embedded(texts: Sequence[str]) -> torch.Tensor:
    rows = [[int(number) for number in text.split()] or [0] for text in texts]
    return torch.stack([torch.tensor(row).float()[:, None].sub(torch.arange(64.0)).cos().mean(dim=0) for row in rows])


def numbers(count: int) -> str:
    return Numbers().decode(torch.randint(1, VOCABULARY, (count,)).tolist())


@pytest.mark.parametrize("products", [10])
def bench_hypergradient_of_texts(benchmark, products):
    """K products, by FisherCG, of 64 completions of 16 tokens: against K (JVP + VJP), a JVP and a backward pass.

    Goal: the hypergradient takes 1.2 times as long at the most.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with two, neighbours that share the cores are measured too
    policy = TokenPolicy(Decoder(VOCABULARY, 32, width=128, layers=2), Numbers.end)
    reward = TextEmbeddingReward(embedded, 64)
    pairs = Pairs.of((numbers(8), numbers(LENGTH - 1)) for _ in range(PROMPTS))
    learner = RewardLearner(
        policy, Numbers(), reward, inner=pairs, outer=pairs, coefficient=0.1, sampling=Sampling(GROUP, LENGTH),
        outer_optimizer=torch.optim.SGD(reward.parameters(), lr=0.1), num_prompts=None,
    )  # fmt: skip
    # No tolerance to reach: K - 1 products in the solve, and the last with the gradient in φ.
    method = FisherCG(damping=1e-3, tolerance=1e-30, max_iterations=products - 1)
    theta, phi = (named(module, [name for name, _ in module.named_parameters()]) for module in (policy, reward))
    substituted = Substitution(policy, learner._theta, reward, learner._phi)
    rows = list(range(PROMPTS))
    policy.eval()
    found = rollout(policy, Numbers(), reward, pairs, rows, learner._sampling, seed=1)
    assert found.completions.tokens.mask.sum() > 0.98 * PROMPTS * GROUP * LENGTH
    objective = learner._objective(found, rows, substituted, theta, phi)
    outer = learner._outer_loss(pairs.each(), substituted)

    def ours() -> Any:
        return method(objective, outer, theta, phi)

    assert ours().num_products == products
    log_prob, rewards = objective.log_prob(theta), objective.reward(phi)
    vector = [torch.randn_like(p) for p in theta]

    def bare() -> None:
        for _ in range(products):
            credit, how = completion_credit(objective.log_prob, theta, vector)
            torch.autograd.grad(log_prob, theta, credit, retain_graph=True)
        assert how == "forward mode"
        credit, _ = completion_credit(objective.log_prob, theta, vector)
        torch.autograd.grad(rewards, phi, credit, retain_graph=True)

    benchmark.extra_info.update(versions(), products=compare(ours, bare)._asdict())
    benchmark.pedantic(ours, rounds=3)
    torch.set_num_threads(threads)
