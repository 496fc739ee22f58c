"""The precision U of the Mahalanobis reward, in Triton: one number, a diagonal, or a symmetric matrix in memory.

K.KIND is its number of axes. Vectors are (BLOCK_D, B, G), zero from dimension K.dim on. Of few dimensions a thread has
all of a sample's: loops over them are unrolled and `pick` is the choice of a register.

The gradient in U is summed over the rows of a program as a pair: a matrix (BLOCK_D, BLOCK_D), and a tile with a number
for each sample in flight, of which what is not the matrix is the sum. Threads add up at the end of a program. A matrix
too large for registers (K.IN_MEMORY) is summed in the program's part of `partial`, in float64.
"""

import triton
import triton.language as tl

from .lanes import (
    RUN,
    accumulate,
    add,
    add_products,
    add_squares,
    alone,
    choose,
    is_thin,
    load,
    mul,
    mul_add,
    output,
    square,
    times,
    total,
    value,
    zeros,
)

SCALAR = tl.constexpr(0)
DIAGONAL = tl.constexpr(1)
FULL = tl.constexpr(2)


@triton.jit
def pick(x, i, d):
    """Component i, (1, B, G)."""
    return total(alone(d == i, x), 0)


@triton.jit
def entry(u, at, K: tl.constexpr):
    if K.DUAL:
        return tl.load(u.value + at), tl.load(u.tangent + at)
    else:
        return tl.load(u.value + at)


@triton.jit
def row_of(u, i, K: tl.constexpr):
    """Row i of U, (BLOCK_D, 1, 1)."""
    d = tl.arange(0, K.BLOCK_D)[:, None, None]
    return load(u, i * K.dim + d, d < K.dim, 0, K)


@triton.jit
def diagonal_of(u, d, K: tl.constexpr):
    """diag U, of the shape of d."""
    STEP: tl.constexpr = (0, 1, K.dim + 1)[K.KIND]
    if is_thin(d):
        return load(u, d * STEP, d < K.dim, 0, K)
    else:
        x = zeros(d.shape, K)
        for i in tl.static_range(K.dim):
            x = choose(d == i, entry(u, i * STEP, K), x)
        return x


@triton.jit
def apply(u, x, d, K: tl.constexpr):
    """U x."""
    if K.KIND != FULL:
        return mul(diagonal_of(u, d, K), x)
    else:
        y = zeros(value(x).shape, K)
        if is_thin(d):
            for first in range(0, K.dim, RUN):
                part = zeros(value(x).shape, K)
                for i in range(first, tl.minimum(first + RUN, K.dim)):
                    part = mul_add(pick(x, i, d), row_of(u, i, K), part)
                y = add(y, part)
        else:
            for i in tl.static_range(K.dim):
                component = mul(pick(x, 0, d), entry(u, i * K.dim, K))
                for j in tl.static_range(1, K.dim):
                    component = mul_add(pick(x, j, d), entry(u, i * K.dim + j, K), component)
                y = choose(d == i, component, y)
        return y


@triton.jit
def apply_squared(u, x, d, K: tl.constexpr):
    """A x of the matrix A of the squares of the entries of U, without derivatives."""
    y = tl.zeros_like(x)
    if is_thin(d):
        for i in range(0, K.dim):
            row = row_of(u, i, K)
            y += pick(x, i, d) * row * row
    else:
        for i in tl.static_range(K.dim):
            component = tl.full((1, x.shape[1], x.shape[2]), -0.0, K.T)
            for j in tl.static_range(K.dim):
                u_ij = entry(u, i * K.dim + j, K)
                component = tl.fma(pick(x, j, d), u_ij * u_ij, component)
            y = tl.where(d == i, component, y)
    return y


