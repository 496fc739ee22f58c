"""A group of samples of one row: advantages, their transposed derivative, and the surrogate that they make.

A group is an array of G numbers. All that is known of an advantage here is in `advantages` and `advantages_transposed`.
"""

import math
from typing import NamedTuple

from ..advantages import ADVANTAGES, STANDARDIZED_EPS
from ..contract import ESTIMATORS, OpConfig
from .maths import exp
from .rows import helper

CLOSED_FORM, REPARAM = ESTIMATORS["analytic"], ESTIMATORS["reparam"]
NONE, MIN, LOO, STANDARDIZED = (ADVANTAGES[name].number for name in ("none", "min", "loo", "standardized"))


class Surrogate(NamedTuple):
    """How a group's rewards make a loss."""

    estimator: int
    advantage: int
    count: int  # G
    entropy_coef: float
    has_rbf: bool
    gamma: float


def surrogate_of(config: OpConfig, count: int | None = None) -> Surrogate:
    return Surrogate(
        ESTIMATORS.get(config.estimator, CLOSED_FORM),
        ADVANTAGES[config.advantage].number,
        config.num_samples if count is None else count,
        float(config.entropy_coef),
        config.rbf_gamma is not None,
        float(config.rbf_gamma or 0.0),
    )


@helper
def _sum(x):
    total = 0.0
    for value in x:
        total += value
    return total


@helper
def _mean_from_first(x):
    """Mean relative to the first, so that equal members have no rounding between them."""
    total = 0.0
    for value in x:
        total += value - x[0]
    return total / len(x)


@helper
def group_std(x):
    """Zero for equal members. Deviations are squared relative to the largest, so that they neither overflow nor vanish."""
    mean, largest = _mean_from_first(x), 0.0
    for value in x:
        size = abs(value - x[0] - mean)
        if not largest >= size:  # a nan is taken
            largest = size
    if largest == 0.0:
        return 0.0
    total = 0.0
    for value in x:
        total += ((value - x[0] - mean) / largest) ** 2
    return math.sqrt(total / len(x)) * largest


@helper
def advantages(kind, reward, advantage):
    count = len(reward)
    if kind == NONE:
        for g in range(count):
            advantage[g] = reward[g]
        return
    if kind == MIN:
        least = reward[0]
        for g in range(count):
            least = least if least <= reward[g] else reward[g]  # a nan is taken
        for g in range(count):
            advantage[g] = reward[g] - least
        return
    mean = _mean_from_first(reward)
    scale = count / (count - 1.0) if kind == LOO else 1.0
    for g in range(count):
        advantage[g] = (reward[g] - reward[0] - mean) * scale
    if kind == STANDARDIZED:
        std = group_std(reward)
        for g in range(count):
            advantage[g] = 0.0 if std == 0.0 else advantage[g] / (std + STANDARDIZED_EPS)


@helper
def advantages_transposed(kind, reward, u):
    """u <- Jᵀ u with J the Jacobian of the advantages in the rewards, the minimum being a constant."""
    if kind == NONE or kind == MIN:
        return
    count, mean_u, mean = len(reward), _sum(u) / len(u), _mean_from_first(reward)
    scale = count / (count - 1.0) if kind == LOO else 1.0
    std = group_std(reward) if kind == STANDARDIZED else 0.0
    along = 0.0
    for g in range(count):
        along += u[g] * (reward[g] - reward[0] - mean)
    for g in range(count):
        u[g] = (u[g] - mean_u) * scale
        if kind == STANDARDIZED:
            slope = along / (std + STANDARDIZED_EPS) / std / count
            u[g] = 0.0 if std == 0.0 else (u[g] - (reward[g] - reward[0] - mean) * slope) / (std + STANDARDIZED_EPS)


@helper
def transform(s, reward):
    """r <- exp(γ r) if the surrogate has a γ."""
    if s.has_rbf:
        for g in range(len(reward)):
            reward[g] = exp(s.gamma * reward[g])


@helper
def surrogate(s, reward, advantage):
    """Transforms the rewards, fills in their advantages, and returns the objective (1/G) Σ_g r_g."""
    transform(s, reward)
    advantages(s.advantage, reward, advantage)
    return _sum(reward) / len(reward)


@helper
def pull(s, slope, reward):
    """The derivative in a reward, from that in what it was transformed to."""
    return slope * s.gamma * reward if s.has_rbf else slope


@helper
def group_stats(reward, advantage, stats, row):
    stats[0, row] = _mean_from_first(reward) + reward[0]
    stats[1, row] = group_std(reward)
    stats[4, row] = group_std(advantage)
