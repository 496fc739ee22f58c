"""Two levels: rewards that are learned."""

import functools
import sys
import types

import pytest
import torch
from po_bilevel import (
    BOME,
    Batch,
    BilevelTrainer,
    EmbeddingMahalanobisReward,
    EvolutionStrategies,
    ImplicitCG,
    LinearCategorical,
    LinearFullGaussian,
    LinearGaussian,
    MahalanobisReward,
    NonFiniteError,
    OneHotMahalanobisReward,
    PolicyGradient,
    Reward,
    SingleLoop,
    TableReward,
    TensorBoard,
    Unrolled,
    WeightsAndBiases,
    optimal_precision,
    residual_covariance,
    resumable,
    train_nll,
)
from problems import ROWS, bilevel, graphs_held, lbfgs, least_squares, seeded
from torch import nn


@pytest.mark.parametrize("kind", ["isotropic", "full"])
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


def test_an_evaluation_is_a_step_that_leaves_the_reward(classes):
    trainer, other = bilevel(classes), bilevel(classes)
    before = trainer.reward.precision().detach().clone()
    step, (gradient,) = trainer.evaluate()
    assert torch.equal(trainer.reward.precision(), before)
    assert trainer.history == []
    first = other.step()
    assert (step.outer_loss, step.gradient_norm) == (first.outer_loss, first.gradient_norm)
    assert float(gradient.norm()) == pytest.approx(step.gradient_norm)


def test_a_small_problem_has_one_thread(classes):
    """Whose steps wait for no other, and the process has as many after them as before."""
    seen = []

    class Watched(PolicyGradient):
        def __call__(self, *arguments):
            seen.append(torch.get_num_threads())
            return super().__call__(*arguments)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bilevel(classes, inner_loss=Watched(estimator="exact")).fit(2)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_callback_stops_and_the_best_reward_is_kept(classes, tmp_path):
    """Outer steps that are far too long: the loss rises, and the reward of its least is known from the history."""
    path = tmp_path / "run.pt"
    reward = OneHotMahalanobisReward(3).double()
    trainer = bilevel(
        classes, reward=reward, outer_optimizer=torch.optim.SGD(reward.parameters(), lr=300.0), checkpoint=path,
        checkpoint_every=100,
    )  # fmt: skip
    history = trainer.fit(20, [lambda step: None, lambda step: step.step == 4], keep_best=True)
    losses = [step.outer_loss for step in history]
    assert len(losses) == 5
    best = min(range(5), key=losses.__getitem__)
    assert 0 < best < 4
    torch.testing.assert_close(reward.precision().detach(), history[best].reward, rtol=0.0, atol=0.0)
    # The checkpoint goes on from where the last step left off.
    assert path.exists()
    trainer.resume(path)
    assert not torch.equal(reward.precision().detach(), history[best].reward)


def test_rewards_say_what_they_are():
    """The precision, or else the table, and neither of a network."""
    table = torch.eye(3)
    for reward, shown in (
        (MahalanobisReward(2, "full"), torch.eye(2)),
        (OneHotMahalanobisReward(3, "isotropic"), torch.tensor(1.0)),
        (TableReward(table), table),
        (EmbeddingMahalanobisReward(2), None),
    ):
        assert isinstance(reward, Reward)
        found = reward.shown()
        if shown is None:
            assert found is None
        else:
            torch.testing.assert_close(found, shown)
            assert not found.requires_grad


def test_a_reward_with_nothing_to_learn_is_refused(classes):
    reward = OneHotMahalanobisReward(3).requires_grad_(False)
    with pytest.raises(ValueError, match="reward"):
        BilevelTrainer(
            LinearCategorical(2, 3), reward, inner_data=classes, outer_data=classes, inner_optimizer=lbfgs,
            outer_optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), inner_steps=1,
        )  # fmt: skip


def test_non_finite_values_stop_training(classes):
    policy = seeded(LinearCategorical, 2, 3)
    with torch.no_grad():
        policy.network.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="step 0"):
        train_nll(policy, classes, torch.optim.SGD(policy.parameters(), lr=0.1), 5)
    trainer = bilevel(classes, outer_loss=lambda policy, batch: policy.log_prob(*batch).mean() * float("nan"))
    with pytest.raises(NonFiniteError, match="outer step 0: outer_loss"):
        trainer.fit(2)
    assert trainer.history == []


@pytest.mark.parametrize("start", [(2.0, -2.0), (-2.0, 2.0)], ids=str)
def test_learned_reward_reaches_the_closed_form_from_anywhere(start, regression):
    """Starts of U at 1/7 and 7 times the optimum; the mean is known, so that the inner problem is small."""
    residual = least_squares(regression)
    data = Batch(torch.zeros(ROWS, 1, dtype=torch.float64), residual)
    best = optimal_precision(residual_covariance(residual), 1.0, "diagonal")
    factor = torch.tensor(start, dtype=torch.float64).exp()
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
    dim, rows = 5, 1000
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
    # Each entry of a covariance of 1000 rows is right to some 1/√500: three of that.
    assert float((u - true).norm() / true.norm()) < 0.13


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


def test_a_neural_reward_is_learned(regression):
    policy, reward = seeded(LinearGaussian, 3, 2), seeded(EmbeddingMahalanobisReward, 2, hidden=(8,))
    trainer = BilevelTrainer(
        policy, reward, inner_data=regression, outer_data=regression,
        inner_optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.03), inner_steps=15,
        inner_loss=PolicyGradient(entropy_coef=0.3, estimator="dice", num_samples=16),
        hypergradient=ImplicitCG(damping=0.3, tolerance=1e-2), progress=False,
    )  # fmt: skip
    history = trainer.fit(30)
    # By the seventh step the policy has found the data under the first reward.
    assert history[-1].outer_loss < history[6].outer_loss - 0.05
    assert history[-1].reward is None
    assert history[-1].reward_norm > 0


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


def test_a_plateau_of_the_outer_loss_lowers_its_rate(classes):
    reward = OneHotMahalanobisReward(3).double()
    outer = torch.optim.SGD(reward.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(outer, patience=0, threshold=1e3, threshold_mode="abs")
    bilevel(classes, reward=reward, outer_optimizer=outer, outer_scheduler=scheduler).fit(3)
    assert outer.param_groups[0]["lr"] == pytest.approx(0.01)


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
    monkeypatch.setattr(resumable, "tqdm", functools.partial(resumable.tqdm, mininterval=0.0))
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
        with graphs_held() as held:
            trainer.fit(2)
        peaks.append(held[1])
    assert peaks[0] == peaks[1] > 0
