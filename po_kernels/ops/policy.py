"""The loss of a policy from the log-probabilities of its actions: every algorithm's is options of one function.

Plain torch. What is computed here is smaller than the log-probabilities' own work by the size of a vocabulary.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import dispatch
from . import _check, _first_order, _modes, _policy_terms
from ._policy_terms import PolicyStats, Sequences, Surrogate
from ._types import ActionOptions, Aggregation, Divergence, Placement, Ratio, SurrogateName

__all__ = ["PolicyStats", "policy_loss"]

RATIOS = ("token", "sequence_mean", "sequence_mean_token", "sequence_sum")
SURROGATES = ("clip", "is", "sapo", "geo_mean", "cispo", "vespo", "reinforce")
DIVERGENCES = ("k1", "abs", "k2", "k3")
PLACEMENTS = ("loss", "loss_times_ratio", "straight_through", "reward")
AGGREGATIONS = (
    "token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm",
)  # fmt: skip

# Why a choice has a first derivative only, and what has a second. All stop a gradient that the second one needs.
_FIRST_ORDER = {
    "cispo": "surrogate='cispo' holds its ratio constant; use surrogate='clip' or 'is'",
    "vespo": "surrogate='vespo' holds its weight constant; use surrogate='is' with ratio='sequence_sum'",
    "reinforce": "surrogate='reinforce' is right to first order only; use surrogate='is' with ratio='sequence_sum', "
    "which has the same gradient at the old policy and the right Hessian",
    "sequence_mean_token": "ratio='sequence_mean_token' holds the sequence's ratio constant; use ratio='sequence_mean' "
    "or 'sequence_sum'",
    "straight_through": "kl_placement='straight_through' has the gradient of another function than its value; use "
    "kl_placement='loss_times_ratio' with kl='k3', which has the same gradient at the old policy",
    "reward": "kl_placement='reward' holds the divergence constant; use kl_placement='loss_times_ratio' with kl='k3'",
}


@overload
def policy_loss(
    log_prob: Tensor, advantages: Tensor, *,
    return_stats: Literal[False] = False, **options: Unpack[ActionOptions],
) -> Tensor:  # fmt: skip
    ...
@overload
def policy_loss(
    log_prob: Tensor, advantages: Tensor, *,
    return_stats: Literal[True], **options: Unpack[ActionOptions],
) -> tuple[Tensor, PolicyStats]:  # fmt: skip
    ...
@overload
def policy_loss(
    log_prob: Tensor, advantages: Tensor, *,
    return_stats: bool, **options: Unpack[ActionOptions],
) -> Tensor | tuple[Tensor, PolicyStats]:  # fmt: skip
    ...
def policy_loss(
    log_prob: Tensor,
    advantages: Tensor,
    *,
    old_log_prob: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ratio: Ratio = "token",
    surrogate: SurrogateName = "clip",
    clip: tuple[float | None, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    tau: tuple[float, float] = (1.0, 1.05),
    log_ratio_max: float | None = None,
    kl: Divergence = "k3",
    kl_coef: float = 0.0,
    kl_placement: Placement = "loss_times_ratio",
    entropy_coef: float | Tensor = 0.0,
    aggregation: Aggregation = "token_mean",
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PolicyStats]:
    """The loss of PPO, GRPO and their kin, from log-probabilities of tokens or, with (B,), of actions.

    With δ = log_prob - old_log_prob where `mask`, else 0, the log-ratio u is, by `ratio`:

    - "token": δ (PPO, arXiv 1707.06347);
    - "sequence_mean": the mean of δ over the sequence, one u and one term a sequence (GSPO, arXiv 2507.18071, eq. 7);
    - "sequence_mean_token": its value, with the derivative of the token's own δ (GSPO-token, eq. 14);
    - "sequence_sum": the sum of δ: the importance weight of the sequence.

    At the old policy all four have the policy gradient of a sequence's advantage as gradient, up to the length where
    they average. The Hessian of the expected reward is that of "sequence_sum" alone (with surrogate "is" and
    `seq_mean_token_mean`, where it is DiCE, arXiv 1802.05098): the second derivatives of the others exist and are those
    of this loss, not of the objective.

    With ρ = exp(u) and A the advantage, the term is, by `surrogate`:

    - "clip": max(-Aρ, -A clip(ρ, 1-ε_l, 1+ε_h)), and at most -A `dual_clip` where A < 0 (arXiv 1912.09729);
    - "is": -Aρ, or -A min(ρ, dual_clip);
    - "sapo": -A 4σ(τ(ρ-1))/τ, τ = `tau`[0] where A > 0, else `tau`[1] (arXiv 2511.20347);
    - "geo_mean": -A exp(mean of δ, each at most ε_h where A > 0, at least -ε_l where A < 0), a sequence (GMPO, arXiv
      2507.20673);
    - "cispo": -A stop(clamp(ρ, lo, hi)) log_prob (arXiv 2506.13585);
    - "vespo": -A stop(φ) log_prob, φ = w^k exp(λ(1-w)), w the importance weight of the sequence, (k, λ) = (2, 3) where
      A ≥ 0, else (3, 2) (as in TRL);
    - "reinforce": -A log_prob (Williams 1992).

    It is multiplied by `weight`, the divergence and the entropy bonus are added token by token, a sequence's term
    counting once for each of its tokens, and the whole is aggregated. All masked, the loss is 0 and so are its
    gradients. On-policy the value of a loss is the mean of -A, often 0: its gradient is what counts.

    Differentiable in log_prob, advantages, ref_log_prob, entropy and a tensor entropy_coef, twice, in reverse and
    forward mode. Where a stopped gradient makes the second derivative in log_prob wrong ("cispo", "vespo", "reinforce",
    "sequence_mean_token", and a divergence placed "straight_through" or in the "reward"), it raises and names what to
    use; the mixed derivative with the advantages exists for all.

    Args:
        log_prob: (B, T), or (B,) for actions: the same with T = 1. Packed, (N,) with `cu_seqlens`.
        advantages: (B,), one a sequence, or like log_prob; with a sequence's ratio or term (B,). Packed (N,) with N = B
            are read as (B,).
        old_log_prob: like log_prob, constant; None for log_prob itself: ρ = 1, with its derivative.
        ref_log_prob: like log_prob, of the reference policy.
        entropy: like log_prob, in nats.
        mask: like log_prob, True or 1 for tokens that count; None for all.
        weight: like log_prob, or (B,), constant: corrections and selections, such as `importance_weights`.
        ratio, surrogate: see above.
        clip: (ε_l, ε_h); for "geo_mean" bounds of the log-ratio; for "cispo" the bounds (lo, hi) of ρ themselves,
            (None, hi) as in TRL, (1-ε_l, 1+ε_h) as in verl; an upper one below 1 would bound nothing on-policy, and
            says that both are (ε_l, ε_h). The other surrogates have no use for it.
        dual_clip: c, at least 1+ε_h, for "clip" (TRL's delta is the same); above 0, the bound of "is".
        tau: temperatures of "sapo"; the others have no use for it.
        log_ratio_max: u is held within ± this, also the one that "vespo" has of its own. "reinforce" has no ratio but
            that of a divergence placed "loss_times_ratio".
        kl: estimate of KL(policy || reference) from x = ref_log_prob - log_prob: "k1" -x, "abs" |x|, "k2" x²/2,
            "k3" exp(x)-x-1 (Schulman 2020).
        kl_coef: its coefficient; 0 for none.
        kl_placement: "loss"; "loss_times_ratio", where ρ·k3 has the gradient of the divergence; "straight_through",
            with the value of `kl` and the gradient of "k2"; "reward", taken from A as a constant: from (B,) the
            sequence's sum. A baseline sees it only if it is taken from the rewards before.
        entropy_coef: λ of the bonus: a number, or a () tensor.
        aggregation: "token_mean" Σ/tokens, "token_sum" Σ, "seq_mean_token_mean" (1/B) Σ_b mean_t, "seq_mean_token_sum"
            (1/B) Σ, "seq_mean_token_sum_norm" Σ/(B · max_length). B counts sequences without a token too.
        normalizer: in place of the tokens of "token_mean" or of B: counts over ranks or accumulated batches. A number,
            or a () tensor.
        max_length: for "seq_mean_token_sum_norm", None for T; the others have no use for it.
        cu_seqlens: (B+1,) integers from 0 to N, where each sequence of packed tokens starts; all tokens count.
        return_stats: also return `PolicyStats`.

    Returns:
        loss, (); float32 for half-precision inputs. With return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: an argument of another type, shape or range, or constants that require grad. Values on
            a device are not read: there the loss is nan for a mask that is not 0 or 1, and for cu_seqlens that
            do not go from 0 to N.
        RuntimeError: a second derivative that would be wrong.

    Example:
        >>> log_prob = torch.zeros(2, 3, requires_grad=True)
        >>> loss = policy_loss(log_prob, torch.tensor([1.0, -1.0]), **policy_loss_preset("grpo"))
        >>> loss.backward()
        >>> log_prob.grad
        tensor([[-0.1667, -0.1667, -0.1667],
                [ 0.1667,  0.1667,  0.1667]])
    """
    op = "policy_loss"
    for name, choice, allowed in (
        ("ratio", ratio, RATIOS), ("surrogate", surrogate, SURROGATES), ("kl", kl, DIVERGENCES),
        ("kl_placement", kl_placement, PLACEMENTS), ("aggregation", aggregation, AGGREGATIONS),
    ):  # fmt: skip
        _check.choice(op, name, choice, allowed)
    how = _surrogate(ratio, surrogate, clip, dual_clip, tau)
    if log_ratio_max is not None:
        _check.positive(op, "log_ratio_max", log_ratio_max)
    if max_length is not None:
        _check.integer(op, "max_length", max_length, 1)
    kl_coef = _check.real(op, "kl_coef", kl_coef)
    bonus = isinstance(entropy_coef, Tensor) or _check.real(op, "entropy_coef", entropy_coef) != 0
    for name, needed, x, why in (
        ("ref_log_prob", kl_coef != 0, ref_log_prob, "kl_coef"),
        ("entropy", bonus, entropy, "entropy_coef"),
    ):
        if needed and x is None:
            raise ValueError(f"{op}: {name}: expected a tensor with {why} other than 0, got None")
    _check.flag(op, "return_stats", return_stats)

    given = {"log_prob": log_prob, "advantages": advantages, "old_log_prob": old_log_prob, "ref_log_prob": ref_log_prob,
             "entropy": entropy, "weight": weight}  # fmt: skip
    tensors: dict[str, Any] = {k: x for k, x in given.items() if x is not None or k in ("log_prob", "advantages")}
    found = dict(zip(tensors, map(_modes.kept, _check.floating(op, list(tensors), *tensors.values())), strict=True))
    for name, constant in (("old_log_prob", old_log_prob), ("weight", weight), ("normalizer", normalizer)):
        _check.constant(op, name, constant)
    sequences = _sequences(found["log_prob"], mask, cu_seqlens)
    spread, shape, number = sequences.spread, sequences.shape, sequences.number
    for name, x in found.items():
        each = [(number,)] if name in ("advantages", "weight") else []
        _check.has_shape(op, name, x, *each, *([] if shape in each else [shape]))
        if x.shape not in each:
            # Before anything is computed: what stands in a masked place may be nan or infinite.
            found[name] = sequences.kept(x)
    log_prob, advantages, weight = found["log_prob"], found["advantages"], found.get("weight")
    by_sequence = advantages.shape == (number,)
    if not by_sequence and (ratio != "token" or surrogate == "geo_mean"):
        chosen = "surrogate='geo_mean'" if surrogate == "geo_mean" else f"ratio={ratio!r}"
        raise ValueError(
            f"{op}: advantages: expected shape ({number},), one a sequence, with {chosen}, got {tuple(shape)}"
        )
    reasons = [_FIRST_ORDER[each] for each in (surrogate, ratio) if each in _FIRST_ORDER]
    if kl_coef and (kl_placement == "reward" or (kl_placement == "straight_through" and kl != "k2")):
        reasons.append(_FIRST_ORDER[kl_placement])
    if reasons:
        log_prob = _first_order.first_order(log_prob, f"{op}: no second derivative in log_prob: {reasons[0]}")

    old = found.get("old_log_prob")
    delta = log_prob - (log_prob.detach() if old is None else old)
    log_ratio = _policy_terms.log_ratio(ratio, delta, sequences)
    if log_ratio_max is not None:
        log_ratio = log_ratio.clamp(-log_ratio_max, log_ratio_max)
    whole = ratio in ("sequence_mean", "sequence_sum")

    def to_tokens(x: Tensor) -> Tensor:
        return spread(x) if whole else x

    extra: Tensor | None = None
    # As large as the dtype holds: infinite ones would make nan of a divergence of 0.
    largest = math.floor(math.log(torch.finfo(log_ratio.dtype).max))
    ratios = to_tokens(log_ratio.clamp(max=largest).exp()) if kl_coef or return_stats else log_ratio
    if kl_coef:
        extra = kl_coef * _policy_terms.divergence(kl, kl_placement, found["ref_log_prob"] - log_prob, ratios)
        if kl_placement == "reward":
            penalty, extra = extra.detach(), None
            advantages = advantages - (sequences.sums(penalty) if by_sequence else penalty)
    by_token = spread(advantages) if by_sequence else advantages
    if surrogate in ("cispo", "vespo", "reinforce"):
        factor, bounded = _policy_terms.constant_ratio(
            how, to_tokens(log_ratio), by_token, delta, sequences, log_ratio_max
        )
        terms = -by_token * factor * log_prob
    elif surrogate == "geo_mean":
        factor, bounded = _policy_terms.geometric_mean(how, advantages, delta, sequences, log_ratio_max)
        terms = spread(-advantages * factor)
    else:
        at_ratio = advantages if whole else by_token
        factor, bounded = _policy_terms.replaced_ratio(how, log_ratio, at_ratio)
        terms = to_tokens(-at_ratio * factor)
        bounded = bounded and (to_tokens(bounded[0]), to_tokens(bounded[1]))
    if weight is not None:
        weight = sequences.kept((spread(weight) if weight.shape == (number,) else weight).expand(shape))
        terms = terms * weight
    if bonus:
        cost = -_check.coefficient(op, entropy_coef, log_prob) * found["entropy"]
        extra = cost if extra is None else extra + cost
    terms = sequences.kept((terms if extra is None else terms + extra).expand(shape))

    def aggregated(tokens: Tensor) -> Tensor:
        return _aggregated(tokens, sequences, aggregation, normalizer, max_length)

    loss = aggregated(terms)
    if sequences.valid is not None:
        loss = torch.where(sequences.valid, loss, math.nan)
    if not return_stats:
        return loss
    with torch.no_grad():
        weights = ratios.detach() if weight is None else ratios.detach() * weight
        gain = weights * by_token if extra is None else weights * by_token - extra
        objective = aggregated(sequences.kept(gain.expand(shape)).detach())
        x = found["ref_log_prob"] - log_prob if ref_log_prob is not None else delta
        stats = _policy_terms.statistics(
            sequences, ratios.detach(), bounded, x.detach(), found.get("entropy"), weights, terms.detach(), objective
        )
    return loss, stats


def _surrogate(ratio: str, name: str, clip: Any, dual_clip: float | None, tau: Any) -> Surrogate:
    op = "policy_loss"
    own = {"geo_mean": "sequence_mean", "vespo": "sequence_sum"}.get(name, ratio)
    if ratio not in ("token", own):
        raise ValueError(f"{op}: ratio: expected 'token' or {own!r}, its own, with surrogate={name!r}, got {ratio!r}")
    for given, what in ((clip, "clip"), (tau, "tau")):
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise TypeError(f"{op}: {what}: expected two numbers, got {given!r}")
    unbounded = clip[0] is None and name == "cispo"
    low, high = -math.inf if unbounded else _check.real(op, "clip", clip[0]), _check.real(op, "clip", clip[1])
    if high < 0 or (low < 0 and not unbounded):
        raise ValueError(f"{op}: clip: expected numbers of at least 0, got {clip}")
    if name == "clip" or (name == "cispo" and high < 1):
        low, high = low if unbounded else 1 - low, 1 + high
    if name == "cispo" and not low <= 1 <= high:
        raise ValueError(
            f"{op}: clip: expected bounds of the ratio itself, on both sides of 1, with surrogate='cispo', such as "
            f"(None, 5.0) or (1-ε, 1+ε), got {clip}"
        )
    if dual_clip is not None:
        _check.real(op, "dual_clip", dual_clip)
        if name not in ("clip", "is"):
            raise ValueError(f"{op}: dual_clip: expected None with surrogate={name!r}, got {dual_clip}")
        if (name == "clip" and dual_clip < high) or dual_clip <= 0:
            least = f"a number of at least 1 + ε_h = {high}" if name == "clip" else "a positive number"
            raise ValueError(f"{op}: dual_clip: expected {least}, got {dual_clip}")
    temperatures = (_check.positive(op, "tau", tau[0]), _check.positive(op, "tau", tau[1]))
    return Surrogate(name, low, high, dual_clip, temperatures)


def _sequences(log_prob: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Sequences:
    op = "policy_loss"
    shape = log_prob.shape
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError(f"{op}: mask: expected None with cu_seqlens, whose tokens all count, got a tensor")
        if len(shape) != 1:
            raise ValueError(f"{op}: log_prob: expected shape (N,) with cu_seqlens, got {tuple(shape)}")
        starts = _check.integral(op, "cu_seqlens", cu_seqlens, log_prob)
        if starts.ndim != 1 or starts.shape[0] < 2:
            raise ValueError(f"{op}: cu_seqlens: expected shape (B+1,) with B of at least 1, got {tuple(starts.shape)}")
        tokens = shape[0]
        right = (starts[0] == 0) & (starts[-1] == tokens) & (starts.diff() >= 0).all()
        if dispatch.is_true(~right):
            raise ValueError(
                f"{op}: cu_seqlens: expected integers that go from 0 to {tokens}, the length of log_prob, without "
                f"falling, got {starts.tolist()}"
            )
        number = starts.shape[0] - 1
        ends = torch.zeros(tokens + 1, dtype=torch.int64, device=log_prob.device)
        ends = ends.index_add(0, starts[1:-1].clamp(0, tokens), torch.ones_like(starts[1:-1]))
        owner = ends[:tokens].cumsum(0)
        return Sequences(shape, log_prob.device, number, None, owner, right)
    if len(shape) not in (1, 2):
        raise ValueError(f"{op}: log_prob: expected shape (B, T), or (B,), got {tuple(shape)}")
    inside, valid = (None, None) if mask is None else _check.zero_or_one(op, "mask", mask, log_prob)
    inside = _modes.kept(inside)
    return Sequences(shape, log_prob.device, shape[0], inside, None, valid)


def _aggregated(
    tokens: Tensor, sequences: Sequences, aggregation: str, normalizer: float | Tensor | None, max_length: int | None
) -> Tensor:
    """() from terms that are 0 where masked."""
    op = "policy_loss"
    count: Any = normalizer
    if isinstance(normalizer, Tensor):
        if normalizer.is_complex() or normalizer.dtype == torch.bool:
            raise TypeError(f"{op}: normalizer: expected a real number or tensor, got {normalizer.dtype}")
        _check.has_shape(op, "normalizer", normalizer, ())
        count = _modes.kept(normalizer.to(tokens.device, tokens.dtype))
        count = torch.where((count > 0) & count.isfinite(), count, math.nan)  # where it cannot be read
    elif normalizer is not None:
        count = _check.real(op, "normalizer", normalizer)
    if count is not None and (dispatch.is_true(~(count > 0)) if isinstance(count, Tensor) else not count > 0):
        raise ValueError(f"{op}: normalizer: expected a number above 0, got {normalizer}")
    if aggregation == "token_sum":
        if normalizer is not None:
            raise ValueError(f"{op}: normalizer: expected None with aggregation='token_sum', got {normalizer}")
        return tokens.sum()
    if aggregation == "token_mean":
        return tokens.sum() / (sequences.tokens().clamp(min=1) if count is None else count)
    count = max(sequences.number, 1) if count is None else count
    if aggregation == "seq_mean_token_mean":
        return (sequences.sums(tokens) / sequences.lengths(tokens)).sum() / count
    if aggregation == "seq_mean_token_sum":
        return tokens.sum() / count
    if max_length is None:
        if sequences.owner is not None:
            raise ValueError(f"{op}: max_length: expected an integer with {aggregation!r} and cu_seqlens, got None")
        max_length = max(tokens.shape[1], 1) if tokens.ndim == 2 else 1
    return tokens.sum() / (count * max_length)
