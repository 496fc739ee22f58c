"""Derivatives of `policy_loss`: against differences, and of the expected reward by enumeration of all strings."""

import itertools

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

import po_kernels as pk
from po_kernels.ops.policy import DIVERGENCES, PLACEMENTS, RATIOS

from .bounds import near
from .cases import DEVICE
from .test_policy import CU_SEQLENS, MASK, B, T, batch, valid

# Roundings of a loss: a sum over all tokens, of terms with up to ten operations and the sum over a sequence in their
# exponent. The numbers are normal, and ratios and weights up to some; a derivative repeats that much.
TERMS = B * T + T + 10

# What stops a gradient that the second derivative needs, and what the error names in its place.
STOPPED = {
    "cispo": "'clip' or 'is'", "vespo": "'is' with ratio='sequence_sum'", "reinforce": "'is' with ratio='sequence_sum'",
    "sequence_mean_token": "'sequence_mean' or 'sequence_sum'",
}  # fmt: skip


ALL = slice(None)


def inputs(seed=0, few=ALL):
    log_prob, A, rest = batch(seed)
    x = [y[few].clone().requires_grad_() for y in (log_prob, A, rest["ref_log_prob"], rest["entropy"])]
    return [*x, torch.tensor(0.1, dtype=torch.float64, requires_grad=True)], rest["old_log_prob"][few]


def function(old, mask=MASK, **chosen):
    def loss(log_prob, A, ref, entropy, coefficient):
        return pk.policy_loss(
            log_prob, A, ref_log_prob=ref, entropy=entropy, entropy_coef=coefficient, old_log_prob=old, mask=mask,
            **{"kl_coef": 0.3, **chosen},
        )  # fmt: skip

    return loss


FEW = slice(0, 2)
# Of functions with a stopped gradient there are no differences to compare with.
SMOOTH = [(r, s) for r, s in valid() if r not in STOPPED and s not in STOPPED]


