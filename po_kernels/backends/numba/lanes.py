"""Random numbers, group advantages and precisions for one row, compiled by Numba.

The functions are written once for two kinds of numbers: floats, and complex numbers a + i h b that carry the
derivative b of a along, h = 2**-300 (Squire and Trapp, SIAM Review 40(1), 1998). Products of two h underflow far
below the last bit, so that this arithmetic is that of dual numbers. `x.real` drops a derivative; `output`
puts out a value, or on such numbers its derivative.
"""

import math

import numpy as np
from numba import njit

H = 2.0**-300
CLOSED_FORM, REPARAM, DICE, REINFORCE = range(4)
NONE, MIN, MEAN, LOO, STANDARDIZED = range(5)
STANDARDIZED_EPS = 1e-6
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

_MASK = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32 = np.uint64(32)


def compiled(function):
    """Compiled at the first call, kept on disk, and run without the interpreter's lock."""
    return njit(cache=True, nogil=True, error_model="numpy")(function)


@compiled
def output(x, dual):
    return x.imag / H if dual else x.real


@compiled
def philox4x32(c0, c1, c2, c3, seed):
    """Salmon et al., SC 2011; words and the 64-bit key are uint64."""
    k0, k1 = seed & _MASK, seed >> _32
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@compiled
def uniform(word):
    return (float(word >> np.uint64(8)) + 0.5) * 2.0**-24


@compiled
def standard_normals(seed, sample, row, dim, out):
    """Box-Muller; dimension 4 k + i from block k."""
    for block in range((dim + 3) // 4):
        words = philox4x32(np.uint64(block), np.uint64(sample), row & _MASK, row >> _32, seed)
        for pair in range(2):
            at = 4 * block + 2 * pair
            if at < dim:
                radius = math.sqrt(-2.0 * math.log(uniform(words[2 * pair])))
                angle = 2.0 * math.pi * uniform(words[2 * pair + 1])
                out[at] = radius * math.cos(angle)
                if at + 1 < dim:
                    out[at + 1] = radius * math.sin(angle)


@compiled
def mean_from_first(x):
    """Mean relative to the first, so that equal members have no rounding between them."""
    total = x[0] - x[0]
    for g in range(1, x.shape[0]):
        total += x[g] - x[0]
    return total / x.shape[0]


@compiled
def group_std(x):
    """Zero, with no derivative, for equal members."""
    mean = mean_from_first(x)
    largest = 0.0
    for g in range(x.shape[0]):
        size = abs((x[g] - x[0] - mean).real)
        if not largest >= size:  # a nan is taken
            largest = size
    if largest == 0.0:
        return mean - mean
    total = x[0] - x[0]
    for g in range(x.shape[0]):
        total += ((x[g] - x[0] - mean) / largest) ** 2
    return np.sqrt(total / x.shape[0]) * largest


@compiled
def advantages(kind, reward, advantage):
    count = reward.shape[0]
    if kind == NONE:
        for g in range(count):
            advantage[g] = reward[g]
        return
    if kind == MIN:
        least = reward[0].real
        for g in range(1, count):
            least = min(least, reward[g].real)
        for g in range(count):
            advantage[g] = reward[g] - least
        return
    mean = mean_from_first(reward)
    for g in range(count):
        advantage[g] = reward[g] - reward[0] - mean
    if kind == LOO:
        for g in range(count):
            advantage[g] *= count / (count - 1)
    elif kind == STANDARDIZED:
        std = group_std(reward)
        for g in range(count):
            advantage[g] = advantage[g] / (std + STANDARDIZED_EPS) if std.real != 0.0 else 0.0


@compiled
def advantages_transposed(kind, reward, u):
    """u <- Jᵀ u with J the Jacobian of the advantages in the rewards."""
    count = reward.shape[0]
    if kind in (NONE, MIN):
        return
    mean = u[0] - u[0]
    for g in range(count):
        mean += u[g]
    mean /= count
    if kind != STANDARDIZED:
        scale = count / (count - 1) if kind == LOO else 1.0
        for g in range(count):
            u[g] = (u[g] - mean) * scale
        return
    std = group_std(reward)
    if std.real == 0.0:
        for g in range(count):
            u[g] = 0.0
        return
    centre = mean_from_first(reward)
    dot = mean - mean
    for g in range(count):
        dot += u[g] * (reward[g] - reward[0] - centre)
    slope = dot / ((std + STANDARDIZED_EPS) ** 2 * std * count)
    for g in range(count):
        u[g] = (u[g] - mean) / (std + STANDARDIZED_EPS) - (reward[g] - reward[0] - centre) * slope


@compiled
def finish_group(estimator, kind, has_rbf, gamma, dual, reward, excess, advantage, pull):
    """(1/G) Σ_g [r_g + (w_g - 1) A_g], and in `pull` its derivatives in the untransformed rewards times G.

    `reward` is transformed already; `excess` is w - 1, zero with the derivative of log p.
    """
    count = reward.shape[0]
    total = reward[0] - reward[0]
    advantages(kind, reward, advantage)
    for g in range(count):
        total += reward[g] + excess[g] * advantage[g]
        pull[g] = excess[g]
    if dual:
        advantages_transposed(kind, reward, pull)
    for g in range(count):
        pull[g] += 1.0
        if has_rbf:
            pull[g] *= reward[g] * gamma
    return total / count


@compiled
def transformed(reward, has_rbf, gamma):
    return np.exp(reward * gamma) if has_rbf else reward


@compiled
def group_stats(reward, advantage, stats):
    stats[0] = (mean_from_first(reward) + reward[0]).real
    stats[1] = group_std(reward).real
    stats[4] = group_std(advantage).real


@compiled
def precision_entry(kind, u, dim, i, j):
    """U_ij of a precision that is passed flat: one number, dim of them, or dim * dim."""
    if kind == 2:
        return u[i * dim + j]
    if i != j:
        return u[0] - u[0]
    return u[0] if kind == 0 else u[i]


@compiled
def apply_precision(kind, u, dim, x, y):
    for i in range(dim):
        if kind == 2:
            total = u[i * dim] * x[0]
            for j in range(1, dim):
                total += u[i * dim + j] * x[j]
            y[i] = total
        else:
            y[i] = precision_entry(kind, u, dim, i, i) * x[i]


@compiled
def add_outer(kind, dim, weight, x, dual, to):
    """to += weight x xᵀ as the gradient in U; of a matrix the lower triangle."""
    if kind == 2:
        for i in range(dim):
            for j in range(i + 1):
                to[i * dim + j] += output(weight * x[i] * x[j], dual)
    else:
        for j in range(dim):
            to[0 if kind == 0 else j] += output(weight * x[j] * x[j], dual)
