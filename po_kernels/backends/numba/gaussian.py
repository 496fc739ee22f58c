"""The diagonal scale S = diag(σ), given by log σ."""

from . import scale as declared
from .lanes import full, is_dual, output, shared, stop, tangent_of, with_tangent
from .maths import exp
from .precision import FULL, SCALAR, diagonal_entry
from .scale import DiagonalKind, DiagonalScale, implements


@implements(declared.suspicious, DiagonalKind)
def suspicious(kind, parameter):
    return False


@implements(declared.prepared, DiagonalKind)
def prepared(kind, parameter, scratch, whitens):
    dim = kind.dim
    std, inverse_std = scratch, scratch + dim
    for j in range(dim):
        std[j] = exp(parameter[j])
        if whitens:
            inverse_std[j] = exp(-parameter[j])
    return DiagonalScale(dim, parameter, std, inverse_std)


@implements(declared.log_determinant, DiagonalScale)
def log_determinant(scale):
    total = full(scale.std, 0.0)
    for j in range(scale.dim):
        total = total + scale.log_std[j]
    return total


@implements(declared.stretch, DiagonalScale)
def stretch(scale, base, eps, y):
    for j in range(scale.dim):
        y[j] = base[j] + scale.std[j] * eps[j]


@implements(declared.whiten, DiagonalScale)
def whiten(scale, residual, z):
    for j in range(scale.dim):
        z[j] = residual[j] * scale.inverse_std[j]


@implements(declared.whiten_noise, DiagonalScale)
def whiten_noise(scale, mean, eps, z):
    for j in range(scale.dim):
        e = eps[j]
        if is_dual(z):  # ẋ = 0 = μ̇ + σ (ρ̇ eps + ż)
            shift = tangent_of(mean[j]) * stop(scale.inverse_std[j])
            z[j] = with_tangent(z, e, -(shift + e * tangent_of(scale.log_std[j])))
        else:
            z[j] = e


@implements(declared.add_score, DiagonalScale)
def add_score(scale, f, z, need_mean, mean, need_scale, to_scale):
    for j in range(scale.dim):
        factor = f * z[j]
        if need_mean:
            mean[j] = mean[j] + output(factor * scale.inverse_std[j])
        if need_scale:
            to_scale[j] = to_scale[j] + output(factor * z[j] - f)


@implements(declared.add_path, DiagonalScale)
def add_path(scale, slope, eps, to_scale):
    for j in range(scale.dim):
        to_scale[j] = to_scale[j] + output(slope[j] * scale.std[j] * eps[j])


@implements(declared.add_entropy, DiagonalScale)
def add_entropy(scale, f, to_scale):
    for j in range(scale.dim):
        to_scale[j] = to_scale[j] + output(f)


@implements(declared.trace, DiagonalScale)
def trace(scale, u, weight, need_scale, to_scale, need_precision, to_precision):
    total = full(scale.std, 0.0)
    for j in range(scale.dim):
        variance = scale.std[j] * scale.std[j]
        spread = variance * diagonal_entry(scale.std, u, scale.dim, j)
        total = total + spread
        if need_scale:
            to_scale[j] = to_scale[j] + output(weight * spread * 2.0)
        if need_precision:
            at = 0 if u.kind == SCALAR else j * (j + 1) // 2 + j if u.kind == FULL else j
            to_precision[at] = to_precision[at] + output(weight * variance)
    return total


@implements(declared.reward_variance, DiagonalScale)
def reward_variance(scale, u, x):
    dim, total = scale.dim, full(scale.std, 0.0)
    for i in range(dim):
        variance = scale.std[i] * scale.std[i]
        weighted = variance * diagonal_entry(scale.std, u, dim, i)
        total = total + weighted * weighted * 2.0 + x[i] * x[i] * variance * 4.0
        if u.kind == FULL:
            for j in range(i):
                off = shared(scale.std, u.value, u.tangent, i * dim + j)
                total = total + variance * (scale.std[j] * scale.std[j]) * (off * off) * 4.0
    return total
