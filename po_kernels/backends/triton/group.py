"""A group of samples of each row: advantages, their transposed derivative, and the surrogate they make, in Triton.

Groups are (CHUNKS, B, BLOCK_G), what a row has one of, (1, B, 1). `g` (CHUNKS, 1, BLOCK_G) numbers the samples; what
is beyond the `count` of them, a floating scalar, is zero.
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
def over(x):
    """The sum over the samples, (1, B, 1)."""
    return total(total(x, 0), 2)


@triton.jit
def from_first(x, g, count):
    """Relative to the first sample, so that equal samples have no rounding between them."""
    return masked(g < count, sub(x, over(masked(g == 0, x))))


@triton.jit
def centred(x, g, count):
    shifted = from_first(x, g, count)
    return masked(g < count, sub(shifted, times(over(shifted), 1.0 / count)))


@triton.jit
def mean(x, g, count):
    return add(times(over(from_first(x, g, count)), 1.0 / count), over(masked(g == 0, x)))


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
    std, varies = standard_deviation(centred(x, g, count), count)
    return masked(varies, std)


@triton.jit
def advantages(reward, g, count, KIND: tl.constexpr):
    if KIND == NONE:
        return masked(g < count, reward)
    elif KIND == MIN:
        least = tl.min(tl.where(g < count, value(reward), float("inf")), axis=0, keep_dims=True)
        return masked(g < count, plus(reward, -tl.min(least, axis=2, keep_dims=True)))
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
        less_mean = masked(g < count, sub(u, times(over(u), 1.0 / count)))
        if KIND == MEAN:
            return less_mean
        elif KIND == LOO:
            return times(less_mean, count / (count - 1))
        else:
            deviation = centred(reward, g, count)
            std, varies = standard_deviation(deviation, count)
            scale = inverse(plus(std, STANDARDIZED_EPS))
            dot = times(over(mul(u, deviation)), 1.0 / count)
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
        reward: transformed already, zero beyond the group.
        excess: w - 1, whose value is zero and whose tangent is that of log p; read with SCORE on pairs only.

    Returns:
        the surrogate, (1, B, 1); A; w A, the factor of the score ∇ log p; the derivative of Σ_g [r_g + (w_g - 1) A_g]
        in the rewards before they were transformed.
    """
    advantage = advantages(reward, g, count, KIND)
    weighted = advantage
    objective = times(over(reward), 1.0 / count)
    pull = constant(tl.where(g < count, tl.zeros_like(value(reward)) + 1, 0), DUAL)
    if SCORE and DUAL:
        product = mul(excess, advantage)
        objective = add(objective, times(over(product), 1.0 / count))
        weighted = add(advantage, product)
        pull = add(pull, advantages_transposed(reward, excess, g, count, KIND))
    if HAS_RBF:
        pull = mul(pull, times(reward, gamma))
    return objective, advantage, weighted, pull


@triton.jit
def numbered(CHUNKS: tl.constexpr, BLOCK_G: tl.constexpr):
    return tl.arange(0, CHUNKS)[:, None, None] * BLOCK_G + tl.arange(0, BLOCK_G)[None, None, :]


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
def finish_group(
    rewards, excess, gamma, count, SCORE: tl.constexpr, KIND: tl.constexpr, HAS_RBF: tl.constexpr,
    WANT_STATS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """`finish` of rewards as they are, and the tangent of log p.

    Returns:
        the surrogate; its mean reward, standard deviations of rewards and of advantages, each (1, B, 1), zero unless
        wanted; w A and the derivative in the rewards.
    """
    g = numbered(excess.shape[0], excess.shape[2])
    reward = masked(g < count, transformed(rewards, gamma, HAS_RBF))
    pair = tl.zeros_like(excess), masked(g < count, excess)
    objective, advantage, factor, pull = finish(reward, pair, gamma, g, count, SCORE, KIND, HAS_RBF, DUAL)
    none = tl.zeros((1, excess.shape[1], 1), excess.dtype)
    reward_mean, reward_std, advantage_std = none, none, none
    if WANT_STATS:
        reward_mean = value(mean(reward, g, count))
        reward_std = value(group_std(reward, g, count))
        advantage_std = value(group_std(advantage, g, count))
    return objective, reward_mean, reward_std, advantage_std, factor, pull
