"""Presets against the losses of TRL, of verl and of the papers, transcribed: per-token losses, and how they are summed.

`test_policy_packages.py` has the packages themselves.
"""

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

import po_kernels as pk
from po_kernels.ops.presets import PRESETS

B, T = 5, 6
LENGTHS = torch.tensor([6, 2, 4, 1, 5])


def batch(seed=0, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    log_prob, noise, far = (torch.randn(B, T, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(T) < LENGTHS.unsqueeze(1)
    # A token far off each bound of 10 and 20, one on each side, in sequences of their own.
    old = log_prob + spread * noise
    old[0, 0] += 25.0
    old[2, 1] -= 25.0
    return log_prob, old, log_prob + 0.3 * far, torch.randn(B, generator=generator, dtype=torch.float64), mask


def mean_of(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(1) / mask.sum(1)


def clipped(ratio: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return -torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


# (log_prob, old, A (B, 1), mask) -> per-token losses, or (B, 1) per-sequence ones.


def trl_sequence(lp, old, A, mask, low, high):
    return clipped(mean_of(lp - old, mask).exp().unsqueeze(1), A, low, high)


def verl_vanilla(lp, old, A, mask):
    ratio = (lp - old).clamp(-20, 20).exp()
    usual = clipped(ratio, A, 0.2, 0.2)
    return torch.where(A < 0, torch.min(usual, -3.0 * A), usual)


def verl_gspo(lp, old, A, mask):
    level = lp - lp.detach() + mean_of(lp - old, mask).detach().unsqueeze(1)
    return clipped(level.clamp(max=10.0).exp(), A, 3e-4, 4e-4)


def cispo(ratio, lp, A, low, high):
    return -ratio.clamp(low, high).detach() * A * lp


def sapo(ratio, A):
    tau = torch.where(A > 0, torch.full_like(A, 1.0), torch.full_like(A, 1.05))
    return -A * torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def gmpo(lp, old, A, mask):
    """The sign of A decides which side is clipped, in the logarithm."""
    sign, delta = A.sign(), lp - old
    kept = sign * torch.min(sign * delta, sign * delta.clamp(-0.4, 0.4))
    return -A * mean_of(kept, mask).exp().unsqueeze(1)


def vespo(lp, old, A, mask):
    total = ((lp - old).clamp(-20, 20) * mask).sum(1, keepdim=True).clamp(-18.42, 20).detach()
    k, rate = (torch.where(A >= 0, x, y) for x, y in ((2.0, 3.0), (3.0, 2.0)))
    return -A * lp * torch.exp(rate + k * total - rate * total.exp())


def over_tokens(x, mask):
    return (x * mask).sum() / mask.sum()


def over_sequences(x, mask):
    return mean_of(x, mask).mean()


def plain(low, high):
    return lambda lp, old, A, mask: clipped((lp - old).exp(), A, low, high)


LOSSES = {
    "ppo": (plain(0.2, 0.2), over_tokens),
    "ppo_verl": (verl_vanilla, over_tokens),
    "grpo": (plain(0.2, 0.2), over_sequences),
    "bnpo": (plain(0.2, 0.2), over_tokens),
    "dapo": (plain(0.2, 0.28), over_tokens),
    "dr_grpo": (plain(0.2, 0.2), lambda x, mask: (x * mask).sum() / (B * T)),
    "gspo": (lambda *args: trl_sequence(*args, 3e-4, 4e-4), over_sequences),
    "gspo_verl": (verl_gspo, over_sequences),
    "luspo": (
        lambda *args: trl_sequence(*args, 0.2, 0.2), lambda x, mask: (x * mask.sum(1, keepdim=True)).mean()
    ),
    "cispo": (lambda lp, old, A, mask: cispo((lp - old).exp(), lp, A, None, 5.0), over_tokens),
    "cispo_verl": (lambda lp, old, A, mask: cispo((lp - old).clamp(-20, 20).exp(), lp, A, 0.8, 1.2), over_tokens),
    "sapo": (lambda lp, old, A, mask: sapo((lp - old).exp(), A), over_sequences),
    "sapo_verl": (lambda lp, old, A, mask: sapo((lp - old).clamp(-20, 20).exp(), A), over_sequences),
    "gmpo": (gmpo, lambda x, mask: x.mean()),
    "vespo": (vespo, over_tokens),
    "rloo": (
        lambda lp, old, A, mask: clipped(((lp - old) * mask).sum(1, keepdim=True).exp(), A, 0.2, 0.2),
        lambda x, mask: x.mean(),
    ),
    "dice": (
        lambda lp, old, A, mask: -A * ((lp - old) * mask).sum(1, keepdim=True).exp(), lambda x, mask: x.mean()
    ),
    "reinforce": (lambda lp, old, A, mask: -A * lp, lambda x, mask: (x * mask).sum(1).mean()),
    "gpg": (lambda lp, old, A, mask: -A * lp, over_tokens),
}  # fmt: skip


def agree(found, expected, *inputs, tolerance=1e-12):
    """Values and gradients, to rounding: exp(25) is 7e10, and some tens of operations have its relative error."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.1 * tolerance)
    for x, y in zip(grad(found, inputs), grad(expected, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=0.1 * tolerance)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_loss_that_it_is_named_after(name):
    log_prob, old, _, A, mask = batch()
    log_prob.requires_grad_()
    A.requires_grad_()
    tokens, total = LOSSES[name]
    if name in ("dice", "rloo"):  # whose weights of sequences would be exp(25)
        old = log_prob.detach() + 0.1
    found = pk.policy_loss(log_prob, A, old_log_prob=old, mask=mask, **pk.policy_loss_preset(name))
    expected = total(tokens(log_prob, old, A.unsqueeze(1), mask), mask)
    agree(found, expected, log_prob, A)


@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n].options.get("kl_placement") == "loss"])
def test_the_divergence_of_a_preset(name):
    """TRL adds β·k3 to each token, a sequence's term counting for each of its tokens."""
    log_prob, _, ref, A, mask = batch()
    log_prob.requires_grad_()
    options = pk.policy_loss_preset(name)
    chosen = {"old_log_prob": log_prob.detach() + 0.1, "mask": mask, **options}
    found = pk.policy_loss(log_prob, A, ref_log_prob=ref, kl_coef=0.04, **chosen)
    k3 = torch.exp(ref - log_prob) - (ref - log_prob) - 1
    total = {
        "token_mean": over_tokens, "seq_mean_token_mean": over_sequences,
        "seq_mean_token_sum": lambda x, mask: (x * mask).sum(1).mean(),
        "seq_mean_token_sum_norm": lambda x, mask: (x * mask).sum() / (B * T),
    }[options["aggregation"]]  # fmt: skip
    agree(found, pk.policy_loss(log_prob, A, **chosen) + 0.04 * total(k3, mask), log_prob)


def test_the_divergence_of_rloo_is_in_its_rewards():
    """TRL takes the sequence's sum of old - ref from the reward; without a baseline between, from A."""
    log_prob, _, ref, A, mask = batch()
    log_prob.requires_grad_()
    chosen = {"mask": mask, **pk.policy_loss_preset("rloo")}
    k1 = ((log_prob - ref) * mask).sum(1).detach()
    found = pk.policy_loss(log_prob, A, ref_log_prob=ref, kl_coef=0.04, **chosen)
    agree(found, pk.policy_loss(log_prob, A - 0.04 * k1, **chosen), log_prob)


def test_delta_of_trl_is_dual_clip():
    log_prob, old, _, A, mask = batch()
    log_prob.requires_grad_()
    for delta in (1.2, 1.5, 3.0):
        ratio, a = (log_prob - old).exp(), A.unsqueeze(1)
        tokens = -torch.min(ratio.clamp(max=delta) * a, ratio.clamp(0.8, 1.2) * a)
        found = pk.policy_loss(log_prob, A, old_log_prob=old, mask=mask, dual_clip=delta)
        agree(found, over_tokens(tokens, mask), log_prob)


def test_empty_sequences_of_trl_and_verl():
    """TRL counts a sequence without a token, as B does here; verl does not, which normalizer says."""
    log_prob, _, _, A, mask = batch()
    mask[1] = False
    tokens = torch.where(mask, -A.unsqueeze(1), 0.0)
    means = tokens.sum(1) / mask.sum(1).clamp(min=1)
    options = {"mask": mask, **pk.policy_loss_preset("grpo")}
    torch.testing.assert_close(pk.policy_loss(log_prob, A, **options), means.sum() / B, rtol=1e-13, atol=0)
    found = pk.policy_loss(log_prob, A, **options, normalizer=mask.any(1).sum())
    torch.testing.assert_close(found, means.sum() / (B - 1), rtol=1e-13, atol=0)


def test_bounds_of_cispo():
    """(None, hi) is TRL's, (1-ε, 1+ε) verl's, which numbers below 1 say too."""
    log_prob, old, _, A, mask = batch()
    chosen = {"old_log_prob": old, "mask": mask, "surrogate": "cispo"}
    ratio = (log_prob - old).exp()
    for clip, low, high in (((None, 5.0), None, 5.0), ((0.8, 1.2), 0.8, 1.2), ((0.2, 0.2), 0.8, 1.2)):
        found = pk.policy_loss(log_prob, A, **chosen, clip=clip)
        expected = over_tokens(cispo(ratio, log_prob, A.unsqueeze(1), low, high), mask)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_presets_are_copies_and_the_unknown_names_the_known():
    pk.policy_loss_preset("ppo")["clip"] = None
    assert pk.policy_loss_preset("ppo")["clip"] == (0.2, 0.2)
    for name in ("grpo ", 3):
        with pytest.raises(ValueError, match=r"policy_loss_preset: name: expected one of 'ppo', .*'rloo'"):
            pk.policy_loss_preset(name)
    for name in PRESETS:
        assert f'"{name}"' in pk.policy_loss_preset.__doc__
