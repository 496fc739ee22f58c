"""The diagonal scale S = diag(σ), in Triton, given by log σ as a number of the shape of d, zero beyond K.dim.

Vectors are (BLOCK_D, B, G), zero beyond K.dim. The functions are those of `mvn`.
"""

import triton
import triton.language as tl

from .lanes import LIFT, add, exp, masked, mul, mul_add, negative, output, plus, square, times, total, value
from .precision import FULL, add_diagonal, apply_squared, diagonal_of


@triton.jit
def log_determinant(scale, K: tl.constexpr):
    """log det S."""
    return total(scale, 0)


@triton.jit
def sample(scale, eps, mean, K: tl.constexpr):
    """μ + S eps."""
    return mul_add(exp(scale), eps, mean)


@triton.jit
def whiten(scale, x, K: tl.constexpr):
    """S⁻¹ x = S⁻ᵀ x. Of a σ whose inverse would be inf a power of two goes with x."""
    small = value(scale) < (-700.0 if value(scale).dtype == tl.float64 else -80.0)
    inverse = exp(negative(plus(scale, tl.where(small, 44.3614195558365, 0.0).to(K.T))))  # log 2^64
    return mul(times(x, tl.where(small, LIFT, 1.0)), inverse)


@triton.jit
def whiten_noise(scale, mean, eps, K: tl.constexpr):
    """S⁻¹ (ŷ - μ) of the constant sample ŷ = μ + S eps: eps, with the derivative that μ and S give it."""
    if K.DUAL:
        return eps, -(whiten(scale[0], mean[1], K) + scale[1] * eps)
    else:
        return eps


@triton.jit
def trace(scale, weight, factor, inner, u, sums, to_precision, to, row, inside, d, K: tl.constexpr):
    """tr(U S Sᵀ), (1, B, 1), and the sums with `factor`, or None, times its gradient in U.

    The gradient in S of weight · tr(U S Sᵀ) + inner · log det S is stored.
    """
    variance = masked(d < K.dim, square(exp(scale)))
    spread = mul(diagonal_of(u, d, K), variance)
    if K.NEED_PRECISION:
        one = masked(inside, variance)
        sums = add_diagonal(sums, one if factor is None else mul(factor, one), K)
    if K.NEED_SCALE:
        gradient = output(add(times(mul(weight, spread), 2), inner), K)
        tl.store(to + row * K.dim + d, gradient, inside & (d < K.dim))
    return total(spread, 0), sums


@triton.jit
def reward_variance(scale, along, u, d, K: tl.constexpr):
    """2 tr(U Σ U Σ) + 4 alongᵀ Σ along, (1, B, 1), without derivatives."""
    variance = tl.where(d < K.dim, tl.exp(2 * value(scale)), 0)
    result = 4 * total(along * along * variance, 0)
    if K.KIND == FULL:
        return result + 2 * total(variance * apply_squared(u, variance, d, K), 0)
    else:
        weighted = diagonal_of(u, d, K) * variance
        return result + 2 * total(weighted * weighted, 0)
