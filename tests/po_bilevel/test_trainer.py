"""Policies and training loops, one level and two."""

import functools
import math
import random
import sys
import types

import numpy as np
import pytest
import torch
from po_bilevel import (
    BOME,
    Batch,
    BatchStream,
    BilevelTrainer,
    EmbeddingMahalanobisReward,
    EvolutionStrategies,
    ImplicitCG,
    LinearCategorical,
    LinearFullGaussian,
    LinearGaussian,
    MahalanobisReward,
    MLPCategorical,
    MLPGaussian,
    NegativeLogLikelihood,
    NonFiniteError,
    OneHotMahalanobisReward,
    PolicyGradient,
    SingleLoop,
    TensorBoard,
    Unrolled,
    UsageError,
    WeightsAndBiases,
    optimal_precision,
    residual_covariance,
    train_nll,
    train_policy_gradient,
)
from po_bilevel import trainer as trainer_module
from po_bilevel import training as training_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def bilevel(data: Batch, *, reward: nn.Module | None = None, **options) -> BilevelTrainer:
    policy = seeded(LinearCategorical, 2, 3)
    reward = OneHotMahalanobisReward(3).double() if reward is None else reward
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


def test_a_step_waits_for_no_number(regression):
    """On a GPU, reading one from its memory waits for all that was launched before."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def reads(steps, **options):
        policy, reward = seeded(MLPGaussian, 3, 2, hidden=(4,)), MahalanobisReward(2).double()
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
        with Reads() as found:
            train_policy_gradient(policy, reward, regression, optimizer, steps, **options)
        return found.count

    # The seed comes from the CPU's generator; the losses are read all at once.
    assert reads(25) - reads(5) == 20
    assert reads(25, max_grad_norm=1.0) == reads(25)


@pytest.mark.parametrize("options", [{}, {"patience": 500}])
def test_a_loss_that_is_not_finite_is_found_by_its_step(regression, monkeypatch, options):
    monkeypatch.setattr(training_module, "_READ_TOGETHER", 4)
    policy, steps = seeded(LinearGaussian, 3, 2), []

    def loss(policy, batch, seed):
        steps.append(seed)
        value = NegativeLogLikelihood()(policy, batch)
        return value * float("nan") if len(steps) == 6 else value

    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    with pytest.raises(NonFiniteError, match="step 5"):
        training_module.train(policy, loss, BatchStream(regression, None, 0), optimizer, 20, **options)
    assert len(steps) == (6 if options else 8)


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


@pytest.mark.parametrize("start", range(20))
def test_learned_reward_reaches_the_closed_form_from_anywhere(start, regression):
    """Starts of U between 1/7 and 7 times the optimum; the mean is known, so that the inner problem is small."""
    generator = torch.Generator().manual_seed(start)
    residual = least_squares(regression)
    data = Batch(torch.zeros(ROWS, 1, dtype=torch.float64), residual)
    best = optimal_precision(residual_covariance(residual), 1.0, "diagonal")
    factor = torch.exp(2.0 * (2.0 * torch.rand(2, dtype=torch.float64, generator=generator) - 1.0))
    policy = seeded(LinearGaussian, 1, 2)
    reward = MahalanobisReward(2, "diagonal", best * factor)
    outer = torch.optim.Adam(reward.parameters(), lr=1.0, betas=(0.5, 0.9))
    trainer = BilevelTrainer(
        policy, reward, inner_data=data, outer_data=data, inner_optimizer=lbfgs, outer_optimizer=outer,
        outer_scheduler=torch.optim.lr_scheduler.LinearLR(outer, 1.0, 0.02, 50), inner_steps=3, keep_inner_state=False,
        inner_tolerance=1e-8, progress=False,
    )  # fmt: skip
    history = trainer.fit(60)
    torch.testing.assert_close(reward.precision().detach(), best, rtol=1e-2, atol=0.0)
    assert history[-1].outer_loss < history[0].outer_loss
    assert all(step.converged for step in history)


def test_full_precision_of_correlated_noise_in_five_dimensions():
    dim, rows = 5, 4000
    generator = torch.Generator().manual_seed(3)
    index = torch.arange(dim)
    covariance = 1.25**2 * 0.7 ** (index[:, None] - index).abs().double()
    noise = torch.randn(rows, dim, dtype=torch.float64, generator=generator) @ torch.linalg.cholesky(covariance).mT
    inputs = torch.randn(rows, 2, dtype=torch.float64, generator=generator)
    data = Batch(inputs, inputs @ torch.randn(2, dim, dtype=torch.float64, generator=generator) + 6.0 + noise)
    reward = MahalanobisReward(dim, "full").double()
    outer = torch.optim.Adam(reward.parameters(), lr=0.2)
    trainer = BilevelTrainer(
        seeded(LinearFullGaussian, 2, dim), reward, inner_data=data, outer_data=data, inner_optimizer=lbfgs,
        outer_optimizer=outer, outer_scheduler=torch.optim.lr_scheduler.LinearLR(outer, 1.0, 0.05, 60), inner_steps=2,
        keep_inner_state=False, inner_tolerance=1e-6, hypergradient=ImplicitCG(tolerance=1e-4), progress=False,
    )  # fmt: skip
    trainer.fit(60)
    u = reward.precision().detach()
    best = optimal_precision(residual_covariance(least_squares(data)), 1.0)
    assert float((u - best).norm() / best.norm()) < 0.02
    true = optimal_precision(covariance, 1.0)
    assert float((u - true).norm() / true.norm()) < 0.05


@pytest.mark.parametrize(
    ("method", "inner_steps"),
    [
        (SingleLoop(0.1, damping=0.1), 1),
        (Unrolled(40, 0.5), 0),
        (BOME(5, 0.5, 0.5), 0),
        (EvolutionStrategies(3, 0.1, 12, 0.5), 0),
        (EvolutionStrategies(3, 0.1, 12, 0.5, seed=1), 10),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_methods_train_a_reward(method, inner_steps, classes):
    trainer = bilevel(classes, hypergradient=method, inner_steps=inner_steps)
    if isinstance(method, EvolutionStrategies) and inner_steps == 0:
        with pytest.raises(ValueError, match="inner_steps: expected at least 1 with EvolutionStrategies"):
            trainer.fit(1)
        return
    history = trainer.fit(25)
    assert history[-1].outer_loss < history[0].outer_loss
    assert float((trainer.reward.precision().detach() - 1.0).abs().min()) > 0.05


@pytest.mark.parametrize("estimator", ["dice", "reparam"])
def test_a_neural_reward_is_learned(estimator, regression):
    policy, reward = seeded(LinearGaussian, 3, 2), seeded(EmbeddingMahalanobisReward, 2, hidden=(8,))
    trainer = BilevelTrainer(
        policy, reward, inner_data=regression, outer_data=regression,
        inner_optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.03), inner_steps=15,
        inner_loss=PolicyGradient(entropy_coef=0.3, estimator=estimator, num_samples=16),
        hypergradient=ImplicitCG(damping=0.3, tolerance=1e-2), progress=False,
    )  # fmt: skip
    history = trainer.fit(30)
    # By the seventh step the policy has found the data under the first reward.
    assert history[-1].outer_loss < history[6].outer_loss - 0.05
    assert history[-1].reward is None
    assert history[-1].reward_norm > 0


def noisy(data: Batch, tmp_path=None, **options) -> BilevelTrainer:
    """Everything that has a state: batches, samples, Adam twice, schedulers, a warm start, random directions."""
    policy = seeded(LinearCategorical, 2, 3)
    reward = OneHotMahalanobisReward(3).double()
    outer = torch.optim.Adam(reward.parameters(), lr=0.1)
    arguments = {
        "inner_data": Batch(data.inputs[:60], data.target[:60]),
        "outer_data": Batch(data.inputs[60:], data.target[60:]),
        "inner_optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        "outer_optimizer": outer,
        "outer_scheduler": torch.optim.lr_scheduler.ExponentialLR(outer, 0.9),
        "inner_scheduler": lambda inner: torch.optim.lr_scheduler.ReduceLROnPlateau(inner, patience=1),
        "inner_steps": 7,
        "inner_loss": PolicyGradient(estimator="dice", num_samples=8, l2=0.05),
        "hypergradient": ImplicitCG(damping=0.1),
        "batch_size": 25,
        "progress": False,
    }
    return BilevelTrainer(policy, reward, **(arguments | options))


@pytest.mark.parametrize("method", [ImplicitCG(damping=0.1), EvolutionStrategies(2, 0.1, 3, 0.1)])
def test_resuming_goes_on_to_the_bit(method, classes, tmp_path):
    path = tmp_path / "run.pt"

    def disturb(_):
        # What a callback draws from the global generators is part of the run.
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: NPY002

    runs = []
    for interrupted in (False, True):
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        random.seed(7)
        drawn: list[tuple[float, float, float]] = []
        trainer = noisy(classes, hypergradient=method, checkpoint=path, checkpoint_every=3)
        trainer.fit(4 if interrupted else 9, callback=disturb)
        if interrupted:
            torch.manual_seed(99)
            random.seed(99)
            np.random.seed(99)  # noqa: NPY002
            trainer = noisy(classes, hypergradient=method, checkpoint=path, checkpoint_every=3)
            assert len(trainer.resume(path)) == 4
            trainer.fit(5, callback=[disturb])
        runs.append((trainer, drawn))
    (whole, drawn_whole), (parts, drawn_parts) = runs
    assert drawn_whole == drawn_parts
    for name in ("policy", "reward"):
        for a, b in zip(getattr(whole, name).parameters(), getattr(parts, name).parameters(), strict=True):
            assert torch.equal(a, b)
    assert [step.outer_loss for step in whole.history] == [step.outer_loss for step in parts.history]
    assert [step.residual_norm for step in whole.history] == [step.residual_norm for step in parts.history]
    assert all(torch.equal(a.reward, b.reward) for a, b in zip(whole.history, parts.history, strict=True))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"inner_steps": 8}, ["inner_steps was 7 and is 8"]),
        ({"seed": 1}, ["seed was 0 and is 1"]),
        ({"hypergradient": ImplicitCG(damping=0.2)}, ["hypergradient was ImplicitCG(damping=0.1", "damping=0.2"]),
        ({"inner_loss": PolicyGradient(l2=0.05)}, ["inner_loss was", "'dice'", "estimator=None"]),
        ({"inner_optimizer": lambda p: torch.optim.SGD(p, lr=0.05)}, ["inner_optimizer was Adam", "is SGD"]),
        ({"batch_size": None, "seed": 1}, ["batch_size was 25 and is None", "seed was 0 and is 1"]),
        (
            {"inner_scheduler": lambda inner: torch.optim.lr_scheduler.ExponentialLR(inner, 0.9)},
            ["inner_scheduler was ReduceLROnPlateau", "is ExponentialLR"],
        ),
        ({"inner_loss": functools.partial(PolicyGradient(l2=0.05))}, ["is partial(PolicyGradient("]),
    ],
)
def test_resuming_another_configuration_says_what_differs(options, parts, classes, tmp_path):
    path = tmp_path / "run.pt"
    noisy(classes, checkpoint=path).fit(1)
    trainer = noisy(classes, **options)
    with pytest.raises(UsageError, match="expected the configuration that wrote") as caught:
        trainer.resume(path)
    for part in parts:
        assert part in str(caught.value)
    assert trainer.history == []


def test_resuming_another_policy_scheduler_or_group(regression, tmp_path):
    """What the class and the shapes do not tell."""
    path = tmp_path / "run.pt"

    def made(*, length=10, rate=0.1, frozen=False, **std):
        policy, reward = seeded(LinearGaussian, 3, 2, **std), MahalanobisReward(2).double()
        policy.mean_network.bias.requires_grad_(not frozen)
        outer = torch.optim.Adam([{"params": list(reward.parameters()), "lr": rate}])
        return BilevelTrainer(
            policy, reward, inner_data=regression, outer_data=regression, inner_optimizer=torch.optim.Adam,
            outer_optimizer=outer, outer_scheduler=torch.optim.lr_scheduler.LinearLR(outer, 1.0, 0.1, length),
            inner_steps=2, hypergradient=ImplicitCG(0.1), progress=False, checkpoint=path,
        )  # fmt: skip

    made().fit(2)
    assert len(made().resume(path)) == 2
    for options, part in (
        ({"std": "bounded"}, "std='bounded'"),
        ({"length": 100}, "outer_scheduler was LinearLR"),
        ({"rate": 0.3}, "outer_optimizer was Adam"),
        ({"frozen": True}, "trained was"),
    ):
        trainer = made(**options)
        before = [p.detach().clone() for p in trainer.policy.parameters()]
        with pytest.raises(UsageError, match="expected the configuration that wrote") as caught:
            trainer.resume(path)
        assert part in str(caught.value)
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))


def test_resuming_on_other_data(classes, tmp_path):
    path = tmp_path / "run.pt"
    noisy(classes, checkpoint=path).fit(1)
    other = Batch(classes.inputs + 1e-9, classes.target)
    with pytest.raises(UsageError, match=r"inner_data was \(60, 2\)"):
        noisy(other).resume(path)


def test_files_that_are_no_checkpoint(classes, tmp_path):
    with pytest.raises(UsageError, match="there is none"):
        noisy(classes).resume(tmp_path / "absent.pt")
    (tmp_path / "notes.pt").write_text("notes")
    with pytest.raises(UsageError, match="expected a checkpoint, got"):
        noisy(classes).resume(tmp_path / "notes.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match="expected a checkpoint, got"):
        noisy(classes).resume(tmp_path / "list.pt")


def test_the_last_good_checkpoint_is_kept_and_named(classes, tmp_path):
    path = tmp_path / "run.pt"
    spoiled = []

    class Spoiled(nn.Module):
        def __call__(self, policy, batch):
            loss = NegativeLogLikelihood()(policy, batch)
            return loss * float("nan") if spoiled else loss

    trainer = noisy(classes, outer_loss=Spoiled(), checkpoint=path)
    trainer.fit(2)
    before = path.read_bytes()
    spoiled.append(True)
    with pytest.raises(NonFiniteError, match=r"outer step 2: outer_loss.*checkpoint is .*run\.pt, after 2 outer steps"):
        trainer.fit(2)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt"]
    spoiled.clear()
    again = noisy(classes, outer_loss=Spoiled(), checkpoint=path)
    again.resume(path)
    again.fit(1)
    assert len(again.history) == 3


def test_early_stopping_counts_steps_without_improvement(classes):
    policy = seeded(LinearCategorical, 2, 3)
    losses = []
    _, taken = train_nll(
        policy, classes, torch.optim.SGD(policy.parameters(), lr=0.0), 50, patience=4,
        callback=lambda _, value: losses.append(value),
    )  # fmt: skip
    # The first step sets the least loss; four more do not fall below it.
    assert taken == 5
    assert len(set(losses)) == 1
    _, taken = train_nll(policy, classes, torch.optim.SGD(policy.parameters(), lr=1e-3), 50, patience=4, min_delta=1.0)
    assert taken == 5
    _, taken = train_nll(policy, classes, torch.optim.SGD(policy.parameters(), lr=1e-3), 50, patience=4)
    assert taken == 50


def test_gradients_are_clipped(classes):
    policy = seeded(LinearCategorical, 2, 3)
    before = [p.detach().clone() for p in policy.parameters()]
    train_nll(policy, classes, torch.optim.SGD(policy.parameters(), lr=1.0), 1, max_grad_norm=1e-3)
    moved = torch.cat([(p.detach() - b).reshape(-1) for p, b in zip(policy.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_hypergradients_are_clipped_and_reported_as_they_were(classes):
    reward = OneHotMahalanobisReward(3).double()
    before = reward.matrix.raw.detach().clone()
    trainer = BilevelTrainer(
        seeded(LinearCategorical, 2, 3), reward, inner_data=classes, outer_data=classes, inner_optimizer=lbfgs,
        outer_optimizer=torch.optim.SGD(reward.parameters(), lr=1.0), inner_steps=1,
        inner_loss=PolicyGradient(l2=0.05), max_outer_grad_norm=1e-4, progress=False,
    )  # fmt: skip
    assert trainer.fit(1)[0].gradient_norm > 1e-3
    assert float((reward.matrix.raw.detach() - before).norm()) == pytest.approx(1e-4, rel=1e-2)


def test_plateaus_lower_the_learning_rate_within_an_outer_step_only(classes):
    seen = []

    def make(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        seen.append(optimizer)
        return optimizer

    def scheduler(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.1, patience=0, threshold=1e3, threshold_mode="abs"
        )

    rates = []
    trainer = bilevel(classes, inner_optimizer=make, inner_scheduler=scheduler, inner_steps=4)
    trainer.fit(2)
    assert rates == [0.5, 0.5]
    # The first of four losses is the best there is with this threshold; the others each divide by ten.
    assert seen[0].param_groups[0]["lr"] == pytest.approx(0.5e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": -1}, "inner_steps: expected an integer of at least 0"),
        ({"patience": 0}, "patience: expected an integer of at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected an integer of at least 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected a positive number"),
        ({"max_outer_grad_norm": -1.0}, "max_outer_grad_norm: expected a positive number"),
        ({"inner_tolerance": float("nan")}, "inner_tolerance: expected a finite number"),
        ({"min_delta": -1.0}, "min_delta: expected a finite number"),
        ({"checkpoint": "absent/run.pt"}, "checkpoint: expected a file in a folder that exists, got 'absent/run.pt'"),
    ],
)
def test_options_of_the_trainer_out_of_range(options, message, classes):
    with pytest.raises(ValueError, match=message):
        bilevel(classes, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected a positive number"),
        ({"patience": 0}, "patience: expected an integer of at least 1"),
        ({"tolerance": float("nan")}, "tolerance: expected a finite number"),
        ({"steps": -3}, "steps: expected an integer of at least 0"),
    ],
)
def test_options_of_a_loop_out_of_range(options, message, classes):
    policy = seeded(LinearCategorical, 2, 3)
    with pytest.raises(ValueError, match=message):
        train_nll(policy, classes, torch.optim.SGD(policy.parameters(), lr=0.1), **({"steps": 3} | options))


def test_optimizers_of_other_parameters(classes):
    policy, other = seeded(LinearCategorical, 2, 3), seeded(LinearCategorical, 2, 3)
    tied = OneHotMahalanobisReward(3).double()
    tied.matrix.raw = policy.network.bias
    with pytest.raises(ValueError, match=r"reward: expected parameters of its own, got matrix.raw, .*network.bias"):
        BilevelTrainer(
            policy, tied, inner_data=classes, outer_data=classes, inner_optimizer=lbfgs, inner_steps=1,
            outer_optimizer=torch.optim.Adam(tied.parameters()), progress=False,
        )  # fmt: skip
    with pytest.raises(ValueError, match="optimizer: expected parameters that the loss depends on, got others"):
        train_nll(policy, classes, torch.optim.SGD(other.parameters(), lr=0.1), 3)
    reward, another = OneHotMahalanobisReward(3).double(), OneHotMahalanobisReward(3).double()
    for parameters, message in (
        (list(another.parameters()), "outer_optimizer: expected the reward's .* lacks matrix.raw"),
        ([*reward.parameters(), *policy.parameters()], "outer_optimizer: expected the reward's .* has 2 others too"),
    ):
        with pytest.raises(ValueError, match=message):
            bilevel(classes, reward=reward, outer_optimizer=torch.optim.Adam(parameters))
    with pytest.raises(ValueError, match="got LBFGS"):
        bilevel(classes, reward=reward, outer_optimizer=torch.optim.LBFGS(reward.parameters()))


def test_frozen_parameters_stay(classes):
    policy = seeded(LinearCategorical, 2, 3)
    policy.network.bias.requires_grad_(False)
    before = policy.network.bias.detach().clone()
    loss, _ = train_nll(policy, classes, torch.optim.Adam(policy.parameters(), lr=0.1), 20)
    assert torch.equal(policy.network.bias, before)
    assert loss < math.log(3)


def test_a_plateau_of_the_outer_loss_lowers_its_rate(classes):
    reward = OneHotMahalanobisReward(3).double()
    outer = torch.optim.SGD(reward.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(outer, patience=0, threshold=1e3, threshold_mode="abs")
    bilevel(classes, reward=reward, outer_optimizer=outer, outer_scheduler=scheduler).fit(3)
    assert outer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_batches_have_a_target_for_each_row():
    inputs = torch.zeros(6, 2)
    for target in (torch.zeros(7, 3), torch.zeros(2, 7, 3), torch.zeros(6, 2, dtype=torch.int64), torch.zeros(())):
        with pytest.raises(ValueError, match="data: expected a target for each of 6 rows"):
            BatchStream(Batch(inputs, target), None, 0)
    labels = Batch(inputs, torch.arange(12).reshape(2, 6))
    assert labels.rows(torch.tensor([1, 4])).target.tolist() == [[1, 4], [7, 10]]


def test_trackers_get_every_step(classes, tmp_path, monkeypatch):
    written, logged = [], []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: Run() if options == {"project": "rewards"} else None
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = [TensorBoard(tmp_path), WeightsAndBiases(project="rewards")]
    history = bilevel(classes).fit(2, callback=trackers)
    for tracker in trackers:
        tracker.close()
    assert ("outer_loss", history[1].outer_loss, 1) in written
    assert ("reward/2", float(history[0].reward[2]), 0) in written
    assert written[-1] == "closed"
    assert logged[0][0] == 0
    assert logged[1][1]["num_products"] == history[1].num_products
    assert logged[-1] == "finished"


@pytest.mark.parametrize(("make", "module"), [(lambda: TensorBoard("x"), "tensorboard"), (WeightsAndBiases, "wandb")])
def test_trackers_that_are_not_installed_name_their_extra(make, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=module):
        make()


def test_the_progress_bar_shows_losses_and_reward(classes, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(trainer_module, "tqdm", functools.partial(trainer_module.tqdm, mininterval=0.0))
    trainer = bilevel(classes, progress=True, description="reward")
    history = trainer.fit(2)
    shown = capsys.readouterr().err
    assert "reward: 100%" in shown
    assert f"inner {history[-1].inner_loss:.4f}, outer {history[-1].outer_loss:.4f}" in shown
    assert f"{float(history[-1].reward[0]):.3g}" in shown


def test_memory_of_the_implicit_method_does_not_grow_with_inner_steps(regression):
    """The bytes that autograd graphs hold while the hypergradient is taken, after 2 and after 60 inner steps."""
    peaks = []
    for inner_steps in (2, 60):
        policy, reward = seeded(LinearGaussian, 3, 2), MahalanobisReward(2).double()
        trainer = BilevelTrainer(
            policy, reward, inner_data=regression, outer_data=regression,
            inner_optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
            outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.01), inner_steps=inner_steps,
            hypergradient=ImplicitCG(max_iterations=5, damping=1.0), progress=False,
        )  # fmt: skip
        held = [0, 0]

        class Held:
            def __init__(self, tensor, held=held):
                self.tensor, self.held = tensor, held
                self.size = tensor.numel() * tensor.element_size()
                held[0] += self.size
                held[1] = max(held)

            def __del__(self):
                self.held[0] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda each: each.tensor):
            trainer.fit(2)
        peaks.append(held[1])
    assert peaks[0] == peaks[1] > 0
