"""A group of samples of each row: advantages, their transposed derivative, and the surrogate they make, in Triton.

Groups are (B, 1, G); the first `count` along G are samples, and what is beyond is zero. `g` numbers them; `count` is a
floating scalar. With the samples along the last axis, a warp has them side by side.
"""

import triton
import triton.language as tl

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
    shaped,
    square,
    square_root,
    sub,
    times,
    total,
    value,
)

NONE = tl.constexpr(0)
MIN = tl.constexpr(1)
MEAN = tl.constexpr(2)
LOO = tl.constexpr(3)
STANDARDIZED = tl.constexpr(4)
STANDARDIZED_EPS = tl.constexpr(1e-6)


@triton.jit
def from_first(x, g, count):
    """Relative to the first sample, so that equal samples have no rounding between them."""
    return masked(g < count, sub(x, total(masked(g == 0, x), 2)))


@triton.jit
def centred(x, g, count):
    shifted = from_first(x, g, count)
    return masked(g < count, sub(shifted, times(total(shifted, 2), 1.0 / count)))


@triton.jit
def mean(x, g, count):
    return add(times(total(from_first(x, g, count), 2), 1.0 / count), total(masked(g == 0, x), 2))


@triton.jit
def standard_deviation(deviation, count):
    """Of samples centred already, and whether they differ; 1, with no derivative, where they do not.

    Deviations are squared relative to the largest, so that they neither overflow nor vanish.
    """
    size = tl.abs(value(deviation))
    largest = tl.max(size, axis=2, keep_dims=True)
    varies = tl.sum((size != 0).to(tl.int32), axis=2, keep_dims=True) != 0  # a nan is other than 0
    unit = tl.where(largest != 0, largest, 1)
    variance = times(total(square(times(deviation, 1 / unit)), 2), 1.0 / count)
    return times(square_root(or_one(varies, variance)), unit), varies


@triton.jit
def group_std(x, g, count):
    std, varies = standard_deviation(centred(x, g, count), count)
    return masked(varies, std)


@triton.jit
def advantages(reward, g, count, KIND: tl.constexpr):
    if KIND == NONE:
        return masked(g < count, reward)
    elif KIND == MIN:
        least = tl.min(tl.where(g < count, value(reward), float("inf")), axis=2, keep_dims=True)
        return masked(g < count, plus(reward, -least))
    elif KIND == MEAN:
        return centred(reward, g, count)
    elif KIND == LOO:
        return times(centred(reward, g, count), count / (count - 1))
    else:
        deviation = centred(reward, g, count)
        std, varies = standard_deviation(deviation, count)
        return masked(varies, mul(deviation, inverse(plus(std, STANDARDIZED_EPS))))


@triton.jit
def advantages_transposed(reward, u, g, count, KIND: tl.constexpr):
    """Jᵀ u with J the Jacobian of the advantages in the rewards; u is zero beyond the group."""
    if KIND <= MIN:  # and NONE
        return u
    else:
        less_mean = masked(g < count, sub(u, times(total(u, 2), 1.0 / count)))
        if KIND == MEAN:
            return less_mean
        elif KIND == LOO:
            return times(less_mean, count / (count - 1))
        else:
            deviation = centred(reward, g, count)
            std, varies = standard_deviation(deviation, count)
            scale = inverse(plus(std, STANDARDIZED_EPS))
            dot = times(total(mul(u, deviation), 2), 1.0 / count)
            slope = mul(mul(dot, square(scale)), inverse(std))
            return masked(varies, sub(mul(less_mean, scale), mul(deviation, slope)))


@triton.jit
def transformed(reward, gamma, HAS_RBF: tl.constexpr):
    if HAS_RBF:
        return exp(times(reward, gamma))
    else:
        return reward


@triton.jit
def finish(
    reward, excess, gamma, g, count, SCORE: tl.constexpr, KIND: tl.constexpr, HAS_RBF: tl.constexpr, DUAL: tl.constexpr
):
    """The surrogate (1/G) Σ_g [r_g + (w_g - 1) A_g] and what its gradients need.

    Args:
        reward: (B, 1, G), transformed already, zero beyond the group.
        excess: w - 1, whose value is zero and whose tangent is that of log p; read with SCORE on pairs only.

    Returns:
        the surrogate, (B, 1, 1); A; w A, the factor of the score ∇ log p; the derivative of Σ_g [r_g + (w_g - 1) A_g]
        in the rewards before they were transformed.
    """
    advantage = advantages(reward, g, count, KIND)
    weighted = advantage
    objective = times(total(reward, 2), 1.0 / count)
    pull = constant(tl.where(g < count, tl.zeros_like(value(reward)) + 1, 0), DUAL)
    if SCORE and DUAL:
        product = mul(excess, advantage)
        objective = add(objective, times(total(product, 2), 1.0 / count))
        weighted = add(advantage, product)
        pull = add(pull, advantages_transposed(reward, excess, g, count, KIND))
    if HAS_RBF:
        pull = mul(pull, times(reward, gamma))
    return objective, advantage, weighted, pull


@triton.jit
def place(group, chunk, x):
    """The group (B, CHUNKS, BLOCK_G) with x (B, BLOCK_G, 1) in place of a chunk."""
    x = shaped(x, (value(group).shape[0], 1, value(group).shape[2]))
    if value(group).shape[1] == 1:
        return x
    else:
        return choose(tl.arange(0, value(group).shape[1])[None, :, None] == chunk, x, group)


@triton.jit
def take(group, chunk):
    """A chunk (B, BLOCK_G, 1) of a group (B, CHUNKS, BLOCK_G)."""
    x = total(masked(tl.arange(0, value(group).shape[1])[None, :, None] == chunk, group), 1)
    return shaped(x, (value(group).shape[0], value(group).shape[2], 1))


@triton.jit
def finish_chunks(
    rewards, excess, gamma, count, SCORE: tl.constexpr, KIND: tl.constexpr, HAS_RBF: tl.constexpr,
    WANT_STATS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """`finish` on a group (B, CHUNKS, BLOCK_G) of rewards as they are, and the tangent of log p.

    Returns:
        the surrogate; its mean reward, standard deviations of rewards and of advantages, each (B, 1, 1), zero unless
        wanted; w A and the derivative in the rewards, in chunks.
    """
    BLOCK_B: tl.constexpr = excess.shape[0]
    CHUNKS: tl.constexpr = excess.shape[1]
    BLOCK_G: tl.constexpr = excess.shape[2]
    g = tl.arange(0, CHUNKS * BLOCK_G)[None, None, :]
    FLAT: tl.constexpr = (BLOCK_B, 1, CHUNKS * BLOCK_G)
    reward = masked(g < count, transformed(shaped(rewards, FLAT), gamma, HAS_RBF))
    tangent = masked(g < count, shaped(excess, FLAT))
    pair = tl.zeros_like(tangent), tangent
    objective, advantage, factor, pull = finish(reward, pair, gamma, g, count, SCORE, KIND, HAS_RBF, DUAL)
    none = tl.zeros((BLOCK_B, 1, 1), excess.dtype)
    reward_mean, reward_std, advantage_std = none, none, none
    if WANT_STATS:
        reward_mean = value(mean(reward, g, count))
        reward_std = value(group_std(reward, g, count))
        advantage_std = value(group_std(advantage, g, count))
    CHUNKED: tl.constexpr = (BLOCK_B, CHUNKS, BLOCK_G)
    return objective, reward_mean, reward_std, advantage_std, shaped(factor, CHUNKED), shaped(pull, CHUNKED)
