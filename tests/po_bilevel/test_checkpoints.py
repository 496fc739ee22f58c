"""Resuming a run, and what is refused."""

import copy
import functools
import os
import random
import resource

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
    checkpoints,
    files,
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


def history_of(path):
    (found,) = path.parent.glob(f"{path.name}.????????.history")
    return found


def state_of(trainer):
    """All that a checkpoint may change."""
    tensors = [*trainer.policy.parameters(), *trainer.reward.parameters(), torch.get_rng_state()]
    outer = trainer._outer_optimizer.state_dict()
    return [t.detach().clone() for t in tensors], copy.deepcopy(outer), list(trainer.history), random.getstate()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True)) and (
        repr(first[1]) == repr(second[1]) and [s.step for s in first[2]] == [s.step for s in second[2]]
        and first[3] == second[3]
    )  # fmt: skip


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
    # As a format of before, which was torch's own.
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match=r"expected a checkpoint, got .*list\.pt.*none of format 4; train again"):
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt", history_of(path).name]
    # What a loss closes over is compared: it is made as it was.
    spoiled.clear()
    again = noisy(classes, outer_loss=Spoiled(), checkpoint=path)
    again.resume(path)
    again.fit(1)
    assert len(again.history) == 3


def test_any_flipped_bit_is_noticed(classes, tmp_path):
    path = tmp_path / "run.pt"
    noisy(classes, checkpoint=path).fit(3)
    trainer = noisy(classes)
    before = state_of(trainer)
    chosen = random.Random(0)
    for file in (path, history_of(path)):
        content = file.read_bytes()
        for _ in range(40):
            broken, bit = bytearray(content), chosen.randrange(8 * len(content))
            broken[bit // 8] ^= 1 << (bit % 8)
            file.write_bytes(broken)
            with pytest.raises(UsageError, match="checkpoint: expected"):
                trainer.resume(path)
            assert same(state_of(trainer), before)
        file.write_bytes(content[:-1])
        with pytest.raises(UsageError, match="has changed"):
            trainer.resume(path)
        file.write_bytes(content)
    assert len(trainer.resume(path)) == 3
    history_of(path).unlink()
    with pytest.raises(UsageError, match=r"expected its history beside it, in .*\.history"):
        trainer.resume(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("solution"),
        lambda state: state["reward"].clear(),
        lambda state: state["outer_optimizer"].update(param_groups=[]),
        lambda state: state["stream"].update(generator=torch.zeros(3, dtype=torch.uint8)),
        lambda state: state.update(random={}),
        lambda state: state.update(history={}),
        lambda state: state.update(policy=None),
    ],
)
def test_contents_of_another_shape_leave_the_trainer_as_it_was(spoil, classes, tmp_path):
    path = tmp_path / "run.pt"
    noisy(classes, checkpoint=path).fit(2)
    trainer = noisy(classes)
    trainer.fit(1)
    state = checkpoints.load(path, trainer._configuration)
    spoil(state)
    checkpoints.save(path, state, trainer._configuration)
    before = state_of(trainer)
    with pytest.raises(UsageError, match=r"checkpoint: expected the state of such a trainer, got .*run\.pt"):
        trainer.resume(path)
    assert same(state_of(trainer), before)
    assert len(trainer.fit(1)) == 2


