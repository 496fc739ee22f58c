"""How tensors and options reach the compiled rows: chunks of rows on threads, sums in a fixed order.

A loss or value is computed in float64 from inputs of either precision. Derivatives of the second order pass
the inputs as complex numbers, see `lanes`.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import checks
from ..contract import OpConfig
from . import advantage, categorical, gaussian
from .lanes import H

Array = NDArray[Any]

_ESTIMATORS = {"analytic": 0, "exact": 0, "reparam": 1, "dice": 2, "reinforce": 3}
_ADVANTAGES = {"none": 0, "min": 1, "mean": 2, "loo": 3, "standardized": 4}
_NO_ROWS = 64  # most chunks, so that sums over chunks have one order whatever the number of threads


class _Run:
    """The arrays of one call: inputs with their tangents, outputs, and the loop over chunks of rows."""

    def __init__(self, op: str, inputs: Sequence[Tensor], tangents: Sequence[Tensor | None] | None) -> None:
        self.op = op
        self.dual = tangents is not None
        self.dtype = np.complex128 if self.dual else np.float64
        self.inputs = [self.array(x, t) for x, t in zip(inputs, tangents or (None,) * len(inputs), strict=True)]

    def array(self, value: Tensor, tangent: Tensor | None = None) -> Array:
        """A tensor as an array, on a dual call complex with the tangent in its imaginary part."""
        array = value.detach().numpy()
        if not self.dual:
            return array
        result = array.astype(np.complex128)
        if tangent is not None:
            result.imag = tangent.detach().numpy().astype(np.float64) * H
        return result

    def like(self, shape: Sequence[int], value: Tensor | None, tangent: Tensor | None, default: float) -> Array:
        """The cotangent broadcast to `shape`."""
        if value is None:
            return np.full(shape, default, dtype=self.dtype)
        return np.ascontiguousarray(np.broadcast_to(self.array(value, tangent), shape)).astype(self.dtype)

    def over_rows(self, rows: int, body: Callable[[int, int, int], None]) -> int:
        """Calls body(chunk, begin, end) for all rows, on as many threads as torch uses; the number of chunks."""
        size = max(16, -(-rows // _NO_ROWS))
        ranges = [(i, begin, min(begin + size, rows)) for i, begin in enumerate(range(0, rows, size))]
        threads = min(torch.get_num_threads(), len(ranges))
        if threads <= 1:
            for each in ranges:
                body(*each)
        else:
            list(_pool(os.getpid(), threads).map(lambda each: body(*each), ranges))
        return len(ranges)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="po_kernels")


def _outputs(inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[list[Tensor], list[Array]]:
    """Gradients, and as arrays those whose first axis is kept even when they are not wanted: (B, 0, ...)."""
    gradients = [
        torch.zeros(x.shape, dtype=x.dtype) if needed else x.new_empty(0)
        for x, needed in zip(inputs, needs, strict=True)
    ]
    return gradients, [g.numpy() for g in gradients]


def _rows_of(array: Array, rows: int) -> Array:
    """(B, columns), with no columns where a gradient is not wanted."""
    return array.reshape(rows, array.size // rows) if array.size else np.empty((rows, 0), array.dtype)


def _or_empty(array: Array, ndim: int) -> Array:
    return array if array.ndim == ndim else np.empty((0,) * ndim, array.dtype)


def _seed(constants: Sequence[Tensor], config: OpConfig) -> tuple[Any, Any]:
    seed = int(constants[-1]) if config.num_samples and constants else 0
    return np.uint64(seed & (2**64 - 1)), np.uint64(config.row_offset)


def _rbf(config: OpConfig) -> tuple[bool, float]:
    return config.rbf_gamma is not None, config.rbf_gamma or 0.0


class _Loss:
    """`first` and `second` of a loss from a function that runs its rows.

    Args:
        run: (run, constants, config, weight, losses, stats, gradients) fills all outputs.
    """

    def __init__(self, op: str, check: Callable[..., None], run: Callable[..., None]) -> None:
        self.op, self.check, self.run = op, check, run

    def first(self, inputs, constants, cotangent, needs, want_stats, config):
        return self._evaluate(inputs, constants, None, cotangent, None, needs, want_stats, config)

    def second(self, inputs, constants, tangents, cotangent, cotangent_tangent, needs, config):
        value, _, *gradients = self._evaluate(
            inputs, constants, tangents, cotangent, cotangent_tangent, needs, False, config
        )
        return [value, *gradients]

    def _evaluate(self, inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, config):
        self.check(self.op, *inputs, *constants)
        run = _Run(self.op, inputs, tangents)
        rows = inputs[0].shape[0]
        count = max(rows, 1)
        weight = run.like((rows,), cotangent, cotangent_tangent, 1.0)
        if config.reduction == "mean":
            weight /= count
        losses = np.zeros(rows)
        stats = np.zeros((5, rows if want_stats else 0))
        gradients, arrays = _outputs(inputs, needs)
        self.run(run, constants, config, weight, want_stats, losses, stats, arrays)
        if config.reduction != "none":
            losses = losses.sum() / (count if config.reduction == "mean" else 1)
            stats = stats.sum(axis=1) / count
        dtype = inputs[0].dtype
        value = torch.as_tensor(losses, dtype=dtype)
        reported = torch.as_tensor(stats, dtype=dtype) if want_stats else value.new_empty(0)
        return [value, reported, *gradients]


class _Value:
    """`first` and `second` of an op whose value is not a loss.

    Args:
        shape: of the value, from (inputs, constants, config).
        run: (run, constants, config, cotangent, value, gradients) fills all outputs.
    """

    def __init__(
        self,
        op: str,
        check: Callable[..., None],
        shape: Callable[[Sequence[Tensor], Sequence[Tensor], OpConfig], Sequence[int]],
        run: Callable[..., None],
    ) -> None:
        self.op, self.check, self.shape, self.run = op, check, shape, run

    def first(self, inputs, constants, cotangent, needs, want_stats, config):
        return self._evaluate(inputs, constants, None, cotangent, None, needs, config)

    def second(self, inputs, constants, tangents, cotangent, cotangent_tangent, needs, config):
        value, _, *gradients = self._evaluate(inputs, constants, tangents, cotangent, cotangent_tangent, needs, config)
        return [value, *gradients]

    def _evaluate(self, inputs, constants, tangents, cotangent, cotangent_tangent, needs, config):
        self.check(self.op, *inputs, *constants)
        run = _Run(self.op, inputs, tangents)
        shape = self.shape(inputs, constants, config)
        weight = run.like(shape, cotangent, cotangent_tangent, 0.0)
        value = inputs[0].new_empty(shape)
        gradients, arrays = _outputs(inputs, needs)
        self.run(run, constants, config, weight, value.numpy(), arrays)
        return [value, inputs[0].new_empty(0), *gradients]


def _run_policy_loss(triangular: bool) -> Callable[..., None]:
    def run(run, constants, config, weight, want_stats, losses, stats, gradients):
        mean, scale, target, precision = run.inputs
        rows, dim = mean.shape
        kind = precision.ndim
        u = np.ascontiguousarray(0.5 * (precision + precision.T) if kind == 2 else precision).reshape(-1)
        u = u.astype(run.dtype)
        wanted = gradients[3].shape == precision.shape and gradients[3].size > 0
        partial = np.zeros((_NO_ROWS, u.size if wanted else 0))
        seed, row_offset = _seed(constants, config)
        has_rbf, gamma = _rbf(config)
        to_mean, to_scale, to_target = (_rows_of(g, rows) for g in gradients[:3])
        scale = scale.reshape(rows, math.prod(scale.shape[1:]))

        def body(chunk, begin, end):
            work = np.empty(4 * config.num_samples + 4 * dim, run.dtype)
            noise = np.empty((config.num_samples, dim))
            gaussian.policy_loss(
                begin, end, triangular, dim, config.num_samples, mean, scale, target, kind, u,
                _ESTIMATORS[config.estimator], _ADVANTAGES[config.advantage], has_rbf, gamma, config.entropy_coef,
                seed, row_offset, weight, run.dual, want_stats, work, noise,
                losses, stats, to_mean, to_scale, to_target, partial[chunk],
            )  # fmt: skip

        run.over_rows(rows, body)
        if wanted:
            total = partial.sum(axis=0).reshape(precision.shape)
            gradients[3][...] = np.tril(total) + np.tril(total, -1).T if kind == 2 else total

    return run


def _run_surrogate_loss(triangular: bool) -> Callable[..., None]:
    def run(run, constants, config, weight, want_stats, losses, stats, gradients):
        mean, scale, rewards = run.inputs
        rows, dim = mean.shape
        count = config.num_samples
        samples = constants[0].numpy()
        has_rbf, gamma = _rbf(config)
        to_mean, to_scale = (_rows_of(g, rows) for g in gradients[:2])
        scale = scale.reshape(rows, math.prod(scale.shape[1:]))
        to_rewards = _or_empty(gradients[2], 2)

        def body(chunk, begin, end):
            work = np.empty(4 * count + 4 * dim, run.dtype)
            gaussian.surrogate_loss(
                begin, end, triangular, dim, count, mean, scale, rewards, samples,
                _ESTIMATORS[config.estimator], _ADVANTAGES[config.advantage], has_rbf, gamma, config.entropy_coef,
                weight, run.dual, want_stats, work, losses, stats, to_mean, to_scale, to_rewards,
            )  # fmt: skip

        run.over_rows(rows, body)

    return run


def _run_log_prob(triangular: bool) -> Callable[..., None]:
    def run(run, constants, config, cotangent, value, gradients):
        mean, scale, at = run.inputs
        rows, dim = mean.shape
        to_mean, to_scale = (_rows_of(g, rows) for g in gradients[:2])
        scale = scale.reshape(rows, math.prod(scale.shape[1:]))
        to_value = _or_empty(gradients[2], 3)

        def body(chunk, begin, end):
            gaussian.log_prob(
                begin, end, triangular, dim, mean, scale, at, cotangent, run.dual, np.empty(3 * dim, run.dtype),
                value, to_mean, to_scale, to_value,
            )  # fmt: skip

        run.over_rows(rows, body)

    return run


def _run_sample(triangular: bool) -> Callable[..., None]:
    def run(run, constants, config, cotangent, value, gradients):
        mean, scale = run.inputs
        rows, dim = mean.shape
        seed, row_offset = _seed(constants, config)
        to_mean, to_scale = (_rows_of(g, rows) for g in gradients)
        scale = scale.reshape(rows, math.prod(scale.shape[1:]))

        def body(chunk, begin, end):
            gaussian.sample(
                begin, end, triangular, dim, mean, scale, seed, row_offset, cotangent, run.dual,
                np.empty(dim, run.dtype), np.empty(dim), value, to_mean, to_scale,
            )  # fmt: skip

        run.over_rows(rows, body)

    return run


def _run_categorical_policy_loss(run, constants, config, weight, want_stats, losses, stats, gradients):
    logits, table = run.inputs
    rows, classes = logits.shape
    target = constants[0].numpy()
    count = config.num_samples
    wanted = gradients[1].ndim == 2
    chunks = max(1, min(_NO_ROWS, rows))
    partial = np.zeros((chunks, *(table.shape if wanted else (0, 0))))
    seed, row_offset = _seed(constants, config)
    has_rbf, gamma = _rbf(config)
    to_logits = _rows_of(gradients[0], rows)

    def body(chunk, begin, end):
        categorical.policy_loss(
            begin, end, count, logits, table, target,
            _ESTIMATORS[config.estimator], _ADVANTAGES[config.advantage], has_rbf, gamma, config.entropy_coef,
            seed, row_offset, weight, run.dual, want_stats, np.empty(4 * count + 3 * classes, run.dtype),
            np.empty(count, np.int64), np.empty(classes), losses, stats, to_logits, partial[chunk],
        )  # fmt: skip

    run.over_rows(rows, body)
    if wanted:
        gradients[1][...] = partial.sum(axis=0)


def _run_categorical_surrogate_loss(run, constants, config, weight, want_stats, losses, stats, gradients):
    logits, rewards = run.inputs
    rows, classes = logits.shape
    given = constants[0].numpy()
    count = config.num_samples
    has_rbf, gamma = _rbf(config)
    to_logits, to_rewards = _rows_of(gradients[0], rows), _or_empty(gradients[1], 2)

    def body(chunk, begin, end):
        categorical.surrogate_loss(
            begin, end, logits, rewards, given,
            _ESTIMATORS[config.estimator], _ADVANTAGES[config.advantage], has_rbf, gamma, config.entropy_coef,
            weight, run.dual, want_stats, np.empty(4 * count + 3 * classes, run.dtype), np.empty(count, np.int64),
            losses, stats, to_logits, to_rewards,
        )  # fmt: skip

    run.over_rows(rows, body)


def _run_categorical_log_prob(run, constants, config, cotangent, value, gradients):
    (logits,) = run.inputs
    rows, classes = logits.shape
    to_logits = _rows_of(gradients[0], rows)

    def body(chunk, begin, end):
        categorical.log_prob(
            begin, end, logits, constants[0].numpy(), cotangent, run.dual, np.empty(3 * classes, run.dtype),
            value, to_logits,
        )  # fmt: skip

    run.over_rows(rows, body)


def _run_group_advantage(run, constants, config, cotangent, value, gradients):
    (rewards,) = run.inputs
    has_rbf, gamma = _rbf(config)
    to_rewards = _or_empty(gradients[0], 2)

    def body(chunk, begin, end):
        advantage.group_advantage(
            begin, end, _ADVANTAGES[config.advantage], has_rbf, gamma, rewards, cotangent, run.dual,
            np.empty(3 * rewards.shape[0], run.dtype), value, to_rewards,
        )  # fmt: skip

    run.over_rows(rewards.shape[1], body)


def _categorical_sample(logits: Tensor, seed: Tensor, num_samples: int, row_offset: int) -> Tensor:
    checks.logits("categorical_sample", logits, sampled=True)
    run = _Run("categorical_sample", (logits,), None)
    labels = torch.empty((num_samples, logits.shape[0]), dtype=torch.int64)
    key = np.uint64(int(seed) & (2**64 - 1))

    def body(chunk, begin, end):
        categorical.sample(
            begin, end, run.inputs[0], key, np.uint64(row_offset), np.empty(logits.shape[1]), labels.numpy()
        )

    run.over_rows(logits.shape[0], body)
    return labels


def _value_argument_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Sequence[int]:
    return inputs[2].shape[:-1]


def _sample_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Sequence[int]:
    return (config.num_samples, *inputs[0].shape)


KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    kernel.op: {"first": kernel.first, "second": kernel.second}
    for kernel in (
        _Loss("gaussian_policy_loss", checks.gaussian_policy_loss, _run_policy_loss(False)),
        _Loss("gaussian_surrogate_loss", checks.nothing, _run_surrogate_loss(False)),
        _Value("gaussian_log_prob", checks.nothing, _value_argument_shape, _run_log_prob(False)),
        _Value("gaussian_sample", checks.nothing, _sample_shape, _run_sample(False)),
        _Loss("mvn_policy_loss", checks.mvn_policy_loss, _run_policy_loss(True)),
        _Loss("mvn_surrogate_loss", checks.mvn, _run_surrogate_loss(True)),
        _Value("mvn_log_prob", checks.mvn, _value_argument_shape, _run_log_prob(True)),
        _Value("mvn_sample", checks.mvn, _sample_shape, _run_sample(True)),
        _Loss("categorical_policy_loss", checks.categorical_policy_loss, _run_categorical_policy_loss),
        _Loss("categorical_surrogate_loss", checks.categorical_surrogate_loss, _run_categorical_surrogate_loss),
        _Value(
            "categorical_log_prob",
            checks.categorical_log_prob,
            lambda inputs, constants, config: constants[0].shape,
            _run_categorical_log_prob,
        ),
        _Value(
            "group_advantage", checks.nothing, lambda inputs, constants, config: inputs[0].shape, _run_group_advantage
        ),
    )
}
KERNELS["categorical_sample"] = {"sample": _categorical_sample}
