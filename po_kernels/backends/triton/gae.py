"""Generalised advantage estimation, in Triton: a program takes some columns through all steps, and back."""

import triton
import triton.language as tl
from torch import Tensor

from ..contract import GOES_ON, TERMINATED
from . import launch
from .lanes import add, load, masked, number, output, sub, times, zeros
from .launch import Call

_GOES_ON, _TERMINATED = tl.constexpr(GOES_ON), tl.constexpr(TERMINATED)


@triton.jit(
    do_not_specialize=["rewards_stride_g", "rewards_stride", "values_stride_g", "values_stride", "rows", "steps"]
)
def gae(
    rewards, rewards_stride_g: tl.int64, rewards_stride: tl.int64, values, values_stride_g: tl.int64,
    values_stride: tl.int64, ended, cotangent, out, to_rewards, to_values, rows: tl.int64, steps: tl.int64,
    gamma: tl.float64, decay: tl.float64, K: tl.constexpr,
):  # fmt: skip
    """rewards, ended, cotangent and out (steps, rows), values (steps + 1, rows)."""
    b = tl.program_id(0).to(tl.int64) * K.BLOCK_B + tl.arange(0, K.BLOCK_B)
    inside = b < rows
    discount, factor = number(gamma, K), number(decay, K)
    advantage = zeros((K.BLOCK_B,), K)
    after = add(advantage, load(values, steps * values_stride_g + b * values_stride, inside, 0, K))
    for i in range(steps):
        t = steps - 1 - i
        end = tl.load(ended + t * rows + b, inside, 0)
        here = load(values, t * values_stride_g + b * values_stride, inside, 0, K)
        error = sub(load(rewards, t * rewards_stride_g + b * rewards_stride, inside, 0, K), here)
        error = add(error, masked(end != _TERMINATED, times(after, discount)))
        advantage = add(error, masked(end == _GOES_ON, times(advantage, factor)))
        tl.store(out + t * rows + b, output(advantage, K), inside)
        after = here
    if K.HAS_COTANGENT and (K.NEED_REWARDS or K.NEED_VALUES):
        pull, ahead = zeros((K.BLOCK_B,), K), zeros((K.BLOCK_B,), K)
        for t in range(steps):
            at = t * rows + b
            pull = add(pull, load(cotangent, at, inside, 0, K))
            if K.NEED_REWARDS:
                tl.store(to_rewards + at, output(pull, K), inside)
            if K.NEED_VALUES:
                tl.store(to_values + at, output(sub(ahead, pull), K), inside)
            end = tl.load(ended + at, inside, 0)
            ahead = masked(end != _TERMINATED, times(pull, discount))
            pull = masked(end == _GOES_ON, times(pull, factor))
        if K.NEED_VALUES:
            tl.store(to_values + steps * rows + b, output(ahead, K), inside)


def _gae(call: Call) -> tuple[Tensor, Tensor]:
    steps, rows = call.inputs.rewards.shape
    value = call.empty(steps, rows)
    if rows == 0:
        return value, call.no_rows()
    ended, gamma, lam = call.constants
    tile = launch.Tile(32, 1, 1, 1, 1)
    call.run_tiles(
        gae, (triton.cdiv(rows, tile.rows),), tile, {},
        **call.rows("rewards", 2), **call.rows("values", 2), ended=ended.contiguous(), cotangent=call.cotangent,
        out=value, to_rewards=call.gradients.rewards, to_values=call.gradients.values, rows=rows, steps=steps,
        gamma=float(gamma), decay=float(gamma) * float(lam),
    )  # fmt: skip
    return value, call.empty(0)


KERNELS = {"gae": launch.served("gae", _gae)}
