"""What the two Gaussians differ in: the scale S of ŷ = μ + S ε in a tile of rows.

S is lower triangular with a positive diagonal, S = L, or the diagonal of σ = exp(log σ). Its entries are (D * D, TILE)
or (D, TILE), and `tri` says which: of row i those from column `first` to i, each at `entry`. Arrays of the shape of the
scale are filled alike, the gradient in S among them; `to_parameter` makes it that in log σ.
Samples are columns, those of the rows of a tile (`lanes`) one after another: sample g of row b is column g * lanes + b.
"""

import math

import numpy as np

from .precision import add_outer_sum, apply, diagonal, sum_of_products
from .rows import helper, inlined, load


@inlined
def first(tri, i):
    return 0 if tri else i


@inlined
def entry(tri, dim, i, j):
    return i * dim + j if tri else i


@helper
def load_scale(tri, parameter, begin, lanes, dim, scale, log_det):
    """Fills in S and log det S. Returns whether a row may have to be refused; above the diagonal nothing is used."""
    refused = False
    load(parameter, begin, lanes, scale, 0)
    for b in range(lanes):
        log_det[b] = 0.0
    for i in range(dim):
        at = entry(tri, dim, i, i)
        for b in range(lanes):
            if not tri:
                log_det[b] += scale[at, b]
                scale[at, b] = math.exp(scale[at, b])
            else:
                refused |= not 0.0 < scale[at, b] < np.inf
                log_det[b] += math.log(scale[at, b])
        if tri:
            for j in range(i):
                for b in range(lanes):
                    refused |= not abs(scale[entry(tri, dim, i, j), b]) < np.inf
            for j in range(i + 1, dim):
                for b in range(lanes):
                    refused |= scale[entry(tri, dim, i, j), b] != 0.0
    return refused


@helper
def stretch(tri, lanes, count, scale, base, eps, y):
    """y = base + S eps, of `count` samples."""
    dim = len(base)
    for i in range(dim):
        for g in range(count):
            at = g * lanes
            for b in range(lanes):
                y[i, at + b] = base[i, b]
            for j in range(first(tri, i), i + 1):
                k = entry(tri, dim, i, j)
                for b in range(lanes):
                    y[i, at + b] += scale[k, b] * eps[j, at + b]


@helper
def whiten(tri, lanes, count, scale, x):
    """x <- S⁻¹ x, of `count` samples."""
    dim = len(x)
    for i in range(dim):
        for g in range(count):
            at = g * lanes
            for j in range(first(tri, i), i):
                k = entry(tri, dim, i, j)
                for b in range(lanes):
                    x[i, at + b] -= scale[k, b] * x[j, at + b]
            k = entry(tri, dim, i, i)
            for b in range(lanes):
                x[i, at + b] /= scale[k, b]


@helper
def whiten_transposed(tri, lanes, scale, x):
    """x <- S⁻ᵀ x: of z, the derivative of log p in the mean."""
    dim = len(x)
    for i in range(dim - 1, -1, -1):
        for k in range(i + 1, dim if tri else 0):
            for b in range(lanes):
                x[i, b] -= scale[k * dim + i, b] * x[k, b]
        at = entry(tri, dim, i, i)
        for b in range(lanes):
            x[i, b] /= scale[at, b]


@helper
def add_samples(lanes, count, f, x, out):
    """Adds Σ f x over the samples of each row."""
    for i in range(len(out)):
        for g in range(count):
            at = g * lanes
            for b in range(lanes):
                out[i, b] += f[at + b] * x[i, at + b]


@helper
def add_outer(tri, lanes, count, dim, f, x, y, out):
    """Adds Σ f x yᵀ over the samples of each row to an array of the shape of the scale."""
    for i in range(dim):
        for j in range(first(tri, i), i + 1):
            k = entry(tri, dim, i, j)
            for g in range(count):
                at = g * lanes
                for b in range(lanes):
                    out[k, b] += f[at + b] * x[i, at + b] * y[j, at + b]


@helper
def to_parameter(tri, lanes, scale, x):
    """The gradient in S becomes that in log σ, or stays that in L."""
    if not tri:
        for i in range(len(scale)):
            for b in range(lanes):
                x[i, b] *= scale[i, b] if x[i, b] != 0.0 else 1.0  # of an infinite σ too


@helper
def add_log_det(tri, lanes, dim, scale, f, out):
    """Adds f times the derivative of log det S."""
    for i in range(dim):
        at = entry(tri, dim, i, i)
        for b in range(lanes):
            out[at, b] += f[b] / scale[at, b]


@helper
def score(tri, lanes, scale, total, first_moment, need_scale, second):
    """What Σ f ∂log p/∂(μ, L) is, or Σ f ∂log p/∂(μ, log σ), in the place of Σ f z and Σ f z zᵀ; total = Σ f.

    ∂log p/∂μ = a and ∂log p/∂L = a zᵀ - diag(1 / L_jj), with Lᵀ a = z; ∂log p/∂log σ = z² - 1, of any σ.
    """
    dim = len(first_moment)
    whiten_transposed(tri, lanes, scale, first_moment)
    if not need_scale:
        return
    if not tri:
        for i in range(dim):
            for b in range(lanes):
                second[i, b] -= total[b]
        return
    for i in range(dim - 1, -1, -1):
        for j in range(i + 1):
            at = entry(tri, dim, i, j)
            for k in range(i + 1, dim):
                for b in range(lanes):
                    second[at, b] -= scale[k * dim + i, b] * second[k * dim + j, b]
            for b in range(lanes):
                second[at, b] /= scale[entry(tri, dim, i, i), b]
    for b in range(lanes):
        total[b] = -total[b]
    add_log_det(tri, lanes, dim, scale, total, second)


@helper
def trace(tri, lanes, scale, u, weight, total, to_scale, need_u, to_u, column, other):
    """Adds tr(U S Sᵀ), and weight times its gradients in S and in U: Σ_j s_jᵀ U s_j over the columns of S."""
    dim = len(column)
    for j in range(dim):
        if tri:
            for i in range(dim):
                for b in range(lanes):
                    column[i, b] = scale[i * dim + j, b] if i >= j else 0.0
            apply(lanes, u, column, other)
            if need_u:
                add_outer_sum(lanes, weight, column, to_u)
        else:
            for b in range(lanes):
                column[j, b], other[j, b] = scale[j, b], scale[j, b] * diagonal(u, j)
            if need_u:
                spread = sum_of_products(lanes, weight, scale, j, j)
                if u.ndim == 1:
                    to_u[j] += spread
                else:
                    to_u[j, j] += spread
        for i in range(j, dim if tri else j + 1):
            for b in range(lanes):
                total[b] += column[i, b] * other[i, b]
                to_scale[entry(tri, dim, i, j), b] += 2.0 * weight[b] * other[i, b]
