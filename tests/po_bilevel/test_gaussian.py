"""The Gaussian experiments: small runs through the command line, and their numbers against closed forms."""

import dataclasses
import json
import math
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from po_bilevel import UsageError, cli
from po_bilevel.experiments import gaussian
from po_bilevel.experiments.gaussian import GaussianConfig

QUIET = {"progress": False, "threads": 1}


def command(tmp_path, *options):
    return cli.main(["gaussian", "--out", str(tmp_path / "out"), "--threads", "1", *options])


def read(tmp_path, name="results"):
    return json.loads((tmp_path / "out" / f"{name}.json").read_text())


def test_figure_1(tmp_path, capsys):
    assert command(tmp_path, "--figure", "1", "--targets", "12") == 0
    document = read(tmp_path)
    assert document["experiment"] == "gaussian_figure1"
    assert [row["seed"] for row in document["rows"]] == [seed for seed in range(12) for _ in gaussian.METHODS]
    assert (tmp_path / "out" / "gaussian_figure1.png").read_bytes().startswith(b"\x89PNG")
    by_method = {entry["method"]: entry for entry in document["summary"]}
    assert set(by_method) == set(gaussian.METHODS)
    rows = document["rows"]
    for seed in range(12):
        nll, identity, other, optimal = (row for row in rows if row["seed"] == seed)
        # Policy gradient under U* of the data is maximum likelihood, under another U only in the mean.
        for metric in ("mean_error", "covariance_error", "nll"):
            assert optimal[metric] == pytest.approx(nll[metric], rel=1e-3)
        assert identity["mean_error"] == pytest.approx(nll["mean_error"], rel=1e-3)
        assert identity["nll"] > nll["nll"]
        assert other["nll"] > nll["nll"]
    assert (
        by_method["pg_identity"]["covariance_error"]["mean"] > 3 * by_method["pg_optimal"]["covariance_error"]["mean"]
    )
    assert "pg_optimal" in capsys.readouterr().out


def test_figure_2(tmp_path):
    assert command(tmp_path, "--figure", "2") == 0
    curves = read(tmp_path, "curves")
    assert list(curves["densities"]) == ["target", *gaussian.METHODS]
    covariance = np.array(curves["densities"]["pg_identity"]["covariance"])
    # Σ_θ = (λ/2) U⁻¹.
    np.testing.assert_allclose(covariance, 0.5 * np.eye(2), atol=1e-5)
    np.testing.assert_allclose(
        curves["densities"]["pg_optimal"]["covariance"], curves["densities"]["nll"]["covariance"], atol=1e-4
    )
    assert (tmp_path / "out" / "gaussian_figure2.png").read_bytes().startswith(b"\x89PNG")


def test_sampled_estimators_of_figure_2():
    outcome = gaussian.run(GaussianConfig(figure=2, estimator="dice", num_samples=16, **QUIET))
    nll, _, _, optimal = outcome.rows
    assert optimal["nll"] == pytest.approx(nll["nll"], abs=0.05)