@pytest.mark.parametrize(("ratio", "surrogate"), SMOOTH)
def test_first_and_second_derivatives(ratio, surrogate):
    """In all inputs."""
    tensors, old = inputs(few=FEW)
    chosen = {"dual_clip": 1.4} if surrogate in ("clip", "is") else {}
    loss = function(old, MASK[FEW], ratio=ratio, surrogate=surrogate, **chosen)
    assert gradcheck(loss, tensors, check_forward_ad=True)
    assert gradgradcheck(loss, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("placement", PLACEMENTS[:2])
@pytest.mark.parametrize("kl", DIVERGENCES)
def test_derivatives_of_divergences(kl, placement):
    tensors, old = inputs(1, FEW)
    loss = function(old, MASK[FEW], kl=kl, kl_placement=placement, aggregation="seq_mean_token_mean")
    assert gradcheck(loss, tensors)
    assert gradgradcheck(loss, tensors, fast_mode=True)


def stopped_gradient(kind, log_prob, A, old):
    """-A times a constant times log_prob, summed: the gradient that a stopped one has."""
    delta = torch.where(MASK, log_prob - old, 0.0).detach()
    if kind == "sequence_mean_token":
        factor = (delta.sum(1) / MASK.sum(1).clamp(min=1)).exp().unsqueeze(1)
    elif kind == "cispo":
        factor = delta.exp().clamp(0.8, 1.2)
    elif kind == "vespo":
        w = delta.sum(1).exp().unsqueeze(1)
        k, rate = (torch.where(A >= 0, x, y).double().unsqueeze(1) for x, y in ((2.0, 3.0), (3.0, 2.0)))
        factor = w**k * torch.exp(rate * (1 - w))
    else:
        factor = torch.ones_like(delta)
    return -(torch.where(MASK, log_prob, 0.0) * factor * A.unsqueeze(1)).sum()


@pytest.mark.parametrize("kind", STOPPED)
def test_where_a_gradient_is_stopped(kind):
    """First and mixed derivatives are right; a second one in log_prob raises, in every mode."""
    (log_prob, A, *_), old = inputs()
    chosen = {"ratio": kind, "surrogate": "is"} if kind in RATIOS else {"surrogate": kind}

    def loss(x, a):
        return pk.policy_loss(x, a, old_log_prob=old, mask=MASK, aggregation="token_sum", **chosen)

    expected = stopped_gradient(kind, log_prob, A, old)
    found = grad(loss(log_prob, A), (log_prob, A), create_graph=True)
    right = grad(expected, log_prob, create_graph=True)[0]
    near(found[0], right, TERMS)
    along = torch.randn_like(log_prob)
    mixed = [grad((g * along).sum(), A, retain_graph=True)[0] for g in (found[0], right)]
    near(*mixed, 2 * TERMS)
    x, a = log_prob.detach(), A.detach()
    by_forward = jvp(lambda a: grad_of(loss, x, a), (a,), (torch.ones_like(a),))[1]
    near((by_forward * along).sum(), mixed[0].sum(), 2 * TERMS)
    for second in (
        lambda: grad(found[0].square().sum(), log_prob),
        lambda: torch.func.grad(lambda x: grad_of(loss, x, a).square().sum())(x),
        lambda: hessian(loss)(x, a),
        lambda: jacrev(jacrev(loss))(x, a),
        lambda: jacfwd(jacfwd(loss))(x, a),
        lambda: jacrev(jacfwd(loss))(x, a),
    ):
        with pytest.raises(RuntimeError, match=f"policy_loss: no second derivative in log_prob: .*{STOPPED[kind]}"):
            second()


def grad_of(loss, x, a):
    return torch.func.grad(loss)(x, a)


@pytest.mark.parametrize("placement", PLACEMENTS[2:])
def test_divergences_with_a_stopped_gradient(placement):
    (log_prob, A, ref, *_), old = inputs()
    for kl in DIVERGENCES:
        if placement == "straight_through" and kl == "k2":
            continue  # it is its own gradient: nothing is stopped
        loss = pk.policy_loss(
            log_prob, A, old_log_prob=old, ref_log_prob=ref, mask=MASK, kl=kl, kl_coef=0.3, kl_placement=placement,
            aggregation="token_sum",
        )  # fmt: skip
        found = grad(loss, log_prob, create_graph=True)[0]
        x = torch.where(MASK, ref - log_prob, 0.0)
        if placement == "reward":
            k = {"k1": -x, "abs": x.abs(), "k2": x.square() / 2, "k3": x.exp() - x - 1}[kl].detach()
            plain = pk.policy_loss(log_prob, A - 0.3 * k.sum(1), old_log_prob=old, mask=MASK, aggregation="token_sum")
        else:
            plain = pk.policy_loss(log_prob, A, old_log_prob=old, mask=MASK, aggregation="token_sum")
            plain = plain + 0.15 * x.square().sum()
        near(found, grad(plain, log_prob)[0], TERMS)
        grad(found.sum(), A, retain_graph=True)
        with pytest.raises(RuntimeError, match="use kl_placement='loss_times_ratio'"):
            grad(found.square().sum(), log_prob)


def test_the_ratio_times_k3_has_the_gradient_of_the_divergence():
    """-ρx a token, of which the expectation is ∇KL: on-policy that of `straight_through` too."""
    (log_prob, A, ref, *_), old = inputs()
    for other in (old, None):
        loss = pk.policy_loss(
            log_prob, 0 * A, old_log_prob=other, ref_log_prob=ref, mask=MASK, kl_coef=1.0, aggregation="token_sum"
        )
        ratio = (log_prob - (log_prob if other is None else other)).exp()
        right = torch.where(MASK, -ratio * (ref - log_prob), 0.0)
        near(grad(loss, log_prob)[0], right.detach(), TERMS)


# Strings of three letters over an alphabet of three, whose policy has a row of logits for each prefix.
STRINGS = torch.tensor(list(itertools.product(range(3), repeat=3)), device=DEVICE)
# Roundings: a sum over 27 strings, of products of a weight and three letters' derivatives, all below 1.
STRING_TERMS = 27 + 3 * 4
PREFIX = torch.stack([0 * STRINGS[:, 0], 1 + STRINGS[:, 0], 4 + 3 * STRINGS[:, 0] + STRINGS[:, 1]], 1)


def log_probs(logits):
    """(13, 3) -> (27, 3), a token's given those before."""
    return torch.log_softmax(logits, -1)[PREFIX, STRINGS]


def policy_and_rewards():
    generator, kind = torch.Generator("cpu").manual_seed(5), {"dtype": torch.float64, "device": "cpu"}
    logits = torch.randn(13, 3, generator=generator, **kind)
    return logits.to(DEVICE), torch.randn(27, generator=generator, **kind).to(DEVICE)


def expected_reward(logits, rewards):
    return (log_probs(logits).sum(1).exp() * rewards).sum()


def expected_loss(logits, rewards, ratio, surrogate="is"):
    """Over all strings, each weighted with its probability, held constant as that of a sample is."""
    x = log_probs(logits)
    weight = log_probs(logits.detach()).sum(1).exp() * 27
    whole = ratio == "sequence_sum"
    return pk.policy_loss(
        x, rewards, weight=weight, ratio=ratio, surrogate=surrogate,
        aggregation="seq_mean_token_mean" if whole else "seq_mean_token_sum",
    )  # fmt: skip


def test_the_gradient_is_exact_for_all_ratios():
    logits, rewards = policy_and_rewards()
    right = torch.func.grad(expected_reward, (0, 1))(logits, rewards)
    for ratio, surrogate in [(r, "is") for r in RATIOS] + [
        ("token", "clip"),
        ("token", "sapo"),
        ("token", "reinforce"),
    ]:
        found = torch.func.grad(expected_loss)(logits, rewards, ratio, surrogate)
        near(-found, right[0], STRING_TERMS)


def test_the_mixed_derivative_is_exact_for_all_ratios():
    logits, rewards = policy_and_rewards()
    right = jacrev(torch.func.grad(expected_reward), 1)(logits, rewards)
    for ratio, surrogate in [(r, "is") for r in RATIOS] + [("token", "reinforce"), ("token", "clip")]:
        found = jacrev(torch.func.grad(expected_loss), 1)(logits, rewards, ratio, surrogate)
        near(-found, right, 2 * STRING_TERMS)


def test_the_hessian_is_exact_for_sequence_sum_alone():
    """The others' exist, and are off by as much as half of it: they are not the Hessian of the expected reward."""
    logits, rewards = policy_and_rewards()
    right = hessian(expected_reward)(logits, rewards)
    largest = right.abs().max().item()

    def error(found):
        return (found - right).abs().max().item()

    near(-hessian(expected_loss)(logits, rewards, "sequence_sum"), right, 3 * STRING_TERMS, largest)
    by_token, by_mean = (error(-hessian(expected_loss)(logits, rewards, r)) for r in ("token", "sequence_mean"))
    weight = log_probs(logits).sum(1).exp()
    log_p = error(hessian(lambda y: (weight * log_probs(y).sum(1) * rewards).sum())(logits))
    for each in (by_token, by_mean, log_p):
        assert 0.5 * largest < each < 1.5 * largest, (by_token, by_mean, log_p, largest)


def test_scale_lost_by_std():
    """Standardised advantages do not change when rewards are scaled; those of the other kinds do."""
    rewards = torch.tensor([1.0, 4.0, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    for kind, least, most in (("standardized", 0.0, 1e-5), ("loo", 1.0, 2.0), ("mean", 1.0, 2.0)):
        along = jvp(lambda r, kind=kind: pk.group_advantage(r, kind), (rewards,), (rewards.detach(),))[1]
        change = along.norm() / pk.group_advantage(rewards, kind).norm()
        assert least <= change.item() <= most, kind


def test_advantages_are_no_constants():
    """dA is neither None nor, under create_graph, without a graph."""
    (log_prob, A, *_), old = inputs()
    for ratio, surrogate in valid():
        loss = pk.policy_loss(log_prob, A, old_log_prob=old, mask=MASK, ratio=ratio, surrogate=surrogate)
        by_policy, by_advantage = grad(loss, (log_prob, A), create_graph=True)
        assert by_policy.requires_grad
        assert by_advantage.any()


@pytest.mark.parametrize(("ratio", "surrogate"), [("token", "cispo"), ("sequence_mean", "clip")])
def test_compiled(ratio, surrogate):
    """Value and gradient in one graph; where autograd differentiates the graph again, what raises still does."""
    tensors, old = inputs()
    loss = function(old, ratio=ratio, surrogate=surrogate)
    expected = grad(loss(*tensors), tensors)
    for compiler in ("aot_eager", "eager"):
        torch._dynamo.reset()
        value = torch.compile(loss, fullgraph=True, backend=compiler)(*tensors)
        found = grad(value, tensors, create_graph=compiler == "eager")
        for x, y in zip(found, expected, strict=True):
            near(x, y, TERMS)
    if ratio in STOPPED or surrogate in STOPPED:
        with pytest.raises(RuntimeError, match="no second derivative in log_prob"):
            grad(found[0].square().sum(), tensors[0])
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.compile(torch.func.grad(loss), fullgraph=True, backend="eager")(*[x.detach() for x in tensors])
    torch._dynamo.reset()


@pytest.mark.parametrize("surrogate", ["clip", "geo_mean", "cispo"])
def test_vmap_over_problems(surrogate):
    log_prob, A, rest = batch()
    scales = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

    def loss(x, a, mask):
        return pk.policy_loss(x, a, old_log_prob=rest["old_log_prob"], mask=mask, surrogate=surrogate)

    def packed(x, a, _):
        old = rest["old_log_prob"][MASK]
        return pk.policy_loss(x[MASK], a, old_log_prob=old, cu_seqlens=CU_SEQLENS, surrogate=surrogate)

    x, a = (y * scales.reshape(3, *[1] * y.ndim) for y in (log_prob, A))
    masks = torch.stack([MASK, MASK, MASK])
    for each in (loss, packed):
        found = vmap(torch.func.grad(each))(x, a, masks)
        expected = torch.stack([torch.func.grad(each)(*y) for y in zip(x, a, masks, strict=True)])
        near(found, expected, TERMS)
