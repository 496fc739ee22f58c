"""Implicit hypergradients against closed forms and dense solves; sampled ones against exact ones."""

import math

import pytest
import torch
from po_bilevel import (
    Dense,
    FiniteDifference,
    FixedPoint,
    Identity,
    ImplicitCG,
    Neumann,
    NonFiniteError,
    NormalCG,
    Recompute,
    Truncated,
    Unrolled,
)
from po_bilevel.hypergradients import problem as problem_module
from problems import EXACT, SOLVERS, Quadratic, categorical_problem, double, name, positive
from torch import Tensor

import po_kernels as pk


def gaussian_data(rows: int = 400, dim: int = 3) -> tuple[Tensor, Tensor]:
    """Targets with a known sample mean, and their sample covariance."""
    target = double(rows, dim, seed=11) @ positive(dim, seed=12) + 1.5
    centred = target - target.mean(dim=0)
    return target, centred.mT @ centred / rows


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
def test_stochastic_hypergradients_point_the_right_way(method):
    exact = EXACT(*gaussian_problem("analytic", None, None)).gradient[0]
    cosines = []
    for estimator, group, seed in [*(("dice", 256, seed) for seed in range(4)), ("reparam", 16, 0), ("reparam", 16, 1)]:
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
    """K products cost K passes, of which one reaches φ; the losses are evaluated once, and once to be compared."""
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
    assert len(evaluations) == 2
