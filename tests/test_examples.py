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
    names = []

    def loaded(name):
        names.append(name)
        return __import__(name)

    yield loaded
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["csv_reward", "own_policy", "ppo_cartpole"])
def test_they_are_short(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 80


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


def test_ppo_is_that_of_plain_torch(load):
    pytest.importorskip("gymnasium")
    example = load("ppo_cartpole")
    logits, actions, old = torch.randn(64, 3), torch.randint(3, (64,)), -torch.rand(64) - 0.8
    losses, gradients = [], []
    for loss_of in (example.fused_loss, example.eager_loss):
        x = logits.clone().requires_grad_()
        losses.append(loss_of(x, actions, old, torch.linspace(-1.0, 1.0, 64)))
        gradients += torch.autograd.grad(losses[-1], x)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    assert [len(example.train(1, eager)[0]) > 0 for eager in (False, True)] == [True, True]
