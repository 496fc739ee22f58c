"""Generalised advantage estimation against a loop over steps, on every backend."""

import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

import po_kernels as pk

from .bounds import near
from .cases import serving

EVERYWHERE = pytest.mark.parametrize("backend", serving("gae"))


def loop(rewards, values, dones, gamma, lam, truncated=None):
    """Step by step, in the tensors' own dtype."""
    cut = torch.zeros_like(dones) if truncated is None else truncated
    after = torch.zeros_like(values[0])
    found = []
    for t in reversed(range(len(rewards))):
        ahead = torch.where(dones[t] & ~cut[t], 0.0, gamma * values[t + 1])
        after = torch.where(dones[t] | cut[t], 0.0, gamma * lam * after)
        after = rewards[t] + ahead - values[t] + after
        found.append(after)
    return torch.stack(found[::-1]) if found else rewards.clone()


def trajectories(steps, *shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(steps, *shape, generator=generator, dtype=dtype)
    values = torch.randn(steps + 1, *shape, generator=generator, dtype=dtype)
    ends, cut = (torch.rand(steps, *shape, generator=generator) < 0.15 for _ in range(2))
    return rewards, values, ends, cut


@EVERYWHERE
@pytest.mark.parametrize("shape", [(), (1,), (5,), (16,), (33,), (2, 3), (0,)])
def test_it_is_the_loop(backend, shape):
    for steps in (0, 1, 2, 7, 64):
        rewards, values, ends, cut = trajectories(steps, *shape)
        for truncated in (None, cut, cut & ends):
            for gamma, lam in ((0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 1.0)):
                A, returns = pk.gae(rewards, values, ends, gamma=gamma, lam=lam, truncated=truncated, backend=backend)
                expected = loop(rewards, values, ends, gamma, lam, truncated)
                near(A, expected, 4 * steps)  # each step is two products and two sums
                assert torch.equal(returns, A + values[:-1])


@EVERYWHERE
def test_derivatives(backend):
    """Linear: the adjoint is the scan in the other direction, and there is a second derivative, of zero."""
    rewards, values, ends, cut = trajectories(6, 3)

    def both(rewards, values):
        return pk.gae(rewards, values, ends, gamma=0.9, lam=0.8, truncated=cut, backend=backend)

    inputs = [x.requires_grad_() for x in (rewards, values)]
    assert gradcheck(both, inputs, check_forward_ad=True)
    assert gradgradcheck(lambda r, v: both(r, v)[0].square(), inputs)
    A, returns = both(*inputs)
    weight = torch.randn_like(A)
    found = grad((A * weight).sum() + (returns * weight.sin()).sum(), inputs)
    right = loop(*inputs, ends, 0.9, 0.8, cut)
    expected = grad((right * weight).sum() + ((right + inputs[1][:-1]) * weight.sin()).sum(), inputs)
    for x, y in zip(found, expected, strict=True):
        near(x, y, 4 * 6)  # of 6 steps


@EVERYWHERE
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_of_the_next_episode_reaches_this_one(backend, bad):
    rewards, values, ends, cut = (x.clone() for x in trajectories(20, 2))
    ends[9], cut[9], rewards[10:], values[10:] = True, False, bad, bad
    inputs = [x.requires_grad_() for x in (rewards, values)]
    A, _ = pk.gae(*inputs, ends, gamma=0.9, lam=0.8, truncated=cut, backend=backend)
    assert A[:10].isfinite().all()
    for x in grad(A[:10].sum(), inputs):
        assert x.isfinite().all()
        assert not x[10:].any()


@EVERYWHERE
def test_a_column_does_not_depend_on_those_around_it(backend):
    rewards, values, ends, cut = trajectories(50, 37, dtype=torch.float32)

    def alone(few):
        return pk.gae(*(x[:, few] for x in (rewards, values, ends)), gamma=0.9, lam=0.8, truncated=cut[:, few],
                      backend=backend)[0]  # fmt: skip

    whole = alone(slice(None))
    for few in (slice(0, 1), slice(3, 20), slice(36, 37)):
        assert torch.equal(alone(few), whole[:, few])


@EVERYWHERE
def test_masks_are_bool_integers_or_numbers(backend):
    rewards, values, ends, cut = trajectories(9, 3)
    expected = pk.gae(rewards, values, ends, gamma=0.9, lam=0.8, truncated=cut, backend=backend)[0]
    for dtype in (torch.int64, torch.uint8, torch.float32):
        same = [x.to(dtype) for x in (ends, cut)]
        found = pk.gae(rewards, values, same[0], gamma=0.9, lam=0.8, truncated=same[1], backend=backend)[0]
        assert torch.equal(found, expected)


@EVERYWHERE
def test_modes(backend):
    rewards, values, ends, _ = trajectories(5, 2)

    def advantages(rewards, values, ends=ends):
        return pk.gae(rewards, values, ends, gamma=0.9, lam=0.8, backend=backend)[0]

    many = torch.stack([rewards, 2 * rewards])
    found = torch.func.vmap(lambda r: torch.func.grad(lambda r: advantages(r, values).square().sum())(r))(many)
    expected = torch.stack([torch.func.grad(lambda r: loop(r, values, ends, 0.9, 0.8).square().sum())(r) for r in many])
    near(found, expected, 2 * 4 * 5)  # 5 steps, there and back
    near(torch.func.jacfwd(advantages)(rewards, values), torch.func.jacrev(advantages)(rewards, values), 4 * 5)
    poisoned = torch.func.vmap(lambda e: advantages(rewards, values, e))(torch.stack([ends.double(), ends + 0.5]))
    assert poisoned[0].isfinite().all()
    assert poisoned[1].isnan().all()


GOOD = {"rewards": torch.zeros(3, 2), "values": torch.zeros(4, 2), "dones": torch.zeros(3, 2), "gamma": 0.9, "lam": 0.9}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(3, 2)}, ValueError, r"values: expected shape \(4, 2\)"),
        ({"dones": torch.zeros(4, 2)}, ValueError, r"dones: expected shape \(3, 2\)"),
        ({"dones": None}, TypeError, "dones: expected a tensor"),
        ({"dones": torch.full((3, 2), 0.5)}, ValueError, "dones: expected True and False"),
        ({"dones": torch.zeros(3, 2, requires_grad=True)}, ValueError, "dones: .* requires grad"),
        ({"truncated": torch.full((3, 2), 2)}, ValueError, "truncated: expected True and False"),
        ({"rewards": torch.tensor(0.0)}, ValueError, "rewards: expected shape"),
        ({"gamma": 1.5}, ValueError, "gamma: expected a number from 0 to 1"),
        ({"lam": -0.1}, ValueError, "lam: expected a number from 0 to 1"),
        ({"lam": "0.9"}, TypeError, "lam: expected a real number"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=f"gae: {message}"):
        pk.gae(**{**GOOD, **change})
