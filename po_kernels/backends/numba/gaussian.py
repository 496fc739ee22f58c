"""Rows of both Gaussian policies ŷ = μ + S ε, compiled by Numba.

S is diag(σ), given by log σ, or a lower triangular L, row by row in a flat array. z = S⁻¹ (ŷ - μ).
"""

import numpy as np

from .lanes import (
    CLOSED_FORM,
    HALF_LOG_2PI,
    REPARAM,
    add_outer,
    apply_precision,
    compiled,
    finish_group,
    group_stats,
    output,
    precision_entry,
    standard_normals,
    transformed,
)


@compiled
def log_determinant(triangular, dim, scale):
    total = scale[0] - scale[0]
    for j in range(dim):
        total += np.log(scale[j * dim + j]) if triangular else scale[j]
    return total


@compiled
def stretch(triangular, dim, scale, eps, y):
    """y = S eps."""
    for i in range(dim):
        if triangular:
            total = scale[i * dim] * eps[0]
            for j in range(1, i + 1):
                total += scale[i * dim + j] * eps[j]
            y[i] = total
        else:
            y[i] = np.exp(scale[i]) * eps[i]


@compiled
def whiten(triangular, dim, scale, residual, z):
    """S z = residual."""
    for i in range(dim):
        total = residual[i]
        if triangular:
            for j in range(i):
                total -= scale[i * dim + j] * z[j]
            z[i] = total / scale[i * dim + i]
        else:
            z[i] = total * np.exp(-scale[i])


@compiled
def whiten_noise(triangular, dim, mean, scale, eps, z):
    """z of the constant sample stop(μ + S eps): eps, with the derivative that μ and S give it."""
    for i in range(dim):
        if triangular:
            total = mean[i].real - mean[i]
            for j in range(i + 1):
                total += (scale[i * dim + j].real - scale[i * dim + j]) * eps[j]
            for j in range(i):
                total -= scale[i * dim + j] * (z[j] - eps[j])
            z[i] = eps[i] + total / scale[i * dim + i]
        else:
            # ẋ = 0 = μ̇ + σ (ρ̇ eps + ż)
            z[i] = eps[i] + (mean[i].real - mean[i]) * np.exp(-scale[i].real) + (scale[i].real - scale[i]) * eps[i]


@compiled
def log_density(triangular, dim, scale, z):
    total = z[0] * z[0]
    for j in range(1, dim):
        total += z[j] * z[j]
    return -0.5 * total - log_determinant(triangular, dim, scale) - HALF_LOG_2PI * dim


@compiled
def add_score(triangular, dim, scale, f, z, a, dual, to_mean, to_scale):
    """Adds f ∂log p/∂(μ, S) for a constant ŷ; an empty `to` is not wanted. `a` is scratch."""
    for i in range(dim - 1, -1, -1):
        if triangular:
            total = z[i]
            for k in range(i + 1, dim):
                total -= scale[k * dim + i] * a[k]
            a[i] = total / scale[i * dim + i]
        else:
            a[i] = z[i] * np.exp(-scale[i])
        if to_mean.shape[0]:
            to_mean[i] += output(f * a[i], dual)
        if to_scale.shape[0]:
            if triangular:
                for j in range(i + 1):
                    to_scale[i * dim + j] += output(f * a[i] * z[j], dual)
                to_scale[i * dim + i] -= output(f / scale[i * dim + i], dual)
            else:
                to_scale[i] += output(f * (z[i] * z[i] - 1.0), dual)


@compiled
def add_path(triangular, dim, scale, slope, eps, dual, to_mean, to_scale):
    """Adds the gradient of slopeᵀ (μ + S eps)."""
    for i in range(dim):
        if to_mean.shape[0]:
            to_mean[i] += output(slope[i], dual)
        if to_scale.shape[0]:
            if triangular:
                for j in range(i + 1):
                    to_scale[i * dim + j] += output(slope[i] * eps[j], dual)
            else:
                to_scale[i] += output(slope[i] * np.exp(scale[i]) * eps[i], dual)


