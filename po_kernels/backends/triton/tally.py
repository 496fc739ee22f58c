"""What a kernel reports of its rows, in Triton: one by one, or summed over the rows of a program.

A program's sums go to its own part of `partial`, which `reduce` adds up over programs in a fixed order: the loss, five
statistics in the order of LossStats, and what else is summed over rows.
"""

import triton
import triton.language as tl

from .lanes import constant, load, times

STATS = tl.constexpr(5)
HEAD = tl.constexpr(6)  # the loss and the statistics


@triton.jit
def row_weight(
    cotangent, cotangent_t, stride, row, inside, unit, HAS_COTANGENT: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr
):
    """The factor of the row's loss in what is differentiated, the cotangent times `unit`; zero without a row."""
    if HAS_COTANGENT:
        return times(load(cotangent, cotangent_t, row * stride, inside, 0, DUAL, T), unit)
    else:
        return constant(tl.where(inside, unit, 0), DUAL)


@triton.jit
def no_stats(BLOCK_B: tl.constexpr, T: tl.constexpr):
    zero = tl.zeros((1, BLOCK_B, 1), T)
    return zero, zero, zero, zero, zero


@triton.jit
def report(x, before, to, row, inside, unit, REDUCED: tl.constexpr):
    """Stores x (1, B, 1) in `to`, or adds it times `unit` to the sum `before`."""
    if REDUCED:
        return before + tl.where(inside, x * unit, 0)
    else:
        tl.store(to + row, x, inside)
        return before


@triton.jit
def report_stats(a, b, c, d, e, before, to, row, rows, inside, unit, REDUCED: tl.constexpr):
    return (
        report(a, before[0], to, row, inside, unit, REDUCED),
        report(b, before[1], to, row + rows, inside, unit, REDUCED),
        report(c, before[2], to, row + 2 * rows, inside, unit, REDUCED),
        report(d, before[3], to, row + 3 * rows, inside, unit, REDUCED),
        report(e, before[4], to, row + 4 * rows, inside, unit, REDUCED),
    )


@triton.jit
def store_tally(loss, stats, partial):
    tl.store(partial, tl.sum(loss))
    for i in tl.static_range(STATS):
        tl.store(partial + 1 + i, tl.sum(stats[i]))


@triton.jit(do_not_specialize=["programs"])
def reduce(
    partial, programs, size, loss, stats, shared,
    KEEP_LOSS: tl.constexpr, KEEP_STATS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums partial (programs, size) over programs into loss (), stats (5,) and shared (size - 6,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK), partial.dtype.element_ty)
    for start in range(0, programs, BLOCK_P):
        program = (start + tl.arange(0, BLOCK_P)[:, None]).to(tl.int64)
        sums += tl.load(partial + program * size + at, (program < programs) & (at < size), 0)
    total = tl.sum(sums, axis=0, keep_dims=True)
    if KEEP_LOSS:
        tl.store(loss + at, total, at < 1)
    if KEEP_STATS:
        tl.store(stats + at - 1, total, (at >= 1) & (at < HEAD))
    tl.store(shared + at - HEAD, total, (at >= HEAD) & (at < size))
