"""Rows of both Gaussian policies ŷ = μ + S ε, as in csrc/include/po_kernels/gaussian_family.hpp.

Each kernel runs chunks [first, last) of `size` rows, in tiles of one row a lane, and returns whether a value among the
inputs may have to be refused. Inputs are RowInputs, outputs flat arrays that are empty where they are not wanted.
"""

import math

import numpy as np

from .group import (
    CLOSED_FORM,
    REPARAM,
    clear,
    finish,
    group_stats,
    score_factor,
    transformed,
)
from .lanes import (
    count_up,
    full,
    helper,
    inlined,
    is_dual,
    kernel,
    lane_sum,
    lanes_in,
    load,
    load_plain,
    load_weight,
    output,
    primals_in,
    put,
    stop,
    store,
    tangent_of,
    width_of,
    with_tangent,
)
from .maths import square_root
from .philox import standard_normals
from .precision import accumulate_outer, apply, quadratic
from .scale import (
    add_entropy,
    add_path,
    add_score,
    log_determinant,
    prepared,
    reward_variance,
    stretch,
    suspicious,
    trace,
    whiten,
    whiten_noise,
)

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


@helper
def entropy_of(scale):
    return log_determinant(scale) + (HALF_LOG_2PI + 0.5) * scale.dim


@helper
def log_kernel(dim, z):
    """log p from z, less what depends on the scale alone."""
    total = full(z, 0.0)
    for j in range(dim):
        v = z[j]
        total = total + v * v
    return total * -0.5


@helper
def log_density(scale, z):
    return log_kernel(scale.dim, z) - log_determinant(scale) - HALF_LOG_2PI * scale.dim


@helper
def closed_form(scale, mean, target, u, entropy_coef, weight, needs, to_mean, to_scale, to_target, to_precision, work):
    """L = δᵀUδ + tr(U S Sᵀ) - λ H, δ = μ - y. Scratch: 2 dim."""
    need_mean, need_scale, need_target, need_precision = needs
    dim, delta, weighted = scale.dim, work, work + scale.dim
    for j in range(dim):
        delta[j] = mean[j] - target[j]
    if need_precision:
        for j in range(dim):
            weighted[j] = weight * delta[j]
        accumulate_outer(u.kind, dim, weighted, delta, to_precision, 0)
    loss = trace(scale, u, weight, need_scale, to_scale, need_precision, to_precision)
    if need_scale:
        add_entropy(scale, weight * -entropy_coef, to_scale)
    apply(u, dim, delta, weighted, 0)
    for j in range(dim):
        loss = loss + delta[j] * weighted[j]
        pull = weight * weighted[j] * 2.0
        if need_mean:
            to_mean[j] = output(pull)
        if need_target:
            to_target[j] = output(-pull)
    return loss - entropy_of(scale) * entropy_coef


@helper
def log_prob_tangent(scale, z):
    """w - 1 of a sample: zero, with the derivative of log p."""
    change = tangent_of(log_kernel(scale.dim, z)) - tangent_of(log_determinant(scale))
    return with_tangent(z, change * 0.0, change)


@inlined
def residual_of(scale, pathwise, base, eps, residual):
    """ŷ - y. Score-function samples are constants, so that only y carries a derivative."""
    stretch(scale, base, eps, residual)
    if is_dual(base) and not pathwise:
        for j in range(scale.dim):
            residual[j] = with_tangent(residual, stop(residual[j]), tangent_of(base[j]))


