"""The diagonal scale S = diag(σ), in Triton, given by log σ as a number of the shape of d, zero beyond D.

Vectors are (BLOCK_D, B, G), zero beyond D. The functions are those of `mvn`.
"""

import triton
import triton.language as tl

from .lanes import add, exp, load_vector, masked, mul, mul_add, negative, output, square, times, total, value
from .precision import FULL, add_diagonal, apply_squared, diagonal_of


@triton.jit
def read(pointer, tangent, offset, inside, d, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    return load_vector(pointer, tangent, offset, inside, d, dim, 0, DUAL, T)


@triton.jit
def log_determinant(scale, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """log det S."""
    return total(scale, 0)


@triton.jit
def stretch(scale, eps, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """S eps."""
    return mul(exp(scale), eps)


@triton.jit
def sample(scale, eps, mean, DUAL: tl.constexpr, T: tl.constexpr):
    """μ + S eps."""
    return mul_add(exp(scale), eps, mean)


@triton.jit
def whiten(scale, x, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """S⁻¹ x."""
    return mul(x, exp(negative(scale)))


@triton.jit
def whiten_transposed(scale, z, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """S⁻ᵀ z."""
    return mul(z, exp(negative(scale)))


@triton.jit
def whiten_noise(scale, mean, eps, dim: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """S⁻¹ (ŷ - μ) of the constant sample ŷ = μ + S eps: eps, with the derivative that μ and S give it."""
    if DUAL:
        return eps, -(mean[1] * tl.exp(-scale[0]) + scale[1] * eps)
    else:
        return eps


@triton.jit
def trace(
    scale, weight, factor, inner, u, ut, sums, to_precision, to, offset, inside, d, dim,
    KIND: tl.constexpr, IN_MEMORY: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_PRECISION: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """tr(U S Sᵀ), (1, B, 1), and the sums with `factor`, or None, times its gradient in U.

    The gradient in S of weight · tr(U S Sᵀ) + inner · log det S is stored.
    """
    variance = masked(d < dim, square(exp(scale)))
    spread = mul(diagonal_of(u, ut, d, dim, KIND, DUAL, T), variance)
    if NEED_PRECISION:
        one = masked(inside, variance)
        sums = add_diagonal(sums, one if factor is None else mul(factor, one), KIND, DUAL)
    if NEED_SCALE:
        gradient = output(add(times(mul(weight, spread), 2), inner), DUAL)
        tl.store(to + offset + d, gradient, inside & (d < dim))
    return total(spread, 0), sums


@triton.jit
def reward_variance(scale, along, u, d, dim: tl.constexpr, KIND: tl.constexpr, T: tl.constexpr):
    """2 tr(U Σ U Σ) + 4 alongᵀ Σ along, (1, B, 1), without derivatives."""
    variance = tl.where(d < dim, tl.exp(2 * value(scale)), 0)
    result = 4 * total(along * along * variance, 0)
    if KIND == FULL:
        return result + 2 * total(variance * apply_squared(u, variance, d, dim, T), 0)
    else:
        weighted = diagonal_of(u, u, d, dim, KIND, False, T) * variance
        return result + 2 * total(weighted * weighted, 0)
