"""Inner problems that are equations, and their solutions as an operation of autograd."""

import dataclasses

import pytest
import torch
from po_bilevel import (
    BOME,
    Dense,
    FixedPoint,
    FixedPointProblem,
    Identity,
    ImplicitCG,
    Neumann,
    NonFiniteError,
    NormalCG,
    Penalty,
    Recompute,
    RootProblem,
    SingleLoop,
    Truncated,
    Unrolled,
    solve,
)
from problems import Quadratic, double, name, positive
from torch.autograd import gradcheck, gradgradcheck

# Spectral norm 0.6 of the linear part: (0.6)^100 is rounding.
WEIGHT = 0.6 * double(4, 4, seed=30) / torch.linalg.matrix_norm(double(4, 4, seed=30), 2)
TIGHT = {"tolerance": 1e-13, "max_iterations": 2000}


def layer(z, phi):
    """A layer of a deep equilibrium network: 1-Lipschitz activation, so that it contracts as the weight does."""
    return {"z": torch.tanh(phi["weight"] @ z["z"] + phi["bias"])}


def network():
    phi = {"weight": WEIGHT.clone().requires_grad_(), "bias": double(4, seed=31).requires_grad_()}
    return FixedPointProblem(layer), {"z": torch.zeros(4, dtype=torch.float64)}, phi


def outer(z, phi):
    return (z["z"] - 0.3).square().sum() + phi["bias"].exp().sum()


def at_equilibrium():
    problem, start, phi = network()
    z = {key: t.detach().requires_grad_() for key, t in solve(problem, start, phi, **TIGHT).items()}
    return problem, z, phi


def closed_form(z, phi):
    """By the implicit function theorem, with Jacobians of torch."""

    def flat(z, weight, bias):
        return layer({"z": z}, {"weight": weight, "bias": bias})["z"]

    point = (z["z"].detach(), phi["weight"].detach(), phi["bias"].detach())
    by_z, by_weight, by_bias = torch.autograd.functional.jacobian(flat, point)
    leaf = point[0].clone().requires_grad_()
    (right,) = torch.autograd.grad(outer({"z": leaf}, phi), leaf)
    v = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - by_z.mT, right)
    return {"weight": torch.einsum("i,ijk->jk", v, by_weight), "bias": v @ by_bias + point[2].exp()}


SOLVERS = [FixedPoint(tolerance=1e-12), Neumann(200, 1.0), Neumann(200), NormalCG(tolerance=1e-12), Dense()]
UNROLLED = [Unrolled(100, 1.0), Recompute(100, 1.0), Truncated(200, 100, 1.0)]


@pytest.mark.parametrize("method", [*SOLVERS, *UNROLLED], ids=name)
def test_methods_at_a_fixed_point_are_the_implicit_function_theorem(method):
    problem, z, phi = at_equilibrium()
    result = method(problem, outer, z, phi)
    expected = closed_form(z, phi)
    assert result.gradient.keys() == phi.keys()
    for key, want in expected.items():
        torch.testing.assert_close(result.gradient[key], want, rtol=1e-9, atol=1e-9)
    assert result.problems == ()
    assert result.min_curvature is None
    assert result.inner_loss < 1e-20
    if method in SOLVERS:
        assert result.converged
        assert result.solution["z"].shape == (4,)
        warm = method(problem, outer, z, phi, start=result.solution)
        torch.testing.assert_close(warm.gradient["weight"], expected["weight"], rtol=1e-9, atol=1e-9)
    else:
        torch.testing.assert_close(result.theta["z"], z["z"].detach())


def test_damping_is_of_the_same_system_in_every_method():
    problem, z, phi = at_equilibrium()
    results = [dataclasses.replace(m, damping=0.2)(problem, outer, z, phi).gradient["weight"] for m in SOLVERS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-9)


