"""Group advantages."""

from .group import advantages, advantages_transposed, transformed
from .lanes import kernel, lanes_in, load, output, put, width_of


@kernel
def group_advantage(chunks, rows, s, rewards, cotangent, work, out, to_rewards):
    """rewards, cotangent and out (G, B)."""
    first, last, size = chunks
    count = s.samples
    reward = lanes_in(work)
    advantage, pull = reward + count, reward + 2 * count
    width = width_of(reward)
    for chunk in range(first, last):
        end = min(rows, (chunk + 1) * size)
        for begin in range(chunk * size, end, width):
            lanes = min(width, end - begin)
            for g in range(count):
                load(reward + g, rewards, 1, g * rows + begin, lanes)
                reward[g] = transformed(s, reward[g])
            advantages(s.advantage, count, reward, advantage)
            for g in range(count):
                put(output(advantage[g]), out, g * rows + begin, lanes)
            if to_rewards.size > 0:
                for g in range(count):
                    load(pull + g, cotangent, 1, g * rows + begin, lanes)
                advantages_transposed(s.advantage, count, reward, pull)
                for g in range(count):
                    slope = pull[g]
                    if s.has_rbf:
                        slope = slope * reward[g] * s.gamma
                    put(output(slope), to_rewards, g * rows + begin, lanes)
