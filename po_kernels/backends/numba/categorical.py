"""Rows of categorical policies, as in csrc/include/po_kernels/categorical.hpp.

Kernels are as in gaussian_family.py; labels have been checked to be in range.
"""

import numpy as np

from .group import CLOSED_FORM, clear, finish, group_stats, score_factor, transformed
from .lanes import (
    all_lanes,
    any_lane,
    ceiling,
    count_up,
    doubles_in,
    full,
    gather,
    helper,
    is_dual,
    kernel,
    lanes_in,
    load,
    load_chosen,
    load_labels,
    load_weight,
    number_at,
    output,
    primals_in,
    put,
    scatter_add,
    select,
    stop,
    store,
    tangent_of,
    to_double,
    to_unsigned,
    wide,
    width_of,
    with_tangent,
    words_in,
)
from .maths import exp, log, square_root
from .philox import philox4x32

_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


@helper
def softmax(classes, logits, p, log_p):
    """p and log p, the latter 0 where masked, so that p log p vanishes there; returns the entropy."""
    top = stop(logits[0])
    for c in range(1, classes):
        logit = stop(logits[c])
        top = select(logit > top, logit, top)
    total = full(p, 0.0)
    for c in range(classes):
        e = exp(logits[c] - top)
        p[c] = e
        total = total + e
    inverse, log_total = 1.0 / total, log(total)
    entropy = full(p, 0.0)
    for c in range(classes):
        share = p[c] * inverse
        logit = logits[c]
        log_share = select(stop(logit) > -np.inf, logit - top - log_total, full(p, 0.0))
        p[c] = share
        log_p[c] = log_share
        entropy = entropy - share * log_share
    return entropy


@helper
def suspicious(classes, logits):
    """Whether a row may have to be refused: one without a finite largest logit."""
    top = stop(logits[0])
    right = top < np.inf
    for c in range(1, classes):
        logit = stop(logits[c])
        right = right & (logit < np.inf)
        top = select(logit > top, logit, top)
    return not all_lanes(right & (top > -np.inf))


@helper
def thresholds(classes, logits, weight, out):
    """Inversion thresholds in 24-bit integers, computed in float64 whatever the lanes; `weight` is scratch."""
    top = to_double(stop(logits[0]))
    for c in range(1, classes):
        logit = to_double(stop(logits[c]))
        top = select(logit > top, logit, top)
    total = full(weight, 0.0)
    for c in range(classes):
        w = exp(to_double(stop(logits[c])) - top)
        weight[c] = w
        total = total + w
    inverse = 16777216.0 / total
    cumulative = full(weight, 0.0)
    for c in range(classes):
        cumulative = cumulative + weight[c]
        out[c] = to_unsigned(ceiling(cumulative * inverse - 0.5))
    # No word may pass the last class that has mass.
    after = full(out, 0)
    for c in range(classes - 1, -1, -1):
        out[c] = select(after != 0, out[c], full(out, 1 << 24))
        after = select(weight[c] > 0.0, full(out, 1), after)


@helper
def draw(seed, sample, row, classes, limits):
    words, _, _, _ = philox4x32(wide(limits, 0), wide(limits, sample), row & _MASK, row >> _32, seed)
    bits = words >> 8
    label = full(limits, 0)
    for c in range(classes):
        label = label + select(bits >= limits[c], full(limits, 1), full(limits, 0))
    return label


@helper
def label_log_prob(logits, log_p, label):
    """-inf where masked."""
    logit = stop(gather(logits, label))
    return select(logit > -np.inf, gather(log_p, label), full(logits, logit))


@helper
def closed_form(classes, logits, column, s, weight, need_logits, to_logits, need_column, to_column, work):
    """L = -Σ_c p_c r_c - λ H by enumeration. Scratch: 2 classes."""
    p, log_p = work, work + classes
    entropy = softmax(classes, logits, p, log_p)
    mean = full(p, 0.0)
    for c in range(classes):
        column[c] = transformed(s, column[c])
        mean = mean + p[c] * column[c]
    for c in range(classes):
        share, reward = p[c], column[c]
        if need_logits:
            slope = share * (reward - mean) - share * (log_p[c] + entropy) * s.entropy_coef
            to_logits[c] = output(-(weight * slope))
        if need_column:
            pulled = share * reward * s.gamma if s.has_rbf else share
            to_column[c] = output(-(weight * pulled))
    return -mean - entropy * s.entropy_coef


