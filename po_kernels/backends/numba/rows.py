"""How a request reaches compiled rows: arrays, chunks of rows on threads, and sums in a fixed order.

A kernel runs rows in tiles of at most TILE. What it computes of a tile are float64 arrays with an axis of rows at the
end, so that the innermost loops, which LLVM makes vector code of, are over rows: each does the same operations as it
would alone. Kernels read inputs and write gradients in the inputs' dtype and compute in float64.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import checks
from ..contract import NUM_STATS, OPS, Kernel, Request

Array = NDArray[Any]
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
Served = tuple[bool, list[Tensor | None]]

TILE = 32
_MOST_CHUNKS = 64  # so that sums over chunks have one order whatever the number of threads
_MOST_SUMS = 2**21  # numbers summed by chunk, all chunks together
_ELEMENTS_PER_THREAD = 4096  # roughly what waking a thread costs
_PARTS_PER_THREAD = 4  # for all threads to end together

_njit: Any = numba.njit  # whose own types checkers know in part
helper: Compiler = _njit(error_model="numpy")
# For scalars within a loop over rows, which is vector code only where nothing is called.
inlined: Compiler = _njit(error_model="numpy", forceinline=True)
# A sum over rows may be taken in any order that depends on their number alone.
summing: Compiler = _njit(error_model="numpy", fastmath={"reassoc"})


def kernel(function: Callable[..., bool]) -> Any:
    """Compiled at the first call and kept on disk, or where there is no place to keep it, in this process."""
    compiled = partial(_njit, error_model="numpy", nogil=True)
    try:
        return compiled(cache=True)(function)
    except RuntimeError:  # of a read-only install, by a user without a home
        return compiled()(function)


class Chunks(NamedTuple):
    """What a kernel runs, or a part of it: rows from `first` to `last`, of which `size` are a chunk."""

    first: int
    last: int
    size: int

    @property
    def number(self) -> int:
        return -(-self.last // self.size)


def chunked(rows: int, sums: int = 0) -> Chunks:
    """All rows; `sums` are the numbers that are summed over rows by chunk."""
    most = max(1, min(_MOST_CHUNKS, _MOST_SUMS // max(sums, 1)))
    return Chunks(0, rows, max(1, -(-rows // (most * TILE))) * TILE)


def run(request: Request, function: Callable[..., bool], chunks: Chunks, *arguments: Any) -> bool:
    """Runs function(chunks, *arguments), tensors as arrays, on as many threads as torch uses; whether any is true.

    Not numba's prange: its threading layers end a forked child (GNU OpenMP) or the process of two callers at once
    (workqueue). These threads are this process's own, and each runs a kernel without the interpreter's lock.
    """
    arguments = tuple(array(x) if isinstance(x, Tensor) else x for x in arguments)
    elements = sum(x.numel() for x in request.inputs) * (request.config.num_samples + 1)
    threads = min(torch.get_num_threads(), chunks.number, 1 + elements // _ELEMENTS_PER_THREAD)
    if threads <= 1:
        return function(chunks, *arguments)
    step = -(-chunks.number // (threads * _PARTS_PER_THREAD)) * chunks.size
    parts = [chunks._replace(first=i, last=min(i + step, chunks.last)) for i in range(0, chunks.last, step)]
    return any(list(_pool(os.getpid(), threads).map(lambda part: function(part, *arguments), parts)))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="po_kernels")


def array(x: Tensor) -> Array:
    return x.detach().contiguous().numpy()


def once(x: Tensor) -> Tensor:
    """An input (B, ...); one row that is expanded to all becomes one row."""
    return x[:1] if x.stride(0) == 0 else x


def gradients(request: Request) -> Any:
    """For each input a tensor for its gradient, without elements where none is asked for."""
    found = [
        torch.empty(x.shape if needed else (0,) * x.ndim, dtype=x.dtype)
        for x, needed in zip(request.inputs, request.needs, strict=True)
    ]
    return type(request.inputs)(*found)


def entries(x: Tensor) -> Tensor:
    """(B, ...) -> (B, n)."""
    return x.reshape(len(x), x.shape[1:].numel())


def finished(request: Request, value: Tensor, stats: Tensor | None, found: Sequence[Tensor]) -> list[Tensor | None]:
    return [value, stats, *[x if needed else None for x, needed in zip(found, request.needs, strict=True)]]


def valued(request: Request, function: Callable[..., bool], rows: int, out: Tensor, *arguments: Any) -> Served:
    """Of an op that is no loss; its kernel takes the arguments, the cotangent, the value, and the gradients."""
    found = gradients(request)
    # Without a cotangent no gradient is asked for.
    cotangent = out.new_zeros(out.shape) if request.cotangent is None else request.cotangent
    flat = [entries(x) if name == "scale" else x for name, x in found._asdict().items()]
    refused = run(request, function, chunked(rows), *arguments, cotangent, out, *flat)
    return refused, finished(request, out, None, found)


class Losses:
    """Of each row the weight in the gradients, the loss, and the statistics if they are wanted.

    A sum over rows is one of float64 numbers, in an order that depends on their number alone.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        rows = request.inputs[0].shape[0]
        self.scale: float = 1.0 / max(rows, 1) if request.config.reduction == "mean" else 1.0
        self.weight: Array = np.full(rows, self.scale)
        if request.cotangent is not None:
            self.weight *= array(request.cotangent.double())
        self.rows: Array = np.empty(rows)
        self.stats: Array = np.empty((NUM_STATS, rows if request.want_stats else 0))
        self.arrays: tuple[Array, Array, Array] = self.weight, self.rows, self.stats

    def finished(self, found: Sequence[Tensor]) -> list[Tensor | None]:
        loss, stats, dtype = self.rows, self.stats, self.request.inputs[0].dtype
        if self.request.config.reduction != "none":
            loss, stats = loss.sum() * self.scale, stats.sum(axis=1) / max(len(loss), 1)
        wanted = torch.as_tensor(stats).to(dtype) if self.request.want_stats else None
        return finished(self.request, torch.as_tensor(loss).to(dtype), wanted, found)