@compiled
def add_entropy(triangular, dim, scale, f, dual, to_scale):
    for j in range(dim):
        if triangular:
            to_scale[j * dim + j] += output(f / scale[j * dim + j], dual)
        else:
            to_scale[j] += output(f, dual)


@compiled
def closed_form(
    triangular, dim, mean, scale, target, kind, u, entropy_coef, weight, dual, work,
    to_mean, to_scale, to_target, to_precision,
):  # fmt: skip
    """δᵀUδ + tr(U S Sᵀ) - λ H, by columns of S."""
    delta, weighted, column = work[:dim], work[dim : 2 * dim], work[2 * dim : 3 * dim]
    for j in range(dim):
        delta[j] = mean[j] - target[j]
    apply_precision(kind, u, dim, delta, weighted)
    loss = delta[0] - delta[0]
    for j in range(dim):
        loss += delta[j] * weighted[j]
        if to_mean.shape[0]:
            to_mean[j] += output(2.0 * weight * weighted[j], dual)
        if to_target.shape[0]:
            to_target[j] -= output(2.0 * weight * weighted[j], dual)
    if to_precision.shape[0]:
        add_outer(kind, dim, weight, delta, dual, to_precision)
    for j in range(dim):
        for i in range(dim):
            if triangular:
                column[i] = scale[i * dim + j] if i >= j else 0.0
            else:
                column[i] = np.exp(scale[i]) if i == j else 0.0
        if not triangular and not to_precision.shape[0]:
            spread = column[j] * column[j] * precision_entry(kind, u, dim, j, j)
            loss += spread
            if to_scale.shape[0]:
                to_scale[j] += output(2.0 * weight * spread, dual)
            continue
        apply_precision(kind, u, dim, column, weighted)
        for i in range(j, dim if triangular else j + 1):
            loss += column[i] * weighted[i]
            if to_scale.shape[0]:
                if triangular:
                    to_scale[i * dim + j] += output(2.0 * weight * weighted[i], dual)
                else:
                    to_scale[j] += output(2.0 * weight * column[j] * weighted[j], dual)
        if to_precision.shape[0]:
            add_outer(kind, dim, weight, column, dual, to_precision)
    if to_scale.shape[0]:
        add_entropy(triangular, dim, scale, -entropy_coef * weight, dual, to_scale)
    return loss - entropy_coef * (log_determinant(triangular, dim, scale) + (HALF_LOG_2PI + 0.5) * dim)


@compiled
def closed_form_stats(triangular, dim, mean, scale, target, kind, u, work, stats):
    """E and standard deviation of -dᵀUd, d ~ N(δ, Σ): Var = 2 ‖SᵀUS‖² + 4 ‖SᵀUδ‖²."""
    delta, along, column, weighted = work[:dim], work[dim : 2 * dim], work[2 * dim : 3 * dim], work[3 * dim : 4 * dim]
    for j in range(dim):
        delta[j] = mean[j] - target[j]
    apply_precision(kind, u, dim, delta, along)
    expected, variance = 0.0, 0.0
    for j in range(dim):
        expected -= (delta[j] * along[j]).real
    for j in range(dim):
        for i in range(dim):
            if triangular:
                column[i] = scale[i * dim + j] if i >= j else 0.0
            else:
                column[i] = np.exp(scale[i]) if i == j else 0.0
        apply_precision(kind, u, dim, column, weighted)
        projected = 0.0
        for i in range(dim):
            expected -= (column[i] * weighted[i]).real
            projected += (column[i] * along[i]).real
        variance += 4.0 * projected * projected
        for k in range(dim):
            product = 0.0
            if triangular:
                for i in range(k, dim):
                    product += (scale[i * dim + k] * weighted[i]).real
            else:
                product = (np.exp(scale[k]) * weighted[k]).real
            variance += 2.0 * product * product
    stats[0] = expected
    stats[1] = stats[4] = np.sqrt(variance)


