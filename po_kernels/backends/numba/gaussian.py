"""The ops of both Gaussian policies ŷ = μ + S ε: kernels over tiles of rows, and how requests reach them.

Arrays of a tile are (D, TILE), those of a group (TILE, G), `work` is scratch of several tiles. Gradients are arrays
without elements where none is wanted.
"""

import math

import numpy as np
from torch import Tensor

from ..contract import Request
from . import precision
from .group import CLOSED_FORM, REPARAM, group_stats, pull, surrogate, surrogate_of
from .philox import standard_normals
from .precision import add_outer_sum, apply, quadratic
from .rows import (
    TILE, Losses, array, chunked, clear, cotangent, finished, gradients, helper, kernel, load, random, rows_of, run, store,
)  # fmt: skip
from .scale import (
    add_log_det, add_outer, clear_scale, load_scale, reward_variance, scale_like, score, store_scale, stretch,
    to_parameter, trace, whiten, whiten_transposed,
)  # fmt: skip

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


@helper
def _log_density(lanes, z, log_det, out):
    for b in range(lanes):
        out[b] = -log_det[b] - _HALF_LOG_2PI * len(z)
    for j in range(len(z)):
        for b in range(lanes):
            out[b] -= 0.5 * z[j, b] * z[j, b]


@helper
def _add_entropy(lanes, begin, entropy_coef, scale, log_det, weight, losses, stats, need_scale, to_scale, f):
    """The entropy's part of the losses, of the statistics and of the gradient in the scale."""
    for b in range(lanes):
        entropy = log_det[b] + (_HALF_LOG_2PI + 0.5) * len(scale)
        losses[begin + b] -= entropy_coef * entropy
        f[b] = -entropy_coef * weight[b]
        if stats.size > 0:
            stats[2, begin + b] = entropy
    if need_scale:
        add_log_det(lanes, scale, f, to_scale)


@helper
def _closed_form(lanes, scale, delta, u, weight, needs, loss, to_mean, to_scale, to_target, to_u, work):
    """δᵀUδ + tr(U S Sᵀ)."""
    pulled, column, other = work[0], work[1], work[2]
    apply(lanes, u, delta, pulled)
    for b in range(lanes):
        loss[b] = 0.0
    for j in range(len(delta)):
        for b in range(lanes):
            loss[b] += delta[j, b] * pulled[j, b]
            to_mean[j, b] = 2.0 * weight[b] * pulled[j, b]
            to_target[j, b] = -to_mean[j, b]
    if needs[3]:
        add_outer_sum(lanes, weight, delta, to_u)
    trace(lanes, scale, u, weight, loss, to_scale, needs[3], to_u, column, other)
    to_parameter(lanes, scale, to_scale)


@helper
def _closed_form_stats(lanes, begin, scale, delta, u, losses, stats, work, f):
    """Of losses that the entropy is not yet a part of."""
    pulled, column, other = work[0], work[1], work[2]
    apply(lanes, u, delta, pulled)
    reward_variance(lanes, scale, u, pulled, f, column, other)
    for b in range(lanes):
        stats[0, begin + b] = -losses[begin + b]
        stats[1, begin + b] = stats[4, begin + b] = math.sqrt(f[b])


@helper
def _rewards(lanes, scale, delta, u, seed, row, noise, reward, work, f, total):
    """Draws noise (G, blocks of D, TILE), and r of the samples."""
    residual = work[0]
    for g in range(len(noise)):
        standard_normals(seed, g, row, lanes, noise[g])
        stretch(lanes, scale, delta, noise[g], residual)
        quadratic(lanes, u, residual, total, f)
        for b in range(lanes):
            reward[b, g] = -total[b]


@helper
def _residual_gradients(
    lanes, scale, delta, u, s, weight, noise, reward, needs, to_mean, to_scale, to_target, to_u, work, f
):
    """Through the residuals of the samples: in the target and in U, and of a path in the policy."""
    residual, pulled, along, pathwise = work[0], work[1], work[2], s.estimator == REPARAM
    clear(along, lanes)
    for g in range(len(noise)):
        for b in range(lanes):
            f[b] = pull(s, weight[b] / s.count, reward[b, g])
        stretch(lanes, scale, delta, noise[g], residual)
        for j in range(len(delta)):
            for b in range(lanes):
                along[j, b] += 2.0 * f[b] * residual[j, b]
        if needs[3]:
            add_outer_sum(lanes, f, residual, to_u)
        if pathwise and needs[1]:
            apply(lanes, u, residual, pulled)
            for b in range(lanes):
                f[b] *= 2.0
            add_outer(lanes, f, pulled, noise[g], to_scale)
    apply(lanes, u, along, pulled)
    for j in range(len(delta)):
        for b in range(lanes):
            to_target[j, b] = -pulled[j, b]
            if pathwise:
                to_mean[j, b] = pulled[j, b]
    if pathwise:
        to_parameter(lanes, scale, to_scale)


