"""Advantages over a group of samples."""

import math

import torch
from torch import Tensor

from .. import dispatch
from ..backends.advantages import ADVANTAGES, STANDARDIZED_EPS
from ..backends.contract import OpConfig
from . import _check, _modes, _segments
from ._evaluate import evaluate
from ._types import Advantage, Backend

__all__ = ["group_advantage"]


def group_advantage(
    rewards: Tensor,
    kind: Advantage = "loo",
    *,
    rbf_gamma: float | None = None,
    index: Tensor | None = None,
    std_ddof: int = 0,
    std_eps: float = STANDARDIZED_EPS,
    backend: Backend | None = None,
) -> Tensor:
    """Advantages of samples against a baseline from their own group, of one of these kinds.

    {kinds}

    TRL's GRPO has std_ddof=1 and std_eps=1e-4, verl's 1 and 1e-6. A group of one has no baseline: where `index` makes
    one its advantage is 0 for all kinds but "none", as in verl's vectorized RLOO; verl's GRPO and its other RLOO give
    such a sample its own reward. So it is for "standardized" with std_ddof=1.

    Args:
        rewards: (G, *), one group along the first axis; with index (N,).
        kind: one of the above.
        rbf_gamma: first replaces r by exp(rbf_gamma · r).
        index: (N,) integers: samples with the same number are a group, of any size, wherever they stand.
        std_ddof: what is taken from G in the denominator of the variance of "standardized": 0, or 1 for the unbiased
            estimate. The other kinds have no use for it, nor for std_eps.
        std_eps: what is added to its standard deviation.
        backend: name of the backend; None for the first that can serve the call. Groups by index, and another std_ddof
            or std_eps of "standardized", are plain torch: only the reference serves them.

    Returns:
        advantages, like rewards and differentiable in them.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range, or G = 1 with "loo".
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> group_advantage(torch.tensor([1.0, 5.0, 3.0, 7.0]), "mean", index=torch.tensor([8, 8, 2, 8]))
        tensor([-3.3333,  0.6667,  0.0000,  2.6667])
    """
    op = "group_advantage"
    (computed,) = _check.floating(op, ("rewards",), rewards)
    _check.choice(op, "kind", kind, tuple(ADVANTAGES))
    if rewards.ndim < 1:
        raise ValueError(f"{op}: rewards: expected shape (G, *), got ()")
    gamma = None if rbf_gamma is None else _check.real(op, "rbf_gamma", rbf_gamma)
    _check.integer(op, "std_ddof", std_ddof, 0)
    if std_ddof > 1:
        raise ValueError(f"{op}: std_ddof: expected 0 or 1, got {std_ddof}")
    if _check.real(op, "std_eps", std_eps) < 0:
        raise ValueError(f"{op}: std_eps: expected a number of at least 0, got {std_eps}")
    size, others = rewards.shape[0], math.prod(rewards.shape[1:])
    if index is None:
        _check.group_size(op, "rewards", size, kind)
        if kind != "standardized" or (std_ddof == 0 and std_eps == STANDARDIZED_EPS):
            config = OpConfig(num_samples=size, advantage=kind, rbf_gamma=gamma)
            advantages, _ = evaluate(op, backend, (computed.reshape(size, others),), (), config)
            return advantages.reshape(rewards.shape).to(rewards.dtype)
        owner, number = torch.arange(others, device=rewards.device).repeat(size), others
    else:
        owner = _check.integral(op, "index", index, rewards)
        if rewards.ndim != 1:
            raise ValueError(f"{op}: rewards: expected shape (N,) with index, got {_check.shape_of(rewards)}")
        _check.has_shape(op, "index", owner, rewards.shape)
        owner, number = _segments.numbered(owner), size
    name = _asked_for(op, backend)
    if name not in (None, "reference"):
        raise RuntimeError(
            f"{op}: backend {name!r} was asked for, but groups by index, std_ddof and std_eps are plain "
            "torch; use backend='reference'"
        )
    flat = computed.reshape(-1) if gamma is None else torch.exp(gamma * computed.reshape(-1))
    advantages = _ragged(flat.double(), kind, owner, number, std_ddof, std_eps)
    return advantages.reshape(rewards.shape).to(rewards.dtype)


@_modes.asked_once
def _asked_for(op: str, backend: str | None) -> str | None:
    return dispatch.requested(op, backend)[1]


def _ragged(rewards: Tensor, kind: str, owner: Tensor, number: int, ddof: int, eps: float) -> Tensor:
    """Advantages of rewards (N,) in groups that `owner` numbers below `number`."""

    def total(values: Tensor) -> Tensor:
        return _segments.sums(values, owner, number)[owner]

    def extreme(values: Tensor, which: str) -> Tensor:
        start = values.new_full((number,), math.inf if which == "amin" else -math.inf)
        return start.scatter_reduce(0, owner, values.detach(), which)[owner]

    if kind == "none":
        return rewards.clone()
    # On the least before the mean is taken: a group of equal rewards is then exactly zero.
    shifted = rewards - extreme(rewards, "amin")
    if kind == "min":
        return shifted
    size = total(torch.ones_like(rewards))
    centred = shifted - total(shifted) / size
    if kind == "mean":
        return centred
    if kind == "loo":
        return centred * (size / (size - 1).clamp(min=1))
    # Relative to the largest deviation, squares neither overflow nor vanish.
    unit = extreme(centred.abs(), "amax")
    unit = torch.where(unit != 0, unit, 1.0)
    variance = total((centred / unit).square()) / (size - ddof).clamp(min=1)
    varies = variance.detach() != 0  # a nan goes on as such
    std = torch.where(varies, variance, 1.0).sqrt() * unit
    return torch.where(varies, centred / (std + eps), 0.0)


group_advantage.__doc__ = (group_advantage.__doc__ or "").format(
    kinds="\n    ".join(f'- "{kind}": {advantage.formula}.' for kind, advantage in ADVANTAGES.items())
)
