"""The precision U of the Mahalanobis reward, in Triton: one number, a diagonal, or a symmetric matrix in memory.

Vectors are (BLOCK_D, B, G), zero from dimension `dim` on. Of few dimensions a thread has all of a sample's: loops over
them are unrolled and `pick` is the choice of a register.

The gradient in U is summed over the rows of a program as a pair: a matrix (BLOCK_D, BLOCK_D), and a tile with a number
for each sample in flight, of which what is not the matrix is the sum. Threads add up at the end of a program.
"""

import triton
import triton.language as tl

from .lanes import (
    accumulate,
    add_products,
    add_squares,
    alone,
    choose,
    constant,
    is_thin,
    load,
    mul,
    mul_add,
    nothing,
    output,
    square,
    times,
    total,
    value,
)

SCALAR = tl.constexpr(0)
DIAGONAL = tl.constexpr(1)
FULL = tl.constexpr(2)

MOST_IN_REGISTERS = tl.constexpr(64)  # of a matrix of sums


@triton.jit
def pick(x, i, d):
    """Component i, (1, B, G)."""
    return total(alone(d == i, x), 0)


@triton.jit
def entry(u, ut, at, DUAL: tl.constexpr, T: tl.constexpr):
    if DUAL:
        return tl.load(u + at).to(T), tl.load(ut + at).to(T)
    else:
        return tl.load(u + at).to(T)


