"""The precision U of a Mahalanobis reward -(ŷ - y)ᵀ U (ŷ - y): u (D,), its diagonal, or u (D, D), symmetric.

Numba compiles the branch that the array's axes decide.
"""

import numpy as np
import torch
from torch import Tensor

from .rows import Array, Chunks, array, helper, inlined, summing


def read(precision: Tensor, dim: int) -> Array:
    value = precision.detach().double()
    return array(0.5 * (value + value.mT) if value.ndim == 2 else value.expand(dim))


def sums(u: Array, chunks: Chunks, needed: bool) -> Array:
    """For each chunk of rows the gradient in u, of a matrix the lower triangle."""
    return np.zeros((chunks.count, *u.shape)) if needed else np.zeros((0,) * (u.ndim + 1))


def gradient(by_chunk: Array, precision: Tensor) -> Tensor:
    total = torch.from_numpy(by_chunk.sum(axis=0))
    if precision.ndim == 2:
        total = total + total.tril(-1).mT
    return (total if precision.ndim else total.sum()).to(precision.dtype)


@inlined
def diagonal(u, j):
    if u.ndim == 1:
        return u[j]
    else:
        return u[j, j]


@helper
def apply(lanes, u, x, y):
    """y = U x."""
    for i in range(len(x)):
        entry = diagonal(u, i)
        for b in range(lanes):
            y[i, b] = x[i, b] * entry
        if u.ndim == 2:
            for j in range(len(x)):
                entry = 0.0 if i == j else u[i, j]
                for b in range(lanes):
                    y[i, b] += x[j, b] * entry


@helper
def quadratic(lanes, u, x, total, line):
    """total = xᵀ U x: of a matrix twice what is below the diagonal, and the diagonal."""
    for b in range(lanes):
        total[b] = 0.0
    for i in range(len(x)):
        entry = diagonal(u, i)
        for b in range(lanes):
            line[b] = x[i, b] * entry
        if u.ndim == 2:
            for j in range(i):
                entry = 2.0 * u[i, j]
                for b in range(lanes):
                    line[b] += x[j, b] * entry
        for b in range(lanes):
            total[b] += x[i, b] * line[b]


@summing
def _sum_of_products(lanes, f, x, y):
    total = 0.0
    for b in range(lanes):
        total += f[b] * x[b] * y[b]
    return total


@helper
def add_outer_sum(lanes, f, x, to_u):
    """Adds Σ_b f_b x_b x_bᵀ to the gradient in u."""
    for i in range(len(x)):
        if to_u.ndim == 1:
            to_u[i] += _sum_of_products(lanes, f, x[i], x[i])
        else:
            for j in range(i + 1):
                to_u[i, j] += _sum_of_products(lanes, f, x[i], x[j])
