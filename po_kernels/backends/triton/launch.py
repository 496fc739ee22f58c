"""How tensors and options reach the Triton kernels: tiles by rules of shape, strides, and sums in a fixed order."""

import contextlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..advantages import ADVANTAGES
from ..contract import NUM_STATS, OPS, Kernel, Op, OpConfig, Request
from . import lanes, tally
from .lanes import Pair

# Elements of a tile of samples in memory: more would not fit the registers, fewer would leave a warp without work.
_LARGEST_TILE = 4096
_SMALLEST_TILE = 512
# Dimensions of a drawn sample that leave a thread room for a second one of a large group.
_DIMENSIONS_OF_TWO = 20
_MOST_WARPS = 8
_LEAST_MULTIPLIED = 16  # rows and columns of a matrix, on tensor cores
# Registers hold the rewards of a whole group.
_LARGEST_GROUP = 2**16
# Programs whose sums over rows are added up afterwards, and numbers that these sums may take together.
_USUAL_PROGRAMS = 2048
_MOST_SUMS = 2**24
_SUMS_REDUCED = 16  # of these numbers, by a program that reads those of many others at once
_MOST_CHUNKS = 2**16 - 1  # of a launch, along its second axis

MOST_IN_REGISTERS = 64  # rows of a matrix of sums

# Sums of n terms in an accumulator of float32 err by up to n u Σ|x|, u = 2^-24. One takes RUN tiles, each summed by
# threads that have up to 256 elements and then by halves, and goes on in float64: (RUN + 266) u Σ|x|. Of products of
# matrices, which tensor cores add up eight terms at a time and do not round to nearest, it is 1024 steps: 2048 u Σ|x|.
RUN = lanes.RUN.value
_STEPS = 1024

Arguments = dict[str, Any]


class Tile(NamedTuple):
    """Block sizes, none of which depends on the number of rows: a row's result has to be that of any batch."""

    rows: int
    group: int
    chunks: int
    dim: int
    warps: int
    each: int = 1  # samples of a thread
    registers: int | None = None  # of a thread at most, so that a multiprocessor has more of them


