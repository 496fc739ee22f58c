"""How tensors and options reach the compiled rows: chunks of rows on threads, sums in a fixed order.

First order runs in the inputs' precision. Second order runs in float64, on duals, see `lanes`.
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

from .. import checks, contract
from ..contract import OpConfig
from . import advantage, categorical, gaussian_family
from . import gaussian as _gaussian  # noqa: F401, declares its scale
from . import mvn as _mvn  # noqa: F401
from .group import Surrogate
from .lanes import RowInput, width
from .precision import FULL, Precision
from .scale import DiagonalKind, TriangularKind, scale_size

Array = NDArray[Any]

_ESTIMATORS = {"": 2, "analytic": 0, "exact": 0, "reparam": 1, "dice": 2, "reinforce": 3}
_ADVANTAGES = {"none": 0, "min": 1, "mean": 2, "loo": 3, "standardized": 4}

_MOST_CHUNKS = 64  # so that sums over chunks have one order whatever the number of threads
_MOST_SUMS = 2**21  # numbers summed by chunk, all chunks together
_OPERATIONS_PER_THREAD = 65536  # roughly what waking a thread costs
_CHUNKS_PER_THREAD = 4  # parts that a thread takes one after another, for all threads to end together

_POISON = "PO_KERNELS_POISON" in os.environ
_EMPTY = {dtype: np.empty(0, dtype) for dtype in (np.float32, np.float64)}


class _Run:
    """The arrays of one call: inputs with their tangents, outputs, and the loop over chunks of rows.

    Attributes:
        check: makes the refusals that the rows leave to it.

    Args:
        rows: B.
        operations: elementary ones a row, roughly.
        sums: numbers that are summed over rows by chunk.
    """

    check: Callable[[], None]

    def __init__(self, inputs: Sequence[Tensor], dual: bool, rows: int, operations: int, sums: int = 0) -> None:
        self.dual = dual
        self.dtype: Any = np.float64 if dual or inputs[0].dtype == torch.float64 else np.float32
        self.torch_dtype = torch.float64 if self.dtype == np.float64 else torch.float32
        self.rows, self.operations = rows, operations
        chunks = max(1, min(_MOST_CHUNKS, _MOST_SUMS // max(sums, 1)))
        self.size = -(-max(32, -(-rows // chunks)) // 16) * 16
        self.chunks = -(-rows // self.size)

    def input(self, value: Tensor, tangent: Tensor | None = None) -> RowInput:
        """Rows (B, ...), which may be strided or expanded."""
        columns = math.prod(value.shape[1:])
        value = value.detach()
        if not value.is_contiguous() and not value[:1].is_contiguous():
            value = value.contiguous()
        value = value.to(self.torch_dtype)
        rows, stride = value.shape[0], value.stride(0)
        if value.is_contiguous():
            flat, stride = value.view(-1), columns
        else:
            flat = value.as_strided(((rows - 1) * stride + columns,), (1,))
        return RowInput(flat.numpy(), self.tangent(value.numel(), tangent), stride)

    def whole(self, value: Tensor, tangent: Tensor | None, columns: int) -> RowInput:
        """Rows without gaps, whatever the axes before them."""
        flat = value.detach().contiguous().view(-1).to(self.torch_dtype).numpy()
        return RowInput(flat, self.tangent(flat.size, tangent), columns)

    def tangent(self, size: int, tangent: Tensor | None) -> Array:
        if not self.dual:
            return _EMPTY[self.dtype]
        if tangent is None:
            return np.zeros(size)
        return tangent.detach().to(torch.float64).contiguous().view(-1).numpy()

    def cotangent(
        self, shape: Sequence[int], value: Tensor | None, tangent: Tensor | None, default: float, scale: float = 1.0
    ) -> RowInput:
        """A number a row, `default` if there is none, and its tangent, times `scale`."""

        def broadcast(x: Tensor | None, otherwise: float) -> Array:
            if x is None:
                return np.full(math.prod(shape), otherwise * scale, self.dtype)
            array = x.detach().to(self.torch_dtype).numpy()
            return np.multiply(np.broadcast_to(array, shape), self.dtype(scale), order="C").reshape(-1)

        tangents = broadcast(tangent, 0.0) if self.dual else _EMPTY[self.dtype]
        return RowInput(broadcast(value, default), tangents, 1)

    def gradient(self, x: Tensor, needed: bool) -> Array:
        return np.empty(x.numel() if needed else 0, self.dtype)

    def over_rows(self, items: int, primals: int, body: Callable[[Any, Array], bool | None]) -> None:
        """Calls body((first, last, size), work) for all chunks, on as many threads as torch uses.

        Where a body says that it has seen a value that may have to be refused, the check is made in full.

        Args:
            items, primals: scratch in items of the kind that rows are computed in, and in lanes without derivatives.
        """
        lanes = width(self.dtype)
        numbers = (items + primals) * lanes + 64
        dtype = np.complex128 if self.dual else self.dtype

        def part(chunks: tuple[int, int]) -> bool | None:
            work = np.full(numbers, np.nan, dtype) if _POISON else np.empty(numbers, dtype)
            return body((*chunks, self.size), work)

        wanted = 1 + self.rows * self.operations // _OPERATIONS_PER_THREAD
        threads = min(torch.get_num_threads(), self.chunks, wanted)
        if threads <= 1:
            suspicious = [part((0, self.chunks))]
        else:
            step = -(-self.chunks // (threads * _CHUNKS_PER_THREAD))
            parts = [(i, min(i + step, self.chunks)) for i in range(0, self.chunks, step)]
            suspicious = list(_pool(os.getpid(), threads).map(part, parts))
        if any(suspicious):
            self.check()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="po_kernels")


def _gradients(inputs: Sequence[Tensor], needs: Sequence[bool], arrays: Sequence[Array]) -> list[Tensor]:
    return [
        torch.from_numpy(array).to(x.dtype).view(x.shape) if needed else x.new_empty(0)
        for x, needed, array in zip(inputs, needs, arrays, strict=True)
    ]


def _surrogate(config: OpConfig, samples: int | None = None) -> Surrogate:
    return Surrogate(
        _ESTIMATORS[config.estimator], _ADVANTAGES[config.advantage],
        config.num_samples if samples is None else samples, float(config.entropy_coef),
        config.rbf_gamma is not None, float(config.rbf_gamma or 0.0),
    )  # fmt: skip


def _seed(constants: Sequence[Tensor], config: OpConfig) -> tuple[Any, Any]:
    seed = int(constants[-1]) if config.num_samples and constants else 0
    return np.uint64(seed & (2**64 - 1)), np.uint64(config.row_offset)


def _unchecked(*_: Any) -> None:
    pass


class _Loss:
    """`first` and `second` of a loss.

    Args:
        check: (op, *inputs, *constants) refuses values before the rows run, `check_rows` those that rows suspect.
        start: (inputs, dual, config) makes the run.
        run: (run, inputs, tangents, constants, config, needs, weight, losses, stats) returns the gradients.
    """

    def __init__(
        self,
        op: str,
        check: Callable[..., None],
        check_rows: Callable[..., None],
        start: Callable[..., _Run],
        run: Callable[..., Any],
    ) -> None:
        self.op, self.check, self.check_rows, self.start, self.run = op, check, check_rows, start, run

    def _evaluate(self, inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, config):
        self.check(self.op, *inputs, *constants)
        run = self.start(inputs, tangents is not None, config)
        run.check = lambda: self.check_rows(self.op, *inputs, *constants)
        rows, count = run.rows, max(run.rows, 1)
        scale = 1.0 / count if config.reduction == "mean" else 1.0
        weight = run.cotangent((rows,), cotangent, cotangent_tangent, 1.0, scale)
        losses = np.empty(rows, run.dtype)
        stats = None if run.dual else np.empty(5 * rows if want_stats else 0, run.dtype)
        arrays = self.run(
            run, inputs, tangents or (None,) * len(inputs), constants, config, needs, weight, losses, stats
        )
        dtype = inputs[0].dtype
        if config.reduction == "none":
            value = torch.from_numpy(losses).to(dtype)
            reported = torch.from_numpy(stats.reshape(5, rows)) if want_stats else value.new_empty(0)
        else:
            total = losses.sum(dtype=np.float64) / (count if config.reduction == "mean" else 1)
            value = torch.tensor(total, dtype=dtype)
            reported = value.new_empty(0)
            if want_stats:
                reported = torch.from_numpy(stats.reshape(5, rows).sum(axis=1, dtype=np.float64) / count).to(dtype)
        return [value, reported, *_gradients(inputs, needs, arrays)]


class _Value:
    """`first` and `second` of an op whose value is not a loss.

    Args:
        check, check_rows: as of a loss.
        start: (inputs, dual, config) makes the run.
        shape: of the value, from (inputs, constants, config).
        run: (run, inputs, tangents, constants, config, needs, cotangent, value) returns the gradients.
    """

    def __init__(
        self,
        op: str,
        check: Callable[..., None],
        check_rows: Callable[..., None],
        start: Callable[..., _Run],
        shape: Callable[[Sequence[Tensor], Sequence[Tensor], OpConfig], Sequence[int]],
        run: Callable[..., Any],
    ) -> None:
        self.op, self.check, self.check_rows, self.start, self.shape, self.run = (
            op,
            check,
            check_rows,
            start,
            shape,
            run,
        )

    def _evaluate(self, inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, config):
        self.check(self.op, *inputs, *constants)
        run = self.start(inputs, tangents is not None, config)
        run.check = lambda: self.check_rows(self.op, *inputs, *constants)
        shape = self.shape(inputs, constants, config)
        asked = any(needs)
        weight = run.cotangent(
            shape if asked else (0,), cotangent if asked else None, cotangent_tangent if asked else None, 0.0
        )
        value = np.empty(math.prod(shape), run.dtype)
        arrays = self.run(run, inputs, tangents or (None,) * len(inputs), constants, config, needs, weight, value)
        dtype = inputs[0].dtype
        value = torch.from_numpy(value).to(dtype).view(tuple(shape))
        return [value, value.new_empty(0), *_gradients(inputs, needs, arrays)]


class _Gaussian:
    """The ops of the Gaussian whose scale is of this kind."""

    def __init__(self, kind: type[DiagonalKind] | type[TriangularKind]) -> None:
        self.kind = kind

    def operations(self, dim: int) -> int:
        """Of a sample."""
        return dim * (8 + dim + (2 * dim if self.kind is TriangularKind else 0))

    def start_policy(self, inputs, dual, config):
        rows, dim = inputs[0].shape
        return _Run(inputs, dual, rows, (config.num_samples + 1) * self.operations(dim), inputs[3].numel())

    def start(self, inputs, dual, config):
        rows, dim = inputs[0].shape
        return _Run(inputs, dual, rows, (config.num_samples + 1) * self.operations(dim))

    def start_log_prob(self, inputs, dual, config):
        rows, dim = inputs[0].shape
        return _Run(inputs, dual, rows, (inputs[2].shape[0] + 1) * self.operations(dim))

    def policy_loss(self, run, inputs, tangents, constants, config, needs, weight, losses, stats):
        kind = self.kind(inputs[0].shape[1])
        dim, count, size = kind.dim, config.num_samples, scale_size(kind)
        mean, scale, target = (run.input(x, t) for x, t in zip(inputs[:3], tangents[:3], strict=True))
        u = self.precision(run, inputs[3], tangents[3])
        terms = dim * (dim + 1) // 2 if u.kind == FULL else u.value.size
        partial = np.empty(run.chunks * terms if needs[3] else 0)
        gradients = [run.gradient(x, needed) for x, needed in zip(inputs[:3], needs[:3], strict=True)]
        surrogate, (seed, row_offset) = _surrogate(config), _seed(constants, config)

        def body(chunks, work):
            return gaussian_family.policy_loss(
                kind, size, chunks, run.rows, mean, scale, target, u, surrogate, seed, row_offset, weight,
                work, losses, stats, *gradients, partial, terms,
            )  # fmt: skip

        run.over_rows(9 * dim + size + 4 * count + 1, (count + 2) * dim + size + terms, body)
        return [*gradients, self.precision_gradient(run, inputs[3], partial.reshape(-1, terms)) if needs[3] else None]

    def precision(self, run: _Run, u: Tensor, tangent: Tensor | None) -> Precision:
        def flat(x: Tensor) -> Array:
            x = x.detach().to(run.torch_dtype)
            return (0.5 * (x + x.mT) if x.ndim == 2 else x).contiguous().view(-1).numpy()

        value = flat(u)
        if not run.dual:
            return Precision(u.ndim, value, value)
        return Precision(u.ndim, value, np.zeros_like(value) if tangent is None else flat(tangent))

    def precision_gradient(self, run: _Run, u: Tensor, partial: Array) -> Array:
        total = partial.sum(axis=0)
        if u.ndim < 2:
            return total
        matrix = np.empty(u.shape)
        lower = np.tril_indices(u.shape[0])
        matrix[lower] = total
        matrix.T[lower] = total
        return matrix

    def surrogate_loss(self, run, inputs, tangents, constants, config, needs, weight, losses, stats):
        kind = self.kind(inputs[0].shape[1])
        dim, count, size = kind.dim, config.num_samples, scale_size(kind)
        mean, scale = (run.input(x, t) for x, t in zip(inputs[:2], tangents[:2], strict=True))
        rewards = run.whole(inputs[2], tangents[2], 1)
        given = constants[0].detach().to(run.torch_dtype).contiguous().view(-1).numpy()
        gradients = [run.gradient(x, needed) for x, needed in zip(inputs, needs, strict=True)]
        surrogate = _surrogate(config)

        def body(chunks, work):
            return gaussian_family.surrogate_loss(
                kind, size, chunks, run.rows, mean, scale, rewards, given, surrogate, weight,
                work, losses, stats, *gradients,
            )  # fmt: skip

        run.over_rows(6 * dim + size + 4 * count + 1, (count + 1) * dim + size, body)
        return gradients

    def log_prob(self, run, inputs, tangents, constants, config, needs, cotangent, value):
        kind = self.kind(inputs[0].shape[1])
        dim, size, many = kind.dim, scale_size(kind), inputs[2].shape[0]
        mean, scale = (run.input(x, t) for x, t in zip(inputs[:2], tangents[:2], strict=True))
        at = run.whole(inputs[2], tangents[2], dim)
        gradients = [run.gradient(x, needed) for x, needed in zip(inputs, needs, strict=True)]

        def body(chunks, work):
            return gaussian_family.log_prob(
                kind, size, chunks, run.rows, many, mean, scale, at, cotangent, work, value, *gradients
            )

        run.over_rows(6 * dim + size + 1, 2 * dim + size, body)
        return gradients

    def sample(self, run, inputs, tangents, constants, config, needs, cotangent, value):
        kind = self.kind(inputs[0].shape[1])
        dim, size, count = kind.dim, scale_size(kind), config.num_samples
        mean, scale = (run.input(x, t) for x, t in zip(inputs, tangents, strict=True))
        cotangent = cotangent._replace(stride=dim)
        gradients = [run.gradient(x, needed) for x, needed in zip(inputs, needs, strict=True)]
        seed, row_offset = _seed(constants, config)

        def body(chunks, work):
            return gaussian_family.sample(
                kind, size, chunks, run.rows, count, mean, scale, seed, row_offset, cotangent, work, value, *gradients
            )

        run.over_rows(6 * dim + size, 3 * dim + size, body)
        return gradients


def _labels(x: Tensor) -> Array:
    return x.detach().contiguous().view(-1).numpy()


def _start_categorical(inputs, dual, config):
    rows, classes = inputs[0].shape
    sums = inputs[1].numel() if len(inputs) > 1 and config.estimator and inputs[1].shape == (classes, classes) else 0
    return _Run(inputs, dual, rows, 8 * classes + config.num_samples * (16 + classes), sums)


def _categorical_policy_loss(run, inputs, tangents, constants, config, needs, weight, losses, stats):
    classes, count = inputs[0].shape[1], config.num_samples
    logits = run.input(inputs[0], tangents[0])
    columns = run.input(inputs[1].mT.contiguous(), None if tangents[1] is None else tangents[1].mT)
    target = _labels(constants[0])
    to_logits = run.gradient(inputs[0], needs[0])
    partial = np.empty(run.chunks * classes**2 if needs[1] else 0, run.dtype)
    surrogate, (seed, row_offset) = _surrogate(config), _seed(constants[1:], config)

    def body(chunks, work):
        return categorical.policy_loss(
            chunks, run.rows, classes, logits, columns, target, surrogate, seed, row_offset, weight, work,
            losses, stats, to_logits, partial,
        )  # fmt: skip

    # Labels and thresholds are words, and thresholds are made of float64, twice as large as float32.
    run.over_rows(5 * classes + 4 * count + 1, 5 * classes + count, body)
    if not needs[1]:
        return [to_logits, None]
    total = partial.reshape(-1, classes, classes).sum(axis=0, dtype=np.float64)
    return [to_logits, np.ascontiguousarray(total.T)]


def _categorical_surrogate_loss(run, inputs, tangents, constants, config, needs, weight, losses, stats):
    classes, count = inputs[0].shape[1], config.num_samples
    logits = run.input(inputs[0], tangents[0])
    rewards = run.whole(inputs[1], tangents[1], 1)
    given = _labels(constants[0])
    gradients = [run.gradient(x, needed) for x, needed in zip(inputs, needs, strict=True)]
    surrogate = _surrogate(config)

    def body(chunks, work):
        return categorical.surrogate_loss(
            chunks, run.rows, classes, logits, rewards, given, surrogate, weight, work,
            losses, stats, *gradients,
        )  # fmt: skip

    run.over_rows(4 * classes + 4 * count + 1, classes + count, body)
    return gradients


def _categorical_log_prob(run, inputs, tangents, constants, config, needs, cotangent, value):
    classes = inputs[0].shape[1]
    logits = run.input(inputs[0], tangents[0])
    labels = _labels(constants[0])
    to_logits = run.gradient(inputs[0], needs[0])

    def body(chunks, work):
        return categorical.log_prob(
            chunks, run.rows, constants[0].shape[0], classes, logits, labels, cotangent, work, value, to_logits
        )

    run.over_rows(4 * classes + 1, classes, body)
    return [to_logits]


def _start_advantage(inputs, dual, config):
    count, rows = inputs[0].shape
    return _Run(inputs, dual, rows, 8 * count)


def _group_advantage(run, inputs, tangents, constants, config, needs, cotangent, value):
    rewards = run.whole(inputs[0], tangents[0], 1)
    to_rewards = run.gradient(inputs[0], needs[0])
    surrogate = _surrogate(config, inputs[0].shape[0])

    def body(chunks, work):
        advantage.group_advantage(chunks, run.rows, surrogate, rewards, cotangent, work, value, to_rewards)

    run.over_rows(3 * inputs[0].shape[0], 0, body)
    return [to_rewards]


def _categorical_sample(logits: Tensor, seed: Tensor, num_samples: int, row_offset: int) -> Tensor:
    rows, classes = logits.shape
    run = _Run((logits,), False, rows, 8 * classes + num_samples * (16 + classes))
    run.check = lambda: checks.logits("categorical_sample", logits, sampled=True)
    labels = np.empty(num_samples * rows, np.int64)
    key = np.uint64(int(seed) & (2**64 - 1))
    source = run.input(logits)

    def body(chunks, work):
        return categorical.sample(chunks, rows, num_samples, classes, source, key, np.uint64(row_offset), work, labels)

    run.over_rows(classes, 3 * classes, body)
    return torch.from_numpy(labels).view(num_samples, rows)


def _value_argument_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Sequence[int]:
    return inputs[2].shape[:-1]


def _sample_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Sequence[int]:
    return (config.num_samples, *inputs[0].shape)


def _check_labels(name: str) -> Callable[..., None]:
    """They have to be known to be in range before they are looked up."""

    def check(op: str, logits: Tensor, *rest: Tensor) -> None:
        checks.labels(op, name, rest[-1] if name != "target" else rest[1], logits.shape[-1])

    return check


def _check_precision(op: str, mean: Tensor, scale: Tensor, target: Tensor, u: Tensor, *seed: Tensor) -> None:
    checks.precision(op, u)


def _gaussian_kernels(family: str, kind: Any, check_rows: Callable[..., None]) -> list[_Loss | _Value]:
    ops, nothing = _Gaussian(kind), _unchecked
    return [
        _Loss(f"{family}_policy_loss", _check_precision, check_rows, ops.start_policy, ops.policy_loss),
        _Loss(f"{family}_surrogate_loss", nothing, check_rows, ops.start, ops.surrogate_loss),
        _Value(f"{family}_log_prob", nothing, check_rows, ops.start_log_prob, _value_argument_shape, ops.log_prob),
        _Value(f"{family}_sample", nothing, check_rows, ops.start, _sample_shape, ops.sample),
    ]


def _kernel(op: _Loss | _Value) -> contract.Kernel:
    def kernel(request: contract.Request) -> list[Tensor]:
        checks.values(contract.OPS[op.op], request.inputs, request.constants)
        given = [x for x in request.constants if x is not None]
        return op._evaluate(request.inputs, given, *request[2:])

    return kernel


KERNELS: dict[str, contract.Kernel] = {
    kernel.op: _kernel(kernel)
    for kernel in (
        *_gaussian_kernels("gaussian", DiagonalKind, _unchecked),
        *_gaussian_kernels("mvn", TriangularKind, _unchecked),
        _Loss(
            "categorical_policy_loss",
            _check_labels("target"),
            _unchecked,
            _start_categorical,
            _categorical_policy_loss,
        ),
        _Loss(
            "categorical_surrogate_loss",
            _check_labels("samples"),
            _unchecked,
            _start_categorical,
            _categorical_surrogate_loss,
        ),
        _Value(
            "categorical_log_prob",
            _check_labels("value"),
            _unchecked,
            _start_categorical,
            lambda inputs, constants, config: constants[0].shape,
            _categorical_log_prob,
        ),
        _Value(
            "group_advantage",
            _unchecked,
            _unchecked,
            _start_advantage,
            lambda inputs, constants, config: inputs[0].shape,
            _group_advantage,
        ),
    )
}


def _sample_labels(request: contract.Request) -> list[Tensor]:
    (logits,), config = request.inputs, request.config
    labels = _categorical_sample(logits, request.constants.seed, config.num_samples, config.row_offset)
    return [labels, logits.new_empty(0), logits.new_empty(0)]


KERNELS["categorical_sample"] = _sample_labels
