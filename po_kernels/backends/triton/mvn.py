"""The triangular scale S = L, in Triton, in memory: a tuple (pointer, tangent, offset, inside, d, dim).

`offset` (B, 1, 1) is where the matrix of a row begins, `inside` whether there is one. What stands above the diagonal is
not read. Vectors are (B, G, BLOCK_D), zero beyond D. The functions are those of `gaussian`.
"""

import triton
import triton.language as tl

from .lanes import add, choose, constant, inverse, load, log, masked, mul, output, sub, times, total, value
from .precision import add_outer, apply, pick


@triton.jit
def read(pointer, tangent, offset, inside, d, dim, DUAL: tl.constexpr, T: tl.constexpr):
    return pointer, tangent, offset, inside, d, dim


@triton.jit
def row_of(scale, i, DUAL: tl.constexpr, T: tl.constexpr):
    """L_i, (B, 1, BLOCK_D)."""
    pointer, tangent, offset, inside, d, dim = scale
    return load(pointer, tangent, offset + i * dim + d, inside & (d <= i), 0, DUAL, T)


@triton.jit
def column_of(scale, j, DUAL: tl.constexpr, T: tl.constexpr):
    """The column j of L, (B, 1, BLOCK_D)."""
    pointer, tangent, offset, inside, d, dim = scale
    return load(pointer, tangent, offset + d * dim + j, inside & (d >= j) & (d < dim), 0, DUAL, T)


@triton.jit
def inverse_diagonal(scale, i, DUAL: tl.constexpr, T: tl.constexpr):
    """1 / L_ii, (B, 1, 1)."""
    pointer, tangent, offset, inside, _, dim = scale
    return inverse(load(pointer, tangent, offset + i * (dim + 1), inside, 1, DUAL, T))


@triton.jit
def log_determinant(scale, DUAL: tl.constexpr, T: tl.constexpr):
    """log det L, (B, 1, 1)."""
    pointer, tangent, offset, inside, d, dim = scale
    return total(log(load(pointer, tangent, offset + d * (dim + 1), inside & (d < dim), 1, DUAL, T)), 2)


@triton.jit
def stretch(scale, eps, DUAL: tl.constexpr, T: tl.constexpr):
    """L eps for a constant eps."""
    d, dim = scale[4], scale[5]
    y = constant(tl.zeros_like(eps), DUAL)
    for i in range(0, dim):
        y = choose(d == i, total(mul(row_of(scale, i, DUAL, T), eps), 2), y)
    return y


@triton.jit
def whiten(scale, x, DUAL: tl.constexpr, T: tl.constexpr):
    """L⁻¹ x."""
    d, dim = scale[4], scale[5]
    z = constant(tl.zeros_like(value(x)), DUAL)
    for i in range(0, dim):
        rest = total(sub(masked(d == i, x), mul(row_of(scale, i, DUAL, T), z)), 2)
        z = choose(d == i, mul(rest, inverse_diagonal(scale, i, DUAL, T)), z)
    return z


@triton.jit
def whiten_transposed(scale, z, DUAL: tl.constexpr, T: tl.constexpr):
    """L⁻ᵀ z."""
    d, dim = scale[4], scale[5]
    a = constant(tl.zeros_like(value(z)), DUAL)
    for k in range(0, dim):
        i = dim - 1 - k
        rest = total(sub(masked(d == i, z), mul(column_of(scale, i, DUAL, T), a)), 2)
        a = choose(d == i, mul(rest, inverse_diagonal(scale, i, DUAL, T)), a)
    return a


@triton.jit
def whiten_noise(scale, mean, eps, DUAL: tl.constexpr, T: tl.constexpr):
    """L⁻¹ (ŷ - μ) of the constant sample ŷ = μ + L eps: eps, with the derivative that μ and L give it."""
    if DUAL:
        _, tangent, offset, inside, d, dim = scale
        moved = mean[1] + stretch((tangent, tangent, offset, inside, d, dim), eps, False, T)
        return eps, -whiten(scale, moved, False, T)
    else:
        return eps


@triton.jit
def store_row(to, i, row, offset, inside, d, dim, first, DUAL: tl.constexpr, T: tl.constexpr):
    """Stores row i of a gradient in L, which has nothing above the diagonal."""
    mask = inside & (d < dim)
    at = to + offset + i * dim + d
    before = tl.load(at, mask & (first == 0), 0).to(T)
    tl.store(at, before + tl.where(d <= i, output(row, DUAL), 0), mask)


@triton.jit
def store_gradient(scale, left, right, inner, to, offset, inside, d, dim, first, DUAL: tl.constexpr, T: tl.constexpr):
    """The gradient in L of Σ_g leftᵀ L right + inner · log det L; left, right (B, G, BLOCK_D), inner (B, 1, 1).

    It is stored if `first`, and else added to what was stored before.
    """
    for i in range(0, dim):
        row = total(mul(pick(left, i, d), right), 1)
        row = add(row, masked(d == i, mul(inner, inverse_diagonal(scale, i, DUAL, T))))
        store_row(to, i, row, offset, inside, d, dim, first, DUAL, T)
    tl.debug_barrier()


@triton.jit
def trace(
    scale, weight, inner, u, ut, sums, to_precision, to, offset, inside, d, dim,
    KIND: tl.constexpr, IN_MEMORY: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_PRECISION: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """tr(U L Lᵀ), (B, 1, 1), and the sums with `weight` times its gradient in U.

    The gradient in L of weight · tr(U L Lᵀ) + inner · log det L is stored. By columns l of L: Σ lᵀ U l.
    """
    result = constant(tl.zeros_like(value(weight)), DUAL)
    for j in range(0, dim):
        column = column_of(scale, j, DUAL, T)
        weighted = apply(u, ut, column, d, dim, KIND, DUAL, T)
        result = add(result, total(mul(column, weighted), 2))
        if NEED_PRECISION:
            sums = add_outer(sums, to_precision, weight, column, d, dim, KIND, IN_MEMORY, DUAL)
        if NEED_SCALE:
            gradient = times(mul(weight, weighted), 2)
            gradient = add(gradient, masked(d == j, mul(inner, inverse_diagonal(scale, j, DUAL, T))))
            kept = tl.where(d >= j, output(gradient, DUAL), 0)
            tl.store(to + offset + d * dim + j, kept, inside & (d < dim))
    return result, sums


@triton.jit
def reward_variance(scale, along, u, d, dim, KIND: tl.constexpr, T: tl.constexpr):
    """2 ‖LᵀUL‖² + 4 ‖Lᵀ along‖², (B, 1, 1), without derivatives."""
    result = tl.zeros_like(total(along, 2))
    for j in range(0, dim):
        column = column_of(scale, j, False, T)
        weighted = apply(u, u, column, d, dim, KIND, False, T)
        product = tl.zeros_like(along)
        for i in range(0, dim):
            product += pick(weighted, i, d) * row_of(scale, i, False, T)
        projected = total(column * along, 2)
        result += 2 * total(product * product, 2) + 4 * projected * projected
    return result
