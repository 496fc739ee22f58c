"""The terms of a policy loss: ratios, surrogates, divergences and statistics, of tokens or whole sequences."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _segments

_TINY = torch.finfo(torch.float32).tiny
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

    Example:
        >>> import torch, po_kernels as pk
        >>> preset = pk.policy_loss_preset("ppo")
        >>> loss, stats = pk.policy_loss(torch.zeros(5), torch.ones(5), return_stats=True, **preset)
        >>> isinstance(stats, pk.PolicyStats), stats.ratio_mean
        (True, tensor(1.))
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
    """How tokens make up sequences: as rows of (B, T), each by itself in (B,), or one after the other in (N,).

    Attributes:
        shape, device: of the tokens.
        number: B.
        mask: which tokens count, None for all.
        owner: of packed tokens the number of the sequence that each is in.
        valid: () True where what could not be checked holds; None if there is no such thing.
    """

    shape: torch.Size
    device: torch.device
    number: int
    mask: Tensor | None = None
    owner: Tensor | None = None
    valid: Tensor | None = None

    def sums(self, tokens: Tensor) -> Tensor:
        """(B,) sums over each sequence."""
        if self.owner is not None:
            return _segments.sums(tokens, self.owner, self.number).to(tokens.dtype)
        return tokens.sum(dim=1) if len(self.shape) == 2 else tokens

    def spread(self, sequences: Tensor) -> Tensor:
        """(B,) to its tokens."""
        if self.owner is not None:
            return sequences[self.owner]
        return sequences.unsqueeze(1) if len(self.shape) == 2 else sequences

    def kept(self, tokens: Tensor) -> Tensor:
        """0 where masked, in the shape of the tokens."""
        return tokens if self.mask is None else torch.where(self.mask, tokens, 0.0)

    def tokens(self) -> Tensor:
        """() how many count."""
        if self.mask is None:
            return torch.full((), math.prod(self.shape), dtype=torch.int64, device=self.device)
        return self.mask.sum()

    def lengths(self, like: Tensor) -> Tensor | int:
        """(B,) tokens that count, at least 1."""
        if self.mask is None and self.owner is None:
            return max(self.shape[1], 1) if len(self.shape) == 2 else 1
        each = torch.ones_like(like) if self.mask is None else self.mask.to(like.dtype)
        return self.sums(each).clamp(min=1.0)


class Surrogate(NamedTuple):
    """A surrogate by name, the bounds that replace ρ or its logarithm, and the temperatures."""

    name: str
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
    mean = total / sequences.lengths(delta)
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


# Each of these returns what -A, or -A log_prob, is multiplied with, and a pair of ratios or their logarithms before and
# after bounds, None where there are none.
Bounded = tuple[Any, tuple[Tensor, Tensor] | None]


def _endless(ratio: Tensor, advantages: Tensor) -> Tensor:
    """Where a ratio is inf: of no advantage it is no loss."""
    return ratio.isinf() & (advantages.detach() == 0)


def replaced_ratio(how: Surrogate, log_ratio: Tensor, advantages: Tensor) -> Bounded:
    """Of "clip", "is" and "sapo": ρ, or what a bound puts in its place.

    A ratio that is replaced is left out before exp, whose derivative would otherwise make nan of an overflow.
    """
    if how.name == "sapo":
        tau = _either(advantages > 0, how.tau, log_ratio)
        # Beyond exp(80) the sigmoid is 1 to all digits and its derivative 0.
        return torch.sigmoid(tau * (log_ratio.clamp(max=80.0).exp() - 1.0)) * (4.0 / tau), None
    ratio = log_ratio.detach().exp()
    endless = _endless(ratio, advantages)
    if how.name == "clip":
        bound = ratio.clamp(how.low, how.high)
        replaced = ((ratio - bound) * advantages.detach() > 0) | endless
        if how.dual_clip is not None:
            beyond = (ratio > how.dual_clip) & (advantages < 0)
            bound, replaced = torch.where(beyond, how.dual_clip, bound), replaced | beyond
    elif how.dual_clip is not None:
        bound = ratio.clamp(max=how.dual_clip)
        replaced = ratio > bound
    else:
        return log_ratio.masked_fill(endless, 0.0).exp(), None
    found = torch.where(replaced, bound, log_ratio.masked_fill(replaced, 0.0).exp())
    return found, (ratio, found.detach())


def constant_ratio(
    how: Surrogate, log_ratio: Tensor, advantages: Tensor, delta: Tensor, sequences: Sequences,
    log_ratio_max: float | None,
) -> Bounded:  # fmt: skip
    """Of "cispo", "vespo" and "reinforce"."""
    if how.name == "reinforce":
        return 1.0, None
    if how.name == "cispo":
        ratio = log_ratio.detach().exp()
        bounded = ratio.clamp(how.low, how.high)
        return bounded, (ratio, bounded)
    # φ is 0 beyond exp(20).
    most = math.inf if log_ratio_max is None else log_ratio_max
    weight = sequences.spread(sequences.sums(delta.detach())).clamp(-most, min(most, 20.0))
    k, rate = (_either(advantages >= 0, pair, weight) for pair in zip(*_VESPO, strict=True))
    return torch.exp(rate + k * weight - rate * weight.exp()), None


def geometric_mean(
    how: Surrogate, advantages: Tensor, delta: Tensor, sequences: Sequences, log_ratio_max: float | None
) -> Bounded:
    by_token = sequences.spread(advantages)
    below, above = (by_token < 0) & (delta < -how.low), (by_token > 0) & (delta > how.high)
    clipped = torch.where(below, -how.low, torch.where(above, how.high, delta))
    mean = sequences.sums(clipped) / sequences.lengths(delta)
    if log_ratio_max is not None:
        mean = mean.clamp(-log_ratio_max, log_ratio_max)
    return mean.masked_fill(_endless(mean.detach().exp(), advantages), 0.0).exp(), (delta.detach(), clipped.detach())


def statistics(
    sequences: Sequences, ratios: Tensor, bounded: tuple[Tensor, Tensor] | None, x: Tensor, entropy: Tensor | None,
    weights: Tensor, terms: Tensor, objective: Tensor,
) -> PolicyStats:  # fmt: skip
    tokens = sequences.tokens()
    shape, kept = sequences.shape, sequences.kept

    def mean(values: Tensor) -> Tensor:
        return kept(values.expand(shape)).sum() / tokens.clamp(min=1)

    counted, largest = kept(weights.expand(shape)), kept(ratios.expand(shape)).reshape(-1)
    before, after = bounded or (ratios, ratios)
    # Relative to the largest, for squares neither to overflow nor to vanish.
    share = counted / torch.cat([counted.abs().reshape(-1), counted.new_zeros(1)]).amax().clamp(min=_TINY)
    return PolicyStats(
        mean(ratios),
        torch.cat([largest.new_zeros(1), largest]).amax(),
        mean((after > before).to(x.dtype)),
        mean((after < before).to(x.dtype)),
        mean(-x),
        mean(torch.expm1(x) - x),
        largest.new_full((), math.nan) if entropy is None else mean(entropy.detach()),
        share.sum().square() / share.square().sum().clamp(min=_TINY),
        tokens,
        objective,
        (~terms.isfinite()).sum(),
    )