@helper
def sampled(scale, mean, target, u, s, weight, needs, noise, to_mean, to_scale, to_target, to_precision, group, work):
    """The sampled loss from (G, dim) standard normals. Scratch: 4 dim."""
    need_mean, need_scale, need_target, need_precision = needs
    dim, count = scale.dim, s.samples
    pathwise = s.estimator == REPARAM
    base, total, residual, other = work, work + dim, work + 2 * dim, work + 3 * dim
    pull_of = group + 3 * count
    for j in range(dim):
        if pathwise:
            base[j] = mean[j] - target[j]
        else:
            base[j] = stop(mean[j]) - target[j]
    for g in range(count):
        residual_of(scale, pathwise, base, noise + g * dim, residual)
        group[g] = transformed(s, -quadratic(u, dim, residual))
        if is_dual(base):
            if pathwise:
                group[count + g] = 0.0
            else:
                whiten_noise(scale, mean, noise + g * dim, other)
                group[count + g] = log_prob_tangent(scale, other)
    objective = finish(s, group)

    if need_scale:
        add_entropy(scale, weight * -s.entropy_coef, to_scale)
    # U times the sum of the pulled residuals is the gradient in y, and that in the mean of a pathwise sample.
    clear(dim, total)
    need_path = pathwise and need_scale
    need_sum = need_target or (pathwise and need_mean)
    need_score = not pathwise and (need_mean or need_scale)
    unit = weight * (1.0 / count)
    for g in range(count):
        eps = noise + g * dim
        if need_sum or need_path or need_precision:
            residual_of(scale, pathwise, base, eps, residual)
            pull = unit * pull_of[g]
            for j in range(dim):
                pulled = pull * residual[j]
                other[j] = pulled
                total[j] = total[j] + pulled
            if need_precision:
                accumulate_outer(u.kind, dim, other, residual, to_precision, 0)
            if need_path:
                apply(u, dim, other, residual, 0)
                for j in range(dim):
                    residual[j] = residual[j] * 2.0
                add_path(scale, residual, eps, to_scale)
        if need_score:
            whiten_noise(scale, mean, eps, other)
            add_score(scale, -unit * score_factor(s, group, g), other, need_mean, to_mean, need_scale, to_scale)
    if need_sum:
        apply(u, dim, total, other, 0)
        for j in range(dim):
            pull = other[j] * 2.0
            if need_target:
                to_target[j] = output(-pull)
            if pathwise and need_mean:
                to_mean[j] = output(pull)
    return -objective - entropy_of(scale) * s.entropy_coef


@helper
def policy_stats(scale, mean, target, u, s, group, work, stats, rows, begin, lanes):
    """Scratch: 2 dim."""
    dim, delta, other = scale.dim, work, work + scale.dim
    if s.estimator != CLOSED_FORM:
        group_stats(s, group, stats, rows, begin, lanes)
    else:
        for j in range(dim):
            delta[j] = mean[j] - target[j]
        apply(u, dim, delta, other, 0)
        unused = primals_in(work)
        expected = -trace(scale, u, full(work, 0.0), False, unused, False, unused)
        for j in range(dim):
            expected = expected - delta[j] * other[j]
        std = square_root(reward_variance(scale, u, other))
        put(expected, stats, begin, lanes)
        put(std, stats, rows + begin, lanes)
        put(std, stats, 4 * rows + begin, lanes)
    for j in range(dim):
        delta[j] = target[j] - mean[j]
    whiten(scale, delta, other)
    put(entropy_of(scale), stats, 2 * rows + begin, lanes)
    put(log_density(scale, other), stats, 3 * rows + begin, lanes)


@kernel
def policy_loss(
    kind, size_of_scale, chunks, rows, mean, scale, target, u, s, seed, row_offset, weight, work,
    losses, stats, to_mean, to_scale, to_target, to_precision, terms,
):  # fmt: skip
    """The gradient in the precision is summed by chunk: (chunks, terms)."""
    first, last, size = chunks
    refused, want_stats = False, False
    if stats is not None:  # not on duals, for which this is not compiled
        want_stats = stats.size > 0
    dim, count = kind.dim, s.samples
    needs = to_mean.size > 0, to_scale.size > 0, to_target.size > 0, to_precision.size > 0
    means = lanes_in(work)
    width = width_of(means)
    targets = means + dim
    parameters = targets + dim
    scratch = parameters + size_of_scale
    items = scratch + 3 * dim
    group = items + 4 * dim
    weights = group + 4 * count
    noise = primals_in(weights + 1)
    grad_mean = noise + count * dim
    grad_target = grad_mean + dim
    grad_scale = grad_target + dim
    grad_precision = grad_scale + size_of_scale
    whitens = s.estimator != CLOSED_FORM or want_stats
    for chunk in range(first, last):
        if needs[3]:
            clear(terms, grad_precision)
        end = min(rows, (chunk + 1) * size)
        for begin in range(chunk * size, end, width):
            lanes = min(width, end - begin)
            load(means, mean, dim, begin, lanes)
            load(targets, target, dim, begin, lanes)
            load(parameters, scale, size_of_scale, begin, lanes)
            load_weight(weights, weight, begin, lanes)
            if needs[0]:
                clear(dim, grad_mean)
            if needs[1]:
                clear(size_of_scale, grad_scale)
            refused |= suspicious(kind, parameters)
            spread = prepared(kind, parameters, scratch, whitens)
            if s.estimator == CLOSED_FORM:
                loss = closed_form(
                    spread, means, targets, u, s.entropy_coef, weights[0], needs,
                    grad_mean, grad_scale, grad_target, grad_precision, items,
                )  # fmt: skip
            else:
                row = count_up(means) + (row_offset + np.uint64(begin))
                for g in range(count):
                    standard_normals(seed, g, row, dim, noise + g * dim)
                loss = sampled(
                    spread, means, targets, u, s, weights[0], needs, noise,
                    grad_mean, grad_scale, grad_target, grad_precision, group, items,
                )  # fmt: skip
            put(output(loss), losses, begin, lanes)
            if stats is not None and want_stats:
                policy_stats(spread, means, targets, u, s, group, items, stats, rows, begin, lanes)
            if needs[0]:
                store(grad_mean, dim, to_mean, begin * dim, lanes)
            if needs[1]:
                store(grad_scale, size_of_scale, to_scale, begin * size_of_scale, lanes)
            if needs[2]:
                store(grad_target, dim, to_target, begin * dim, lanes)
        if needs[3]:
            for i in range(terms):
                to_precision[chunk * terms + i] = lane_sum(grad_precision[i])
    return refused


