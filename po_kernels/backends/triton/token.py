"""Token statistics in Triton: a program takes a row, in blocks of columns of which it reads each once for the value and
once more for the gradient. logits are (rows, V), in half precision as they lie."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import linear_head
from ..contract import IGNORED, NUM_TOKEN_STATS
from . import launch
from .lanes import (
    add,
    constant,
    exp,
    inverse,
    load,
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

_LARGEST_BLOCK = 4096  # columns; their sums stay in registers
_IGNORED = tl.constexpr(IGNORED)
_LOWEST = tl.constexpr((-87.0, -708.0))  # whose exp is a normal number


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
    x = rounded(x, K)
    if K.CAPPED:
        y = tanh(times(x, 1.0 / softcap))
        return times(y, softcap * inverse_temperature), times(plus(mul(y, times(y, -1.0)), 1.0), inverse_temperature)
    else:
        return times(x, inverse_temperature), constant(tl.full(value(x).shape, inverse_temperature, K.T), K)


@triton.constexpr_function
def lowest(K):
    return _LOWEST.value[1 if tl.float64 == K.T else 0]


@triton.jit
def finite(top):
    """Zero for the largest of what is all masked."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def centred(z, top, inside, K: tl.constexpr):
    """z - top and exp(z - top); both zero, with no derivative, where that is nothing: of what is masked, for one, as
    without a cap columns beyond the last are."""
    d = plus(z, -finite(top))
    seen = ~(value(d) < lowest(K))  # also nan
    if K.CAPPED:
        seen = seen & inside
    d = masked(seen, d)
    return d, masked(seen, exp(d))


@triton.jit
def together(a, K: tl.constexpr):
    """The sums of neighbours, which a thread has."""
    if isinstance(a, tl.tensor):
        return tl.sum(tl.reshape(a, (a.shape[0] // K.NEAR, K.NEAR)), axis=1)
    else:
        return together(a[0], K), together(a[1], K)


@triton.jit(do_not_specialize=["rows"])
def token_log_prob(
    logits, logits_stride: tl.int64, token_ids, cotangent, out, to, rows: tl.int64, classes,
    temperature: tl.float64, softcap: tl.float64, K: tl.constexpr,
):  # fmt: skip
    """cotangent and out (3, rows). An id that is out of range makes its row nan, one that is IGNORED zero."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    there = row < rows
    start = row * logits_stride
    columns = tl.arange(0, K.BLOCK_D)
    token = tl.load(token_ids + row, there, 0)
    known = (token >= 0) & (token < classes)
    inverse_temperature = number(1.0 / temperature, K)
    cap = number(softcap, K)
    top = tl.full((), float("-inf"), K.T)
    mass, product = zeros((K.BLOCK_D // K.NEAR,), K), zeros((K.BLOCK_D // K.NEAR,), K)
    for first in range(0, classes, K.BLOCK_D):
        v = first + columns
        z, _ = scaled(load(logits, start + v, v < classes, float("-inf"), K), inverse_temperature, cap, K)
        inside = v < classes
        seen = tl.where(inside, value(z), float("-inf")) if K.CAPPED else value(z)
        higher = tl.maximum(top, tl.max(seen, axis=0))
        # What has been summed is relative to the largest z so far.
        shift = tl.where(top == float("-inf"), finite(higher), top) - finite(higher)
        shift = tl.maximum(shift, 2 * lowest(K))
        factor = tl.exp(shift)
        top = higher
        d, e = centred(z, top, inside, K)
        product = add(times(mul_add(mass, shift, product), factor), together(mul(e, d), K))
        mass = add(times(mass, factor), together(e, K))
    mass, product = total(mass, 0), total(product, 0)
    log_mass = log(mass)
    taken, _ = scaled(load(logits, start + tl.where(known, token, 0), known, 0.0, K), inverse_temperature, cap, K)
    wrong = tl.where(known, 0.0, float("nan")).to(K.T)
    counted = token != _IGNORED
    tl.store(out + row, output(masked(counted, plus(sub(plus(taken, -top), log_mass), wrong)), K), there)
    entropy = sub(log_mass, mul(product, inverse(mass)))
    tl.store(out + rows + row, output(masked(counted, plus(entropy, wrong)), K), there)
    tl.store(out + 2 * rows + row, output(masked(counted, plus(plus(log_mass, top), wrong)), K), there)
    if K.HAS_COTANGENT and K.NEED_LOGITS:
        alpha = masked(counted, load(cotangent, row, there, 0.0, K))
        beta = masked(counted, load(cotangent, rows + row, there, 0.0, K))
        gamma = masked(counted, load(cotangent, 2 * rows + row, there, 0.0, K))
        factor = mul(beta, inverse(mass))
        offset = plus(mul(add(sub(gamma, alpha), mul(factor, product)), inverse(mass)), wrong)
        if not K.CAPPED:  # the slope is that of all columns
            alpha, factor = times(alpha, inverse_temperature), times(factor, inverse_temperature)
            offset = times(offset, inverse_temperature)
        here = token.to(tl.int32)
        # From the last block back: what was read last may still be in a cache.
        for done in range(0, classes, K.BLOCK_D):
            v = (classes - 1) // K.BLOCK_D * K.BLOCK_D - done + columns
            inside = v < classes
            z, slope = scaled(load(logits, start + v, inside, float("-inf"), K), inverse_temperature, cap, K)
            d, e = centred(z, top, inside, K)
            g = add(mul(e, mul_add(negative(factor), d, offset)), masked(v == here, add(alpha, zeros((K.BLOCK_D,), K))))
            g = masked(counted, mul(g, slope) if K.CAPPED else g)
            tl.store(to.logits + row * classes + v, output(g, K).to(to.logits.dtype.element_ty), inside)


def _token_log_prob(call: Call) -> tuple[Tensor, Tensor]:
    rows, classes = call.inputs.logits.shape
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    out = torch.empty((NUM_TOKEN_STATS, rows), dtype=dtype, device=call.device)
    if rows == 0:
        return out, call.no_rows()
    block = min(_LARGEST_BLOCK // (2 if call.dual else 1), triton.next_power_of_2(classes))
    tile = launch.Tile(1, 1, 1, block, max(1, min(8, block // 256)))
    call.run_tiles(
        token_log_prob, (rows,), tile, {"CAPPED": call.config.softcap is not None, "NEAR": min(4, block)},
        **call.rows("logits"), token_ids=call.constants.token_ids.contiguous(), cotangent=call.cotangent, out=out,
        to=call.gradients, rows=rows, classes=classes, temperature=call.config.temperature,
        softcap=call.config.softcap or 1.0,
    )  # fmt: skip
    return out, call.empty(0)


KERNELS = {linear_head.ROW_OP: launch.served(linear_head.ROW_OP, _token_log_prob)}
KERNELS[linear_head.OP] = linear_head.kernel(KERNELS[linear_head.ROW_OP])
