"""What makes a hypergradient less than it should be is fixed or said: noise, θ off its minimum, rounding."""

import numpy as np
import pytest
import torch
from po_bilevel import (
    BOME,
    Batch,
    BilevelTrainer,
    Dense,
    EvolutionStrategies,
    FiniteDifference,
    FixedPoint,
    GaussianPolicy,
    Identity,
    ImplicitCG,
    MahalanobisReward,
    NegativeLogLikelihood,
    Neumann,
    NormalCG,
    Penalty,
    PolicyGradient,
    Recompute,
    SingleLoop,
    Truncated,
    Unrolled,
)
from problems import EXACT, Quadratic, categorical_problem, double, every_method, name, positive
from test_hypergradients import gaussian_problem
from torch import Tensor, nn


@pytest.mark.parametrize("method", every_method(), ids=name)
def test_randomness_in_a_loss_is_one_mask(method):
    """The gradient under dropout is that of the loss with the one mask that the seed of the call draws."""
    problem = Quadratic(positive(10, seed=6))
    theta = problem.solution()

    def inner(theta, phi, mask=None):
        mask = (torch.rand(10) > 0.3).double() if mask is None else mask
        return problem.inner(problem.theta_like(theta, mask), phi)

    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (2,))[1]))
    mask = (torch.rand(10, generator=generator) > 0.3).double()
    torch.manual_seed(5)
    expected = method(lambda theta, phi: inner(theta, phi, mask), problem.outer, theta, problem.phi)
    torch.manual_seed(5)
    result = method(inner, problem.outer, theta, problem.phi)
    for got, want in zip(result.gradient, expected.gradient, strict=True):
        assert torch.equal(got, want)
    assert result.problems == expected.problems
    # The next call has another mask.
    assert method(inner, problem.outer, theta, problem.phi).inner_loss != result.inner_loss
    state = torch.get_rng_state()
    Dense()(problem.inner, problem.outer, theta, problem.phi)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", every_method(), ids=name)
def test_a_loss_that_is_no_function_is_reported(method):
    problem = Quadratic(positive(10, seed=6))
    random = np.random.default_rng(0)

    def noisy(loss):
        return lambda theta, phi: loss(theta, phi) * (1.0 + 0.1 * random.standard_normal())

    for losses, which in (
        ((noisy(problem.inner), problem.outer), "inner_loss"),
        ((problem.inner, noisy(problem.outer)), "outer_loss"),
    ):
        result = method(*losses, problem.solution(), problem.phi)
        assert result.problems[0].startswith(f"{which}: two evaluations at one point differ")
        assert result.converged is False


