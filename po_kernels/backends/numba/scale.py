"""What the two Gaussians differ in: the scale S of ŷ = μ + S ε in a tile of rows.

It is an array (D, TILE), σ of S = diag(σ) given by log σ, or (D, D, TILE), S = L, lower triangular with a positive
diagonal. Numba compiles the branch that the array's axes decide; arrays of the shape of the scale are filled alike.
Samples are columns, those of the rows of a tile (`lanes`) one after another: sample g of row b is column g * lanes + b.
"""

import math

import numpy as np

from .maths import exp
from .precision import add_outer_sum, apply, diagonal
from .rows import TILE, helper


@helper
def scale_like(parameter):
    """Scratch for the scale given by log σ (B, D) or L (B, D, D)."""
    dim = parameter.shape[1]
    if parameter.ndim == 2:
        return np.empty((dim, TILE))
    else:
        return np.empty((dim, dim, TILE))


@helper
def load_scale(parameter, begin, lanes, scale, log_det):
    """Fills in S and log det S. Returns whether a row may have to be refused; above the diagonal nothing is used."""
    refused, dim, step = False, len(scale), 1 if len(parameter) > 1 else 0
    for b in range(lanes):
        row = (begin + b) * step
        log_det[b] = 0.0
        for i in range(dim):
            if scale.ndim == 2:
                scale[i, b] = parameter[row, i]
            else:
                for j in range(i + 1):
                    scale[i, j, b] = parameter[row, i, j]
                for j in range(i + 1, dim):
                    refused |= parameter[row, i, j] != 0.0
    for i in range(dim):
        for b in range(lanes):
            if scale.ndim == 2:
                log_det[b] += scale[i, b]
                scale[i, b] = exp(scale[i, b])
            else:
                refused |= not scale[i, i, b] > 0.0
                log_det[b] += math.log(scale[i, i, b])
    return refused


@helper
def store_scale(x, begin, lanes, out):
    """Writes the gradient in the parameter, which is zero above the diagonal."""
    for b in range(lanes):
        for i in range(len(x)):
            if x.ndim == 2:
                out[begin + b, i] = x[i, b]
            else:
                for j in range(len(x)):
                    out[begin + b, i, j] = x[i, j, b] if j <= i else 0.0


@helper
def clear_scale(x, lanes):
    for i in range(len(x)):
        if x.ndim == 2:
            for b in range(lanes):
                x[i, b] = 0.0
        else:
            for j in range(i + 1):
                for b in range(lanes):
                    x[i, j, b] = 0.0


@helper
def stretch(lanes, count, scale, base, eps, y):
    """y = base + S eps, of `count` samples."""
    for i in range(len(scale)):
        for g in range(count):
            at = g * lanes
            for b in range(lanes):
                y[i, at + b] = base[i, b]
            if scale.ndim == 2:
                for b in range(lanes):
                    y[i, at + b] += scale[i, b] * eps[i, at + b]
            else:
                for j in range(i + 1):
                    for b in range(lanes):
                        y[i, at + b] += scale[i, j, b] * eps[j, at + b]


@helper
def whiten(lanes, count, scale, x):
    """x <- S⁻¹ x, of `count` samples."""
    for i in range(len(scale)):
        for g in range(count):
            at = g * lanes
            if scale.ndim == 2:
                for b in range(lanes):
                    x[i, at + b] /= scale[i, b]
            else:
                for j in range(i):
                    for b in range(lanes):
                        x[i, at + b] -= scale[i, j, b] * x[j, at + b]
                for b in range(lanes):
                    x[i, at + b] /= scale[i, i, b]


@helper
def whiten_transposed(lanes, scale, x):
    """x <- S⁻ᵀ x: of z, the derivative of log p in the mean."""
    for i in range(len(scale) - 1, -1, -1):
        if scale.ndim == 2:
            for b in range(lanes):
                x[i, b] /= scale[i, b]
        else:
            for k in range(i + 1, len(scale)):
                for b in range(lanes):
                    x[i, b] -= scale[k, i, b] * x[k, b]
            for b in range(lanes):
                x[i, b] /= scale[i, i, b]


@helper
def add_samples(lanes, count, f, x, out):
    """Adds Σ f x over the samples of each row."""
    for i in range(len(out)):
        for g in range(count):
            at = g * lanes
            for b in range(lanes):
                out[i, b] += f[at + b] * x[i, at + b]


