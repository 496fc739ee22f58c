"""Generalised advantage estimation: a kernel that scans over steps, columns in the inner loop."""

import numpy as np

from ..contract import GOES_ON, TERMINATED, Request
from .rows import Served, kernel, served, valued


@kernel
def _gae_kernel(chunks, rewards, values, ended, gamma, decay, cotangent, out, to_rewards, to_values):
    """rewards, ended, cotangent and out (T, B), values (T+1, B)."""
    steps, first = len(rewards), chunks.first
    carried, ahead = np.zeros(chunks.last - first), np.zeros(chunks.last - first)
    for t in range(steps - 1, -1, -1):
        for b in range(first, chunks.last):
            error = np.float64(rewards[t, b]) - values[t, b]
            if ended[t, b] != TERMINATED:
                error += gamma * values[t + 1, b]
            if ended[t, b] == GOES_ON:
                error += decay * carried[b - first]
            out[t, b] = carried[b - first] = error
    if to_rewards.size == 0 and to_values.size == 0:
        return False
    carried[:] = 0.0
    for t in range(steps + 1):
        for b in range(first, chunks.last):
            pull = 0.0
            if t < steps:
                pull = carried[b - first] + cotangent[t, b]
                if to_rewards.size > 0:
                    to_rewards[t, b] = pull
            if to_values.size > 0:
                to_values[t, b] = ahead[b - first] - pull
            if t < steps:
                ahead[b - first] = gamma * pull if ended[t, b] != TERMINATED else 0.0
                carried[b - first] = decay * pull if ended[t, b] == GOES_ON else 0.0
    return False


def _gae(request: Request) -> Served:
    (rewards, values), (ended, gamma, lam) = request.inputs, request.constants
    discount = float(gamma)
    arguments = (rewards, values, ended, discount, discount * float(lam))
    return valued(request, _gae_kernel, rewards.shape[1], rewards.new_empty(rewards.shape), *arguments)


KERNELS = served({"gae": _gae})