class Normalised(nn.Module):
    """A linear mean behind BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(self.drop(self.norm(inputs)))


@pytest.mark.parametrize(("method", "steps"), [(ImplicitCG(0.1), 3), (FiniteDifference(), 3), (Unrolled(2, 0.1), 0)])
def test_the_outer_loss_evaluates_and_leaves_batch_statistics_alone(method, steps, regression):
    torch.manual_seed(0)
    policy = GaussianPolicy(mean_network=Normalised(), dim=2, log_std_network=None).double()
    policy.mean_network.norm.momentum = 1.0
    reward = MahalanobisReward(2).double()
    outer_data = Batch(regression.inputs[200:] + 100.0, regression.target[200:])
    trainer = BilevelTrainer(
        policy, reward, inner_data=Batch(regression.inputs[:200], regression.target[:200]), outer_data=outer_data,
        inner_optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        outer_optimizer=torch.optim.SGD(reward.parameters(), lr=0.0),
        inner_steps=steps, inner_loss=PolicyGradient(), hypergradient=method, progress=False,
    )  # fmt: skip
    policy.mean_network.drop.eval()
    done = trainer.fit(2)[-1]
    norm = policy.mean_network.norm
    # With a momentum of one the statistics are those of the rows seen last.
    torch.testing.assert_close(norm.running_mean, regression.inputs[:200].mean(dim=0))
    assert int(norm.num_batches_tracked) == 2 * max(steps, 1)
    assert [module.training for module in policy.mean_network.children()] == [True, False, True]
    if steps:
        policy.eval()
        expected = NegativeLogLikelihood()(policy, outer_data)
        assert done.outer_loss == pytest.approx(float(expected.detach()), rel=1e-12)


def moved(theta, by: float):
    """θ, off by a step of that length."""
    steps = [double(*t.shape, seed=40 + index) for index, t in enumerate(theta)]
    size = sum(float(s.square().sum()) for s in steps) ** 0.5
    return tuple((t.detach() + by / size * s).requires_grad_() for t, s in zip(theta, steps, strict=True))


LINEAR = [ImplicitCG(), NormalCG(), Neumann(400, 0.15), FixedPoint(0.15, tolerance=1e-4), Dense()]


@pytest.mark.parametrize("method", [*LINEAR, Penalty(100.0, 400, 0.15), Identity(0.5), FiniteDifference(0.5)], ids=name)
@pytest.mark.parametrize(
    ("make", "options"), [(categorical_problem, ("exact",)), (gaussian_problem, ("analytic", None, None))]
)
def test_a_theta_that_is_no_minimum_is_reported(make, options, method):
    inner, outer, theta, phi = make(*options)
    at = method(inner, outer, theta, phi)
    assert at.problems == ()
    # That of `FiniteDifference` is right to second order in its radius, that of `Penalty` relative to ‖∂F/∂θ‖/μ.
    assert at.stationarity < (1e-2 if isinstance(method, Penalty) else 1e-4)
    result = method(inner, outer, moved(theta, 0.05), phi)
    assert "θ is no minimum of the inner loss" in " ".join(result.problems)
    assert not result.converged
    if method in LINEAR:
        exact = LINEAR[-1](inner, outer, theta, phi).gradient[0]
        assert float((result.gradient[0] - exact).norm() / exact.norm()) > 0.02


def test_the_inner_gradient_is_that_of_the_loss():
    inner, outer, theta, phi = gaussian_problem("analytic", None, None)
    theta = moved(theta, 0.2)
    slopes = torch.autograd.grad(inner(theta, phi), theta)
    expected = float(torch.cat([s.reshape(-1) for s in slopes]).norm())
    for method in (*LINEAR, Penalty(100.0, 5, 0.1), SingleLoop(0.1), Identity(), BOME(2, 0.1, 0.1)):
        assert method(inner, outer, theta, phi).inner_gradient_norm == pytest.approx(expected, rel=1e-12)
    # The mean over both ends of a central difference, whose radius is 0.01.
    assert FiniteDifference()(inner, outer, theta, phi).inner_gradient_norm == pytest.approx(expected, rel=1e-3)
    unrolled = Unrolled(3, 0.05)(inner, outer, theta, phi)
    end = tuple(t.clone().requires_grad_() for t in unrolled.theta)
    slopes = torch.autograd.grad(inner(end, phi), end)
    expected = float(torch.cat([s.reshape(-1) for s in slopes]).norm())
    assert unrolled.inner_gradient_norm == pytest.approx(expected, rel=1e-12)


def test_what_cannot_know_does_not_say_that_it_converged():
    """With a condition number of a million a hundred steps are nowhere near."""
    basis = torch.linalg.qr(double(10, 10, seed=7)).Q
    problem = Quadratic(basis @ torch.diag(torch.logspace(-6, 0, 10, dtype=torch.float64)) @ basis.mT)
    theta = problem.theta(torch.zeros(10, dtype=torch.float64))
    exact = problem.dense(problem.solution(), 0.0)
    for method in (
        Unrolled(100, 0.9), Truncated(100, 50, 0.9), Recompute(100, 0.9), SingleLoop(0.9),
        EvolutionStrategies(4, 0.1, 100, 0.9, seed=0), Identity(), FiniteDifference(), BOME(10, 0.9, 0.1),
    ):  # fmt: skip
        result = method(problem.inner, problem.outer, theta, problem.phi)
        assert float((problem.flat(result.gradient) - exact).norm() / exact.norm()) > 0.9
        assert result.converged is None


def ill_conditioned(size: int, least: float):
    """A Hessian with eigenvalues down to `least`, b hardly along it: dF/dφ in float64, and the problem in float32."""
    basis = torch.linalg.qr(double(size, size, seed=1)).Q
    spectrum = torch.linspace(1.0, 0.1, size, dtype=torch.float64)
    spectrum[-1] = least
    hessian = ((basis * spectrum) @ basis.mT).float()
    coupling = double(size, seed=2).float()
    right = (basis[:, :-1] @ double(size - 1, seed=3) + 0.01 * basis[:, -1]).float()
    exact = float(coupling.double() @ torch.linalg.solve(hessian.double(), right.double()))
    theta = (torch.linalg.solve(hessian.double(), coupling.double()).float().requires_grad_(),)
    phi = (torch.ones((), requires_grad=True),)

    def inner(theta, phi):
        return 0.5 * theta[0] @ hessian @ theta[0] - theta[0] @ coupling * phi[0]

    return exact, (inner, lambda theta, phi: theta[0] @ right, theta, phi)


def test_dense_in_float32_with_an_eigenvalue_near_rounding():
    exact, problem = ill_conditioned(300, 3e-5)
    result = Dense()(*problem)
    # The direction is the solution, though 300 eps is 3.6e-5. The products' 300 rounding errors, 2^-24 of the largest
    # eigenvalue, add up at random along one direction: 2^-24 / sqrt(300) = 3.4e-9, which is 1.2e-4 of the least one.
    # So much may both be off, eight times over.
    assert float(result.gradient[0]) == pytest.approx(exact, rel=1e-3)
    assert result.condition == pytest.approx(1 / 3e-5, rel=1e-3)
    assert result.residual_norm < 1e-4
    _, problem = ill_conditioned(300, 1e-6)
    result = Dense()(*problem)
    assert "condition number of" in " ".join(result.problems)
    _, problem = ill_conditioned(300, 0.01)
    assert Dense()(*problem).problems == ()


@pytest.mark.parametrize("scale", [1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("method", [*LINEAR, FiniteDifference(0.5)], ids=name)
def test_float32_gradients_in_small_units(method, scale):
    theta, phi = torch.tensor([0.5, 0.5], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    result = method(
        lambda theta, phi: (theta[0] - phi[0]).square().sum(),
        lambda theta, phi: scale * (theta[0] + 1.0).square().sum(), (theta,), (phi,),
    )  # fmt: skip
    # 2 · 2 (θ + 1). Differences of float32 numbers near 0.5 over 0.02 are right to 1e-5, `FixedPoint` asks for 1e-4.
    assert float(result.gradient[0]) / scale == pytest.approx(6.0, rel=1e-4)
    assert result.problems == ()


def nested(tree):
    """A tensor of a tuple of one, in a tree with a constant."""
    return {"a": [tree[0]], "b": {"constant": torch.ones(2, dtype=torch.int64)}}


@pytest.mark.parametrize("method", every_method(), ids=name)
def test_any_pytree_gives_what_a_tuple_does(method):
    inner, outer, theta, phi = categorical_problem("exact")
    torch.manual_seed(0)
    expected = method(inner, outer, theta, phi)

    def of(loss, pick):
        return lambda theta, phi: loss((pick(theta),), (pick(phi),))

    for form, pick in ((lambda tree: tree[0], lambda tree: tree), (nested, lambda tree: tree["a"][0])):
        torch.manual_seed(0)
        result = method(of(inner, pick), of(outer, pick), form(theta), form(phi))
        assert torch.equal(pick(result.gradient), expected.gradient[0])
        if expected.solution is not None:
            assert torch.equal(pick(result.solution), expected.solution[0])
            method(of(inner, pick), of(outer, pick), form(theta), form(phi), start=result.solution)
        if expected.theta is not None:
            assert torch.equal(pick(result.theta), expected.theta[0])
    # What does not require grad is handed on as it is and has no derivative.
    assert result.gradient["b"]["constant"] is None
    assert torch.equal((result.theta or nested(theta))["b"]["constant"], torch.ones(2, dtype=torch.int64))


def test_leaves_of_trees_are_named():
    inner, outer, theta, phi = categorical_problem("exact")
    with pytest.raises(TypeError, match=r"phi\['a'\]\[1\]: expected a tensor, got float"):
        EXACT(inner, outer, theta, {"a": (phi[0], 1.0)})
    with pytest.raises(ValueError, match=r"phi\['b'\]: expected a tensor that .* does not reach"):
        EXACT(
            lambda theta, phi: inner(theta, (phi["a"],)), outer, theta,
            {"a": phi[0], "b": torch.ones(2, requires_grad=True)},
        )  # fmt: skip
