"""The ops of both Gaussian policies ŷ = μ + S ε: kernels over tiles of rows, and how requests reach them.

Arrays of a tile are (D, TILE), of samples (D, columns) as scale.py has them, and `work` is scratch of several tiles.
Gradients are arrays without elements where none is wanted.
"""

import math

import numpy as np
from torch import Tensor

from ..contract import Request
from . import precision
from . import rows as tiles
from . import scale as scales
from .group import CLOSED_FORM, REPARAM, group_stats, pull, surrogate, surrogate_of
from .philox import standard_normals
from .precision import add_outer_sum, apply
from .rows import TILE, Array, helper, kernel, load, load_difference, scratch, store, tile_of

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


@helper
def _log_density(lanes, at, z, log_det, out):
    """Of the whitened sample at this column."""
    for b in range(lanes):
        out[b] = -log_det[b] - _HALF_LOG_2PI * len(z)
    for j in range(len(z)):
        for b in range(lanes):
            out[b] -= 0.5 * z[j, at + b] * z[j, at + b]


@helper
def _add_entropy(tri, lanes, begin, s, dim, scale, log_det, weight, losses, stats, need_scale, to_scale, f):
    """The entropy's part of the losses, of the statistics and of the gradient in the scale."""
    for b in range(lanes):
        entropy = log_det[b] + (_HALF_LOG_2PI + 0.5) * dim
        losses[begin + b] -= s.entropy_coef * entropy
        f[b] = -s.entropy_coef * weight[begin + b]
        if stats.size > 0:
            stats[2, begin + b] = entropy
    if need_scale:
        if s.estimator == CLOSED_FORM or s.estimator == REPARAM:  # a score's is there already
            scales.to_parameter(tri, lanes, scale, to_scale)
        for i in range(dim):  # not f / σ · σ, which is nan of a σ that is zero
            for b in range(lanes):
                at = scales.entry(tri, dim, i, i)
                to_scale[at, b] += f[b] / scale[at, b] if tri else f[b]


@helper
def _closed_form(tri, lanes, begin, scale, delta, u, weight, needs, losses, to_mean, to_scale, to_target, to_u, work):
    """δᵀUδ + tr(U S Sᵀ)."""
    pulled, column, other, loss, weights = work[0], work[1], work[2], losses[begin:], weight[begin:]
    apply(lanes, u, delta, pulled)
    for b in range(lanes):
        loss[b] = 0.0
    for j in range(len(delta)):
        for b in range(lanes):
            loss[b] += delta[j, b] * pulled[j, b]
            to_mean[j, b] = 2.0 * weights[b] * pulled[j, b]
            to_target[j, b] = -to_mean[j, b]
    if needs[3]:
        add_outer_sum(lanes, weights, delta, to_u)
    scales.trace(tri, lanes, scale, u, weights, loss, to_scale, needs[3], to_u, column, other)


@helper
def _residual_gradients(tri, lanes, s, f, noise, residual, pulled, needs, to_mean, to_scale, to_target, to_u):
    """Through the samples' residuals x, f being the pulls on -xᵀ U x and pulled U x."""
    for c in range(lanes * s.samples):
        f[c] = -f[c]
    if needs[3]:
        add_outer_sum(lanes * s.samples, f, residual, to_u)
    to_target[:] = 0.0
    scales.add_samples(lanes, s.samples, f, pulled, to_target)
    for j in range(len(to_target)):
        for b in range(lanes):
            to_target[j, b] *= -2.0
            if s.estimator == REPARAM:
                to_mean[j, b] = -to_target[j, b]
    if s.estimator == REPARAM and needs[1]:
        for c in range(lanes * s.samples):
            f[c] *= 2.0
        scales.add_outer(tri, lanes, s.samples, len(to_mean), f, pulled, noise, to_scale)


@helper
def _score_gradients(tri, lanes, count, scale, f, z, need_scale, to_mean, to_scale, total):
    """Adds Σ f ∂log p of whitened samples z to gradients that are zero."""
    for b in range(lanes):
        total[b] = 0.0
        for g in range(count):
            total[b] += f[g * lanes + b]
    scales.add_samples(lanes, count, f, z, to_mean)
    if need_scale:
        scales.add_outer(tri, lanes, count, len(to_mean), f, z, z, to_scale)
    scales.score(tri, lanes, scale, total, to_mean, need_scale, to_scale)


