"""What a kernel reports of its rows, in Triton: one by one, or summed over the rows of a program.

A program's sums go to its own part of `partial`, which `reduce` adds up over programs in a fixed order: the loss, five
statistics in the order of LossStats, and what else is summed over rows. `partial` is in float64.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .lanes import add, constant, load, negative, number, output, times, value

STATS = tl.constexpr(5)
HEAD = tl.constexpr(6)  # the loss and the statistics


class Tally(NamedTuple):
    """Where a kernel reports: losses (rows,) and stats (5, rows), or `stride` numbers a program in `partial`."""

    losses: Any
    stats: Any
    partial: Any
    stride: Any


class Options(NamedTuple):
    """Numbers that a loss is made with: λ and γ, the weight of a row in the loss, and in a mean."""

    coef: Any
    gamma: Any
    unit: Any
    share: Any


@triton.jit
def read_options(entropy_coef, rbf_gamma, share, K: tl.constexpr):
    unit = number(share, K) if K.MEAN else number(1, K)
    return Options(number(entropy_coef, K), number(rbf_gamma, K), unit, number(share, K))


@triton.jit
def rows_of_block(block, blocks, K: tl.constexpr):
    """Numbers (1, BLOCK_B, 1) of the rows of a block of the program."""
    return (tl.program_id(0).to(tl.int64) * blocks + block) * K.BLOCK_B + tl.arange(0, K.BLOCK_B)[None, :, None]


@triton.jit
def row_weight(cotangent, row, inside, options, K: tl.constexpr):
    """The factor of the row's loss in what is differentiated, the cotangent times `unit`; zero without a row."""
    if K.HAS_COTANGENT:
        return times(load(cotangent, tl.zeros_like(row) if K.REDUCED else row, inside, 0, K), options.unit)
    else:
        return constant(tl.where(inside, options.unit, 0), K)


@triton.jit
def no_sums(K: tl.constexpr):
    """The loss and the statistics, summed over no rows yet."""
    zero = tl.zeros((1, K.BLOCK_B, 1), tl.float64 if K.WIDE else K.T)
    return zero, zero, zero, zero, zero, zero


@triton.jit
def own_part(to):
    """The program's part of `partial`."""
    return to.partial + tl.program_id(0).to(tl.int64) * to.stride


@triton.jit
def _add(before, x, to, row, inside, unit, K: tl.constexpr):
    if K.REDUCED:
        return before + tl.where(inside, x * unit, 0)
    else:
        tl.store(to + row, x, inside)
        return before


@triton.jit
def report(sums, objective, entropy, log_prob, moments, to, row, rows, inside, options, K: tl.constexpr):
    """Stores the losses -(objective + λ entropy) of rows and their statistics, or adds them to the sums.

    moments: mean and standard deviation of rewards, and that of advantages; like log_prob read if wanted.
    """
    loss = output(negative(add(objective, times(entropy, options.coef))), K)
    loss = _add(sums[0], loss, to.losses, row, inside, options.unit, K)
    if K.WANT_STATS:
        return (
            loss,
            _add(sums[1], moments[0], to.stats, row, inside, options.share, K),
            _add(sums[2], moments[1], to.stats + rows, row, inside, options.share, K),
            _add(sums[3], value(entropy), to.stats + 2 * rows, row, inside, options.share, K),
            _add(sums[4], log_prob, to.stats + 3 * rows, row, inside, options.share, K),
            _add(sums[5], moments[2], to.stats + 4 * rows, row, inside, options.share, K),
        )
    else:
        return loss, sums[1], sums[2], sums[3], sums[4], sums[5]


@triton.jit
def store(sums, to):
    partial = own_part(to)
    for i in tl.static_range(HEAD):
        tl.store(partial + i, tl.sum(sums[i]))


@triton.jit(do_not_specialize=["programs"])
def reduce(partial, programs, size, loss, stats, shared, K: tl.constexpr):
    """Sums partial (programs, size) over programs into loss (), stats (5,) and shared (size - 6,)."""
    at = tl.program_id(0) * K.BLOCK + tl.arange(0, K.BLOCK)[None, :]
    sums = tl.zeros((K.BLOCK_P, K.BLOCK), tl.float64)
    for start in range(0, programs, K.BLOCK_P):
        program = (start + tl.arange(0, K.BLOCK_P)[:, None]).to(tl.int64)
        sums += tl.load(partial + program * size + at, (program < programs) & (at < size), 0)
    total = tl.sum(sums, axis=0, keep_dims=True)
    if K.REDUCED:
        tl.store(loss + at, total, at < 1)
        if K.WANT_STATS:
            tl.store(stats + at - 1, total, (at >= 1) & (at < HEAD))
    tl.store(shared + at - HEAD, total, (at >= HEAD) & (at < size))
