"""ppo.py in plain torch (extra mbrl), to compare: `python examples/ppo_eager.py`, with the same options."""

import torch
from ppo import CLIP, GAMMA, LAMBDA, main
from torch.distributions import Categorical, Independent, Normal


def log_prob(head, actions):
    policy = Categorical(logits=head[0]) if len(head) == 1 else Independent(Normal(head[0], head[1].exp()), 1)
    return policy.log_prob(actions), policy.entropy()


def surrogate(new, entropy, old, advantages, coef):
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.min(ratio * advantages, clipped * advantages).mean() - coef * entropy.mean()


def gae(rewards, values, dones):
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        goes_on = GAMMA * ~dones[t]
        advantages[t] = last = rewards[t] + goes_on * values[t + 1] - values[t] + goes_on * LAMBDA * last
    return advantages, advantages + values[:-1]


OPS = {"log_prob": log_prob, "surrogate": surrogate, "gae": gae}

if __name__ == "__main__":
    main(**OPS)
