"""The terms of a policy loss: ratios, surrogates, divergences and statistics, of tokens or whole sequences."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _segments

# Of VESPO (k, λ for A ≥ 0 and A < 0), as TRL's defaults have them.
_VESPO = ((2.0, 3.0), (3.0, 2.0))


class PolicyStats(NamedTuple):
    """Detached statistics of a `policy_loss`, each (); means are over the tokens that count.

    Attributes:
        ratio_mean, ratio_max: of ρ, before clipping.
        clip_fraction_low, clip_fraction_high: share of tokens whose ratio a lower or an upper bound replaced.
        kl_k1, kl_k3: estimates of the divergence from the reference, KL(policy || reference), in nats a token; without
            `ref_log_prob`, from the old policy, KL(old || policy).
        entropy: mean of `entropy`, nan without one.
        effective_sample_size: (Σw)² / Σw² of w = ρ · weight over tokens.
        tokens: how many count.
        objective: Monte-Carlo estimate of what is maximised, aggregated like the loss: ρ · weight · A without clipping,
            less the divergence, plus the entropy bonus. On-policy it is a value where the loss of "reinforce" is none.
        non_finite: how many tokens have a loss that is nan or infinite.
    """

    ratio_mean: Tensor
    ratio_max: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    kl_k1: Tensor
    kl_k3: Tensor
    entropy: Tensor
    effective_sample_size: Tensor
    tokens: Tensor
    objective: Tensor
    non_finite: Tensor


class Sequences(NamedTuple):
    """How tokens make up sequences: as rows of (B, T), or one after the other in (N,).

    Attributes:
        mask: which tokens count, in the tokens' shape.
        number: B.
        owner: of packed tokens the number of the sequence that each is in.
        valid: () True where what could not be checked holds; None if there is no such thing.
    """

    mask: Tensor
    number: int
    owner: Tensor | None = None
    valid: Tensor | None = None

    def sums(self, tokens: Tensor) -> Tensor:
        """(B,) sums over each sequence."""
        if self.owner is None:
            return tokens.sum(dim=1)
        return _segments.sums(tokens, self.owner, self.number).to(tokens.dtype)

    def spread(self, sequences: Tensor) -> Tensor:
        """(B,) to its tokens."""
        return sequences.unsqueeze(1) if self.owner is None else sequences[self.owner]

    def lengths(self, dtype: torch.dtype) -> Tensor:
        """(B,) tokens that count, at least 1."""
        return self.sums(self.mask.to(dtype)).clamp(min=1.0)


class Surrogate(NamedTuple):
    """A surrogate by name, with its ratio, the bounds that replace ρ or its logarithm, and the temperatures."""

    name: str
    ratio: str
    low: float
    high: float
    dual_clip: float | None
    tau: tuple[float, float]


def log_ratio(ratio: str, delta: Tensor, sequences: Sequences) -> Tensor:
    """u, of each token or, for "sequence_mean" and "sequence_sum", (B,)."""
    if ratio == "token":
        return delta
    total = sequences.sums(delta)
    if ratio == "sequence_sum":
        return total
    mean = total / sequences.lengths(delta.dtype)
    return mean if ratio == "sequence_mean" else sequences.spread(mean.detach()) + (delta - delta.detach())


def divergence(kl: str, placement: str, x: Tensor, ratios: Tensor) -> Tensor:
    square = 0.5 * x.square()
    value = {"k1": lambda: -x, "abs": x.abs, "k2": lambda: square, "k3": lambda: torch.expm1(x) - x}[kl]()
    if placement == "loss_times_ratio":
        return ratios * value
    return square + (value - square).detach() if placement == "straight_through" else value


def _either(condition: Tensor, numbers: tuple[float, float], like: Tensor) -> Tensor:
    """One of two numbers, in the dtype of `like`: torch.where has two numbers in float32."""
    first, second = (torch.full((), x, dtype=like.dtype, device=like.device) for x in numbers)
    return torch.where(condition, first, second)


def replaced_ratio(how: Surrogate, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What -A is multiplied with by "clip", "is" and "sapo", and where a lower and an upper bound is in ρ's place.

    A ratio that a bound replaces is left out before exp, whose derivative would otherwise make nan of an overflow.
    """
    ratio, negative = log_ratio.detach().exp(), advantages < 0
    below = above = torch.zeros_like(ratio, dtype=torch.bool)
    if how.name == "sapo":
        tau = _either(advantages > 0, how.tau, ratio)
        # Beyond exp(80) the sigmoid is 1 to all digits and its derivative 0.
        return torch.sigmoid(tau * (log_ratio.clamp(max=80.0).exp() - 1.0)) * (4.0 / tau), below, above
    bound = torch.ones_like(ratio)
    if how.name == "clip":
        below, above = negative & (ratio < how.low), (advantages > 0) & (ratio > how.high)
        bound = torch.where(below, bound * how.low, bound * how.high)
    if how.dual_clip is not None:
        beyond = ratio > how.dual_clip
        beyond = negative & beyond if how.name == "clip" else beyond
        bound, above = torch.where(beyond, how.dual_clip, bound), above | beyond
    replaced = below | above
    return torch.where(replaced, bound, torch.where(replaced, 0.0, log_ratio).exp()), below, above


