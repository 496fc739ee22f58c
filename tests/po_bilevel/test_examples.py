"""examples/bilevel: hypergradients against finite differences, what is learned, and the length that is promised."""

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "bilevel"
SMALL = {
    "data_cleaning": {"rows": 30, "features": 4, "classes": 3},
    "deep_equilibrium": {"rows": 10, "width": 5},
    "dictionary_learning": {"rows": 10, "inputs": 6, "atoms": 4},
    "hyper_representation": {"tasks": 3, "inputs": 4, "features": 3},
    "implicit_logistic": {"rows": 40, "features": 5, "informative": 2},
    "maml_regression": {"tasks": 2, "points": 5, "hidden": 4},
    "reweighting": {"rows": 60, "features": 3, "rare": 10, "hidden": 4},
    "ridge": {"rows": 20, "features": 6},
    "sinkhorn": {"rows": 4, "columns": 5},
}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        if name in SMALL or name == "run":
            del sys.modules[name]


def test_every_example_is_here_and_short():
    files = sorted(FOLDER.glob("*.py"))
    assert [f.stem for f in files] == sorted([*SMALL, "run"])
    assert all(len(f.read_text().splitlines()) < 80 for f in files)


@pytest.mark.parametrize("name", SMALL)
def test_hypergradients_are_those_of_finite_differences(name, load):
    """Along three random directions, within 1e-6 of the gradient's norm times the direction's: in float64."""
    example = load(name).make(**SMALL[name])
    gradient = example.gradient(example.solved(example.phi), example.phi)
    assert gradient.keys() == example.phi.keys()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        along = {key: torch.randn(p.shape, dtype=p.dtype, generator=generator) for key, p in example.phi.items()}
        ends = [
            example.value({key: (p.detach() + s * along[key]).requires_grad_() for key, p in example.phi.items()})
            for s in (2e-4, 1e-4, -1e-4, -2e-4)
        ]
        # Of fourth order: an error of some 1e-16 fifth derivatives, and of 1e-12, to which θ* is solved, over 1e-4.
        difference = (8.0 * (ends[1] - ends[2]) - (ends[0] - ends[3])) / (12.0 * 1e-4)
        slope = sum(float((gradient[key] * along[key]).sum()) for key in gradient)
        scale = max(float(g.norm()) for g in gradient.values()) * sum(d.numel() for d in along.values()) ** 0.5
        assert abs(slope - difference) < 1e-6 * scale


@pytest.mark.parametrize("name", SMALL)
def test_examples_run_and_learn(name, load, capsys):
    values = load(name).main(steps=5, **SMALL[name])
    assert values[-1] < values[0]
    shown = capsys.readouterr().out
    assert "outer loss" in shown


def test_peers_agree_where_they_are_installed(load):
    """But for Betty, whose second derivative lacks a term, as the example says; hypertorch drops its last step."""
    found = {}
    for name, sizes in SMALL.items():
        found |= {(name, peer): apart for peer, (apart, _) in load("run").beside(load(name).make(**sizes), 1).items()}
    if not found:
        pytest.skip("no peer is installed")
    assert all(apart < 1e-5 for (_, peer), apart in found.items() if peer != "betty")
