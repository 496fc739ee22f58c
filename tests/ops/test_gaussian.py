"""The diagonal Gaussian against closed forms, torch.distributions, and itself by Monte Carlo."""

import math
import random

import pytest
import torch
from torch.autograd import grad

import po_kernels as pk

from .cases import PRECISIONS, precision, serving
from .monte_carlo import monte_carlo

F64 = {"dtype": torch.float64}
LOSS = pytest.mark.parametrize("backend", serving("gaussian_policy_loss"))


def matrix(u: torch.Tensor, dim: int) -> torch.Tensor:
    return u * torch.eye(dim, **F64) if u.ndim == 0 else torch.diag(u) if u.ndim == 1 else u


def draw_precision(kind: str, dim: int) -> torch.Tensor:
    return precision(random.Random(kind), kind, dim)


@LOSS
@pytest.mark.parametrize("kind", PRECISIONS)
def test_analytic_loss(backend, kind):
    mean, log_std, target = (torch.randn(4, 3, **F64) for _ in range(3))
    u, entropy_coef = draw_precision(kind, 3), 0.7
    found, stats = pk.gaussian_policy_loss(
        mean, log_std, target, u, entropy_coef=entropy_coef, reduction="none", return_stats=True, backend=backend
    )
    delta, full = mean - target, matrix(u, 3)
    quadratic = torch.einsum("bi,ij,bj->b", delta, full, delta)
    variance = (full.diagonal() * torch.exp(2 * log_std)).sum(-1)
    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    assert torch.allclose(found, quadratic + variance - entropy_coef * entropy, rtol=1e-13)
    assert torch.allclose(stats.reward_mean, -quadratic - variance, rtol=1e-13)
    assert torch.allclose(stats.entropy, entropy, rtol=1e-13)
    policy = torch.distributions.Normal(mean, log_std.exp())
    assert torch.allclose(stats.log_prob, policy.log_prob(target).sum(-1), rtol=1e-13)


@LOSS
@pytest.mark.parametrize("kind", PRECISIONS)
def test_spread_of_the_analytic_rewards(backend, kind):
    mean, log_std, target = (torch.randn(3, **F64) for _ in range(3))
    u = draw_precision(kind, 3)
    _, closed = pk.gaussian_policy_loss(mean, log_std, target, u, return_stats=True, backend=backend)
    options = {"estimator": "reparam", "num_samples": 50_000, "seed": 4}
    _, drawn = pk.gaussian_policy_loss(mean, log_std, target, u, **options, return_stats=True, backend=backend)
    # The rewards' kurtosis is below that of χ²(1), 15, so the standard error of a variance is below √14/√G of it.
    assert abs(drawn.reward_std**2 / closed.reward_std**2 - 1) < 4 * math.sqrt(14 / 50_000)
    assert closed.advantage_std == closed.reward_std


@LOSS
@pytest.mark.parametrize("kind", PRECISIONS)
def test_inner_optimum(backend, kind):
    """μ* = E[y|x] and σ_j*² = λ/(2 U_jj), where all derivatives vanish."""
    entropy_coef, u = 0.9, draw_precision(kind, 3)
    deviations = torch.randn(64, 3, **F64)
    deviations -= deviations.mean(0)
    center = torch.randn(3, **F64)
    mean = center.clone().requires_grad_()
    log_std = (0.5 * torch.log(entropy_coef / (2 * matrix(u, 3).diagonal()))).requires_grad_()
    loss = pk.gaussian_policy_loss(
        mean.expand(64, 3), log_std, center + deviations, u, entropy_coef=entropy_coef, backend=backend
    )
    for gradient in grad(loss, (mean, log_std)):
        assert gradient.abs().max() < 1e-13


@LOSS
def test_one_dimension(backend):
    """At the inner optimum L_ρρ = 2λ, L_ρu = 2σ², and so dρ*/du = −1/(2u)."""
    entropy_coef, u = 0.6, torch.tensor(1.7, **F64, requires_grad=True)
    mean = torch.zeros(1, **F64)
    rho = (0.5 * torch.log(entropy_coef / (2 * u.detach()))).reshape(1).requires_grad_()
    loss = pk.gaussian_policy_loss(mean, rho, mean, u, entropy_coef=entropy_coef, backend=backend)
    (first,) = grad(loss, rho, create_graph=True)
    curvature, mixed = grad(first.sum(), (rho, u))
    assert first.abs() < 1e-15
    assert torch.allclose(curvature, torch.tensor([2 * entropy_coef], **F64), rtol=1e-13)
    assert torch.allclose(-mixed / curvature, -1 / (2 * u.detach()), rtol=1e-13)