@helper
def group_loss(classes, logits, labels, s, weight, need_logits, to_logits, group, work):
    """The score-function surrogate of labels whose transformed rewards are in the group. Scratch: 3 classes."""
    count, p, log_p, score = s.samples, work, work + classes, work + 2 * classes
    entropy = softmax(classes, logits, p, log_p)
    if is_dual(logits):
        mean = stop(full(p, 0.0))
        for c in range(classes):
            mean = mean + stop(p[c]) * tangent_of(logits[c])
        for g in range(count):
            change = tangent_of(gather(logits, labels[g])) - mean
            group[count + g] = with_tangent(p, stop(full(p, 0.0)), change)
    objective = finish(s, group)
    if need_logits:
        clear(classes, score)
        total = full(p, 0.0)
        for g in range(count):
            factor = score_factor(s, group, g) * (1.0 / count)
            total = total + factor
            scatter_add(score, labels[g], factor)
        for c in range(classes):
            slope = score[c] - p[c] * total - p[c] * (log_p[c] + entropy) * s.entropy_coef
            to_logits[c] = output(-(weight * slope))
    return -objective - entropy * s.entropy_coef


@kernel
def policy_loss(
    chunks, rows, classes, logits, columns, target, s, seed, row_offset, weight, work,
    losses, stats, to_logits, to_columns,
):  # fmt: skip
    """The table and its gradient are passed transposed; the latter is summed by chunk: (chunks, C, C)."""
    first, last, size = chunks
    refused, want_stats = False, False
    if stats is not None:  # not on duals, for which this is not compiled
        want_stats = stats.size > 0
    count = s.samples
    need_logits, need_table = to_logits.size > 0, to_columns.size > 0
    row_logits = lanes_in(work)
    width = width_of(row_logits)
    column = row_logits + classes
    items = column + classes
    group = items + 3 * classes
    weights = group + 4 * count
    grad_logits = primals_in(weights + 1)
    grad_column = grad_logits + classes
    weight_of_class = doubles_in(grad_column + classes)
    labels = words_in(weight_of_class + classes)
    limits = labels + count
    for chunk in range(first, last):
        shared = chunk * classes * classes
        if need_table:
            for i in range(classes * classes):
                to_columns[shared + i] = 0.0
        end = min(rows, (chunk + 1) * size)
        for begin in range(chunk * size, end, width):
            lanes = min(width, end - begin)
            load(row_logits, logits, classes, begin, lanes)
            refused |= suspicious(classes, row_logits)
            load_weight(weights, weight, begin, lanes)
            y = load_labels(row_logits, target, begin, lanes - 1)
            load_chosen(column, columns, classes, y)
            if s.estimator == CLOSED_FORM:
                loss = closed_form(
                    classes, row_logits, column, s, weights[0], need_logits, grad_logits, need_table, grad_column, items
                )
            else:
                thresholds(classes, row_logits, weight_of_class, limits)
                row = count_up(row_logits) + (row_offset + np.uint64(begin))
                for g in range(count):
                    labels[g] = draw(seed, g, row, classes, limits)
                    group[g] = transformed(s, gather(column, labels[g]))
                loss = group_loss(classes, row_logits, labels, s, weights[0], need_logits, grad_logits, group, items)
                if need_table:
                    clear(classes, grad_column)
                    unit = weights[0] * (-1.0 / count)
                    for g in range(count):
                        scatter_add(grad_column, labels[g], output(unit * group[3 * count + g]))
            put(output(loss), losses, begin, lanes)
            if need_logits:
                store(grad_logits, classes, to_logits, begin * classes, lanes)
            if need_table:
                for lane in range(lanes):
                    at = shared + target[begin + lane] * classes
                    for c in range(classes):
                        to_columns[at + c] += number_at(grad_column, c, lane)
            if stats is not None and want_stats:
                p, log_p = items, items + classes
                entropy = softmax(classes, row_logits, p, log_p)
                if s.estimator == CLOSED_FORM:
                    mean, variance = full(p, 0.0), full(p, 0.0)
                    for c in range(classes):
                        mean = mean + p[c] * column[c]
                    for c in range(classes):
                        deviation = column[c] - mean
                        variance = variance + p[c] * deviation * deviation
                    std = square_root(variance)
                    put(mean, stats, begin, lanes)
                    put(std, stats, rows + begin, lanes)
                    put(std, stats, 4 * rows + begin, lanes)
                else:
                    group_stats(s, group, stats, rows, begin, lanes)
                put(entropy, stats, 2 * rows + begin, lanes)
                put(label_log_prob(row_logits, log_p, y), stats, 3 * rows + begin, lanes)
    return refused


