"""A group of samples of each row: advantages, their transposed derivative, and the surrogate they make, in Triton.

Groups are (CHUNKS, B, BLOCK_G), what a row has one of, (1, B, 1). `g` (CHUNKS, 1, BLOCK_G) numbers the samples; what
is beyond the `count` of them, a floating scalar, is zero. K.ADVANTAGE is the number of a kind.
"""

import triton
import triton.language as tl

from ..advantages import ADVANTAGES
from ..advantages import STANDARDIZED_EPS as EPS
from .lanes import (
    add,
    choose,
    constant,
    exp,
    inverse,
    masked,
    mul,
    or_one,
    plus,
    square,
    square_root,
    sub,
    times,
    total,
    value,
)

NONE = tl.constexpr(ADVANTAGES["none"].number)
MIN = tl.constexpr(ADVANTAGES["min"].number)
MEAN = tl.constexpr(ADVANTAGES["mean"].number)
LOO = tl.constexpr(ADVANTAGES["loo"].number)
STANDARDIZED = tl.constexpr(ADVANTAGES["standardized"].number)
STANDARDIZED_EPS = tl.constexpr(EPS)


@triton.jit
def advantages(reward, g, count, K: tl.constexpr):
    if K.ADVANTAGE == NONE:
        return masked(g < count, reward)
    elif K.ADVANTAGE == MIN:
        least = tl.min(tl.where(g < count, value(reward), float("inf")), axis=0, keep_dims=True)
        return masked(g < count, plus(reward, -tl.min(least, axis=2, keep_dims=True)))
    elif K.ADVANTAGE == MEAN:
        return centred(reward, g, count)
    elif K.ADVANTAGE == LOO:
        return times(centred(reward, g, count), count / (count - 1))
    else:
        tl.static_assert(K.ADVANTAGE == STANDARDIZED)
        deviation = centred(reward, g, count)
        std, varies = standard_deviation(deviation, count)
        return masked(varies, mul(deviation, inverse(plus(std, STANDARDIZED_EPS))))


@triton.jit
def advantages_transposed(reward, u, g, count, K: tl.constexpr):
    """Jᵀ u with J the Jacobian of the advantages in the rewards; u is zero beyond the group."""
    if K.ADVANTAGE == NONE or K.ADVANTAGE == MIN:
        return u
    elif K.ADVANTAGE == MEAN:
        return less_mean(u, g, count)
    elif K.ADVANTAGE == LOO:
        return times(less_mean(u, g, count), count / (count - 1))
    else:
        tl.static_assert(K.ADVANTAGE == STANDARDIZED)
        deviation = centred(reward, g, count)
        std, varies = standard_deviation(deviation, count)
        scale = inverse(plus(std, STANDARDIZED_EPS))
        dot = times(over(mul(u, deviation)), 1.0 / count)
        slope = mul(mul(dot, square(scale)), inverse(std))
        return masked(varies, sub(mul(less_mean(u, g, count), scale), mul(deviation, slope)))


@triton.jit
def over(x):
    """The sum over the samples, (1, B, 1)."""
    return total(total(x, 0), 2)


@triton.jit
def less_mean(x, g, count):
    return masked(g < count, sub(x, times(over(x), 1.0 / count)))


@triton.jit
def from_first(x, g, count):
    """Relative to the first sample, so that equal samples have no rounding between them."""
    return masked(g < count, sub(x, over(masked(g == 0, x))))


@triton.jit
def centred(x, g, count):
    return less_mean(from_first(x, g, count), g, count)


@triton.jit
def standard_deviation(deviation, count):
    """Of samples centred already, and whether they differ; 1, with no derivative, where they do not.

    Deviations are squared relative to the largest, so that they neither overflow nor vanish.
    """
    size = tl.abs(value(deviation))
    largest = tl.max(tl.max(size, axis=0, keep_dims=True), axis=2, keep_dims=True)
    varies = over((size != 0).to(tl.int32)) != 0  # a nan is other than 0
    unit = tl.where(largest != 0, largest, 1)
    variance = times(over(square(times(deviation, 1 / unit))), 1.0 / count)
    return times(square_root(or_one(varies, variance)), unit), varies


@triton.jit
def group_std(x, g, count):
    """Without derivatives."""
    std, varies = standard_deviation(centred(value(x), g, count), count)
    return masked(varies, std)


@triton.jit
def transformed(reward, gamma, K: tl.constexpr):
    return exp(times(reward, gamma)) if K.HAS_RBF else reward


@triton.jit
def numbered(K: tl.constexpr):
    return tl.arange(0, K.CHUNKS)[:, None, None] * K.BLOCK_G + tl.arange(0, K.BLOCK_G)[None, None, :]


@triton.jit
def place(group, chunk, x):
    """The group (CHUNKS, B, BLOCK_G) with x (1, B, BLOCK_G) in place of a chunk."""
    if value(group).shape[0] == 1:
        return x
    else:
        return choose(tl.arange(0, value(group).shape[0])[:, None, None] == chunk, x, group)


@triton.jit
def take(group, chunk):
    """A chunk (1, B, BLOCK_G) of a group (CHUNKS, B, BLOCK_G)."""
    if value(group).shape[0] == 1:
        return group
    else:
        return total(masked(tl.arange(0, value(group).shape[0])[:, None, None] == chunk, group), 0)


@triton.jit
def finish_group(rewards, excess, gamma, count, K: tl.constexpr):
    """The surrogate (1/G) Σ_g [r_g + (w_g - 1) A_g] and what its gradients need.

    Args:
        excess: the tangent of w - 1, whose value is zero: that of log p; read with K.SCORE on pairs only.

    Returns:
        the surrogate, (1, B, 1); mean and standard deviation of the rewards and that of the advantages, zero unless
        wanted; w A, the factor of the score ∇ log p; the derivative of Σ_g [r_g + (w_g - 1) A_g] in the rewards.
    """
    g = numbered(K)
    reward = masked(g < count, transformed(rewards, gamma, K))
    advantage = advantages(reward, g, count, K)
    factor = advantage
    objective = times(over(reward), 1.0 / count)
    pull = constant(tl.where(g < count, tl.zeros_like(value(reward)) + 1, 0), K)
    if K.SCORE and K.DUAL:
        pair = tl.zeros_like(excess), masked(g < count, excess)
        product = mul(pair, advantage)
        objective = add(objective, times(over(product), 1.0 / count))
        factor = add(advantage, product)
        pull = add(pull, advantages_transposed(reward, pair, g, count, K))
    if K.HAS_RBF:
        pull = mul(pull, times(reward, gamma))
    none = tl.zeros((1, K.BLOCK_B, 1), K.T)
    moments = none, none, none
    if K.WANT_STATS:
        mean = value(times(over(from_first(reward, g, count)), 1.0 / count)) + value(over(masked(g == 0, reward)))
        moments = mean, group_std(reward, g, count), group_std(advantage, g, count)
    return objective, moments, factor, pull