def outer_gradient(u: torch.Tensor, data: torch.Tensor, entropy_coef: float, backend: str) -> torch.Tensor:
    """dF/du of F(θ*(u)) = −mean log p, by the implicit function theorem with the op's own Hessian."""
    dim = data.shape[1]
    u = u.clone().requires_grad_()
    start = torch.stack([data.mean(0), 0.5 * torch.log(entropy_coef / (2 * matrix(u.detach(), dim).diagonal()))])

    def inner(theta, u):
        mean, log_std = theta
        return pk.gaussian_policy_loss(
            mean.expand(data.shape), log_std, data, u, entropy_coef=entropy_coef, backend=backend
        )

    theta = start.clone().requires_grad_()
    _, stats = pk.gaussian_policy_loss(
        theta[0].expand(data.shape), theta[1], data, u, return_stats=True, backend=backend
    )
    values = -pk.gaussian_log_prob(theta[0].expand(data.shape), theta[1], data)
    assert torch.allclose(values.mean().detach(), -stats.log_prob, rtol=1e-13)
    (outer_theta,) = grad(values.mean(), theta)
    (first,) = grad(inner(theta, u), theta, create_graph=True)
    assert first.abs().max() < 1e-12
    rows = [grad(x, theta, retain_graph=True)[0].flatten() for x in first.flatten()]
    solution = torch.linalg.solve(torch.stack(rows), outer_theta.flatten())
    (mixed,) = grad((first.flatten() * solution).sum(), u)
    return -mixed


@LOSS
def test_outer_gradient_and_optimum(backend):
    """Isotropic F'(u) = −n/(2u) + tr Σ/λ, zero at u* = λn/(2 tr Σ); diagonal the same for each u_j."""
    entropy_coef, dim = 0.8, 3
    data = torch.randn(200, dim, **F64) * torch.tensor([0.5, 1.0, 2.0], **F64)
    variance = data.var(dim=0, correction=0)
    for u in (torch.tensor(0.9, **F64), entropy_coef * dim / (2 * variance.sum())):
        expected = -dim / (2 * u) + variance.sum() / entropy_coef
        assert torch.allclose(outer_gradient(u, data, entropy_coef, backend), expected, rtol=1e-10, atol=1e-12)
    for u in (torch.tensor([0.9, 0.4, 1.3], **F64), entropy_coef / (2 * variance)):
        expected = -1 / (2 * u) + variance / entropy_coef
        assert torch.allclose(outer_gradient(u, data, entropy_coef, backend), expected, rtol=1e-10, atol=1e-12)


@LOSS
def test_at_the_outer_optimum_the_inner_loss_is_a_divergence(backend):
    """At U* = (λ/2) Σ⁻¹, L(θ) = λ KL(p_θ ‖ N(E y, Σ)) + const."""
    entropy_coef, dim = 0.8, 3
    root = torch.tril(torch.randn(dim, dim, **F64)) + 2 * torch.eye(dim, **F64)
    covariance = root @ root.T
    center = torch.randn(dim, **F64)
    # 2n points with mean `center` and covariance Σ exactly.
    offsets = math.sqrt(dim) * root.T
    data = torch.cat([center + offsets, center - offsets])
    u = 0.5 * entropy_coef * torch.linalg.inv(covariance)
    u = 0.5 * (u + u.T)
    target = torch.distributions.MultivariateNormal(center, covariance)
    constants = []
    for _ in range(5):
        mean, log_std = torch.randn(dim, **F64), torch.randn(dim, **F64)
        loss = pk.gaussian_policy_loss(
            mean.expand(data.shape), log_std, data, u, entropy_coef=entropy_coef, backend=backend
        )
        policy = torch.distributions.MultivariateNormal(mean, scale_tril=torch.diag(log_std.exp()))
        constants.append(loss - entropy_coef * torch.distributions.kl_divergence(policy, target))
    assert (torch.stack(constants) - constants[0]).abs().max() < 1e-11


