"""The ops of categorical policies: kernels that run one row after another, and how requests reach them.

Arrays of a row are (C,) or (G,). A row with a label that is out of range is left out: it will be refused.
"""

import math

import numpy as np
import torch

from ..contract import Request
from . import rows
from .group import CLOSED_FORM, group_stats, pull, surrogate, surrogate_of, transform
from .philox import random_bits
from .rows import dot, helper, kernel, total


@helper
def _softmax(logits, row, p, log_p):
    """p, and log p where it is not masked, else 0, so that p log p vanishes there.

    Returns the entropy, and whether the row may have to be refused: one without a finite largest logit.
    """
    own = row if len(logits) > 1 else 0
    top, refused = -np.inf, False
    for c in range(len(p)):
        logit = np.float64(logits[own, c])
        refused |= not logit < np.inf
        top = max(top, logit)
        log_p[c] = logit
    for c in range(len(p)):
        p[c] = math.exp(log_p[c] - top)
    mass = total(p)
    log_mass = math.log(mass)
    for c in range(len(p)):
        p[c] /= mass
        log_p[c] = log_p[c] - top - log_mass if log_p[c] > -np.inf else 0.0
    return -dot(p, log_p), refused or top == -np.inf


@helper
def _log_prob_of(label, p, log_p):
    """-inf where masked; of a class that is not, p may vanish."""
    return log_p[label] if log_p[label] < 0.0 or p[label] > 0.0 else -np.inf


@helper
def _distribution(p, limits):
    """The distribution function; from the last class that has mass on, it is beyond all random numbers."""
    cumulative, last = 0.0, 0
    for c in range(len(p)):
        cumulative += p[c]
        limits[c] = cumulative
        if p[c] > 0.0:
            last = c
    for c in range(last, len(p)):
        limits[c] = 2.0


@helper
def _draw(seed, row, limits, labels):
    """Of each sample the first class whose distribution function is above its uniform number, by bisection."""
    for g in range(len(labels)):
        labels[g] = random_bits(g, row, seed)
    for g in range(len(labels)):
        u, label, size = labels[g] * 2.0**-53, 0, len(limits)
        while size > 1:
            half = size // 2
            label += half if limits[label + half - 1] <= u else 0
            size -= half
        labels[g] = label


@helper
def _group(s, row, weight, p, log_p, entropy, labels, reward, advantage, losses, stats, slope, to_logits):
    """The surrogate of a row's group; its gradient Σ_g f_g (e_label - p), and that of the entropy, p (log p + H)."""
    losses[row] = -surrogate(s, reward, advantage) - s.entropy_coef * entropy
    if stats.size > 0:
        group_stats(reward, advantage, stats, row)
    if to_logits.size > 0:
        sum_f = 0.0
        slope[:] = 0.0
        for g in range(s.samples):
            f = -weight[row] / s.samples * advantage[g]
            sum_f += f
            slope[labels[g]] += f
        for c in range(len(p)):
            to_logits[row, c] = slope[c] + p[c] * (s.entropy_coef * weight[row] * (log_p[c] + entropy) - sum_f)


@helper
def _closed_form(s, row, weight, p, log_p, entropy, reward, losses, stats, to_logits):
    """By enumeration of the classes, whose rewards are transformed."""
    mean, variance = dot(p, reward), 0.0
    losses[row] = -mean - s.entropy_coef * entropy
    for c in range(len(p)):
        variance += p[c] * (reward[c] - mean) ** 2
        if to_logits.size > 0:
            slope = s.entropy_coef * (log_p[c] + entropy) - (reward[c] - mean)
            to_logits[row, c] = weight[row] * p[c] * slope
    if stats.size > 0:
        stats[0, row], stats[1, row], stats[4, row] = mean, math.sqrt(variance), math.sqrt(variance)


@kernel
def _policy_kernel(chunks, logits, columns, target, s, seed, row_offset, weight, losses, stats, to_logits, to_columns):
    """The table and its gradient are transposed; the latter is summed by chunk: (chunks, C, C)."""
    classes, refused, closed = logits.shape[1], False, s.estimator == CLOSED_FORM
    p, log_p, slope = np.empty(classes), np.empty(classes), np.empty(classes)
    labels, limits = np.zeros(s.samples, np.int64), np.empty(classes)
    reward, advantage = np.empty(classes if closed else s.samples), np.empty(s.samples)
    for row in range(chunks.first, chunks.last):
        y, chunk = target[row], row // chunks.size
        entropy, wrong = _softmax(logits, row, p, log_p)
        refused |= wrong
        if not 0 <= y < classes:
            refused = True
            continue
        if closed:
            for c in range(classes):
                reward[c] = columns[y, c]
            transform(s, reward)
            _closed_form(s, row, weight, p, log_p, entropy, reward, losses, stats, to_logits)
            for c in range(classes if to_columns.size > 0 else 0):
                to_columns[chunk, y, c] += pull(s, -weight[row] * p[c], reward[c])
        else:
            _distribution(p, limits)
            _draw(seed, row_offset + np.uint64(row), limits, labels)
            for g in range(s.samples):
                reward[g] = columns[y, labels[g]]
            _group(s, row, weight, p, log_p, entropy, labels, reward, advantage, losses, stats, slope, to_logits)
            for g in range(s.samples if to_columns.size > 0 else 0):
                to_columns[chunk, y, labels[g]] += pull(s, -weight[row] / s.samples, reward[g])
        if stats.size > 0:
            stats[2, row], stats[3, row] = entropy, _log_prob_of(y, p, log_p)
    return refused


