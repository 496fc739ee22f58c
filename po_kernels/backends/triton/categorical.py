"""Rows of categorical policies, in Triton.

A program takes blocks of BLOCK_B rows, one after the other, as tiles (1, BLOCK_B, BLOCK_C) of all classes; groups of
samples are (1, BLOCK_B, BLOCK_G), and what a row has one of, (1, BLOCK_B, 1).
"""

import triton
import triton.language as tl

from .group import finish_group, transformed
from .lanes import (
    accumulate,
    add,
    constant,
    exp,
    inverse,
    load,
    log,
    masked,
    mul,
    negative,
    number,
    output,
    plus,
    split,
    sub,
    times,
    total,
    value,
)
from .philox import words
from .tally import HEAD, no_stats, report, report_stats, row_weight, store_tally


@triton.jit
def softmax(logits, c, classes):
    """p, log p, both (1, B, BLOCK_C), the entropy and the log of the normaliser, both (1, B, 1).

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
def load_of(pointer, tangent, offsets, label, inside, classes, DUAL: tl.constexpr, T: tl.constexpr):
    """Reads what belongs to a label, zero where not `inside`.

    Values in memory of a device are not checked: one that is no label reads nothing, and makes its row nan.
    """
    x = load(pointer, tangent, offsets, inside & is_label(label, classes), float("nan"), DUAL, T)
    return masked(inside, x)


@triton.jit
def log_prob_of(logits, logits_t, offset, label, log_normaliser, inside, classes, DUAL: tl.constexpr, T: tl.constexpr):
    """log p of labels (1, B, G) of the rows that begin at `offset`; -inf, with no derivative, where masked."""
    x = load_of(logits, logits_t, offset + label, label, inside, classes, DUAL, T)
    seen = value(x) != float("-inf")
    return plus(masked(seen, sub(x, log_normaliser)), tl.where(seen, 0.0, float("-inf")).to(T))


@triton.jit
def first_words(seed, g, row):
    """24 random bits for each sample (1, B, G) of g (1, 1, G) and row (1, B, 1)."""
    word, _, _, _ = words(seed, tl.zeros_like(g).to(tl.uint32), g.to(tl.uint32), row)
    return word >> 8


@triton.jit
def draw(logits, c, word, classes):
    """Labels (1, B, G) from words of 24 bits, by inversion: the thresholds are integers, computed in float64."""
    x = tl.where(c < classes, logits.to(tl.float64), float("-inf"))
    top = tl.max(x, axis=2, keep_dims=True)
    weight = tl.where(x == float("-inf"), 0, tl.exp(x - top))
    last = tl.max(tl.where(weight > 0, c, 0), axis=2, keep_dims=True)
    scale = 16777216.0 / tl.sum(weight, axis=2, keep_dims=True)
    cumulative = tl.zeros_like(top)
    label = tl.zeros_like(word).to(tl.int32)
    for i in range(0, classes):
        cumulative += tl.sum(tl.where(c == i, weight, 0), axis=2, keep_dims=True)
        # No word may pass the last class that has mass.
        threshold = tl.where(i >= last, 16777216.0, tl.ceil(cumulative * scale - 0.5))
        label += (word.to(tl.float64) >= threshold).to(tl.int32)
    return label


@triton.jit
def scattered(label, x, c, count, DUAL: tl.constexpr):
    """Σ_g x_g [label_g = c], (1, B, BLOCK_C), in the order of the samples; label and x (1, B, G)."""
    g = tl.arange(0, value(x).shape[2])[None, None, :]
    result = constant(tl.zeros((1, value(x).shape[1], c.shape[2]), value(x).dtype), DUAL)
    for i in range(0, count):
        chosen = tl.sum(tl.where(g == i, label, 0), axis=2, keep_dims=True)
        result = add(result, masked(c == chosen, total(masked(g == i, x), 2)))
    return result


@triton.jit
def no_table(IN_REGISTERS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr):
    SIZE: tl.constexpr = BLOCK_C if IN_REGISTERS else 1
    return tl.zeros((SIZE, SIZE), T)


@triton.jit
def add_to_table(sums, to, x, label, inside, c, classes, IN_REGISTERS: tl.constexpr):
    """Adds x_b (1, B, BLOCK_C) to row label_b of a table, which is the sum of `sums` and what is in memory."""
    known = inside & is_label(label, classes)
    x = tl.where(known, x, 0)
    label = label.to(tl.int32)
    if IN_REGISTERS:
        # What is not finite would be in all rows of a product.
        if tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1)) == 0:
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
def store_table(sums, to, classes, IN_REGISTERS: tl.constexpr, BLOCK_C: tl.constexpr):
    if IN_REGISTERS:
        each = tl.arange(0, BLOCK_C)
        inside = (each[:, None] < classes) & (each[None, :] < classes)
        accumulate(to, each[:, None] * classes + each[None, :], inside, sums)


@triton.jit
def score_loss(
    label, rewards, density, p, log_p, entropy, weight, coef, gamma, c, count, inside, to_logits,
    ADVANTAGE: tl.constexpr, HAS_RBF: tl.constexpr, WANT_STATS: tl.constexpr, NEED_LOGITS: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The score-function surrogate of labels (1, B, G), their rewards and log p; stores the gradient in the logits.

    Returns:
        the surrogate; mean reward, standard deviations of rewards and advantages; the rewards' gradient (1, B, G).
    """
    size = number(count, T)
    objective, reward_mean, reward_std, advantage_std, factor, pull = finish_group(
        rewards, output(density, DUAL), gamma, size, True, ADVANTAGE, HAS_RBF, WANT_STATS, DUAL
    )
    share = negative(times(weight, 1.0 / size))
    if NEED_LOGITS:
        f = mul(factor, share)
        slope = sub(scattered(label, f, c, count, DUAL), mul(p, total(f, 2)))
        slope = add(slope, times(mul(weight, mul(p, add(log_p, entropy))), coef))
        tl.store(to_logits, output(slope, DUAL), inside)
    return objective, reward_mean, reward_std, advantage_std, mul(pull, share)


