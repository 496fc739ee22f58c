"""The triangular scale S = L, in Triton, which stays in memory. What stands above the diagonal is not read.

Vectors are (BLOCK_D, B, G), zero beyond K.dim. The functions are those of `gaussian`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .lanes import (
    Pair,
    add,
    choose,
    constant,
    divide,
    is_thin,
    load,
    log,
    masked,
    mul,
    mul_add,
    nothing,
    output,
    rounded,
    sub,
    times,
    total,
    value,
    zeros,
)
from .precision import add_outer, apply, pick


class Matrix(NamedTuple):
    """L of each row: the input, (1, B, 1) where a row's begins and whether there is one, the dimensions of vectors."""

    at: Any
    offset: Any
    inside: Any
    d: Any


@triton.constexpr_function
def unrolled(dim, dual):
    """How many turns of the loop over rows of a gradient are compiled apart: all, where that takes seconds only."""
    return dim if dim <= 8 and not dual else 1


@triton.jit
def entry(scale, i, j, K: tl.constexpr):
    """L_ij, (1, B, 1)."""
    below = tl.full((1, 1, 1), i - j, tl.int32) >= 0
    return load(scale.at, scale.offset + i * K.dim + j, scale.inside & below, 0, K)


@triton.jit
def row_of(scale, i, K: tl.constexpr):
    """L_i, of the shape of d, or thin where d is."""
    d = scale.d
    if is_thin(d):
        return load(scale.at, scale.offset + i * K.dim + d, scale.inside & (d <= i), 0, K)
    else:
        x = zeros(d.shape, K)
        for j in tl.static_range(K.dim):
            x = choose(d == j, entry(scale, i, j, K), x)
        return x


@triton.jit
def column_of(scale, j, K: tl.constexpr):
    """The column j of L, of the shape of d, or thin where d is."""
    d = scale.d
    if is_thin(d):
        return load(scale.at, scale.offset + d * K.dim + j, scale.inside & (d >= j) & (d < K.dim), 0, K)
    else:
        x = zeros(d.shape, K)
        for i in tl.static_range(K.dim):
            x = choose(d == i, entry(scale, i, j, K), x)
        return x


@triton.jit
def row_product(scale, i, end, x, K: tl.constexpr):
    """Σ_j L_ij x_j over j < end <= i + 1, (1, B, G)."""
    d = scale.d
    if is_thin(d):
        return total(masked(d < end, mul(row_of(scale, i, K), x)), 0)
    else:
        result = nothing((1, value(x).shape[1], value(x).shape[2]), K)
        for j in tl.static_range(K.dim):
            more = mul_add(entry(scale, i, j, K), pick(x, j, d), result)
            result = choose(j < end, more, result)
        return result


@triton.jit
def column_product(scale, j, x, K: tl.constexpr):
    """Σ_i L_ij x_i over i > j, (1, B, G)."""
    d = scale.d
    if is_thin(d):
        return total(masked(d > j, mul(column_of(scale, j, K), x)), 0)
    else:
        result = nothing((1, value(x).shape[1], value(x).shape[2]), K)
        for i in tl.static_range(K.dim):
            more = mul_add(entry(scale, i, j, K), pick(x, i, d), result)
            result = choose(i > j, more, result)
        return result


@triton.jit
def diagonal_entry(scale, i, K: tl.constexpr):
    """L_ii, (1, B, 1), and 1 without a row."""
    return load(scale.at, scale.offset + i * (K.dim + 1), scale.inside, 1, K)


@triton.jit
def log_determinant(scale, K: tl.constexpr):
    """log det L."""
    d = scale.d
    if is_thin(d):
        return total(log(load(scale.at, scale.offset + d * (K.dim + 1), scale.inside & (d < K.dim), 1, K)), 0)
    else:
        result = log(diagonal_entry(scale, 0, K))
        for i in tl.static_range(1, K.dim):
            result = add(result, log(diagonal_entry(scale, i, K)))
        return result


@triton.jit
def sample(scale, eps, mean, K: tl.constexpr):
    """μ + L eps for a constant eps."""
    return add(_stretch(scale, eps, K), mean)


@triton.jit
def _stretch(scale, eps, K: tl.constexpr):
    y = zeros(eps.shape, K)
    for i in range(0, K.dim):
        y = choose(scale.d == i, row_product(scale, i, i + 1, constant(eps, K), K), y)
    return y