@kernel
def surrogate_loss(
    chunks, rows, classes, logits, rewards, given, s, weight, work, losses, stats, to_logits, to_rewards,
):  # fmt: skip
    """rewards and given (G, B)."""
    first, last, size = chunks
    refused, want_stats = False, False
    if stats is not None:  # not on duals, for which this is not compiled
        want_stats = stats.size > 0
    count = s.samples
    need_logits, need_rewards = to_logits.size > 0, to_rewards.size > 0
    row_logits = lanes_in(work)
    width = width_of(row_logits)
    items = row_logits + classes
    group = items + 3 * classes
    weights = group + 4 * count
    grad_logits = primals_in(weights + 1)
    labels = words_in(grad_logits + classes)
    for chunk in range(first, last):
        end = min(rows, (chunk + 1) * size)
        for begin in range(chunk * size, end, width):
            lanes = min(width, end - begin)
            load(row_logits, logits, classes, begin, lanes)
            refused |= suspicious(classes, row_logits)
            load_weight(weights, weight, begin, lanes)
            for g in range(count):
                labels[g] = load_labels(row_logits, given, g * rows + begin, lanes - 1)
                refused |= any_lane(stop(gather(row_logits, labels[g])) == -np.inf)
                load(group + g, rewards, 1, g * rows + begin, lanes)
                group[g] = transformed(s, group[g])
            loss = group_loss(classes, row_logits, labels, s, weights[0], need_logits, grad_logits, group, items)
            put(output(loss), losses, begin, lanes)
            if need_logits:
                store(grad_logits, classes, to_logits, begin * classes, lanes)
            if need_rewards:
                unit = weights[0] * (-1.0 / count)
                for g in range(count):
                    put(output(unit * group[3 * count + g]), to_rewards, g * rows + begin, lanes)
            if stats is not None and want_stats:
                p, log_p = items, items + classes
                entropy = softmax(classes, row_logits, p, log_p)
                group_stats(s, group, stats, rows, begin, lanes)
                total = full(p, 0.0)
                for g in range(count):
                    total = total + label_log_prob(row_logits, log_p, labels[g])
                put(entropy, stats, 2 * rows + begin, lanes)
                put(total * (1.0 / count), stats, 3 * rows + begin, lanes)
    return refused


@kernel
def log_prob(chunks, rows, many, classes, logits, value, cotangent, work, out, to_logits):
    """value and cotangent (N, B), N = many."""
    first, last, size = chunks
    row_logits = lanes_in(work)
    width = width_of(row_logits)
    p, log_p, score = row_logits + classes, row_logits + 2 * classes, row_logits + 3 * classes
    weights = row_logits + 4 * classes
    grad_logits = primals_in(weights + 1)
    refused = False
    for chunk in range(first, last):
        end = min(rows, (chunk + 1) * size)
        for begin in range(chunk * size, end, width):
            lanes = min(width, end - begin)
            load(row_logits, logits, classes, begin, lanes)
            refused |= suspicious(classes, row_logits)
            softmax(classes, row_logits, p, log_p)
            clear(classes, score)
            total = full(p, 0.0)
            for i in range(many):
                at = i * rows + begin
                label = load_labels(row_logits, value, at, lanes - 1)
                put(output(label_log_prob(row_logits, log_p, label)), out, at, lanes)
                if to_logits.size > 0:
                    load(weights, cotangent, 1, at, lanes)
                    scatter_add(score, label, weights[0])
                    total = total + weights[0]
            if to_logits.size > 0:
                for c in range(classes):
                    grad_logits[c] = output(score[c] - p[c] * total)
                store(grad_logits, classes, to_logits, begin * classes, lanes)
    return refused


@kernel
def sample(chunks, rows, count, classes, logits, seed, row_offset, work, out):
    """out (G, B), G = count."""
    first, last, size = chunks
    row_logits = lanes_in(work)
    width = width_of(row_logits)
    weight = doubles_in(row_logits + classes)
    limits = words_in(weight + classes)
    refused = False
    for chunk in range(first, last):
        end = min(rows, (chunk + 1) * size)
        for begin in range(chunk * size, end, width):
            lanes = min(width, end - begin)
            load(row_logits, logits, classes, begin, lanes)
            refused |= suspicious(classes, row_logits)
            thresholds(classes, row_logits, weight, limits)
            row = count_up(row_logits) + (row_offset + np.uint64(begin))
            for g in range(count):
                put(draw(seed, g, row, classes, limits), out, g * rows + begin, lanes)
    return refused