def test_one_step_and_the_single_loop():
    problem, z, phi = at_equilibrium()
    # Jacobian-free backpropagation is backpropagation through one application of the map.
    (expected,) = torch.autograd.grad(outer(layer(z, phi), {"bias": torch.zeros(4)}), phi["weight"])
    torch.testing.assert_close(Identity()(problem, outer, z, phi).gradient["weight"], expected)
    method, start = SingleLoop(1.0), None
    for _ in range(100):
        result = method(problem, outer, z, phi, start=start)
        start = result.solution
    torch.testing.assert_close(result.gradient["weight"], closed_form(z, phi)["weight"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [None, NormalCG(tolerance=1e-13), Dense(), Neumann(200, 1.0)], ids=name)
def test_solve_is_differentiable_twice(method):
    problem, start, phi = network()

    def found(weight, bias):
        return solve(problem, start, {"weight": weight, "bias": bias}, method=method, **TIGHT)["z"]

    assert gradcheck(found, tuple(phi.values()))
    assert gradgradcheck(found, tuple(phi.values()))


def test_solve_is_differentiable_three_times():
    """x = cos(a x), whose derivatives are those of the inverse function a = arccos(x) / x."""
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = solve(FixedPointProblem(lambda x, a: torch.cos(a * x)), torch.ones((), dtype=torch.float64), a, **TIGHT)
    orders = [x]
    for _ in range(3):
        orders.append(torch.autograd.grad(orders[-1], a, create_graph=True)[0])
    at = x.detach().requires_grad_()
    inverse = [torch.acos(at) / at]
    for _ in range(3):
        inverse.append(torch.autograd.grad(inverse[-1], at, create_graph=True)[0])
    _, f, ff, fff = (float(d.detach()) for d in inverse)
    expected = [1 / f, -ff / f**3, (3 * ff**2 - f * fff) / f**5]
    assert [float(d.detach()) for d in orders[1:]] == pytest.approx(expected, rel=1e-9)


def test_the_minimum_of_a_loss_composes_with_torch():
    """θ* = H⁻¹ B φ between two layers of torch, against the same with a dense solve; to second order."""
    problem = Quadratic(positive(10, seed=6))
    start = problem.theta(torch.zeros(10, dtype=torch.float64))

    def solver(theta, phi):
        return problem.theta(torch.linalg.solve(problem.hessian, problem.coupling @ problem.flat(phi)))

    def through(*phi):
        squared = tuple(p.square() for p in phi)
        theta = solve(problem.inner, start, squared, solver=solver, tolerance=1e-13)
        return problem.flat(theta).sin()

    def dense(*phi):
        return torch.linalg.solve(problem.hessian, problem.coupling @ problem.flat(phi).square()).sin()

    torch.testing.assert_close(through(*problem.phi), dense(*problem.phi))
    for function in (through, dense):
        first = torch.autograd.grad(function(*problem.phi).sum(), problem.phi, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), problem.phi)
        if function is through:
            got = (*first, *second)
    for value, want in zip(got, (*first, *second), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-9)


