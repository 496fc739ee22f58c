"""Hypergradients against closed forms, dense solves and each other."""

import math

import pytest
import torch
from po_bilevel import (
    BOME,
    Dense,
    EvolutionStrategies,
    FiniteDifference,
    FixedPoint,
    Identity,
    ImplicitCG,
    Neumann,
    NonFiniteError,
    NormalCG,
    Penalty,
    Recompute,
    SingleLoop,
    Truncated,
    Unrolled,
)
from po_bilevel.hypergradients import problem as problem_module
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


# Eigenvalues of `positive(10, 6)` are between 0.5 and 2.7: 0.6 · 2.7 < 2, and (1 - 0.6 · 0.5)^STEPS is rounding.
RATE, STEPS = 0.6, 100
SOLVERS = [
    ImplicitCG(tolerance=1e-12),
    NormalCG(tolerance=1e-12),
    Neumann(STEPS, RATE),
    Neumann(200),
    FixedPoint(RATE, tolerance=1e-12),
    FixedPoint(tolerance=1e-12),
    Dense(),
]
UNROLLED = [Unrolled(STEPS, RATE), Recompute(STEPS, RATE), Truncated(2 * STEPS, STEPS, RATE)]


def name(method) -> str:
    return type(method).__name__


def test_dense_is_the_closed_form():
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    for damping in (0.0, 0.3):
        result = Dense(damping)(problem.inner, problem.outer, theta, problem.phi)
        torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, damping), rtol=1e-11, atol=1e-11)
    assert result.min_curvature == pytest.approx(float(torch.linalg.eigvalsh(problem.hessian)[0]))
    # A product for each column, and the last with the mixed one.
    assert result.num_products == 11
    assert result.problems == ()


@pytest.mark.parametrize("method", SOLVERS, ids=name)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_every_solver_equals_the_dense_one(method, damping):
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    method = type(method)(**{**vars(method), "damping": damping})
    result = method(problem.inner, problem.outer, theta, problem.phi)
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, damping), rtol=1e-9, atol=1e-9)
    assert result.residual_norm < 1e-10
    assert result.converged
    assert result.problems == ()
    assert 0.5 <= result.min_curvature <= 2.7
    assert [v.shape for v in result.solution] == [t.shape for t in theta]
    assert result.theta is None


@pytest.mark.parametrize("method", UNROLLED, ids=name)
def test_unrolled_tends_to_the_implicit_gradient(method):
    """From a θ that is not a minimum: gradient descent gets there, and so does its derivative."""
    problem = Quadratic(positive(10, seed=6))
    start = problem.theta(double(10, seed=20))
    result = method(problem.inner, problem.outer, start, problem.phi)
    exact = problem.solution()
    torch.testing.assert_close(problem.flat(result.theta), problem.flat(exact), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(exact, 0.0), rtol=1e-9, atol=1e-9)
    assert result.inner_loss == pytest.approx(float(problem.inner(exact, problem.phi).detach()))
    assert result.outer_loss == pytest.approx(float(problem.outer(exact, problem.phi).detach()))
    assert result.num_products == STEPS
    assert result.residual_norm is None