@compiled
def policy_loss(
    begin, end, triangular, dim, count, mean, scale, target, kind, u, estimator, kind_advantage, has_rbf, gamma,
    entropy_coef, seed, row_offset, weight, dual, want_stats, work, noise,
    losses, stats, to_mean, to_scale, to_target, to_precision,
):  # fmt: skip
    """Rows [begin, end); `work` holds 4 count + 4 dim numbers, `noise` (count, dim)."""
    reward, excess = work[:count], work[count : 2 * count]
    advantage, pull = work[2 * count : 3 * count], work[3 * count : 4 * count]
    rest = work[4 * count :]
    residual, weighted, z, a = rest[:dim], rest[dim : 2 * dim], rest[2 * dim : 3 * dim], rest[3 * dim : 4 * dim]
    pathwise = estimator == REPARAM
    for b in range(begin, end):
        m, s, y, w = mean[b], scale[b], target[b], weight[b]
        row_mean, row_scale, row_target = to_mean[b], to_scale[b], to_target[b]
        row_mean[:] = 0.0
        row_scale[:] = 0.0
        row_target[:] = 0.0
        if estimator == CLOSED_FORM:
            losses[b] = output(
                closed_form(
                    triangular, dim, m, s, y, kind, u, entropy_coef, w, dual, rest,
                    row_mean, row_scale, row_target, to_precision,
                ), dual,
            )  # fmt: skip
        else:
            unit = w / count
            for g in range(count):
                standard_normals(seed, g, row_offset + np.uint64(b), dim, noise[g])
            for sweep in range(2):
                # The first sweep scores the samples, the second has their advantages.
                for g in range(count):
                    stretch(triangular, dim, s, noise[g], residual)
                    for j in range(dim):
                        sample = m[j] + residual[j]
                        if pathwise:
                            residual[j] = sample - y[j]
                        else:
                            residual[j] = sample.real - y[j]
                    if sweep == 0 or row_target.shape[0] or pathwise:
                        apply_precision(kind, u, dim, residual, weighted)
                    if sweep == 0:
                        quadratic = residual[0] * weighted[0]
                        for j in range(1, dim):
                            quadratic += residual[j] * weighted[j]
                        reward[g] = transformed(-quadratic, has_rbf, gamma)
                        excess[g] = 0.0
                        if dual and not pathwise:
                            whiten_noise(triangular, dim, m, s, noise[g], z)
                            density = log_density(triangular, dim, s, z)
                            excess[g] = density - density.real
                        continue
                    if to_precision.shape[0]:
                        add_outer(kind, dim, unit * pull[g], residual, dual, to_precision)
                    for j in range(dim):
                        weighted[j] *= 2.0 * unit * pull[g]
                        if row_target.shape[0]:
                            row_target[j] -= output(weighted[j], dual)
                    if pathwise:
                        add_path(triangular, dim, s, weighted, noise[g], dual, row_mean, row_scale)
                    elif row_mean.shape[0] or row_scale.shape[0]:
                        whiten_noise(triangular, dim, m, s, noise[g], z)
                        factor = -unit * (1.0 + excess[g]) * advantage[g]
                        add_score(triangular, dim, s, factor, z, a, dual, row_mean, row_scale)
                if sweep == 0:
                    objective = finish_group(
                        estimator, kind_advantage, has_rbf, gamma, dual, reward, excess, advantage, pull
                    )
            entropy = log_determinant(triangular, dim, s) + (HALF_LOG_2PI + 0.5) * dim
            losses[b] = output(-objective - entropy_coef * entropy, dual)
            if row_scale.shape[0]:
                add_entropy(triangular, dim, s, -entropy_coef * w, dual, row_scale)
        if want_stats:
            if estimator == CLOSED_FORM:
                closed_form_stats(triangular, dim, m, s, y, kind, u, rest, stats[:, b])
            else:
                group_stats(reward, advantage, stats[:, b])
            for j in range(dim):
                residual[j] = y[j] - m[j]
            whiten(triangular, dim, s, residual, z)
            stats[2, b] = (log_determinant(triangular, dim, s) + (HALF_LOG_2PI + 0.5) * dim).real
            stats[3, b] = log_density(triangular, dim, s, z).real


