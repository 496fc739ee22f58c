"""Rows of both Gaussian policies ŷ = μ + S ε, in Triton. z = S⁻¹ (ŷ - μ).

What depends on the scale S is in `gaussian`, where S is a diagonal, and `mvn`, where it is a triangular matrix;
TRIANGULAR says which. A program takes blocks of BLOCK_B rows, one after the other, and of each BLOCK_G samples at a
time, CHUNKS times, as tiles (BLOCK_D, BLOCK_B, BLOCK_G). What is summed over rows goes to its part of `partial`, see
`tally`.
"""

import triton
import triton.language as tl

from . import gaussian, mvn
from .group import finish_group, place, take
from .lanes import (
    add,
    constant,
    dimensions,
    load,
    load_vector,
    masked,
    mul,
    negative,
    nothing,
    number,
    output,
    square,
    sub,
    times,
    total,
    value,
)
from .philox import normals
from .precision import MOST_IN_REGISTERS, add_outer, apply, apply_to_sum, no_sums, quadratic, store_sums
from .tally import HEAD, no_stats, report, report_stats, row_weight, store_tally

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)


@triton.constexpr_function
def taken_apart(dim, triangular, dual):
    """Whether a thread has all dimensions of a drawn sample, and loops over them are unrolled.

    Code grows with their square, and the time to compile it faster: at these limits it is less than a minute.
    """
    return dim <= ((8 if dual else 16) if triangular else (17 if dual else 32))