@kernel
def surrogate_loss(
    kind, size_of_scale, chunks, rows, mean, scale, rewards, given, s, weight, work,
    losses, stats, to_mean, to_scale, to_rewards,
):  # fmt: skip
    """rewards (G, B), given (G, B, dim)."""
    first, last, size = chunks
    refused, want_stats = False, False
    if stats is not None:  # not on duals, for which this is not compiled
        want_stats = stats.size > 0
    dim, count = kind.dim, s.samples
    need_mean, need_scale, need_rewards = to_mean.size > 0, to_scale.size > 0, to_rewards.size > 0
    means = lanes_in(work)
    width = width_of(means)
    parameters = means + dim
    scratch = parameters + size_of_scale
    residual = scratch + 3 * dim
    z = residual + dim
    group = z + dim
    weights = group + 4 * count
    sample = primals_in(weights + 1)
    grad_mean = sample + count * dim
    grad_scale = grad_mean + dim
    for chunk in range(first, last):
        end = min(rows, (chunk + 1) * size)
        for begin in range(chunk * size, end, width):
            lanes = min(width, end - begin)
            load(means, mean, dim, begin, lanes)
            load(parameters, scale, size_of_scale, begin, lanes)
            load_weight(weights, weight, begin, lanes)
            refused |= suspicious(kind, parameters)
            spread = prepared(kind, parameters, scratch, True)
            if need_mean:
                clear(dim, grad_mean)
            if need_scale:
                clear(size_of_scale, grad_scale)
            mean_log_prob = full(means, 0.0)
            for g in range(count):
                load(group + g, rewards, 1, g * rows + begin, lanes)
                group[g] = transformed(s, group[g])
                load_plain(sample + g * dim, given, dim, (g * rows + begin) * dim, lanes)
                if is_dual(means) or want_stats:
                    for j in range(dim):
                        residual[j] = full(means, sample[g * dim + j]) - means[j]
                    whiten(spread, residual, z)
                    mean_log_prob = mean_log_prob + log_density(spread, z)
                    if s.estimator == REPARAM:
                        group[count + g] = 0.0
                    else:
                        group[count + g] = log_prob_tangent(spread, z)
            objective = finish(s, group)
            weighted = weights[0]
            unit = weighted * (-1.0 / count)
            if need_scale:
                add_entropy(spread, weighted * -s.entropy_coef, grad_scale)
            if s.estimator != REPARAM and (need_mean or need_scale):
                for g in range(count):
                    for j in range(dim):
                        residual[j] = full(means, sample[g * dim + j]) - means[j]
                    whiten(spread, residual, z)
                    f = unit * score_factor(s, group, g)
                    add_score(spread, f, z, need_mean, grad_mean, need_scale, grad_scale)
            put(output(-objective - entropy_of(spread) * s.entropy_coef), losses, begin, lanes)
            if need_rewards:
                for g in range(count):
                    put(output(unit * group[3 * count + g]), to_rewards, g * rows + begin, lanes)
            if stats is not None and want_stats:
                group_stats(s, group, stats, rows, begin, lanes)
                put(entropy_of(spread), stats, 2 * rows + begin, lanes)
                put(mean_log_prob * (1.0 / count), stats, 3 * rows + begin, lanes)
            if need_mean:
                store(grad_mean, dim, to_mean, begin * dim, lanes)
            if need_scale:
                store(grad_scale, size_of_scale, to_scale, begin * size_of_scale, lanes)
    return refused


