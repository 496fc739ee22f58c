"""Completions of prompts, and what a reward of texts gives them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .policy import Completions, TokenPolicy, Tokens
from .rewards import TextReward, gated
from .texts import Pairs, Tokenizer, prompt_tokens


class Sampling(NamedTuple):
    """How completions are sampled.

    Attributes:
        num_samples: G, completions of a prompt.
        max_tokens: the most of a completion.
        temperature, top_p: as in `TokenPolicy.generate`.
    """

    num_samples: int
    max_tokens: int
    temperature: float | None = None
    top_p: float = 1.0


class Rollout(NamedTuple):
    """Completions of B prompts, G each, and what of them does not change with a reward's parameters.

    Attributes:
        prompts: B.
        completions: B · G, those of a prompt next to each other.
        texts: of the completions.
        features: (B, G, n), of the completions.
        targets: (B, K, n), features of each prompt's own answers.
        target_weight: (B, K): one over how many a prompt has, 0 for what fills up.
        keep: (B, G), bool: which completions pass the reward's gates.
        factor: (G, B), of the gates that multiply.
    """

    prompts: Tokens
    completions: Completions
    texts: list[str]
    features: Tensor
    targets: Tensor
    target_weight: Tensor
    keep: Tensor
    factor: Tensor

    def rewards(self, reward: TextReward) -> Tensor:
        """(B, G), of the log-probabilities' dtype: means over a prompt's answers, differentiable in the parameters."""
        each = reward(self.features[:, :, None], self.targets[:, None])
        values = (each * self.target_weight[:, None]).sum(dim=2).to(self.completions.log_prob.dtype)
        return gated(values.mT, self.factor, self.keep.mT).mT if reward.gates else values

    def part(self, prompts: slice) -> tuple[Tokens, Tokens, slice]:
        """Some of the prompts, their completions, and which rows these are."""
        times = self.keep.shape[1]
        rows = slice(prompts.start * times, prompts.stop * times)
        tokens = self.completions.tokens
        return (
            Tokens(self.prompts.ids[prompts], self.prompts.mask[prompts]), Tokens(tokens.ids[rows], tokens.mask[rows]),
            rows,
        )  # fmt: skip


def rollout(
    policy: TokenPolicy, tokenizer: Tokenizer, reward: TextReward, pairs: Pairs, rows: Sequence[int],
    sampling: Sampling, seed: int, row_offset: int = 0,
) -> Rollout:  # fmt: skip
    """Samples completions of the prompts at `rows` of the pairs, and looks up what a reward needs of them.

    Args:
        seed, row_offset: of the samples, see `TokenPolicy.generate`.
    """
    device = next(policy.parameters()).device
    texts = [pairs.prompts[row] for row in rows]
    prompts = prompt_tokens(tokenizer, texts, device)
    completions = policy.generate(
        prompts, sampling.num_samples, sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
        seed=seed, row_offset=row_offset,
    )  # fmt: skip
    answers = [tokenizer.decode(ids) for ids in completions.tokens.lists()]
    shape = (len(rows), sampling.num_samples)
    features = reward.features(answers).to(device)
    targets, weight = grouped(reward.features, [pairs.answers[row] for row in rows])
    keep, factor = torch.ones(shape, dtype=torch.bool), torch.ones(shape)
    if reward.gates:
        values = reward.gate([text for text in texts for _ in range(sampling.num_samples)], answers)
        keep, factor = values.keep.reshape(shape), values.factor.reshape(shape)
    return Rollout(
        prompts, completions, answers, features.reshape(*shape, -1), targets.to(device), weight.to(device),
        keep.to(device), factor.mT.to(device),
    )  # fmt: skip


def grouped(
    features: Callable[[Sequence[str]], Tensor], answers: Sequence[Sequence[str]]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Features (B, K, n) of B groups of texts, and the weights (B, K) that make means over the groups."""
    flat = features([text for group in answers for text in group])
    most = max(map(len, answers))
    found, weight = flat.new_zeros(len(answers), most, flat.shape[-1]), flat.new_zeros(len(answers), most)
    parts = flat.split([len(group) for group in answers])
    for row, part in enumerate(parts):
        found[row, : len(part)], weight[row, : len(part)] = part, 1.0 / len(part)
    return found, weight
