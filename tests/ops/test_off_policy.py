"""Importance weights against their definition, exact divergences of tokens, and groups by index."""

import math
from functools import partial

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

import po_kernels as pk

from .bounds import near
from .cases import ADVANTAGES, largest
from .test_advantage import ORACLE

INF = math.inf


def weights_by_hand(delta, mask, level, mode, low, high):
    rows = []
    for row, inside in zip(delta.tolist(), mask.tolist(), strict=True):
        total = math.exp(sum(d for d, m in zip(row, inside, strict=True) if m))
        w = [total if level == "sequence" else math.exp(d) for d in row]
        held = [min(max(x, low), high) if mode == "truncate" else x * (low <= x <= high) for x in w]
        rows.append([x * m for x, m in zip(held, inside, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights(level, mode):
    log_prob, sampler = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.7
    for low, high in ((None, 2.0), (0.5, None), (0.5, 2.0), (None, None)):
        found = pk.importance_weights(
            log_prob.masked_fill(~mask, INF).requires_grad_(), sampler, mask, level=level, mode=mode, bounds=(low, high)
        )
        limits = (-INF if low is None else low, INF if high is None else high)
        right = weights_by_hand(log_prob - sampler, mask, level, mode, *limits)
        # A sum of 5 numbers, by whose size its exponential errs.
        size = 1 + (log_prob - sampler).abs().masked_fill(~mask, 0.0).sum(1).max().item()
        near(found, right, 5 + 2, size * max(1.0, largest([right])))
        assert not found.requires_grad


def test_weights_of_a_sampler_that_left_out_tokens():
    """It drew from its two best tokens, renormalised, and so does the policy that it is compared with."""
    logits = torch.randn(3, 5, dtype=torch.float64)
    kept = logits.topk(2, dim=-1).indices
    sampler = torch.log_softmax(logits.gather(-1, kept), -1)[:, 0]
    policy = torch.log_softmax(logits, -1)
    found = pk.importance_weights(
        policy.gather(-1, kept)[:, 0], sampler, None, level="token", mode="mask", bounds=(None, 2.0),
        log_support=policy.gather(-1, kept).logsumexp(-1),
    )  # fmt: skip
    # Three logarithms of sums, of up to 5 terms each, and what is made of them.
    near(found, torch.ones(3, dtype=torch.float64), 3 * (5 + 2) + 3, 1 + largest([policy]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"level": "tokens"}, ValueError, "level: expected one of 'token'"),
        ({"mode": "clip"}, ValueError, "mode: expected one of 'truncate'"),
        ({"bounds": 2.0}, TypeError, "bounds: expected two numbers"),
        ({"bounds": (2.0, 1.0)}, ValueError, "bounds: expected numbers of at least 0 that rise"),
        ({"bounds": (-1.0, 1.0)}, ValueError, "bounds: expected numbers of at least 0 that rise"),
        ({"mask": torch.full((2, 3), 0.5)}, ValueError, "mask: expected True and False"),
        ({"sampler_log_prob": torch.zeros(2)}, ValueError, "sampler_log_prob: expected shape"),
        ({"log_support": torch.zeros(2)}, ValueError, "log_support: expected shape"),
        ({"log_prob": torch.zeros(())}, ValueError, "log_prob: expected shape"),
    ],
)
def test_bad_weights_are_named(change, error, message):
    good = {"log_prob": torch.zeros(2, 3), "sampler_log_prob": torch.zeros(2, 3), "mask": None, "level": "token",
            "mode": "truncate", "bounds": (None, 2.0)}  # fmt: skip
    with pytest.raises(error, match=f"importance_weights: {message}"):
        pk.importance_weights(**{**good, **change})


def test_token_kl_is_that_of_torch():
    p, q = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    for temperature in (1.0, 0.7):
        log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (p, q))
        for direction, first, second in (("reverse", log_p, log_q), ("forward", log_q, log_p)):
            right = torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(-1)
            found = pk.token_kl(p, q, temperature=temperature, direction=direction)
            near(found, right, 3 * 6 + 5, 1 + largest([log_p, log_q]))  # two logarithms and one sum of 6 terms
            assert gradcheck(partial(pk.token_kl, direction=direction), (p[0].requires_grad_(), q[0]))
    few = [x[0, :2].clone().requires_grad_() for x in (p, q)]
    assert gradgradcheck(pk.token_kl, few)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_token_kl_with_masked_tokens(direction):
    """A column that neither has changes nothing, in any derivative; one that only the second has adds nothing."""
    p, q = torch.randn(2, 2, 4, dtype=torch.float64)
    hidden = torch.full((2, 1), -INF, dtype=torch.float64)
    plain, wide = [p, q], [torch.cat([hidden, x], 1) for x in (p, q)]
    results = []
    for inputs in (plain, wide):
        inputs = [x.clone().requires_grad_() for x in inputs]
        value = pk.token_kl(*inputs, direction=direction)
        first = grad(value.sum(), inputs, create_graph=True)
        second = grad(sum((g * g.detach().sin()).sum() for g in first), inputs)
        results.append([value, *(x[:, -4:] for x in (*first, *second))])
        for x in (*first, *second):
            assert not x[:, :-4].any()
    for x, y in zip(*results, strict=True):  # as above, of 4 terms, and twice as much a derivative
        near(x, y, 4 * (3 * 4 + 5))
    some = [torch.cat([hidden, p], 1), torch.cat([0 * p[:, :1], q], 1)]
    found = pk.token_kl(*(some if direction == "reverse" else some[::-1]), direction=direction)
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(some[1], -1)[:, 1:]
    near(found, (log_p.exp() * (log_p - log_q)).sum(-1), 3 * 5 + 5, 1 + largest([log_p, log_q]))
    assert pk.token_kl(*(some[::-1] if direction == "reverse" else some), direction=direction).isposinf().all()


