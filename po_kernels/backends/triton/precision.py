"""The precision U of the Mahalanobis reward, in Triton: one number, a diagonal, or a symmetric matrix in memory.

Vectors are (B, G, BLOCK_D), zero from dimension `dim` on.
"""

import triton
import triton.language as tl

from .lanes import accumulate, add, constant, load, masked, mul, output, square, total, value

SCALAR = tl.constexpr(0)
DIAGONAL = tl.constexpr(1)
FULL = tl.constexpr(2)


@triton.jit
def pick(x, i, d):
    """Component i, (B, G, 1)."""
    return total(masked(d == i, x), 2)


@triton.jit
def row_of(u, ut, i, d, dim, DUAL: tl.constexpr, T: tl.constexpr):
    return load(u, ut, i * dim + d, d < dim, 0, DUAL, T)


@triton.jit
def diagonal_of(u, ut, d, dim, KIND: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """diag U, (1, 1, BLOCK_D)."""
    if KIND == SCALAR:
        return load(u, ut, d * 0, d < dim, 0, DUAL, T)
    elif KIND == DIAGONAL:
        return load(u, ut, d, d < dim, 0, DUAL, T)
    else:
        return load(u, ut, d * (dim + 1), d < dim, 0, DUAL, T)


@triton.jit
def apply(u, ut, x, d, dim, KIND: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """U x."""
    if KIND == FULL:
        y = constant(tl.zeros_like(value(x)), DUAL)
        for i in range(0, dim):
            y = add(y, mul(pick(x, i, d), row_of(u, ut, i, d, dim, DUAL, T)))
        return y
    else:
        return mul(diagonal_of(u, ut, d, dim, KIND, DUAL, T), x)


@triton.jit
def no_sums(KIND: tl.constexpr, IN_MEMORY: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """What is summed over rows for the gradient in U: its rows, or its diagonal; of a number, by dimensions.

    Matrices of many dimensions are summed in memory instead.
    """
    ROWS: tl.constexpr = BLOCK_D if KIND == FULL and not IN_MEMORY else 1
    return tl.zeros((ROWS, 1, BLOCK_D), T)


@triton.jit
def add_diagonal(sums, to, x, d, dim, KIND: tl.constexpr, IN_MEMORY: tl.constexpr, DUAL: tl.constexpr):
    """Adds Σ_b x_b, (B, 1, BLOCK_D), as the gradient in diag U."""
    found = tl.sum(output(x, DUAL), axis=0, keep_dims=True)
    if KIND != FULL:
        return sums + found
    elif IN_MEMORY:
        accumulate(to, d * (dim + 1), d < dim, found)
        return sums
    else:
        return sums + tl.where(tl.arange(0, sums.shape[0])[:, None, None] == d, found, 0)


@triton.jit
def add_outer(sums, to, f, x, d, dim, KIND: tl.constexpr, IN_MEMORY: tl.constexpr, DUAL: tl.constexpr):
    """Adds Σ_bg f x xᵀ, f (B, G, 1), as the gradient in U."""
    if KIND == FULL:
        for i in range(0, dim):
            row = tl.sum(total(output(mul(mul(f, pick(x, i, d)), x), DUAL), 1), axis=0, keep_dims=True)
            if IN_MEMORY:
                accumulate(to, i * dim + d, d < dim, row)
            else:
                sums += tl.where(tl.arange(0, sums.shape[0])[:, None, None] == i, row, 0)
        return sums
    else:
        return add_diagonal(sums, to, total(mul(f, square(x)), 1), d, dim, KIND, IN_MEMORY, DUAL)


@triton.jit
def store_sums(sums, to, d, dim, KIND: tl.constexpr, IN_MEMORY: tl.constexpr):
    if KIND != FULL:
        tl.store(to + d, sums, d < dim)
    elif not IN_MEMORY:
        i = tl.arange(0, sums.shape[0])[:, None, None]
        tl.store(to + i * dim + d, sums, (i < dim) & (d < dim))
