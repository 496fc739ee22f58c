"""Token statistics in Triton: a program takes a row, in blocks of columns of which it reads each once for the value and
once more for the gradient. logits are (rows, V), in half precision as they lie.

All blocks but the last are whole, and have no masks. In the first pass each few neighbours, which a thread reads at
once, have a largest z and sums of their own, so that no thread waits for another before the end of the row (Milakov and
Gimelshein, arXiv 1805.02867, algorithm 3). A backward pass is given what the forward pass has found.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import linear_head
from ..contract import IGNORED, NUM_TOKEN_STATS
from . import launch
from .lanes import (
    add,
    choose,
    constant,
    inverse,
    load,
    load_whole,
    log,
    masked,
    mul,
    mul_add,
    negative,
    number,
    output,
    plus,
    rounded,
    sub,
    times,
    total,
    value,
    zeros,
)
from .launch import Call

_LARGEST_BLOCK = 4096  # columns
_IGNORED = tl.constexpr(IGNORED)
_STATS = tl.constexpr(NUM_TOKEN_STATS)
_LEAST = tl.constexpr((-3.4028234663852886e38, -1.7976931348623157e308))  # finite numbers
_VANISHING = tl.constexpr((-104.0, -746.0))  # whose exp is 0
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(a):
    """With a relative error of some ulp also near 0 (Cephes, tanhf and tanh)."""
    if isinstance(a, tl.tensor):
        size = tl.abs(a)
        near = tl.where(size < 0.625, a, 0)
        s = near * near
        e = tl.exp(-2 * size)
        large = (1 - e) / (1 + e)
        if a.dtype == tl.float64:
            p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
            q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
            p = p / q
        else:
            p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
            p -= 3.33332819422e-1
        return tl.where(size < 0.625, near + near * s * p, tl.where(a < 0, -large, large))
    else:
        y = tanh(a[0])
        return y, a[1] * (1 - y * y)


@triton.jit
def scaled(x, inverse_temperature, softcap, K: tl.constexpr):
    """z of logits, and dz/dlogit."""
    if K.CAPPED:
        y = tanh(times(x, 1.0 / softcap))
        return times(y, softcap * inverse_temperature), times(plus(mul(y, times(y, -1.0)), 1.0), inverse_temperature)
    else:
        return times(x, inverse_temperature), constant(tl.full(value(x).shape, inverse_temperature, K.T), K)


@triton.constexpr_function
def least(K):
    return _LEAST.value[1 if tl.float64 == K.T else 0]


@triton.constexpr_function
def vanishing(K):
    return _VANISHING.value[1 if tl.float64 == K.T else 0]


@triton.jit
def not_below(x, low):
    """The larger of both, or nan."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp(d, K: tl.constexpr):
    """exp d, where d is not below `vanishing`; that of a float32 which is no normal number is 0."""
    if isinstance(d, tl.tensor):
        return tl.exp(d) if tl.float64 == K.T else tl.exp2(d * _LOG2_E)
    else:
        e = exp(d[0], K)
        return e, e * d[1]


@triton.jit
def centred(z, top, K: tl.constexpr):
    """z - top, as far down as its exp is not 0 (where that has no derivative), and exp(z - top)."""
    LOW: tl.constexpr = vanishing(K)
    d = plus(z, -top)
    if isinstance(d, tl.tensor):
        d = not_below(d, LOW)
    else:
        d = choose(value(d) <= LOW, constant(tl.full(value(d).shape, LOW, K.T), K), d)
    return d, exp(d, K)


@triton.jit
def read(logits, start, v, classes, WHOLE: tl.constexpr, K: tl.constexpr):
    """Columns v of a row that begins at `start`, in K.T; -inf beyond the last."""
    if WHOLE:
        return rounded(load_whole(logits, start + v, K), K)
    else:
        return rounded(load(logits, start + v, v < classes, float("-inf"), K), K)


