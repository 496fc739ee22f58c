"""PPO as CleanRL writes it with the fused ops, of discrete and continuous actions (extra mbrl); ppo_eager.py: the twin.

pip install '.[mbrl]'
python examples/ppo.py [--env HalfCheetah-v5 --steps 200000]
"""

import argparse
import time
from functools import partial

import torch
from ppo_parts import Agent, Rollouts, is_discrete
from torch import nn

import po_kernels as pk

GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2
# Environments, steps of each, epochs, minibatches, learning rate, coefficient of the entropy.
DISCRETE, CONTINUOUS = (4, 128, 4, 4, 2.5e-3, 0.01), (1, 2048, 10, 32, 3e-4, 0.0)


def log_prob(head, actions):  # and the entropy; the head is (logits,) or (mean, log_std)
    op = pk.token_log_prob if len(head) == 1 else pk.gaussian_log_prob
    return op(*head, actions, entropy=True)[:2]


def surrogate(new, entropy, old, advantages, coef):
    return pk.policy_loss(new, advantages, old_log_prob=old, clip=(CLIP, CLIP), entropy=entropy, entropy_coef=coef)


gae = partial(pk.gae, gamma=GAMMA, lam=LAMBDA)


def train(env, steps, seed=1, log_prob=log_prob, surrogate=surrogate, gae=gae):
    """The number of steps and the return at the end of each episode, and the seconds that updates took."""
    torch.manual_seed(seed)
    number, length, epochs, minibatches, rate, coef = DISCRETE if is_discrete(env) else CONTINUOUS
    rollouts = Rollouts(env, number, seed)
    agent, spent = Agent(*rollouts.shape), 0.0
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5)
    while rollouts.steps < steps:
        optimizer.param_groups[0]["lr"] = rate * (1 - rollouts.steps / steps)
        states, actions, rewards, dones = rollouts.collect(length, agent, GAMMA)
        begin = time.perf_counter()
        with torch.no_grad():
            advantages, targets = gae(rewards, agent.critic(states).squeeze(-1), dones)
            flat = states[:-1].flatten(0, 1), actions.flatten(0, 1)
            rows = *flat, log_prob(agent.head(flat[0]), flat[1])[0], advantages.flatten(), targets.flatten()
        for order in (torch.randperm(number * length) for _ in range(epochs)):
            for part in order.chunk(minibatches):
                x, a, old, advantage, target = (each[part] for each in rows)
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                loss = surrogate(*log_prob(agent.head(x), a), old, advantage, coef)
                loss = loss + 0.5 * nn.functional.mse_loss(agent.critic(x).squeeze(-1), target)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        spent += time.perf_counter() - begin
    return rollouts.returns, spent


def main(**ops):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=61440)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # of so small networks more only wait for each other
    begin = time.perf_counter()
    returns, spent = train(options.env, options.steps, options.seed, **ops)
    for tenth in range(1, 11):
        part = [r for step, r in returns if tenth - 1 < 10 * step / options.steps <= tenth]
        print(f"to step {tenth * options.steps // 10:8}: return {sum(part) / max(len(part), 1):8.1f}")
    print(f"{time.perf_counter() - begin:.1f} s, {spent:.1f} s of them in updates")


if __name__ == "__main__":
    main()
