"""Advantages of trajectories."""

import math

import torch
from torch import Tensor

from ..backends.contract import TRUNCATED, OpConfig
from . import _check
from ._evaluate import evaluate
from ._types import Backend

__all__ = ["gae"]


def gae(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    *,
    gamma: float,
    lam: float,
    truncated: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

        A_t = δ_t + γλ A_{t+1},   δ_t = r_t + γ V_{t+1} - V_t

    where an episode that ends with step t has no A_{t+1}, and no V_{t+1} unless it was cut off. It is linear: its
    adjoint is the scan in the other direction, and both are one pass over memory.

    Args:
        rewards: (T, *), T steps of any number of environments.
        values: (T+1, *), of the states before the steps and after the last. V_{t+1} after a step that was cut off has
            to be that of the state it led to: where an environment has been reset by then, add γ times that value to
            the reward instead and leave `truncated` out.
        dones: (T, *), True or 1 where an episode ended with this step.
        gamma: γ, discount, from 0 to 1.
        lam: λ, from 0 to 1.
        truncated: (T, *), True or 1 where it ended by a limit of time, its last state having a value; whether `dones`
            says so too is of no importance.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        (advantages, returns), each (T, *), returns = advantages + values[:-1]; both differentiable in rewards and
        values, float32 for half-precision inputs.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> rewards, values = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.5, 2.0])
        >>> gae(rewards, values, torch.tensor([False, True, False]), gamma=1.0, lam=0.5)
        (tensor([1.2500, 0.5000, 2.5000]), tensor([1.7500, 1.0000, 3.0000]))
    """
    op = "gae"
    rewards, values = _check.floating(op, ("rewards", "values"), rewards, values)
    if rewards.ndim < 1:
        raise ValueError(f"{op}: rewards: expected shape (T, *), got ()")
    steps, lead = rewards.shape[0], rewards.shape[1:]
    _check.has_shape(op, "values", values, (steps + 1, *lead))
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= _check.real(op, name, number) <= 1:
            raise ValueError(f"{op}: {name}: expected a number from 0 to 1, got {number}")
    done, *valid = _check.zero_or_one(op, "dones", dones, rewards)
    ended = done.to(torch.uint8)
    if truncated is not None:
        cut, *others = _check.zero_or_one(op, "truncated", truncated, rewards)
        ended, valid = ended.masked_fill(cut, TRUNCATED), valid + others
    rows = math.prod(lead)
    # As tensors, of which torch.compile makes no graph for each value.
    numbers = (torch.full((), x, dtype=torch.float64, device="cpu") for x in (gamma, lam))
    inputs = _check.rows(rewards, steps, rows), _check.rows(values, steps + 1, rows)
    advantages, _ = evaluate(op, backend, inputs, (_check.rows(ended, steps, rows), *numbers), OpConfig())
    for each in valid:
        advantages = advantages if each is None else torch.where(each, advantages, math.nan)
    advantages = _check.rows(advantages, *rewards.shape)
    return advantages, advantages + values[:-1]