@LOSS
@pytest.mark.parametrize(
    ("estimator", "advantage"),
    [("dice", "none"), ("dice", "mean"), ("dice", "loo"), ("dice", "min"), ("reparam", "loo")],
)
def test_monte_carlo(backend, estimator, advantage):
    """Value, gradients and Hessian-vector products with U, to the analytic ones."""
    # The mean shrinks the score function by (G − 1)/G, and the minimum depends on the samples too: their bias,
    # about 1/G, has to be small beside the standard error, about 1/√(seeds G). And the tails of a second derivative,
    # a polynomial of sixth degree in normals, have to average out within a seed for 4 standard errors to mean much.
    group, rows, dim = 4096, 2, 2
    inputs = [torch.randn(rows, dim, **F64), 0.3 * torch.randn(rows, dim, **F64), torch.randn(rows, dim, **F64)]
    inputs.append(draw_precision("full", dim))
    options = {"entropy_coef": 0.5, "backend": backend}
    monte_carlo(
        lambda *xs, seed: pk.gaussian_policy_loss(
            *xs, estimator=estimator, num_samples=group, advantage=advantage, seed=seed, **options
        ),
        lambda *xs: pk.gaussian_policy_loss(*xs, **options),
        inputs,
    )


@pytest.mark.parametrize("backend", serving("gaussian_log_prob"))
def test_log_prob(backend):
    for lead in ((), (3,), (2, 3)):
        for extra in ((), (4,), (2, 2)):
            mean, log_std = torch.randn(*lead, 3, **F64), torch.randn(*lead, 3, **F64)
            value = torch.randn(*extra, *lead, 3, **F64)
            for scale in (log_std, log_std.reshape(-1, 3)[0]):
                found = pk.gaussian_log_prob(mean, scale, value, backend=backend)
                expected = torch.distributions.Normal(mean, scale.exp()).log_prob(value).sum(-1)
                assert found.shape == expected.shape
                assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("backend", serving("gaussian_sample"))
def test_sample(backend):
    mean, log_std = torch.randn(2, 3, **F64, requires_grad=True), torch.randn(3, **F64, requires_grad=True)
    noise = pk.gaussian_sample(torch.zeros(2, 3, **F64), torch.zeros(3, **F64), 5, seed=8, backend=backend)
    samples = pk.gaussian_sample(mean, log_std, 5, seed=8, backend=backend)
    assert samples.shape == (5, 2, 3)
    assert torch.allclose(samples, mean + log_std.exp() * noise, rtol=1e-14, atol=1e-14)
    for_mean, for_log_std = grad(samples.sum(), (mean, log_std))
    assert torch.allclose(for_mean, torch.full((2, 3), 5.0, **F64))
    assert torch.allclose(for_log_std, (log_std.exp() * noise).sum((0, 1)))


@pytest.mark.parametrize("backend", serving("gaussian_surrogate_loss"))
@pytest.mark.parametrize("estimator", ["dice", "reparam"])
def test_the_surrogate_of_the_ops_own_samples_is_the_policy_loss(backend, estimator):
    mean, log_std, target = (torch.randn(3, 2, **F64) for _ in range(3))
    u = draw_precision("full", 2)
    options = {"entropy_coef": 0.4, "estimator": estimator, "advantage": "loo", "backend": backend}
    results = []
    for surrogate in (True, False):
        inputs = [x.clone().requires_grad_() for x in (mean, log_std, u)]
        if surrogate:
            samples = pk.gaussian_sample(inputs[0], inputs[1], 6, seed=2)
            samples = samples.detach() if estimator == "dice" else samples
            residual = samples - target
            rewards = -torch.einsum("gbi,ij,gbj->gb", residual, 0.5 * (inputs[2] + inputs[2].T), residual)
            loss = pk.gaussian_surrogate_loss(inputs[0], inputs[1], samples, rewards, **options)
        else:
            loss = pk.gaussian_policy_loss(inputs[0], inputs[1], target, inputs[2], num_samples=6, seed=2, **options)
        first = grad(loss, inputs, create_graph=True)
        second = grad(sum(g.square().sum() for g in first), inputs)
        results.append([loss, *first, *second])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