def random(request: Request) -> tuple[Any, Any]:
    """The seed and the number of the first row; zeros where no samples are drawn."""
    seed = request.constants.seed
    return np.uint64(0 if seed is None else int(seed) & (2**64 - 1)), np.uint64(request.config.row_offset)


def served(kernels: dict[str, Callable[[Request], Served]]) -> dict[str, Kernel]:
    """Kernels of functions that say whether a row may have to be refused: only then all values are looked at."""

    def serve(op: str, request: Request) -> list[Tensor | None]:
        if "precision" in OPS[op].axes:
            checks.precision(op, request.inputs.precision)
        suspicious, results = kernels[op](request)
        if suspicious:
            checks.values(OPS[op], request.inputs, request.constants)
        return results

    return {op: partial(serve, op) for op in kernels}


@summing
def total(x):
    found = 0.0
    for value in x:
        found += value
    return found


@summing
def dot(x, y):
    found = 0.0
    for i in range(len(x)):
        found += x[i] * y[i]
    return found


@helper
def tile_of(samples):
    """Rows of a tile: fewer where each has many samples, for a core's cache to hold them."""
    tile = TILE
    while tile > 1 and tile * samples > 512:
        tile //= 2
    return tile


@helper
def scratch(count, columns):
    """Of nan, so that what is read before it is written shows; longer rows, lest a power of two share cache sets."""
    x = np.empty((count, columns + 8))
    for i in range(count):
        for c in range(columns):
            x[i, c] = np.nan
    return x


@helper
def load(x, begin, lanes, out, at):
    """out[j, at + b] = x[begin + b, j], or x[0, j] of a row that all share."""
    step = 1 if len(x) > 1 else 0
    for b in range(lanes):
        row = (begin + b) * step
        for j in range(len(out)):
            out[j, at + b] = x[row, j]


@helper
def load_difference(x, y, begin, lanes, out, at):
    """out[j, at + b] = x[begin + b, j] - y[begin + b, j]."""
    load(x, begin, lanes, out, at)
    step = 1 if len(y) > 1 else 0
    for b in range(lanes):
        for j in range(len(out)):
            out[j, at + b] -= y[(begin + b) * step, j]


@helper
def store(x, begin, lanes, out):
    """out[begin + b, j] = x[j, b], if out has elements."""
    for b in range(lanes if out.size > 0 else 0):
        for j in range(len(x)):
            out[begin + b, j] = x[j, b]
