"""The precision U of a Mahalanobis reward r = -(ŷ - y)ᵀ U (ŷ - y), shared by all rows."""

from typing import Any, NamedTuple

from .lanes import full, helper, inlined, output, shared

SCALAR, DIAGONAL, FULL = range(3)


class Precision(NamedTuple):
    """Flat: one number, dim of them, or a symmetric dim * dim; with their derivatives, which floats do not read."""

    kind: int
    value: Any
    tangent: Any


@inlined
def entry(p, u, i):
    """Number i of u, as what the pointer `p` points at."""
    return shared(p, u.value[i], u.tangent[i])


@helper
def diagonal_entry(p, u, dim, j):
    return entry(p, u, 0 if u.kind == SCALAR else j if u.kind == DIAGONAL else j * dim + j)


@helper
def apply(u, dim, x, y, first):
    """y = U x for an x that is zero before `first`, where y is not wanted either."""
    if u.kind != FULL:
        for i in range(first, dim):
            y[i] = x[i] * entry(x, u, 0 if u.kind == SCALAR else i)
        return
    i = first
    while i + 4 <= dim:  # as many sums at once as keep the processor busy
        a, b, c, d = full(x, 0.0), full(x, 0.0), full(x, 0.0), full(x, 0.0)
        at = i * dim
        for j in range(first, dim):
            v = x[j]
            a = a + v * entry(x, u, at + j)
            b = b + v * entry(x, u, at + dim + j)
            c = c + v * entry(x, u, at + 2 * dim + j)
            d = d + v * entry(x, u, at + 3 * dim + j)
        y[i], y[i + 1], y[i + 2], y[i + 3] = a, b, c, d
        i += 4
    while i < dim:
        a = full(x, 0.0)
        for j in range(first, dim):
            a = a + x[j] * entry(x, u, i * dim + j)
        y[i] = a
        i += 1


@inlined
def quadratic(u, dim, x):
    """xᵀ U x."""
    total = full(x, 0.0)
    if u.kind != FULL:
        for i in range(dim):
            v = x[i]
            total = total + v * v * entry(x, u, 0 if u.kind == SCALAR else i)
        return total
    # Twice what is below the diagonal, and the diagonal.
    i = 0
    while i + 4 <= dim:
        a, b, c, d = full(x, 0.0), full(x, 0.0), full(x, 0.0), full(x, 0.0)
        at = i * dim
        for j in range(i):
            v = x[j]
            a = a + v * entry(x, u, at + j)
            b = b + v * entry(x, u, at + dim + j)
            c = c + v * entry(x, u, at + 2 * dim + j)
            d = d + v * entry(x, u, at + 3 * dim + j)
        at += i
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        b = b + x0 * entry(x, u, at + dim)
        c = c + x0 * entry(x, u, at + 2 * dim) + x1 * entry(x, u, at + 2 * dim + 1)
        d = d + x0 * entry(x, u, at + 3 * dim) + x1 * entry(x, u, at + 3 * dim + 1)
        d = d + x2 * entry(x, u, at + 3 * dim + 2)
        total = total + x0 * (a * 2.0 + x0 * entry(x, u, at))
        total = total + x1 * (b * 2.0 + x1 * entry(x, u, at + dim + 1))
        total = total + x2 * (c * 2.0 + x2 * entry(x, u, at + 2 * dim + 2))
        total = total + x3 * (d * 2.0 + x3 * entry(x, u, at + 3 * dim + 3))
        i += 4
    while i < dim:
        a, v = full(x, 0.0), x[i]
        for j in range(i):
            a = a + x[j] * entry(x, u, i * dim + j)
        total = total + v * (a * 2.0 + v * entry(x, u, i * dim + i))
        i += 1
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
