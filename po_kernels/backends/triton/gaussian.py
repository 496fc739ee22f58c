"""The diagonal scale S = diag(σ), in Triton, given by log σ as a number (B, 1, BLOCK_D), zero beyond D.

Vectors are (B, G, BLOCK_D), zero beyond D. The functions are those of `mvn`.
"""

import triton
import triton.language as tl

from .lanes import add, exp, load, masked, mul, negative, output, square, times, total, value
from .precision import FULL, add_diagonal, diagonal_of, pick, row_of


@triton.jit
def read(pointer, tangent, offset, inside, d, dim, DUAL: tl.constexpr, T: tl.constexpr):
    return load(pointer, tangent, offset + d, inside & (d < dim), 0, DUAL, T)


@triton.jit
def log_determinant(scale, DUAL: tl.constexpr, T: tl.constexpr):
    """log det S, (B, 1, 1)."""
    return total(scale, 2)


@triton.jit
def stretch(scale, eps, DUAL: tl.constexpr, T: tl.constexpr):
    """S eps."""
    return mul(exp(scale), eps)


@triton.jit
def whiten(scale, x, DUAL: tl.constexpr, T: tl.constexpr):
    """S⁻¹ x."""
    return mul(x, exp(negative(scale)))


@triton.jit
def whiten_transposed(scale, z, DUAL: tl.constexpr, T: tl.constexpr):
    """S⁻ᵀ z."""
    return mul(z, exp(negative(scale)))


@triton.jit
def whiten_noise(scale, mean, eps, DUAL: tl.constexpr, T: tl.constexpr):
    """S⁻¹ (ŷ - μ) of the constant sample ŷ = μ + S eps: eps, with the derivative that μ and S give it."""
    if DUAL:
        return eps, -(mean[1] * tl.exp(-scale[0]) + scale[1] * eps)
    else:
        return eps


@triton.jit
def store_gradient(scale, left, right, inner, to, offset, inside, d, dim, first, DUAL: tl.constexpr, T: tl.constexpr):
    """The gradient in S of Σ_g leftᵀ S right + inner · log det S; left, right (B, G, BLOCK_D), inner (B, 1, 1).

    It is stored if `first`, and else added to what was stored before.
    """
    gradient = output(add(mul(total(mul(left, right), 1), exp(scale)), inner), DUAL)
    mask = inside & (d < dim)
    before = tl.load(to + offset + d, mask & (first == 0), 0).to(T)
    tl.store(to + offset + d, before + gradient, mask)
    tl.debug_barrier()


@triton.jit
def trace(
    scale, weight, inner, u, ut, sums, to_precision, to, offset, inside, d, dim,
    KIND: tl.constexpr, IN_MEMORY: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_PRECISION: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """tr(U S Sᵀ), (B, 1, 1), and the sums with `weight` times its gradient in U.

    The gradient in S of weight · tr(U S Sᵀ) + inner · log det S is stored.
    """
    variance = masked(d < dim, square(exp(scale)))
    spread = mul(diagonal_of(u, ut, d, dim, KIND, DUAL, T), variance)
    if NEED_PRECISION:
        sums = add_diagonal(sums, to_precision, mul(weight, variance), d, dim, KIND, IN_MEMORY, DUAL)
    if NEED_SCALE:
        gradient = output(add(times(mul(weight, spread), 2), inner), DUAL)
        tl.store(to + offset + d, gradient, inside & (d < dim))
    return total(spread, 2), sums


@triton.jit
def reward_variance(scale, along, u, d, dim, KIND: tl.constexpr, T: tl.constexpr):
    """2 tr(U Σ U Σ) + 4 alongᵀ Σ along, (B, 1, 1), without derivatives."""
    variance = tl.where(d < dim, tl.exp(2 * value(scale)), 0)
    result = 4 * total(along * along * variance, 2)
    if KIND == FULL:
        for i in range(0, dim):
            row = row_of(u, u, i, d, dim, False, T)
            result += 2 * total(row * row * variance, 2) * pick(variance, i, d)
        return result
    else:
        weighted = diagonal_of(u, u, d, dim, KIND, False, T) * variance
        return result + 2 * total(weighted * weighted, 2)
