"""PPO on CartPole in the manner of CleanRL: `python examples/ppo_cartpole.py`; with --eager the same in plain torch."""

import argparse
import time

import gymnasium
import torch
from torch import nn

import po_kernels as pk

ENVIRONMENTS, STEPS, EPOCHS, MINIBATCHES, GAMMA, LAMBDA, CLIP, ENTROPY = 8, 128, 4, 4, 0.99, 0.95, 0.2, 0.01


def network(outputs):
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def fused_loss(logits, actions, old, advantages):
    found = pk.token_log_prob(logits, actions, entropy=True)
    return pk.policy_loss(
        found.log_prob, advantages, old_log_prob=old, entropy=found.entropy, clip=(CLIP, CLIP), entropy_coef=ENTROPY
    )


def eager_loss(logits, actions, old, advantages):
    policy = torch.distributions.Categorical(logits=logits)
    ratio = (policy.log_prob(actions) - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.min(ratio * advantages, clipped * advantages).mean() - ENTROPY * policy.entropy().mean()


def train(updates, eager=False, seed=1):
    """The returns of all episodes, and the seconds that losses and steps of the optimiser took."""
    torch.manual_seed(seed)
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    envs = gymnasium.make_vec("CartPole-v1", ENVIRONMENTS, vectorization_mode="sync", vector_kwargs=mode)
    policy, critic, loss_of = network(envs.single_action_space.n), network(1), eager_loss if eager else fused_loss
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-3, eps=1e-5)
    state, returns, running, spent = torch.as_tensor(envs.reset(seed=seed)[0]), [], torch.zeros(ENVIRONMENTS), 0.0
    for _ in range(updates):
        states, actions = torch.zeros(STEPS, ENVIRONMENTS, 4), torch.zeros(STEPS, ENVIRONMENTS, dtype=torch.int64)
        rewards, dones = torch.zeros(STEPS, ENVIRONMENTS), torch.zeros(STEPS, ENVIRONMENTS, dtype=torch.bool)
        for t in range(STEPS):
            with torch.no_grad():
                states[t], actions[t] = state, torch.multinomial(policy(state).softmax(-1), 1)[:, 0]
            after, reward, ended, cut, info = envs.step(actions[t].numpy())
            state, rewards[t], dones[t] = torch.as_tensor(after), torch.as_tensor(reward), torch.as_tensor(ended | cut)
            running += rewards[t]
            for i in (cut & ~ended).nonzero()[0]:  # the state that was cut off has a value; the next one is another
                rewards[t, i] += GAMMA * critic(torch.as_tensor(info["final_obs"][i])).item()
            returns += running[dones[t]].tolist()
            running[dones[t]] = 0.0
        begin = time.perf_counter()
        with torch.no_grad():
            values = critic(torch.cat([states, state[None]])).squeeze(-1)
            old = torch.log_softmax(policy(states), -1).gather(-1, actions[..., None]).flatten()
            advantages, targets = pk.gae(rewards, values, dones, gamma=GAMMA, lam=LAMBDA)
        rows = states.flatten(0, 1), actions.flatten(), old, advantages.flatten(), targets.flatten()
        for order in (torch.randperm(len(old)) for _ in range(EPOCHS)):
            for part in order.chunk(MINIBATCHES):
                x, a, before, adv, target = (each[part] for each in rows)
                loss = loss_of(policy(x), a, before, (adv - adv.mean()) / (adv.std() + 1e-8))
                loss = loss + 0.5 * nn.functional.mse_loss(critic(x).squeeze(-1), target)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
                optimizer.step()
        spent += time.perf_counter() - begin
    return returns, spent


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--updates", type=int, default=60)
    arguments = parser.parse_args()
    found, seconds = train(arguments.updates, arguments.eager)
    print(f"return {sum(found[-50:]) / 50:.0f} over the last 50 of {len(found)} episodes, {seconds:.1f} s in updates")