@helper
def add_outer(lanes, count, f, x, y, out):
    """Adds Σ f x yᵀ over the samples of each row to an array of the shape of the scale."""
    for i in range(len(out)):
        for g in range(count):
            at = g * lanes
            if out.ndim == 2:
                for b in range(lanes):
                    out[i, b] += f[at + b] * x[i, at + b] * y[i, at + b]
            else:
                for j in range(i + 1):
                    for b in range(lanes):
                        out[i, j, b] += f[at + b] * x[i, at + b] * y[j, at + b]


@helper
def to_parameter(lanes, scale, x):
    """The gradient in S becomes that in log σ, or in L."""
    if scale.ndim == 2:
        for i in range(len(scale)):
            for b in range(lanes):
                x[i, b] *= scale[i, b]


@helper
def add_log_det(lanes, scale, f, out):
    """Adds f times the derivative of log det S in the parameter."""
    for i in range(len(scale)):
        for b in range(lanes):
            if scale.ndim == 2:
                out[i, b] += f[b]
            else:
                out[i, i, b] += f[b] / scale[i, i, b]


@helper
def score(lanes, scale, total, first, need_scale, second):
    """What Σ f ∂log p/∂(μ, S) is, in the place of Σ f z and Σ f z zᵀ; total = Σ f.

    ∂log p/∂μ = a and ∂log p/∂L = a zᵀ - diag(1 / L_jj), with Lᵀ a = z; in log σ it is z² - 1.
    """
    whiten_transposed(lanes, scale, first)
    if not need_scale:
        return
    if scale.ndim == 3:
        for i in range(len(scale) - 1, -1, -1):
            for j in range(i + 1):
                for k in range(i + 1, len(scale)):
                    for b in range(lanes):
                        second[i, j, b] -= scale[k, i, b] * second[k, j, b]
                for b in range(lanes):
                    second[i, j, b] /= scale[i, i, b]
    for b in range(lanes):
        total[b] = -total[b]
    add_log_det(lanes, scale, total, second)


@helper
def trace(lanes, scale, u, weight, total, to_scale, need_u, to_u, column, other):
    """Adds tr(U S Sᵀ), and weight times its gradients in S and in U: Σ_j s_jᵀ U s_j over the columns of S."""
    dim = len(scale)
    if scale.ndim == 2:
        for j in range(dim):
            entry = diagonal(u, j)
            for b in range(lanes):
                total[b] += entry * scale[j, b] * scale[j, b]
                to_scale[j, b] += 2.0 * weight[b] * entry * scale[j, b]
            if need_u:
                spread = 0.0
                for b in range(lanes):
                    spread += weight[b] * scale[j, b] * scale[j, b]
                if u.ndim == 1:
                    to_u[j] += spread
                else:
                    to_u[j, j] += spread
    else:
        for j in range(dim):
            for i in range(dim):
                for b in range(lanes):
                    column[i, b] = scale[i, j, b] if i >= j else 0.0
            apply(lanes, u, column, other)
            for i in range(j, dim):
                for b in range(lanes):
                    total[b] += column[i, b] * other[i, b]
                    to_scale[i, j, b] += 2.0 * weight[b] * other[i, b]
            if need_u:
                add_outer_sum(lanes, weight, column, to_u)


@helper
def reward_variance(lanes, scale, u, x, total, column, other):
    """2 ‖SᵀUS‖² + 4 ‖Sᵀx‖², with x = U (μ - y)."""
    dim = len(scale)
    for b in range(lanes):
        total[b] = 0.0
    for j in range(dim):
        if scale.ndim == 2:
            for b in range(lanes):
                total[b] += 4.0 * (scale[j, b] * x[j, b]) ** 2
                total[b] += 2.0 * (diagonal(u, j) * scale[j, b] * scale[j, b]) ** 2
            if u.ndim == 2:
                for i in range(j):
                    for b in range(lanes):
                        total[b] += 4.0 * (u[i, j] * scale[i, b] * scale[j, b]) ** 2
        else:
            for i in range(dim):
                for b in range(lanes):
                    column[i, b] = scale[i, j, b] if i >= j else 0.0
            apply(lanes, u, column, other)
            for b in range(lanes):
                along = 0.0
                for i in range(j, dim):
                    along += scale[i, j, b] * x[i, b]
                total[b] += 4.0 * along * along
                for k in range(dim):
                    product = 0.0
                    for i in range(k, dim):
                        product += scale[i, k, b] * other[i, b]
                    total[b] += 2.0 * product * product
