"""One level: losses, batches and the loop over optimiser steps."""

import math

import pytest
import torch
from po_bilevel import (
    Batch,
    BatchStream,
    LinearCategorical,
    LinearGaussian,
    MahalanobisReward,
    MLPGaussian,
    NegativeLogLikelihood,
    NonFiniteError,
    OneHotMahalanobisReward,
    PolicyGradient,
    train_nll,
    train_policy_gradient,
)
from po_bilevel import training as training_module
from po_bilevel.streams import RowStream
from problems import lbfgs, least_squares, seeded
from torch.utils._python_dispatch import TorchDispatchMode


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


def test_a_callback_stops_the_loop(classes):
    policy = seeded(LinearCategorical, 2, 3)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    _, taken = train_nll(policy, classes, optimizer, 50, callback=lambda step, _: step == 3)
    assert taken == 4
    # Only True does.
    assert train_nll(policy, classes, optimizer, 5, callback=lambda *_: 1.0)[1] == 5


def test_gradients_are_clipped(classes):
    policy = seeded(LinearCategorical, 2, 3)
    before = [p.detach().clone() for p in policy.parameters()]
    train_nll(policy, classes, torch.optim.SGD(policy.parameters(), lr=1.0), 1, max_grad_norm=1e-3)
    moved = torch.cat([(p.detach() - b).reshape(-1) for p, b in zip(policy.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


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


def test_frozen_parameters_stay(classes):
    policy = seeded(LinearCategorical, 2, 3)
    policy.network.bias.requires_grad_(False)
    before = policy.network.bias.detach().clone()
    loss, _ = train_nll(policy, classes, torch.optim.Adam(policy.parameters(), lr=0.1), 20)
    assert torch.equal(policy.network.bias, before)
    assert loss < math.log(3)


def test_batches_have_a_target_for_each_row():
    inputs = torch.zeros(6, 2)
    for target in (torch.zeros(7, 3), torch.zeros(2, 7, 3), torch.zeros(6, 2, dtype=torch.int64), torch.zeros(())):
        with pytest.raises(ValueError, match="data: expected a target for each of 6 rows"):
            BatchStream(Batch(inputs, target), None, 0)
    labels = Batch(inputs, torch.arange(12).reshape(2, 6))
    assert labels.rows(torch.tensor([1, 4])).target.tolist() == [[1, 4], [7, 10]]


def test_data_that_are_not_finite_are_refused_with_their_place(regression):
    regression.target[7, 1] = float("nan")
    with pytest.raises(ValueError, match=r"data: expected finite numbers, got nan at target\[7, 1\]"):
        BatchStream(regression, None, 0)


def test_what_is_drawn_under_another_default_device(classes):
    """Generators are of the CPU, whatever device torch takes for new tensors."""

    def drawn():
        stream = RowStream(7, 3, seed=1, device=torch.device("cpu"))
        return [(rows.tolist(), seed) for rows, seed in stream.draw_several(4)]

    expected, (rest, part) = drawn(), classes.split(0.3, seed=2)
    with torch.device("meta"):
        assert drawn() == expected
        again = classes.split(0.3, seed=2)
    assert torch.equal(again[0].inputs, rest.inputs)
    assert torch.equal(again[1].inputs, part.inputs)