def test_unrolled_is_the_derivative_of_the_steps_taken():
    """Few steps, no convergence: against differences of F(θ_T(φ)). Recompute is the same, whatever √T leaves over."""
    problem = Quadratic(positive(10, seed=6))
    start = problem.theta(double(10, seed=20))
    for steps in (1, 2, 5, 7, 12):
        results = [
            method(steps, 0.1)(problem.inner, problem.outer, start, problem.phi) for method in (Unrolled, Recompute)
        ]
        flats = [problem.flat(result.gradient) for result in results]
        torch.testing.assert_close(flats[0], flats[1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(results[0].theta, results[1].theta, rtol=1e-12, atol=1e-12)
        value = []
        for shift in (1e-5, -1e-5):
            phi = (problem.phi[0].detach(), (problem.phi[1].detach() + shift).requires_grad_())
            value.append(
                Unrolled(steps, 0.1)(problem.inner, problem.outer, start, (phi[0].requires_grad_(), phi[1])).outer_loss
            )
        # F(θ_T(φ)) is quadratic in φ: central differences have no error but rounding, 1e-15 / 1e-5.
        assert float(results[0].gradient[1]) == pytest.approx((value[0] - value[1]) / 2e-5, rel=1e-8)


def test_the_last_steps_at_a_minimum_are_a_neumann_series():
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    series = Neumann(5, 0.2)(problem.inner, problem.outer, theta, problem.phi)
    truncated = Truncated(9, 5, 0.2)(problem.inner, problem.outer, theta, problem.phi)
    torch.testing.assert_close(truncated.gradient, series.gradient, rtol=1e-10, atol=1e-10)
    # Five terms are not enough, and the series says so.
    assert not series.converged
    assert "residual" in series.problems[0]
    assert series.num_products == 5


@pytest.mark.parametrize("method", [Identity(2.0), FiniteDifference(2.0)], ids=name)
def test_identity_methods_are_right_for_a_multiple_of_the_identity(method):
    problem = Quadratic(0.5 * torch.eye(10, dtype=torch.float64))
    theta = problem.solution()
    result = method(problem.inner, problem.outer, theta, problem.phi)
    # L is bilinear in θ and φ, so that differences have no error but rounding, 1e-16 / 1e-2.
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, 0.0), rtol=1e-11, atol=1e-11)
    other = Quadratic(positive(10, seed=6))
    residual = Identity(2.0)(other.inner, other.outer, theta, other.phi).residual_norm
    right = problem.flat(theta).detach() - other.target
    assert residual == pytest.approx(float((right - 2.0 * other.hessian @ right).norm() / right.norm()))


def test_single_loop_gets_there_a_step_at_a_time():
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    method = SingleLoop(RATE)
    result = method(problem.inner, problem.outer, theta, problem.phi)
    torch.testing.assert_close(problem.flat(result.gradient), problem.direct)
    for _ in range(STEPS):
        result = method(problem.inner, problem.outer, theta, problem.phi, start=result.solution)
        assert result.num_products == 1
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, 0.0), rtol=1e-9, atol=1e-9)
    assert result.residual_norm < 1e-10


def test_penalty_is_right_to_first_order_in_its_inverse():
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    exact = problem.dense(theta, 0.0)
    errors = []
    for multiplier in (100.0, 1000.0):
        method = Penalty(multiplier, STEPS, 0.5)
        result = method(problem.inner, problem.outer, theta, problem.phi)
        assert result.converged
        errors.append(float((problem.flat(result.gradient) - exact).norm()))
        warm = Penalty(multiplier, 1, 0.5)(problem.inner, problem.outer, theta, problem.phi, start=result.solution)
        torch.testing.assert_close(warm.gradient, result.gradient)
    # The error is ‖B Hᵀ⁻¹ (H⁻¹ b)/μ‖ to first order; H⁻¹ is at most 2.
    assert errors[0] < 10.0 * float(exact.norm()) / 100.0
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.05)
    short = Penalty(100.0, 1, 0.1)(problem.inner, problem.outer, theta, problem.phi)
    assert not short.converged
    assert "more steps" in short.problems[0]


def test_evolution_strategies_in_all_directions_are_exact_for_a_quadratic():
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    method = EvolutionStrategies(pairs=8, radius=0.1, steps=STEPS, learning_rate=RATE, seed=1)
    result = method(problem.inner, problem.outer, theta, problem.phi)
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, 0.0), rtol=1e-9, atol=1e-9)
    drawn = EvolutionStrategies(pairs=2, radius=0.1, steps=STEPS, learning_rate=RATE)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append([drawn(problem.inner, problem.outer, theta, problem.phi).gradient[0] for _ in range(2)])
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[0][1])


