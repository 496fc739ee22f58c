"""Preconditioners, linear solvers of one's own, warm starts, and products over minibatches."""

import dataclasses
import functools

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from po_bilevel import (
    Dense,
    FixedPointProblem,
    Identity,
    ImplicitCG,
    Jacobi,
    LinearSolver,
    Minibatches,
    Neumann,
    NonFiniteError,
    Nystrom,
    QuasiNewton,
    solve,
)
from problems import EXACT, SOLVERS, Quadratic, bilevel, double, every_method, graphs_held, name, positive

CG = ImplicitCG(max_iterations=3000)


def quadratic(hessian):
    """L = ½ θᵀHθ - θᵀφ and F = θᵀb, so that the hypergradient is H⁻¹ b; at the minimum, zero."""
    size = len(hessian)
    theta, phi = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    right = double(size, seed=50)
    inner, outer = (lambda t, p: 0.5 * t @ hessian @ t - t @ p), (lambda t, p: t @ right)
    return (inner, outer, theta, phi), torch.linalg.solve(hessian, right)


def rotated(spectrum):
    basis = torch.linalg.qr(double(len(spectrum), len(spectrum), seed=51)).Q
    hessian = basis @ torch.diag(spectrum) @ basis.mT
    return 0.5 * (hessian + hessian.mT)


def outliers():
    """Forty large eigenvalues above a bulk near one, as Hessians of networks have; a condition number of 10⁵."""
    large = torch.logspace(2, 5, 40, dtype=torch.float64)
    return rotated(torch.cat([large, torch.linspace(1, 3, 260, dtype=torch.float64)]))


def scales():
    """Parameters of scales over five decades, with entries beside the diagonal that are small."""
    coupling = 0.05 * double(300, 300, seed=52) / 300**0.5
    return torch.diag(torch.logspace(0, 5, 300, dtype=torch.float64)) + coupling + coupling.mT


@pytest.mark.parametrize(
    ("hessian", "preconditioner"),
    [
        (outliers(), Nystrom(45)),
        (scales(), Jacobi(probes=2)),
        (scales(), Jacobi(lambda theta, phi: scales().diagonal())),
        (scales(), lambda v: v / scales().diagonal()),
    ],
)
def test_a_third_of_the_products_on_a_condition_number_of_a_hundred_thousand(hessian, preconditioner):
    """Those that make the preconditioner included."""
    problem, exact = quadratic(hessian)
    # What the name says, nearly: where a bulk of eigenvalues begins near one, its least is not one.
    assert float(torch.linalg.cond(hessian)) == pytest.approx(1e5, rel=0.1)
    plain = CG(*problem)
    result = dataclasses.replace(CG, preconditioner=preconditioner)(*problem)
    assert result.converged
    assert result.problems == ()
    assert result.num_products <= plain.num_products / 3
    # A residual of 1e-6 at a least eigenvalue of one.
    torch.testing.assert_close(result.gradient, exact, rtol=0.0, atol=1e-6 * float(double(300, seed=50).norm()))


@pytest.mark.parametrize("preconditioner", [Nystrom(4), Nystrom(50), Jacobi(), Jacobi(probes=50), lambda v: 3.0 * v])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_preconditioner_changes_nothing_but_the_products(preconditioner, damping):
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    method = ImplicitCG(damping, tolerance=1e-12, preconditioner=preconditioner)
    if not isinstance(preconditioner, (Nystrom, Jacobi)):
        method = dataclasses.replace(method, preconditioner=lambda v: tuple(map(preconditioner, v)))
    result = method(problem.inner, problem.outer, theta, problem.phi)
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, damping), rtol=1e-9, atol=1e-9)
    assert result.converged
    warm = method(problem.inner, problem.outer, theta, problem.phi, start=result.solution)
    assert warm.num_products < result.num_products
    torch.testing.assert_close(warm.gradient, result.gradient)


def test_preconditioners_that_are_not_positive():
    problem, _ = quadratic(positive(10, seed=6))
    with pytest.raises(ValueError, match="ImplicitCG: preconditioner: expected a positive definite one"):
        ImplicitCG(preconditioner=lambda v: -v)(*problem)
    with pytest.raises(ValueError, match="Jacobi: diagonal: expected positive numbers with the damping 0, got -1"):
        ImplicitCG(preconditioner=Jacobi(lambda theta, phi: -torch.ones(10)))(*problem)
    with pytest.raises(ValueError, match=r"Jacobi: diagonal: expected shapes \[\(10,\)\] like theta"):
        ImplicitCG(preconditioner=Jacobi(lambda theta, phi: torch.ones(3)))(*problem)
    with pytest.raises(ValueError, match=r"preconditioner: expected shapes \[\(10,\)\] like theta, got \[\(3,\)\]"):
        ImplicitCG(preconditioner=lambda v: v[:3])(*problem)
    with pytest.raises(ValueError, match="Nystrom: rank: expected an integer of at least 1, got 0"):
        Nystrom(0)
    # What the sketch meets of an indefinite Hessian is said, as what the solve meets is.
    indefinite, _ = quadratic(rotated(torch.linspace(-0.4, 2.0, 10, dtype=torch.float64)))
    result = ImplicitCG(preconditioner=Nystrom(10))(*indefinite)
    assert result.negative_curvature
    assert not result.converged


