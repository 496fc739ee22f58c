"""Sums of many float32 numbers: classes, samples, dimensions and rows by the ten thousand, against float64.

A sum of n numbers in one accumulator errs by up to n u Σ|x|, u = 2^-24, and on equal numbers it does. Kernels add up
runs of 32 numbers, or 256 where the sums stand in memory (64 blocks), and the runs without a loss: `RUN` Σ|x|.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.autograd import grad

import po_kernels as pk

from .cases import fused, serving

U = 2.0**-24
RUN = 72 * U  # a run, and the roundings of what is summed
VOCABULARIES = pytest.mark.parametrize("classes", [50_000, 151_936])


def some_logits(classes: int) -> list[torch.Tensor]:
    return [torch.full((1, classes), 0.3), torch.randn(1, classes)]


@VOCABULARIES
@pytest.mark.parametrize("backend", serving("categorical_log_prob"))
def test_classes(backend, classes):
    for logits in some_logits(classes):
        logits.requires_grad_()
        x = logits.detach().double().numpy()[0]
        log_p = x - x.max() - math.log(np.exp(x - x.max()).sum())
        p = np.exp(log_p)
        label = torch.tensor([classes // 3])
        found = pk.categorical_log_prob(logits, label, backend=backend)
        assert abs(found.item() - log_p[label]) <= RUN * np.abs(log_p).max()
        (first,) = grad(found.sum(), logits)
        expected = -p
        expected[label] += 1.0
        assert np.abs(first.double().numpy() - expected).max() <= RUN

        _, stats = pk.categorical_surrogate_loss(
            logits, label.unsqueeze(0), torch.zeros(1, 1), advantage="none", return_stats=True, backend=backend
        )
        entropy = -(p * log_p).sum()
        assert abs(stats.entropy.item() - entropy) <= 2 * RUN * entropy


@pytest.mark.slow
@pytest.mark.parametrize("backend", serving("categorical_surrogate_loss"))
def test_twenty_million_classes(backend):
    """So many runs that what each of them rounds off is a long sum too."""
    classes = 20_000_000
    _, stats = pk.categorical_surrogate_loss(
        torch.full((1, classes), 0.3), torch.tensor([[3]]), torch.zeros(1, 1), advantage="none", return_stats=True,
        backend=backend,
    )  # fmt: skip
    for found in (stats.entropy, -stats.log_prob):
        assert abs(found.item() / math.log(classes) - 1) <= RUN


@pytest.mark.parametrize("backend", serving("group_advantage"))
@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_group_of_a_million(backend, offset):
    torch.manual_seed(0)
    rewards = torch.randn(10**6) + offset
    r = rewards.double().numpy()
    mean, std, count = r.mean(), r.std(), len(r)
    expected = {"mean": r - mean, "loo": (r - mean) * count / (count - 1), "standardized": (r - mean) / (std + 1e-6)}
    for kind, advantages in expected.items():
        found = pk.group_advantage(rewards, kind, backend=backend).double().numpy()
        # A run of deviations from the first, which are up to ten, and the rounding of a deviation of such numbers.
        assert np.abs(found - advantages).max() <= 10 * RUN + 4 * U * np.abs(r).max(), kind


@pytest.mark.parametrize("backend", serving("gaussian_surrogate_loss"))
def test_samples(backend):
    """Equal samples, each with the same reward: every sum over them is of equal numbers."""
    count = 50_000
    mean, log_std = torch.tensor([[0.1, -0.3]], requires_grad=True), torch.tensor([[0.2, 0.4]], requires_grad=True)
    samples = torch.tensor([0.7, 1.1]).expand(count, 1, 2).contiguous()
    rewards = torch.full((count, 1), 0.3, requires_grad=True)
    loss, stats = pk.gaussian_surrogate_loss(
        mean, log_std, samples, rewards, estimator="dice", advantage="none", return_stats=True, backend=backend
    )
    first = grad(loss, (mean, log_std), create_graph=True)
    second = grad(sum(g.sum() for g in first), (mean, log_std))
    r = rewards[0, 0].item()
    std = np.exp(log_std.detach().double().numpy())
    z = (samples[0].double().numpy() - mean.detach().double().numpy()) / std
    density = (-0.5 * z**2 - np.log(std) - 0.5 * math.log(2 * math.pi)).sum()
    score = np.stack([z / std, z**2 - 1])  # in the mean and in log σ
    along = score.sum()
    # The Hessian times ones is A (∇² log p + ∇ log p ∇ log pᵀ) ones.
    hessian = score * along + np.stack([-1 / std**2 - 2 * z / std, -2 * z / std - 2 * z**2])
    blocks = 4 * 72 * U
    for found, expected in [
        (loss, -r), (stats.log_prob, density), (stats.reward_mean, r), (first[0], -r * score[0]),
        (first[1], -r * score[1]), (second[0], -r * hessian[0]), (second[1], -r * hessian[1]),
    ]:  # fmt: skip
        found = found.detach().double().numpy()
        assert np.abs(found - expected).max() <= blocks * max(1.0, np.abs(expected).max(), np.abs(hessian).max() * r)


@pytest.mark.parametrize("backend", serving("gaussian_sample"))
def test_gradients_of_samples_and_of_log_prob(backend):
    count = 50_000
    mean = torch.zeros(1, 2, requires_grad=True)
    log_std = torch.zeros(1, 2, requires_grad=True)
    samples = pk.gaussian_sample(mean, log_std, count, seed=1, backend=backend)
    (found,) = grad(samples, mean, torch.full_like(samples, 0.1))
    assert np.abs(found.double().numpy() / (count * np.float64(np.float32(0.1))) - 1).max() <= 4 * 72 * U
    value = torch.full((count, 1, 2), 0.1)
    (found,) = grad(pk.gaussian_log_prob(mean, log_std, value, backend=backend).sum(), mean)
    assert np.abs(found.double().numpy() / (count * np.float64(np.float32(0.1))) - 1).max() <= 4 * 72 * U


@pytest.mark.parametrize("backend", serving("gaussian_policy_loss"))
def test_dimensions(backend):
    dim = 100_000
    mean, target = torch.full((1, dim), 0.4), torch.full((1, dim), 0.1)
    log_std = torch.full((dim,), 0.3)
    loss, stats = pk.gaussian_policy_loss(mean, log_std, target, 0.7, return_stats=True, backend=backend)
    std, delta = math.exp(np.float32(0.3)), float(np.float32(0.4)) - float(np.float32(0.1))
    reward = -float(np.float32(0.7)) * dim * (delta**2 + std**2)
    density = dim * (-0.5 * (delta / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi))
    for found, expected in [(loss, -reward), (stats.log_prob, density), (stats.reward_mean, reward)]:
        assert abs(found.item() / expected - 1) <= 2 * RUN


@pytest.mark.parametrize("backend", serving("gaussian_policy_loss"))
def test_rows_share_a_precision(backend):
    """Of equal rows, so that every sum is of equal numbers."""
    rows = 200_000
    mean, target = torch.full((rows, 2), 0.4), torch.full((rows, 2), 0.1)
    precision = torch.tensor([0.7, 0.9], requires_grad=True)
    loss = pk.gaussian_policy_loss(mean, torch.zeros(2), target, precision, reduction="sum", backend=backend)
    (found,) = grad(loss, precision)
    delta = float(np.float32(0.4)) - float(np.float32(0.1))
    assert np.abs(found.double().numpy() / (rows * (delta**2 + 1)) - 1).max() <= RUN


@pytest.mark.parametrize("backend", serving("categorical_policy_loss"))
def test_rows_share_a_table(backend):
    rows = 200_000
    table = torch.zeros(3, 3, requires_grad=True)
    target = torch.ones(rows, dtype=torch.int64)
    loss = pk.categorical_policy_loss(torch.zeros(rows, 3), target, table, reduction="sum", backend=backend)
    (found,) = grad(loss, table)
    assert np.abs(found[:, 1].double().numpy() / (-rows / 3) - 1).max() <= RUN
    assert (found[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("backend", serving("categorical_policy_loss"))
def test_few_rows_of_a_large_table(backend):
    """Rows of one label, and of others, fewer than there are classes."""
    classes = 300
    target = torch.tensor([5, 7, 5, 299])
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(4, classes, dtype=dtype, requires_grad=True)
        table = torch.randn(classes, classes, dtype=dtype, requires_grad=True)
        loss = pk.categorical_policy_loss(logits, target, table, backend=backend)
        first = grad(loss, (logits, table), create_graph=True)
        second = grad(sum(g.square().sum() for g in first), (logits, table))
        p = torch.softmax(logits.double(), -1)
        expected_loss = -(p * table.double().T[target]).sum(-1).mean()
        exact = grad(expected_loss, (logits, table), create_graph=True)
        exact_second = grad(sum(g.square().sum() for g in exact), (logits, table))
        for x, y in zip((loss, *first, *second), (expected_loss, *exact, *exact_second), strict=True):
            assert (x - y).abs().max() <= 2 * RUN / U * torch.finfo(dtype).eps * y.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scratch_is_given_back():
    """A group of millions takes hundreds of megabytes, once."""
    if "native" not in serving("group_advantage"):
        pytest.skip("the extension was not built")
    program = """
