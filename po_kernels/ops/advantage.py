"""Advantages over a group of samples."""

import math

from torch import Tensor

from ..backends.advantages import ADVANTAGES
from ..backends.contract import OpConfig
from . import _check
from ._evaluate import evaluate

__all__ = ["group_advantage"]


def group_advantage(
    rewards: Tensor, kind: str = "loo", *, rbf_gamma: float | None = None, backend: str | None = None
) -> Tensor:
    """Advantages of G samples against a baseline from their own group, of one of these kinds.

    {kinds}

    Args:
        rewards: (G, *), one group along the first axis.
        kind: one of the above.
        rbf_gamma: first replaces r by exp(rbf_gamma · r).
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        advantages, (G, *), differentiable in rewards.

    Raises:
        TypeError, ValueError: an argument of another type or range, or G = 1 with "loo".
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "group_advantage"
    (computed,) = _check.floating(op, ("rewards",), rewards)
    _check.choice(op, "kind", kind, tuple(ADVANTAGES))
    if rewards.ndim < 1:
        raise ValueError(f"{op}: rewards: expected shape (G, *), got ()")
    _check.group_size(op, "rewards", rewards.shape[0], kind)
    gamma = None if rbf_gamma is None else _check.real(op, "rbf_gamma", rbf_gamma)
    groups = computed.reshape(rewards.shape[0], math.prod(rewards.shape[1:]))
    config = OpConfig(num_samples=rewards.shape[0], advantage=kind, rbf_gamma=gamma)
    advantages, _ = evaluate(op, backend, (groups,), (), config)
    return advantages.reshape(rewards.shape).to(rewards.dtype)


group_advantage.__doc__ = (group_advantage.__doc__ or "").format(
    kinds="\n    ".join(f'- "{kind}": {advantage.formula}.' for kind, advantage in ADVANTAGES.items())
)
