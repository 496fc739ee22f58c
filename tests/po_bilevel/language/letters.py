"""Policies of strings of two letters, of which all completions of a prompt can be enumerated."""

import itertools

import torch
from po_bilevel.language import CausalModel, Head, Pairs, Sampling, TextEmbeddingReward, TokenPolicy, Tokens
from po_bilevel.language.texts import prompt_tokens
from torch import nn

END, VOCABULARY = 0, 3


class Letters:
    """One token a letter."""

    end = END

    def encode(self, text):
        return [" ab".index(letter) for letter in text]

    def decode(self, ids):
        return "".join(" ab"[token] for token in ids if token != END)


class Table(CausalModel):
    """Hidden states that are a row of a table for each sequence of tokens so far, of at most `most` tokens.

    By default the logits are the hidden states themselves: any conditional probabilities can be had.
    """

    def __init__(self, most=5, *, vocabulary=VOCABULARY, width=None, **head):
        super().__init__()
        self._base = vocabulary + 1
        self.table = nn.Parameter(torch.zeros(self._base**most, width or vocabulary, dtype=torch.float64))
        weight = torch.eye(vocabulary) if width is None else torch.randn(vocabulary, width)
        self.weight = nn.Parameter(weight.double(), requires_grad=width is not None)
        self.options = head

    def head(self):
        return Head(self.weight, **self.options)

    def forward(self, ids, mask):
        return self.extend(ids, mask)[0]

    def extend(self, ids, mask, cache=None):
        code, found = torch.zeros_like(ids[:, 0]) if cache is None else cache, []
        for token, there in zip(ids.unbind(1), mask[:, -ids.shape[1] :].unbind(1), strict=True):
            code = torch.where(there, code * self._base + token + 1, code)
            found.append(code)
        return self.table[torch.stack(found, dim=1)], code

    def repeated(self, cache, times):
        return cache.repeat_interleave(times, dim=0)


def completions(most):
    """All that a policy may sample of at most so many tokens, as lists of tokens: those that end, and those cut."""
    found = []
    for size in range(most):
        found += [[*word, END] for word in itertools.product((1, 2), repeat=size)]
    return found + [list(word) for word in itertools.product((1, 2), repeat=most)]


def table_policy(most=5, *, scale=1.0, seed=0, **options):
    """A policy with random probabilities."""
    policy = TokenPolicy(Table(most, **options), END)
    with torch.no_grad():
        policy.model.table.normal_(0.0, scale, generator=torch.Generator().manual_seed(seed))
    return policy


def all_log_prob(policy, prompt, most):
    """log p of all completions of a prompt."""
    every = completions(most)
    return policy.log_prob(prompt_tokens(Letters(), [prompt]), Tokens.padded(every))


def embedded(texts):
    """How often each letter is in a text, whether they are in order, and its length."""
    return torch.tensor(
        [[t.count("a"), t.count("b"), float(t == "".join(sorted(t))), 0.3 * len(t)] for t in texts],
        dtype=torch.float64,
    )


# No prompt is another one with the beginning of a completion: those would be one sequence to a policy.
PAIRS = Pairs.of(
    [("a ", "ab"), ("a ", "a"), ("a ", "b"), ("b ", "bb"), (" ", "ba"), (" ", "ba"), (" ", "aa")]
)  # fmt: skip
SAMPLING = Sampling(num_samples=4, max_tokens=3)


def letter_reward(gates=()):
    return TextEmbeddingReward(embedded, U=torch.tensor([0.5, 0.4, 0.3, 0.6], dtype=torch.float64), gates=gates)


def enumerated_rewards(reward, prompt_answers, most, factor=None):
    """r of all completions against answers, their mean, by hand: −Σ_j U_j (e_j − y_j)²; (number of completions,)."""
    features = embedded([Letters().decode(ids) for ids in completions(most)])
    targets = embedded(prompt_answers)
    residual = features[:, None] - targets[None]
    return -(residual.square() * reward.precision()).sum(dim=2).mean(dim=1)


def set_to(policy, prompt, log_p, most):
    """Makes the policy's probabilities of all completions of a prompt those that are given."""
    p, every = log_p.detach().exp(), completions(most)
    model, start = policy.model, Letters().encode(prompt)
    with torch.no_grad():
        for size in range(most):
            for prefix in itertools.product((1, 2), repeat=size):
                mass = torch.zeros(VOCABULARY, dtype=torch.float64)
                for ids, each in zip(every, p, strict=True):
                    if tuple(ids[:size]) == prefix and len(ids) > size:
                        mass[ids[size]] += each
                code = 0
                for token in [*start, *prefix]:
                    code = code * (VOCABULARY + 1) + token + 1
                model.table[code] = mass.log()
