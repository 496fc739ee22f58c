"""Generalised advantage estimation in plain torch."""

from typing import Any

import torch
from torch import Tensor

from ..contract import GOES_ON, TERMINATED, Definitions, OpConfig


def _gae(inputs: Any, constants: Any, config: OpConfig) -> Tensor:
    """A_t = δ_t + γλ A_{t+1} within an episode, in as many passes as the number of steps has bits.

    After k of them a step has the sum over 2^k steps, and the factor of what comes after.
    """
    (rewards, values), (ended, gamma, lam) = inputs, constants
    ahead = torch.where(ended != TERMINATED, gamma * values[1:], 0.0)
    total, step = rewards - values[:-1] + ahead, 1
    factor = torch.where(ended == GOES_ON, gamma * lam, 0.0).to(total.dtype)
    while step < rewards.shape[0]:
        here = factor[:-step]
        # Chosen, for nothing of the next episode, not even a nan, to reach this one.
        later = torch.where(here != 0, here * total[step:], 0.0)
        total = torch.cat([total[:-step] + later, total[-step:]])
        factor = torch.cat([here * factor[step:], torch.zeros_like(factor[-step:])])
        step *= 2
    return total


DEFINITIONS: Definitions = {"gae": _gae}
