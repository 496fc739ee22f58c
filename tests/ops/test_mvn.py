"""The Gaussian with full covariance against closed forms, torch.distributions and the diagonal one."""

import math
import random

import pytest
import torch
from torch.autograd import grad

import po_kernels as pk

from .cases import PRECISIONS, precision, scale_tril, serving
from .monte_carlo import monte_carlo

F64 = {"dtype": torch.float64}
LOSS = pytest.mark.parametrize("backend", serving("mvn_policy_loss"))


def root_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return scale_tril(random.Random(seed), *shape)


def draw_precision(kind: str, dim: int) -> torch.Tensor:
    return precision(random.Random(kind), kind, dim)


def matrix(u: torch.Tensor, dim: int) -> torch.Tensor:
    return u * torch.eye(dim, **F64) if u.ndim == 0 else torch.diag(u) if u.ndim == 1 else u


@LOSS
@pytest.mark.parametrize("kind", PRECISIONS)
def test_analytic_loss(backend, kind):
    mean, target, root = torch.randn(4, 3, **F64), torch.randn(4, 3, **F64), root_of(4, 3, 3)
    u, entropy_coef = draw_precision(kind, 3), 0.7
    found, stats = pk.mvn_policy_loss(
        mean, root, target, u, entropy_coef=entropy_coef, reduction="none", return_stats=True, backend=backend
    )
    policy = torch.distributions.MultivariateNormal(mean, scale_tril=root)
    delta, full = mean - target, matrix(u, 3)
    quadratic = torch.einsum("bi,ij,bj->b", delta, full, delta)
    spread = torch.einsum("ij,bji->b", full, root @ root.mT)
    assert torch.allclose(found, quadratic + spread - entropy_coef * policy.entropy(), rtol=1e-12)
    assert torch.allclose(stats.entropy, policy.entropy(), rtol=1e-12)
    assert torch.allclose(stats.log_prob, policy.log_prob(target), rtol=1e-12)


@LOSS
@pytest.mark.parametrize("kind", PRECISIONS)
def test_inner_optimum(backend, kind):
    """μ* = E[y|x], Σ* = (λ/2) U⁻¹, where all derivatives vanish."""
    entropy_coef, u = 0.9, draw_precision(kind, 3)
    deviations = torch.randn(64, 3, **F64)
    deviations -= deviations.mean(0)
    center = torch.randn(3, **F64)
    mean = center.clone().requires_grad_()
    root = torch.linalg.cholesky(0.5 * entropy_coef * torch.linalg.inv(matrix(u, 3))).requires_grad_()
    loss = pk.mvn_policy_loss(
        mean.expand(64, 3), root, center + deviations, u, entropy_coef=entropy_coef, backend=backend
    )
    for gradient in grad(loss, (mean, root)):
        assert gradient.abs().max() < 1e-12


def outer_gradient(u: torch.Tensor, data: torch.Tensor, entropy_coef: float, backend: str) -> torch.Tensor:
    """dF/dU of F(θ*(U)) = −mean log p, by the implicit function theorem with the op's own Hessian."""
    dim = data.shape[1]
    below = torch.tril_indices(dim, dim)
    root = torch.linalg.cholesky(0.5 * entropy_coef * torch.linalg.inv(u))
    theta = torch.cat([data.mean(0), root[below[0], below[1]]]).requires_grad_()
    u = u.clone().requires_grad_()
    mean = theta[:dim].expand(data.shape)
    scale = torch.zeros(dim, dim, **F64).index_put((below[0], below[1]), theta[dim:])
    (outer,) = grad(-pk.mvn_log_prob(mean, scale, data).mean(), theta, retain_graph=True)
    loss = pk.mvn_policy_loss(mean, scale, data, u, entropy_coef=entropy_coef, backend=backend)
    (first,) = grad(loss, theta, create_graph=True)
    assert first.abs().max() < 1e-11
    hessian = torch.stack([grad(x, theta, retain_graph=True)[0] for x in first])
    (mixed,) = grad((first * torch.linalg.solve(hessian, outer)).sum(), u)
    return -mixed


@LOSS
def test_outer_gradient_and_optimum(backend):
    """∇F = −½U⁻¹ + Σ/λ, zero at U* = (λ/2) Σ⁻¹."""
    entropy_coef = 0.8
    data = torch.randn(200, 3, **F64) @ root_of(3, 3)
    centred = data - data.mean(0)
    covariance = centred.T @ centred / len(data)
    optimum = 0.5 * entropy_coef * torch.linalg.inv(covariance)
    for u in (draw_precision("full", 3), 0.5 * (optimum + optimum.T)):
        expected = -0.5 * torch.linalg.inv(u) + covariance / entropy_coef
        assert torch.allclose(outer_gradient(u, data, entropy_coef, backend), expected, rtol=1e-9, atol=1e-11)


