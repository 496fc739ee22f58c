"""The precision U of a Mahalanobis reward r = -(ŷ - y)ᵀ U (ŷ - y), shared by all rows."""

from typing import Any, NamedTuple

from .lanes import full, helper, inlined, output, shared

SCALAR, DIAGONAL, FULL = range(3)


class Precision(NamedTuple):
    """Flat: one number, dim of them, or a symmetric dim * dim; with their derivatives, which floats do not read."""

    kind: int
    value: Any
    tangent: Any


@helper
def diagonal_entry(p, u, dim, j):
    """U_jj as what the pointer `p` points at."""
    at = 0 if u.kind == SCALAR else j if u.kind == DIAGONAL else j * dim + j
    return shared(p, u.value, u.tangent, at)


@helper
def apply(u, dim, x, y, first):
    """y = U x for an x that is zero before `first`, where y is not wanted either."""
    kind, value, tangent = u
    for i in range(first, dim):
        if kind != FULL:
            y[i] = x[i] * shared(x, value, tangent, 0 if kind == SCALAR else i)
        else:
            total = full(x, 0.0)
            for j in range(first, dim):
                total = total + x[j] * shared(x, value, tangent, i * dim + j)
            y[i] = total


@inlined
def quadratic(u, dim, x):
    """xᵀ U x: of a matrix twice what is below the diagonal, and the diagonal."""
    kind, value, tangent = u
    total = full(x, 0.0)
    for i in range(dim):
        v, at = x[i], 0 if kind == SCALAR else i
        below = full(x, 0.0)
        if kind == FULL:
            at = i * dim + i
            for j in range(i):
                below = below + x[j] * shared(x, value, tangent, i * dim + j)
        total = total + v * (below * 2.0 + v * shared(x, value, tangent, at))
    return total


@inlined
def accumulate_outer(kind, dim, weighted, x, to, first):
    """to += weighted xᵀ as the gradient in U, of a matrix the lower triangle; both are zero before `first`."""
    if kind == FULL:
        for i in range(first, dim):
            v, row = weighted[i], to + i * (i + 1) // 2
            for j in range(first, i + 1):
                row[j] = row[j] + output(v * x[j])
    else:
        for j in range(first, dim):
            at = 0 if kind == SCALAR else j
            to[at] = to[at] + output(weighted[j] * x[j])
