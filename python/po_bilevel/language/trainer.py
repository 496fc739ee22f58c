"""Training of policies of texts: by likelihood, under a reward, or under a reward that is learned meanwhile."""

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import po_kernels as pk

from .. import training
from ..errors import NonFiniteError
from ..hypergradients import Hypergradient
from ..hypergradients.sampled import check_advantage
from ..processes import Processes, unwrapped
from ..resumable import Resumable, check_one_at_a_time, described
from ..steps import OuterStep
from ..streams import RowStream
from ..substitution import evaluating
from ..trainer import OptimizerFactory, SchedulerFactory
from .learner import RewardLearner, nll
from .policy import TokenPolicy
from .rewards import TextReward
from .rollouts import Rollout, Sampling, rollout
from .texts import Pairs, Tokenizer, answer_tokens, prompt_tokens

# Of the importance weights of tokens that were not sampled from the policy, as TRL truncates them.
MOST_WEIGHT = 2.0
# Options of `policy_loss` that a step gives.
OWN = (
    "old_log_prob", "ref_log_prob", "entropy", "mask", "weight", "kl_coef", "normalizer", "cu_seqlens", "return_stats",
)  # fmt: skip
# So many pairs' tokens tell a tokenizer from another, where a run is to go on.
TOLD_BY = 64


@dataclass(frozen=True)
class SequenceStep(OuterStep):
    """What one outer step of a `SequenceTrainer` did.

    Attributes:
        inner_loss: of the last optimiser step, or L at its end where the reward is learned.
        outer_loss: negative log-likelihood of the outer pairs, nats a pair; nan without.
        reward_mean: of the completions of the last optimiser step that passed the reward's gates, before any baseline;
            nan if none did, None for likelihood.
        kl: estimate of KL(policy ‖ reference) of theirs, nats a completion.
        entropy: of the policy, nats a token.
        length: tokens a completion.
        kept: the share of them that passed the reward's gates.
    """

    reward_mean: float | None = None
    kl: float | None = None
    entropy: float | None = None
    length: float | None = None
    kept: float | None = None


class Learning(NamedTuple):
    """How a reward is learned, see `RewardLearner` for what the fields mean."""

    optimizer: Optimizer
    hypergradient: Any = None
    num_samples: int = 16
    num_prompts: int | None = 32
    outer_rows: int | None = 256
    max_grad_norm: float | None = None