@pytest.mark.parametrize("preconditioner", [Nystrom(2), Jacobi(lambda theta, phi: phi.detach()), lambda v: 2.0 * v])
def test_derivatives_of_a_solution_through_a_preconditioned_solve(preconditioner):
    phi = double(3, seed=53).exp().requires_grad_()
    method = ImplicitCG(tolerance=1e-12, preconditioner=preconditioner)

    def found(phi):
        return solve(lambda t, p: (0.5 * p * t.square() - t).sum(), (1.0 / phi).detach(), phi, method=method)

    (first,) = torch.autograd.grad(found(phi).sum(), phi, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), phi)
    torch.testing.assert_close((first, second), (-(phi**-2), 2.0 * phi.detach() ** -3))


def test_the_inverse_that_the_inner_optimiser_has_made():
    (inner, outer, theta, _), _ = quadratic(positive(10, seed=6))
    phi = double(10, seed=56).requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=100, tolerance_grad=1e-12, tolerance_change=0.0)

    def closure():
        optimizer.zero_grad()
        loss = inner(theta, phi.detach())
        loss.backward()
        return loss

    optimizer.step(closure)
    # What the optimiser itself makes of its last gradient.
    state = optimizer.state[theta]
    last = state["prev_flat_grad"]
    own = Identity(inverse=QuasiNewton(optimizer))(inner, lambda t, p: t @ last, theta, phi)
    torch.testing.assert_close(own.gradient, -state["d"], rtol=1e-9, atol=1e-15)
    result = Identity(inverse=QuasiNewton(optimizer))(inner, outer, theta, phi)
    assert result.num_products == 1
    assert result.residual_norm < Identity()(inner, outer, theta, phi).residual_norm
    # As the inverse that conjugate gradients refine.
    refined = ImplicitCG(tolerance=1e-10, preconditioner=QuasiNewton(optimizer))(inner, outer, theta, phi)
    torch.testing.assert_close(refined.gradient, torch.linalg.solve(positive(10, seed=6), double(10, seed=50)))
    with pytest.raises(ValueError, match="QuasiNewton: optimizer: expected an LBFGS that has taken steps on 10"):
        Identity(inverse=QuasiNewton(torch.optim.LBFGS([theta])))(inner, outer, theta, phi)


def test_the_inverse_of_a_sketch():
    """Hataya and Yamada (2023): of full rank it is the damped inverse itself."""
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    result = Identity(inverse=Nystrom(10), damping=0.3)(problem.inner, problem.outer, theta, problem.phi)
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, 0.3), rtol=1e-9, atol=1e-9)


SCIPY = [
    functools.partial(scipy.sparse.linalg.cg, rtol=1e-12),
    functools.partial(scipy.sparse.linalg.minres, rtol=1e-13),
    functools.partial(scipy.sparse.linalg.gmres, rtol=1e-12),
    lambda A, b, x0=None: np.linalg.solve(np.stack([A.matvec(e) for e in np.eye(len(b))], axis=1), b),
]


@pytest.mark.parametrize("solver", SCIPY)
def test_a_linear_solver_of_ones_own(solver):
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()
    method = LinearSolver(solver, damping=0.3, tolerance=1e-10)
    result = method(problem.inner, problem.outer, theta, problem.phi)
    torch.testing.assert_close(problem.flat(result.gradient), problem.dense(theta, 0.3), rtol=1e-9, atol=1e-9)
    assert result.converged
    assert result.problems == ()
    assert result.min_curvature >= 0.5
    again = method(problem.inner, problem.outer, theta, problem.phi, start=result.solution)
    torch.testing.assert_close(again.gradient, result.gradient)


def test_a_linear_solver_of_ones_own_for_an_equation():
    """Not symmetric, so that the transpose matters: LSQR takes both."""
    weight = 0.3 * double(4, 4, seed=54)
    bias = double(4, seed=55).requires_grad_()
    problem = FixedPointProblem(lambda z, bias: torch.tanh(weight @ z + bias))
    start = torch.zeros(4, dtype=torch.float64)
    gradients = []
    for method in (
        LinearSolver(lambda A, b, x0=None: scipy.sparse.linalg.lsqr(
            scipy.sparse.linalg.aslinearoperator(A), b, atol=1e-13, btol=1e-13, x0=x0)[0]),
        LinearSolver(functools.partial(scipy.sparse.linalg.bicgstab, rtol=1e-12)),
        Dense(),
    ):  # fmt: skip
        theta = solve(problem, start, bias, method=method, tolerance=1e-13)
        gradients.append(torch.autograd.grad(theta.square().sum(), bias)[0])
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-9, atol=1e-9)


