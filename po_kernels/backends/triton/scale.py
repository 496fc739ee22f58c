"""What the kernels of both Gaussian policies ŷ = μ + S ε share, in Triton. z = S⁻¹ (ŷ - μ).

What depends on the scale S is in `gaussian`, where S is a diagonal, and `mvn`, where it is a triangular matrix;
K.TRIANGULAR says which.
"""

import triton
import triton.language as tl

from . import gaussian, mvn
from .lanes import add, exp, load_vector, masked, mul, no_sum, output, plus, square, sub, times, total, value

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)


@triton.jit
def read(x, offset, inside, d, K: tl.constexpr):
    return mvn.Matrix(x, offset, inside, d) if K.TRIANGULAR else load_vector(x, offset, inside, d, K)


@triton.jit
def log_determinant(scale, K: tl.constexpr):
    return mvn.log_determinant(scale, K) if K.TRIANGULAR else gaussian.log_determinant(scale, K)


@triton.jit
def sample(scale, eps, mean, K: tl.constexpr):
    return mvn.sample(scale, eps, mean, K) if K.TRIANGULAR else gaussian.sample(scale, eps, mean, K)


@triton.jit
def whiten(scale, x, K: tl.constexpr):
    return mvn.whiten(scale, x, K) if K.TRIANGULAR else gaussian.whiten(scale, x, K)


@triton.jit
def whiten_transposed(scale, z, K: tl.constexpr):
    return mvn.whiten_transposed(scale, z, K) if K.TRIANGULAR else gaussian.whiten(scale, z, K)


@triton.jit
def whiten_noise(scale, mean, eps, K: tl.constexpr):
    return mvn.whiten_noise(scale, mean, eps, K) if K.TRIANGULAR else gaussian.whiten_noise(scale, mean, eps, K)


@triton.jit
def trace(scale, weight, factor, inner, u, sums, to_precision, to, row, inside, d, K: tl.constexpr):
    if K.TRIANGULAR:
        return mvn.trace(scale, weight, factor, inner, u, sums, to_precision, to, row, inside, d, K)
    else:
        return gaussian.trace(scale, weight, factor, inner, u, sums, to_precision, to, row, inside, d, K)


@triton.jit
def reward_variance(scale, along, u, d, K: tl.constexpr):
    if K.TRIANGULAR:
        return mvn.reward_variance(scale, along, u, d, K)
    else:
        return gaussian.reward_variance(scale, along, u, d, K)


@triton.jit
def no_gradients(K: tl.constexpr):
    vector = no_sum((K.BLOCK_D, K.BLOCK_B, 1), K)
    return vector, vector, no_sum((1, K.BLOCK_B, 1), K)


@triton.jit
def add_gradients(sums, scale, left, right, inner, to, row, inside, d, first, K: tl.constexpr):
    """Adds samples' terms of the gradient in μ and S of Σ_g [leftᵀ (μ + S right) + inner · log det S].

    left, right (BLOCK_D, B, G), inner (1, B, G). K.WHITE: given is Sᵀ left. What is in a triangular S goes to memory.
    """
    mean_sum, product_sum, inner_sum = sums
    if K.TRIANGULAR:
        if K.WHITE:
            left = mvn.whiten_transposed(scale, left, K)
        if K.NEED_SCALE:
            mvn.add_gradient(scale, left, right, inner, to.scale, row, inside, d, first, K)
        return add(mean_sum, total(left, 2)), product_sum, inner_sum
    else:
        product_sum = add(product_sum, total(mul(left, right), 2))
        return add(mean_sum, total(left, 2)), product_sum, add(inner_sum, total(inner, 2))


@triton.jit
def store_gradients(sums, scale, to, row, inside, each, K: tl.constexpr):
    at, mask = row * K.dim + each, inside & (each < K.dim)
    if K.NEED_MEAN:
        found = sums[0]
        if K.WHITE and not K.TRIANGULAR:
            found = gaussian.whiten(scale, found, K)
        tl.store(to.mean + at, output(found, K), mask)
    if K.NEED_SCALE and not K.TRIANGULAR:
        found = sums[1]
        if not K.WHITE:
            found = mul(exp(scale), found)
        tl.store(to.scale + at, output(add(found, sums[2]), K), mask)


@triton.jit
def log_density(log_det, z, K: tl.constexpr):
    """log p from z."""
    return sub(times(total(square(z), 0), -0.5), plus(log_det, K.dim * HALF_LOG_2PI))


@triton.jit
def entropy_of(log_det, K: tl.constexpr):
    return plus(log_det, K.dim * (HALF_LOG_2PI + 0.5))


@triton.jit
def of_row(x):
    """What all samples of a row have alike, (1, B, 1)."""
    if value(x).shape[2] == 1:
        return x
    else:
        return total(masked(tl.arange(0, value(x).shape[2])[None, None, :] == 0, x), 2)