def test_a_minimum_that_is_not_quadratic_is_differentiable_twice():
    """Logistic regression with a learned penalty, by Newton's method: θ moves in its own Hessian's derivative too."""
    inputs, labels = double(12, 3, seed=33), (double(12, seed=34) > 0).double()

    def inner(theta, phi):
        fit = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ theta, labels)
        return fit + (phi["penalty"].exp() * theta.square()).sum()

    def newton(theta, phi):
        for _ in range(20):
            slope = torch.func.grad(inner)(theta, phi)
            theta = theta - torch.linalg.solve(torch.func.hessian(inner)(theta, phi), slope)
        return theta

    def found(penalty):
        start = torch.zeros(3, dtype=torch.float64)
        return solve(inner, start, {"penalty": penalty}, solver=newton, tolerance=1e-13)

    penalty = torch.full((3,), -2.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(found, (penalty,))
    assert gradgradcheck(found, (penalty,))


def test_a_damped_solve_has_the_derivative_of_the_damped_system():
    """To second order: the first derivative is −B (H + δI)⁻¹ b, and its own derivative is of that, with no warning."""
    p = torch.tensor([1.5, 0.7], dtype=torch.float64, requires_grad=True)
    method = ImplicitCG(0.4, tolerance=1e-13)
    t = solve(lambda t, p: (0.5 * p * t.square() - t).sum(), (1.0 / p).detach(), p, method=method)
    (first,) = torch.autograd.grad(t.sum(), p, create_graph=True)
    torch.testing.assert_close(first, -(1.0 / p) / (p + 0.4))
    # θ* moves by the damped system there, too.
    (second,) = torch.autograd.grad(first.sum(), p)
    theta, by_p = 1.0 / p.detach(), -(1.0 / p.detach()) / (p.detach() + 0.4)
    torch.testing.assert_close(second, -by_p / (p.detach() + 0.4) + theta / (p.detach() + 0.4) ** 2)


def test_a_root_that_is_no_contraction():
    problem = RootProblem(lambda theta, phi: (theta[0].square() - phi[0], theta[1] ** 3 - phi[1] * theta[0]))
    phi = tuple(double(2, seed=seed).exp().requires_grad_() for seed in (35, 36))

    def solver(theta, phi):
        root = phi[0].sqrt()
        return root, (phi[1] * root) ** (1 / 3)

    theta = solve(problem, solver(None, phi), phi, solver=solver, tolerance=1e-13)
    value = sum(t.sum() for t in theta)
    got = torch.autograd.grad(value, phi, create_graph=True)
    want = torch.autograd.grad(sum(t.sum() for t in solver(None, phi)), phi, create_graph=True)
    torch.testing.assert_close(got, want)
    second = [torch.autograd.grad(sum(g.square().sum() for g in each), phi) for each in (got, want)]
    torch.testing.assert_close(*second)


def test_sinkhorn():
    """Scalings of an entropic transport plan as a fixed point; the derivative by the cost, against unrolling."""
    row, column = torch.softmax(double(3, seed=37), 0), torch.softmax(double(4, seed=38), 0)
    cost = double(3, 4, seed=39).square().requires_grad_()

    def sweep(potential, cost):
        # In the log domain, and with the mean of the potential, which is free, at zero.
        other = torch.log(column) - torch.logsumexp(potential[:, None] - cost, 0)
        new = torch.log(row) - torch.logsumexp(other - cost, 1)
        return new - new.mean()

    def plan(potential, cost):
        other = torch.log(column) - torch.logsumexp(potential[:, None] - cost, 0)
        return torch.exp(potential[:, None] + other - cost)

    def value(cost):
        potential = solve(FixedPointProblem(sweep), torch.zeros(3, dtype=torch.float64), cost, **TIGHT)
        return (plan(potential, cost) * cost).sum()

    def unrolled(cost):
        potential = torch.zeros(3, dtype=torch.float64)
        for _ in range(200):
            potential = sweep(potential, cost)
        return (plan(potential, cost) * cost).sum()

    torch.testing.assert_close(*(torch.autograd.grad(f(cost), cost) for f in (value, unrolled)), rtol=1e-9, atol=1e-9)


def test_maps_that_do_not_contract():
    _, start, phi = network()
    with pytest.raises(ValueError, match=r"FixedPointProblem: function: expected a map that contracts, got one with"):
        solve(FixedPointProblem(lambda z, a: (z + a).square().exp()), start["z"], phi["bias"])
    with pytest.raises(ValueError, match=r"expected a map that contracts.* after 100 iterations.*times as much"):
        solve(FixedPointProblem(lambda z, a: 1.1 * z + a), start["z"], phi["bias"], max_iterations=100)
    # Its equation has a solution all the same, which another solver may find.
    repelling = FixedPointProblem(lambda z, a: 1.1 * z + a)

    def solver(z, a):
        return -10.0 * a

    theta = solve(repelling, start["z"], phi["bias"], solver=solver)
    with pytest.raises(ValueError, match=r"expected a map that contracts.*NormalCG"):
        torch.autograd.grad(theta.sum(), phi["bias"])
    theta = solve(repelling, start["z"], phi["bias"], solver=solver, method=NormalCG())
    (slope,) = torch.autograd.grad(theta.sum(), phi["bias"])
    torch.testing.assert_close(slope, torch.full((4,), -10.0, dtype=torch.float64))
    at = (-10.0 * phi["bias"]).detach().requires_grad_()
    reported = FixedPoint()(repelling, lambda z, a: z.sum(), at, phi["bias"])
    assert not reported.converged
    assert "FixedPointProblem: function: expected a map that contracts" in reported.problems[0]


def test_single_precision_is_solved_to_its_rounding():
    problem, _, phi = network()
    single = {key: p.detach().float().requires_grad_() for key, p in phi.items()}
    start = {"z": torch.zeros(4)}
    for tolerance in (1e-4, 1e-6, 1e-12):
        z = solve(problem, start, single, tolerance=tolerance)
        gradient = torch.autograd.grad(outer(z, single), tuple(single.values()))
        for got, want in zip(gradient, closed_form(at_equilibrium()[1], phi).values(), strict=True):
            # The system's condition number is below (1 + 0.6)/(1 - 0.6).
            torch.testing.assert_close(got.double(), want, rtol=1e-5 + 10 * tolerance, atol=1e-5 + 10 * tolerance)


def test_solvers_that_return_something_else():
    problem, start, phi = network()
    with pytest.raises(ValueError, match=r"solve: solver: expected shapes \[\(4,\)\] like theta, got \[\(3,\)\]"):
        solve(problem, start, phi, solver=lambda z, phi: {"z": z["z"][:3]})
    with pytest.raises(ValueError, match="solve: solver: expected shapes like theta, got another form"):
        solve(problem, start, phi, solver=lambda z, phi: z["z"])
    with pytest.raises(NonFiniteError, match="solve: solver: expected finite numbers"):
        solve(problem, start, phi, solver=lambda z, phi: {"z": z["z"] / 0.0})
    with pytest.raises(ValueError, match=r"FixedPointProblem: function: expected shapes .* got \[\(2,\)\]"):
        solve(FixedPointProblem(lambda z, phi: {"z": layer(z, phi)["z"][:2]}), start, phi)
    with pytest.raises(NonFiniteError, match="FixedPointProblem: function: expected finite numbers"):
        solve(FixedPointProblem(lambda z, phi: {"z": layer(z, phi)["z"] / 0.0}), start, phi)
    # A θ that is no fixed point is said where its derivative is taken.
    theta = solve(problem, start, phi, solver=lambda z, phi: {"z": z["z"] + 1.0})
    with pytest.warns(RuntimeWarning, match="no solution of the inner equation"):
        torch.autograd.grad(theta["z"].sum(), phi["bias"])


def test_parts_of_phi_that_the_problem_does_not_depend_on():
    problem, start, phi = network()
    alone = {**phi, "other": torch.ones(2, requires_grad=True)}
    with pytest.raises(ValueError, match=r"solve: phi\['other'\]: expected a tensor that the map"):
        solve(problem, start, alone)
    at = {"z": torch.zeros(4, dtype=torch.float64, requires_grad=True)}
    with pytest.raises(ValueError, match=r"phi\['other'\]: .*does not reach"):
        FixedPoint()(problem, outer, at, alone)
    # What does not require grad is a constant, and is asked for nothing.
    constant = {**phi, "other": torch.ones(2)}
    assert solve(problem, start, constant)["z"].requires_grad
    assert FixedPoint()(problem, outer, at, constant).gradient["other"] is None


def test_what_is_not_in_phi_has_no_derivative_and_is_refused():
    problem, start, phi = network()
    with pytest.raises(ValueError, match=r"solve: problem: .* depends on another tensor that requires grad"):
        solve(FixedPointProblem(lambda z, bias: layer(z, phi | {"bias": bias})), start, phi["bias"])
    with torch.no_grad():
        assert not solve(problem, start, phi)["z"].requires_grad
    assert not solve(problem, start, {key: p.detach() for key, p in phi.items()})["z"].requires_grad


def test_a_map_that_draws_is_the_same_in_each_evaluation():
    _, start, phi = network()

    def dropped(z, phi):
        return {"z": torch.dropout(layer(z, phi)["z"], 0.5, True)}

    def slopes():
        torch.manual_seed(3)
        theta = solve(FixedPointProblem(dropped), start, phi, **TIGHT)["z"]
        return torch.autograd.grad(theta.sum(), phi["bias"])[0]

    assert torch.equal(slopes(), slopes())
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="solve: problem: two evaluations at one point differ"):
        solve(
            FixedPointProblem(lambda z, phi: {"z": layer(z, phi)["z"] + torch.randn((), generator=generator)}),
            start, phi,
        )  # fmt: skip


def test_methods_that_equations_are_not_for():
    problem, z, phi = at_equilibrium()
    with pytest.raises(ValueError, match=r"ImplicitCG: inner_loss: .*FixedPointProblem that is not"):
        ImplicitCG()(problem, outer, z, phi)
    for method in (Penalty(10.0, 2, 0.1), BOME(2, 0.1, 0.1)):
        with pytest.raises(ValueError, match=rf"{name(method)}: inner_loss: expected a loss, got a FixedPointProblem"):
            method(problem, outer, z, phi)
    start = {"z": torch.zeros(4, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"solve: method: expected one that solves .* got SingleLoop"):
        torch.autograd.grad(solve(problem, start, phi, method=SingleLoop(0.1))["z"].sum(), phi["bias"])
    with pytest.raises(TypeError, match="solve: method: expected one by the implicit function theorem, got Unrolled"):
        solve(problem, z, phi, method=Unrolled(2, 1.0))