import torch, po_kernels as pk

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def call(count):
    pk.group_advantage(torch.zeros(count), backend="native")

torch.set_num_threads(1)
call(8)
before = resident()
call(3_000_000)
print((resident() - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert float(done.stdout) < 64  # 16 MiB are kept, and torch's allocator may keep the two tensors


@pytest.mark.parametrize("backend", fused("gaussian_policy_loss"))
def test_products_with_a_full_precision(backend):
    """Equal numbers, of which torch's own sum is off by some hundreds of units: here runs of 128, and 2000 / 128 of
    them, at most 144 units, of a sum and of the sum of those."""
    dim = 2000
    precision = torch.full((dim, dim), 0.1) + torch.eye(dim)
    mean = torch.full((2, dim), 0.3, requires_grad=True)
    zero = torch.zeros(2, dim)
    loss = pk.gaussian_policy_loss(mean, zero, zero, precision, backend=backend)
    (gradient,) = torch.autograd.grad(loss, mean)
    x, one, rest = (float(torch.tensor(value)) for value in (0.3, 1.1, 0.1))
    row = x * (one + (dim - 1) * rest)
    assert gradient[0, -1].item() == pytest.approx(row, rel=144 * 2**-24)
    assert loss.item() == pytest.approx(dim * (x * row + one), rel=288 * 2**-24)


@pytest.mark.parametrize("backend", fused("mvn_log_prob"))
def test_products_with_a_triangle(backend):
    """Equal numbers again, below the diagonal in the last row or in the first column, with 1 on it."""
    dim = 2000 if backend == "native" else 500  # numba has a tile of rows in float64
    x, rest = float(torch.tensor(0.3)), float(torch.tensor(0.1))
    for place, at, term in ((np.s_[-1, :-1], -1, x), (np.s_[1:, 0], 0, x - rest * x)):
        scale = torch.eye(dim)
        scale[place] = 0.1
        mean, value = torch.zeros(1, dim, requires_grad=True), torch.full((1, dim), 0.3)
        (gradient,) = grad(pk.mvn_log_prob(mean, scale.unsqueeze(0), value, backend=backend), mean)
        # L⁻ᵀ L⁻¹ x, with a few roundings of each term and of what it is subtracted from.
        assert gradient[0, at].item() == pytest.approx(x - rest * (dim - 1) * term, rel=148 * U)
