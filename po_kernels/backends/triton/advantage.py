"""Group advantages, in Triton."""

import triton
import triton.language as tl

from .group import advantages, advantages_transposed, transformed
from .lanes import load, masked, mul, number, output, times


@triton.jit(do_not_specialize=["rewards_stride_g", "rewards_stride", "rows"])
def group_advantage(
    rewards, rewards_t, rewards_stride_g: tl.int64, rewards_stride: tl.int64, cotangent, cotangent_t, out, to_rewards,
    rows: tl.int64, count, rbf_gamma: tl.float64,
    ADVANTAGE: tl.constexpr, HAS_RBF: tl.constexpr, HAS_COTANGENT: tl.constexpr, NEED_REWARDS: tl.constexpr,
    DUAL: tl.constexpr, T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """rewards (count, rows) and, with a cotangent of that shape, the gradient; a program has BLOCK_B rows."""
    gamma, size = number(rbf_gamma, T), number(count, T)
    g = tl.arange(0, BLOCK_G)[None, None, :]
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]
    inside = (row < rows) & (g < count)
    at = g.to(tl.int64) * rows + row
    given = load(rewards, rewards_t, g.to(tl.int64) * rewards_stride_g + row * rewards_stride, inside, 0, DUAL, T)
    reward = masked(inside, transformed(given, gamma, HAS_RBF))
    tl.store(out + at, output(advantages(reward, g, size, ADVANTAGE), DUAL), inside)
    if HAS_COTANGENT and NEED_REWARDS:
        pull = load(cotangent, cotangent_t, at, inside, 0, DUAL, T)
        pull = advantages_transposed(reward, pull, g, size, ADVANTAGE)
        if HAS_RBF:
            pull = mul(pull, times(reward, gamma))
        tl.store(to_rewards + at, output(pull, DUAL), inside)
