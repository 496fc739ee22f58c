"""A kernel that only draws the random numbers of a Gaussian loss: the least that such a loss has to do."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from po_kernels.backends.triton import launch
from po_kernels.backends.triton.philox import normals


@triton.jit(do_not_specialize=["rows"])
def row_sums(
    seed, out, rows, dim: tl.constexpr, count,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of each row's count · dim standard normals."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
    sums = tl.zeros((1, BLOCK_B, 1), tl.float32)
    for chunk in range(CHUNKS):
        g = chunk * BLOCK_G + tl.arange(0, BLOCK_G)[None, None, :]
        z = tl.where(g < count, normals(tl.load(seed), g, row, dim, BLOCK_D, tl.float32), 0)
        sums += tl.sum(tl.sum(z, axis=0, keep_dims=True), axis=2, keep_dims=True)
    tl.store(out + row, sums, row < rows)


def arguments(rows: int, dim: int, group: int, seed: Tensor) -> tuple[dict[str, Any], launch.Tile]:
    """Of a launch for the samples of a loss, in the loss's tiles."""
    tile = launch.drawn_tile(group, dim)
    return {
        "seed": seed, "out": torch.empty(rows, device=seed.device), "rows": rows, "dim": dim, "count": group,
        "BLOCK_B": tile.rows, "BLOCK_G": tile.group, "CHUNKS": tile.chunks, "BLOCK_D": tile.dim,
    }, tile  # fmt: skip
