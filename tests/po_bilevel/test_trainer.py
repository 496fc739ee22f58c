"""Policies and training loops, one level and two."""

import math

import pytest
import torch
from po_bilevel import (
    Batch,
    BatchStream,
    BilevelTrainer,
    ImplicitCG,
    LinearCategorical,
    LinearGaussian,
    MahalanobisReward,
    MLPCategorical,
    MLPGaussian,
    NegativeLogLikelihood,
    NonFiniteError,
    OneHotMahalanobisReward,
    PolicyGradient,
    train_nll,
    train_policy_gradient,
)
from torch import nn

ROWS = 300
NOISE = torch.tensor([0.5, 1.5], dtype=torch.float64)


@pytest.fixture
def regression() -> Batch:
    """y = W x + 1 + ε in two dimensions, ε of standard deviations NOISE."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    noise = torch.randn(ROWS, 2, dtype=torch.float64, generator=generator) * NOISE
    return Batch(inputs, inputs @ weight + 1.0 + noise)


@pytest.fixture
def classes() -> Batch:
    generator = torch.Generator().manual_seed(2)
    target = torch.arange(90) % 3
    inputs = torch.randn(90, 2, dtype=torch.float64, generator=generator)
    inputs[:, 0] += 1.5 * target
    return Batch(inputs, target)


def lbfgs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        parameters,
        max_iter=50,
        max_eval=500,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )


def seeded(make, *arguments, **options):
    torch.manual_seed(0)
    return make(*arguments, **options).double()


def least_squares(data: Batch) -> torch.Tensor:
    """Residuals of the regression with an intercept, (N, D)."""
    design = torch.cat([data.inputs, torch.ones(len(data.inputs), 1, dtype=torch.float64)], dim=1)
    return data.target - design @ torch.linalg.lstsq(design, data.target).solution


@pytest.mark.parametrize("make", [LinearGaussian, MLPGaussian])
@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_gaussian_policies_give_mean_and_log_std(make, state_dependent_std, regression):
    policy = seeded(make, 3, 2, state_dependent_std=state_dependent_std)
    mean, log_std = policy(regression.inputs)
    assert mean.shape == (ROWS, 2)
    assert log_std.shape == ((ROWS, 2) if state_dependent_std else (2,))
    assert (log_std == 0).all()
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(regression.target).sum(dim=-1)
    torch.testing.assert_close(policy.log_prob(regression.inputs, regression.target), expected)
    loss = policy.policy_loss(regression.inputs, regression.target, MahalanobisReward(2).double(), entropy_coef=1.0)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("make", [LinearCategorical, MLPCategorical])
def test_categorical_policies_give_logits(make, classes):
    policy = seeded(make, 2, 3)
    logits = policy(classes.inputs)
    assert logits.shape == (90, 3)
    expected = torch.distributions.Categorical(logits=logits).log_prob(classes.target)
    torch.testing.assert_close(policy.log_prob(classes.inputs, classes.target), expected)


def test_a_policy_refuses_the_reward_of_another_family(regression, classes):
    with pytest.raises(TypeError, match="MahalanobisReward"):
        LinearGaussian(3, 2).policy_loss(*regression, OneHotMahalanobisReward(2))
    with pytest.raises(TypeError, match="OneHotMahalanobisReward"):
        LinearCategorical(2, 3).policy_loss(*classes, MahalanobisReward(3))


def test_likelihood_finds_least_squares(regression):
    policy = seeded(LinearGaussian, 3, 2)
    steps = []
    _, taken = train_nll(
        policy, regression, lbfgs(list(policy.parameters())), 20, tolerance=1e-6, callback=lambda s, v: steps.append(s)
    )
    variance = least_squares(regression).square().mean(dim=0)
    torch.testing.assert_close((2 * policy.log_std.detach()).exp(), variance, rtol=1e-5, atol=0.0)
    loss = float(NegativeLogLikelihood()(policy, regression).detach())
    assert loss == pytest.approx(float((0.5 * variance.log() + 0.5 + 0.5 * math.log(2 * math.pi)).sum()))
    assert taken < 20
    assert steps == list(range(taken))


def test_policy_gradient_finds_the_inner_optimum(regression):
    """σ_j² = λ/(2 U_jj), the mean that of least squares."""
    policy = seeded(LinearGaussian, 3, 2)
    reward = MahalanobisReward(2, "diagonal", torch.tensor([0.5, 4.0])).double()
    loss = PolicyGradient(entropy_coef=0.7)
    train_policy_gradient(policy, reward, regression, lbfgs(list(policy.parameters())), 20, loss=loss, tolerance=1e-8)
    torch.testing.assert_close(
        (2 * policy.log_std.detach()).exp(), torch.tensor([0.7, 0.7 / 8], dtype=torch.float64), rtol=1e-5, atol=0.0
    )
    residual = regression.target - policy(regression.inputs)[0].detach()
    torch.testing.assert_close(residual, least_squares(regression), rtol=0.0, atol=1e-5)
    # The reward was fixed: no gradient was left on it, and it can be learned again.
    assert all(p.grad is None and p.requires_grad for p in reward.parameters())


def test_categorical_inner_optimum(classes):
    """One input for all rows: p* = softmax(E_y R[·, y] / λ)."""
    target = torch.tensor([0, 0, 0, 1, 2, 2])
    data = Batch(torch.zeros(6, 1, dtype=torch.float64), target)
    policy = seeded(LinearCategorical, 1, 3)
    reward = OneHotMahalanobisReward(3, "diagonal", torch.tensor([1.0, 0.4, 2.0])).double()
    train_policy_gradient(
        policy, reward, data, lbfgs(list(policy.parameters())), 20, loss=PolicyGradient(entropy_coef=0.5)
    )
    expected = torch.softmax(reward.table().detach()[:, target].mean(dim=1) / 0.5, dim=-1)
    got = torch.softmax(policy(data.inputs[0]).detach(), dim=-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
def test_learned_reward_reaches_the_closed_form(kind, regression):
    """u* = λ n/(2 tr Σ) and u_j* = λ/(2 Σ_jj), Σ the residual covariance. A diagonal policy sees diag U only."""
    policy = seeded(LinearGaussian, 3, 2)
    reward = MahalanobisReward(2, kind).double()
    trainer = BilevelTrainer(
        policy,
        reward,
        inner_data=regression,
        outer_data=regression,
        inner_optimizer=lbfgs,
        outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.1),
        inner_steps=5,
        keep_inner_state=False,
        inner_tolerance=1e-8,
        hypergradient=ImplicitCG(tolerance=1e-8),
        progress=False,
    )
    history = trainer.fit(120)
    variance = least_squares(regression).square().mean(dim=0)
    expected = 2 / (2 * variance.sum()) if kind == "isotropic" else 1 / (2 * variance)
    u = reward.precision().detach()
    # Not rounding: how far from the optimum the outer steps, which are finite in number, may end.
    torch.testing.assert_close(u.diagonal() if kind == "full" else u, expected, rtol=1e-2, atol=0.0)
    assert history is trainer.history
    assert [step.step for step in history] == list(range(120))
    assert history[-1].outer_loss < history[0].outer_loss
    assert all(step.converged and not step.problems for step in history)
    assert history[0].reward.shape == u.shape


def bilevel(data: Batch, **options) -> BilevelTrainer:
    policy = seeded(LinearCategorical, 2, 3)
    reward = OneHotMahalanobisReward(3).double()
    arguments = {
        "inner_data": Batch(data.inputs[:60], data.target[:60]),
        "outer_data": Batch(data.inputs[60:], data.target[60:]),
        "inner_optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        "outer_optimizer": torch.optim.Adam(reward.parameters(), lr=0.1),
        "inner_steps": 30,
        "inner_loss": PolicyGradient(l2=0.05),
        "progress": False,
    }
    return BilevelTrainer(policy, reward, **(arguments | options))


def test_outer_loss_falls_with_sampled_minibatches(classes):
    trainer = bilevel(
        classes, inner_loss=PolicyGradient(estimator="dice", num_samples=32, l2=0.05), batch_size=25,
        hypergradient=ImplicitCG(damping=0.05),
    )  # fmt: skip
    history = trainer.fit(15)
    assert history[-1].outer_loss < history[0].outer_loss
    again = bilevel(
        classes, inner_loss=PolicyGradient(estimator="dice", num_samples=32, l2=0.05), batch_size=25,
        hypergradient=ImplicitCG(damping=0.05),
    ).fit(15)  # fmt: skip
    assert [step.outer_loss for step in again] == [step.outer_loss for step in history]


def test_fitting_twice_goes_on_where_it_was(classes):
    once, twice = bilevel(classes), bilevel(classes)
    once.fit(6)
    twice.fit(3)
    seen = []
    twice.fit(3, callback=seen.append)
    assert [step.outer_loss for step in twice.history] == [step.outer_loss for step in once.history]
    assert [step.step for step in seen] == [3, 4, 5]
    assert torch.equal(once.reward.precision(), twice.reward.precision())


def test_a_reward_with_nothing_to_learn_is_refused(classes):
    reward = OneHotMahalanobisReward(3).requires_grad_(False)
    with pytest.raises(ValueError, match="reward"):
        BilevelTrainer(
            LinearCategorical(2, 3), reward, inner_data=classes, outer_data=classes, inner_optimizer=lbfgs,
            outer_optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), inner_steps=1,
        )  # fmt: skip


def test_non_finite_values_stop_training(classes):
    policy = seeded(LinearCategorical, 2, 3)
    spoiled = Batch(classes.inputs.clone(), classes.target)
    spoiled.inputs[3, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="step 0"):
        train_nll(policy, spoiled, torch.optim.SGD(policy.parameters(), lr=0.1), 5)
    trainer = bilevel(classes, outer_data=spoiled)
    with pytest.raises(NonFiniteError, match="outer step 0: outer_loss"):
        trainer.fit(2)
    assert trainer.history == []


def test_penalty_is_on_all_parameters(classes):
    policy = seeded(LinearCategorical, 2, 3)
    squares = sum(float(p.detach().square().sum()) for p in policy.parameters())
    plain, penalised = NegativeLogLikelihood()(policy, classes), NegativeLogLikelihood(l2=0.4)(policy, classes)
    assert float((penalised - plain).detach()) == pytest.approx(0.2 * squares)


def test_batches_cover_an_epoch_once(classes):
    stream = BatchStream(classes, 40, seed=5)
    first = [stream.next() for _ in range(3)]
    assert [len(batch.target) for batch, _ in first] == [40, 40, 10]
    assert len({seed for _, seed in first}) == 3
    seen = torch.cat([batch.inputs[:, 0] for batch, _ in first]).sort().values
    assert torch.equal(seen, classes.inputs[:, 0].sort().values)
    again = BatchStream(classes, 40, seed=5).next()
    assert torch.equal(again[0].inputs, first[0][0].inputs)
    assert again[1] == first[0][1]
    with pytest.raises(ValueError, match="batch_size"):
        BatchStream(classes, 0, seed=0)
