"""Rows of categorical policies, compiled by Numba."""

import numpy as np

from .lanes import CLOSED_FORM, compiled, finish_group, group_stats, output, philox4x32, transformed

_MASK = np.uint64(0xFFFFFFFF)
_8, _32 = np.uint64(8), np.uint64(32)


@compiled
def softmax(logits, p, log_p):
    """p and log p, the latter 0 where masked; returns the entropy."""
    classes = logits.shape[0]
    top = logits[0].real
    for c in range(1, classes):
        top = max(top, logits[c].real)
    total = 0.0 * p[0]
    for c in range(classes):
        if logits[c].real == -np.inf:
            p[c] = 0.0
        else:
            p[c] = np.exp(logits[c] - top)
        total = p[c] if c == 0 else total + p[c]
    log_total = np.log(total)
    entropy = total - total
    for c in range(classes):
        p[c] = p[c] / total
        if logits[c].real == -np.inf:
            log_p[c] = 0.0
        else:
            log_p[c] = logits[c] - top - log_total
        entropy -= p[c] * log_p[c]
    return entropy


@compiled
def thresholds(logits, out):
    """Inversion thresholds in 24-bit integers; no word may pass the last class that has mass."""
    classes = logits.shape[0]
    top = -np.inf
    for c in range(classes):
        top = max(top, logits[c].real)
    total = 0.0
    for c in range(classes):
        total += np.exp(np.float64(logits[c].real) - top)
    cumulative = 0.0
    last = 0
    for c in range(classes):
        weight = np.exp(np.float64(logits[c].real) - top)
        if weight > 0.0:
            last = c
        cumulative += weight
        out[c] = np.ceil(cumulative * (2.0**24 / total) - 0.5)
    for c in range(last, classes):
        out[c] = 2.0**24


@compiled
def draw(seed, sample, row, limits):
    word = philox4x32(np.uint64(0), np.uint64(sample), row & _MASK, row >> _32, seed)[0] >> _8
    label = 0
    while float(word) >= limits[label]:
        label += 1
    return label


@compiled
def label_log_prob(logits, log_p, label):
    return log_p[label] if logits[label].real != -np.inf else log_p[label] - np.inf


@compiled
def group_loss(
    logits, labels, estimator, kind_advantage, has_rbf, gamma, entropy_coef, weight, dual,
    p, log_p, score, reward, excess, advantage, pull, to_logits,
):  # fmt: skip
    """The score-function surrogate of labels whose transformed rewards are in `reward`; returns (loss, entropy)."""
    classes, count = logits.shape[0], labels.shape[0]
    entropy = softmax(logits, p, log_p)
    for g in range(count):
        excess[g] = log_p[labels[g]] - log_p[labels[g]].real
    objective = finish_group(estimator, kind_advantage, has_rbf, gamma, dual, reward, excess, advantage, pull)
    if to_logits.shape[0]:
        total = objective - objective
        for c in range(classes):
            score[c] = 0.0
        for g in range(count):
            factor = (1.0 + excess[g]) * advantage[g] / count
            total += factor
            score[labels[g]] += factor
        for c in range(classes):
            slope = score[c] - p[c] * total - entropy_coef * p[c] * (log_p[c] + entropy)
            to_logits[c] = output(-weight * slope, dual)
    return -objective - entropy_coef * entropy, entropy


