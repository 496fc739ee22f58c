"""Rows of both Gaussian policies ŷ = μ + S ε, in Triton: the four kernels, see `scale` for S.

A program takes blocks of BLOCK_B rows, one after the other, and of each BLOCK_G samples at a time, CHUNKS times, as
tiles (BLOCK_D, BLOCK_B, BLOCK_G). What is summed over rows goes to its part of `partial`, see `tally`. mean and target
are (rows, dim), the scale (rows, dim) or (rows, dim, dim), rewards (count, rows), samples and values (count, rows, dim)
with contiguous dimensions; gradients are contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tally
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
    no_sum,
    number,
    output,
    sub,
    times,
    total,
    value,
    zeros,
)
from .launch import Call
from .philox import normals
from .precision import add_outer, apply, apply_to_sum, no_sums, quadratic, store_sums
from .scale import (
    add_gradients,
    entropy_of,
    log_density,
    log_determinant,
    no_gradients,
    of_row,
    read,
    reward_variance,
    sample,
    store_gradients,
    trace,
    whiten,
    whiten_noise,
    whiten_transposed,
)


@triton.jit
def residual(mean, scale, target, eps, K: tl.constexpr):
    """ŷ - y. Score-function samples are constants, so that only y carries a derivative."""
    drawn = sample(scale, eps, mean, K)
    return sub(value(drawn) if K.SCORE else drawn, target)


@triton.jit(do_not_specialize=["rows", "blocks", "row_offset"])
def policy_loss(
    mean, mean_stride: tl.int64, scale, scale_stride: tl.int64, target, target_stride: tl.int64,
    precision, cotangent, seed, to, out, rows: tl.int64, blocks: tl.int64, row_offset: tl.int64,
    entropy_coef: tl.float64, rbf_gamma: tl.float64, share: tl.float64, K: tl.constexpr,
):  # fmt: skip
    """precision contiguous and symmetric; `to` are the gradients but that of the precision, `out` is a Tally."""
    each = tl.arange(0, K.BLOCK_D)[:, None, None]
    d = dimensions((K.BLOCK_D, K.BLOCK_B, K.BLOCK_G)) if K.APART else each
    options, size = tally.read_options(entropy_coef, rbf_gamma, share, K), number(K.count, K)
    to_precision = tally.own_part(out) + tally.HEAD
    # The loss may have the same derivative in all rewards, which is taken out of the sums over them.
    ALIKE: tl.constexpr = K.REDUCED and not (K.HAS_RBF or K.DUAL or K.IN_MEMORY)
    UNROLL: tl.constexpr = K.CHUNKS if K.CHUNKS <= 4 else 1
    sums = no_sums(K)
    reported = tally.no_sums(K)
    for block in tl.range(0, blocks, num_stages=1):
        row = tally.rows_of_block(block, blocks, K)
        inside = row < rows
        here = inside & (each < K.dim)
        m = load_vector(mean, row * mean_stride, inside, d, K)
        y = load_vector(target, row * target_stride, inside, d, K)
        s = read(scale, row * scale_stride, inside, d, K)
        weight = tally.row_weight(cotangent, row, inside, options, K)
        log_det = log_determinant(s, K)
        entropy = of_row(entropy_of(log_det, K))
        inner = times(weight, -options.coef)
        log_prob = tl.zeros((1, K.BLOCK_B, 1), K.T)
        if K.WANT_STATS:  # early, for registers not to be held
            log_prob = of_row(log_density(log_det, value(whiten(s, sub(y, m), K)), K))
        if K.CLOSED_FORM:
            delta = sub(m, y)
            if K.NEED_PRECISION:
                if ALIKE:
                    sums = add_outer(sums, to_precision, None, masked(inside, delta), d, K)
                else:
                    sums = add_outer(sums, to_precision, weight, delta, d, K)
            along = apply(precision, delta, d, K)
            distance = total(mul(delta, along), 0)
            slope = output(times(mul(weight, along), 2), K)
            if K.NEED_MEAN:
                tl.store(to.mean + row * K.dim + each, slope, here)
            if K.NEED_TARGET:
                tl.store(to.target + row * K.dim + each, -slope, here)
            spread, sums = trace(
                s, weight, None if ALIKE else weight, inner, precision, sums, to_precision, to.scale, row, inside, d, K
            )
            objective = negative(add(distance, spread))
            std = tl.zeros((1, K.BLOCK_B, 1), K.T)
            if K.WANT_STATS:
                std = tl.sqrt(reward_variance(s, along, precision, d, K))
            moments = value(objective), std, std
        else:
            key = tl.load(seed)
            member = tl.arange(0, K.BLOCK_G)[None, None, :]
            rewards = zeros((K.CHUNKS, K.BLOCK_B, K.BLOCK_G), K)
            excess = tl.zeros((K.CHUNKS, K.BLOCK_B, K.BLOCK_G), K.T)
            gradients = no_gradients(K)
            pulled = no_sum((K.BLOCK_D, K.BLOCK_B, 1), K)
            for chunk in tl.range(0, K.CHUNKS, loop_unroll_factor=UNROLL):
                eps = normals(key, chunk * K.BLOCK_G + member, row + row_offset, K.dim, K.BLOCK_D, K.T)
                x = residual(m, s, y, eps, K)
                rewards = place(rewards, chunk, negative(quadratic(precision, x, d, K)))
                if K.DUAL and K.SCORE:
                    z = whiten_noise(s, m, eps, K)
                    excess = place(excess, chunk, output(log_density(log_det, z, K), K))
                if ALIKE:
                    x = masked(inside & (chunk * K.BLOCK_G + member < K.count), x)
                    if K.NEED_TARGET and K.SCORE:
                        pulled = add(pulled, apply_to_sum(precision, x, d, K))
                    if K.NEED_PRECISION:
                        sums = add_outer(sums, to_precision, None, x, d, K)
            objective, moments, factor, pull = finish_group(rewards, excess, options.gamma, size, K)
            unit = times(weight, 1.0 / size)
            for chunk in tl.range(0, K.CHUNKS, loop_unroll_factor=UNROLL):
                eps = normals(key, chunk * K.BLOCK_G + member, row + row_offset, K.dim, K.BLOCK_D, K.T)
                x = residual(m, s, y, eps, K)
                pulled_by = mul(take(pull, chunk), unit)
                own = masked((chunk == 0) & (member == 0), inner)  # of the row, once
                if K.SCORE:
                    f = negative(mul(take(factor, chunk), unit))
                    right = whiten_noise(s, m, eps, K)
                    left = mul(f, right)
                    own = sub(own, f)
                else:
                    right = eps
                    left = times(mul(pulled_by, apply(precision, x, d, K)), 2)
                gradients = add_gradients(gradients, s, left, right, own, to, row, inside, d, chunk == 0, K)
                if not ALIKE:
                    if K.NEED_TARGET and K.SCORE:
                        pulled = add(pulled, apply_to_sum(precision, mul(pulled_by, x), d, K))
                    if K.NEED_PRECISION:
                        sums = add_outer(sums, to_precision, pulled_by, x, d, K)
            store_gradients(gradients, read(scale, row * scale_stride, inside, each, K), to, row, inside, each, K)
            if K.NEED_TARGET:
                if K.SCORE:
                    slope = output(times(mul(unit, pulled) if ALIKE else pulled, -2), K)
                else:
                    slope = -output(gradients[0], K)
                tl.store(to.target + row * K.dim + each, slope, here)
        reported = tally.report(reported, objective, entropy, log_prob, moments, out, row, rows, inside, options, K)
    tally.store(reported, out)
    if K.NEED_PRECISION:
        factor = number(1, K)
        if ALIKE:
            factor = options.unit if K.CLOSED_FORM else options.unit / size
            if K.HAS_COTANGENT:
                factor *= tl.load(cotangent.value)
        store_sums(sums, factor, to_precision, K)


@triton.jit(do_not_specialize=["rewards_stride_g", "rewards_stride", "samples_stride_g", "rows", "blocks"])
def surrogate_loss(
    mean, mean_stride: tl.int64, scale, scale_stride: tl.int64,
    rewards, rewards_stride_g: tl.int64, rewards_stride: tl.int64,
    samples, samples_stride_g: tl.int64, samples_stride: tl.int64, cotangent, to, out,
    rows: tl.int64, blocks: tl.int64, entropy_coef: tl.float64, rbf_gamma: tl.float64, share: tl.float64,
    K: tl.constexpr,
):  # fmt: skip
    """As `policy_loss`, for samples and rewards that are given."""
    d = tl.arange(0, K.BLOCK_D)[:, None, None]
    member = tl.arange(0, K.BLOCK_G)[None, None, :]
    options, size = tally.read_options(entropy_coef, rbf_gamma, share, K), number(K.count, K)
    reported = tally.no_sums(K)
    for block in tl.range(0, blocks, num_stages=1):
        row = tally.rows_of_block(block, blocks, K)
        inside = row < rows
        m = load(mean, row * mean_stride + d, inside & (d < K.dim), 0, K)
        s = read(scale, row * scale_stride, inside, d, K)
        weight = tally.row_weight(cotangent, row, inside, options, K)
        log_det = log_determinant(s, K)
        entropy = entropy_of(log_det, K)
        given = zeros((K.CHUNKS, K.BLOCK_B, K.BLOCK_G), K)
        excess = tl.zeros((K.CHUNKS, K.BLOCK_B, K.BLOCK_G), K.T)
        density_sum = tl.zeros((1, K.BLOCK_B, 1), tl.float64)
        for chunk in range(K.CHUNKS):
            g = (chunk * K.BLOCK_G + member).to(tl.int64)
            there = inside & (g < K.count)
            at = g * rewards_stride_g + row * rewards_stride
            given = place(given, chunk, load(rewards, at, there, 0, K))
            if K.WANT_STATS or (K.DUAL and K.SCORE):
                x = tl.load(samples + g * samples_stride_g + row * samples_stride + d, there & (d < K.dim), 0)
                density = log_density(log_det, whiten(s, sub(x, m), K), K)
                density_sum += total(tl.where(g < K.count, value(density), 0), 2)
                excess = place(excess, chunk, output(density, K))
        objective, moments, factor, pull = finish_group(given, excess, options.gamma, size, K)
        unit = negative(times(weight, 1.0 / size))
        gradients = no_gradients(K)
        for chunk in range(K.CHUNKS):
            g = (chunk * K.BLOCK_G + member).to(tl.int64)
            there = inside & (g < K.count)
            own = masked((chunk == 0) & (member == 0), times(weight, -options.coef))  # of the row, once
            if K.NEED_REWARDS:
                tl.store(to.rewards + g * rows + row, output(mul(take(pull, chunk), unit), K), there)
            if K.SCORE:
                x = tl.load(samples + g * samples_stride_g + row * samples_stride + d, there & (d < K.dim), 0)
                right = whiten(s, sub(x, m), K)
                f = mul(take(factor, chunk), unit)
                left = mul(f, whiten_transposed(s, right, K))
                own = sub(own, f)
            else:
                right = tl.zeros((K.BLOCK_D, K.BLOCK_B, K.BLOCK_G), K.T)
                left = constant(right, K)
            gradients = add_gradients(gradients, s, left, right, own, to, row, inside, d, chunk == 0, K)
        store_gradients(gradients, s, to, row, inside, d, K)
        log_prob = density_sum.to(K.T) * (1.0 / size)
        reported = tally.report(reported, objective, entropy, log_prob, moments, out, row, rows, inside, options, K)
    tally.store(reported, out)


@triton.jit(do_not_specialize=["value_stride_g", "rows", "chunks", "count"])
def log_prob(
    mean, mean_stride: tl.int64, scale, scale_stride: tl.int64, value, value_stride_g: tl.int64, value_stride: tl.int64,
    cotangent, out, to, rows: tl.int64, chunks: tl.int64, count: tl.int64, K: tl.constexpr,
):  # fmt: skip
    """log p of `value` and, with a cotangent (count, rows), gradients; `chunks` of BLOCK_G a program."""
    d = tl.arange(0, K.BLOCK_D)[:, None, None]
    row = tally.rows_of_block(0, 1, K)
    inside = row < rows
    m = load(mean, row * mean_stride + d, inside & (d < K.dim), 0, K)
    s = read(scale, row * scale_stride, inside, d, K)
    log_det = log_determinant(s, K)
    gradients = no_gradients(K)
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * K.BLOCK_G + tl.arange(0, K.BLOCK_G)[None, None, :]
        there = inside & (g < count)
        x = load(value, g * value_stride_g + row * value_stride + d, there & (d < K.dim), 0, K)
        z = whiten(s, sub(x, m), K)
        tl.store(out + g * rows + row, output(log_density(log_det, z, K), K), there)
        if K.HAS_COTANGENT:
            f = load(cotangent, g * rows + row, there, 0, K)
            left = mul(f, whiten_transposed(s, z, K))
            if K.NEED_VALUE:
                tl.store(to.value + (g * rows + row) * K.dim + d, -output(left, K), there & (d < K.dim))
            gradients = add_gradients(gradients, s, left, z, negative(f), to, row, inside, d, chunk == 0, K)
    if K.HAS_COTANGENT:
        store_gradients(gradients, s, to, row, inside, d, K)


@triton.jit(do_not_specialize=["rows", "row_offset", "chunks", "count"])
def draw(
    mean, mean_stride: tl.int64, scale, scale_stride: tl.int64, seed, cotangent, out, to,
    rows: tl.int64, row_offset: tl.int64, chunks: tl.int64, count: tl.int64, K: tl.constexpr,
):  # fmt: skip
    """Samples (count, rows, dim) and, with a cotangent of that shape, the gradients; `chunks` of BLOCK_G a program."""
    d = tl.arange(0, K.BLOCK_D)[:, None, None]
    row = tally.rows_of_block(0, 1, K)
    inside = row < rows
    m = load(mean, row * mean_stride + d, inside & (d < K.dim), 0, K)
    s = read(scale, row * scale_stride, inside, d, K)
    key = tl.load(seed)
    gradients = no_gradients(K)
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * K.BLOCK_G + tl.arange(0, K.BLOCK_G)[None, None, :]
        there = inside & (g < count) & (d < K.dim)
        eps = normals(key, g, row + row_offset, K.dim, K.BLOCK_D, K.T)
        at = (g * rows + row) * K.dim + d
        tl.store(out + at, output(sample(s, eps, m, K), K), there)
        if K.HAS_COTANGENT:
            left = load(cotangent, at, there, 0, K)
            own = zeros((1, K.BLOCK_B, K.BLOCK_G), K)
            gradients = add_gradients(gradients, s, left, eps, own, to, row, inside, d, chunk == 0, K)
    if K.HAS_COTANGENT:
        store_gradients(gradients, s, to, row, inside, d, K)


def _policy_loss(call: Call) -> tuple[Tensor, Tensor]:
    precision = call.inputs.precision
    dim, kind = call.inputs.mean.shape[1], precision.ndim
    group = call.whole_group(max(call.config.num_samples, 1))
    apart = _taken_apart(dim, call.known["TRIANGULAR"], call.dual)
    tile = launch.drawn_tile(group, dim, call.dtype, kind == 2) if apart else launch.tile(group, dim, kind == 2)
    shared = ((1,), (dim,), (dim, dim))[kind] if call.needs.precision else (0,)
    closed = call.config.estimator == "analytic"
    turns = dim if closed and call.known["TRIANGULAR"] else tile.chunks
    value, stats, sums = launch.loss(
        call, policy_loss, tile, shared,
        {"dim": dim, "count": group, "KIND": kind, "APART": apart,
         "CLOSED_FORM": closed, "WHITE": call.known["SCORE"],
         "IN_MEMORY": tile.dim > launch.MOST_IN_REGISTERS},
        turns, launch.run_of_products(tile) if kind == 2 else 0,
        **call.rows("mean"), **call.rows("scale"), **call.rows("target"),
        precision=call.pairs.precision.of(_symmetric), seed=call.seed,
        row_offset=call.config.row_offset,
    )  # fmt: skip
    if call.needs.precision:
        found = _symmetric(sums) if kind == 2 else sums.reshape(precision.shape)
        call.gradients = call.gradients._replace(precision=found)
    return value, stats


def _taken_apart(dim: int, triangular: bool, dual: bool) -> bool:
    """Whether a thread has all dimensions of a drawn sample, and loops over them are unrolled.

    Code grows with their square, and the time to compile it faster: at these limits it is less than a minute.
    """
    return dim <= ((8 if dual else 16) if triangular else (17 if dual else 32))


def _symmetric(u: Tensor) -> Tensor:
    return (0.5 * (u + u.mT) if u.ndim == 2 else u).contiguous()


def _surrogate_loss(call: Call) -> tuple[Tensor, Tensor]:
    samples = launch.with_contiguous_rows(call.constants.samples, 2)
    count, _, dim = samples.shape
    tile = launch.tile(call.whole_group(count), dim)
    value, stats, _ = launch.loss(
        call, surrogate_loss, tile, (0,),
        {"dim": dim, "count": count}, tile.chunks,
        **call.rows("mean"), **call.rows("scale"), **call.rows("rewards", 2),
        samples=samples, samples_stride_g=samples.stride(0), samples_stride=samples.stride(1),
    )  # fmt: skip
    return value, stats


def _log_prob(call: Call) -> tuple[Tensor, Tensor]:
    count, rows, dim = call.inputs.value.shape
    return launch.in_chunks(
        call, log_prob, call.empty(count, rows), launch.tile(count, dim),
        {"dim": dim}, call.needs.mean or call.needs.scale,
        **call.rows("mean"), **call.rows("scale"), **call.rows("value", 2),
    )  # fmt: skip


def _sample(call: Call) -> tuple[Tensor, Tensor]:
    rows, dim = call.inputs.mean.shape
    count = call.config.num_samples
    return launch.in_chunks(
        call, draw, call.empty(count, rows, dim), launch.tile(count, dim),
        {"dim": dim}, call.needs.mean or call.needs.scale,
        **call.rows("mean"), **call.rows("scale"), seed=call.seed, row_offset=call.config.row_offset,
    )  # fmt: skip


KERNELS = {
    f"{family}_{name}": launch.served(f"{family}_{name}", evaluate)
    for family in ("gaussian", "mvn")
    for name, evaluate in {
        "policy_loss": _policy_loss, "surrogate_loss": _surrogate_loss, "log_prob": _log_prob, "sample": _sample,
    }.items()
}  # fmt: skip