def test_linear_solvers_that_return_something_else():
    problem, _ = quadratic(positive(10, seed=6))
    with pytest.raises(ValueError, match=r"LinearSolver: solver: expected shape \(10,\), got \(9,\)"):
        LinearSolver(lambda A, b: b[:9])(*problem)
    with pytest.raises(NonFiniteError, match="LinearSolver: solver: expected finite numbers"):
        LinearSolver(lambda A, b: b * np.nan)(*problem)
    with pytest.raises(TypeError, match="LinearSolver: solver: expected a function, got str"):
        LinearSolver("cg")
    poor = LinearSolver(functools.partial(scipy.sparse.linalg.cg, maxiter=2))(*problem)
    assert not poor.converged
    assert "the linear solver says that it has not converged" in poor.problems[0]
    assert "the linear solve ended at a relative residual" in LinearSolver(lambda A, b: b)(*problem).problems[0]
    # Without an x0 to give, what takes none serves.
    assert LinearSolver(lambda A, b: b, warm_start=False)(*problem, start=torch.ones(10)).num_products == 1


@pytest.mark.parametrize("method", [m for m in SOLVERS if not isinstance(m, Dense)], ids=name)
def test_every_iterative_solver_starts_warm(method):
    problem, _ = quadratic(positive(10, seed=6))
    if isinstance(method, Neumann):
        short = dataclasses.replace(method, terms=12)
        cold = short(*problem)
        assert torch.equal(short(*problem, start=cold.solution).gradient, cold.gradient)
        warm = dataclasses.replace(short, warm_start=True)(*problem, start=cold.solution)
        assert warm.residual_norm < cold.residual_norm / 10
    else:
        cold = method(*problem)
        assert method(*problem, start=cold.solution).num_products < cold.num_products


def batches():
    return [(double(6, 3, seed=seed), double(6, seed=seed + 10)) for seed in range(60, 64)]


def regression(theta, phi, batch):
    inputs, target = batch
    return (inputs @ theta - target).square().mean() + (phi.square() * theta.square()).sum()


def test_products_over_minibatches_are_those_of_all_rows():
    together = tuple(torch.cat(each) for each in zip(*batches(), strict=True))
    theta = double(3, seed=64).requires_grad_()
    phi = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)

    def outer(theta, phi):
        return (theta - 1.0).square().sum() + phi.sum()

    for method in every_method():
        torch.manual_seed(0)
        whole = method(lambda t, p: regression(t, p, together), outer, theta, phi)
        torch.manual_seed(0)
        parts = method(Minibatches(regression, batches()), outer, theta, phi)
        torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-7, atol=1e-9)
        assert parts.num_products == whole.num_products
        assert parts.inner_loss == pytest.approx(whole.inner_loss)
        if whole.inner_gradient_norm is not None:
            assert parts.inner_gradient_norm == pytest.approx(whole.inner_gradient_norm)
    with pytest.raises(ValueError, match=r"phi: .*does not reach"):
        EXACT(Minibatches(lambda t, p, b: regression(t, p.detach(), b), batches()), lambda t, p: t.sum(), theta, phi)
    with pytest.raises(ValueError, match="Minibatches: batches: expected at least one, got none"):
        Minibatches(regression, [])


def test_minibatches_take_the_memory_of_one():
    theta = double(3, seed=64).requires_grad_()
    phi = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    peaks = []
    for count in (1, 2, 4):
        with graphs_held() as held:
            EXACT(Minibatches(regression, batches()[:count]), lambda t, p: t.sum(), theta, phi)
        peaks.append(held[1])
    assert peaks[0] == peaks[1] == peaks[2] > 0


def test_dropout_in_minibatches_is_one_mask():
    theta = double(3, seed=64).requires_grad_()
    phi = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)

    def dropped(theta, phi, batch):
        return regression(torch.dropout(theta, 0.3, True), phi, batch)

    result = EXACT(Minibatches(dropped, batches()), lambda t, p: t.sum(), theta, phi)
    assert result.residual_norm < 1e-9
    generator = torch.Generator().manual_seed(0)
    noisy = EXACT(
        Minibatches(lambda t, p, b: regression(t * torch.rand((), generator=generator), p, b), batches()),
        lambda t, p: t.sum(), theta, phi,
    )  # fmt: skip
    assert "two evaluations at one point differ" in noisy.problems[0]


def test_batches_of_the_trainer_are_drawn_apart(classes, tmp_path):
    options = {"batch_size": 20, "outer_batch_size": 25, "product_batches": 3, "hypergradient": ImplicitCG(damping=0.1)}
    trainer = bilevel(classes, checkpoint=tmp_path / "state", **options)
    history = trainer.fit(6)
    assert history[-1].outer_loss < history[0].outer_loss
    resumed = bilevel(classes, **options)
    resumed.resume(tmp_path / "state")
    for each in (trainer, resumed):
        each.fit(2)
    assert [s.outer_loss for s in resumed.history] == [s.outer_loss for s in trainer.history]
    with pytest.raises(ValueError, match="product_batches"):
        bilevel(classes, product_batches=0)