def factor(
    how: Surrogate, log_ratio: Tensor, advantages: Tensor, delta: Tensor, sequences: Sequences
) -> tuple[Tensor | float, Tensor, Tensor]:
    """The constant that -A log_prob is multiplied with by "cispo", "vespo" and "reinforce", and bounds as above."""
    ratio = log_ratio.detach().exp()
    none = torch.zeros_like(ratio, dtype=torch.bool)
    if how.name == "cispo":
        return ratio.clamp(how.low, how.high), ratio < how.low, ratio > how.high
    if how.name == "reinforce":
        return 1.0, none, none
    # φ is 0 beyond exp(20).
    weight = sequences.spread(sequences.sums(delta.detach())).clamp(max=20.0)
    k, rate = (_either(advantages >= 0, pair, weight) for pair in zip(*_VESPO, strict=True))
    return torch.exp(rate + k * weight - rate * weight.exp()), none, none


def geometric_mean(
    how: Surrogate, advantages: Tensor, delta: Tensor, sequences: Sequences, log_ratio_max: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    below, above = (advantages < 0) & (delta < -how.low), (advantages > 0) & (delta > how.high)
    clipped = torch.where(below, -how.low, torch.where(above, how.high, delta))
    mean = sequences.sums(clipped) / sequences.lengths(delta.dtype)
    if log_ratio_max is not None:
        mean = mean.clamp(-log_ratio_max, log_ratio_max)
    return mean.exp(), below, above


def statistics(
    inside: Tensor, ratios: Tensor, clipped: tuple[Tensor, Tensor], x: Tensor, entropy: Tensor | None, weights: Tensor,
    terms: Tensor, objective: Tensor,
) -> PolicyStats:  # fmt: skip
    tokens = inside.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(inside, values, 0.0).sum() / tokens.clamp(min=1)

    counted = torch.where(inside, weights, 0.0)
    largest = torch.where(inside, ratios, 0.0).reshape(-1)
    return PolicyStats(
        mean(ratios),
        torch.cat([largest.new_zeros(1), largest]).amax(),
        mean(clipped[0].to(ratios.dtype)),
        mean(clipped[1].to(ratios.dtype)),
        mean(-x),
        mean(torch.expm1(x) - x),
        largest.new_full((), math.nan) if entropy is None else mean(entropy.detach()),
        counted.sum().square() / counted.square().sum().clamp(min=torch.finfo(counted.dtype).tiny),
        tokens,
        objective,
        (~terms.isfinite()).sum(),
    )