@helper
def _add_score(lanes, f, z, need_scale, first, second, total):
    """Adds a sample to Σ f z, Σ f z zᵀ and Σ f."""
    for b in range(lanes):
        total[b] += f[b]
    for j in range(len(first)):
        for b in range(lanes):
            first[j, b] += f[b] * z[j, b]
    if need_scale:
        add_outer(lanes, f, z, z, second)


@helper
def _score_gradients(lanes, scale, s, weight, z, advantage, need_scale, to_mean, to_scale, f, total):
    """Of whitened samples z (G, D, TILE)."""
    for b in range(lanes):
        total[b] = 0.0
    for g in range(len(z)):
        for b in range(lanes):
            f[b] = -weight[b] * advantage[b, g] / s.count
        _add_score(lanes, f, z[g], need_scale, to_mean, to_scale, total)
    score(lanes, scale, total, to_mean, need_scale, to_scale)


@helper
def _subtract(lanes, begin, x, y, out, other):
    """out = x - y."""
    load(x, begin, lanes, out)
    load(y, begin, lanes, other)
    for j in range(len(out)):
        for b in range(lanes):
            out[j, b] -= other[j, b]


@kernel
def _policy_kernel(
    chunks, mean, scale, target, u, s, seed, row_offset, weight, losses, stats, to_mean, to_scale, to_target, to_u
):
    """The gradient in u is summed by chunk: (chunks, *u.shape)."""
    dim, refused = mean.shape[1], False
    needs = to_mean.size > 0, to_scale.size > 0, to_target.size > 0, to_u.size > 0
    delta, work = np.full((dim, TILE), np.nan), np.full((3, dim, TILE), np.nan)
    spread, log_det, f, total = scale_like(scale), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    for_mean, for_target, for_scale, for_u = np.empty((dim, TILE)), np.empty((dim, TILE)), scale_like(scale), u
    noise = np.full((s.count, (dim + 3) // 4 * 4, TILE), np.nan)
    reward, advantage = np.full((TILE, s.count), np.nan), np.full((TILE, s.count), np.nan)
    for begin in range(chunks.first, chunks.last, TILE):
        lanes, weights, loss = min(TILE, chunks.last - begin), weight[begin:], losses[begin:]
        _subtract(lanes, begin, mean, target, delta, work[0])
        refused |= load_scale(scale, begin, lanes, spread, log_det)
        clear(for_mean, lanes)
        clear_scale(for_scale, lanes)
        if needs[3]:
            for_u = to_u[begin // chunks.size]
        if s.estimator == CLOSED_FORM:
            _closed_form(
                lanes, spread, delta, u, weights, needs, loss, for_mean, for_scale, for_target, for_u, work
            )  # fmt: skip
            if stats.size > 0:
                _closed_form_stats(lanes, begin, spread, delta, u, losses, stats, work, f)
        else:
            _rewards(lanes, spread, delta, u, seed, row_offset + np.uint64(begin), noise, reward, work, f, total)
            for b in range(lanes):
                loss[b] = -surrogate(s, reward[b], advantage[b])
                if stats.size > 0:
                    group_stats(reward[b], advantage[b], stats, begin + b)
            if needs[2] or needs[3] or s.estimator == REPARAM:
                _residual_gradients(
                    lanes, spread, delta, u, s, weights, noise, reward, needs,
                    for_mean, for_scale, for_target, for_u, work, f,
                )  # fmt: skip
            if s.estimator != REPARAM and (needs[0] or needs[1]):
                _score_gradients(
                    lanes, spread, s, weights, noise, advantage, needs[1], for_mean, for_scale, f, total
                )  # fmt: skip
        _add_entropy(
            lanes, begin, s.entropy_coef, spread, log_det, weights, losses, stats, needs[1], for_scale, f
        )  # fmt: skip
        if stats.size > 0:  # the density is even in y - μ
            whiten(lanes, spread, delta)
            _log_density(lanes, delta, log_det, stats[3, begin:])
        if needs[0]:
            store(for_mean, begin, lanes, to_mean)
        if needs[1]:
            store_scale(for_scale, begin, lanes, to_scale)
        if needs[2]:
            store(for_target, begin, lanes, to_target)
    return refused


@kernel
def _surrogate_kernel(
    chunks, mean, scale, rewards, samples, s, weight, losses, stats, to_mean, to_scale, to_rewards
):  # fmt: skip
    """rewards (G, B), samples (G, B, D)."""
    dim, refused = mean.shape[1], False
    need_mean, need_scale, need_rewards = to_mean.size > 0, to_scale.size > 0, to_rewards.size > 0
    scores = s.estimator != REPARAM and (need_mean or need_scale)
    means, z = np.full((dim, TILE), np.nan), np.full((s.count, dim, TILE), np.nan)
    spread, log_det, f, total = scale_like(scale), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    for_mean, for_scale = np.empty((dim, TILE)), scale_like(scale)
    reward, advantage = np.full((TILE, s.count), np.nan), np.full((TILE, s.count), np.nan)
    for begin in range(chunks.first, chunks.last, TILE):
        lanes, weights = min(TILE, chunks.last - begin), weight[begin:]
        refused |= load_scale(scale, begin, lanes, spread, log_det)
        for b in range(lanes):
            for g in range(s.count):
                reward[b, g] = rewards[g, begin + b]
            losses[begin + b] = -surrogate(s, reward[b], advantage[b])
            if stats.size > 0:
                group_stats(reward[b], advantage[b], stats, begin + b)
                stats[3, begin + b] = 0.0
            if need_rewards:
                for g in range(s.count):
                    to_rewards[g, begin + b] = pull(s, -weights[b] / s.count, reward[b, g])
        if scores or stats.size > 0:
            for g in range(s.count):
                _subtract(lanes, begin, samples[g], mean, z[g], means)
                whiten(lanes, spread, z[g])
                if stats.size > 0:
                    _log_density(lanes, z[g], log_det, f)
                    for b in range(lanes):
                        stats[3, begin + b] += f[b] / s.count
        clear(for_mean, lanes)
        clear_scale(for_scale, lanes)
        if scores:
            _score_gradients(lanes, spread, s, weights, z, advantage, need_scale, for_mean, for_scale, f, total)
        _add_entropy(
            lanes, begin, s.entropy_coef, spread, log_det, weights, losses, stats, need_scale, for_scale, f
        )  # fmt: skip
        if need_mean:
            store(for_mean, begin, lanes, to_mean)
        if need_scale:
            store_scale(for_scale, begin, lanes, to_scale)
    return refused


@kernel
def _log_prob_kernel(chunks, mean, scale, value, cotangent, out, to_mean, to_scale, to_value):
    """value (N, B, D), cotangent (N, B)."""
    dim, refused = mean.shape[1], False
    need_mean, need_scale, need_value = to_mean.size > 0, to_scale.size > 0, to_value.size > 0
    means, z, f, total = np.full((dim, TILE), np.nan), np.full((dim, TILE), np.nan), np.empty(TILE), np.empty(TILE)
    spread, log_det, for_mean, for_scale = scale_like(scale), np.empty(TILE), np.empty((dim, TILE)), scale_like(scale)
    for begin in range(chunks.first, chunks.last, TILE):
        lanes = min(TILE, chunks.last - begin)
        refused |= load_scale(scale, begin, lanes, spread, log_det)
        clear(for_mean, lanes)
        clear_scale(for_scale, lanes)
        for b in range(lanes):
            total[b] = 0.0
        for n in range(len(value)):
            _subtract(lanes, begin, value[n], mean, z, means)
            whiten(lanes, spread, z)
            _log_density(lanes, z, log_det, f)
            for b in range(lanes):
                out[n, begin + b] = f[b]
            if need_mean or need_scale or need_value:
                for b in range(lanes):
                    f[b] = cotangent[n, begin + b]
            if need_mean or need_scale:
                _add_score(lanes, f, z, need_scale, for_mean, for_scale, total)
            if need_value:
                whiten_transposed(lanes, spread, z)
                for j in range(dim):
                    for b in range(lanes):
                        z[j, b] *= -f[b]
                store(z, begin, lanes, to_value[n])
        score(lanes, spread, total, for_mean, need_scale, for_scale)
        if need_mean:
            store(for_mean, begin, lanes, to_mean)
        if need_scale:
            store_scale(for_scale, begin, lanes, to_scale)
    return refused


@kernel
def _sample_kernel(chunks, mean, scale, seed, row_offset, cotangent, out, to_mean, to_scale):
    """out and cotangent (G, B, D)."""
    dim, refused, need_mean, need_scale = mean.shape[1], False, to_mean.size > 0, to_scale.size > 0
    means, samples, slope = np.full((dim, TILE), np.nan), np.full((dim, TILE), np.nan), np.full((dim, TILE), np.nan)
    noise, log_det, ones = np.full(((dim + 3) // 4 * 4, TILE), np.nan), np.empty(TILE), np.ones(TILE)
    spread, for_mean, for_scale = scale_like(scale), np.empty((dim, TILE)), scale_like(scale)
    for begin in range(chunks.first, chunks.last, TILE):
        lanes = min(TILE, chunks.last - begin)
        load(mean, begin, lanes, means)
        refused |= load_scale(scale, begin, lanes, spread, log_det)
        clear(for_mean, lanes)
        clear_scale(for_scale, lanes)
        for g in range(len(out)):
            standard_normals(seed, g, row_offset + np.uint64(begin), lanes, noise)
            stretch(lanes, spread, means, noise, samples)
            store(samples, begin, lanes, out[g])
            if need_mean or need_scale:
                load(cotangent[g], begin, lanes, slope)
                for j in range(dim):
                    for b in range(lanes):
                        for_mean[j, b] += slope[j, b]
                if need_scale:
                    add_outer(lanes, ones, slope, noise, for_scale)
        to_parameter(lanes, spread, for_scale)
        if need_mean:
            store(for_mean, begin, lanes, to_mean)
        if need_scale:
            store_scale(for_scale, begin, lanes, to_scale)
    return refused


def _operations(request: Request) -> int:
    """Of a sample, roughly."""
    scale = request.inputs.scale
    return scale.shape[1] * (8 + scale.shape[1] * scale.ndim)


def _policy_loss(request: Request) -> tuple[bool, list[Tensor]]:
    mean, scale, target, matrix = request.inputs
    u, losses, found = precision.read(matrix, mean.shape[1]), Losses(request), gradients(request)
    chunks = chunked(mean.shape[0], u.size)
    to_u = precision.sums(u, chunks, request.needs.precision)
    refused = run(
        _policy_kernel, chunks, (request.config.num_samples + 1) * _operations(request),
        rows_of(mean), rows_of(scale), rows_of(target), u, surrogate_of(request.config), *random(request),
        losses.weight, losses.rows, losses.stats, *map(array, found[:3]), to_u,
    )  # fmt: skip
    if request.needs.precision:
        found = found._replace(precision=precision.gradient(to_u, matrix))
    return refused, losses.finished(found)


def _surrogate_loss(request: Request) -> tuple[bool, list[Tensor]]:
    mean, scale, rewards = request.inputs
    losses, found = Losses(request), gradients(request)
    refused = run(
        _surrogate_kernel, chunked(mean.shape[0]), (len(rewards) + 1) * _operations(request),
        rows_of(mean), rows_of(scale), array(rewards), array(request.constants.samples),
        surrogate_of(request.config, len(rewards)), losses.weight, losses.rows, losses.stats, *map(array, found),
    )  # fmt: skip
    return refused, losses.finished(found)


def _log_prob(request: Request) -> tuple[bool, list[Tensor]]:
    mean, scale, value = request.inputs
    out, found = value.new_empty(value.shape[:2]), gradients(request)
    refused = run(
        _log_prob_kernel, chunked(mean.shape[0]), (len(value) + 1) * _operations(request),
        rows_of(mean), rows_of(scale), array(value), cotangent(request, out), array(out), *map(array, found),
    )  # fmt: skip
    return refused, finished(request, out, out.new_empty(0), found)


def _sample(request: Request) -> tuple[bool, list[Tensor]]:
    mean, scale = request.inputs
    out, found = mean.new_empty((request.config.num_samples, *mean.shape)), gradients(request)
    refused = run(
        _sample_kernel, chunked(mean.shape[0]), (len(out) + 1) * _operations(request),
        rows_of(mean), rows_of(scale), *random(request), cotangent(request, out), array(out), *map(array, found),
    )  # fmt: skip
    return refused, finished(request, out, out.new_empty(0), found)


SERVED = {
    f"{family}_{name}": function
    for family in ("gaussian", "mvn")
    for name, function in (
        ("policy_loss", _policy_loss),
        ("surrogate_loss", _surrogate_loss),
        ("log_prob", _log_prob),
        ("sample", _sample),
    )
}
