"""Rows of categorical policies, in Triton.

A program takes blocks of BLOCK_B rows, one after the other, as tiles (1, BLOCK_B, BLOCK_D) of all classes; groups of
samples are (1, BLOCK_B, BLOCK_G), and what a row has one of, (1, BLOCK_B, 1). logits are (rows, classes), rewards and
labels (count, rows), the latter and gradients contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tally
from .group import finish_group, transformed
from .lanes import (
    RUN,
    accumulate,
    add,
    exp,
    inverse,
    load,
    log,
    masked,
    mul,
    negative,
    no_sum,
    number,
    output,
    plus,
    power_of_two,
    rounded,
    split,
    sub,
    times,
    total,
    value,
    zeros,
)
from .launch import Call
from .philox import words

_LABELS_AT_ONCE = 256  # of a row
# With a table in registers. A warp waits for its rows, and more of them leave a multiprocessor idle for less time: a
# third faster on an H100, in spite of registers that go to memory.
_MOST_REGISTERS = 128


@triton.jit
def softmax(logits, c, classes):
    """p, log p, both (1, B, BLOCK_D), the entropy and the log of the normaliser, both (1, B, 1).

    Where masked, p is 0 and log p any finite number.
    """
    seen = (c < classes) & (value(logits) != float("-inf"))
    top = tl.max(tl.where(seen, value(logits), float("-inf")), axis=2, keep_dims=True)
    shifted = masked(seen, plus(logits, -top))
    weight = masked(seen, exp(shifted))
    normaliser = total(weight, 2)
    log_p = sub(shifted, log(normaliser))
    p = mul(weight, inverse(normaliser))
    return p, log_p, negative(total(mul(p, log_p), 2)), plus(log(normaliser), top)


@triton.jit
def is_label(label, classes):
    return (label >= 0) & (label < classes)


@triton.jit
def load_of(x, offsets, label, inside, classes, K: tl.constexpr):
    """Reads what belongs to a label, zero where not `inside`.

    Values in memory of a device are not checked: one that is no label reads nothing, and makes its row nan.
    """
    return masked(inside, load(x, offsets, inside & is_label(label, classes), float("nan"), K))


@triton.jit
def log_prob_of(logits, offset, label, log_normaliser, inside, classes, K: tl.constexpr):
    """log p of labels (1, B, G) of the rows that begin at `offset`; -inf, with no derivative, where masked."""
    x = load_of(logits, offset + label, label, inside, classes, K)
    seen = value(x) != float("-inf")
    return plus(masked(seen, sub(x, log_normaliser)), tl.where(seen, 0.0, float("-inf")).to(K.T))


@triton.jit
def uniforms(seed, g, row):
    """Uniform numbers of 53 bits for each sample (1, B, G) of g (1, 1, G) and row (1, B, 1)."""
    x0, x1, _, _ = words(seed, tl.zeros_like(g).to(tl.uint32), g.to(tl.uint32), row)
    return (((x0 >> 5).to(tl.int64) << 26) | (x1 >> 6).to(tl.int64)).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def draw(logits, c, u, classes):
    """Labels (1, B, G) from uniform numbers: the classes whose distribution function, in float64, is not above them."""
    x = tl.where(c < classes, logits.to(tl.float64), float("-inf"))
    top = tl.max(x, axis=2, keep_dims=True)
    weight = tl.where(x == float("-inf"), 0, tl.exp(x - top))
    last = tl.max(tl.where(weight > 0, c, 0), axis=2, keep_dims=True)
    scale = 1.0 / tl.sum(weight, axis=2, keep_dims=True)
    cumulative = tl.zeros_like(top)
    label = tl.zeros_like(u).to(tl.int32)
    for i in range(0, classes):
        cumulative += tl.sum(tl.where(c == i, weight, 0), axis=2, keep_dims=True)
        # No number may pass the last class that has mass.
        label += (u >= tl.where(i >= last, 2.0, cumulative * scale)).to(tl.int32)
    return label


@triton.jit
def scattered(label, x, c, count, K: tl.constexpr):
    """Σ_g x_g [label_g = c], (1, B, BLOCK_D), in the order of the samples; label and x (1, B, G)."""
    g = tl.arange(0, K.BLOCK_G)[None, None, :]
    result = no_sum((1, K.BLOCK_B, K.BLOCK_D), K)
    for first in range(0, count, RUN):
        part = zeros((1, K.BLOCK_B, K.BLOCK_D), K)
        for i in range(first, tl.minimum(first + RUN, count)):
            chosen = tl.sum(tl.where(g == i, label, 0), axis=2, keep_dims=True)
            part = add(part, masked(c == chosen, total(masked(g == i, x), 2)))
        result = add(result, part)
    return rounded(result, K)


@triton.jit
def no_table(K: tl.constexpr):
    SIZE: tl.constexpr = K.BLOCK_D if K.IN_REGISTERS else 1
    return tl.zeros((SIZE, SIZE), tl.float64 if K.WIDE else K.T)


@triton.jit
def add_to_table(sums, to, x, label, inside, c, classes, K: tl.constexpr):
    """Adds x_b (1, B, BLOCK_D) to row label_b of a table, which is the sum of `sums` and what is in memory."""
    known = inside & is_label(label, classes)
    x = tl.where(known, x, 0)
    label = label.to(tl.int32)
    if K.IN_REGISTERS:
        # What is not finite would be in all rows of a product.
        if tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1)) == 0:
            if K.WIDE:
                sums += add_by_label(tl.zeros_like(sums).to(tl.float32), label, x, c)
            else:
                sums = add_by_label(sums, label, x, c)
        else:
            add_in_memory(to, x, label, known, c, classes)
    else:
        add_in_memory(to, x, label, known, c, classes)
    return sums


@triton.jit
def add_by_label(sums, label, x, c):
    """By a product with zeros and ones, which are exact, as are x in two parts but for 2^-22: 2 eps."""
    SHAPE: tl.constexpr = (x.shape[1], x.shape[2])
    high, low = split(tl.reshape(x, SHAPE))
    chosen = tl.trans(tl.reshape((label == c).to(tl.float32), SHAPE))
    sums = tl.dot(chosen, low, sums, input_precision="tf32")
    return tl.dot(chosen, high, sums, input_precision="tf32")


@triton.jit
def add_in_memory(to, x, label, known, c, classes):
    """One row after the other."""
    b = tl.arange(0, x.shape[1])[None, :, None]
    for i in range(0, x.shape[1]):
        here = (b == i) & known
        chosen = tl.sum(tl.where(here, label, 0), axis=1, keep_dims=True).to(tl.int64)
        accumulate(to, chosen * classes + c, c < classes, tl.sum(tl.where(here, x, 0), axis=1, keep_dims=True))


@triton.jit
def store_table(sums, to, classes, K: tl.constexpr):
    if K.IN_REGISTERS:
        each = tl.arange(0, K.BLOCK_D)
        inside = (each[:, None] < classes) & (each[None, :] < classes)
        accumulate(to, each[:, None] * classes + each[None, :], inside, sums)


@triton.jit
def score_loss(
    label, rewards, density, p, log_p, entropy, weight, options, c, classes, count, row, inside, to, K: tl.constexpr
):
    """The score-function surrogate of labels (1, B, G), their rewards and log p; stores the gradient in the logits.

    Returns:
        the surrogate; moments as of `finish_group`; the gradient in the rewards, (1, B, G).
    """
    size = number(count, K)
    objective, moments, factor, pull = finish_group(rewards, output(density, K), options.gamma, size, K)
    share = negative(times(weight, 1.0 / size))
    if K.NEED_LOGITS:
        f = mul(factor, share)
        slope = sub(scattered(label, f, c, count, K), mul(p, total(f, 2)))
        slope = add(slope, times(mul(weight, mul(p, add(log_p, entropy))), options.coef))
        tl.store(to.logits + row * classes + c, output(slope, K), inside & (c < classes))
    return objective, moments, mul(pull, share)


@triton.jit(do_not_specialize=["rows", "blocks", "row_offset"])
def policy_loss(
    logits, logits_stride: tl.int64, table, target, cotangent, seed, to, out,
    rows: tl.int64, blocks: tl.int64, row_offset: tl.int64,
    classes, count, entropy_coef: tl.float64, rbf_gamma: tl.float64, share: tl.float64, K: tl.constexpr,
):  # fmt: skip
    """table (classes, classes), by label first; target (rows,)."""
    c = tl.arange(0, K.BLOCK_D)[None, None, :]
    options = tally.read_options(entropy_coef, rbf_gamma, share, K)
    to_table = tally.own_part(out) + tally.HEAD
    table_sum = no_table(K)
    reported = tally.no_sums(K)
    for block in tl.range(0, blocks, num_stages=1):
        row = tally.rows_of_block(block, blocks, K)
        inside = row < rows
        here = inside & (c < classes)
        x = load(logits, row * logits_stride + c, here, 0, K)
        y = tl.load(target + row, inside, 0)
        weight = tally.row_weight(cotangent, row, inside, options, K)
        p, log_p, entropy, log_normaliser = softmax(x, c, classes)
        if K.CLOSED_FORM:
            reward = transformed(load_of(table, y * classes + c, y, here, classes, K), options.gamma, K)
            objective = total(mul(p, reward), 2)
            deviation = sub(reward, objective)
            if K.NEED_LOGITS:
                slope = sub(mul(p, deviation), times(mul(p, add(log_p, entropy)), options.coef))
                tl.store(to.logits + row * classes + c, output(negative(mul(weight, slope)), K), here)
            if K.NEED_REWARD_TABLE:
                by_class = negative(mul(weight, p))
                if K.HAS_RBF:
                    by_class = mul(by_class, times(reward, options.gamma))
            std = tl.zeros((1, K.BLOCK_B, 1), K.T)
            if K.WANT_STATS:
                unit = power_of_two(tl.max(tl.where(p > 0, tl.abs(deviation), 0), axis=2, keep_dims=True))
                deviation = deviation / unit  # whose squares do not vanish
                std = unit * tl.sqrt(total(p * deviation * deviation, 2))
            moments = value(objective), std, std
        else:
            g = tl.arange(0, K.BLOCK_G)[None, None, :]
            label = draw(value(x), c, uniforms(tl.load(seed), g, row + row_offset), classes)
            there = inside & (g < count)
            given = load_of(table, y * classes + label, y, there, classes, K)
            density = log_prob_of(logits, row * logits_stride, label, log_normaliser, there, classes, K)
            objective, moments, to_rewards = score_loss(
                label, given, density, p, log_p, entropy, weight, options, c, classes, count, row, inside, to, K
            )
            if K.NEED_REWARD_TABLE:
                by_class = scattered(label, to_rewards, c, count, K)
        if K.NEED_REWARD_TABLE:
            table_sum = add_to_table(table_sum, to_table, output(by_class, K), y, inside, c, classes, K)
        log_prob = tl.zeros((1, K.BLOCK_B, 1), K.T)
        if K.WANT_STATS:
            log_prob = log_prob_of(logits, row * logits_stride, y, log_normaliser, inside, classes, K)
        reported = tally.report(reported, objective, entropy, log_prob, moments, out, row, rows, inside, options, K)
    tally.store(reported, out)
    if K.NEED_REWARD_TABLE:
        store_table(table_sum, to_table, classes, K)


@triton.jit(do_not_specialize=["rewards_stride_g", "rewards_stride", "rows", "blocks"])
def surrogate_loss(
    logits, logits_stride: tl.int64, rewards, rewards_stride_g: tl.int64, rewards_stride: tl.int64, samples,
    cotangent, to, out,
    rows: tl.int64, blocks: tl.int64, classes, count, entropy_coef: tl.float64, rbf_gamma: tl.float64,
    share: tl.float64, K: tl.constexpr,
):  # fmt: skip
    """As `policy_loss`, for samples and rewards that are given."""
    c = tl.arange(0, K.BLOCK_D)[None, None, :]
    g = tl.arange(0, K.BLOCK_G)[None, None, :].to(tl.int64)
    options = tally.read_options(entropy_coef, rbf_gamma, share, K)
    reported = tally.no_sums(K)
    for block in range(0, blocks):
        row = tally.rows_of_block(block, blocks, K)
        inside = row < rows
        there = inside & (g < count)
        x = load(logits, row * logits_stride + c, inside & (c < classes), 0, K)
        weight = tally.row_weight(cotangent, row, inside, options, K)
        p, log_p, entropy, log_normaliser = softmax(x, c, classes)
        label = tl.load(samples + g * rows + row, there, 0)
        given = load(rewards, g * rewards_stride_g + row * rewards_stride, there, 0, K)
        density = log_prob_of(logits, row * logits_stride, label, log_normaliser, there, classes, K)
        objective, moments, to_rewards = score_loss(
            label, given, density, p, log_p, entropy, weight, options, c, classes, count, row, inside, to, K
        )
        if K.NEED_REWARDS:
            tl.store(to.rewards + g * rows + row, output(to_rewards, K), there)
        log_prob = tl.zeros((1, K.BLOCK_B, 1), K.T)
        if K.WANT_STATS:
            log_prob = total(tl.where(there, density, 0), 2) * (1.0 / number(count, K))
        reported = tally.report(reported, objective, entropy, log_prob, moments, out, row, rows, inside, options, K)
    tally.store(reported, out)


@triton.jit(do_not_specialize=["rows", "chunks", "count"])
def log_prob(
    logits, logits_stride: tl.int64, at, cotangent, out, to, rows: tl.int64, chunks: tl.int64, classes, count: tl.int64,
    K: tl.constexpr,
):  # fmt: skip
    """log p of labels and, with a cotangent (count, rows), the gradient; `chunks` of BLOCK_G a program."""
    c = tl.arange(0, K.BLOCK_D)[None, None, :]
    row = tally.rows_of_block(0, 1, K)
    inside = row < rows
    x = load(logits, row * logits_stride + c, inside & (c < classes), 0, K)
    p, _, _, log_normaliser = softmax(x, c, classes)
    sums = output(no_sum((1, K.BLOCK_B, K.BLOCK_D), K), K)
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * K.BLOCK_G + tl.arange(0, K.BLOCK_G)[None, None, :]
        there = inside & (g < count)
        label = tl.load(at + g * rows + row, there, 0)
        found = log_prob_of(logits, row * logits_stride, label, log_normaliser, there, classes, K)
        tl.store(out + g * rows + row, output(found, K), there)
        if K.HAS_COTANGENT and K.NEED_LOGITS:
            f = load(cotangent, g * rows + row, there, 0, K)
            sums += output(sub(scattered(label, f, c, K.BLOCK_G, K), mul(p, total(f, 2))), K)
    if K.HAS_COTANGENT and K.NEED_LOGITS:
        tl.store(to.logits + row * classes + c, sums, inside & (c < classes))


@triton.jit(do_not_specialize=["rows", "row_offset", "count"])
def sample(
    logits, logits_stride: tl.int64, seed, out, rows: tl.int64, row_offset: tl.int64, chunks: tl.int64, classes,
    count: tl.int64, K: tl.constexpr,
):  # fmt: skip
    """Labels (count, rows), int64; `chunks` of BLOCK_G a program."""
    c = tl.arange(0, K.BLOCK_D)[None, None, :]
    row = tally.rows_of_block(0, 1, K)
    inside = row < rows
    x = value(load(logits, row * logits_stride + c, inside & (c < classes), 0, K))
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * K.BLOCK_G + tl.arange(0, K.BLOCK_G)[None, None, :]
        label = draw(x, c, uniforms(tl.load(seed), g, row + row_offset), classes)
        tl.store(out + g * rows + row, label.to(tl.int64), inside & (g < count))


def _policy_loss(call: Call) -> tuple[Tensor, Tensor]:
    classes = call.inputs.logits.shape[1]
    count = call.whole_group(max(call.config.num_samples, 1))
    exact, need = call.config.estimator == "exact", call.needs.reward_table
    tile = launch.expected_tile(classes, need) if exact else launch.class_tile(count, classes)
    in_registers = (
        need and call.dtype == torch.float32 and tile.rows >= 16 and 16 <= tile.dim <= launch.MOST_IN_REGISTERS
    )
    if in_registers and exact and not call.dual:
        tile = tile._replace(registers=_MOST_REGISTERS)
    value, stats, sums = launch.loss(
        call, policy_loss, tile, (classes, classes) if need else (0,),
        {"CLOSED_FORM": exact, "IN_REGISTERS": in_registers, "LONG": _is_long(count)},
        **call.rows("logits"), target=call.constants.target.contiguous(),
        # By label first, for the rewards of a row to be neighbours.
        table=call.pairs.reward_table.of(lambda x: x.t().contiguous()),
        seed=call.seed, row_offset=call.config.row_offset, classes=classes, count=count,
    )  # fmt: skip
    if need:
        call.gradients = call.gradients._replace(reward_table=sums.t().contiguous())
    return value, stats


def _is_long(count: int) -> bool:
    """Whether as many samples of a class are too many for a run of runs."""
    return count > launch.RUN**2


def _surrogate_loss(call: Call) -> tuple[Tensor, Tensor]:
    samples, classes = call.constants.samples.contiguous(), call.inputs.logits.shape[1]
    count = call.whole_group(samples.shape[0])
    value, stats, _ = launch.loss(
        call, surrogate_loss, launch.class_tile(count, classes), (0,), {"LONG": _is_long(count)},
        **call.rows("logits"), **call.rows("rewards", 2), samples=samples, classes=classes, count=count,
    )  # fmt: skip
    return value, stats


def _log_prob(call: Call) -> tuple[Tensor, Tensor]:
    at, classes = call.constants.value.contiguous(), call.inputs.logits.shape[1]
    return launch.in_chunks(
        call, log_prob, call.empty(*at.shape), launch.class_tile(min(len(at), _LABELS_AT_ONCE), classes),
        {}, call.needs.logits, **call.rows("logits"), at=at, classes=classes,
    )  # fmt: skip


def _sample(call: Call) -> tuple[Tensor, Tensor]:
    rows, classes = call.inputs.logits.shape
    count = call.config.num_samples
    labels = torch.empty((count, rows), dtype=torch.int64, device=call.device)
    return launch.in_chunks(
        call, sample, labels, launch.class_tile(min(count, _LABELS_AT_ONCE), classes), {}, False,
        **call.rows("logits"), seed=call.seed, row_offset=call.config.row_offset, classes=classes,
    )  # fmt: skip


KERNELS = {
    f"categorical_{name}": launch.served(f"categorical_{name}", evaluate)
    for name, evaluate in {
        "policy_loss": _policy_loss, "surrogate_loss": _surrogate_loss, "log_prob": _log_prob, "sample": _sample,
    }.items()
}  # fmt: skip
