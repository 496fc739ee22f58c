"""The precision U of a Mahalanobis reward -(ŷ - y)ᵀ U (ŷ - y): u (D,), its diagonal, or u (D, D), symmetric.

Numba compiles the branch that the array's axes decide. Vectors are (D, columns).
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
    return np.zeros((chunks.number, *u.shape)) if needed else np.zeros((0,) * (u.ndim + 1))


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
def apply(columns, u, x, y):
    """y = U x."""
    for i in range(len(x)):
        entry = diagonal(u, i)
        for c in range(columns):
            y[i, c] = x[i, c] * entry
        if u.ndim == 2:
            for j in range(len(x)):
                entry = 0.0 if i == j else u[i, j]
                for c in range(columns):
                    y[i, c] += x[j, c] * entry


@summing
def sum_of_products(columns, f, x, i, j):
    total = 0.0
    for c in range(columns):
        total += f[c] * x[i, c] * x[j, c]
    return total


@helper
def add_outer_sum(columns, f, x, to_u):
    """Adds Σ f x xᵀ over columns to the gradient in u."""
    for i in range(len(x)):
        if to_u.ndim == 1:
            to_u[i] += sum_of_products(columns, f, x, i, i)
        else:
            for j in range(i + 1):
                to_u[i, j] += sum_of_products(columns, f, x, i, j)