def test_bad_input_of_token_kl_is_named():
    x = torch.zeros(2, 3)
    for change, error, message in (
        ({"ref_logits": torch.zeros(2, 4)}, ValueError, "ref_logits: expected shape"),
        ({"logits": torch.tensor(0.0)}, ValueError, "logits: expected shape"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number"),
        ({"direction": "backward"}, ValueError, "direction: expected one of 'reverse', 'forward'"),
        ({"ref_logits": torch.tensor([[0.0] * 3, [-INF] * 3])}, ValueError, "ref_logits: expected a logit above -inf"),
    ):
        with pytest.raises(error, match=f"token_kl: {message}"):
            pk.token_kl(**{"logits": x, "ref_logits": x, **change})


# Groups by index.

INDEX = torch.tensor([7, -3, 7, 100, 7, -3, 100, 100, 100])


def std(r, ddof, eps):
    equal = (r == r[0]).all()
    return torch.where(equal, 0.0, (r - r.mean()) / (torch.where(equal, 1.0, r.var(correction=ddof)).sqrt() + eps))


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize(("ddof", "eps"), [(0, 1e-6), (1, 1e-4)])
def test_groups_by_index(kind, ddof, eps):
    """Each group by itself, wherever its members stand, with first and second derivatives."""
    rewards = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def right(rewards):
        found = torch.zeros_like(rewards)
        for number in INDEX.unique():
            r = rewards[number == INDEX]
            each = std(r, ddof, eps) if kind == "standardized" else ORACLE[kind](r, r.detach())
            found = found.masked_scatter(number == INDEX, each)
        return found

    def op(rewards):
        return pk.group_advantage(rewards, kind, index=INDEX, std_ddof=ddof, std_eps=eps)

    # A mean and a deviation, of up to 4, and some operations, of numbers in units of the deviation, which the
    # derivatives are divided by, once and twice.
    few = 2 * 4 + 12
    unit = max(1.0, 1 / min(rewards[number == INDEX].std().item() for number in INDEX.unique()))
    near(op(rewards), right(rewards), few, unit)
    weight = torch.randn(9, dtype=torch.float64)
    for function in (lambda f: (f(rewards) * weight).sum(), lambda f: f(rewards).pow(3).sum()):
        first = [grad(function(f), rewards, create_graph=True)[0] for f in (op, right)]
        near(*first, 2 * few, unit * max(unit, largest(first)))
        second = [grad((g * weight).sum() + 0 * rewards.sum(), rewards)[0] for g in first]
        near(*second, 4 * few, unit**2 * max(unit, largest(second)))
    equal_sizes = torch.arange(3).repeat(3)
    options = {"rbf_gamma": 0.3, "std_ddof": ddof, "std_eps": eps}
    by_index = pk.group_advantage(rewards, kind, index=equal_sizes, **options)
    unit = max(1.0, 1 / (0.3 * rewards).exp().reshape(3, 3).std(1).min().item())
    near(pk.group_advantage(rewards.reshape(3, 3), kind, **options).reshape(-1), by_index, few, unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mean", "loo", "standardized"])
def test_groups_that_say_nothing(kind, dtype):
    """Those of equal rewards, and of one: 0, and no derivative. verl gives a sample alone its own reward."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 5.0, -3.0, 1e30, 2.0], dtype=dtype, requires_grad=True)
    index = torch.tensor([0, 0, 0, 1, 2, 3, 4])
    for ddof in (0, 1):
        found = pk.group_advantage(rewards, kind, index=index, std_ddof=ddof)
        (first,) = grad((found * torch.arange(7)).sum(), rewards, create_graph=True)
        zeros = torch.zeros(7, dtype=dtype)
        assert torch.equal(found, zeros)
        assert found.dtype == dtype
        if kind == "standardized":
            assert torch.equal(first, zeros)
        assert not first[3:].any()
    assert torch.equal(pk.group_advantage(torch.ones(1, 2), "standardized", std_ddof=1), torch.zeros(1, 2))


def test_the_constants_of_trl_and_verl():
    rewards = torch.randn(8, 3)
    for eps in (1e-4, 1e-6):
        found = pk.group_advantage(rewards, "standardized", std_ddof=1, std_eps=eps)
        right = (rewards - rewards.mean(0)) / (rewards.std(0) + eps)
        near(found, right, 2 * 8 + 4)  # a mean and a deviation of 8
    usual = pk.group_advantage(rewards, "standardized", std_ddof=0, std_eps=1e-6)
    assert torch.equal(usual, pk.group_advantage(rewards, "standardized"))


def test_groups_by_index_under_transforms():
    rewards = torch.randn(9, dtype=torch.float64)

    def op(rewards, index=INDEX):
        return pk.group_advantage(rewards, "standardized", index=index, std_ddof=1)

    found = torch.func.vmap(op)(torch.stack([rewards, rewards]), torch.stack([INDEX, INDEX.flip(0)]))
    few, unit = 2 * 4 + 12, max(1.0, 1 / min(rewards[number == INDEX].std().item() for number in INDEX.unique()))
    near(found, torch.stack([op(rewards), op(rewards, INDEX.flip(0))]), few, unit)
    near(torch.func.jacfwd(op)(rewards), torch.func.jacrev(op)(rewards), 2 * few, unit**2)


def test_bad_groups_are_named():
    x = torch.zeros(4)
    for change, error, message in (
        ({"index": torch.zeros(4)}, TypeError, "index: expected an integer tensor"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, ValueError, "index: expected shape"),
        ({"index": torch.zeros(4, dtype=torch.int64), "rewards": torch.zeros(4, 1)}, ValueError, "rewards: expected"),
        ({"std_ddof": -1}, ValueError, "std_ddof: expected an integer of at least 0"),
        ({"std_ddof": 0.5}, TypeError, "std_ddof: expected an integer"),
        ({"std_eps": -1e-3}, ValueError, "std_eps: expected a number of at least 0"),
        ({"std_ddof": 2}, ValueError, "std_ddof: expected 0 or 1, got 2"),
        (
            {"kind": "standardized", "std_ddof": 1, "backend": "native"},
            RuntimeError,
            "backend 'native' was asked for",
        ),
        ({"kind": "standardized", "std_ddof": 1, "backend": "nativ"}, ValueError, "backend: expected one of 'native'"),
    ):
        with pytest.raises(error, match=f"group_advantage: {message}"):
            pk.group_advantage(**{"rewards": x, **change})
    with pk.use_backend("native"), pytest.raises(RuntimeError, match="group_advantage: backend 'native'"):
        pk.group_advantage(x, index=torch.zeros(4, dtype=torch.int64))


def test_a_token_that_the_reference_lacks_is_infinitely_far():
    """However little the policy has of it."""
    for rare in (-50.0, -200.0):
        assert pk.token_kl(torch.tensor([0.0, rare]), torch.tensor([0.0, -math.inf])) == math.inf


def test_ragged_groups_compile():
    index, rewards = torch.tensor([0, 0, 1, 1]), torch.randn(4)
    for options in ({"index": index}, {"kind": "standardized", "std_ddof": 1}):
        compiled = torch.compile(lambda r, o=options: pk.group_advantage(r, **o), backend="aot_eager", fullgraph=True)
        near(compiled(rewards), pk.group_advantage(rewards, **options), 2 * 4 + 12)


def test_ragged_groups_of_any_number_are_exported():
    class Module(torch.nn.Module):
        def forward(self, rewards, index):
            return pk.group_advantage(rewards, "mean", index=index)

    size = torch.export.Dim("size", min=2)
    example = torch.randn(5), torch.tensor([7, 7, 0, 3, 3])
    program = torch.export.export(Module(), example, dynamic_shapes=({0: size}, {0: size}))
    for rewards, index in (example, (torch.tensor([1.0, 3.0]), torch.tensor([-2, -2]))):
        assert torch.equal(program.module()(rewards, index), Module()(rewards, index))