def test_a_full_disk_loses_nothing(classes, tmp_path):
    path = tmp_path / "run.pt"
    trainer = noisy(classes, checkpoint=path)
    trainer.fit(2)
    names = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (2000, history_of(path).stat().st_size + 20):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                trainer.fit(1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(tmp_path.iterdir()) == names
    assert len(noisy(classes).resume(path)) == 2
    assert len(trainer.fit(1)) == 5
    again = noisy(classes)
    assert [step.outer_loss for step in again.resume(path)] == [step.outer_loss for step in trainer.history]


def test_the_history_is_added_to(classes, tmp_path):
    path = tmp_path / "run.pt"
    noisy(classes, checkpoint=path).fit(2)
    trainer = noisy(classes, checkpoint=path)
    trainer.fit(2)
    # Of the run before, which this one has replaced, nothing is left.
    file = history_of(path)
    inode, content = file.stat().st_ino, file.read_bytes()
    trainer.fit(3)
    assert file.stat().st_ino == inode
    assert file.read_bytes().startswith(content)
    assert file.read_bytes().count(b"\n") == 5
    # Killed between the history and the checkpoint.
    with file.open("ab") as more:
        more.write(b'{"step": 5, "inner')
    again = noisy(classes, checkpoint=path)
    history = again.resume(path)
    for found, expected in zip(history, trainer.history, strict=True):
        assert torch.equal(found.reward, expected.reward)
        assert found.reward.dtype == expected.reward.dtype
        assert {**vars(found), "reward": None} == {**vars(expected), "reward": None}
    again.fit(1)
    assert history_of(path) == file
    assert len(noisy(classes).resume(path)) == 6


def test_what_a_killed_process_left_is_swept_and_what_one_holds_is_not(classes, tmp_path):
    path = tmp_path / "run.pt"
    left, held = tmp_path / ".run-aaaa.pt", tmp_path / ".run-bbbb.pt"
    left.write_text("half a checkp")
    held.write_text("half a checkp")
    with files.alone(held):
        noisy(classes, checkpoint=path).fit(1)
    assert not left.exists()
    assert held.exists()


WEIGHT = 1.0


def made_loss(weight, scale=1.0):
    base = PolicyGradient(l2=0.05)

    def loss(policy, reward, batch, seed, power=1):
        return base(policy, reward, batch, seed) * weight * scale * WEIGHT**power

    return loss


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, policy, batch):
        return self.weight * NegativeLogLikelihood()(policy, batch)


def exponential(rate):
    return lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, lambda step: rate**step)


@pytest.mark.parametrize(
    ("first", "second", "part"),
    [
        ({"inner_loss": made_loss(1.0)}, {"inner_loss": made_loss(2.0)}, "inner_loss was .*weight=1.0"),
        ({"inner_loss": made_loss(1.0)}, {"inner_loss": lambda *a: made_loss(1.0)(*a)}, "inner_loss was"),
        ({"outer_loss": Weighted(1.0)}, {"outer_loss": Weighted(2.0)}, "outer_loss was .*weight=1.0"),
        ({"outer_loss": Weighted(1.0).__call__}, {"outer_loss": Weighted(2.0).__call__}, "outer_loss was"),
        ({"inner_scheduler": exponential(0.9)}, {"inner_scheduler": exponential(0.8)}, "inner_scheduler was LambdaLR"),
    ],
)
def test_other_constants_are_another_configuration(first, second, part, classes, tmp_path):
    path = tmp_path / "run.pt"
    noisy(classes, checkpoint=path, **first).fit(1)
    assert len(noisy(classes, **first).resume(path)) == 1
    with pytest.raises(UsageError, match=part):
        noisy(classes, **second).resume(path)


def test_constants_of_the_module_and_the_mode_are_compared(classes, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    noisy(classes, checkpoint=path, inner_loss=made_loss(1.0)).fit(1)
    assert len(noisy(classes, inner_loss=made_loss(1.0)).resume(path)) == 1
    trainer = noisy(classes, inner_loss=made_loss(1.0))
    trainer.policy.eval()
    with pytest.raises(UsageError, match="policy: in evaluation mode was none and is all"):
        trainer.resume(path)
    monkeypatch.setitem(globals(), "WEIGHT", 2.0)
    with pytest.raises(UsageError, match=r"inner_loss was .*WEIGHT=1.0"):
        noisy(classes, inner_loss=made_loss(1.0)).resume(path)


def test_what_cannot_be_compared_is_said(classes, tmp_path):
    path = tmp_path / "run.pt"
    opaque = os.scandir(tmp_path)
    loss = functools.partial(lambda handle, policy, batch: NegativeLogLikelihood()(policy, batch), opaque)
    noisy(classes, checkpoint=path, outer_loss=loss).fit(1)
    with pytest.warns(UserWarning, match="checkpoint: taken to be as they were: outer_loss"):
        noisy(classes, outer_loss=loss).resume(path)
    opaque.close()
