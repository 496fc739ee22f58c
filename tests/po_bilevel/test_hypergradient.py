"""Hypergradients against closed forms and dense solves."""

import math

import pytest
import torch
from po_bilevel import ImplicitCG, NonFiniteError
from torch import Tensor

import po_kernels as pk

EXACT = ImplicitCG(tolerance=1e-10)


def double(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(size: int, seed: int) -> Tensor:
    root = double(size, size, seed=seed)
    return root @ root.mT / size + 0.5 * torch.eye(size, dtype=torch.float64)


class Quadratic:
    """L = ½ θᵀAθ - θᵀ(Bφ), F = ½ ‖θ - t‖² + φᵀc, θ of shapes (2, 3) and (4,), φ of shapes (3,) and ()."""

    def __init__(self, hessian: Tensor) -> None:
        self.hessian = hessian
        self.coupling = double(10, 4, seed=1)
        self.target = double(10, seed=2)
        self.direct = double(4, seed=3)
        self.phi = (double(3, seed=4).requires_grad_(), double(1, seed=5).squeeze().requires_grad_())

    @staticmethod
    def flat(tensors):
        return torch.cat([t.reshape(-1) for t in tensors])

    def theta(self, vector: Tensor):
        return vector[:6].reshape(2, 3).clone().requires_grad_(), vector[6:].clone().requires_grad_()

    def inner(self, theta, phi):
        t = self.flat(theta)
        return 0.5 * t @ self.hessian @ t - t @ (self.coupling @ self.flat(phi))

    def outer(self, theta, phi):
        return 0.5 * (self.flat(theta) - self.target).square().sum() + self.flat(phi) @ self.direct

    def dense(self, theta, damping: float) -> Tensor:
        regular = self.hessian + damping * torch.eye(10, dtype=torch.float64)
        solution = torch.linalg.solve(regular, self.flat(theta).detach() - self.target)
        return self.direct + self.coupling.mT @ solution

    def solution(self):
        return self.theta(torch.linalg.solve(self.hessian, self.coupling @ self.flat(self.phi).detach()))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_quadratic_problem_equals_dense_solve(damping):
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    method = ImplicitCG(damping=damping, tolerance=1e-12)
    result = method(problem.inner, problem.outer, theta, problem.phi)
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, damping), rtol=1e-9, atol=1e-9)
    assert [g.shape for g in result.gradient] == [p.shape for p in problem.phi]
    assert result.converged
    assert result.residual_norm <= 1e-12
    assert not result.negative_curvature
    assert result.problems == ()
    # Ten dimensions need ten products, or a few more with rounding, and one that measures the residual.
    assert result.num_products <= 15
    assert result.inner_loss == pytest.approx(float(problem.inner(theta, problem.phi).detach()))
    assert result.outer_loss == pytest.approx(float(problem.outer(theta, problem.phi).detach()))
    assert all(p.grad is None for p in (*theta, *problem.phi))


def test_gradient_is_that_of_the_solved_problem():
    problem = Quadratic(positive(10, seed=6))

    def value(*phi: Tensor) -> Tensor:
        return problem.outer((torch.linalg.solve(problem.hessian, problem.coupling @ problem.flat(phi)),), phi)

    expected = torch.autograd.grad(value(*problem.phi), problem.phi)
    result = EXACT(problem.inner, problem.outer, problem.solution(), problem.phi)
    for got, want in zip(result.gradient, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_warm_start_saves_the_products():
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    cold = EXACT(problem.inner, problem.outer, theta, problem.phi)
    warm = EXACT(problem.inner, problem.outer, theta, problem.phi, start=cold.solution)
    assert warm.num_products == 2
    torch.testing.assert_close(warm.gradient[0], cold.gradient[0])


def test_too_few_iterations_are_reported():
    problem = Quadratic(positive(10, seed=6))
    result = ImplicitCG(tolerance=1e-10, max_iterations=2)(
        problem.inner, problem.outer, problem.solution(), problem.phi
    )
    assert not result.converged
    assert result.num_products == 3
    # Measured at the solution given, not taken from the recursion.
    regular = problem.hessian @ problem.flat(result.solution)
    right = problem.flat(problem.solution()).detach() - problem.target
    assert result.residual_norm == pytest.approx(float((right - regular).norm() / right.norm()))
    assert "after 2 iterations" in result.problems[0]


def test_indefinite_hessian_is_reported():
    spectrum = torch.linspace(-0.4, 2.0, 10, dtype=torch.float64)
    basis = torch.linalg.qr(double(10, 10, seed=7)).Q
    problem = Quadratic(basis @ torch.diag(spectrum) @ basis.mT)
    result = EXACT(problem.inner, problem.outer, problem.solution(), problem.phi)
    assert result.negative_curvature
    assert -0.4 - 1e-9 <= result.min_curvature < 0
    assert not result.converged
    assert "curvature" in result.problems[0]
    assert all(g.isfinite().all() for g in result.gradient)


def test_damping_that_cures_an_indefinite_hessian_does_not_hide_it():
    spectrum = torch.linspace(-0.4, 2.0, 10, dtype=torch.float64)
    basis = torch.linalg.qr(double(10, 10, seed=7)).Q
    problem = Quadratic(basis @ torch.diag(spectrum) @ basis.mT)
    theta = problem.solution()
    result = ImplicitCG(damping=0.5, tolerance=1e-10)(problem.inner, problem.outer, theta, problem.phi)
    assert result.converged
    assert result.negative_curvature
    assert "damping" in result.problems[0]
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, 0.5), rtol=1e-7, atol=1e-7)