def test_figure_3_prints_and_draws_the_path(tmp_path, capsys):
    options = ["--figure", "3", "--seeds", "2", "--outer-steps", "4", "--inner-steps", "20", "--hidden", "8"]
    assert command(tmp_path, *options) == 0
    printed = capsys.readouterr().out
    assert "u over outer steps, to u* = 0.32: 0: 1.0000, 1: " in printed
    curves = read(tmp_path, "curves")
    assert curves["optimum"] == pytest.approx(0.32)
    assert np.array([path["u"] for path in curves["paths"]]).shape == (2, 5, 1)
    assert {"u", "u_optimal", "error", "error_true", "nll", "seconds"} <= set(read(tmp_path)["rows"][0])
    assert (tmp_path / "out" / "gaussian_figure3.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("estimator", ["analytic", "reparam", "dice"])
def test_figure_3_gets_to_the_optimum(estimator):
    """A small network in place of the 64-64 one."""
    config = GaussianConfig(
        seeds=1, outer_steps=60, inner_steps=30, hidden=(16,), outer_learning_rate=0.15, learning_rate=3e-2,
        estimator=estimator, **QUIET,
    )  # fmt: skip
    outcome = gaussian.run(config)
    assert outcome.rows[0]["error"] < 0.03
    assert outcome.rows[0]["u"] == pytest.approx(0.32, rel=0.1)
    path = outcome.curves["paths"][0]["u"]
    assert path[0] == pytest.approx([1.0])
    assert len(path) == 61


# Along log σ, where the reward acts, the inner loss has curvature 2λ. What an option makes of that, relative to the
# true hypergradient, and how far from that it may be: its own tolerance or order of error, else float32 in a few steps.
DAMPED = 2.0 / (2.0 + gaussian.DECAY + gaussian.DAMPING)
FACTORS = {
    "cg": (DAMPED, 2e-2), "normal-cg": (DAMPED, 2e-2), "neumann": (DAMPED, 2e-2), "fixed-point": (DAMPED, 0.15),
    "dense": (DAMPED, 1e-3), "identity": (1.0, 1e-3),
    # (0.01)²/6 times the third derivative, 8 times the curvature at most.
    "finite-difference": (1.0, 1e-3),
    "unrolled": (1.0 - 0.96**10, 1e-3), "recompute": (1.0 - 0.96**10, 1e-3), "truncated": (1.0 - 0.96**5, 1e-3),
    # Smoothed over u ± 0.06, which moves σ² by as much: its square, and the square of that.
    "evolution-strategies": (1.0 - 0.98**20, 0.02),
    # Twenty steps of 0.02 on L + F/20, of curvature 2 + 2·1.25²·2u/20; second order in a shift of log σ of 0.03.
    "penalty": (2.0 / 2.3125 * (1.0 - (1.0 - 0.02 * 2.3125) ** 20), 0.1),
    # The value function and its gradient vanish at a minimum.
    "bome": (0.0, 1e-3),
    # Of the second call: v has taken one step of 0.02 from zero.
    "single-loop": (2.0 * 0.02, 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("hypergradient", get_args(gaussian.Hypergradients))
def test_hypergradients_by_option(hypergradient):
    """At the inner optimum, which a linear mean reaches: F'(u) = -n/(2u) + tr Σ/λ, u = softplus(raw)."""
    learner = gaussian.trainer(GaussianConfig(hidden=(), hypergradient=hypergradient, **QUIET), seed=0)
    inner, outer = learner._stream.data, learner._outer_stream.data
    design = torch.cat([inner.inputs, torch.ones(100, 1)], dim=1).double()
    solution = torch.linalg.lstsq(design, inner.target.mean(dim=0).double()).solution.float()
    linear = learner.policy.mean_network[0]
    with torch.no_grad():
        linear.weight.copy_(solution[:2].mT)
        linear.bias.copy_(solution[2])
        learner.policy.log_std.fill_(0.5 * math.log(0.5))
        spread = (outer.target - learner.policy(outer.inputs)[0]).square().mean(dim=(0, 1)).sum()
    found = learner._take_hypergradient()
    if hypergradient == "single-loop":
        assert float(found.gradient[0]) == 0.0
        found = learner._take_hypergradient()
    true = (-1.0 + float(spread)) * (1.0 - math.exp(-1.0))
    factor, error = FACTORS[hypergradient]
    assert float(found.gradient[0]) / true == pytest.approx(factor, rel=error, abs=error * DAMPED * (factor == 0.0))
    if factor > 0:
        learner.fit(1)
        # The reward is too large by a factor of three: the first step of Adam lowers raw by the learning rate.
        assert float(learner.reward.matrix.raw.detach()) == pytest.approx(math.log(math.e - 1.0) - 0.07, abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("estimator", ["analytic", "reparam", "dice"])
def test_figure_3_on_a_device(estimator):
    """No inner step waits for it, and what is learned is what is learned on the CPU."""
    found = {}
    for device in ("cpu", "cuda"):
        config = GaussianConfig(
            seeds=1, inner_steps=30, hidden=(8,), learning_rate=3e-2, estimator=estimator, device=device, **QUIET
        )
        with torch.device("cpu"):
            learner = gaussian.trainer(config, seed=0)
        found[device] = learner.fit(4)[-1].reward.cpu()

    def waits(steps):
        learner._inner_steps = steps
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                learner._train_policy()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # That the mode is a prototype is said once, in words that have this one in them too.
        said = [str(each.message) for each in caught]
        return sum("synchroniz" in each and "prototype" not in each for each in said)

    assert waits(20) == waits(60)
    # The CPU's backends, which round otherwise than one another, differ by 2e-6 after as many steps.
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-4, atol=0)


def test_full_precision_by_option():
    config = GaussianConfig(
        seeds=1, dim=3, reward="full", correlation=0.6, outer_steps=3, inner_steps=20, hidden=(8,), **QUIET
    )
    outcome = gaussian.run(config)
    assert np.array(outcome.curves["optimum"]).shape == (3, 3)
    assert np.array(outcome.curves["paths"][0]["u"]).shape == (4, 3)


def test_the_two_draws_have_nothing_in_common():
    inner, outer = gaussian.draw(GaussianConfig(dim=3, inputs=7, observations=4), seed=5)
    assert inner.inputs.shape == outer.inputs.shape == (7, 3)
    assert inner.target.shape == (4, 7, 3)
    assert not set(inner.inputs.reshape(-1).tolist()) & set(outer.inputs.reshape(-1).tolist())
    again = gaussian.draw(GaussianConfig(dim=3, inputs=7, observations=4), seed=5)[1]
    assert torch.equal(again.target, outer.target)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"seeds": 0}, ["--seeds", "at least 1", "got 0"]),
        ({"targets": -1}, ["--targets", "at least 1"]),
        ({"entropy_coef": 0.0}, ["--entropy-coef", "finite positive"]),
        ({"correlation": 1.0}, ["--correlation", "between -1 and 1"]),
        ({"hidden": (0,)}, ["--hidden", "at least 1"]),
        ({"num_samples": 4}, ["--num-samples", "--estimator analytic", "got 4"]),
        ({"estimator": "dice", "num_samples": 1}, ["--num-samples", "at least 2"]),
        ({"figure": 2, "dim": 3}, ["--dim", "expected 2", "got 3"]),
        ({"device": "cuda:99"}, ["--device", "that torch sees", "got cuda:99"]),
        ({"device": "meta"}, ["--device", "expected cpu, cuda", "got meta"]),
        ({"device": "gpu 1"}, ["--device", "expected cpu, cuda", "got gpu 1"]),
    ],
)
def test_options_out_of_range(options, parts):
    with pytest.raises(UsageError) as caught:
        gaussian.run(dataclasses.replace(GaussianConfig(**QUIET), **options))
    for part in parts:
        assert part in str(caught.value)


def test_bad_options_are_one_line(tmp_path, capsys):
    assert command(tmp_path, "--figure", "3", "--seeds", "0") == 2
    assert capsys.readouterr().err.strip() == "po-bilevel: error: --seeds: expected an integer of at least 1, got 0"
    assert command(tmp_path, "--figure", "4") == 2
    assert command(tmp_path, "--hypergradient", "magic") == 2