@compiled
def policy_loss(
    begin, end, count, logits, table, target, estimator, kind_advantage, has_rbf, gamma, entropy_coef,
    seed, row_offset, weight, dual, want_stats, work, labels, limits, losses, stats, to_logits, to_table,
):  # fmt: skip
    """Rows [begin, end); `work` holds 4 count + 3 C numbers, `labels` count, `limits` C."""
    classes = logits.shape[1]
    reward, excess = work[:count], work[count : 2 * count]
    advantage, pull = work[2 * count : 3 * count], work[3 * count : 4 * count]
    rest = work[4 * count :]
    p, log_p, score = rest[:classes], rest[classes : 2 * classes], rest[2 * classes : 3 * classes]
    for b in range(begin, end):
        row, y, w = logits[b], target[b], weight[b]
        row_logits = to_logits[b]
        if estimator == CLOSED_FORM:
            entropy = softmax(row, p, log_p)
            mean = entropy - entropy
            for c in range(classes):
                mean += p[c] * transformed(table[c, y], has_rbf, gamma)
            variance = 0.0
            for c in range(classes):
                r = transformed(table[c, y], has_rbf, gamma)
                variance += (p[c] * (r - mean) * (r - mean)).real
                if row_logits.shape[0]:
                    slope = p[c] * (r - mean) - entropy_coef * p[c] * (log_p[c] + entropy)
                    row_logits[c] = output(-w * slope, dual)
                if to_table.shape[0]:
                    to_table[c, y] += output(-w * p[c] * (r * gamma if has_rbf else 1.0 + 0.0 * r), dual)
            losses[b] = output(-mean - entropy_coef * entropy, dual)
            if want_stats:
                stats[0, b] = mean.real
                stats[1, b] = stats[4, b] = np.sqrt(variance)
        else:
            thresholds(row, limits)
            for g in range(count):
                labels[g] = draw(seed, g, row_offset + np.uint64(b), limits)
                reward[g] = transformed(table[labels[g], y], has_rbf, gamma)
            loss, entropy = group_loss(
                row, labels, estimator, kind_advantage, has_rbf, gamma, entropy_coef, w, dual,
                p, log_p, score, reward, excess, advantage, pull, row_logits,
            )  # fmt: skip
            losses[b] = output(loss, dual)
            if to_table.shape[0]:
                for g in range(count):
                    to_table[labels[g], y] += output(-w / count * pull[g], dual)
            if want_stats:
                group_stats(reward, advantage, stats[:, b])
        if want_stats:
            stats[2, b] = entropy.real
            stats[3, b] = label_log_prob(row, log_p, y).real


@compiled
def surrogate_loss(
    begin, end, logits, rewards, given, estimator, kind_advantage, has_rbf, gamma, entropy_coef,
    weight, dual, want_stats, work, labels, losses, stats, to_logits, to_rewards,
):  # fmt: skip
    """Rows [begin, end); `work` holds 4 count + 3 C numbers. rewards and given (count, B)."""
    classes, count = logits.shape[1], given.shape[0]
    reward, excess = work[:count], work[count : 2 * count]
    advantage, pull = work[2 * count : 3 * count], work[3 * count : 4 * count]
    rest = work[4 * count :]
    p, log_p, score = rest[:classes], rest[classes : 2 * classes], rest[2 * classes : 3 * classes]
    for b in range(begin, end):
        row, w = logits[b], weight[b]
        for g in range(count):
            labels[g] = given[g, b]
            reward[g] = transformed(rewards[g, b], has_rbf, gamma)
        loss, entropy = group_loss(
            row, labels, estimator, kind_advantage, has_rbf, gamma, entropy_coef, w, dual,
            p, log_p, score, reward, excess, advantage, pull, to_logits[b],
        )  # fmt: skip
        losses[b] = output(loss, dual)
        if to_rewards.shape[0]:
            for g in range(count):
                to_rewards[g, b] = output(-w / count * pull[g], dual)
        if want_stats:
            group_stats(reward, advantage, stats[:, b])
            stats[2, b] = entropy.real
            total = 0.0
            for g in range(count):
                total += label_log_prob(row, log_p, labels[g]).real
            stats[3, b] = total / count


@compiled
def log_prob(begin, end, logits, value, cotangent, dual, work, out, to_logits):
    """Rows [begin, end); `work` holds 3 C numbers. value and cotangent (N, B)."""
    classes = logits.shape[1]
    p, log_p, score = work[:classes], work[classes : 2 * classes], work[2 * classes : 3 * classes]
    for b in range(begin, end):
        row, row_logits = logits[b], to_logits[b]
        softmax(row, p, log_p)
        for c in range(classes):
            score[c] = 0.0
        total = p[0] - p[0]
        for i in range(value.shape[0]):
            out[i, b] = output(label_log_prob(row, log_p, value[i, b]), dual)
            score[value[i, b]] += cotangent[i, b]
            total += cotangent[i, b]
        if row_logits.shape[0]:
            for c in range(classes):
                row_logits[c] = output(score[c] - p[c] * total, dual)


@compiled
def sample(begin, end, logits, seed, row_offset, limits, out):
    """Rows [begin, end); out (G, B)."""
    for b in range(begin, end):
        thresholds(logits[b], limits)
        for g in range(out.shape[0]):
            out[g, b] = draw(seed, g, row_offset + np.uint64(b), limits)
