"""The distance between two policies of tokens: importance weights against a sampler, divergences from a reference."""

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import _check
from ._types import Direction, Level, Mode

__all__ = ["importance_weights", "token_kl"]


def importance_weights(
    log_prob: Tensor,
    sampler_log_prob: Tensor,
    mask: Tensor | None,
    *,
    level: Level,
    mode: Mode,
    bounds: tuple[float | None, float | None],
    log_support: Tensor | None = None,
) -> Tensor:
    """Weights for the difference between the policy that is trained and the one that sampled, such as an engine's.

    w = exp(log_prob - sampler_log_prob), of each token or with the sum over the sequence, within bounds: what TRL calls
    `token_truncate`, `token_mask`, `sequence_truncate` and `sequence_mask`, and verl's rollout correction (level
    "token" or "sequence", mode "truncate", bounds (None, threshold)). They are constants: hand them to `policy_loss` as
    `weight`.

    Args:
        log_prob: (B, T), or (B,) for sequences of one token, at the start of the update: TRL's and verl's old
            log-probabilities. Packed tokens have no sequences here: pad them.
        sampler_log_prob: like log_prob, as the sampler reports it.
        mask: like log_prob, True or 1 for tokens that count; None for all.
        level: "token", or "sequence" for one weight a sequence.
        mode: "truncate" to hold weights within the bounds, "mask" to make those outside 0.
        bounds: (least, most), either None for none.
        log_support: like log_prob: logarithm of the probability that the policy gives to all tokens that the sampler
            could have drawn, for one that renormalises what top-k or top-p leave. log_prob is taken relative to it.

    Returns:
        weights, like log_prob, detached; 0 where masked.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.

    Example:
        >>> policy, sampler = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -3.0, -1.5]])
        >>> importance_weights(policy, sampler, None, level="token", mode="truncate", bounds=(None, 2.0))
        tensor([[1.0000, 2.0000, 1.6487]])
    """
    op = "importance_weights"
    _check.choice(op, "level", level, ("token", "sequence"))
    _check.choice(op, "mode", mode, ("truncate", "mask"))
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"{op}: bounds: expected two numbers or None, got {bounds!r}")
    least, most = (None if x is None else _check.real(op, "bounds", x) for x in bounds)
    if any(x is not None and x < 0 for x in (least, most)) or (
        least is not None and most is not None and least >= most
    ):
        raise ValueError(f"{op}: bounds: expected numbers of at least 0 that rise, got {bounds}")
    given = {"log_prob": log_prob, "sampler_log_prob": sampler_log_prob, "log_support": log_support}
    tensors: dict[str, Any] = {name: x for name, x in given.items() if x is not None or name != "log_support"}
    tensors = dict(zip(tensors, _check.floating(op, list(tensors), *tensors.values()), strict=True))
    if log_prob.ndim not in (1, 2):
        raise ValueError(f"{op}: log_prob: expected shape (B, T), or (B,), got {_check.shape_of(log_prob)}")
    for name, x in tensors.items():
        _check.has_shape(op, name, x, log_prob.shape)
    inside = None
    if mask is not None:
        inside, valid = _check.zero_or_one(op, "mask", mask, log_prob)
    log_weight = (tensors["log_prob"] - tensors["sampler_log_prob"]).detach()
    if log_support is not None:
        log_weight = log_weight - tensors["log_support"].detach()
    if inside is not None:
        log_weight = torch.where(inside, log_weight, 0.0)
    if level == "sequence" and log_prob.ndim == 2:
        log_weight = log_weight.sum(dim=1, keepdim=True).expand(log_prob.shape)
    weight = log_weight.exp()
    if mode == "truncate":
        weight = weight if least is None and most is None else weight.clamp(least, most)
    else:
        for out in ([] if least is None else [weight < least]) + ([] if most is None else [weight > most]):
            weight = weight.masked_fill(out, 0.0)
    if inside is None:
        return weight
    weight = torch.where(inside, weight, 0.0)
    return weight if valid is None else torch.where(valid, weight, torch.nan)


def token_kl(
    logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0, direction: Direction = "reverse"
) -> Tensor:
    """Kullback-Leibler divergence between two distributions over a vocabulary, exact, in nats.

    Plain torch, differentiable in both, twice. A token that the first distribution does not have adds 0; one that it
    has and the second does not makes the divergence infinite.

    Args:
        logits: (*, V) of the policy; -inf masks a token.
        ref_logits: like logits.
        temperature: of both; above 0.
        direction: "reverse" for KL(policy || reference), "forward" for KL(reference || policy).

    Returns:
        divergence, (*); float32 for half-precision inputs.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; a row that is all -inf, whose values are not
            read on a device: there it is nan.

    Example:
        >>> token_kl(torch.tensor([0.0, 0.0, -torch.inf]), torch.zeros(3))
        tensor(0.4055)
    """
    op = "token_kl"
    first, second = _check.floating(op, ("logits", "ref_logits"), logits, ref_logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits: expected shape (*, V) with V of at least 1, got {_check.shape_of(logits)}")
    _check.has_shape(op, "ref_logits", ref_logits, logits.shape)
    _check.choice(op, "direction", direction, ("reverse", "forward"))
    _check.positive(op, "temperature", temperature)
    for name, x in (("logits", first), ("ref_logits", second)):
        masked = x.detach().amax(dim=-1).reshape(-1) == -torch.inf
        if dispatch.is_true(masked.any()):
            row = int(masked.nonzero()[0])
            raise ValueError(f"{op}: {name}: expected a logit above -inf in each row, got none in row {row}")
    p, q = (torch.log_softmax(x / temperature, dim=-1) for x in (first, second))
    if direction == "forward":
        p, q = q, p
    there = p.detach().exp() != 0
    missing = (p.detach() != -torch.inf) & (q.detach() == -torch.inf)
    # Chosen before the product: 0 · inf, and its derivatives, are nan.
    log_p, log_q = torch.where(there, p, 0.0), torch.where(there, q, 0.0)
    found = (torch.where(there, log_p.exp(), 0.0) * (log_p - log_q)).sum(dim=-1)
    return torch.where(missing.any(dim=-1), torch.inf, found)
