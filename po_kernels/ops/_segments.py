"""Sums over segments: groups of samples, sequences of packed tokens."""

import torch
from torch import Tensor


def sums(values: Tensor, owner: Tensor, number: int) -> Tensor:
    """(number,) from (N,) values and the segment (N,) that each is in, in float64 and in a fixed order."""
    total = values.new_zeros(number, dtype=torch.float64)
    if values.is_cuda:  # of the two the one whose order is fixed there
        return total.index_put((owner,), values.double(), accumulate=True)
    return total.index_add(0, owner, values.double())


def numbered(index: Tensor) -> Tensor:
    """(N,) any integers to the rank of each among those that occur, without reading how many there are."""
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    changed = (ordered != ordered.roll(1)).cumsum(0)
    rank = changed - changed[:1]
    return torch.zeros_like(rank).scatter(0, order, rank)