@helper
def _group(lanes, begin, s, weight, reward, losses, stats, advantage, f, pulls):
    """Losses of the groups without the entropy; per column the factors of the score, and the pulls on the rewards."""
    for b in range(lanes):
        losses[begin + b] = -surrogate(s, reward[b], advantage)
        if stats.size > 0:
            group_stats(reward[b], advantage, stats, begin + b)
        for g in range(s.samples):
            unit = -weight[begin + b] / s.samples
            f[g * lanes + b] = unit * advantage[g]
            pulls[g * lanes + b] = pull(s, unit, reward[b, g])


@kernel
def _policy_kernel(
    chunks, tri, mean, scale, target, u, s, seed, row_offset, weight, losses, stats, to_mean, to_scale, to_target, to_u
):
    """The gradient in u is summed by chunk: (chunks, *u.shape)."""
    dim, entries, refused, most = mean.shape[1], scale.shape[1], False, max(s.samples, 1) * tile_of(s.samples)
    needs = to_mean.size > 0, to_scale.size > 0, to_target.size > 0, to_u.size > 0
    delta, work, spread, log_det = scratch(dim, TILE), np.empty((3, dim, TILE)), scratch(entries, TILE), np.empty(TILE)
    for_mean, for_scale, for_target, for_u = scratch(dim, TILE), scratch(entries, TILE), scratch(dim, TILE), u
    noise, residual, pulled = scratch((dim + 3) // 4 * 4, most), scratch(dim, most), scratch(dim, most)
    samples, row_of, f, pulls = np.empty(most, np.uint64), np.empty(most, np.uint64), np.empty(most), np.empty(most)
    reward, advantage = np.empty((TILE, s.samples)), np.empty(s.samples)
    for begin in range(chunks.first, chunks.last, tile_of(s.samples)):
        lanes = min(tile_of(s.samples), chunks.last - begin)
        columns = s.samples * lanes
        load_difference(mean, target, begin, lanes, delta, 0)
        refused |= scales.load_scale(tri, scale, begin, lanes, dim, spread, log_det)
        for_mean[:] = 0.0
        for_scale[:] = 0.0
        if needs[3]:
            for_u = to_u[begin // chunks.size]
        if s.estimator == CLOSED_FORM:
            _closed_form(
                tri, lanes, begin, spread, delta, u, weight, needs, losses, for_mean, for_scale, for_target, for_u, work
            )
            if stats.size > 0:
                for b in range(lanes):
                    stats[0, begin + b] = -losses[begin + b]
        else:
            for g in range(s.samples):
                for b in range(lanes):
                    samples[g * lanes + b], row_of[g * lanes + b] = g, row_offset + np.uint64(begin + b)
            standard_normals(seed, samples, row_of, columns, noise)
            scales.stretch(tri, lanes, s.samples, spread, delta, noise, residual)
            apply(columns, u, residual, pulled)
            for b in range(lanes):
                for g in range(s.samples):
                    reward[b, g] = 0.0
                    for j in range(dim):
                        reward[b, g] -= residual[j, g * lanes + b] * pulled[j, g * lanes + b]
            _group(lanes, begin, s, weight, reward, losses, stats, advantage, f, pulls)
            if s.estimator != REPARAM and (needs[0] or needs[1]):
                _score_gradients(tri, lanes, s.samples, spread, f, noise, needs[1], for_mean, for_scale, work[0, 0])
            if needs[2] or needs[3] or s.estimator == REPARAM:
                _residual_gradients(
                    tri, lanes, s, pulls, noise, residual, pulled, needs, for_mean, for_scale, for_target, for_u
                )
        _add_entropy(tri, lanes, begin, s, dim, spread, log_det, weight, losses, stats, needs[1], for_scale, f)
        if stats.size > 0:  # the density is even in y - μ
            scales.whiten(tri, lanes, 1, spread, delta)
            _log_density(lanes, 0, delta, log_det, f)
            for b in range(lanes):
                stats[3, begin + b] = f[b]
        store(for_mean, begin, lanes, to_mean)
        store(for_scale, begin, lanes, to_scale)
        store(for_target, begin, lanes, to_target)
    return refused


@kernel
def _surrogate_kernel(
    chunks, tri, mean, scale, rewards, samples, s, weight, losses, stats, to_mean, to_scale, to_rewards
):  # fmt: skip
    """rewards (G, B), samples (G, B, D)."""
    dim, entries, refused, most = mean.shape[1], scale.shape[1], False, s.samples * tile_of(s.samples)
    need_mean, need_scale = to_mean.size > 0, to_scale.size > 0
    scores = s.estimator != REPARAM and (need_mean or need_scale)
    spread, log_det, total, z = scratch(entries, TILE), np.empty(TILE), np.empty(TILE), scratch(dim, most)
    for_mean, for_scale, f, pulls = scratch(dim, TILE), scratch(entries, TILE), np.empty(most), np.empty(most)
    reward, advantage = np.empty((TILE, s.samples)), np.empty(s.samples)
    for begin in range(chunks.first, chunks.last, tile_of(s.samples)):
        lanes = min(tile_of(s.samples), chunks.last - begin)
        refused |= scales.load_scale(tri, scale, begin, lanes, dim, spread, log_det)
        for b in range(lanes):
            for g in range(s.samples):
                reward[b, g] = rewards[g, begin + b]
        _group(lanes, begin, s, weight, reward, losses, stats, advantage, f, pulls)
        if to_rewards.size > 0:
            for g in range(s.samples):
                for b in range(lanes):
                    to_rewards[g, begin + b] = pulls[g * lanes + b]
        for_mean[:] = 0.0
        for_scale[:] = 0.0
        if scores or stats.size > 0:
            for g in range(s.samples):
                load_difference(samples[g], mean, begin, lanes, z, g * lanes)
            scales.whiten(tri, lanes, s.samples, spread, z)
        if scores:
            _score_gradients(tri, lanes, s.samples, spread, f, z, need_scale, for_mean, for_scale, total)
        _add_entropy(tri, lanes, begin, s, dim, spread, log_det, weight, losses, stats, need_scale, for_scale, f)
        if stats.size > 0:
            for b in range(lanes):
                stats[3, begin + b] = 0.0
            for g in range(s.samples):
                _log_density(lanes, g * lanes, z, log_det, f)
                for b in range(lanes):
                    stats[3, begin + b] += f[b] / s.samples
        store(for_mean, begin, lanes, to_mean)
        store(for_scale, begin, lanes, to_scale)
    return refused


@kernel
def _log_prob_kernel(chunks, tri, mean, scale, value, cotangent, out, to_mean, to_scale, to_value):
    """value (N, B, D), cotangent (N, B)."""
    dim, entries, refused = mean.shape[1], scale.shape[1], False
    need_mean, need_scale, need_value = to_mean.size > 0, to_scale.size > 0, to_value.size > 0
    spread, log_det, f, total = scratch(entries, TILE), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    z, for_mean, for_scale = scratch(dim, TILE), scratch(dim, TILE), scratch(entries, TILE)
    for begin in range(chunks.first, chunks.last, TILE):
        lanes = min(TILE, chunks.last - begin)
        refused |= scales.load_scale(tri, scale, begin, lanes, dim, spread, log_det)
        for_mean[:] = 0.0
        for_scale[:] = 0.0
        for b in range(lanes):
            total[b] = 0.0
        for n in range(len(value)):
            load_difference(value[n], mean, begin, lanes, z, 0)
            scales.whiten(tri, lanes, 1, spread, z)
            _log_density(lanes, 0, z, log_det, f)
            for b in range(lanes):
                out[n, begin + b] = f[b]
                f[b] = cotangent[n, begin + b]
                total[b] += f[b]
            if need_mean:
                scales.add_samples(lanes, 1, f, z, for_mean)
            if need_scale:
                scales.add_outer(tri, lanes, 1, dim, f, z, z, for_scale)
            if need_value:
                scales.whiten_transposed(tri, lanes, spread, z)
                for j in range(dim):
                    for b in range(lanes):
                        z[j, b] *= -f[b]
                store(z, begin, lanes, to_value[n])
        scales.score(tri, lanes, spread, total, for_mean, need_scale, for_scale)
        store(for_mean, begin, lanes, to_mean)
        store(for_scale, begin, lanes, to_scale)
    return refused


@kernel
def _sample_kernel(chunks, tri, mean, scale, seed, row_offset, cotangent, out, to_mean, to_scale):
    """out and cotangent (G, B, D)."""
    dim, entries, refused = mean.shape[1], scale.shape[1], False
    need_mean, need_scale = to_mean.size > 0, to_scale.size > 0
    spread, log_det, noise = scratch(entries, TILE), np.empty(TILE), scratch((dim + 3) // 4 * 4, TILE)
    means, drawn, slope, ones = scratch(dim, TILE), scratch(dim, TILE), scratch(dim, TILE), np.ones(TILE)
    for_mean, for_scale = scratch(dim, TILE), scratch(entries, TILE)
    samples, row_of = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for begin in range(chunks.first, chunks.last, TILE):
        lanes = min(TILE, chunks.last - begin)
        load(mean, begin, lanes, means, 0)
        refused |= scales.load_scale(tri, scale, begin, lanes, dim, spread, log_det)
        for_mean[:] = 0.0
        for_scale[:] = 0.0
        for g in range(len(out)):
            for b in range(lanes):
                samples[b], row_of[b] = g, row_offset + np.uint64(begin + b)
            standard_normals(seed, samples, row_of, lanes, noise)
            scales.stretch(tri, lanes, 1, spread, means, noise, drawn)
            store(drawn, begin, lanes, out[g])
            if need_mean or need_scale:
                load(cotangent[g], begin, lanes, slope, 0)
                scales.add_samples(lanes, 1, ones, slope, for_mean)
                scales.add_outer(tri, lanes, 1, dim, ones, slope, noise, for_scale)
        scales.to_parameter(tri, lanes, spread, for_scale)
        store(for_mean, begin, lanes, to_mean)
        store(for_scale, begin, lanes, to_scale)
    return refused


def _policy(request: Request) -> tuple[bool, Tensor, Tensor]:
    mean, scale = request.inputs[:2]
    return scale.ndim == 3, tiles.once(mean), tiles.once(tiles.entries(scale))


def _reward_std(request: Request, u: Array) -> Array:
    """Of the closed form: the variance is 2 ‖SᵀUS‖² + 4 ‖SᵀU(μ - y)‖²."""
    mean, scale, target = (tiles.array(x.double()) for x in request.inputs[:3])
    times = np.matmul if u.ndim == 2 else np.multiply
    pulled = times(mean - target, u)
    if scale.ndim == 2:
        spread = np.exp(2.0 * scale)
        return np.sqrt((spread * (2.0 * times(spread, np.square(u)) + 4.0 * np.square(pulled))).sum(axis=1))
    matrix = np.tril(scale)
    products, along = times(matrix.mT, u) @ matrix, pulled[:, None, :] @ matrix
    return np.sqrt(2.0 * np.square(products).sum(axis=(1, 2)) + 4.0 * np.square(along).sum(axis=(1, 2)))


def _policy_loss(request: Request) -> tiles.Served:
    mean, *_, matrix = request.inputs
    u, losses, found = precision.read(matrix, mean.shape[1]), tiles.Losses(request), tiles.gradients(request)
    chunks = tiles.chunked(mean.shape[0], u.size)
    to_u = precision.sums(u, chunks, request.needs.precision)
    refused = tiles.run(
        request, _policy_kernel, chunks,
        *_policy(request), tiles.once(request.inputs.target), u, surrogate_of(request.config), *tiles.random(request),
        *losses.arrays, found.mean, tiles.entries(found.scale), found.target, to_u,
    )  # fmt: skip
    if request.want_stats and not request.config.num_samples:
        losses.stats[1] = losses.stats[4] = _reward_std(request, u)
    if request.needs.precision:
        found = found._replace(precision=precision.gradient(to_u, matrix))
    return refused, losses.finished(found)


def _surrogate_loss(request: Request) -> tiles.Served:
    mean, _, rewards = request.inputs
    losses, found = tiles.Losses(request), tiles.gradients(request)
    refused = tiles.run(
        request, _surrogate_kernel, tiles.chunked(mean.shape[0]),
        *_policy(request), rewards, request.constants.samples,
        surrogate_of(request.config, len(rewards)), *losses.arrays,
        found.mean, tiles.entries(found.scale), found.rewards,
    )  # fmt: skip
    return refused, losses.finished(found)


def _log_prob(request: Request) -> tiles.Served:
    mean, _, value = request.inputs
    out = value.new_empty(value.shape[:2])
    return tiles.valued(request, _log_prob_kernel, len(mean), out, *_policy(request), value)


def _sample(request: Request) -> tiles.Served:
    mean, _ = request.inputs
    out = mean.new_empty((request.config.num_samples, *mean.shape))
    return tiles.valued(request, _sample_kernel, len(mean), out, *_policy(request), *tiles.random(request))


KERNELS = tiles.served(
    {
        f"{family}_{name}": function
        for family in ("gaussian", "mvn")
        for name, function in {
            "policy_loss": _policy_loss, "surrogate_loss": _surrogate_loss, "log_prob": _log_prob, "sample": _sample,
        }.items()
    }
)  # fmt: skip
