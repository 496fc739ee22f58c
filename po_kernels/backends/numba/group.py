"""A group of samples of one row: advantages, their transposed derivative, and the surrogate that they make.

A group is an array of G numbers. All that is known of an advantage here is in `advantages` and `advantages_transposed`.
"""

import math
from typing import NamedTuple

import numpy as np

from ..advantages import ADVANTAGES, STANDARDIZED_EPS
from ..contract import ESTIMATORS, OpConfig
from .rows import dot, helper, total

CLOSED_FORM, REPARAM = ESTIMATORS["analytic"], ESTIMATORS["reparam"]
NONE, MIN, LOO, STANDARDIZED = (ADVANTAGES[name].number for name in ("none", "min", "loo", "standardized"))


class Surrogate(NamedTuple):
    """How a group's rewards make a loss."""

    estimator: int
    advantage: int
    samples: int  # G
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
def _centre(x, out):
    """Writes x less its mean, taken relative to the first, so that equal members are exactly zero. Returns the mean."""
    for g in range(len(x)):
        out[g] = x[g] - x[0]
    mean = total(out) / len(x)
    for g in range(len(x)):
        out[g] -= mean
    return mean + x[0]


@helper
def _std(centred):
    """Deviations are squared relative to the largest, so that they neither overflow nor vanish."""
    largest, square = 0.0, 0.0
    for value in centred:
        if not largest >= abs(value):  # a nan is taken
            largest = abs(value)
    if largest == 0.0:
        return 0.0
    for value in centred:
        square += (value / largest) ** 2
    return math.sqrt(square / len(centred)) * largest


@helper
def advantages(kind, reward, advantage):
    count = len(reward)
    if kind in (NONE, MIN):
        least = 0.0 if kind == NONE else reward[0]
        if kind == MIN:
            for g in range(count):
                least = least if least <= reward[g] else reward[g]  # a nan is taken
        for g in range(count):
            advantage[g] = reward[g] - least
        return
    _centre(reward, advantage)
    if kind == LOO:
        for g in range(count):
            advantage[g] *= count / (count - 1.0)
    elif kind == STANDARDIZED:
        std = _std(advantage)
        for g in range(count):
            advantage[g] = 0.0 if std == 0.0 else advantage[g] / (std + STANDARDIZED_EPS)


@helper
def advantages_transposed(kind, reward, u, centred):
    """u <- Jᵀ u with J the Jacobian of the advantages in the rewards, the minimum being a constant."""
    if kind in (NONE, MIN):
        return
    count = len(reward)
    mean, scale = total(u) / count, count / (count - 1.0) if kind == LOO else 1.0
    for g in range(count):
        u[g] = (u[g] - mean) * scale
    if kind == STANDARDIZED:
        _centre(reward, centred)
        std = _std(centred)
        slope = 0.0 if std == 0.0 else dot(u, centred) / (std + STANDARDIZED_EPS) / std / count
        for g in range(count):
            u[g] = 0.0 if std == 0.0 else (u[g] - centred[g] * slope) / (std + STANDARDIZED_EPS)


@helper
def transform(s, reward):
    """r <- exp(γ r) if the surrogate has a γ."""
    if s.has_rbf:
        for g in range(len(reward)):
            reward[g] = math.exp(s.gamma * reward[g])


@helper
def surrogate(s, reward, advantage):
    """Transforms the rewards, fills in their advantages, and returns the objective (1/G) Σ_g r_g."""
    transform(s, reward)
    advantages(s.advantage, reward, advantage)
    return total(reward) / len(reward)


@helper
def pull(s, slope, reward):
    """The derivative in a reward, from that in what it was transformed to."""
    return slope * s.gamma * reward if s.has_rbf else slope


@helper
def group_stats(reward, advantage, stats, row):
    centred = np.empty(len(reward))
    stats[0, row] = _centre(reward, centred)
    stats[1, row] = _std(centred)
    _centre(advantage, centred)
    stats[4, row] = _std(centred)