@LOSS
def test_at_the_outer_optimum_the_inner_loss_is_a_divergence(backend):
    """At U* = (λ/2) Σ⁻¹, L(θ) = λ KL(p_θ ‖ N(E y, Σ)) + const."""
    entropy_coef, dim = 0.8, 3
    root = root_of(dim, dim)
    center = torch.randn(dim, **F64)
    # 2n points with mean `center` and covariance Σ exactly.
    offsets = math.sqrt(dim) * root.T
    data = torch.cat([center + offsets, center - offsets])
    u = 0.5 * entropy_coef * torch.linalg.inv(root @ root.T)
    u = 0.5 * (u + u.T)
    target = torch.distributions.MultivariateNormal(center, scale_tril=root)
    constants = []
    for seed in range(5):
        mean, scale = torch.randn(dim, **F64), root_of(dim, dim, seed=seed)
        loss = pk.mvn_policy_loss(mean.expand(data.shape), scale, data, u, entropy_coef=entropy_coef, backend=backend)
        policy = torch.distributions.MultivariateNormal(mean, scale_tril=scale)
        constants.append(loss - entropy_coef * torch.distributions.kl_divergence(policy, target))
    assert (torch.stack(constants) - constants[0]).abs().max() < 1e-11


@LOSS
@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("estimator", ["analytic", "reparam", "dice"])
def test_a_diagonal_factor_is_the_diagonal_gaussian(backend, kind, estimator):
    mean, log_std, target = (torch.randn(4, 3, **F64) for _ in range(3))
    options = {"entropy_coef": 0.3, "estimator": estimator, "backend": backend}
    if estimator != "analytic":
        options |= {"num_samples": 4, "seed": 6}
    results = []
    for full in (True, False):
        inputs = [x.clone().requires_grad_() for x in (mean, log_std, draw_precision(kind, 3))]
        if full:
            loss = pk.mvn_policy_loss(inputs[0], torch.diag_embed(inputs[1].exp()), target, inputs[2], **options)
        else:
            options["backend"] = "reference"
            loss = pk.gaussian_policy_loss(inputs[0], inputs[1], target, inputs[2], **options)
        first = grad(loss, inputs, create_graph=True)
        second = grad(sum(g.square().sum() for g in first), inputs)
        results.append([loss, *first, *second])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)


@LOSS
@pytest.mark.parametrize("estimator", ["dice", "reparam"])
def test_monte_carlo(backend, estimator):
    inputs = [torch.randn(2, 2, **F64), root_of(2, 2, 2), torch.randn(2, 2, **F64), draw_precision("full", 2)]
    options = {"entropy_coef": 0.5, "backend": backend}

    def lower(mean, root, target, u):
        return mean, torch.tril(root), target, u

    monte_carlo(
        lambda *xs, seed: pk.mvn_policy_loss(
            *lower(*xs), estimator=estimator, num_samples=4096, advantage="loo", seed=seed, **options
        ),
        lambda *xs: pk.mvn_policy_loss(*lower(*xs), **options),
        inputs,
    )


@pytest.mark.parametrize("backend", serving("mvn_log_prob"))
def test_log_prob(backend):
    for lead in ((), (3,), (2, 3)):
        for extra in ((), (4,), (2, 2)):
            mean, root = torch.randn(*lead, 3, **F64), root_of(*lead, 3, 3)
            value = torch.randn(*extra, *lead, 3, **F64)
            for scale in (root, root.reshape(-1, 3, 3)[0]):
                found = pk.mvn_log_prob(mean, scale, value, backend=backend)
                expected = torch.distributions.MultivariateNormal(mean, scale_tril=scale).log_prob(value)
                assert found.shape == expected.shape
                assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("backend", serving("mvn_log_prob"))
def test_sixty_four_dimensions(backend):
    mean, root, value = torch.randn(2, 64, **F64), root_of(2, 64, 64), torch.randn(2, 64, **F64)
    found = pk.mvn_log_prob(mean, root, value, backend=backend)
    assert torch.allclose(found, torch.distributions.MultivariateNormal(mean, scale_tril=root).log_prob(value))


@pytest.mark.parametrize("backend", serving("mvn_sample"))
def test_sample(backend):
    """Covariance L Lᵀ: within 4 standard errors of each entry, whose variance is Σ_ii Σ_jj + Σ_ij²."""
    count, root = 40_000, root_of(3, 3)
    samples = pk.mvn_sample(torch.zeros(3, **F64), root, count, seed=1, backend=backend)
    covariance = root @ root.T
    variance = torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance.square()
    assert ((samples.T @ samples / count - covariance).abs() < 4 * (variance / count).sqrt()).all()


@pytest.mark.parametrize("backend", serving("mvn_sample"))
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_scale_that_is_not_finite(backend, value):
    for place in ((0, 0), (1, 0), (0, 1), (2, 2)):
        root = torch.eye(3).repeat(20, 1, 1)
        root[18][place] = value
        for call in (
            lambda root: pk.mvn_sample(torch.zeros(20, 3), root, 2, backend=backend),
            lambda root: pk.mvn_log_prob(torch.zeros(20, 3), root, torch.zeros(20, 3), backend=backend),
            lambda root: pk.mvn_policy_loss(torch.zeros(20, 3), root, torch.zeros(20, 3), 1.0, backend=backend),
        ):
            with pytest.raises(ValueError, match=r"scale_tril: expected finite numbers, got nan or inf in row 18"):
                call(root)
