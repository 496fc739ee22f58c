"""How tensors and options reach the Triton kernels: tiles by rules of shape, strides, and sums in a fixed order."""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Request
from . import tally

# Numbered as in group.py.
ADVANTAGES = {"none": 0, "min": 1, "mean": 2, "loo": 3, "standardized": 4}

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
_MOST_PROGRAMS = 2048
_MOST_SUMS = 2**24
_MOST_CHUNKS = 2**16 - 1  # of a launch, along its second axis

Arguments = dict[str, Any]


class Tile(NamedTuple):
    """Block sizes, none of which depends on the number of rows: a row's result has to be that of any batch."""

    rows: int
    group: int
    chunks: int
    dim: int
    warps: int
    each: int = 1  # samples of a thread


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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Call:
    """The tensors and options of one call, as in `contract`; for the first derivative `tangents` is None."""

    def __init__(self, op: str, request: Request) -> None:
        inputs, tangents = request.inputs, request.tangents
        self.op, self.config, self.constants = op, request.config, request.constants
        self.cotangent, self.cotangent_tangent = request.cotangent, request.cotangent_tangent
        self.needs, self.want_stats = request.needs, request.want_stats
        self.dual = tangents is not None
        self.device = inputs[0].device
        self.dtype = compute_dtype(inputs[0].dtype)
        self.triton_dtype = tl.float64 if self.dtype == torch.float64 else tl.float32
        self.pairs = [self.pair(x, t) for x, t in zip(inputs, tangents or [None] * len(inputs), strict=True)]
        self.gradients = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else x.new_empty(0)
            for x, needed in zip(inputs, self.needs, strict=True)
        ]

    def pair(self, x: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A number and its tangent, of the same strides."""
        if not self.dual:
            return x, None
        x = x.contiguous()
        return x, torch.zeros_like(x) if tangent is None else tangent.contiguous()

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

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def rows(self, name: str, index: int, *, leading: int = 1) -> Arguments:
        """An input whose first `leading` axes may have any strides, as `name`, its tangent and its strides."""
        x, tangent = self.pairs[index]
        x = with_contiguous_rows(x, leading)
        strides = (f"{name}_stride_g", f"{name}_stride")[2 - leading :]
        return {name: x, f"{name}_t": tangent, **dict(zip(strides, x.stride(), strict=False))}

    def cotangents(self) -> Arguments:
        """The cotangent, contiguous, with its tangent."""
        pair: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.cotangent is not None:
            pair = self.pair(self.cotangent.contiguous(), self.cotangent_tangent)
        return {"cotangent": pair[0], "cotangent_t": pair[1], "HAS_COTANGENT": self.cotangent is not None}

    def outputs(self, *names: str) -> Arguments:
        """For each input named where its gradient goes, and whether it is wanted."""
        result: Arguments = {}
        for name, needed, gradient in zip(names, self.needs, self.gradients, strict=False):
            result[f"to_{name}"] = gradient if needed else None
            result[f"NEED_{name.upper()}"] = bool(needed)
        return result

    def seed(self, seed: Tensor) -> Tensor:
        """The seed in memory of the device. One from the CPU is written there by a kernel: nothing waits for a copy."""
        if seed.device == self.device:
            return seed
        return torch.full((), int(seed), dtype=torch.int64, device=self.device)

    def options(self) -> Arguments:
        return {"DUAL": self.dual, "T": self.triton_dtype}

    def run(self, kernel: Any, grid: tuple[int, ...], warps: int, **arguments: Any) -> None:
        """Launches on the device of the tensors. Nothing is fused but what says so, see `lanes.mul_add`."""
        guard = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with guard:
            kernel[grid](**arguments, num_warps=warps, enable_fp_fusion=False)


def with_contiguous_rows(x: Tensor, leading: int) -> Tensor:
    """x, or a copy where the strides of the axes after the first `leading` are not those of a contiguous tensor."""
    expected = 1
    for size, stride in zip(reversed(x.shape[leading:]), reversed(x.stride()[leading:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def loss(
    call: Call, kernel: Any, blocks: Tile, shared: tuple[int, ...], **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a kernel over the rows of a loss and adds up what its programs report.

    Args:
        shared: shape of what is summed over rows besides the loss and the statistics.

    Returns:
        the loss, the statistics (empty unless wanted), and the sums of that shape.
    """
    config, want_stats = call.config, call.want_stats
    rows = call.pairs[0][0].shape[0]
    reduced = config.reduction != "none"
    shape = () if reduced else (rows,)
    value = call.empty(*shape)
    stats = call.empty(*(5, *shape) if want_stats else (0,))
    sums = call.empty(*shared)
    if rows == 0:
        call.no_rows()
        return value.zero_(), stats.zero_(), sums.zero_()
    size = tally.HEAD.value + sums.numel()
    most = max(1, min(_MOST_PROGRAMS, _MOST_SUMS // size))
    total_blocks = triton.cdiv(rows, blocks.rows)
    each = triton.cdiv(total_blocks, most)
    programs = triton.cdiv(total_blocks, each)
    # Sums of large matrices start from zero in memory.
    partial = torch.zeros((programs, size), dtype=call.dtype, device=call.device)
    call.run(
        kernel,
        (programs,),
        blocks.warps,
        **arguments,
        **call.cotangents(),
        cotangent_stride=0 if reduced else 1,
        losses=None if reduced else value,
        stats=stats if want_stats and not reduced else None,
        partial=partial,
        partial_stride=size,
        rows=rows,
        blocks=each,
        entropy_coef=config.entropy_coef,
        rbf_gamma=config.rbf_gamma or 0.0,
        loss_unit=1.0 / rows if config.reduction == "mean" else 1.0,
        stats_unit=1.0 / rows,
        HAS_RBF=config.rbf_gamma is not None,
        ADVANTAGE=ADVANTAGES[config.advantage],
        REDUCED=reduced,
        WANT_STATS=want_stats,
        BLOCK_B=blocks.rows,
        **call.options(),
    )
    if reduced or sums.numel():
        block = min(128, triton.next_power_of_2(size))
        call.run(
            tally.reduce,
            (triton.cdiv(size, block),),
            4,
            partial=partial,
            programs=programs,
            size=size,
            loss=value,
            stats=stats,
            shared=sums,
            KEEP_LOSS=reduced,
            KEEP_STATS=reduced and want_stats,
            BLOCK_P=1024 // block,
            BLOCK=block,
        )
    return value, stats, sums


def chunked(group: int, blocks: Tile, together: bool) -> tuple[int, int]:
    """Programs along the group, and chunks of each: all in one where gradients are summed over the group."""
    chunks = triton.cdiv(group, blocks.group)
    each = chunks if together else triton.cdiv(chunks, _MOST_CHUNKS)
    return triton.cdiv(chunks, each), each