def test_outer_loss_at_its_minimum_in_theta_needs_no_solve():
    problem = Quadratic(positive(10, seed=6))
    theta = problem.theta(problem.target)
    result = EXACT(problem.inner, problem.outer, theta, problem.phi)
    torch.testing.assert_close(problem.flat(result.gradient), problem.direct)
    assert result.residual_norm == 0.0
    assert result.converged


def gaussian_data(rows: int = 400, dim: int = 3) -> tuple[Tensor, Tensor]:
    """Targets with a known sample mean, and their sample covariance."""
    target = double(rows, dim, seed=11) @ positive(dim, seed=12) + 1.5
    centred = target - target.mean(dim=0)
    return target, centred.mT @ centred / rows


@pytest.mark.parametrize(("u", "entropy_coef"), [(0.3, 1.0), (2.0, 0.5)])
def test_isotropic_gaussian_closed_form(u, entropy_coef):
    """F'(u) = -n/(2u) + tr Σ/λ, with the mean at the data's and σ² = λ/(2u)."""
    target, covariance = gaussian_data()
    dim = target.shape[1]
    mean = target.mean(dim=0).requires_grad_()
    log_std = torch.full((dim,), 0.5 * math.log(entropy_coef / (2 * u)), dtype=torch.float64, requires_grad=True)
    precision = torch.tensor(u, dtype=torch.float64, requires_grad=True)

    def inner(theta, phi):
        return pk.gaussian_policy_loss(
            theta[0].expand_as(target), theta[1], target, phi[0], entropy_coef=entropy_coef, estimator="analytic"
        )

    def outer(theta, phi):
        return -pk.gaussian_log_prob(theta[0].expand_as(target), theta[1], target).mean()

    result = EXACT(inner, outer, (mean, log_std), (precision,))
    expected = -dim / (2 * u) + float(covariance.trace()) / entropy_coef
    assert float(result.gradient[0]) == pytest.approx(expected, rel=1e-8)


def test_scalar_gaussian_curvature_and_sensitivity():
    """n = 1, ρ = log σ: L_ρρ = 2λ at the inner optimum, and dρ*/du = -1/(2u)."""
    u, entropy_coef = 0.7, 1.3
    target = double(50, 1, seed=13)
    target -= target.mean()
    log_std = torch.full((1,), 0.5 * math.log(entropy_coef / (2 * u)), dtype=torch.float64, requires_grad=True)
    precision = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    mean = torch.zeros_like(target)

    def inner(theta, phi):
        return pk.gaussian_policy_loss(mean, theta[0], target, phi[0], entropy_coef=entropy_coef)

    result = EXACT(inner, lambda theta, phi: theta[0].sum(), (log_std,), (precision,))
    assert result.min_curvature == pytest.approx(2 * entropy_coef)
    assert float(result.gradient[0]) == pytest.approx(-1 / (2 * u))


def test_full_gaussian_closed_form():
    """∇F = -½ U⁻¹ + Σ/λ, with the mean at the data's and Σ_θ = (λ/2) U⁻¹."""
    entropy_coef = 0.8
    target, covariance = gaussian_data()
    mean = target.mean(dim=0).requires_grad_()
    u = positive(3, seed=14).requires_grad_()
    scale_tril = torch.linalg.cholesky(0.5 * entropy_coef * torch.linalg.inv(u.detach())).requires_grad_()

    def inner(theta, phi):
        return pk.mvn_policy_loss(
            theta[0].expand_as(target),
            torch.tril(theta[1]).expand(len(target), 3, 3),
            target,
            phi[0],
            entropy_coef=entropy_coef,
            estimator="analytic",
        )

    def outer(theta, phi):
        factor = torch.tril(theta[1]).expand(len(target), 3, 3)
        return -pk.mvn_log_prob(theta[0].expand_as(target), factor, target).mean()

    result = EXACT(inner, outer, (mean, scale_tril), (u,))
    expected = -0.5 * torch.linalg.inv(u.detach()) + covariance / entropy_coef
    torch.testing.assert_close(result.gradient[0], expected, rtol=1e-7, atol=1e-7)