@triton.jit
def row_of(u, ut, i, dim: tl.constexpr, BLOCK_D: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """Row i of U, (BLOCK_D, 1, 1)."""
    d = tl.arange(0, BLOCK_D)[:, None, None]
    return load(u, ut, i * dim + d, d < dim, 0, DUAL, T)


@triton.jit
def diagonal_of(u, ut, d, dim: tl.constexpr, KIND: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """diag U, of the shape of d."""
    STEP: tl.constexpr = (0, 1, dim + 1)[KIND]
    if not is_thin(d):
        x = constant(tl.zeros(d.shape, T), DUAL)
        for i in tl.static_range(dim):
            x = choose(d == i, entry(u, ut, i * STEP, DUAL, T), x)
        return x
    else:
        return load(u, ut, d * STEP, d < dim, 0, DUAL, T)


@triton.jit
def apply(u, ut, x, d, dim: tl.constexpr, KIND: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """U x."""
    if KIND == FULL:
        y = constant(tl.zeros_like(value(x)), DUAL)
        if not is_thin(d):
            for i in tl.static_range(dim):
                component = mul(pick(x, 0, d), entry(u, ut, i * dim, DUAL, T))
                for j in tl.static_range(1, dim):
                    component = mul_add(pick(x, j, d), entry(u, ut, i * dim + j, DUAL, T), component)
                y = choose(d == i, component, y)
            return y
        else:
            for i in range(0, dim):
                y = mul_add(pick(x, i, d), row_of(u, ut, i, dim, value(x).shape[0], DUAL, T), y)
            return y
    else:
        return mul(diagonal_of(u, ut, d, dim, KIND, DUAL, T), x)


@triton.jit
def apply_squared(u, x, d, dim: tl.constexpr, T: tl.constexpr):
    """A x of the matrix A of the squares of the entries of U, without derivatives."""
    y = tl.zeros_like(x)
    if not is_thin(d):
        for i in tl.static_range(dim):
            component = nothing((1, x.shape[1], x.shape[2]), T)
            for j in tl.static_range(dim):
                u_ij = entry(u, u, i * dim + j, False, T)
                component = tl.fma(pick(x, j, d), u_ij * u_ij, component)
            y = tl.where(d == i, component, y)
    else:
        for i in range(0, dim):
            row = row_of(u, u, i, dim, x.shape[0], False, T)
            y += pick(x, i, d) * row * row
    return y


@triton.jit
def apply_to_sum(u, ut, x, d, dim: tl.constexpr, KIND: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """U Σ_g x, (BLOCK_D, B, 1)."""
    if KIND == FULL:
        BLOCK_D: tl.constexpr = value(x).shape[0]
        y = constant(tl.zeros((BLOCK_D, value(x).shape[1], 1), T), DUAL)
        if not is_thin(d):
            for i in tl.static_range(dim):
                component = total(pick(x, i, d), 2)
                y = mul_add(row_of(u, ut, i, dim, BLOCK_D, DUAL, T), component, y)
        else:
            for i in range(0, dim):
                component = total(pick(x, i, d), 2)
                y = mul_add(row_of(u, ut, i, dim, BLOCK_D, DUAL, T), component, y)
        return y
    else:
        return total(mul(x, diagonal_of(u, ut, d, dim, KIND, DUAL, T)), 2)


@triton.jit
def quadratic(u, ut, x, d, dim: tl.constexpr, KIND: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """xᵀ U x, (1, B, G)."""
    if KIND == FULL and not is_thin(d):
        # By half the products: U is symmetric.
        result = mul(square(pick(x, 0, d)), entry(u, ut, 0, DUAL, T))
        for i in tl.static_range(1, dim):
            before = mul(pick(x, 0, d), entry(u, ut, i * dim, DUAL, T))
            for j in tl.static_range(1, i):
                before = mul_add(pick(x, j, d), entry(u, ut, i * dim + j, DUAL, T), before)
            whole = mul_add(pick(x, i, d), entry(u, ut, i * dim + i, DUAL, T), times(before, 2))
            result = mul_add(pick(x, i, d), whole, result)
        return result
    else:
        return total(mul(x, apply(u, ut, x, d, dim, KIND, DUAL, T)), 0)


@triton.jit
def no_sums(KIND: tl.constexpr, IN_MEMORY: tl.constexpr, BLOCK_D: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
            T: tl.constexpr):  # fmt: skip
    """What is summed over rows for the gradient in U, of samples in tiles of B by G."""
    ROWS: tl.constexpr = BLOCK_D if KIND == FULL and not IN_MEMORY else 1
    EACH: tl.constexpr = 1 if KIND == SCALAR else BLOCK_D
    return tl.zeros((ROWS, ROWS), T), tl.zeros((EACH, B, G), T)


@triton.jit
def add_diagonal(sums, x, KIND: tl.constexpr, DUAL: tl.constexpr):
    """Adds Σ_bg x, (BLOCK_D, B, G), as the gradient in diag U."""
    if KIND == SCALAR:
        x = total(x, 0)
    return sums[0], sums[1] + output(x, DUAL)


@triton.jit
def add_outer(
    sums, to, f, x, d, dim: tl.constexpr, KIND: tl.constexpr, IN_MEMORY: tl.constexpr, EACH: tl.constexpr,
    DUAL: tl.constexpr,
):  # fmt: skip
    """Adds Σ_bg f x xᵀ, f (1, B, G) or None, as the gradient in U. Of a matrix its symmetric part is right."""
    left = x if f is None else mul(f, x)
    if KIND == FULL:
        if value(x).dtype == tl.float32 and not IN_MEMORY:
            if f is None:
                return add_squares(sums[0], x, EACH), sums[1]
            else:
                return add_products(sums[0], left, x, EACH, DUAL), sums[1]
        else:
            BLOCK_D: tl.constexpr = value(x).shape[0]
            each = tl.arange(0, BLOCK_D)
            matrix = sums[0]
            for i in range(0, dim):
                row = tl.sum(tl.sum(output(mul(pick(left, i, d), x), DUAL), axis=2), axis=1)
                if IN_MEMORY:
                    accumulate(to, i * dim + each, each < dim, row)
                else:
                    matrix += tl.where(each[:, None] == i, row[None, :], 0)
            return matrix, sums[1]
    else:
        return add_diagonal(sums, mul(left, x), KIND, DUAL)


@triton.jit
def store_sums(sums, factor, to, dim: tl.constexpr, KIND: tl.constexpr, IN_MEMORY: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores `factor` times the sums."""
    matrix = sums[0] * factor
    found = tl.sum(tl.sum(sums[1], axis=2), axis=1) * factor
    each = tl.arange(0, BLOCK_D)
    if KIND == SCALAR:
        tl.store(to + each, found, each < 1)
    elif KIND == DIAGONAL:
        tl.store(to + each, found, each < dim)
    else:
        if not IN_MEMORY:
            inside = (each[:, None] < dim) & (each[None, :] < dim)
            tl.store(to + each[:, None] * dim + each[None, :], matrix, inside)
            tl.debug_barrier()
        accumulate(to, each * (dim + 1), each < dim, found)
