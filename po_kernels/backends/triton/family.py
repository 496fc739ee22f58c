"""Rows of both Gaussian policies ŷ = μ + S ε, in Triton. z = S⁻¹ (ŷ - μ).

What depends on the scale S is in `gaussian`, where S is a diagonal, and `mvn`, where it is a triangular matrix;
TRIANGULAR says which. A program takes blocks of BLOCK_B rows, one after the other, and of each BLOCK_G samples at a
time, CHUNKS times, as tiles (BLOCK_B, BLOCK_G, BLOCK_D). What is summed over rows goes to its part of `partial`, see
`tally`.
"""

import triton
import triton.language as tl

from . import gaussian, mvn
from .group import finish_chunks, place, take
from .lanes import add, constant, load, masked, mul, negative, number, output, square, sub, times, total, value
from .philox import normals
from .precision import add_outer, apply, no_sums, store_sums
from .tally import HEAD, no_stats, report, report_stats, row_weight, store_tally

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)


@triton.jit
def read_scale(pointer, tangent, offset, inside, d, dim, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.read(pointer, tangent, offset, inside, d, dim, DUAL, T)
    else:
        return gaussian.read(pointer, tangent, offset, inside, d, dim, DUAL, T)


@triton.jit
def log_determinant(scale, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.log_determinant(scale, DUAL, T)
    else:
        return gaussian.log_determinant(scale, DUAL, T)


@triton.jit
def stretch(scale, eps, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.stretch(scale, eps, DUAL, T)
    else:
        return gaussian.stretch(scale, eps, DUAL, T)


@triton.jit
def whiten(scale, x, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.whiten(scale, x, DUAL, T)
    else:
        return gaussian.whiten(scale, x, DUAL, T)


@triton.jit
def whiten_transposed(scale, z, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.whiten_transposed(scale, z, DUAL, T)
    else:
        return gaussian.whiten_transposed(scale, z, DUAL, T)


@triton.jit
def whiten_noise(scale, mean, eps, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.whiten_noise(scale, mean, eps, DUAL, T)
    else:
        return gaussian.whiten_noise(scale, mean, eps, DUAL, T)


@triton.jit
def store_scale_gradient(
    scale, left, right, inner, to, row, inside, d, dim, first,
    TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    if TRIANGULAR:
        mvn.store_gradient(scale, left, right, inner, to, row * dim * dim, inside, d, dim, first, DUAL, T)
    else:
        gaussian.store_gradient(scale, left, right, inner, to, row * dim, inside, d, dim, first, DUAL, T)


@triton.jit
def log_density(log_det, z, dim):
    """log p from z; dim is floating."""
    return sub(times(total(square(z), 2), -0.5), add(log_det, dim * HALF_LOG_2PI))


@triton.jit
def entropy_of(log_det, dim):
    return add(log_det, dim * (HALF_LOG_2PI + 0.5))


@triton.jit
def trace(
    scale, weight, inner, u, ut, sums, to_precision, to, row, inside, d, dim,
    TRIANGULAR: tl.constexpr, KIND: tl.constexpr, IN_MEMORY: tl.constexpr,
    NEED_SCALE: tl.constexpr, NEED_PRECISION: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    if TRIANGULAR:
        return mvn.trace(
            scale, weight, inner, u, ut, sums, to_precision, to, row * dim * dim, inside, d, dim,
            KIND, IN_MEMORY, NEED_SCALE, NEED_PRECISION, DUAL, T,
        )  # fmt: skip
    else:
        return gaussian.trace(
            scale, weight, inner, u, ut, sums, to_precision, to, row * dim, inside, d, dim,
            KIND, IN_MEMORY, NEED_SCALE, NEED_PRECISION, DUAL, T,
        )  # fmt: skip


@triton.jit
def reward_variance(scale, along, u, d, dim, TRIANGULAR: tl.constexpr, KIND: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.reward_variance(scale, along, u, d, dim, KIND, T)
    else:
        return gaussian.reward_variance(scale, along, u, d, dim, KIND, T)


@triton.jit
def residual(mean, scale, target, eps, PATHWISE: tl.constexpr, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr,
             T: tl.constexpr):  # fmt: skip
    """ŷ - y. Score-function samples are constants, so that only y carries a derivative."""
    sample = add(stretch(scale, eps, TRIANGULAR, DUAL, T), mean)
    if PATHWISE:
        return sub(sample, target)
    else:
        return sub(value(sample), target)


@triton.jit(do_not_specialize=["cotangent_stride", "partial_stride", "rows", "blocks", "row_offset"])
def policy_loss(
    mean, mean_t, mean_stride: tl.int64, scale, scale_t, scale_stride: tl.int64,
    target, target_t, target_stride: tl.int64, precision, precision_t,
    cotangent, cotangent_t, cotangent_stride: tl.int64, seed,
    losses, stats, to_mean, to_scale, to_target, partial, partial_stride: tl.int64,
    rows: tl.int64, blocks: tl.int64, row_offset: tl.int64, dim, count,
    entropy_coef: tl.float64, rbf_gamma: tl.float64, loss_unit: tl.float64, stats_unit: tl.float64,
    TRIANGULAR: tl.constexpr, KIND: tl.constexpr, CLOSED_FORM: tl.constexpr, PATHWISE: tl.constexpr,
    ADVANTAGE: tl.constexpr, HAS_RBF: tl.constexpr, HAS_COTANGENT: tl.constexpr, REDUCED: tl.constexpr,
    WANT_STATS: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_TARGET: tl.constexpr,
    NEED_PRECISION: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mean, target (rows, dim), scale (rows, dim) or (rows, dim, dim), precision contiguous; gradients contiguous."""
    IN_MEMORY: tl.constexpr = BLOCK_D > 64
    d = tl.arange(0, BLOCK_D)[None, None, :]
    size, extent = number(count, T), number(dim, T)
    coef, gamma = number(entropy_coef, T), number(rbf_gamma, T)
    unit = number(loss_unit, T)
    partial += tl.program_id(0).to(tl.int64) * partial_stride
    to_precision = partial + HEAD
    sums = no_sums(KIND, IN_MEMORY, BLOCK_D, T)
    loss_sum = tl.zeros((BLOCK_B, 1, 1), T)
    stats_sum = no_stats(BLOCK_B, T)
    for block in range(0, blocks):
        row = (tl.program_id(0).to(tl.int64) * blocks + block) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]
        inside = row < rows
        here = inside & (d < dim)
        m = load(mean, mean_t, row * mean_stride + d, here, 0, DUAL, T)
        y = load(target, target_t, row * target_stride + d, here, 0, DUAL, T)
        s = read_scale(scale, scale_t, row * scale_stride, inside, d, dim, TRIANGULAR, DUAL, T)
        weight = row_weight(cotangent, cotangent_t, cotangent_stride, row, inside, unit, HAS_COTANGENT, DUAL, T)
        log_det = log_determinant(s, TRIANGULAR, DUAL, T)
        entropy = entropy_of(log_det, extent)
        inner = times(weight, -coef)
        if CLOSED_FORM:
            delta = sub(m, y)
            along = apply(precision, precision_t, delta, d, dim, KIND, DUAL, T)
            spread, sums = trace(
                s, weight, inner, precision, precision_t, sums, to_precision, to_scale, row, inside, d, dim,
                TRIANGULAR, KIND, IN_MEMORY, NEED_SCALE, NEED_PRECISION, DUAL, T,
            )  # fmt: skip
            objective = negative(add(total(mul(delta, along), 2), spread))
            slope = output(times(mul(weight, along), 2), DUAL)
            if NEED_MEAN:
                tl.store(to_mean + row * dim + d, slope, here)
            if NEED_TARGET:
                tl.store(to_target + row * dim + d, -slope, here)
            if NEED_PRECISION:
                sums = add_outer(sums, to_precision, weight, delta, d, dim, KIND, IN_MEMORY, DUAL)
            if WANT_STATS:
                variance = reward_variance(s, along, precision, d, dim, TRIANGULAR, KIND, T)
                reward_mean = objective
                reward_std = tl.sqrt(variance)
                advantage_std = reward_std
        else:
            key = tl.load(seed)
            member = tl.arange(0, BLOCK_G)[None, :, None]
            rewards = constant(tl.zeros((BLOCK_B, CHUNKS, BLOCK_G), T), DUAL)
            excess = tl.zeros((BLOCK_B, CHUNKS, BLOCK_G), T)
            for chunk in range(CHUNKS):
                eps = normals(key, chunk * BLOCK_G + member, row + row_offset, dim, BLOCK_D, T)
                x = residual(m, s, y, eps, PATHWISE, TRIANGULAR, DUAL, T)
                weighted = apply(precision, precision_t, x, d, dim, KIND, DUAL, T)
                rewards = place(rewards, chunk, negative(total(mul(x, weighted), 2)))
                if DUAL and not PATHWISE:
                    z = whiten_noise(s, m, eps, TRIANGULAR, DUAL, T)
                    excess = place(excess, chunk, output(log_density(log_det, z, extent), DUAL))
            objective, reward_mean, reward_std, advantage_std, factor, pull = finish_chunks(
                rewards, excess, gamma, size, not PATHWISE, ADVANTAGE, HAS_RBF, WANT_STATS, DUAL
            )
            share = times(weight, 1.0 / size)
            mean_sum = tl.zeros((BLOCK_B, 1, BLOCK_D), T)
            target_sum = tl.zeros((BLOCK_B, 1, BLOCK_D), T)
            for chunk in range(CHUNKS):
                eps = normals(key, chunk * BLOCK_G + member, row + row_offset, dim, BLOCK_D, T)
                x = residual(m, s, y, eps, PATHWISE, TRIANGULAR, DUAL, T)
                f = mul(take(pull, chunk), share)
                own = masked(chunk == 0, inner)  # of the row, once
                if NEED_PRECISION:
                    sums = add_outer(sums, to_precision, f, x, d, dim, KIND, IN_MEMORY, DUAL)
                if NEED_TARGET or PATHWISE:
                    left = times(mul(f, apply(precision, precision_t, x, d, dim, KIND, DUAL, T)), 2)
                    target_sum -= total(output(left, DUAL), 1)
                right = eps
                if not PATHWISE:
                    f = negative(mul(take(factor, chunk), share))
                    right = whiten_noise(s, m, eps, TRIANGULAR, DUAL, T)
                    left = mul(f, whiten_transposed(s, right, TRIANGULAR, DUAL, T))
                    own = sub(own, total(f, 1))
                if NEED_MEAN:
                    mean_sum += total(output(left, DUAL), 1)
                if NEED_SCALE:
                    store_scale_gradient(
                        s, left, right, own, to_scale, row, inside, d, dim, chunk == 0, TRIANGULAR, DUAL, T
                    )
            if NEED_MEAN:
                tl.store(to_mean + row * dim + d, mean_sum, here)
            if NEED_TARGET:
                tl.store(to_target + row * dim + d, target_sum, here)
        if WANT_STATS:
            z = value(whiten(s, sub(y, m), TRIANGULAR, DUAL, T))
            stats_sum = report_stats(
                reward_mean, reward_std, entropy, log_density(log_det, z, extent), advantage_std,
                stats_sum, stats, row, rows, inside, number(stats_unit, T), REDUCED,
            )  # fmt: skip
        loss = output(negative(add(objective, times(entropy, coef))), DUAL)
        loss_sum = report(loss, loss_sum, losses, row, inside, unit, REDUCED)
    store_tally(loss_sum, stats_sum, partial)
    if NEED_PRECISION:
        store_sums(sums, to_precision, d, dim, KIND, IN_MEMORY)


@triton.jit(
    do_not_specialize=[
        "rewards_stride_g", "rewards_stride", "samples_stride_g", "cotangent_stride", "partial_stride",
        "rows", "blocks",
    ]
)  # fmt: skip
def surrogate_loss(
    mean, mean_t, mean_stride: tl.int64, scale, scale_t, scale_stride: tl.int64,
    rewards, rewards_t, rewards_stride_g: tl.int64, rewards_stride: tl.int64,
    samples, samples_stride_g: tl.int64, samples_stride: tl.int64,
    cotangent, cotangent_t, cotangent_stride: tl.int64,
    losses, stats, to_mean, to_scale, to_rewards, partial, partial_stride: tl.int64,
    rows: tl.int64, blocks: tl.int64, dim, count,
    entropy_coef: tl.float64, rbf_gamma: tl.float64, loss_unit: tl.float64, stats_unit: tl.float64,
    TRIANGULAR: tl.constexpr, SCORE: tl.constexpr,
    ADVANTAGE: tl.constexpr, HAS_RBF: tl.constexpr, HAS_COTANGENT: tl.constexpr, REDUCED: tl.constexpr,
    WANT_STATS: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_REWARDS: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `policy_loss`; rewards (count, rows), samples (count, rows, dim) with contiguous dimensions."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    member = tl.arange(0, BLOCK_G)[None, :, None]
    size, extent = number(count, T), number(dim, T)
    coef, gamma = number(entropy_coef, T), number(rbf_gamma, T)
    unit = number(loss_unit, T)
    partial += tl.program_id(0).to(tl.int64) * partial_stride
    loss_sum = tl.zeros((BLOCK_B, 1, 1), T)
    stats_sum = no_stats(BLOCK_B, T)
    for block in range(0, blocks):
        row = (tl.program_id(0).to(tl.int64) * blocks + block) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]
        inside = row < rows
        here = inside & (d < dim)
        m = load(mean, mean_t, row * mean_stride + d, here, 0, DUAL, T)
        s = read_scale(scale, scale_t, row * scale_stride, inside, d, dim, TRIANGULAR, DUAL, T)
        weight = row_weight(cotangent, cotangent_t, cotangent_stride, row, inside, unit, HAS_COTANGENT, DUAL, T)
        log_det = log_determinant(s, TRIANGULAR, DUAL, T)
        entropy = entropy_of(log_det, extent)
        given = constant(tl.zeros((BLOCK_B, CHUNKS, BLOCK_G), T), DUAL)
        excess = tl.zeros((BLOCK_B, CHUNKS, BLOCK_G), T)
        density_sum = tl.zeros((BLOCK_B, 1, 1), T)
        for chunk in range(CHUNKS):
            g = (chunk * BLOCK_G + member).to(tl.int64)
            there = inside & (g < count)
            at = g * rewards_stride_g + row * rewards_stride
            given = place(given, chunk, load(rewards, rewards_t, at, there, 0, DUAL, T))
            if WANT_STATS or (DUAL and SCORE):
                x = tl.load(samples + g * samples_stride_g + row * samples_stride + d, there & (d < dim), 0).to(T)
                z = whiten(s, sub(x, m), TRIANGULAR, DUAL, T)
                density = log_density(log_det, z, extent)
                density_sum += total(tl.where(g < count, value(density), 0), 1)
                excess = place(excess, chunk, output(density, DUAL))
        objective, reward_mean, reward_std, advantage_std, factor, pull = finish_chunks(
            given, excess, gamma, size, SCORE, ADVANTAGE, HAS_RBF, WANT_STATS, DUAL
        )
        share = negative(times(weight, 1.0 / size))
        mean_sum = tl.zeros((BLOCK_B, 1, BLOCK_D), T)
        for chunk in range(CHUNKS):
            g = (chunk * BLOCK_G + member).to(tl.int64)
            there = inside & (g < count)
            own = masked(chunk == 0, times(weight, -coef))  # of the row, once
            if NEED_REWARDS:
                found = output(mul(take(pull, chunk), share), DUAL)
                tl.store(to_rewards + g * rows + row, found, there)
            if SCORE:
                x = tl.load(samples + g * samples_stride_g + row * samples_stride + d, there & (d < dim), 0).to(T)
                right = whiten(s, sub(x, m), TRIANGULAR, DUAL, T)
                f = mul(take(factor, chunk), share)
                left = mul(f, whiten_transposed(s, right, TRIANGULAR, DUAL, T))
                own = sub(own, total(f, 1))
            else:
                right = tl.zeros((BLOCK_B, BLOCK_G, BLOCK_D), T)
                left = constant(right, DUAL)
            if NEED_MEAN:
                mean_sum += total(output(left, DUAL), 1)
            if NEED_SCALE:
                store_scale_gradient(
                    s, left, right, own, to_scale, row, inside, d, dim, chunk == 0, TRIANGULAR, DUAL, T
                )
        if NEED_MEAN:
            tl.store(to_mean + row * dim + d, mean_sum, here)
        if WANT_STATS:
            stats_sum = report_stats(
                reward_mean, reward_std, entropy, density_sum * (1.0 / size), advantage_std,
                stats_sum, stats, row, rows, inside, number(stats_unit, T), REDUCED,
            )  # fmt: skip
        loss = output(negative(add(objective, times(entropy, coef))), DUAL)
        loss_sum = report(loss, loss_sum, losses, row, inside, unit, REDUCED)
    store_tally(loss_sum, stats_sum, partial)


@triton.jit(do_not_specialize=["at_stride_g", "rows", "chunks", "count"])
def log_prob(
    mean, mean_t, mean_stride: tl.int64, scale, scale_t, scale_stride: tl.int64,
    at, at_t, at_stride_g: tl.int64, at_stride: tl.int64, cotangent, cotangent_t,
    out, to_mean, to_scale, to_at, rows: tl.int64, chunks: tl.int64, dim, count: tl.int64,
    TRIANGULAR: tl.constexpr, HAS_COTANGENT: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_SCALE: tl.constexpr,
    NEED_AT: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log p of at (count, rows, dim) and, with a cotangent (count, rows), gradients; `chunks` of BLOCK_G a program."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    extent = number(dim, T)
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]
    inside = row < rows
    here = inside & (d < dim)
    m = load(mean, mean_t, row * mean_stride + d, here, 0, DUAL, T)
    s = read_scale(scale, scale_t, row * scale_stride, inside, d, dim, TRIANGULAR, DUAL, T)
    log_det = log_determinant(s, TRIANGULAR, DUAL, T)
    mean_sum = tl.zeros((BLOCK_B, 1, BLOCK_D), T)
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :, None]
        there = inside & (g < count)
        x = load(at, at_t, g * at_stride_g + row * at_stride + d, there & (d < dim), 0, DUAL, T)
        z = whiten(s, sub(x, m), TRIANGULAR, DUAL, T)
        tl.store(out + g * rows + row, output(log_density(log_det, z, extent), DUAL), there)
        if HAS_COTANGENT:
            f = load(cotangent, cotangent_t, g * rows + row, there, 0, DUAL, T)
            left = mul(f, whiten_transposed(s, z, TRIANGULAR, DUAL, T))
            if NEED_AT:
                tl.store(to_at + (g * rows + row) * dim + d, -output(left, DUAL), there & (d < dim))
            if NEED_MEAN:
                mean_sum += total(output(left, DUAL), 1)
            if NEED_SCALE:
                own = negative(total(f, 1))
                store_scale_gradient(s, left, z, own, to_scale, row, inside, d, dim, chunk == 0, TRIANGULAR, DUAL, T)
    if HAS_COTANGENT and NEED_MEAN:
        tl.store(to_mean + row * dim + d, mean_sum, here)


@triton.jit(do_not_specialize=["rows", "row_offset", "chunks", "count"])
def sample(
    mean, mean_t, mean_stride: tl.int64, scale, scale_t, scale_stride: tl.int64, seed, cotangent, cotangent_t,
    out, to_mean, to_scale, rows: tl.int64, row_offset: tl.int64, chunks: tl.int64, dim, count: tl.int64,
    TRIANGULAR: tl.constexpr, HAS_COTANGENT: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_SCALE: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Samples (count, rows, dim) and, with a cotangent of that shape, the gradients; `chunks` of BLOCK_G a program."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]
    inside = row < rows
    here = inside & (d < dim)
    m = load(mean, mean_t, row * mean_stride + d, here, 0, DUAL, T)
    s = read_scale(scale, scale_t, row * scale_stride, inside, d, dim, TRIANGULAR, DUAL, T)
    key = tl.load(seed)
    mean_sum = tl.zeros((BLOCK_B, 1, BLOCK_D), T)
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :, None]
        there = inside & (g < count) & (d < dim)
        eps = normals(key, g, row + row_offset, dim, BLOCK_D, T)
        at = (g * rows + row) * dim + d
        tl.store(out + at, output(add(stretch(s, eps, TRIANGULAR, DUAL, T), m), DUAL), there)
        if HAS_COTANGENT:
            left = load(cotangent, cotangent_t, at, there, 0, DUAL, T)
            if NEED_MEAN:
                mean_sum += total(output(left, DUAL), 1)
            if NEED_SCALE:
                own = constant(tl.zeros((BLOCK_B, 1, 1), T), DUAL)
                store_scale_gradient(s, left, eps, own, to_scale, row, inside, d, dim, chunk == 0, TRIANGULAR, DUAL, T)
    if HAS_COTANGENT and NEED_MEAN:
        tl.store(to_mean + row * dim + d, mean_sum, here)