@triton.jit
def read_scale(
    pointer, tangent, offset, inside, d, dim: tl.constexpr,
    TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    if TRIANGULAR:
        return mvn.read(pointer, tangent, offset, inside, d, dim, DUAL, T)
    else:
        return gaussian.read(pointer, tangent, offset, inside, d, dim, DUAL, T)


@triton.jit
def log_determinant(scale, dim: tl.constexpr, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.log_determinant(scale, dim, DUAL, T)
    else:
        return gaussian.log_determinant(scale, dim, DUAL, T)


@triton.jit
def stretch(scale, eps, dim: tl.constexpr, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.stretch(scale, eps, dim, DUAL, T)
    else:
        return gaussian.stretch(scale, eps, dim, DUAL, T)


@triton.jit
def whiten(scale, x, dim: tl.constexpr, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.whiten(scale, x, dim, DUAL, T)
    else:
        return gaussian.whiten(scale, x, dim, DUAL, T)


@triton.jit
def whiten_transposed(scale, z, dim: tl.constexpr, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.whiten_transposed(scale, z, dim, DUAL, T)
    else:
        return gaussian.whiten_transposed(scale, z, dim, DUAL, T)


@triton.jit
def whiten_noise(scale, mean, eps, dim: tl.constexpr, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    if TRIANGULAR:
        return mvn.whiten_noise(scale, mean, eps, dim, DUAL, T)
    else:
        return gaussian.whiten_noise(scale, mean, eps, dim, DUAL, T)


@triton.jit
def no_gradients(BLOCK_D: tl.constexpr, B: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    vector = constant(nothing((BLOCK_D, B, 1), T), DUAL)
    return vector, vector, constant(nothing((1, B, 1), T), DUAL)


@triton.jit
def add_gradients(
    sums, scale, left, right, inner, to_scale, row, inside, d, dim: tl.constexpr, first,
    WHITE: tl.constexpr, NEED_SCALE: tl.constexpr, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Adds samples' terms of the gradient in μ and S of Σ_g [leftᵀ (μ + S right) + inner · log det S].

    left, right (BLOCK_D, B, G), inner (1, B, G). WHITE: given is Sᵀ left. What is in a triangular S goes to memory.
    """
    mean_sum, product_sum, inner_sum = sums
    if TRIANGULAR:
        if WHITE:
            left = mvn.whiten_transposed(scale, left, dim, DUAL, T)
        if NEED_SCALE:
            mvn.add_gradient(scale, left, right, inner, to_scale, row * dim * dim, inside, d, dim, first, DUAL, T)
        return add(mean_sum, total(left, 2)), product_sum, inner_sum
    else:
        product_sum = add(product_sum, total(mul(left, right), 2))
        return add(mean_sum, total(left, 2)), product_sum, add(inner_sum, total(inner, 2))


@triton.jit
def store_gradients(
    sums, scale, to_mean, to_scale, row, inside, each, dim: tl.constexpr, WHITE: tl.constexpr,
    NEED_MEAN: tl.constexpr, NEED_SCALE: tl.constexpr, TRIANGULAR: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    at, mask = row * dim + each, inside & (each < dim)
    if NEED_MEAN:
        found = sums[0]
        if WHITE and not TRIANGULAR:
            found = gaussian.whiten_transposed(scale, found, dim, DUAL, T)
        tl.store(to_mean + at, output(found, DUAL), mask)
    if NEED_SCALE and not TRIANGULAR:
        found = sums[1]
        if not WHITE:
            found = gaussian.stretch(scale, found, dim, DUAL, T)
        tl.store(to_scale + at, output(add(found, sums[2]), DUAL), mask)


@triton.jit
def log_density(log_det, z, dim):
    """log p from z; dim is floating."""
    return sub(times(total(square(z), 0), -0.5), add(log_det, dim * HALF_LOG_2PI))


@triton.jit
def of_row(x):
    """What all samples of a row have alike, (1, B, 1)."""
    if value(x).shape[2] == 1:
        return x
    else:
        return total(masked(tl.arange(0, value(x).shape[2])[None, None, :] == 0, x), 2)


@triton.jit
def entropy_of(log_det, dim):
    return add(log_det, dim * (HALF_LOG_2PI + 0.5))


@triton.jit
def trace(
    scale, weight, factor, inner, u, ut, sums, to_precision, to, row, inside, d, dim,
    TRIANGULAR: tl.constexpr, KIND: tl.constexpr, IN_MEMORY: tl.constexpr,
    NEED_SCALE: tl.constexpr, NEED_PRECISION: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    if TRIANGULAR:
        return mvn.trace(
            scale, weight, factor, inner, u, ut, sums, to_precision, to, row * dim * dim, inside, d, dim,
            KIND, IN_MEMORY, NEED_SCALE, NEED_PRECISION, DUAL, T,
        )  # fmt: skip
    else:
        return gaussian.trace(
            scale, weight, factor, inner, u, ut, sums, to_precision, to, row * dim, inside, d, dim,
            KIND, IN_MEMORY, NEED_SCALE, NEED_PRECISION, DUAL, T,
        )  # fmt: skip


@triton.jit
def reward_variance(
    scale, along, u, d, dim: tl.constexpr, TRIANGULAR: tl.constexpr, KIND: tl.constexpr, T: tl.constexpr
):
    if TRIANGULAR:
        return mvn.reward_variance(scale, along, u, d, dim, KIND, T)
    else:
        return gaussian.reward_variance(scale, along, u, d, dim, KIND, T)


@triton.jit
def residual(
    mean, scale, target, eps, dim: tl.constexpr, PATHWISE: tl.constexpr, TRIANGULAR: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """ŷ - y. Score-function samples are constants, so that only y carries a derivative."""
    if TRIANGULAR:
        sample = add(mvn.stretch(scale, eps, dim, DUAL, T), mean)
    else:
        sample = gaussian.sample(scale, eps, mean, DUAL, T)
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
    rows: tl.int64, blocks: tl.int64, row_offset: tl.int64, dim: tl.constexpr, count: tl.constexpr,
    entropy_coef: tl.float64, rbf_gamma: tl.float64, loss_unit: tl.float64, stats_unit: tl.float64,
    TRIANGULAR: tl.constexpr, KIND: tl.constexpr, CLOSED_FORM: tl.constexpr, PATHWISE: tl.constexpr,
    EACH: tl.constexpr, ADVANTAGE: tl.constexpr, HAS_RBF: tl.constexpr, HAS_COTANGENT: tl.constexpr,
    REDUCED: tl.constexpr, WANT_STATS: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_SCALE: tl.constexpr,
    NEED_TARGET: tl.constexpr, NEED_PRECISION: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mean, target (rows, dim), scale (rows, dim) or (rows, dim, dim), precision contiguous; gradients contiguous."""
    IN_MEMORY: tl.constexpr = BLOCK_D > MOST_IN_REGISTERS
    each = tl.arange(0, BLOCK_D)[:, None, None]
    APART: tl.constexpr = taken_apart(dim, TRIANGULAR, DUAL)
    d = dimensions((BLOCK_D, BLOCK_B, BLOCK_G)) if APART else each
    size, extent = number(count, T), number(dim, T)
    coef, gamma = number(entropy_coef, T), number(rbf_gamma, T)
    unit = number(loss_unit, T)
    partial += tl.program_id(0).to(tl.int64) * partial_stride
    to_precision = partial + HEAD
    # The loss may have the same derivative in all rewards, which is taken out of the sums over them.
    ALIKE: tl.constexpr = REDUCED and not (HAS_RBF or DUAL or IN_MEMORY)
    UNROLL: tl.constexpr = CHUNKS if CHUNKS <= 4 else 1
    sums = no_sums(KIND, IN_MEMORY, BLOCK_D, BLOCK_B, BLOCK_G, T)
    loss_sum = tl.zeros((1, BLOCK_B, 1), T)
    stats_sum = no_stats(BLOCK_B, T)
    for block in tl.range(0, blocks, num_stages=1):
        row = (tl.program_id(0).to(tl.int64) * blocks + block) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
        inside = row < rows
        here = inside & (each < dim)
        m = load_vector(mean, mean_t, row * mean_stride, inside, d, dim, 0, DUAL, T)
        y = load_vector(target, target_t, row * target_stride, inside, d, dim, 0, DUAL, T)
        s = read_scale(scale, scale_t, row * scale_stride, inside, d, dim, TRIANGULAR, DUAL, T)
        weight = row_weight(cotangent, cotangent_t, cotangent_stride, row, inside, unit, HAS_COTANGENT, DUAL, T)
        log_det = log_determinant(s, dim, TRIANGULAR, DUAL, T)
        entropy = of_row(entropy_of(log_det, extent))
        inner = times(weight, -coef)
        if WANT_STATS:  # early, for registers not to be held
            log_prob = of_row(log_density(log_det, value(whiten(s, sub(y, m), dim, TRIANGULAR, DUAL, T)), extent))
        if CLOSED_FORM:
            delta = sub(m, y)
            if NEED_PRECISION:
                if ALIKE:
                    sums = add_outer(
                        sums, to_precision, None, masked(inside, delta), d, dim, KIND, IN_MEMORY, EACH, DUAL
                    )
                else:
                    sums = add_outer(sums, to_precision, weight, delta, d, dim, KIND, IN_MEMORY, EACH, DUAL)
            along = apply(precision, precision_t, delta, d, dim, KIND, DUAL, T)
            distance = total(mul(delta, along), 0)
            slope = output(times(mul(weight, along), 2), DUAL)
            if NEED_MEAN:
                tl.store(to_mean + row * dim + each, slope, here)
            if NEED_TARGET:
                tl.store(to_target + row * dim + each, -slope, here)
            spread, sums = trace(
                s, weight, None if ALIKE else weight, inner, precision, precision_t, sums, to_precision,
                to_scale, row, inside, d, dim,
                TRIANGULAR, KIND, IN_MEMORY, NEED_SCALE, NEED_PRECISION, DUAL, T,
            )  # fmt: skip
            objective = negative(add(distance, spread))
            reward_mean = objective
            if WANT_STATS:
                reward_std = tl.sqrt(reward_variance(s, along, precision, d, dim, TRIANGULAR, KIND, T))
                advantage_std = reward_std
        else:
            key = tl.load(seed)
            member = tl.arange(0, BLOCK_G)[None, None, :]
            rewards = constant(tl.zeros((CHUNKS, BLOCK_B, BLOCK_G), T), DUAL)
            excess = tl.zeros((CHUNKS, BLOCK_B, BLOCK_G), T)
            gradients = no_gradients(BLOCK_D, BLOCK_B, DUAL, T)
            pulled = constant(nothing((BLOCK_D, BLOCK_B, 1), T), DUAL)
            for chunk in tl.range(0, CHUNKS, loop_unroll_factor=UNROLL):
                eps = normals(key, chunk * BLOCK_G + member, row + row_offset, dim, BLOCK_D, T)
                x = residual(m, s, y, eps, dim, PATHWISE, TRIANGULAR, DUAL, T)
                rewards = place(rewards, chunk, negative(quadratic(precision, precision_t, x, d, dim, KIND, DUAL, T)))
                if DUAL and not PATHWISE:
                    z = whiten_noise(s, m, eps, dim, TRIANGULAR, DUAL, T)
                    excess = place(excess, chunk, output(log_density(log_det, z, extent), DUAL))
                if ALIKE:
                    x = masked(inside & (chunk * BLOCK_G + member < count), x)
                    if NEED_TARGET and not PATHWISE:
                        found = apply_to_sum(precision, precision_t, x, d, dim, KIND, DUAL, T)
                        pulled = add(pulled, found)
                    if NEED_PRECISION:
                        sums = add_outer(sums, to_precision, None, x, d, dim, KIND, IN_MEMORY, EACH, DUAL)
            objective, reward_mean, reward_std, advantage_std, factor, pull = finish_group(
                rewards, excess, gamma, size, not PATHWISE, ADVANTAGE, HAS_RBF, WANT_STATS, DUAL
            )
            share = times(weight, 1.0 / size)
            for chunk in tl.range(0, CHUNKS, loop_unroll_factor=UNROLL):
                eps = normals(key, chunk * BLOCK_G + member, row + row_offset, dim, BLOCK_D, T)
                x = residual(m, s, y, eps, dim, PATHWISE, TRIANGULAR, DUAL, T)
                pulled_by = mul(take(pull, chunk), share)
                own = masked((chunk == 0) & (member == 0), inner)  # of the row, once
                right = eps
                if PATHWISE:
                    left = times(mul(pulled_by, apply(precision, precision_t, x, d, dim, KIND, DUAL, T)), 2)
                else:
                    f = negative(mul(take(factor, chunk), share))
                    right = whiten_noise(s, m, eps, dim, TRIANGULAR, DUAL, T)
                    left = mul(f, right)
                    own = sub(own, f)
                gradients = add_gradients(
                    gradients, s, left, right, own, to_scale, row, inside, d, dim, chunk == 0,
                    not PATHWISE, NEED_SCALE, TRIANGULAR, DUAL, T,
                )  # fmt: skip
                if not ALIKE:
                    if NEED_TARGET and not PATHWISE:
                        found = apply_to_sum(precision, precision_t, mul(pulled_by, x), d, dim, KIND, DUAL, T)
                        pulled = add(pulled, found)
                    if NEED_PRECISION:
                        sums = add_outer(sums, to_precision, pulled_by, x, d, dim, KIND, IN_MEMORY, EACH, DUAL)
            thin = read_scale(scale, scale_t, row * scale_stride, inside, each, dim, TRIANGULAR, DUAL, T)
            store_gradients(
                gradients, thin, to_mean, to_scale, row, inside, each, dim,
                not PATHWISE, NEED_MEAN, NEED_SCALE, TRIANGULAR, DUAL, T,
            )  # fmt: skip
            if NEED_TARGET:
                if PATHWISE:
                    slope = -output(gradients[0], DUAL)
                else:
                    slope = output(times(mul(share, pulled) if ALIKE else pulled, -2), DUAL)
                tl.store(to_target + row * dim + each, slope, here)
        if WANT_STATS:
            stats_sum = report_stats(
                reward_mean, reward_std, entropy, log_prob, advantage_std,
                stats_sum, stats, row, rows, inside, number(stats_unit, T), REDUCED,
            )  # fmt: skip
        loss = output(negative(add(objective, times(entropy, coef))), DUAL)
        loss_sum = report(loss, loss_sum, losses, row, inside, unit, REDUCED)
    store_tally(loss_sum, stats_sum, partial)
    if NEED_PRECISION:
        share = number(1, T)
        if ALIKE:
            share = unit if CLOSED_FORM else unit / size
            if HAS_COTANGENT:
                share *= tl.load(cotangent).to(T)
        store_sums(sums, share, to_precision, dim, KIND, IN_MEMORY, BLOCK_D)


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
    rows: tl.int64, blocks: tl.int64, dim: tl.constexpr, count: tl.constexpr,
    entropy_coef: tl.float64, rbf_gamma: tl.float64, loss_unit: tl.float64, stats_unit: tl.float64,
    TRIANGULAR: tl.constexpr, SCORE: tl.constexpr,
    ADVANTAGE: tl.constexpr, HAS_RBF: tl.constexpr, HAS_COTANGENT: tl.constexpr, REDUCED: tl.constexpr,
    WANT_STATS: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_REWARDS: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `policy_loss`; rewards (count, rows), samples (count, rows, dim) with contiguous dimensions."""
    d = tl.arange(0, BLOCK_D)[:, None, None]
    member = tl.arange(0, BLOCK_G)[None, None, :]
    size, extent = number(count, T), number(dim, T)
    coef, gamma = number(entropy_coef, T), number(rbf_gamma, T)
    unit = number(loss_unit, T)
    partial += tl.program_id(0).to(tl.int64) * partial_stride
    loss_sum = tl.zeros((1, BLOCK_B, 1), T)
    stats_sum = no_stats(BLOCK_B, T)
    for block in tl.range(0, blocks, num_stages=1):
        row = (tl.program_id(0).to(tl.int64) * blocks + block) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
        inside = row < rows
        here = inside & (d < dim)
        m = load(mean, mean_t, row * mean_stride + d, here, 0, DUAL, T)
        s = read_scale(scale, scale_t, row * scale_stride, inside, d, dim, TRIANGULAR, DUAL, T)
        weight = row_weight(cotangent, cotangent_t, cotangent_stride, row, inside, unit, HAS_COTANGENT, DUAL, T)
        log_det = log_determinant(s, dim, TRIANGULAR, DUAL, T)
        entropy = entropy_of(log_det, extent)
        given = constant(tl.zeros((CHUNKS, BLOCK_B, BLOCK_G), T), DUAL)
        excess = tl.zeros((CHUNKS, BLOCK_B, BLOCK_G), T)
        density_sum = tl.zeros((1, BLOCK_B, 1), T)
        for chunk in range(CHUNKS):
            g = (chunk * BLOCK_G + member).to(tl.int64)
            there = inside & (g < count)
            at = g * rewards_stride_g + row * rewards_stride
            given = place(given, chunk, load(rewards, rewards_t, at, there, 0, DUAL, T))
            if WANT_STATS or (DUAL and SCORE):
                x = tl.load(samples + g * samples_stride_g + row * samples_stride + d, there & (d < dim), 0).to(T)
                z = whiten(s, sub(x, m), dim, TRIANGULAR, DUAL, T)
                density = log_density(log_det, z, extent)
                density_sum += total(tl.where(g < count, value(density), 0), 2)
                excess = place(excess, chunk, output(density, DUAL))
        objective, reward_mean, reward_std, advantage_std, factor, pull = finish_group(
            given, excess, gamma, size, SCORE, ADVANTAGE, HAS_RBF, WANT_STATS, DUAL
        )
        share = negative(times(weight, 1.0 / size))
        gradients = no_gradients(BLOCK_D, BLOCK_B, DUAL, T)
        for chunk in range(CHUNKS):
            g = (chunk * BLOCK_G + member).to(tl.int64)
            there = inside & (g < count)
            own = masked((chunk == 0) & (member == 0), times(weight, -coef))  # of the row, once
            if NEED_REWARDS:
                found = output(mul(take(pull, chunk), share), DUAL)
                tl.store(to_rewards + g * rows + row, found, there)
            if SCORE:
                x = tl.load(samples + g * samples_stride_g + row * samples_stride + d, there & (d < dim), 0).to(T)
                right = whiten(s, sub(x, m), dim, TRIANGULAR, DUAL, T)
                f = mul(take(factor, chunk), share)
                left = mul(f, whiten_transposed(s, right, dim, TRIANGULAR, DUAL, T))
                own = sub(own, f)
            else:
                right = tl.zeros((BLOCK_D, BLOCK_B, BLOCK_G), T)
                left = constant(right, DUAL)
            gradients = add_gradients(
                gradients, s, left, right, own, to_scale, row, inside, d, dim, chunk == 0,
                False, NEED_SCALE, TRIANGULAR, DUAL, T,
            )  # fmt: skip
        store_gradients(
            gradients, s, to_mean, to_scale, row, inside, d, dim,
            False, NEED_MEAN, NEED_SCALE, TRIANGULAR, DUAL, T,
        )  # fmt: skip
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
    out, to_mean, to_scale, to_at, rows: tl.int64, chunks: tl.int64, dim: tl.constexpr, count: tl.int64,
    TRIANGULAR: tl.constexpr, HAS_COTANGENT: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_SCALE: tl.constexpr,
    NEED_AT: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log p of at (count, rows, dim) and, with a cotangent (count, rows), gradients; `chunks` of BLOCK_G a program."""
    d = tl.arange(0, BLOCK_D)[:, None, None]
    extent = number(dim, T)
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
    inside = row < rows
    here = inside & (d < dim)
    m = load(mean, mean_t, row * mean_stride + d, here, 0, DUAL, T)
    s = read_scale(scale, scale_t, row * scale_stride, inside, d, dim, TRIANGULAR, DUAL, T)
    log_det = log_determinant(s, dim, TRIANGULAR, DUAL, T)
    gradients = no_gradients(BLOCK_D, BLOCK_B, DUAL, T)
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * BLOCK_G + tl.arange(0, BLOCK_G)[None, None, :]
        there = inside & (g < count)
        x = load(at, at_t, g * at_stride_g + row * at_stride + d, there & (d < dim), 0, DUAL, T)
        z = whiten(s, sub(x, m), dim, TRIANGULAR, DUAL, T)
        tl.store(out + g * rows + row, output(log_density(log_det, z, extent), DUAL), there)
        if HAS_COTANGENT:
            f = load(cotangent, cotangent_t, g * rows + row, there, 0, DUAL, T)
            left = mul(f, whiten_transposed(s, z, dim, TRIANGULAR, DUAL, T))
            if NEED_AT:
                tl.store(to_at + (g * rows + row) * dim + d, -output(left, DUAL), there & (d < dim))
            gradients = add_gradients(
                gradients, s, left, z, negative(f), to_scale, row, inside, d, dim, chunk == 0,
                False, NEED_SCALE, TRIANGULAR, DUAL, T,
            )  # fmt: skip
    if HAS_COTANGENT:
        store_gradients(
            gradients, s, to_mean, to_scale, row, inside, d, dim,
            False, NEED_MEAN, NEED_SCALE, TRIANGULAR, DUAL, T,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "row_offset", "chunks", "count"])
def sample(
    mean, mean_t, mean_stride: tl.int64, scale, scale_t, scale_stride: tl.int64, seed, cotangent, cotangent_t,
    out, to_mean, to_scale, rows: tl.int64, row_offset: tl.int64, chunks: tl.int64, dim: tl.constexpr, count: tl.int64,
    TRIANGULAR: tl.constexpr, HAS_COTANGENT: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_SCALE: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Samples (count, rows, dim) and, with a cotangent of that shape, the gradients; `chunks` of BLOCK_G a program."""
    d = tl.arange(0, BLOCK_D)[:, None, None]
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
    inside = row < rows
    here = inside & (d < dim)
    m = load(mean, mean_t, row * mean_stride + d, here, 0, DUAL, T)
    s = read_scale(scale, scale_t, row * scale_stride, inside, d, dim, TRIANGULAR, DUAL, T)
    key = tl.load(seed)
    gradients = no_gradients(BLOCK_D, BLOCK_B, DUAL, T)
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * BLOCK_G + tl.arange(0, BLOCK_G)[None, None, :]
        there = inside & (g < count) & (d < dim)
        eps = normals(key, g, row + row_offset, dim, BLOCK_D, T)
        at = (g * rows + row) * dim + d
        tl.store(out + at, output(add(stretch(s, eps, dim, TRIANGULAR, DUAL, T), m), DUAL), there)
        if HAS_COTANGENT:
            left = load(cotangent, cotangent_t, at, there, 0, DUAL, T)
            own = constant(tl.zeros((1, BLOCK_B, BLOCK_G), T), DUAL)
            gradients = add_gradients(
                gradients, s, left, eps, own, to_scale, row, inside, d, dim, chunk == 0,
                False, NEED_SCALE, TRIANGULAR, DUAL, T,
            )  # fmt: skip
    if HAS_COTANGENT:
        store_gradients(
            gradients, s, to_mean, to_scale, row, inside, d, dim,
            False, NEED_MEAN, NEED_SCALE, TRIANGULAR, DUAL, T,
        )  # fmt: skip
