"""Group advantages."""

import numpy as np

from ..contract import Request
from .group import advantages, advantages_transposed, pull, surrogate_of, transform
from .rows import Served, kernel, served, valued


@kernel
def _advantage_kernel(chunks, rewards, s, cotangent, out, to_rewards):
    """All (G, B)."""
    reward, advantage, slope = np.empty(s.samples), np.empty(s.samples), np.empty(s.samples)
    for row in range(chunks.first, chunks.last):
        for g in range(s.samples):
            reward[g] = rewards[g, row]
        transform(s, reward)
        advantages(s.advantage, reward, advantage)
        for g in range(s.samples):
            out[g, row] = advantage[g]
        if to_rewards.size > 0:
            for g in range(s.samples):
                slope[g] = cotangent[g, row]
            advantages_transposed(s.advantage, reward, slope, advantage)
            for g in range(s.samples):
                to_rewards[g, row] = pull(s, slope[g], reward[g])
    return False


def _group_advantage(request: Request) -> Served:
    (rewards,) = request.inputs
    count, rows = rewards.shape
    out = rewards.new_empty(rewards.shape)
    return valued(request, _advantage_kernel, rows, out, rewards, surrogate_of(request.config, count))


KERNELS = served({"group_advantage": _group_advantage})