def test_bome_finds_the_bilevel_minimum():
    """Joint steps from a poor (θ, φ): in the end the true hypergradient is small."""
    problem = Quadratic(positive(10, seed=6))

    # Strongly convex in φ, so that there is one minimum.
    def outer(theta, phi):
        return problem.outer(theta, phi) + problem.flat(phi).square().sum()

    def exact():
        return problem.flat(EXACT(problem.inner, outer, problem.solution(), problem.phi).gradient)

    before = float(exact().norm())
    theta = problem.theta(double(10, seed=20))
    method = BOME(steps=10, learning_rate=0.3, step=0.03)
    for _ in range(500):
        result = method(problem.inner, outer, theta, problem.phi)
        theta = tuple(t.requires_grad_() for t in result.theta)
        with torch.no_grad():
            for p, g in zip(problem.phi, result.gradient, strict=True):
                p -= 0.03 * g
    # μ stays finite, so that θ stays off the inner minimum by the order of 1/μ.
    assert float(exact().norm()) < 0.05 * before


@pytest.mark.parametrize("method", SOLVERS[1:], ids=name)
def test_every_solver_reports_an_indefinite_hessian(method):
    # No two of the same size: the normal equations see eigenvalues squared.
    spectrum = torch.linspace(-0.43, 2.0, 10, dtype=torch.float64)
    basis = torch.linalg.qr(double(10, 10, seed=7)).Q
    problem = Quadratic(basis @ torch.diag(spectrum) @ basis.mT)
    theta = problem.solution()
    result = method(problem.inner, problem.outer, theta, problem.phi)
    assert result.negative_curvature
    assert "curvature" in " ".join(result.problems)
    if isinstance(method, (NormalCG, Dense)):
        # These solve the system all the same.
        torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, 0.0), rtol=1e-7, atol=1e-7)
        assert result.converged
    else:
        assert not result.converged
        assert "diverges" in result.problems[0]


def test_a_singular_hessian_is_reported_where_it_matters():
    root = double(10, 4, seed=8)
    problem = Quadratic(root @ root.mT)
    theta = problem.theta(torch.zeros(10, dtype=torch.float64))
    result = Dense()(problem.inner, problem.outer, theta, problem.phi)
    assert "singular along 6 directions" in result.problems[0]
    assert not result.converged
    cured = Dense(damping=0.1)(problem.inner, problem.outer, theta, problem.phi)
    assert cured.problems == ()
    # An outer loss that sees the range of the Hessian only asks for no more.
    right = problem.hessian @ double(10, seed=9)
    seen = Dense()(problem.inner, lambda theta, phi: problem.flat(theta) @ right, theta, problem.phi)
    assert seen.problems == ()
    torch.testing.assert_close(
        problem.flat(seen.gradient), problem.coupling.mT @ torch.linalg.pinv(problem.hessian) @ right
    )


def test_dense_refuses_what_it_cannot_hold():
    problem = Quadratic(positive(10, seed=6))
    with pytest.raises(ValueError, match=r"Dense: theta: expected at most max_size = 9 parameters, got 10.*ImplicitCG"):
        Dense(max_size=9)(problem.inner, problem.outer, problem.solution(), problem.phi)


def every_method():
    return [
        *SOLVERS, Identity(), SingleLoop(0.1), Unrolled(2, 0.1), Recompute(2, 0.1), Truncated(2, 1, 0.1),
        FiniteDifference(), Penalty(10.0, 2, 0.1, tolerance=10.0), BOME(2, 0.1, 0.1),
        EvolutionStrategies(2, 0.1, 2, 0.1),
    ]  # fmt: skip


@pytest.mark.parametrize("method", every_method(), ids=name)
def test_every_method_on_bad_input(method):
    inner, outer, theta, phi = categorical_problem("exact")
    with pytest.raises(ValueError, match=r"phi\[0\].*does not reach"):
        method(lambda theta, _: inner(theta, (phi[0].detach(),)), outer, theta, phi)
    with pytest.raises(TypeError, match=r"inner_loss: expected a loss that is a tensor, got float"):
        method(lambda theta, phi: 1.0, outer, theta, phi)
    with pytest.raises(ValueError, match=r"theta\[0\].*requires grad"):
        method(inner, outer, (theta[0].detach(),), phi)
    with pytest.raises(ValueError, match=r"phi\[0\].*requires grad"):
        method(inner, outer, theta, (phi[0].detach(),))
    with pytest.raises(ValueError, match=r"outer_loss.*detached"):
        method(inner, lambda theta, phi: outer(theta, phi).detach(), theta, phi)
    with pytest.raises(NonFiniteError, match="inner_loss"):
        method(lambda theta, phi: inner(theta, phi) * float("nan"), outer, theta, phi)
    with pytest.raises(NonFiniteError, match="outer_loss"):
        method(inner, lambda theta, phi: outer(theta, phi) * float("inf"), theta, phi)
    theta[0].grad = None
    result = method(inner, outer, theta, phi)
    assert [g.shape for g in result.gradient] == [(3, 3)]
    assert theta[0].grad is None
    assert phi[0].grad is None