@kernel
def log_prob(
    kind, size_of_scale, chunks, rows, many, mean, scale, at, cotangent, work, out, to_mean, to_scale, to_value,
):  # fmt: skip
    """value (N, B, dim), cotangent (N, B), N = many."""
    first, last, size = chunks
    dim = kind.dim
    need_mean, need_scale, need_value = to_mean.size > 0, to_scale.size > 0, to_value.size > 0
    means = lanes_in(work)
    width = width_of(means)
    parameters = means + dim
    scratch = parameters + size_of_scale
    residual = scratch + 3 * dim
    z = residual + dim
    weights = z + dim
    grad_mean = primals_in(weights + 1)
    grad_value = grad_mean + dim
    grad_scale = grad_value + dim
    refused = False
    for chunk in range(first, last):
        end = min(rows, (chunk + 1) * size)
        for begin in range(chunk * size, end, width):
            lanes = min(width, end - begin)
            load(means, mean, dim, begin, lanes)
            load(parameters, scale, size_of_scale, begin, lanes)
            refused |= suspicious(kind, parameters)
            spread = prepared(kind, parameters, scratch, True)
            clear(dim, grad_mean)
            clear(size_of_scale, grad_scale)
            for i in range(many):
                row = i * rows + begin
                load(residual, at, dim, row, lanes)
                for j in range(dim):
                    residual[j] = residual[j] - means[j]
                whiten(spread, residual, z)
                put(output(log_density(spread, z)), out, row, lanes)
                if need_mean or need_scale or need_value:
                    load(weights, cotangent, 1, row, lanes)
                    # ∂/∂value is minus ∂/∂mean
                    if need_value:
                        clear(dim, grad_value)
                        add_score(spread, -weights[0], z, True, grad_value, False, grad_scale)
                        store(grad_value, dim, to_value, row * dim, lanes)
                    if need_mean or need_scale:
                        add_score(spread, weights[0], z, need_mean, grad_mean, need_scale, grad_scale)
            if need_mean:
                store(grad_mean, dim, to_mean, begin * dim, lanes)
            if need_scale:
                store(grad_scale, size_of_scale, to_scale, begin * size_of_scale, lanes)
    return refused


@kernel
def sample(
    kind, size_of_scale, chunks, rows, count, mean, scale, seed, row_offset, cotangent, work, out, to_mean, to_scale
):
    """out and cotangent (G, B, dim), G = count."""
    first, last, size = chunks
    dim = kind.dim
    need_mean, need_scale = to_mean.size > 0, to_scale.size > 0
    means = lanes_in(work)
    width = width_of(means)
    parameters = means + dim
    scratch = parameters + size_of_scale
    samples = scratch + 3 * dim
    slope = samples + dim
    noise = primals_in(slope + dim)
    result = noise + dim
    grad_mean = result + dim
    grad_scale = grad_mean + dim
    refused = False
    for chunk in range(first, last):
        end = min(rows, (chunk + 1) * size)
        for begin in range(chunk * size, end, width):
            lanes = min(width, end - begin)
            load(means, mean, dim, begin, lanes)
            load(parameters, scale, size_of_scale, begin, lanes)
            refused |= suspicious(kind, parameters)
            spread = prepared(kind, parameters, scratch, False)
            clear(dim, grad_mean)
            clear(size_of_scale, grad_scale)
            numbers = count_up(means) + (row_offset + np.uint64(begin))
            for g in range(count):
                row = g * rows + begin
                standard_normals(seed, g, numbers, dim, noise)
                stretch(spread, means, noise, samples)
                for j in range(dim):
                    result[j] = output(samples[j])
                store(result, dim, out, row * dim, lanes)
                if need_mean or need_scale:
                    load(slope, cotangent, dim, row, lanes)
                    if need_mean:
                        for j in range(dim):
                            grad_mean[j] = grad_mean[j] + output(slope[j])
                    if need_scale:
                        add_path(spread, slope, noise, grad_scale)
            if need_mean:
                store(grad_mean, dim, to_mean, begin * dim, lanes)
            if need_scale:
                store(grad_scale, size_of_scale, to_scale, begin * size_of_scale, lanes)
    return refused
