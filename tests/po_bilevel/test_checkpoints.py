"""Resuming a run, and what is refused."""

import functools
import random

import numpy as np
import pytest
import torch
from po_bilevel import (
    Batch,
    BilevelTrainer,
    EvolutionStrategies,
    ImplicitCG,
    LinearCategorical,
    LinearGaussian,
    MahalanobisReward,
    NegativeLogLikelihood,
    NonFiniteError,
    OneHotMahalanobisReward,
    PolicyGradient,
    UsageError,
)
from problems import seeded
from torch import nn


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
