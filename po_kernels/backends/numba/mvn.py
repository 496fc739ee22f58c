"""The triangular scale S = L, lower triangular with a positive diagonal; what stands above it is not read."""

from . import scale as declared
from .lanes import all_lanes, full, is_dual, output, stop, tangent_of, with_tangent
from .maths import log
from .precision import accumulate_outer, apply
from .scale import TriangularKind, TriangularScale, implements


@implements(declared.suspicious, TriangularKind)
def suspicious(kind, parameter):
    dim, right = kind.dim, stop(parameter[0]) > 0.0
    for i in range(dim):
        row = parameter + i * dim
        right = right & (stop(row[i]) > 0.0)
        for j in range(i + 1, dim):
            right = right & (stop(row[j]) == 0.0)
    return not all_lanes(right)


@implements(declared.prepared, TriangularKind)
def prepared(kind, parameter, scratch, whitens):
    dim = kind.dim
    for j in range(dim):
        scratch[j] = 1.0 / parameter[j * dim + j]
    return TriangularScale(dim, parameter, scratch, scratch + dim)


@implements(declared.log_determinant, TriangularScale)
def log_determinant(scale):
    total = full(scale.tril, 0.0)
    for j in range(scale.dim):
        total = total + log(scale.tril[j * scale.dim + j])
    return total


@implements(declared.stretch, TriangularScale)
def stretch(scale, base, eps, y):
    for i in range(scale.dim):
        total, row = base[i], scale.tril + i * scale.dim
        for j in range(i + 1):
            total = total + row[j] * eps[j]
        y[i] = total


@implements(declared.whiten, TriangularScale)
def whiten(scale, residual, z):
    for i in range(scale.dim):
        total, row = residual[i], scale.tril + i * scale.dim
        for j in range(i):
            total = total - row[j] * z[j]
        z[i] = total * scale.inverse_diag[i]


@implements(declared.whiten_noise, TriangularScale)
def whiten_noise(scale, mean, eps, z):
    for i in range(scale.dim):
        e = eps[i]
        if is_dual(z):  # the constant sample obeys L z = ŷ - μ, so that L ż = -(μ̇ + L̇ eps)
            row = scale.tril + i * scale.dim
            total = -tangent_of(mean[i]) - tangent_of(row[i]) * e
            for j in range(i):
                total = total - tangent_of(row[j]) * eps[j] - stop(row[j]) * tangent_of(z[j])
            z[i] = with_tangent(z, e, total * stop(scale.inverse_diag[i]))
        else:
            z[i] = e


@implements(declared.add_score, TriangularScale)
def add_score(scale, f, z, need_mean, mean, need_scale, to_scale):
    """∂log p/∂μ = a, ∂log p/∂L_ij = a_i z_j - [i = j] / L_jj, with Lᵀ a = z."""
    dim, a = scale.dim, scale.work
    for i in range(dim - 1, -1, -1):
        total = z[i]
        for k in range(i + 1, dim):
            total = total - scale.tril[k * dim + i] * a[k]
        a[i] = total * scale.inverse_diag[i]
    for i in range(dim):
        v = f * a[i]
        if need_mean:
            mean[i] = mean[i] + output(v)
        if need_scale:
            row = to_scale + i * dim
            for j in range(i + 1):
                row[j] = row[j] + output(v * z[j])
            row[i] = row[i] - output(f * scale.inverse_diag[i])


@implements(declared.add_path, TriangularScale)
def add_path(scale, slope, eps, to_scale):
    for i in range(scale.dim):
        v, row = slope[i], to_scale + i * scale.dim
        for j in range(i + 1):
            row[j] = row[j] + output(v * eps[j])


@implements(declared.add_entropy, TriangularScale)
def add_entropy(scale, f, to_scale):
    for j in range(scale.dim):
        at = j * scale.dim + j
        to_scale[at] = to_scale[at] + output(f * scale.inverse_diag[j])


@implements(declared.trace, TriangularScale)
def trace(scale, u, weight, need_scale, to_scale, need_precision, to_precision):
    """Column by column of L: tr(U L Lᵀ) = Σ_j l_jᵀ U l_j."""
    dim, column, other = scale.dim, scale.work, scale.work + scale.dim
    total = full(scale.tril, 0.0)
    for j in range(dim):
        for i in range(j, dim):
            column[i] = scale.tril[i * dim + j]
        apply(u, dim, column, other, j)
        for i in range(j, dim):
            total = total + column[i] * other[i]
            if need_scale:
                at = i * dim + j
                to_scale[at] = to_scale[at] + output(weight * other[i] * 2.0)
        if need_precision:
            for i in range(j, dim):
                other[i] = weight * column[i]
            accumulate_outer(u.kind, dim, other, column, to_precision, j)
    return total


@implements(declared.reward_variance, TriangularScale)
def reward_variance(scale, u, x):
    """2 ‖LᵀUL‖² + 4 ‖Lᵀx‖²."""
    dim, column, weighted = scale.dim, scale.work, scale.work + scale.dim
    total = full(scale.tril, 0.0)
    for j in range(dim):
        along = full(scale.tril, 0.0)
        for i in range(dim):
            if i < j:
                column[i] = 0.0
            else:
                column[i] = scale.tril[i * dim + j]
            along = along + column[i] * x[i]
        apply(u, dim, column, weighted, 0)
        total = total + along * along * 4.0
        for k in range(dim):
            product = full(scale.tril, 0.0)
            for i in range(k, dim):
                product = product + scale.tril[i * dim + k] * weighted[i]
            total = total + product * product * 2.0
    return total
