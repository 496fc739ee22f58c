"""Advantages against formulas of their own, by hand, and groups whose rewards are all equal."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import po_kernels as pk

from .cases import ADVANTAGES, SURROGATE_LOSSES, cotangent_like, distance, draw, largest, pairs, serving

EVERYWHERE = pytest.mark.parametrize("backend", serving("group_advantage"))


def standardized(rewards: Tensor, held: Tensor) -> Tensor:
    equal = (rewards == rewards[0]).all(0)
    variance = torch.where(equal, 1.0, rewards.var(0, unbiased=False))
    return torch.where(equal, 0.0, (rewards - rewards.mean(0)) / (variance.sqrt() + 1e-6))


# Advantages of rewards (G, *), which are smooth in them; what a kind holds constant it takes from `held`, the same
# rewards without a derivative.
ORACLE = {
    "none": lambda rewards, held: rewards,
    "min": lambda rewards, held: rewards - held.amin(0),
    "mean": lambda rewards, held: rewards - rewards.mean(0),
    "loo": lambda rewards, held: rewards - (rewards.sum(0) - rewards) / (len(rewards) - 1),
    "standardized": standardized,
}


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_the_oracle_itself(kind):
    rewards = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    held = rewards.detach().clone()
    assert gradcheck(lambda r: ORACLE[kind](r, held), rewards)
    assert gradgradcheck(lambda r: ORACLE[kind](r, held), rewards)


@EVERYWHERE
@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize("kind", ADVANTAGES)
def test_the_derivatives_are_those_of_the_oracle(backend, kind, gamma):
    """In reverse and in forward mode, to second order."""
    case = draw("group_advantage", 1, lead=(2,), group=4, kind=kind, rbf_gamma=gamma)
    (rewards,) = case.tensors.values()
    weight, along = cotangent_like(rewards, 0), cotangent_like(rewards, 1)

    def oracle(r):
        r = r if gamma is None else torch.exp(gamma * r)
        return ORACLE[kind](r, r.detach())

    def op(r):
        return case(r, backend=backend)

    for transform in (
        lambda f: f(rewards),
        lambda f: torch.func.jvp(f, (rewards,), (along,))[1],
        lambda f: torch.func.vjp(f, rewards)[1](weight)[0],
        lambda f: torch.func.hessian(lambda r: (f(r) * weight).sum() + f(r).square().sum())(rewards),
    ):
        found, expected = transform(op), transform(oracle)
        # Some tens of float64 operations an entry, whose terms are within 1e2 of the largest entry.
        assert distance([found], [expected]) <= 1e-12 * (1 + largest([expected]))


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_hand(backend, dtype):
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=dtype)
    std = math.sqrt(14 / 3)
    expected = {
        "none": [1.0, 2.0, 6.0],
        "min": [0.0, 1.0, 5.0],
        "mean": [-2.0, -1.0, 3.0],
        "loo": [1 - 4.0, 2 - 3.5, 6 - 1.5],
        "standardized": [-2 / (std + 1e-6), -1 / (std + 1e-6), 3 / (std + 1e-6)],
    }
    for kind in ADVANTAGES:
        found = pk.group_advantage(rewards, kind, backend=backend)
        assert found.dtype == dtype
        assert torch.allclose(found, torch.tensor(expected[kind], dtype=dtype), rtol=4 * torch.finfo(dtype).eps)


@EVERYWHERE
def test_rbf(backend):
    rewards = torch.randn(4, 3, dtype=torch.float64)
    for kind in ADVANTAGES:
        found = pk.group_advantage(rewards, kind, rbf_gamma=0.7, backend=backend)
        assert torch.allclose(found, pk.group_advantage(torch.exp(0.7 * rewards), kind, backend=backend), rtol=1e-13)


@EVERYWHERE
def test_any_leading_dimensions(backend):
    for shape in ((4,), (4, 1), (4, 2, 3), (4, 0), (4, 2, 0, 3)):
        rewards = torch.randn(shape, dtype=torch.float64)
        for kind in ADVANTAGES:
            found = pk.group_advantage(rewards, kind, backend=backend)
            flat = pk.group_advantage(rewards.reshape(4, -1), kind, backend=backend)
            assert torch.equal(found, flat.reshape(shape))


@EVERYWHERE
@pytest.mark.parametrize("reward", [0.0, 0.1, 1e-30, -3.7e20, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_standardized(backend, dtype, reward):
    """0.1 three times does not have the mean 0.1 in floating point, and still has no spread."""
    for group in (1, 2, 3, 7):
        rewards = torch.full((group, 2), reward, dtype=dtype, requires_grad=True)
        found = pk.group_advantage(rewards, "standardized", backend=backend)
        weight = torch.randn(group, 2, dtype=dtype)
        (first,) = grad((found * weight).sum(), rewards, create_graph=True)
        (second,) = grad((first * weight).sum() + 0 * rewards.sum(), rewards)
        for x in (found, first, second):
            assert torch.equal(x, torch.zeros_like(x))


@EVERYWHERE
@pytest.mark.parametrize("kind", ["mean", "loo"])
def test_equal_rewards_are_centred_exactly(backend, kind):
    rewards = torch.full((3, 2), 0.1)
    assert torch.equal(pk.group_advantage(rewards, kind, backend=backend), torch.zeros(3, 2))


@pytest.mark.parametrize(("op", "backend"), pairs(SURROGATE_LOSSES))
def test_equal_rewards_in_a_loss(op, backend):
    """Only the entropy moves the policy, and rewards have the derivative of their mean."""
    for reward in (0.0, 0.1, -5.3):
        case = draw(op, 0, lead=(2,), dim=2, group=3, mask=False, rbf_gamma=None)
        case = case.with_options(estimator="dice", advantage="standardized", entropy_coef=0.0, reduction="sum")
        *policy, rewards = case.inputs
        rewards = torch.full_like(rewards, reward).requires_grad_()
        loss, stats = case(*policy, rewards, backend=backend, return_stats=True)
        first = grad(loss, (*policy, rewards), create_graph=True)
        second = grad(sum(g.square().sum() for g in first), (*policy, rewards), materialize_grads=True)
        for x in (*first[:-1], *second, stats.advantage_std, stats.reward_std):
            assert torch.equal(x, torch.zeros_like(x))
        assert torch.allclose(first[-1], torch.full_like(rewards, -1 / 3), rtol=1e-14)


@pytest.mark.parametrize("backend", serving("group_advantage"))
def test_standardized_neither_hides_a_nan_nor_overflows(backend):
    bad = pk.group_advantage(torch.tensor([[float("nan")], [0.0], [1.0]]), "standardized", backend=backend)
    assert bad.isnan().all()
    for size in (1e30, 1e-30):
        rewards = torch.tensor([[size], [0.0], [0.0]])
        found = pk.group_advantage(rewards, "standardized", backend=backend)
        std = size * (2 / 9) ** 0.5
        expected = torch.tensor([[2 / 3], [-1 / 3], [-1 / 3]]) * (size / (std + 1e-6))
        # Deviation, square, mean, root and quotient: eight roundings.
        torch.testing.assert_close(found, expected, rtol=8 * 1.2e-7, atol=1e-37)