class SequenceTrainer(Resumable[SequenceStep]):
    """Trains a policy of texts, and the reward with it.

    Without a reward by likelihood of the pairs (supervised fine-tuning). With one by policy gradient in groups (GRPO,
    arXiv 2402.03300): completions of each prompt, rewarded by how they compare with the prompt's answers, less a
    divergence from a reference. With `learning` the reward's parameters take a step after each `inner_steps`, along
    the hypergradient of the likelihood of the outer pairs.

    Only where the loss has the gradient of E[r] − β KL of whole completions does the inner problem have the optimum
    that the hypergradients are derived for: under "rloo", or "dice" with options={"kl": "k1", "kl_placement":
    "reward"}. Other presets serve; their hypergradient is that of a nearby problem.

    Args:
        policy: a `TokenPolicy`, trained in place; or one in `DistributedDataParallel`, with the same arguments in each
            of its processes, which share the prompts out among them.
        tokenizer: of its tokens.
        pairs: prompts, and their answers.
        optimizer: makes the policy's optimiser from its parameters that require grad.
        reward: r_φ; None for likelihood.
        outer_pairs: of the outer loss; None for none.
        learning: how the reward is learned; None for one that stays as it is.
        inner_steps: optimiser steps for each outer step.
        preset: options of `po_kernels.policy_loss`, by name, see `policy_loss_preset`.
        options: more of them, instead of the preset's; β is `coefficient`.
        coefficient: β, of the divergence, in units of reward a nat; 0 for none, where no reference is kept.
        reference: the policy that the divergence is from, which is frozen; None for `policy` as it is now. What shares
            parameters that are trained is copied.
        advantage: baseline, as in `group_advantage`.
        sampling: of the completions: G, the most tokens, and how they are drawn. Where that is not the policy's own
            temperature, or top_p is below 1, tokens are weighted by `importance_weights` truncated at 2.
        num_prompts: of an optimiser step, or pairs of one by likelihood, all where there are fewer; of all processes
            together.
        updates: optimiser steps on the same completions.
        accumulation: parts that a step's prompts are split into, one after another, which saves memory.
        max_grad_norm: longer gradients are scaled to this Euclidean norm; None leaves them.
        scheduler: makes the scheduler of the policy's optimiser, stepped after each of its steps.
        seed: of prompts and samples.
        checkpoint, checkpoint_every, progress, description: as in `BilevelTrainer`. Of several processes the first
            one writes.

    Raises:
        ValueError: a reward without parameters to learn, standardised advantages where a reward is learned,
            outer pairs that are missing there, numbers that processes or parts cannot share out evenly, options or a
            reference that would not be used, or an argument out of range.
        TypeError: a policy, pairs or a reward of another class, or an option that the loss does not have.
    """

    step_type = SequenceStep

    def __init__(
        self, policy: nn.Module, tokenizer: Tokenizer, pairs: Pairs, optimizer: OptimizerFactory, *,
        reward: TextReward | None = None, outer_pairs: Pairs | None = None, learning: Learning | None = None,
        inner_steps: int = 10, preset: str = "rloo", options: dict[str, Any] | None = None, coefficient: float = 0.05,
        reference: TokenPolicy | None = None, advantage: pk.Advantage = "loo", sampling: Sampling | None = None,
        num_prompts: int = 16, updates: int = 1, accumulation: int = 1, max_grad_norm: float | None = 1.0,
        scheduler: SchedulerFactory | None = None, seed: int = 0, checkpoint: Path | str | None = None,
        checkpoint_every: int = 1, progress: bool = True, description: str = "steps",
    ) -> None:  # fmt: skip
        for name, count in (
            ("inner_steps", inner_steps), ("num_prompts", num_prompts), ("updates", updates),
            ("accumulation", accumulation),
        ):  # fmt: skip
            training.check_count(name, count, 1)
        training.check_norm("max_grad_norm", max_grad_norm)
        if not 0 <= coefficient < math.inf:
            raise ValueError(f"coefficient: expected a finite number of at least 0, got {coefficient}")
        for name, value, kind in (
            ("pairs", pairs, Pairs), ("outer_pairs", outer_pairs, Pairs), ("reward", reward, TextReward),
        ):  # fmt: skip
            if not isinstance(value, kind) and (value is not None or name == "pairs"):
                raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
        for name, given, used in (
            ("options", options, reward is not None), ("reference", reference, reward is not None and coefficient > 0),
        ):  # fmt: skip
            if given is not None and not used:
                raise ValueError(
                    f"{name}: expected None without a reward, and a reference only with a positive coefficient, got "
                    f"{type(given).__name__}"
                )
        self.policy: TokenPolicy = unwrapped(policy, TokenPolicy)
        self._parallel, self._processes = policy, Processes.of(policy)
        rows = len(pairs.prompts) if reward is not None else pairs.number
        self._num_prompts = min(num_prompts, rows)
        self._processes.check("num_prompts", self._num_prompts)
        if self._num_prompts // self._processes.number % accumulation:
            raise ValueError(
                f"accumulation: expected parts of equal size of {self._num_prompts // self._processes.number} prompts, "
                f"got {accumulation}"
            )
        self.reward: TextReward | None = reward
        if reward is not None:
            self._processes.equal(reward)
        self._tokenizer, self._pairs, self._outer_pairs = tokenizer, pairs, outer_pairs
        self._each = pairs.each()
        self._options = pk.policy_loss_preset(preset) | {"kl_coef": coefficient} | (options or {})
        if wrong := [name for name in OWN if name in (options or {})]:
            raise ValueError(f"options: expected others than those that a step gives the loss, got {', '.join(wrong)}")
        self._inner_steps, self._updates, self._accumulation = inner_steps, updates, accumulation
        self._coefficient, self._advantage, self._max_grad_norm = coefficient, advantage, max_grad_norm
        self._sampling = Sampling(8, 32) if sampling is None else sampling
        if self._options["aggregation"] == "seq_mean_token_sum_norm":
            # Not the longest completion, which differs from step to step, and between processes.
            self._options.setdefault("max_length", self._sampling.max_tokens)
        if reward is not None:
            # Refuse what they do not have before a step is taken.
            one = torch.zeros(1, 1)
            pk.policy_loss(one, one[0], ref_log_prob=one, entropy=one, **self._options)
            pk.group_advantage(torch.zeros(self._sampling.num_samples, 1), advantage)
            if self._sampling.temperature == 0:
                raise ValueError("sampling: expected a temperature above 0, at which completions differ, got 0")
        self._stream = RowStream(rows, self._num_prompts, seed, drop_last=True)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self._optimizer = optimizer(trained)
        check_one_at_a_time("optimizer", self._optimizer)
        self._scheduler = None if scheduler is None else scheduler(self._optimizer)
        self._reference: TokenPolicy | None = None
        if reward is not None and coefficient > 0:
            reference = self.policy if reference is None else reference
            if not {id(p) for p in trained}.isdisjoint(map(id, reference.parameters())):
                reference = copy.deepcopy(reference)
            self._reference = reference.requires_grad_(False).eval()
        self._learner = None if learning is None else self._new_learner(learning, seed)
        self._outer: Callable[[], Tensor] | None = None
        if outer_pairs is not None:
            self._outer = nll(self.policy, tokenizer, outer_pairs.each())
        self._told: dict[str, Tensor] = {}  # sums and counts
        self._start = described(
            optimizer=self._optimizer, scheduler=self._scheduler, policy=self.policy, reward=reward, learning=learning,
            pairs=pairs, tokens=[tokenizer.encode(text) for pair in self._each[:TOLD_BY] for text in pair],
            outer_pairs=outer_pairs, options=self._options, sampling=self._sampling, advantage=advantage,
            steps=(inner_steps, self._num_prompts, updates, accumulation, max_grad_norm, coefficient, seed),
        )  # fmt: skip
        super().__init__(
            checkpoint=checkpoint, checkpoint_every=checkpoint_every, progress=progress, description=description
        )

    def _new_learner(self, learning: Learning, seed: int) -> RewardLearner:
        if self.reward is None or self._outer_pairs is None or self._coefficient == 0:
            raise ValueError(
                "learning: expected a reward, outer_pairs and a positive coefficient, with which one can be learned, "
                f"got {self.reward and type(self.reward).__name__}, {self._outer_pairs and self._outer_pairs.number} "
                f"pairs and {self._coefficient}"
            )
        check_advantage("advantage", self._advantage)
        return RewardLearner(
            self._parallel, self._tokenizer, self.reward, inner=self._pairs, outer=self._outer_pairs,
            outer_optimizer=learning.optimizer, coefficient=self._coefficient, hypergradient=learning.hypergradient,
            sampling=self._sampling._replace(num_samples=learning.num_samples, temperature=None, top_p=1.0),
            num_prompts=learning.num_prompts, outer_rows=learning.outer_rows, max_grad_norm=learning.max_grad_norm,
            seed=seed + 1, reference=self._reference,
        )  # fmt: skip

    def step(self) -> SequenceStep:
        """One outer step; see `fit`."""
        number = len(self.history)
        try:
            loss = self._train()
            result = None if self._learner is None else self._learner.evaluate()
            if result is None:
                result = Hypergradient((), loss, self._outer_nll())
            done = SequenceStep.of(
                number, result, nn.Module() if self.reward is None else self.reward, inner_steps=self._inner_steps,
                **self._averaged(),
            )  # fmt: skip
            if self._learner is not None:
                self._learner.update(result)
        except NonFiniteError as error:
            raise NonFiniteError(f"outer step {number}: {error}{self._last_good()}") from error
        self.history.append(done)
        return done

    def _averaged(self) -> dict[str, float]:
        """What is told of the last optimiser step, over all processes."""
        sums = self._processes.average(torch.stack([*self._told.values(), torch.zeros(2, dtype=torch.float64)]))[:-1]
        return dict(zip(self._told, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))

    @torch.no_grad()
    def _outer_nll(self) -> float:
        if self._outer is None:
            return math.nan
        with evaluating(self.policy):
            return float(self._outer())

    def _train(self) -> float:
        """Takes the inner steps; returns the last one's loss."""
        loss, left, parts = math.nan, 0, None
        for step in range(self._inner_steps):
            if left == 0:
                drawn, seed = self._stream.draw()
                rows, offset = self._processes.share([] if drawn is None else drawn.tolist())
                parts, left = self._parts(rows, offset, seed), self._updates
            left -= 1
            loss = self._take(parts or [])
            training.check_finite(f"the loss at inner step {step}", loss)
            # Before anything is sampled from them.
            norm = training.norm_of([p.detach() for p in self.policy.parameters()])
            training.check_finite(f"the norm of the policy's parameters after inner step {step}", norm)
        return loss

    def _take(self, parts: list[Callable[[], Tensor]]) -> float:
        """One optimiser step on the sum of the parts' losses; returns it, averaged over processes."""
        self._optimizer.zero_grad(set_to_none=True)
        self._told.pop("entropy", None)
        total = torch.zeros(())
        for number, part in enumerate(parts, 1):
            # Gradients are averaged over processes with the last part.
            parallel = self._parallel
            waits = isinstance(parallel, nn.parallel.DistributedDataParallel) and number < len(parts)
            with parallel.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                value = part()
                value.backward()
            total = total + value.detach().cpu()
        parameters = training.trained(self._optimizer)
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        self._optimizer.step()
        loss = float(self._processes.average(total))
        if self._scheduler is not None:
            training.advance(self._scheduler, loss)
        return loss

    def _parts(self, rows: list[int], offset: int, seed: int) -> list[Callable[[], Tensor]]:
        """The losses of the parts of a batch, which add up to the batch's."""
        size = len(rows) // self._accumulation
        places = [slice(start, start + size) for start in range(0, len(rows), size)]
        if self.reward is None:
            return self._likelihood([[self._each[row] for row in rows[place]] for place in places])
        with evaluating(self.policy):
            found = rollout(
                self.policy, self._tokenizer, self.reward, self._pairs, rows, self._sampling, seed, offset
            )  # fmt: skip
        return self._policy_gradient(found, self.reward, places)

    def _likelihood(self, parts: list[list[tuple[str, str]]]) -> list[Callable[[], Tensor]]:
        device = next(self.policy.parameters()).device
        tokens = [
            (prompt_tokens(self._tokenizer, [prompt for prompt, _ in part], device),
             answer_tokens(self._tokenizer, [answer for _, answer in part], device))
            for part in parts
        ]  # fmt: skip
        count = self._global(sum(int(answers.mask.sum()) for _, answers in tokens))
        return [lambda p=p, a=a: -self._parallel(p, a).log_prob.sum() / count for p, a in tokens]  # type: ignore[misc]

    def _policy_gradient(self, found: Rollout, reward: TextReward, places: list[slice]) -> list[Callable[[], Tensor]]:
        sampled, options = found.completions, dict(self._options)
        mask = sampled.tokens.mask & found.keep.reshape(-1, 1)
        own = self._sampling.top_p == 1 and self._sampling.temperature in (None, self.policy.temperature)
        with torch.no_grad(), evaluating(self.policy):
            rewards = found.rewards(reward)
            reference = None if self._reference is None else self._reference(found.prompts, sampled.tokens).log_prob
            old, weight = sampled.log_prob, None
            if self._updates > 1 or not own:
                old = self.policy(found.prompts, sampled.tokens).log_prob
            if not own:
                weight = pk.importance_weights(
                    old, sampled.log_prob, mask, level="token", mode="truncate", bounds=(None, MOST_WEIGHT),
                    log_support=sampled.log_support,
                )  # fmt: skip
            self._told = {
                "reward_mean": _sums(rewards, found.keep),
                "length": _sums(sampled.tokens.mask.sum(dim=1), torch.ones_like(found.keep)),
                "kept": _sums(found.keep, torch.ones_like(found.keep)),
            }  # fmt: skip
            if reference is not None:
                divergence = (old - reference).sum(dim=1).reshape(rewards.shape)
                self._told["kl"] = _sums(divergence, found.keep)
                if (options.get("kl_placement"), options.get("kl")) == ("reward", "k1"):
                    # Before the baseline, which takes out the most of its noise.
                    rewards, options["kl_coef"] = rewards - options["kl_coef"] * divergence, 0.0
            advantages = _advantages(rewards, found.keep, self._advantage)
        scale, count = 1, None
        if options["aggregation"] == "token_sum":
            scale = self._processes.number
        else:
            by_token = options["aggregation"] == "token_mean"
            count = self._global(int(mask.sum() if by_token else found.keep.sum()))

        def loss(place: slice) -> Tensor:
            prompts, tokens, rows = found.part(place)
            new = self._parallel(prompts, tokens, True)
            value = pk.policy_loss(
                new.log_prob, advantages[rows], old_log_prob=old[rows] if self._updates > 1 else None,
                ref_log_prob=None if reference is None else reference[rows], entropy=new.entropy, mask=mask[rows],
                weight=None if weight is None else weight[rows], normalizer=count, **options,
            )  # fmt: skip
            self._told["entropy"] = self._told.get("entropy", 0.0) + _sums(new.entropy.detach(), tokens.mask)
            return scale * cast(Tensor, value)

        return [functools.partial(loss, place) for place in places]

    def _global(self, count: int) -> float:
        """The average over processes of a count, at least one."""
        return max(float(self._processes.average(torch.tensor(float(count), dtype=torch.float64))), 1.0)

    def _learned(self) -> list[nn.Parameter]:
        return [] if self._learner is None or self.reward is None else list(self.reward.parameters())

    def _state(self) -> dict[str, Any]:
        parts = {
            "policy": self.policy, "reward": self.reward, "reference": self._reference, "optimizer": self._optimizer,
            "scheduler": self._scheduler,
        }  # fmt: skip
        states = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        learner = None if self._learner is None else self._learner.state()
        return states | {"learner": learner, "stream": self._stream.state()}

    def _restore(self, state: dict[str, Any]) -> None:
        for name, part in (
            ("policy", self.policy), ("reward", self.reward), ("reference", self._reference),
            ("optimizer", self._optimizer), ("scheduler", self._scheduler),
        ):  # fmt: skip
            if part is not None:
                part.load_state_dict(state[name])
        if self._learner is not None:
            self._learner.restore(state["learner"])
        self._stream.restore(state["stream"])

    @property
    def _configuration(self) -> dict[str, str]:
        return self._start


def _advantages(rewards: Tensor, keep: Tensor, kind: pk.Advantage) -> Tensor:
    """(B · G,) from rewards (B, G), of those that are kept; 0 of the others."""
    if keep.all():
        return pk.group_advantage(rewards.mT, kind).mT.reshape(-1)
    number, times = rewards.shape
    index = torch.arange(number, device=rewards.device).repeat_interleave(times)
    kept = keep.reshape(-1)
    found = rewards.new_zeros(number * times)
    found[kept] = pk.group_advantage(rewards.reshape(-1)[kept], kind, index=index[kept])
    return found


def _sums(x: Tensor, there: Tensor) -> Tensor:
    """(2,): the sum of what is there, and of how many."""
    return torch.stack([x.reshape(there.shape)[there].sum().double(), there.sum().double()]).cpu()