@triton.jit(do_not_specialize=["cotangent_stride", "partial_stride", "rows", "blocks", "row_offset"])
def policy_loss(
    logits, logits_t, logits_stride: tl.int64, table, table_t, target,
    cotangent, cotangent_t, cotangent_stride: tl.int64, seed,
    losses, stats, to_logits, partial, partial_stride: tl.int64,
    rows: tl.int64, blocks: tl.int64, row_offset: tl.int64, classes, count,
    entropy_coef: tl.float64, rbf_gamma: tl.float64, loss_unit: tl.float64, stats_unit: tl.float64,
    CLOSED_FORM: tl.constexpr, ADVANTAGE: tl.constexpr, HAS_RBF: tl.constexpr, HAS_COTANGENT: tl.constexpr,
    REDUCED: tl.constexpr, WANT_STATS: tl.constexpr, NEED_LOGITS: tl.constexpr, NEED_TABLE: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits (rows, classes); table (classes, classes), by label first; target (rows,); gradients contiguous."""
    c = tl.arange(0, BLOCK_C)[None, None, :]
    coef, gamma, unit = number(entropy_coef, T), number(rbf_gamma, T), number(loss_unit, T)
    partial += tl.program_id(0).to(tl.int64) * partial_stride
    IN_REGISTERS: tl.constexpr = NEED_TABLE and tl.float32 == T and BLOCK_B >= 16 and BLOCK_C >= 16 and BLOCK_C <= 64
    table_sum = no_table(IN_REGISTERS, BLOCK_C, T)
    loss_sum = tl.zeros((1, BLOCK_B, 1), T)
    stats_sum = no_stats(BLOCK_B, T)
    for block in tl.range(0, blocks, num_stages=1):
        row = (tl.program_id(0).to(tl.int64) * blocks + block) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
        inside = row < rows
        here = inside & (c < classes)
        x = load(logits, logits_t, row * logits_stride + c, here, 0, DUAL, T)
        y = tl.load(target + row, inside, 0)
        weight = row_weight(cotangent, cotangent_t, cotangent_stride, row, inside, unit, HAS_COTANGENT, DUAL, T)
        p, log_p, entropy, log_normaliser = softmax(x, c, classes)
        if CLOSED_FORM:
            column = load_of(table, table_t, y * classes + c, y, here, classes, DUAL, T)
            reward = transformed(column, gamma, HAS_RBF)
            objective = total(mul(p, reward), 2)
            deviation = sub(reward, objective)
            if NEED_LOGITS:
                slope = sub(mul(p, deviation), times(mul(p, add(log_p, entropy)), coef))
                tl.store(to_logits + row * classes + c, output(negative(mul(weight, slope)), DUAL), here)
            if NEED_TABLE:
                by_class = negative(mul(weight, p))
                if HAS_RBF:
                    by_class = mul(by_class, times(reward, gamma))
            if WANT_STATS:
                reward_mean = objective
                reward_std = tl.sqrt(total(p * deviation * deviation, 2))
                advantage_std = reward_std
        else:
            g = tl.arange(0, BLOCK_G)[None, None, :]
            label = draw(value(x), c, first_words(tl.load(seed), g, row + row_offset), classes)
            there = inside & (g < count)
            given = load_of(table, table_t, y * classes + label, y, there, classes, DUAL, T)
            density = log_prob_of(logits, logits_t, row * logits_stride, label, log_normaliser, there, classes, DUAL, T)
            objective, reward_mean, reward_std, advantage_std, to_rewards = score_loss(
                label, given, density, p, log_p, entropy, weight, coef, gamma, c, count, here,
                to_logits + row * classes + c if NEED_LOGITS else None,
                ADVANTAGE, HAS_RBF, WANT_STATS, NEED_LOGITS, DUAL, T,
            )  # fmt: skip
            if NEED_TABLE:
                by_class = scattered(label, to_rewards, c, count, DUAL)
        if NEED_TABLE:
            table_sum = add_to_table(
                table_sum, partial + HEAD, output(by_class, DUAL), y, inside, c, classes, IN_REGISTERS
            )
        if WANT_STATS:
            log_prob = log_prob_of(logits, logits_t, row * logits_stride, y, log_normaliser, inside, classes, DUAL, T)
            stats_sum = report_stats(
                reward_mean, reward_std, entropy, log_prob, advantage_std,
                stats_sum, stats, row, rows, inside, number(stats_unit, T), REDUCED,
            )  # fmt: skip
        loss = output(negative(add(objective, times(entropy, coef))), DUAL)
        loss_sum = report(loss, loss_sum, losses, row, inside, unit, REDUCED)
    store_tally(loss_sum, stats_sum, partial)
    if NEED_TABLE:
        store_table(table_sum, partial + HEAD, classes, IN_REGISTERS, BLOCK_C)


@triton.jit(
    do_not_specialize=["rewards_stride_g", "rewards_stride", "cotangent_stride", "partial_stride", "rows", "blocks"]
)
def surrogate_loss(
    logits, logits_t, logits_stride: tl.int64,
    rewards, rewards_t, rewards_stride_g: tl.int64, rewards_stride: tl.int64, samples,
    cotangent, cotangent_t, cotangent_stride: tl.int64,
    losses, stats, to_logits, to_rewards, partial, partial_stride: tl.int64,
    rows: tl.int64, blocks: tl.int64, classes, count,
    entropy_coef: tl.float64, rbf_gamma: tl.float64, loss_unit: tl.float64, stats_unit: tl.float64,
    ADVANTAGE: tl.constexpr, HAS_RBF: tl.constexpr, HAS_COTANGENT: tl.constexpr,
    REDUCED: tl.constexpr, WANT_STATS: tl.constexpr, NEED_LOGITS: tl.constexpr, NEED_REWARDS: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `policy_loss`; rewards and samples (count, rows), the latter contiguous."""
    c = tl.arange(0, BLOCK_C)[None, None, :]
    g = tl.arange(0, BLOCK_G)[None, None, :].to(tl.int64)
    coef, gamma, unit = number(entropy_coef, T), number(rbf_gamma, T), number(loss_unit, T)
    partial += tl.program_id(0).to(tl.int64) * partial_stride
    loss_sum = tl.zeros((1, BLOCK_B, 1), T)
    stats_sum = no_stats(BLOCK_B, T)
    for block in range(0, blocks):
        row = (tl.program_id(0).to(tl.int64) * blocks + block) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
        inside = row < rows
        here = inside & (c < classes)
        there = inside & (g < count)
        x = load(logits, logits_t, row * logits_stride + c, here, 0, DUAL, T)
        weight = row_weight(cotangent, cotangent_t, cotangent_stride, row, inside, unit, HAS_COTANGENT, DUAL, T)
        p, log_p, entropy, log_normaliser = softmax(x, c, classes)
        label = tl.load(samples + g * rows + row, there, 0)
        given = load(rewards, rewards_t, g * rewards_stride_g + row * rewards_stride, there, 0, DUAL, T)
        density = log_prob_of(logits, logits_t, row * logits_stride, label, log_normaliser, there, classes, DUAL, T)
        objective, reward_mean, reward_std, advantage_std, for_rewards = score_loss(
            label, given, density, p, log_p, entropy, weight, coef, gamma, c, count, here,
            to_logits + row * classes + c if NEED_LOGITS else None,
            ADVANTAGE, HAS_RBF, WANT_STATS, NEED_LOGITS, DUAL, T,
        )  # fmt: skip
        if NEED_REWARDS:
            tl.store(to_rewards + g * rows + row, output(for_rewards, DUAL), there)
        if WANT_STATS:
            log_prob = total(tl.where(there, density, 0), 2) * (1.0 / number(count, T))
            stats_sum = report_stats(
                reward_mean, reward_std, entropy, log_prob, advantage_std,
                stats_sum, stats, row, rows, inside, number(stats_unit, T), REDUCED,
            )  # fmt: skip
        loss = output(negative(add(objective, times(entropy, coef))), DUAL)
        loss_sum = report(loss, loss_sum, losses, row, inside, unit, REDUCED)
    store_tally(loss_sum, stats_sum, partial)


@triton.jit(do_not_specialize=["rows", "chunks", "count"])
def log_prob(
    logits, logits_t, logits_stride: tl.int64, at, cotangent, cotangent_t, out, to_logits,
    rows: tl.int64, chunks: tl.int64, classes, count: tl.int64,
    HAS_COTANGENT: tl.constexpr, NEED_LOGITS: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """log p of labels (count, rows) and, with a cotangent so, the gradient; `chunks` of BLOCK_G a program."""
    c = tl.arange(0, BLOCK_C)[None, None, :]
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
    inside = row < rows
    x = load(logits, logits_t, row * logits_stride + c, inside & (c < classes), 0, DUAL, T)
    p, _, _, log_normaliser = softmax(x, c, classes)
    sums = tl.zeros((1, BLOCK_B, BLOCK_C), T)
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * BLOCK_G + tl.arange(0, BLOCK_G)[None, None, :]
        there = inside & (g < count)
        label = tl.load(at + g * rows + row, there, 0)
        found = log_prob_of(logits, logits_t, row * logits_stride, label, log_normaliser, there, classes, DUAL, T)
        tl.store(out + g * rows + row, output(found, DUAL), there)
        if HAS_COTANGENT and NEED_LOGITS:
            f = load(cotangent, cotangent_t, g * rows + row, there, 0, DUAL, T)
            sums += output(sub(scattered(label, f, c, BLOCK_G, DUAL), mul(p, total(f, 2))), DUAL)
    if HAS_COTANGENT and NEED_LOGITS:
        tl.store(to_logits + row * classes + c, sums, inside & (c < classes))


@triton.jit(do_not_specialize=["rows", "row_offset", "count"])
def sample(
    logits, logits_stride: tl.int64, seed, out, rows: tl.int64, row_offset: tl.int64, chunks: tl.int64, classes,
    count: tl.int64, T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Labels (count, rows), int64; `chunks` of BLOCK_G a program."""
    c = tl.arange(0, BLOCK_C)[None, None, :]
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
    inside = row < rows
    x = tl.load(logits + row * logits_stride + c, inside & (c < classes), 0).to(T)
    for chunk in range(0, chunks):
        g = (tl.program_id(1).to(tl.int64) * chunks + chunk) * BLOCK_G + tl.arange(0, BLOCK_G)[None, None, :]
        label = draw(x, c, first_words(tl.load(seed), g, row + row_offset), classes)
        tl.store(out + g * rows + row, label.to(tl.int64), inside & (g < count))