@triton.jit
def whiten(scale, x, K: tl.constexpr):
    """L⁻¹ x."""
    d = scale.d
    z = zeros(value(x).shape, K)
    for i in range(0, K.dim):
        rest = sub(pick(x, i, d), row_product(scale, i, i, z, K))
        z = choose(d == i, divide(rest, diagonal_entry(scale, i, K)), z)
    return z


@triton.jit
def whiten_transposed(scale, z, K: tl.constexpr):
    """L⁻ᵀ z."""
    d = scale.d
    a = zeros(value(z).shape, K)
    for k in range(0, K.dim):
        i = K.dim - 1 - k
        rest = sub(pick(z, i, d), column_product(scale, i, a, K))
        a = choose(d == i, divide(rest, diagonal_entry(scale, i, K)), a)
    return a


@triton.jit
def whiten_noise(scale, mean, eps, K: tl.constexpr):
    """L⁻¹ (ŷ - μ) of the constant sample ŷ = μ + L eps: eps, with the derivative that μ and L give it."""
    if K.DUAL:
        tangent = Matrix(Pair(scale.at.tangent, scale.at.tangent), scale.offset, scale.inside, scale.d)
        moved = mean[1] + _stretch(tangent, eps, K.FIRST)
        return eps, -whiten(scale, moved, K.FIRST)
    else:
        return eps


@triton.jit
def add_gradient(scale, left, right, inner, to, row, inside, d, first, K: tl.constexpr):
    """Stores samples' terms of the gradient in L of Σ_g [leftᵀ L right + inner · log det L] if they are `first`.

    Later ones it adds to what was stored. left, right (BLOCK_D, B, G), inner (1, B, G).
    """
    inner = total(inner, 2)
    offset = row * K.dim * K.dim
    each = tl.arange(0, K.BLOCK_D)[:, None, None]
    for i in tl.range(0, K.dim, loop_unroll_factor=unrolled(K.dim, K.DUAL)):
        at = to + offset + i * K.dim
        own = divide(inner, diagonal_entry(scale, i, K))
        if is_thin(d):
            found = total(mul(pick(left, i, d), right), 2)
            found = output(add(found, masked(each == i, own)), K)
            mask = inside & (each < K.dim)
            before = tl.load(at + each, mask & (first == 0), 0)
            tl.store(at + each, before + tl.where(each <= i, found, 0), mask)
        else:
            tl.store(at + each, tl.zeros_like(each).to(K.T), inside & (each > i) & (each < K.dim))
            for j in tl.static_range(K.dim):
                found = total(mul(pick(left, i, d), pick(right, j, d)), 2)
                found = output(choose(j == i, add(found, own), found), K)
                mask = inside & (tl.full((1, 1, 1), i - j, tl.int32) >= 0)
                before = tl.load(at + j, mask & (first == 0), 0)
                tl.store(at + j, before + found, mask)
    tl.debug_barrier()


@triton.jit
def trace(scale, weight, factor, inner, u, sums, to_precision, to, row, inside, d, K: tl.constexpr):
    """tr(U L Lᵀ), (1, B, 1), and the sums with `factor`, or None, times its gradient in U.

    The gradient in L of weight · tr(U L Lᵀ) + inner · log det L is stored. By columns l of L: Σ lᵀ U l.
    """
    result = constant(tl.zeros(value(weight).shape, tl.float64), K)  # a sum over columns, one after the other
    offset = row * K.dim * K.dim
    for j in range(0, K.dim):
        column = column_of(scale, j, K)
        weighted = apply(u, column, d, K)
        result = add(result, total(mul(column, weighted), 0))
        if K.NEED_PRECISION:
            sums = add_outer(sums, to_precision, factor, column, d, K)
        if K.NEED_SCALE:
            own = masked(d == j, divide(inner, diagonal_entry(scale, j, K)))
            gradient = output(add(times(mul(weight, weighted), 2), own), K)
            tl.store(to + offset + d * K.dim + j, tl.where(d >= j, gradient, 0), inside & (d < K.dim))
    return rounded(result, K), sums


@triton.jit
def reward_variance(scale, along, u, d, K: tl.constexpr):
    """2 ‖LᵀUL‖² + 4 ‖Lᵀ along‖², (1, B, 1), without derivatives."""
    result = tl.zeros_like(total(along, 0)).to(tl.float64)
    for j in range(0, K.dim):
        column = column_of(scale, j, K)
        weighted = apply(u, column, d, K)
        product = tl.zeros_like(along)
        for i in range(0, K.dim):
            product += pick(weighted, i, d) * row_of(scale, i, K)
        projected = total(column * along, 0)
        result += 2 * total(product * product, 0) + 4 * projected * projected
    return result.to(K.T)
