"""Group advantages, compiled by Numba."""

from .lanes import advantages, advantages_transposed, compiled, output, transformed


@compiled
def group_advantage(begin, end, kind, has_rbf, gamma, rewards, cotangent, dual, work, out, to_rewards):
    """Columns [begin, end) of rewards (G, B); `work` holds 3 G numbers."""
    count = rewards.shape[0]
    reward, advantage, pull = work[:count], work[count : 2 * count], work[2 * count : 3 * count]
    for b in range(begin, end):
        for g in range(count):
            reward[g] = transformed(rewards[g, b], has_rbf, gamma)
        advantages(kind, reward, advantage)
        for g in range(count):
            out[g, b] = output(advantage[g], dual)
            pull[g] = cotangent[g, b]
        if to_rewards.shape[0]:
            advantages_transposed(kind, reward, pull)
            for g in range(count):
                slope = reward[g] * gamma if has_rbf else 1.0 + 0.0 * reward[g]
                to_rewards[g, b] = output(pull[g] * slope, dual)
