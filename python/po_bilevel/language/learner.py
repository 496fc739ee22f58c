"""Outer steps of a reward of texts, wherever its policy is trained."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import training
from ..hypergradients import FisherCG, Hypergradient, MomentMatching, SampledObjective, Tensors
from ..hypergradients.sampled import SampledMethod
from ..processes import Processes, unwrapped
from ..resumable import check_learned, learned_names, named, update_reward
from ..steps import OuterStep
from ..streams import RowStream
from ..substitution import Substitution, evaluating
from .decoder import Decoder
from .policy import TokenPolicy
from .rewards import TextReward
from .rollouts import Rollout, Sampling, grouped, rollout
from .texts import Pairs, Tokenizer, answer_tokens, prompt_tokens


class RewardLearner:
    """Learns a reward of texts: steps along the hypergradient of the likelihood of data, at the policy as it is.

    The inner problem is max_θ E[r_φ] − β KL(p_θ ‖ reference), which the policy is taken to have solved. No second
    derivative of the policy is needed, see `SampledObjective`.

    Args:
        policy: p_θ, a `TokenPolicy` which is trained elsewhere, or one in `DistributedDataParallel`.
        tokenizer: of its tokens.
        reward: r_φ, trained in place: those of its parameters that require grad.
        inner: prompts to sample completions of, and answers that these are compared with.
        outer: pairs whose likelihood the reward is to raise. `MomentMatching` takes those whose prompts `inner` has
            too, where an answer is rewarded by how it compares with the answers there.
        outer_optimizer: of the reward's parameters that require grad; one that takes a gradient at a time.
        coefficient: β, in units of reward a nat.
        hypergradient: `FisherCG`, damped by β, to a hundredth, as it stands, or `MomentMatching`.
        sampling: of the completions, at the policy's own temperature, top_p 1.
        num_prompts: of each step, of all processes together; None for all.
        outer_rows: pairs of the outer loss of each step; None for all. `MomentMatching` has those of its prompts.
        max_grad_norm: longer hypergradients are scaled to this Euclidean norm; None leaves them.
        seed: of the samples, and of the order of prompts and pairs.
        reference: p_0, for the inner loss that is told; None where β weighs entropy.

    Raises:
        ValueError: a reward without parameters to learn, an outer optimiser of others, parameters that are the
            policy's too, an argument out of range; with `MomentMatching` no prompt that both data have; numbers that
            processes cannot share out evenly.
        TypeError: another hypergradient method.
    """

    def __init__(
        self, policy: nn.Module, tokenizer: Tokenizer, reward: TextReward, *, inner: Pairs, outer: Pairs,
        outer_optimizer: Optimizer, coefficient: float, hypergradient: Any = None,
        sampling: Sampling | None = None, num_prompts: int | None = 32, outer_rows: int | None = 256,
        max_grad_norm: float | None = None, seed: int = 0, reference: TokenPolicy | None = None,
    ) -> None:  # fmt: skip
        self._processes = Processes.of(policy)
        self.policy: TokenPolicy = unwrapped(policy, TokenPolicy)
        self.reward: TextReward = reward
        self.outer_optimizer: Optimizer = outer_optimizer
        self._method = FisherCG(coefficient, 1e-2, 20) if hypergradient is None else hypergradient
        if not isinstance(self._method, SampledMethod):
            raise TypeError(
                f"RewardLearner: hypergradient: expected FisherCG or MomentMatching, got {type(self._method).__name__}"
            )
        self._sampling = Sampling(16, 32) if sampling is None else sampling
        if self._sampling.temperature not in (None, self.policy.temperature) or self._sampling.top_p != 1:
            raise ValueError(
                f"RewardLearner: sampling: expected the policy's own temperature and top_p 1, got {self._sampling}"
            )
        if self._sampling.num_samples < 2 and not isinstance(self._method, MomentMatching):
            raise ValueError(
                f"RewardLearner: sampling: expected at least 2 samples of a prompt, which are compared, got "
                f"{self._sampling.num_samples}"
            )
        training.check_norm("max_grad_norm", max_grad_norm)
        if not 0 < coefficient < math.inf:
            raise ValueError(f"RewardLearner: coefficient: expected a finite positive number, got {coefficient}")
        self._processes.equal(reward)
        self._phi = learned_names(reward)
        self._theta = [name for name, p in self.policy.named_parameters() if p.requires_grad]
        check_learned(self.policy, reward, outer_optimizer)
        self._tokenizer, self._reference = tokenizer, reference
        self._coefficient, self._max_grad_norm = coefficient, max_grad_norm
        self._moments = isinstance(self._method, MomentMatching)
        self._inner, self._outer = _shared(inner, outer) if self._moments else (inner, outer)
        self._pairs = self._outer.each()
        self._prompts = self._stream("num_prompts", len(self._inner.prompts), num_prompts, seed)
        self._rows = self._stream("outer_rows", len(self._pairs), None if self._moments else outer_rows, seed + 1)
        self._solution: Tensors | None = None
        self._number = 0

    def _stream(self, name: str, count: int, size: int | None, seed: int) -> RowStream:
        size = count if size is None else min(size, count)
        training.check_count(f"RewardLearner: {name}", size, 1)
        self._processes.check(f"RewardLearner: {name}", size)
        return RowStream(count, size, seed, drop_last=True)

    def evaluate(self) -> Hypergradient:
        """The hypergradient at the policy as it is, of a new draw of prompts, completions and pairs.

        Raises:
            NonFiniteError, ValueError: as the method.
        """
        drawn, seed = self._prompts.draw()
        rows, offset = self._processes.share(_numbers(drawn))
        pairs = self._pairs_of(rows)
        theta, phi = named(self.policy, self._theta), named(self.reward, self._phi)
        substituted = Substitution(self.policy, self._theta, self.reward, self._phi)
        with evaluating(self.policy):
            found = rollout(
                self.policy, self._tokenizer, self.reward, self._inner, rows, self._sampling, seed, offset
            )  # fmt: skip
            objective = self._objective(found, rows, substituted, theta, phi)
            result = self._method(objective, self._outer_loss(pairs, substituted), theta, phi, start=self._solution)
        self._solution = result.solution
        return result

    def step(self) -> OuterStep:
        """A step of the outer optimiser along the hypergradient; what it did, before its update.

        Raises:
            NonFiniteError, ValueError: as the method.
        """
        result = self.evaluate()
        done = OuterStep.of(self._number, result, self.reward, inner_steps=0)
        self.update(result)
        return done

    def update(self, result: Hypergradient) -> None:
        """A step of the outer optimiser along a hypergradient."""
        phi = named(self.reward, self._phi)
        update_reward(phi, result.gradient, self.outer_optimizer, self._max_grad_norm)
        norm = training.norm_of([p.detach() for p in phi])
        training.check_finite(f"outer step {self._number}: the norm of the reward's parameters", norm)
        self._number += 1

    def state(self) -> dict[str, Any]:
        """Where the learner is, but for the reward's parameters."""
        return {
            "optimizer": self.outer_optimizer.state_dict(), "prompts": self._prompts.state(),
            "rows": self._rows.state(), "solution": self._solution, "number": self._number,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.outer_optimizer.load_state_dict(state["optimizer"])
        self._prompts.restore(state["prompts"])
        self._rows.restore(state["rows"])
        self._solution, self._number = state["solution"], state["number"]

    def _pairs_of(self, rows: list[int]) -> list[tuple[str, str]]:
        """The pairs of the outer loss."""
        if self._moments:
            return [(self._outer.prompts[row], answer) for row in rows for answer in self._outer.answers[row]]
        drawn, _ = self._rows.draw()
        return [self._pairs[row] for row in self._processes.share(_numbers(drawn))[0]]

    def _outer_loss(self, pairs: list[tuple[str, str]], substituted: Substitution) -> Callable[..., Tensor]:
        loss = nll(self.policy, self._tokenizer, pairs)
        share = self._global_share(len(pairs))

        def outer(theta: Tensors, phi: Tensors) -> Tensor:
            return share * substituted(theta, phi, loss)

        # Nothing is drawn in evaluation mode.
        outer.repeatable = isinstance(self.policy.model, Decoder)  # type: ignore[attr-defined]
        return outer

    def _global_share(self, count: int) -> float:
        """What makes an average over processes of means over `count` each the mean over all."""
        return count / float(self._processes.average(torch.tensor(float(count), dtype=torch.float64)))

    def _objective(
        self, drawn: Rollout, rows: list[int], substituted: Substitution, theta: Tensors, phi: Tensors
    ) -> SampledObjective:  # fmt: skip
        tokens, keep = drawn.completions.tokens, drawn.keep.reshape(-1)
        number, times = drawn.keep.shape

        def log_prob(theta: Tensors) -> Tensor:
            return substituted(theta, phi, self.policy.log_prob, drawn.prompts, tokens)[keep]

        def rewards(phi: Tensors) -> Tensor:
            return substituted(theta, phi, drawn.rewards, self.reward).reshape(-1)[keep]

        reference = None
        if self._reference is not None:
            with torch.no_grad():
                reference = self._reference.log_prob(drawn.prompts, tokens)[keep]
        options: dict[str, Any] = {
            "coefficient": self._coefficient, "reference": reference, "average": self._processes.average,
        }  # fmt: skip
        if not self._moments:
            index = torch.arange(number, device=keep.device).repeat_interleave(times)[keep]
            return SampledObjective(log_prob, rewards, index=index, **options)
        # A prompt counts as often as it has pairs; one of whose completions none is kept tells nothing.
        features, mean = grouped(self.reward.features, [self._outer.answers[row] for row in rows])
        of_data = drawn._replace(
            features=features.to(keep.device), keep=(mean > 0) & drawn.keep.any(dim=1, keepdim=True).to(mean.device),
            factor=torch.ones_like(mean.mT),
        )  # fmt: skip
        counts, kept = (each.sum(dim=1, keepdim=True).double() for each in (of_data.keep, drawn.keep))
        scale = 1.0 / max(float(self._processes.average(counts.sum())), 1.0)
        weight = scale * (counts / kept.clamp(min=1.0)).expand(number, times).reshape(-1)[keep]

        def data_rewards(phi: Tensors) -> Tensor:
            found = substituted(theta, phi, of_data.rewards, self.reward)
            return scale * found[of_data.keep].sum()

        return SampledObjective(
            log_prob, rewards, advantage="none", weight=weight, data_reward=data_rewards, **options
        )  # fmt: skip


def nll(policy: TokenPolicy, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> Callable[[], Tensor]:
    """The mean negative log-likelihood of answers, nats a pair, as a function of the policy's parameters."""
    device = next(policy.parameters()).device
    prompts = prompt_tokens(tokenizer, [prompt for prompt, _ in pairs], device)
    answers = answer_tokens(tokenizer, [answer for _, answer in pairs], device)
    return lambda: -policy.log_prob(prompts, answers).mean()


def _shared(inner: Pairs, outer: Pairs) -> tuple[Pairs, Pairs]:
    """The answers in both data of the prompts that both have."""
    answers = dict(zip(*outer, strict=True))
    both = [(prompt, each) for prompt, each in zip(*inner, strict=True) if prompt in answers]
    if not both:
        raise ValueError(
            "RewardLearner: outer: expected prompts that inner has too, with answers of their own, for "
            "MomentMatching, got none; use FisherCG"
        )
    prompts = tuple(prompt for prompt, _ in both)
    return Pairs(prompts, tuple(each for _, each in both)), Pairs(prompts, tuple(answers[each] for each in prompts))


def _numbers(rows: Tensor | None) -> list[int]:
    return [] if rows is None else rows.tolist()  # the streams of this module have a size