@triton.jit
def apply_to_sum(u, x, d, K: tl.constexpr):
    """U Σ_g x, (BLOCK_D, B, 1)."""
    if K.KIND != FULL:
        return total(mul(x, diagonal_of(u, d, K)), 2)
    else:
        y = zeros((K.BLOCK_D, value(x).shape[1], 1), K)
        if is_thin(d):
            for i in range(0, K.dim):
                component = total(pick(x, i, d), 2)  # before the row is read, for registers not to be held
                y = mul_add(row_of(u, i, K), component, y)
        else:
            for i in tl.static_range(K.dim):
                component = total(pick(x, i, d), 2)
                y = mul_add(row_of(u, i, K), component, y)
        return y


@triton.jit
def quadratic(u, x, d, K: tl.constexpr):
    """xᵀ U x, (1, B, G)."""
    if K.KIND == FULL and not is_thin(d):
        # By half the products: U is symmetric.
        result = mul(square(pick(x, 0, d)), entry(u, 0, K))
        for i in tl.static_range(1, K.dim):
            before = mul(pick(x, 0, d), entry(u, i * K.dim, K))
            for j in tl.static_range(1, i):
                before = mul_add(pick(x, j, d), entry(u, i * K.dim + j, K), before)
            whole = mul_add(pick(x, i, d), entry(u, i * K.dim + i, K), times(before, 2))
            result = mul_add(pick(x, i, d), whole, result)
        return result
    else:
        return total(mul(x, apply(u, x, d, K)), 0)


@triton.jit
def no_sums(K: tl.constexpr):
    """What is summed over rows for the gradient in U."""
    ROWS: tl.constexpr = K.BLOCK_D if K.KIND == FULL and not K.IN_MEMORY else 1
    NUMBERS: tl.constexpr = 1 if K.KIND == SCALAR else K.BLOCK_D
    DTYPE: tl.constexpr = tl.float64 if K.WIDE else K.T
    return tl.zeros((ROWS, ROWS), DTYPE), tl.zeros((NUMBERS, K.BLOCK_B, K.BLOCK_G), DTYPE)


@triton.jit
def add_diagonal(sums, x, K: tl.constexpr):
    """Adds Σ_bg x, (BLOCK_D, B, G), as the gradient in diag U."""
    if K.KIND == SCALAR:
        x = total(x, 0)
    return sums[0], sums[1] + output(x, K)


@triton.jit
def add_outer(sums, to, f, x, d, K: tl.constexpr):
    """Adds Σ_bg f x xᵀ, f (1, B, G) or None, as the gradient in U. Of a matrix its symmetric part is right."""
    left = x if f is None else mul(f, x)
    if K.KIND != FULL:
        return add_diagonal(sums, mul(left, x), K)
    elif value(x).dtype == tl.float32 and not K.IN_MEMORY:
        before = tl.zeros_like(sums[0]).to(tl.float32) if K.WIDE else sums[0]
        found = add_squares(before, x, K.EACH) if f is None else add_products(before, left, x, K)
        return sums[0] + found if K.WIDE else found, sums[1]
    else:
        each = tl.arange(0, K.BLOCK_D)
        matrix = sums[0]
        for i in range(0, K.dim):
            row = tl.sum(tl.sum(output(mul(pick(left, i, d), x), K), axis=2), axis=1)
            if K.IN_MEMORY:
                accumulate(to, i * K.dim + each, each < K.dim, row)
            else:
                matrix += tl.where(each[:, None] == i, row[None, :], 0)
        return matrix, sums[1]


@triton.jit
def store_sums(sums, factor, to, K: tl.constexpr):
    """Stores `factor` times the sums."""
    found = tl.sum(tl.sum(sums[1], axis=2), axis=1) * factor
    each = tl.arange(0, K.BLOCK_D)
    if K.KIND == SCALAR:
        tl.store(to + each, found, each < 1)
    elif K.KIND == DIAGONAL:
        tl.store(to + each, found, each < K.dim)
    else:
        if not K.IN_MEMORY:
            inside = (each[:, None] < K.dim) & (each[None, :] < K.dim)
            tl.store(to + each[:, None] * K.dim + each[None, :], sums[0] * factor, inside)
            tl.debug_barrier()
        accumulate(to, each * (K.dim + 1), each < K.dim, found)