@compiled
def surrogate_loss(
    begin, end, triangular, dim, count, mean, scale, rewards, samples, estimator, kind_advantage, has_rbf, gamma,
    entropy_coef, weight, dual, want_stats, work, losses, stats, to_mean, to_scale, to_rewards,
):  # fmt: skip
    """Rows [begin, end); `work` holds 4 count + 4 dim numbers. rewards (count, B), samples (count, B, dim)."""
    reward, excess = work[:count], work[count : 2 * count]
    advantage, pull = work[2 * count : 3 * count], work[3 * count : 4 * count]
    rest = work[4 * count :]
    residual, z, a = rest[:dim], rest[dim : 2 * dim], rest[2 * dim : 3 * dim]
    for b in range(begin, end):
        m, s, w = mean[b], scale[b], weight[b]
        row_mean, row_scale = to_mean[b], to_scale[b]
        row_mean[:] = 0.0
        row_scale[:] = 0.0
        mean_log_prob = 0.0
        for sweep in range(2):
            for g in range(count):
                for j in range(dim):
                    residual[j] = samples[g, b, j] - m[j]
                whiten(triangular, dim, s, residual, z)
                if sweep == 0:
                    reward[g] = transformed(rewards[g, b], has_rbf, gamma)
                    density = log_density(triangular, dim, s, z)
                    mean_log_prob += density.real / count
                    excess[g] = density - density.real if estimator != REPARAM else 0.0
                    continue
                if to_rewards.shape[0]:
                    to_rewards[g, b] = output(-w / count * pull[g], dual)
                if estimator != REPARAM:
                    factor = -w / count * (1.0 + excess[g]) * advantage[g]
                    add_score(triangular, dim, s, factor, z, a, dual, row_mean, row_scale)
            if sweep == 0:
                objective = finish_group(
                    estimator, kind_advantage, has_rbf, gamma, dual, reward, excess, advantage, pull
                )
        entropy = log_determinant(triangular, dim, s) + (HALF_LOG_2PI + 0.5) * dim
        losses[b] = output(-objective - entropy_coef * entropy, dual)
        if row_scale.shape[0]:
            add_entropy(triangular, dim, s, -entropy_coef * w, dual, row_scale)
        if want_stats:
            group_stats(reward, advantage, stats[:, b])
            stats[2, b] = entropy.real
            stats[3, b] = mean_log_prob


@compiled
def log_prob(
    begin, end, triangular, dim, mean, scale, value, cotangent, dual, work,
    out, to_mean, to_scale, to_value,
):  # fmt: skip
    """Rows [begin, end); `work` holds 3 dim numbers. value (N, B, dim), cotangent (N, B)."""
    residual, z, a = work[:dim], work[dim : 2 * dim], work[2 * dim : 3 * dim]
    for b in range(begin, end):
        m, s = mean[b], scale[b]
        row_mean, row_scale = to_mean[b], to_scale[b]
        row_mean[:] = 0.0
        row_scale[:] = 0.0
        for i in range(value.shape[0]):
            for j in range(dim):
                residual[j] = value[i, b, j] - m[j]
            whiten(triangular, dim, s, residual, z)
            out[i, b] = output(log_density(triangular, dim, s, z), dual)
            add_score(triangular, dim, s, cotangent[i, b], z, a, dual, row_mean, row_scale)
            if to_value.shape[0]:
                for j in range(dim):  # ∂/∂value is minus ∂/∂mean
                    to_value[i, b, j] = output(-cotangent[i, b] * a[j], dual)


@compiled
def sample(
    begin, end, triangular, dim, mean, scale, seed, row_offset, cotangent, dual, work, noise,
    out, to_mean, to_scale,
):  # fmt: skip
    """Rows [begin, end); `work` holds dim numbers, `noise` dim. out and cotangent (G, B, dim)."""
    for b in range(begin, end):
        m, s = mean[b], scale[b]
        row_mean, row_scale = to_mean[b], to_scale[b]
        row_mean[:] = 0.0
        row_scale[:] = 0.0
        for g in range(out.shape[0]):
            standard_normals(seed, g, row_offset + np.uint64(b), dim, noise)
            stretch(triangular, dim, s, noise, work)
            for j in range(dim):
                out[g, b, j] = output(m[j] + work[j], dual)
            if row_mean.shape[0] or row_scale.shape[0]:
                add_path(triangular, dim, s, cotangent[g, b], noise, dual, row_mean, row_scale)
