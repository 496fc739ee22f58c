"""Every hypergradient method against the dense solve, each other, and bad input."""

import dataclasses

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
from problems import EXACT, RATE, SOLVERS, STEPS, Quadratic, categorical_problem, double, every_method, name, positive

UNROLLED = [Unrolled(STEPS, RATE), Recompute(STEPS, RATE), Truncated(2 * STEPS, STEPS, RATE)]


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
    for multiplier in (1000.0, 10000.0):
        method = Penalty(multiplier, STEPS, 0.5)
        result = method(problem.inner, problem.outer, theta, problem.phi)
        assert result.converged
        errors.append(float((problem.flat(result.gradient) - exact).norm()))
        warm = Penalty(multiplier, 1, 0.5)(problem.inner, problem.outer, theta, problem.phi, start=result.solution)
        torch.testing.assert_close(warm.gradient, result.gradient)
    # The error is ‖B Hᵀ⁻¹ (H⁻¹ b)/μ‖ to first order; H⁻¹ is at most 2.
    assert errors[0] < 10.0 * float(exact.norm()) / 1000.0
    # To second order it is less by the factor 1 - ‖H⁻¹‖/μ at most, of which 2/1000 is the larger.
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=2.0 / 1000.0)
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
    # Inside its range, where there is a minimum.
    problem.coupling = problem.hessian @ problem.coupling
    theta = problem.theta(torch.linalg.pinv(problem.hessian) @ problem.coupling @ problem.flat(problem.phi).detach())
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


@pytest.mark.parametrize("method", every_method(), ids=name)
def test_a_part_of_phi_in_the_outer_loss_only(method):
    """φ' of F + φ'·θ₁: its derivative is θ₁, and the others' are what they are with φ' a constant."""
    if isinstance(method, EvolutionStrategies):
        method = dataclasses.replace(method, pairs=7)  # as many as φ, with which it is exact
    problem = Quadratic(positive(10, seed=6))
    alone = double(3, seed=7).requires_grad_()
    theta, phi = problem.solution(), problem.phi

    def outer(theta, phi):
        return problem.outer(theta, phi[:-1]) + phi[-1] @ problem.flat(theta)[:3]

    found = method(lambda theta, phi: problem.inner(theta, phi[:-1]), outer, theta, (*phi, alone))
    # Where the method takes F's derivative.
    at = found.theta if isinstance(method, Unrolled) else found.solution if isinstance(method, Penalty) else theta
    torch.testing.assert_close(found.gradient[-1], problem.flat(at)[:3].detach(), rtol=1e-6, atol=1e-6)
    assert not any("phi[2]" in sentence for sentence in found.problems)
    if not isinstance(method, EvolutionStrategies):  # its directions are of another space
        known = method(problem.inner, lambda theta, phi: outer(theta, (*phi, alone.detach())), theta, phi)
        torch.testing.assert_close(found.gradient[:-1], known.gradient, rtol=1e-9, atol=1e-9)


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
