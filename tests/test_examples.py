"""examples/: what they say they do, and the length that is promised."""

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    torch.set_num_threads(1)  # of so small networks more only wait for each other
    yield __import__
    for file in FOLDER.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_they_are_short_and_listed():
    files = {path.name: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert max(files.values()) < 80
    listed = (FOLDER / "README.md").read_text()
    assert [name for name in files if f"]({name})" not in listed] == []


def test_a_policy_of_ones_own_earns_more(load):
    before, after = load("own_policy").train(steps=120)
    assert after > before + 0.3


def test_a_reward_from_a_table(load):
    pandas = pytest.importorskip("pandas")
    torch.manual_seed(0)
    x = torch.randn(150, 3)
    frame = pandas.DataFrame(x.numpy(), columns=list("abc"))
    frame["kind"] = ["left" if a > 0 else "right" for a in (x[:, 0] + 0.3 * torch.randn(150)).tolist()]
    losses, classifier = load("csv_reward").compare(frame, "kind")
    assert max(losses.values()) < 0.5
    assert classifier.reward_.shape == (2, 2)


@pytest.mark.parametrize("env", ["CartPole-v1", "InvertedPendulum-v5"])
def test_ppo_is_that_of_plain_torch(load, env):
    for package in ("gymnasium", "mujoco"):
        pytest.importorskip(package, reason="the extra mbrl is not installed")
    ops, eager = load("ppo"), load("ppo_eager")
    if env == "CartPole-v1":
        head, actions = (torch.randn(64, 3),), torch.randint(3, (64,))
    else:
        head, actions = (torch.randn(64, 3), 0.3 * torch.randn(3)), torch.randn(64, 3)
    old = eager.log_prob(head, actions)[0] + 0.3 * torch.randn(64)
    found = []
    for kind in (ops, eager):
        inputs = [each.clone().requires_grad_() for each in head]
        loss = kind.surrogate(*kind.log_prob(inputs, actions), old, torch.linspace(-1.0, 1.0, 64), 0.01)
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*found)
    trajectory = torch.randn(10, 4), torch.randn(11, 4), torch.rand(10, 4) < 0.2
    torch.testing.assert_close(ops.gae(*trajectory), eager.gae(*trajectory))
    # The same numbers are drawn, so that the first batch is the same, and the next ones nearly.
    (fused, _), (plain, _) = ops.train(env, 4096), ops.train(env, 4096, **eager.OPS)
    first = 512 if env == "CartPole-v1" else 2048
    assert [each for each in fused if each[0] <= first] == [each for each in plain if each[0] <= first]
    late = torch.tensor([each[1] for each in fused if each[0] > 2048])
    assert late.mean() > torch.tensor([each[1] for each in fused if each[0] <= 2048]).mean()


def test_an_ensemble_of_models_of_dynamics(load):
    example = load("dynamics_ensemble")
    for likelihood, std, (inside, outside) in example.compare(members=3, rows=300, held_out=100, steps=1500).values():
        # The noise itself allows 3.4 nats; models that have not seen a thing have some -2.
        assert likelihood > 2.5
        assert ((std / example.NOISE - 1).abs() < 0.5).all()
        assert outside > inside


def test_two_processes_learn_the_reward_of_one(load):
    alone, (first, second) = load("ddp").compare(steps=2)
    assert torch.equal(first, second)
    # Sums in another order; both have trained for 400 steps in float32.
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)