@pytest.mark.parametrize("method", every_method(), ids=name)
def test_reinforce_serves_first_order_methods_only(method):
    problem = categorical_problem("reinforce", num_samples=4)
    if isinstance(method, (FiniteDifference, Penalty, BOME, EvolutionStrategies)):
        assert method(*problem).gradient[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="dice"):
            method(*problem)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: NormalCG(tolerance=0.0), "tolerance"),
        (lambda: Neumann(terms=0), "terms"),
        (lambda: Neumann(learning_rate=-1.0), "learning_rate"),
        (lambda: FixedPoint(max_iterations=0), "max_iterations"),
        (lambda: Dense(max_size=0), "max_size"),
        (lambda: Identity(scale=0.0), "scale"),
        (lambda: SingleLoop(float("nan")), "learning_rate"),
        (lambda: Unrolled(0, 0.1), "steps"),
        (lambda: Truncated(2, 3, 0.1), "backward_steps"),
        (lambda: FiniteDifference(radius=0.0), "radius"),
        (lambda: Penalty(0.0, 1, 0.1), "multiplier"),
        (lambda: BOME(1, 0.1, 0.0), "step"),
        (lambda: EvolutionStrategies(0, 0.1, 1, 0.1), "pairs"),
        (lambda: EvolutionStrategies(1, 0.1, 2.5, 0.1), "steps"),
        (lambda: Identity(None), "scale"),
        (lambda: ImplicitCG(damping=float("inf")), "damping"),
    ],
)
def test_options_of_other_methods_out_of_range(make, option):
    with pytest.raises(ValueError, match=rf"{option}: expected"):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [Neumann(20, 0.5), Neumann(100), FixedPoint(), ImplicitCG(), NormalCG()], ids=name)
