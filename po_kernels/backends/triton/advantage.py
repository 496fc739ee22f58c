"""Group advantages, in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tally
from .group import advantages, advantages_transposed, numbered, transformed
from .lanes import load, masked, mul, number, output, times
from .launch import Call


@triton.jit(do_not_specialize=["rewards_stride_g", "rewards_stride", "rows"])
def group_advantage(
    rewards, rewards_stride_g: tl.int64, rewards_stride: tl.int64, cotangent, out, to,
    rows: tl.int64, count, rbf_gamma: tl.float64, K: tl.constexpr,
):  # fmt: skip
    """rewards (count, rows) and, with a cotangent of that shape, the gradient; a program has BLOCK_B rows."""
    gamma, size = number(rbf_gamma, K), number(count, K)
    g = numbered(K)
    row = tally.rows_of_block(0, 1, K)
    inside = (row < rows) & (g < count)
    at = g.to(tl.int64) * rows + row
    given = load(rewards, g.to(tl.int64) * rewards_stride_g + row * rewards_stride, inside, 0, K)
    reward = masked(inside, transformed(given, gamma, K))
    tl.store(out + at, output(advantages(reward, g, size, K), K), inside)
    if K.HAS_COTANGENT and K.NEED_REWARDS:
        pull = advantages_transposed(reward, load(cotangent, at, inside, 0, K), g, size, K)
        if K.HAS_RBF:
            pull = mul(pull, times(reward, gamma))
        tl.store(to.rewards + at, output(pull, K), inside)


def _group_advantage(call: Call) -> tuple[Tensor, Tensor]:
    count, rows = call.inputs.rewards.shape
    value = call.empty(count, rows)
    # The groups stand in columns: rows of a program are neighbours in memory.
    tile = launch.class_tile(call.whole_group(count), 1)
    if rows == 0:
        return value, call.no_rows()
    call.run_tiles(
        group_advantage, (triton.cdiv(rows, tile.rows),), tile, {},
        **call.rows("rewards", 2), cotangent=call.cotangent, out=value, to=call.gradients, rows=rows, count=count,
        rbf_gamma=call.config.rbf_gamma or 0.0,
    )  # fmt: skip
    return value, call.empty(0)


KERNELS = {"group_advantage": launch.served("group_advantage", _group_advantage)}
