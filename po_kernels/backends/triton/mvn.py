"""The triangular scale S = L, in Triton, in memory: a tuple (pointer, tangent, offset, inside, d).

`offset` (1, B, 1) is where the matrix of a row begins, `inside` whether there is one. What stands above the diagonal is
not read. Vectors are (BLOCK_D, B, G), zero beyond D. The functions are those of `gaussian`.
"""

import triton
import triton.language as tl

from .lanes import (
    add,
    choose,
    constant,
    inverse,
    is_thin,
    load,
    log,
    masked,
    mul,
    mul_add,
    nothing,
    output,
    sub,
    times,
    total,
    value,
)
from .precision import add_outer, apply, pick


@triton.constexpr_function
def unrolled(dim, dual):
    """How many turns of the loop over rows of a gradient are compiled apart: all, where that takes seconds only."""
    return dim if dim <= 8 and not dual else 1


@triton.jit
def read(pointer, tangent, offset, inside, d, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if DUAL:
        return pointer, tangent, offset, inside, d
    else:  # no tangent, which a tuple could not hold
        return pointer, pointer, offset, inside, d


@triton.jit
def entry(scale, i, j, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """L_ij, (1, B, 1)."""
    pointer, tangent, offset, inside, _ = scale
    below = tl.full((1, 1, 1), i - j, tl.int32) >= 0
    return load(pointer, tangent, offset + i * dim + j, inside & below, 0, DUAL, T)


@triton.jit
def row_of(scale, i, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """L_i, of the shape of d, or thin where d is."""
    pointer, tangent, offset, inside, d = scale
    if is_thin(d):
        return load(pointer, tangent, offset + i * dim + d, inside & (d <= i), 0, DUAL, T)
    else:
        x = constant(tl.zeros(d.shape, T), DUAL)
        for j in tl.static_range(dim):
            x = choose(d == j, entry(scale, i, j, dim, DUAL, T), x)
        return x


@triton.jit
def column_of(scale, j, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """The column j of L, of the shape of d, or thin where d is."""
    pointer, tangent, offset, inside, d = scale
    if is_thin(d):
        return load(pointer, tangent, offset + d * dim + j, inside & (d >= j) & (d < dim), 0, DUAL, T)
    else:
        x = constant(tl.zeros(d.shape, T), DUAL)
        for i in tl.static_range(dim):
            x = choose(d == i, entry(scale, i, j, dim, DUAL, T), x)
        return x


@triton.jit
def row_product(scale, i, end, x, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """Σ_j L_ij x_j over j < end <= i + 1, (1, B, G)."""
    d = scale[4]
    if is_thin(d):
        return total(masked(d < end, mul(row_of(scale, i, dim, DUAL, T), x)), 0)
    else:
        result = constant(nothing((1, value(x).shape[1], value(x).shape[2]), T), DUAL)
        for j in tl.static_range(dim):
            more = mul_add(entry(scale, i, j, dim, DUAL, T), pick(x, j, d), result)
            result = choose(j < end, more, result)
        return result


@triton.jit
def column_product(scale, j, x, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """Σ_i L_ij x_i over i > j, (1, B, G)."""
    d = scale[4]
    if is_thin(d):
        return total(masked(d > j, mul(column_of(scale, j, dim, DUAL, T), x)), 0)
    else:
        result = constant(nothing((1, value(x).shape[1], value(x).shape[2]), T), DUAL)
        for i in tl.static_range(dim):
            more = mul_add(entry(scale, i, j, dim, DUAL, T), pick(x, i, d), result)
            result = choose(i > j, more, result)
        return result


@triton.jit
def inverse_diagonal(scale, i, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """1 / L_ii, (1, B, 1)."""
    pointer, tangent, offset, inside, _ = scale
    return inverse(load(pointer, tangent, offset + i * (dim + 1), inside, 1, DUAL, T))


@triton.jit
def log_determinant(scale, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """log det L."""
    pointer, tangent, offset, inside, d = scale
    if is_thin(d):
        return total(log(load(pointer, tangent, offset + d * (dim + 1), inside & (d < dim), 1, DUAL, T)), 0)
    else:
        result = log(load(pointer, tangent, offset, inside, 1, DUAL, T))
        for i in tl.static_range(1, dim):
            result = add(result, log(load(pointer, tangent, offset + i * (dim + 1), inside, 1, DUAL, T)))
        return result


@triton.jit
def stretch(scale, eps, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """L eps for a constant eps."""
    d = scale[4]
    y = constant(tl.zeros_like(eps), DUAL)
    for i in range(0, dim):
        y = choose(d == i, row_product(scale, i, i + 1, constant(eps, DUAL), dim, DUAL, T), y)
    return y


@triton.jit
def whiten(scale, x, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """L⁻¹ x."""
    d = scale[4]
    z = constant(tl.zeros_like(value(x)), DUAL)
    for i in range(0, dim):
        rest = sub(pick(x, i, d), row_product(scale, i, i, z, dim, DUAL, T))
        z = choose(d == i, mul(rest, inverse_diagonal(scale, i, dim, DUAL, T)), z)
    return z


@triton.jit
def whiten_transposed(scale, z, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """L⁻ᵀ z."""
    d = scale[4]
    a = constant(tl.zeros_like(value(z)), DUAL)
    for k in range(0, dim):
        i = dim - 1 - k
        rest = sub(pick(z, i, d), column_product(scale, i, a, dim, DUAL, T))
        a = choose(d == i, mul(rest, inverse_diagonal(scale, i, dim, DUAL, T)), a)
    return a


@triton.jit
def whiten_noise(scale, mean, eps, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """L⁻¹ (ŷ - μ) of the constant sample ŷ = μ + L eps: eps, with the derivative that μ and L give it."""
    if DUAL:
        _, tangent, offset, inside, d = scale
        moved = mean[1] + stretch((tangent, tangent, offset, inside, d), eps, dim, False, T)
        return eps, -whiten(scale, moved, dim, False, T)
    else:
        return eps


@triton.jit
def add_gradient(
    scale, left, right, inner, to, offset, inside, d, dim: tl.constexpr, first, DUAL: tl.constexpr, T: tl.constexpr
):
    """Stores samples' terms of the gradient in L of Σ_g [leftᵀ L right + inner · log det L] if they are `first`.

    Later ones it adds to what was stored. left, right (BLOCK_D, B, G), inner (1, B, G).
    """
    inner = total(inner, 2)
    each = tl.arange(0, value(left).shape[0])[:, None, None]
    for i in tl.range(0, dim, loop_unroll_factor=unrolled(dim, DUAL)):
        at = to + offset + i * dim
        own = mul(inner, inverse_diagonal(scale, i, dim, DUAL, T))
        if is_thin(d):
            row = total(mul(pick(left, i, d), right), 2)
            row = output(add(row, masked(each == i, own)), DUAL)
            mask = inside & (each < dim)
            before = tl.load(at + each, mask & (first == 0), 0).to(T)
            tl.store(at + each, before + tl.where(each <= i, row, 0), mask)
        else:
            tl.store(at + each, tl.zeros_like(each).to(T), inside & (each > i) & (each < dim))
            for j in tl.static_range(dim):
                found = total(mul(pick(left, i, d), pick(right, j, d)), 2)
                found = output(choose(j == i, add(found, own), found), DUAL)
                mask = inside & (tl.full((1, 1, 1), i - j, tl.int32) >= 0)
                before = tl.load(at + j, mask & (first == 0), 0).to(T)
                tl.store(at + j, before + found, mask)
    tl.debug_barrier()


@triton.jit
def trace(
    scale, weight, factor, inner, u, ut, sums, to_precision, to, offset, inside, d, dim,
    KIND: tl.constexpr, IN_MEMORY: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_PRECISION: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """tr(U L Lᵀ), (1, B, 1), and the sums with `factor`, or None, times its gradient in U.

    The gradient in L of weight · tr(U L Lᵀ) + inner · log det L is stored. By columns l of L: Σ lᵀ U l.
    """
    result = constant(tl.zeros_like(value(weight)), DUAL)
    for j in range(0, dim):
        column = column_of(scale, j, dim, DUAL, T)
        weighted = apply(u, ut, column, d, dim, KIND, DUAL, T)
        result = add(result, total(mul(column, weighted), 0))
        if NEED_PRECISION:
            sums = add_outer(sums, to_precision, factor, column, d, dim, KIND, IN_MEMORY, 1, DUAL)
        if NEED_SCALE:
            gradient = times(mul(weight, weighted), 2)
            gradient = add(gradient, masked(d == j, mul(inner, inverse_diagonal(scale, j, dim, DUAL, T))))
            kept = tl.where(d >= j, output(gradient, DUAL), 0)
            tl.store(to + offset + d * dim + j, kept, inside & (d < dim))
    return result, sums


@triton.jit
def reward_variance(scale, along, u, d, dim, KIND: tl.constexpr, T: tl.constexpr):
    """2 ‖LᵀUL‖² + 4 ‖Lᵀ along‖², (1, B, 1), without derivatives."""
    result = tl.zeros_like(total(along, 0))
    for j in range(0, dim):
        column = column_of(scale, j, dim, False, T)
        weighted = apply(u, u, column, d, dim, KIND, False, T)
        product = tl.zeros_like(along)
        for i in range(0, dim):
            product += pick(weighted, i, d) * row_of(scale, i, dim, False, T)
        projected = total(column * along, 0)
        result += 2 * total(product * product, 0) + 4 * projected * projected
    return result