def test_a_system_that_is_solved_to_rounding(method, dtype):
    """One parameter, and a step of exactly one over its curvature: what is left is zero, or too small to square."""
    theta = (torch.tensor([0.3], dtype=dtype, requires_grad=True),)
    phi = (torch.tensor([0.3], dtype=dtype, requires_grad=True),)
    result = method(
        lambda theta, phi: (theta[0] - phi[0]).square().sum(), lambda theta, phi: theta[0].exp().sum(), theta, phi
    )
    assert result.converged
    assert result.min_curvature == pytest.approx(2.0, rel=1e-5)
    torch.testing.assert_close(result.gradient[0], theta[0].detach().exp(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_systems_on_the_normal_equations(dtype):
    """θ is determined along k of five directions; what of ∂F/∂θ lies along the others is said, and left out."""
    for seed in range(60):
        k = 1 + seed % 4
        matrix, target = double(k, 5, seed=seed).to(dtype), double(5, seed=seed + 100).to(dtype)
        theta = (torch.zeros(5, dtype=dtype, requires_grad=True),)
        phi = (torch.ones(k, dtype=dtype, requires_grad=True),)
        problem = (
            lambda theta, phi, matrix=matrix: 0.5 * (matrix @ theta[0] - phi[0]).square().sum(),
            lambda theta, phi, target=target: (theta[0] - target).square().sum(),
        )  # fmt: skip
        result = NormalCG()(*problem, theta, phi)
        assert not result.converged
        assert "singular" in result.problems[0] or "after" in result.problems[0]
        # The right answer goes with the pseudo-inverse. κ(BᵀB) = κ(B)², squared by the normal equations.
        expected = Dense()(*problem, theta, phi).gradient[0]
        error = 1000.0 * torch.finfo(dtype).eps * float(torch.linalg.cond(matrix.double())) ** 4
        scale = float(torch.linalg.pinv(matrix).norm() * target.norm())
        torch.testing.assert_close(result.gradient[0], expected, rtol=0.0, atol=min(1.0, error) * scale)


@pytest.mark.parametrize("method", [*SOLVERS, Identity(), SingleLoop(0.1)], ids=name)
def test_a_hessian_that_is_not_finite(method):
    theta, phi = (torch.zeros(2, dtype=torch.float64, requires_grad=True),), (torch.ones((), requires_grad=True),)

    def inner(theta, phi):
        # The second derivative of |θ|^1.5 at zero is infinite.
        return (theta[0].abs() ** 1.5).sum() * phi[0] + (theta[0] * phi[0]).sum()

    with pytest.raises(NonFiniteError, match="Hessian of the inner loss"):
        method(inner, lambda theta, phi: (theta[0] - 1.0).square().sum(), theta, phi)


@pytest.mark.parametrize("method", every_method(), ids=name)
def test_how_theta_was_come_by_is_no_part_of_it(method):
    """θ computed from φ gives what θ of its value does."""
    inner, outer, theta, phi = categorical_problem("exact")
    moved = tuple(t + 0.0 * phi[0].sum() for t in theta)
    torch.manual_seed(0)
    expected = method(inner, outer, theta, phi).gradient
    torch.manual_seed(0)
    for got, want in zip(method(inner, outer, moved, phi).gradient, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "method", [FiniteDifference(), Penalty(10.0, 2, 0.1, tolerance=10.0), BOME(2, 0.1, 0.1)], ids=name
)
def test_a_reward_that_does_not_move_the_minimum_is_reported(method):
    inner, outer, theta, phi = categorical_problem("exact")
    constant = (phi[0].detach(),)
    result = method(lambda theta, phi: inner(theta, constant) + phi[0].square().sum(), outer, theta, phi)
    assert "phi[0]" in result.problems[-1]


def test_single_loop_says_that_it_diverges():
    problem = Quadratic(positive(10, seed=3))
    start = None
    for _ in range(6):
        result = SingleLoop(5.0)(problem.inner, problem.outer, problem.solution(), problem.phi, start=start)
        start = result.solution
    assert "lower the learning rate" in result.problems[0]


def gaussian_problem(estimator: str, num_samples: int | None, seed: int | None):
    """A Gaussian with a linear mean at its inner optimum, under a diagonal precision that is not optimal."""
    rows, u, entropy_coef = 400, torch.tensor([0.4, 1.0, 3.0], dtype=torch.float64), 1.0
    inputs = torch.cat([double(rows, 2, seed=21), torch.ones(rows, 1, dtype=torch.float64)], dim=1)
    target = inputs @ double(3, 3, seed=22) + double(rows, 3, seed=23)
    weight = torch.linalg.lstsq(inputs, target).solution.requires_grad_()
    log_std = (0.5 * torch.log(entropy_coef / (2 * u))).requires_grad_()

    def inner(theta, phi):
        return pk.gaussian_policy_loss(
            inputs @ theta[0], theta[1], target, phi[0], entropy_coef=entropy_coef, estimator=estimator,
            num_samples=num_samples, seed=seed,
        )  # fmt: skip

    def outer(theta, phi):
        return -pk.gaussian_log_prob(inputs @ theta[0], theta[1], target).mean()

    return inner, outer, (weight, log_std), (u.clone().requires_grad_(),)


@pytest.mark.parametrize(
    "method",
    [
        ImplicitCG(damping=0.1), NormalCG(damping=0.1), Neumann(20, 0.15), FixedPoint(0.15, tolerance=1e-3),
        Unrolled(20, 0.15), Identity(0.5), FiniteDifference(0.5),
    ],
    ids=name,
)  # fmt: skip
@pytest.mark.parametrize(("estimator", "group"), [("dice", 256), ("reparam", 16)])
def test_stochastic_hypergradients_point_the_right_way(method, estimator, group):
    exact = EXACT(*gaussian_problem("analytic", None, None)).gradient[0]
    cosines = []
    for seed in range(8):
        gradient = method(*gaussian_problem(estimator, group, seed)).gradient[0]
        cosines.append(float(gradient @ exact / (gradient.norm() * exact.norm())))
    assert sum(cosines) / len(cosines) > 0.95
    assert min(cosines) > 0.85


def test_the_surrogate_that_is_differentiated_twice_has_the_wrong_sign():
    """n = 1, ρ = log σ: curvature 2λ, and -2u(3σ² + s²) for the plain score-function loss, s² the targets' spread."""
    u, entropy_coef, group = 0.7, 1.3, 20000
    target = double(50, 1, seed=13)
    target -= target.mean()
    variance = entropy_coef / (2 * u)
    log_std = torch.full((1,), 0.5 * math.log(variance), dtype=torch.float64, requires_grad=True)
    precision = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    mean = torch.zeros_like(target)

    def dice(theta, phi):
        return pk.gaussian_policy_loss(
            mean, theta[0], target, phi[0], entropy_coef=entropy_coef, estimator="dice", num_samples=group, seed=1
        )

    def naive(theta, phi):
        samples = pk.gaussian_sample(mean, theta[0], group, seed=1).detach()
        rewards = -phi[0] * (samples - target).square().sum(dim=-1)
        log_prob = -0.5 * ((samples - mean) / theta[0].exp()).square().sum(dim=-1) - theta[0].sum()
        return -(rewards * log_prob).mean() - entropy_coef * theta[0].sum()

    right = Dense()(dice, lambda theta, phi: theta[0].sum(), (log_std,), (precision,))
    wrong = Dense()(naive, lambda theta, phi: theta[0].sum(), (log_std,), (precision,))
    spread = float(target.square().mean())
    # A million samples: the fourth moments that the curvature averages have relative errors below 1%.
    assert right.min_curvature == pytest.approx(2 * entropy_coef, rel=0.02)
    assert float(right.gradient[0]) == pytest.approx(-1 / (2 * u), rel=0.02)
    assert wrong.min_curvature == pytest.approx(-2 * u * (3 * variance + spread), rel=0.02)
    assert wrong.negative_curvature
    assert float(wrong.gradient[0]) > 0


class Memory:
    """Bytes that autograd graphs hold, and the most that they held at once."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    class Held:
        def __init__(self, memory: "Memory", tensor: Tensor) -> None:
            self.memory, self.tensor = memory, tensor.detach() if tensor.is_leaf else tensor
            self.size = tensor.numel() * tensor.element_size()
            memory.now += self.size
            memory.peak = max(memory.peak, memory.now)

        def __del__(self) -> None:
            self.memory.now -= self.size

    def of(self, function) -> int:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: Memory.Held(self, t), lambda held: held.tensor)
        with hooks:
            function()
        return self.peak


def test_memory_of_unrolling_grows_with_the_steps_and_that_of_recomputing_with_their_root():
    problem = categorical_problem("exact")

    def peak(method):
        return Memory().of(lambda: method(*problem))

    one = peak(Unrolled(1, 0.1))
    step = peak(Unrolled(2, 0.1)) - one
    assert peak(Unrolled(64, 0.1)) == pytest.approx(one + 63 * step)
    # Eight pieces of eight steps.
    assert peak(Recompute(64, 0.1)) == pytest.approx(one + 7 * step)
    assert peak(Truncated(64, 8, 0.1)) == pytest.approx(one + 7 * step)
    assert peak(ImplicitCG()) <= one


@pytest.mark.parametrize("method", [m for m in SOLVERS if not isinstance(m, Dense)], ids=name)
def test_a_product_is_one_backward_pass_and_the_last_brings_the_mixed_one(method, monkeypatch):
    """K products cost K passes, of which one reaches φ; the losses are evaluated once."""
    problem = Quadratic(positive(10, seed=6))
    calls, evaluations = [], []
    contract = problem_module._contract

    def counted(gradient, inputs, vector):
        calls.append(len(inputs))
        return contract(gradient, inputs, vector)

    def inner(theta, phi):
        evaluations.append(1)
        return problem.inner(theta, phi)

    monkeypatch.setattr(problem_module, "_contract", counted)
    result = method(inner, problem.outer, problem.solution(), problem.phi)
    assert len(calls) == result.num_products
    assert calls[:-1] == [2] * (len(calls) - 1)
    assert calls[-1] == 4
    assert len(evaluations) == 1