def categorical_problem(estimator: str, num_samples: int | None = None, rows: int = 60):
    """A linear softmax policy at its inner optimum under a learned table."""
    inputs, target = double(rows, 2, seed=15), torch.arange(rows) % 3
    inputs[:, 0] += target
    weight = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    table = (-2.0 * (1 - torch.eye(3, dtype=torch.float64))).requires_grad_()

    def inner(theta, phi, estimator=estimator, num_samples=num_samples):
        loss = pk.categorical_policy_loss(
            inputs @ theta[0].mT, target, phi[0], entropy_coef=1.0, estimator=estimator, num_samples=num_samples, seed=3
        )
        return loss + 0.05 * theta[0].square().sum()

    def outer(theta, phi):
        return -pk.categorical_log_prob(inputs @ theta[0].mT, target).mean()

    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = inner((weight,), (table.detach(),), "exact", None)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return inner, outer, (weight,), (table,)


def test_exact_categorical_equals_dense_solve_and_finite_differences():
    inner, outer, theta, phi = categorical_problem("exact")
    result = EXACT(inner, outer, theta, phi)
    hessian = torch.autograd.functional.hessian(lambda w: inner((w,), phi), theta[0]).reshape(6, 6)
    (gradient,) = torch.autograd.grad(inner(theta, phi), theta, create_graph=True)
    mixed = torch.stack([torch.autograd.grad(g, phi[0], retain_graph=True)[0] for g in gradient.reshape(-1)])
    (right,) = torch.autograd.grad(outer(theta, phi), theta)
    solution = torch.linalg.solve(hessian, right.reshape(-1))
    expected = -torch.einsum("pij,p->ij", mixed, solution)
    torch.testing.assert_close(result.gradient[0], expected, rtol=1e-7, atol=1e-9)
    assert result.converged
    # The penalty, 0.05 ‖θ‖², is the whole curvature along equal shifts of all logits.
    assert result.min_curvature > 0.09


def test_dice_agrees_with_exact():
    exact = EXACT(*categorical_problem("exact")).gradient[0]
    dice = EXACT(*categorical_problem("dice", num_samples=4000)).gradient[0]
    # 240000 samples leave about half a percent of noise in first derivatives and more in second ones.
    assert float((dice * exact).sum() / (dice.norm() * exact.norm())) > 0.99
    assert float((dice - exact).norm() / exact.norm()) < 0.1


def test_sampled_loss_is_evaluated_with_common_random_numbers():
    problem = categorical_problem("dice", num_samples=8)
    first, second = EXACT(*problem), EXACT(*problem)
    assert torch.equal(first.gradient[0], second.gradient[0])


def test_reinforce_is_refused_by_name():
    inner, outer, theta, phi = categorical_problem("reinforce", num_samples=4)
    with pytest.raises(RuntimeError, match="dice"):
        EXACT(inner, outer, theta, phi)


def test_phi_that_does_not_reach_the_inner_loss():
    inner, outer, theta, phi = categorical_problem("exact")
    with pytest.raises(ValueError, match=r"phi\[0\].*does not reach"):
        EXACT(lambda theta, phi: inner(theta, (phi[0].detach(),)), outer, theta, phi)


@pytest.mark.parametrize("name", ["theta", "phi"])
def test_parameters_that_do_not_require_grad(name):
    inner, outer, theta, phi = categorical_problem("exact")
    arguments = {"theta": theta, "phi": phi}
    arguments[name] = (arguments[name][0].detach(),)
    with pytest.raises(ValueError, match=rf"{name}\[0\].*requires grad"):
        EXACT(inner, outer, arguments["theta"], arguments["phi"])


def test_losses_that_do_not_depend_on_theta():
    inner, outer, theta, phi = categorical_problem("exact")
    with pytest.raises(ValueError, match=r"inner_loss.*depends on theta"):
        EXACT(lambda theta, phi: inner((theta[0].detach(),), phi), outer, theta, phi)
    with pytest.raises(ValueError, match=r"outer_loss.*detached"):
        EXACT(inner, lambda theta, phi: outer(theta, phi).detach(), theta, phi)


def test_inner_loss_without_second_derivative():
    _, outer, theta, phi = categorical_problem("exact")
    with pytest.raises(ValueError, match="twice differentiable"):
        EXACT(lambda theta, phi: theta[0].sum(), outer, theta, phi)


def test_start_of_other_shapes():
    inner, outer, theta, phi = categorical_problem("exact")
    with pytest.raises(ValueError, match="start: expected shapes"):
        EXACT(inner, outer, theta, phi, start=(torch.zeros(4, dtype=torch.float64),))


def test_non_finite_loss():
    inner, outer, theta, phi = categorical_problem("exact")
    with pytest.raises(NonFiniteError, match="inner_loss"):
        EXACT(lambda theta, phi: inner(theta, phi) * float("nan"), outer, theta, phi)


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"tolerance": 0.0}, {"max_iterations": 0}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ImplicitCG(**options)
