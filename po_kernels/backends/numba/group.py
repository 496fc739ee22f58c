"""A group of samples of one row: advantages, their transposed derivative, and the surrogate they make.

A group is 4 G items of scratch: rewards after the rbf transformation, w - 1 (zero, with the derivative of log p),
advantages, and the derivative of Σ_g [r_g + (w_g - 1) A_g] in the untransformed rewards.
"""

from typing import NamedTuple

from .lanes import full, helper, inlined, is_dual, put, select, stop
from .maths import exp, square_root

CLOSED_FORM, REPARAM, DICE, REINFORCE = range(4)
NONE, MIN, MEAN, LOO, STANDARDIZED = range(5)
STANDARDIZED_EPS = 1e-6


class Surrogate(NamedTuple):
    """How the group's rewards make a loss; the numbers of estimators and advantages are those above."""

    estimator: int
    advantage: int
    samples: int
    entropy_coef: float
    has_rbf: bool
    gamma: float


@helper
def clear(count, x):
    for i in range(count):
        x[i] = 0.0


@helper
def mean_from_first(count, x):
    """Mean relative to the first, so that equal members have no rounding between them."""
    first = x[0]
    total = full(x, 0.0)
    for g in range(1, count):
        total = total + (x[g] - first)
    return total * (1.0 / count)


@helper
def group_std(count, x):
    """Zero, with no derivative, for equal members. Deviations are squared relative to the largest."""
    first, mean = x[0], mean_from_first(count, x)
    largest = stop(full(x, 0.0))
    for g in range(count):
        deviation = stop(x[g] - first - mean)
        size = select(deviation < 0.0, -deviation, deviation)
        largest = select(largest >= size, largest, size)  # a nan is taken
    varies = largest != 0.0
    unit = select(varies, largest, 1.0)
    inverse = 1.0 / unit
    total = full(x, 0.0)
    for g in range(count):
        scaled = (x[g] - first - mean) * inverse
        total = total + scaled * scaled
    variance = select(varies, total * (1.0 / count), full(x, 1.0))
    return select(varies, square_root(variance) * unit, full(x, 0.0))


@helper
def advantages(kind, count, reward, advantage):
    if kind == NONE:
        for g in range(count):
            advantage[g] = reward[g]
        return
    if kind == MIN:
        least = stop(reward[0])
        for g in range(1, count):
            r = stop(reward[g])
            least = select(r < least, r, least)
        for g in range(count):
            advantage[g] = reward[g] - least
        return
    first, mean = reward[0], mean_from_first(count, reward)
    for g in range(count):
        advantage[g] = reward[g] - first - mean
    if kind == LOO:
        scale = count / (count - 1.0)
        for g in range(count):
            advantage[g] = advantage[g] * scale
    elif kind == STANDARDIZED:
        std = group_std(count, reward)
        varies = stop(std) != 0.0
        inverse = 1.0 / (std + STANDARDIZED_EPS)
        for g in range(count):
            advantage[g] = select(varies, advantage[g] * inverse, full(reward, 0.0))


@helper
def advantages_transposed(kind, count, reward, u):
    """u <- Jᵀ u with J the Jacobian of the advantages in the rewards."""
    if kind in (NONE, MIN):
        return
    mean = full(u, 0.0)
    for g in range(count):
        mean = mean + u[g]
    mean = mean * (1.0 / count)
    if kind != STANDARDIZED:
        scale = count / (count - 1.0) if kind == LOO else 1.0
        for g in range(count):
            u[g] = (u[g] - mean) * scale
        return
    first, centre = reward[0], mean_from_first(count, reward)
    std = group_std(count, reward)
    varies = stop(std) != 0.0
    safe = select(varies, std, full(u, 1.0))
    inverse = 1.0 / (safe + STANDARDIZED_EPS)
    dot = full(u, 0.0)
    for g in range(count):
        dot = dot + u[g] * (reward[g] - first - centre)
    slope = dot * inverse * inverse / safe * (1.0 / count)
    for g in range(count):
        pulled = (u[g] - mean) * inverse - (reward[g] - first - centre) * slope
        u[g] = select(varies, pulled, full(u, 0.0))


@helper
def transformed(s, reward):
    return exp(reward * s.gamma) if s.has_rbf else reward


@helper
def finish(s, group):
    """(1/G) Σ_g [r_g + (w_g - 1) A_g]."""
    count = s.samples
    reward, excess, advantage, pull = group, group + count, group + 2 * count, group + 3 * count
    total = full(group, 0.0)
    for g in range(count):
        total = total + reward[g]
        pull[g] = 0.0
    if s.estimator != REPARAM:
        advantages(s.advantage, count, reward, advantage)
        if is_dual(group):
            for g in range(count):
                total = total + excess[g] * advantage[g]
                pull[g] = excess[g]
            advantages_transposed(s.advantage, count, reward, pull)
    for g in range(count):
        pull[g] = pull[g] + 1.0
    if s.has_rbf:
        for g in range(count):
            pull[g] = pull[g] * reward[g] * s.gamma
    return total * (1.0 / count)


@inlined
def score_factor(s, group, g):
    """w_g A_g, the factor of the score ∇ log p."""
    advantage = group[2 * s.samples + g]
    return advantage + group[s.samples + g] * advantage if is_dual(group) else advantage


@helper
def group_stats(s, group, stats, rows, begin, lanes):
    """Writes the rewards' and the advantages' part of the statistics (5, rows), of a finished group."""
    count = s.samples
    reward, advantage = group, group + 2 * count
    if s.estimator == REPARAM:
        advantages(s.advantage, count, reward, advantage)
    put(mean_from_first(count, reward) + reward[0], stats, begin, lanes)
    put(group_std(count, reward), stats, rows + begin, lanes)
    put(group_std(count, advantage), stats, 4 * rows + begin, lanes)
