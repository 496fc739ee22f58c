"""Ensembles of models of a noisy pendulum, by likelihood and under a learned reward, in seconds.

pip install . && python examples/dynamics_ensemble.py
"""

import math

import torch
from po_bilevel import (
    Batch,
    BilevelTrainer,
    GaussianPolicy,
    MahalanobisReward,
    MLPGaussian,
    PolicyGradient,
    train_ensemble,
)

NOISE, LOSS = torch.tensor([0.02, 0.1]), PolicyGradient(entropy_coef=1.0)


def transitions(rows, reach=math.pi / 2):
    """Angles up to `reach` with velocity and torque, and how angle and velocity change in 0.05 s."""
    angle, velocity, torque = (2 * torch.rand(rows, 3) - 1).mul(torch.tensor([reach, 4.0, 2.0])).unbind(-1)
    faster = 0.05 * (15 * angle.sin() + 3 * torque)
    change = torch.stack([0.05 * (velocity + faster), faster], -1) + NOISE * torch.randn(rows, 2)
    return Batch(torch.stack([angle.cos(), angle.sin(), velocity / 4, torque / 2], -1), change)


def ensemble(members, data, steps, reward=None):
    """Models of rows drawn with replacement, each from weights of its own; by likelihood without a reward."""
    torch.manual_seed(1)
    policies = [MLPGaussian(4, 2, hidden=(32, 32)) for _ in range(members)]
    if reward is not None:
        for policy in policies:  # the spread that it asks for, σ² = λ / 2u, is far for adam
            policy.log_std.data = -0.5 * (2 * reward.precision().detach()).log()
    draws = [data.rows(torch.randint(len(data.inputs), (len(data.inputs),))) for _ in policies]
    optimizers = [torch.optim.Adam(policy.parameters(), lr=3e-3) for policy in policies]
    train_ensemble(policies, reward, draws, optimizers, steps, loss=reward and LOSS, batch_size=64)
    return policies


def learned_reward(mean, target):
    """The U that makes targets likeliest around a mean; it is learned in units of the residuals, where it is near 1."""
    unit = (target - mean).std(0)
    rows, reward = Batch(mean / unit, target / unit), MahalanobisReward(2)
    BilevelTrainer(
        GaussianPolicy(torch.nn.Identity(), None, 2), reward, inner_data=rows, outer_data=rows, inner_loss=LOSS,
        inner_optimizer=lambda parameters: torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe"), inner_steps=5,
        keep_inner_state=False, outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.1), progress=False,
    ).fit(60)  # fmt: skip
    return MahalanobisReward(2, start=reward.precision().detach() / unit**2)


@torch.no_grad()
def judged(policies, test, beyond):
    """Log-likelihood of the mixture in nats a row, σ, and how far the means are apart where data were, and beyond."""
    log_probs = torch.stack([policy.log_prob(test.inputs, test.target) for policy in policies])
    std = torch.stack([policy.log_std.exp() for policy in policies]).mean(0)
    means = [torch.stack([policy(rows.inputs)[0] for policy in policies]) for rows in (test, beyond)]
    apart = [round(each.std(0).norm(dim=-1).mean().item(), 4) for each in means]
    return log_probs.logsumexp(0).mean().item() - math.log(len(policies)), std, apart


def compare(members=5, rows=300, held_out=100, steps=2000):
    """What `judged` finds of both, trained on all rows, of which some are held out while the reward is learned."""
    torch.manual_seed(0)
    data, test, beyond = transitions(rows + held_out), transitions(2000), transitions(2000, math.pi)
    fit, rest = data.rows(torch.arange(rows)), data.rows(torch.arange(rows, rows + held_out))
    mean = sum(policy(rest.inputs)[0].detach() for policy in ensemble(members, fit, steps)) / members
    ways = {"likelihood": None, "learned reward": learned_reward(mean, rest.target)}
    return {name: judged(ensemble(members, data, steps, way), test, beyond) for name, way in ways.items()}


if __name__ == "__main__":
    best = -(NOISE * math.sqrt(2 * math.pi * math.e)).log().sum()
    print(f"noise itself    {best:.3f} nats a row; σ", NOISE)
    for name, (likelihood, std, apart) in compare().items():
        print(f"{name:15} {likelihood:.3f} nats a row; σ", std, "; means apart by, inside and beyond the data,", apart)