@kernel
def _surrogate_kernel(chunks, logits, rewards, samples, s, weight, losses, stats, to_logits, to_rewards):
    """rewards and samples (G, B)."""
    classes, refused = logits.shape[1], False
    p, log_p, slope = np.empty(classes), np.empty(classes), np.empty(classes)
    reward, advantage, labels = np.empty(s.samples), np.empty(s.samples), np.zeros(s.samples, np.int64)
    for row in range(chunks.first, chunks.last):
        entropy, wrong = _softmax(logits, row, p, log_p)
        refused |= wrong
        log_prob = 0.0
        for g in range(s.samples):
            reward[g], label = rewards[g, row], samples[g, row]
            if not 0 <= label < classes:
                refused, label = True, 0
            labels[g] = label
            log_prob += _log_prob_of(label, p, log_p) / s.samples
        refused |= log_prob == -np.inf
        _group(s, row, weight, p, log_p, entropy, labels, reward, advantage, losses, stats, slope, to_logits)
        for g in range(s.samples if to_rewards.size > 0 else 0):
            to_rewards[g, row] = pull(s, -weight[row] / s.samples, reward[g])
        if stats.size > 0:
            stats[2, row], stats[3, row] = entropy, log_prob
    return refused


@kernel
def _log_prob_kernel(chunks, logits, value, cotangent, out, to_logits):
    """value and cotangent (N, B)."""
    classes, refused = logits.shape[1], False
    p, log_p, for_logits = np.empty(classes), np.empty(classes), np.empty(classes)
    for row in range(chunks.first, chunks.last):
        _, wrong = _softmax(logits, row, p, log_p)
        refused |= wrong
        sum_f = 0.0
        for c in range(classes):
            for_logits[c] = 0.0
        for n in range(len(value)):
            label = value[n, row]
            if not 0 <= label < classes:
                refused = True
                continue
            out[n, row] = _log_prob_of(label, p, log_p)
            if to_logits.size > 0:
                for_logits[label] += cotangent[n, row]
                sum_f += cotangent[n, row]
        if to_logits.size > 0:
            for c in range(classes):
                to_logits[row, c] = for_logits[c] - p[c] * sum_f
    return refused


@kernel
def _sample_kernel(chunks, logits, seed, row_offset, _, out, unwanted):
    """out (G, B); labels have no gradient."""
    classes, refused = logits.shape[1], False
    p, log_p = np.empty(classes), np.empty(classes)
    limits, labels = np.empty(classes), np.zeros(len(out), np.int64)
    for row in range(chunks.first, chunks.last):
        _, wrong = _softmax(logits, row, p, log_p)
        refused |= wrong
        _distribution(p, limits)
        _draw(seed, row_offset + np.uint64(row), limits, labels)
        for g in range(len(out)):
            out[g, row] = labels[g]
    return refused


def _policy_loss(request: Request) -> rows.Served:
    logits, table = request.inputs
    losses, found = rows.Losses(request), rows.gradients(request)
    chunks = rows.chunked(len(logits), table.numel())
    to_columns = np.zeros((chunks.number if request.needs.reward_table else 0, *table.shape))
    refused = rows.run(
        request, _policy_kernel, chunks,
        rows.once(logits), table.mT, request.constants.target, surrogate_of(request.config),
        *rows.random(request), *losses.arrays, found.logits, to_columns,
    )  # fmt: skip
    if request.needs.reward_table:
        summed = to_columns.sum(axis=0).T.copy()
        found = found._replace(reward_table=torch.from_numpy(summed).to(table.dtype))
    return refused, losses.finished(found)


def _surrogate_loss(request: Request) -> rows.Served:
    logits, rewards = request.inputs
    losses, found = rows.Losses(request), rows.gradients(request)
    refused = rows.run(
        request, _surrogate_kernel, rows.chunked(len(logits)),
        rows.once(logits), rewards, request.constants.samples, surrogate_of(request.config, len(rewards)),
        *losses.arrays, *found,
    )  # fmt: skip
    return refused, losses.finished(found)


def _log_prob(request: Request) -> rows.Served:
    (logits,), (value,) = request.inputs, request.constants
    out = logits.new_empty(value.shape)
    return rows.valued(request, _log_prob_kernel, len(logits), out, rows.once(logits), value)


def _sample(request: Request) -> rows.Served:
    (logits,) = request.inputs
    out = torch.empty((request.config.num_samples, len(logits)), dtype=torch.int64)
    return rows.valued(request, _sample_kernel, len(logits), out, rows.once(logits), *rows.random(request))


KERNELS = rows.served(
    {
        "categorical_policy_loss": _policy_loss,
        "categorical_surrogate_loss": _surrogate_loss,
        "categorical_log_prob": _log_prob,
        "categorical_sample": _sample,
    }
)