def tile(group: int, dim: int, matrix: bool = False) -> Tile:
    """For `group` samples of a row of `dim` dimensions, of which a warp has neighbours: tiles of all three.

    Args:
        matrix: a matrix is summed over rows in registers, of which fewer threads have more.
    """
    block_d = max(4, triton.next_power_of_2(dim))
    whole = triton.next_power_of_2(group)
    block_g = min(whole, max(1, _LARGEST_TILE // block_d))
    rows = max(1, _SMALLEST_TILE // (block_g * block_d), _LEAST_MULTIPLIED // block_g if matrix else 1)
    warps = _warps(rows * block_g * block_d)
    if matrix and block_d <= 64:
        warps = max(1, warps // 2) if block_d <= 32 else 4
    return Tile(rows, block_g, whole // block_g, block_d, warps)


def drawn_tile(group: int, dim: int, dtype: torch.dtype = torch.float32, matrix: bool = False) -> Tile:
    """For samples of few dimensions that are drawn and never in memory: a thread is alone with one of them, or two.

    Triton lays threads along the last axis of a tile first, then along those before: along all samples here. What is
    done over dimensions then needs no other thread. A warp has whole rows of groups of up to 64, so that what is done
    over samples stays within it.

    Args:
        matrix: tensor cores take matrices of at least 16 dimensions.
    """
    block_d = max(_LEAST_MULTIPLIED if matrix else 4, triton.next_power_of_2(dim))
    whole = triton.next_power_of_2(group)
    each = 2 if dim <= _DIMENSIONS_OF_TWO and dtype != torch.float64 and whole > 32 else 1
    block_g = min(whole, _MOST_WARPS * 32 * each)
    rows = max(1, 32 // block_g)
    return Tile(rows, block_g, whole // block_g, block_d, rows * block_g // (32 * each), each)


def class_tile(group: int, classes: int) -> Tile:
    """For `group` samples of a row of classes: tiles of rows by classes, and of rows by samples."""
    block_c, block_g = triton.next_power_of_2(max(classes, 2)), triton.next_power_of_2(group)
    rows = max(1, _SMALLEST_TILE // max(block_c, block_g))
    return Tile(rows, block_g, 1, block_c, _warps(rows * max(block_c, block_g)))


def expected_tile(classes: int, table: bool) -> Tile:
    """For expectations over the classes of a row: of few classes a warp has rows of its own.

    Args:
        table: a gradient of that shape, by products of matrices with at least 16 rows.
    """
    block_c = triton.next_power_of_2(max(classes, _LEAST_MULTIPLIED if table else 2))
    rows = max(1, _SMALLEST_TILE // block_c)
    return Tile(rows, 1, 1, block_c, 1 if block_c <= 32 else _warps(rows * block_c))


def _warps(elements: int) -> int:
    """Four elements a thread, and more of larger tiles."""
    return max(1, min(8, elements // 128), min(32, elements // 1024))


class Constants:
    """The compile-time constants of a launch, a kernel's argument K; K.FIRST are those of a launch without tangents.

    Triton knows a constant by its text. What it reads from an object in a kernel has to be a constant of its own.
    """

    def __init__(self, **fields: Any) -> None:
        self._text = f"{fields}"
        if fields.get("DUAL"):
            fields["FIRST"] = Constants(**{**fields, "DUAL": False})
        for name, value in fields.items():
            setattr(self, name, value if triton.knobs.runtime.interpret else tl.constexpr(value))

    def __repr__(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


_constants = lru_cache(maxsize=1024)(Constants)


class Call:
    """The tensors and options of one call, as in `contract`.

    Attributes:
        pairs: the inputs by name, with tangents.
        gradients: by name of the input, empty where not asked for; replaced where kernels have only parts of it.
    """

    def __init__(self, op: Op, request: Request) -> None:
        self.op: str = op.name
        self.config: OpConfig = request.config
        self.want_stats: bool = request.want_stats
        self.needs: Any = request.needs
        self.inputs: Any = request.inputs
        self.constants: Any = request.constants
        self.dual: bool = request.tangents is not None
        self.device: torch.device = self.inputs[0].device
        self.dtype: torch.dtype = self.inputs[0].dtype
        tangents = request.tangents or [None] * len(self.inputs)
        self.pairs: Any = op.Inputs(*(self.pair(x, t) for x, t in zip(self.inputs, tangents, strict=True)))
        self.gradients: Any = op.Inputs(
            *(self.empty(*x.shape) if need else self.empty(0) for x, need in zip(self.inputs, self.needs, strict=True))
        )
        self.cotangent: Pair = self.pairs[0]  # in place of none: it is not read
        if request.cotangent is not None:
            self.cotangent = self.pair(request.cotangent.contiguous(), request.cotangent_tangent)
        self.known: Arguments = {
            "DUAL": self.dual,
            "T": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "HAS_COTANGENT": request.cotangent is not None,
            "SCORE": self.config.estimator != "reparam",
            "WHITE": False,
            "TRIANGULAR": op.axes.get("scale") == "BDD",
            "HAS_RBF": self.config.rbf_gamma is not None,
            "ADVANTAGE": ADVANTAGES[self.config.advantage].number,
            **{f"NEED_{name.upper()}": bool(need) for name, need in self.needs._asdict().items()},
        }

    def pair(self, x: Tensor, tangent: Tensor | None) -> Pair:
        if not self.dual:
            return Pair(x, x)
        x = x.contiguous()
        return Pair(x, torch.zeros_like(x) if tangent is None else tangent.contiguous())

    def whole_group(self, group: int) -> int:
        """`group`, for an op that needs a group as a whole."""
        if group > _LARGEST_GROUP:
            raise ValueError(
                f"{self.op}: expected at most {_LARGEST_GROUP} samples a row on backend 'triton', got {group}; "
                "use backend='reference'"
            )
        return group

    def no_rows(self) -> Tensor:
        """Gradients of nothing: zero. Returns the statistics, which there are none of."""
        for gradient in self.gradients:
            gradient.zero_()
        return self.empty(0)

    def sum_in_double(self) -> None:
        """The gradient in a triangular scale, which kernels sum up in memory, in float64 until it is returned."""
        if self.known["TRIANGULAR"]:
            self.gradients = self.gradients._replace(scale=self.gradients.scale.double())

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def rows(self, name: str, leading: int = 1) -> Arguments:
        """An input with its strides along the first `leading` axes, the last of which is that of rows."""
        value, tangent = getattr(self.pairs, name)
        if not self.dual:
            value = tangent = with_contiguous_rows(value, leading)
        strides = dict(zip((f"{name}_stride_g", f"{name}_stride")[2 - leading :], value.stride(), strict=False))
        return {name: Pair(value, tangent), **strides}

    @property
    def seed(self) -> Tensor | None:
        """The seed in memory of the device. One from the CPU is written there by a kernel: nothing waits for a copy."""
        seed = self.constants.seed
        if seed is None or seed.device == self.device:
            return seed
        return torch.full((), int(seed), dtype=torch.int64, device=self.device)

    def run(
        self, kernel: Any, grid: tuple[int, ...], warps: int, registers: int | None = None, **arguments: Any
    ) -> None:
        """Launches on the device of the tensors. Nothing is fused but what says so, see `lanes.mul_add`."""
        guard = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with guard:
            kernel[grid](**arguments, num_warps=warps, maxnreg=registers, enable_fp_fusion=False)

    def run_tiles(
        self, kernel: Any, grid: tuple[int, ...], tile: Tile, known: dict[str, Any], **arguments: Any
    ) -> None:
        """Launches a kernel for which the call, its tiles and `known` are constants."""
        blocks = {f"BLOCK_{axis}": size for axis, size in zip("BGD", (tile.rows, tile.group, tile.dim), strict=True)}
        constants = {**self.known, **blocks, "CHUNKS": tile.chunks, "EACH": tile.each, **known}
        self.run(kernel, grid, tile.warps, tile.registers, **arguments, K=_constants(**constants))


def with_contiguous_rows(x: Tensor, leading: int) -> Tensor:
    """x, or a copy where the strides of the axes after the first `leading` are not those of a contiguous tensor."""
    expected = 1
    for size, stride in zip(reversed(x.shape[leading:]), reversed(x.stride()[leading:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def run_of_products(tile: Tile) -> int:
    """How many products of tiles, each of three (`lanes.add_products`), are one run."""
    return max(1, 8 * _STEPS // (3 * tile.rows * tile.group))


def loss(
    call: Call, kernel: Any, tile: Tile, shared: tuple[int, ...], known: dict[str, Any], turns: int = 1,
    run: int = 0, **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs a kernel over the rows of a loss and adds up what its programs report.

    Args:
        shared: shape of what is summed over rows besides the loss and the statistics.
        turns: terms that a block of rows adds to an accumulator.
        run: terms that are added up in float32, RUN if 0.

    Returns:
        the loss, the statistics (empty unless wanted), and the sums of that shape.
    """
    config, want_stats = call.config, call.want_stats
    rows = call.inputs[0].shape[0]
    reduced = config.reduction != "none"
    shape = () if reduced else (rows,)
    value = call.empty(*shape)
    stats = call.empty(*(NUM_STATS, *shape) if want_stats else (0,))
    sums = call.empty(*shared)
    if rows == 0:
        call.no_rows()
        return value.zero_(), stats.zero_(), sums.zero_()
    size = tally.HEAD.value + sums.numel()
    total_blocks, run = triton.cdiv(rows, tile.rows), run or RUN
    # At most a run of blocks a program, if that is not too many programs.
    each = min(triton.cdiv(total_blocks, _USUAL_PROGRAMS), max(1, run // turns))
    each = max(each, triton.cdiv(total_blocks, max(1, _MOST_SUMS // size)))
    programs = triton.cdiv(total_blocks, each)
    # Sums of large matrices start from zero in memory.
    partial = torch.zeros((programs, size), dtype=torch.float64, device=call.device)
    reported = {"REDUCED": reduced, "WANT_STATS": want_stats}
    long = {"LONG": turns > run, "WIDE": each * turns > run}
    if turns > run:
        call.sum_in_double()
    call.run_tiles(
        kernel, (programs,), tile, {**long, **known, **reported, "MEAN": config.reduction == "mean"},
        **arguments, cotangent=call.cotangent, to=call.gradients, out=tally.Tally(value, stats, partial, size),
        rows=rows, blocks=each, entropy_coef=config.entropy_coef, rbf_gamma=config.rbf_gamma or 0.0, share=1.0 / rows,
    )  # fmt: skip
    if reduced or sums.numel():
        at_once, warps = (256, 8) if programs > 64 else (32, 1)
        call.run(
            tally.reduce, (triton.cdiv(size, _SUMS_REDUCED),), warps,
            partial=partial, programs=programs, size=size, loss=value, stats=stats, shared=sums,
            K=_constants(**reported, T=call.known["T"], BLOCK_P=at_once, BLOCK=_SUMS_REDUCED),
        )  # fmt: skip
    return value, stats, sums


def in_chunks(
    call: Call, kernel: Any, out: Tensor, tile: Tile, known: dict[str, Any], together: bool, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Runs a kernel over rows and chunks of the first axis of `out`, which it writes; there are no statistics.

    Args:
        together: gradients are summed over that axis, so that one program takes all of it.
    """
    if out.numel() == 0:
        return out, call.no_rows()
    count, rows = out.shape[:2]
    chunks = triton.cdiv(count, tile.group)
    each = chunks if together else triton.cdiv(chunks, _MOST_CHUNKS)
    grid = triton.cdiv(rows, tile.rows), triton.cdiv(chunks, each)
    long = together and chunks > RUN
    if long:
        call.sum_in_double()
    if OPS[call.op].differentiable:
        arguments |= {"cotangent": call.cotangent, "to": call.gradients}
    call.run_tiles(
        kernel, grid, tile, {**known, "LONG": long}, **arguments, out=out, rows=rows, chunks=each, count=count
    )
    return out, call.empty(0)


def served(op: str, evaluate: Callable[[Call], tuple[Tensor, Tensor]]) -> Kernel:
    """The kernel of an op, of a function that gives value and statistics, and writes call.gradients."""

    def kernel(request: Request) -> list[Tensor]:
        if request.inputs[0].device.type == "cpu":  # on a GPU values are not at hand
            checks.values(OPS[op], request.inputs, request.constants)
        call = Call(OPS[op], request)
        value, stats = evaluate(call)
        return [value, stats, *(x.to(call.dtype) for x in call.gradients)]

    return kernel
