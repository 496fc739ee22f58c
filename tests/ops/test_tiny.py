"""Rewards and scales among the subnormal numbers, where 1 over a number is inf: no nan, but the value of float64."""

import numpy as np
import pytest
import torch
from torch.autograd import grad

import po_kernels as pk

from .cases import ADVANTAGES, SURROGATE_LOSSES, draw, pairs, serving

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def standardized(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The advantages of a group (G,) and their Jacobian, by hand, in long double."""
    centred = r - r.mean()
    unit = np.abs(centred).max()
    std = np.sqrt(((centred / unit) ** 2).mean()) * unit
    below = std + np.longdouble("1e-6")
    count = len(r)
    return centred / below, (np.eye(count) - 1 / count) / below - np.outer(centred, centred / std / count / below**2)


@DTYPES
@pytest.mark.parametrize("backend", serving("group_advantage"))
def test_standardized(backend, dtype):
    smallest = torch.finfo(dtype).smallest_normal
    least = smallest * torch.finfo(dtype).eps
    for size in (smallest, smallest / 100, 3e4 * least):
        rewards = (size * torch.tensor([0.0, 1.0, 2.0, -5.0, 2.0], dtype=dtype)).requires_grad_()
        weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1], dtype=dtype)
        found = pk.group_advantage(rewards, "standardized", backend=backend)
        (first,) = grad((found * weight).sum(), rewards)
        value, jacobian = standardized(rewards.detach().numpy().astype(np.longdouble))
        # A score of roundings of a sum of five terms, relative to the largest, or half the last subnormal digit.
        rounding = 20 * torch.finfo(dtype).eps
        expected = torch.from_numpy(value.astype(np.float64))
        assert (found - expected).abs().max() <= rounding * expected.abs().max() + 1e6 * least / 2
        expected = torch.from_numpy((weight.numpy() @ jacobian).astype(np.float64))
        assert (first - expected).abs().max() <= rounding * expected.abs().max()


@pytest.mark.parametrize("backend", serving("group_advantage"))
def test_second_derivative_of_standardized(backend):
    """In float64 the subnormal numbers of float32 are none: the formula as it stands is an oracle."""

    def derivatives(rewards, advantages):
        rewards = rewards.detach().requires_grad_()
        weight = torch.linspace(-1, 2, 6).to(rewards.dtype).unsqueeze(-1)
        found = advantages(rewards)
        (first,) = grad((found * weight).sum(), rewards, create_graph=True)
        (second,) = grad((first * weight.flip(0)).sum(), rewards)
        return found.detach(), first.detach(), second

    def formula(r):
        centred = r - r.mean(0)
        return centred / (centred.square().mean(0).sqrt() + 1e-6)

    torch.manual_seed(0)
    for size in (1e-37, 1e-39, 1e-41):
        rewards = size * torch.randn(6, 5)
        found = derivatives(rewards, lambda r: pk.group_advantage(r, "standardized", backend=backend))
        for x, y in zip(found, derivatives(rewards.double(), formula), strict=True):
            # 6 terms and three factors, each with a score of roundings; and the products of subnormal numbers.
            assert (x - y).abs().max() <= 60 * 1.2e-7 * y.abs().max() + 1e6 * 1.4e-45


@pytest.mark.parametrize("advantage", sorted(ADVANTAGES))
@pytest.mark.parametrize(("op", "backend"), pairs(SURROGATE_LOSSES))
def test_rewards_of_a_loss(op, backend, advantage):
    """exp(r) of rewards around -90 is subnormal in float32, and nothing in float64."""
    for seed in range(2):
        case = draw(op, seed, torch.float32, lead=(3,), dim=3, group=16, mask=False, rbf_gamma=1.0).with_options(
            estimator="dice", advantage=advantage, entropy_coef=0.0, reduction="sum"
        )

        def results(dtype, backend, case=case):
            *policy, rewards = [x.detach().to(dtype).requires_grad_() for x in case.inputs]
            with torch.no_grad():
                rewards.copy_(-89.0 - rewards.abs().clamp(max=3.0))
            inputs = (*policy, rewards)
            constants = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.constants.items()}
            loss, stats = getattr(pk, op)(
                *policy, *constants.values(), rewards, **case.options, return_stats=True, backend=backend
            )
            first = grad(loss, inputs, create_graph=True)
            second = grad(sum((g * torch.ones_like(g)).sum() for g in first), inputs, materialize_grads=True)
            return [loss.detach(), *stats, *first, *second]

        # exp(-92) is 83 thousand times the last subnormal digit, to half of which it and what follows are rounded.
        exact = results(torch.float64, "reference")
        for x, y in zip(results(torch.float32, backend), exact, strict=True):
            assert x.isfinite().all()
            assert (x - y).abs().max() <= 1e-3 * y.abs().max() + 1e-43


@pytest.mark.parametrize("backend", serving("categorical_policy_loss"))
def test_statistics_of_tiny_rewards_by_enumeration(backend):
    table = 1e-30 * torch.randn(5, 5)
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    _, stats = pk.categorical_policy_loss(logits, target, table, reduction="none", return_stats=True, backend=backend)
    p, r = torch.softmax(logits.double(), -1), table.double().T[target]
    std = (p * (r - (p * r).sum(-1, keepdim=True)).square()).sum(-1).sqrt()
    torch.testing.assert_close(stats.reward_std.double(), std, rtol=20 * 1.2e-7, atol=0)


def log_density(z: np.ndarray, log_std: np.ndarray) -> float:
    return float((-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum())


@pytest.mark.parametrize("backend", serving("gaussian_log_prob"))
def test_log_std_of_a_subnormal_deviation(backend):
    log_std = torch.tensor([[-88.0, -90.0, -95.0]])
    mean = torch.zeros(1, 3)
    value = (torch.tensor([[1.5, -2.0, 0.0]]) * torch.exp(log_std)).requires_grad_()
    found = pk.gaussian_log_prob(mean, log_std, value, backend=backend)
    std = np.exp(log_std.double().numpy())
    expected = log_density(value.detach().double().numpy() / std, log_std.numpy().astype(np.float64))
    # log σ times eps is the error of 1 / σ.
    assert abs(found.item() - expected) <= 400 * 1.2e-7 * 10


@pytest.mark.parametrize("backend", serving("mvn_log_prob"))
def test_subnormal_scale_tril(backend):
    root = torch.diag(torch.tensor([1e-40, 2e-39, 1.0])).unsqueeze(0)
    value = torch.tensor([[1e-40, 0.0, 0.5]])
    found = pk.mvn_log_prob(torch.zeros(1, 3), root, value, backend=backend)
    diagonal = root[0].diagonal().double().numpy()
    z = value.double().numpy()[0] / diagonal
    assert abs(found.item() - log_density(z, np.log(diagonal))) <= 300 * 1.2e-7


@pytest.mark.parametrize("backend", serving("gaussian_surrogate_loss"))
@pytest.mark.parametrize("log_std", [-800.0, 800.0])
def test_a_deviation_beyond_all_numbers_that_nothing_depends_on(backend, log_std):
    parameter, rewards = torch.tensor([log_std], requires_grad=True), torch.ones(1, requires_grad=True)
    loss = pk.gaussian_surrogate_loss(
        torch.zeros(1), parameter, torch.zeros(1, 1), rewards, entropy_coef=0.5, estimator="reparam", advantage="none",
        backend=backend,
    )  # fmt: skip
    assert torch.autograd.grad(loss, parameter)[0].item() == -0.5


@pytest.mark.parametrize("backend", serving("gaussian_surrogate_loss"))
def test_the_score_of_an_endless_deviation(backend):
    """(z² - 1) r with z = 0, and the entropy's."""
    parameter = torch.tensor([800.0], requires_grad=True)
    loss = pk.gaussian_surrogate_loss(
        torch.zeros(1), parameter, torch.ones(1, 1), torch.ones(1), entropy_coef=0.5, estimator="dice",
        advantage="none", backend=backend,
    )  # fmt: skip
    assert torch.autograd.grad(loss, parameter)[0].item() == 0.5