@triton.jit
def grouped(a, K: tl.constexpr):
    """Neighbours, which a thread has, along a second axis."""
    if isinstance(a, tl.tensor):
        return tl.reshape(a, (a.shape[0] // K.NEAR, K.NEAR))
    else:
        return grouped(a[0], K), grouped(a[1], K)


@triton.jit
def together(a):
    return tl.sum(a, axis=1) if isinstance(a, tl.tensor) else (tl.sum(a[0], axis=1), tl.sum(a[1], axis=1))


@triton.jit
def risen(top, higher, mass, product, K: tl.constexpr):
    """Σ e and Σ e d, e = exp d and d = z - top, relative to a higher top."""
    shift = not_below(top - higher, vanishing(K))
    factor = exp(shift, K)
    return times(mass, factor), times(mul_add(mass, shift, product), factor)


@triton.jit
def add_block(top, mass, product, x, v, classes, inverse_temperature, cap, WHOLE: tl.constexpr, K: tl.constexpr):
    z, _ = scaled(x, inverse_temperature, cap, K)
    if K.CAPPED and not WHOLE:  # a cap makes -inf a number
        z = choose(v < classes, z, constant(tl.full(v.shape, float("-inf"), K.T), K))
    z = grouped(z, K)
    higher = tl.maximum(top, tl.max(value(z), axis=1))
    mass, product = risen(top, higher, mass, product, K)
    d, e = centred(z, higher[:, None], K)
    return higher, add(mass, together(e)), add(product, together(mul(e, d)))


@triton.jit
def add_gradient(
    to, x, v, classes, token, counted, top, alpha, offset, factor, inverse_temperature, cap,
    WHOLE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Stores e (offset - factor d), and of the taken token α more."""
    z, slope = scaled(x, inverse_temperature, cap, K)
    d, e = centred(z, top, K)
    more = masked(v == token, add(alpha, zeros((K.BLOCK_D,), K)))
    g = add(mul(e, mul_add(negative(factor), d, offset)), more)
    g = output(masked(counted, mul(g, slope) if K.CAPPED else g), K).to(to.dtype.element_ty)
    if WHOLE:
        tl.store(to + v, g)
    else:
        tl.store(to + v, g, v < classes)


@triton.jit(do_not_specialize=["rows"])
def token_log_prob(
    logits, logits_stride: tl.int64, token_ids, found, cotangent, out, to, rows: tl.int64, classes,
    temperature: tl.float64, softcap: tl.float64, K: tl.constexpr,
):  # fmt: skip
    """cotangent, out and found (6, rows). An id that is out of range makes its row nan, one that is IGNORED zero."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    there = row < rows
    start = tl.program_id(0).to(tl.int64) * logits_stride
    columns = tl.arange(0, K.BLOCK_D)
    token = tl.load(token_ids + row, there, 0)
    in_range = (token >= 0) & (token < classes)
    counted = token != _IGNORED
    wrong = tl.where(in_range, 0.0, float("nan")).to(K.T)
    inverse_temperature = number(1.0 / temperature, K)
    cap = number(softcap, K)
    last = (classes - 1) // K.BLOCK_D * K.BLOCK_D  # the block that may not be whole
    if K.KNOWN:
        for i in tl.static_range(_STATS):
            tl.store(out + i * rows + row, tl.load(found + i * rows + row, there, 0), there)
        top = tl.load(found + 3 * rows + row, there, 0)
        mass = tl.load(found + 4 * rows + row, there & counted, 1)
        mean = tl.load(found + 5 * rows + row, there, 0)
    else:
        tops = tl.full((K.BLOCK_D // K.NEAR,), least(K), K.T)
        masses, products = zeros((K.BLOCK_D // K.NEAR,), K), zeros((K.BLOCK_D // K.NEAR,), K)
        for first in range(0, last, K.BLOCK_D):
            x = read(logits, start, first + columns, classes, True, K)
            tops, masses, products = add_block(
                tops, masses, products, x, first + columns, classes, inverse_temperature, cap, True, K
            )
        x = read(logits, start, last + columns, classes, False, K)
        tops, masses, products = add_block(
            tops, masses, products, x, last + columns, classes, inverse_temperature, cap, False, K
        )
        top = tl.max(tops, axis=0, keep_dims=True)
        masses, products = risen(tops, top, masses, products, K)
        mass, product = total(masses, 0), total(products, 0)
        log_mass = log(mass)
        x = rounded(load(logits, start + tl.where(in_range, token, 0), in_range, 0.0, K), K)
        taken, _ = scaled(x, inverse_temperature, cap, K)
        mean = mul(product, inverse(mass))
        entropy = sub(log_mass, mean)
        log_prob = plus(sub(plus(taken, -top), log_mass), wrong)
        tl.store(out + row, output(masked(counted, log_prob), K), there)
        tl.store(out + rows + row, output(masked(counted, plus(entropy, wrong)), K), there)
        tl.store(out + 2 * rows + row, output(masked(counted, plus(plus(log_mass, top), wrong)), K), there)
        tl.store(out + 3 * rows + row, output(constant(top, K), K), there)
        tl.store(out + 4 * rows + row, output(constant(value(mass), K), K), there)
        tl.store(out + 5 * rows + row, output(constant(value(mean), K), K), there)
    if K.HAS_COTANGENT and K.NEED_LOGITS:
        alpha = masked(counted, load(cotangent, row, there, 0.0, K))
        beta = masked(counted, load(cotangent, rows + row, there, 0.0, K))
        gamma = masked(counted, load(cotangent, 2 * rows + row, there, 0.0, K))
        offset = add(sub(gamma, alpha), mul(beta, mean))
        offset = plus(mul(offset, inverse(mass)), wrong)
        factor = mul(beta, inverse(mass))
        if not K.CAPPED:  # the slope is that of all columns
            alpha, factor = times(alpha, inverse_temperature), times(factor, inverse_temperature)
            offset = times(offset, inverse_temperature)
        here, to_row = token.to(tl.int32), to.logits + tl.program_id(0).to(tl.int64) * classes
        x = read(logits, start, last + columns, classes, False, K)
        add_gradient(
            to_row, x, last + columns, classes, here, counted, top, alpha, offset, factor, inverse_temperature, cap,
            False, K,
        )  # fmt: skip
        # From the last block back: what was read last may still be in a cache.
        for done in range(K.BLOCK_D, last + K.BLOCK_D, K.BLOCK_D):
            v = last - done + columns
            x = read(logits, start, v, classes, True, K)
            add_gradient(
                to_row, x, v, classes, here, counted, top, alpha, offset, factor, inverse_temperature, cap, True, K
            )


def _token_log_prob(call: Call) -> tuple[Tensor, Tensor]:
    rows, classes = call.inputs.logits.shape
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    out = torch.empty((NUM_TOKEN_STATS, rows), dtype=dtype, device=call.device)
    if rows == 0:
        return out, call.no_rows()
    known = call.constants.known
    use = known is not None and not call.dual
    numbers = (2 if call.dual else 1) * (2 if dtype == torch.float64 else 1)
    block = min(_LARGEST_BLOCK // numbers, triton.next_power_of_2(classes))
    tile = launch.Tile(1, 1, 1, block, max(1, min(8, block // 256)))
    near = min(16 // call.inputs.logits.element_size(), block)  # what a thread reads at once
    call.run_tiles(
        token_log_prob, (rows,), tile, {"CAPPED": call.config.softcap is not None, "NEAR": near, "KNOWN": use},
        **call.rows("logits"), token_ids=call.constants.token_ids.contiguous(),
        found=known.contiguous() if use else out, cotangent=call.cotangent, out=out, to=call.gradients, rows=rows,
        classes=classes, temperature=call.config.temperature, softcap=call.config.softcap or 1.0,
    )  # fmt: skip
    return out, call.empty(0)


KERNELS = {linear_head.ROW_OP: launch.served(linear_head.ROW_OP, _token_log_prob)}
KERNELS[linear_head.OP] = linear_head.kernel(KERNELS[linear_head.ROW_OP])
