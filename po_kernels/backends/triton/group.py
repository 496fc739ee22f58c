"""A group of samples of each row: advantages, their transposed derivative, and the surrogate they make, in Triton.

Groups are (CHUNKS, B, BLOCK_G), what a row has one of, (1, B, 1). `g` (CHUNKS, 1, BLOCK_G) numbers the samples; what
is beyond the `count` of them, a floating scalar, is zero. K.ADVANTAGE is the number of a kind.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..advantages import ADVANTAGES
from ..advantages import STANDARDIZED_EPS as EPS
from .lanes import (
    add,
    choose,
    constant,
    exp,
    masked,
    mul,
    plus,
    power_of_two,
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
        s = spread(reward, g, count)
        found = s.deviation * s.factor
        if isinstance(reward, tl.tensor):
            return found
        else:
            return found, (s.tangent - found * s.std_tangent) * s.inverse_std


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
        # With n = (r - mean r) / std: (u - mean u) / (std + 1e-6) - (r - mean r) mean(u n) / (std + 1e-6)².
        s = spread(reward, g, count)
        found = s.deviation * s.factor
        along = times(over(times(u, s.direction)), 1.0 / count)
        rest = less_mean(u, g, count)
        if isinstance(reward, tl.tensor):
            return (rest - found * along) * s.inverse_std
        else:
            # The tangent of n is (ṙ - mean ṙ - n ṡtd) / std, of which that divisor meets the std in r - mean r = n std.
            turned = over(u[0] * s.tangent) * (1.0 / count)
            turned = (turned - along[0] * s.std_tangent) * s.inverse_std + along[1] * s.relative * s.factor
            pulled = (rest[0] - found * along[0]) * s.inverse_std
            falling = (2 * found * along[0] - rest[0]) * s.std_tangent - s.tangent * along[0]
            return pulled, (rest[1] + falling * s.inverse_std - s.direction * turned) * s.inverse_std


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


class Spread(NamedTuple):
    """Of the samples of a group, (CHUNKS, B, BLOCK_G), and their standard deviation, (1, B, 1), as in advantage.hpp.

    All is relative to a power of two near the largest sample, so that squares neither overflow nor vanish and nothing
    is divided by a subnormal number.

    Attributes:
        unit: that power of two.
        deviation: from the mean, over unit; zero beyond the group.
        relative: the standard deviation over unit.
        direction: deviation over relative; 0 of equal samples, as are the two that follow.
        factor: unit over the standard deviation and 1e-6.
        inverse_std: 1 over the same.
        tangent: of the deviation from the mean; a number that is not used where samples have none.
        std_tangent: of the standard deviation, likewise.
    """

    unit: Any
    deviation: Any
    relative: Any
    direction: Any
    factor: Any
    inverse_std: Any
    tangent: Any
    std_tangent: Any


@triton.jit
def spread(x, g, count):
    size = tl.where(g < count, tl.abs(value(x)), 0)
    unit = power_of_two(tl.max(tl.max(size, axis=0, keep_dims=True), axis=2, keep_dims=True))
    inverse = 1 / unit
    deviation = centred(value(x) * inverse, g, count)
    relative = tl.sqrt(over(deviation * deviation) * (1.0 / count))
    varies = relative != 0  # also nan
    direction = tl.where(varies, deviation / tl.where(varies, relative, 1), 0)
    factor = tl.where(varies, 1 / (relative + inverse * STANDARDIZED_EPS), 0)
    tangent = unit
    std_tangent = unit
    if not isinstance(x, tl.tensor):
        tangent = centred(x[1], g, count)
        std_tangent = over(direction * tangent) * (1.0 / count)
    return Spread(unit, deviation, relative, direction, factor, factor * inverse, tangent, std_tangent)


@triton.jit
def group_std(x, g, count):
    """Without derivatives."""
    s = spread(value(x), g, count)
    return s.relative * s.unit


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
