"""What is disturbed, and what is left, in the experiments on generalisation and forgetting."""

import dataclasses

import pytest
import torch
from po_bilevel import UsageError
from po_bilevel.experiments import data, forgetting, generalisation, runs
from po_bilevel.experiments.forgetting import ForgettingConfig
from po_bilevel.experiments.generalisation import GeneraliseConfig, Setting, disturbed


@pytest.fixture(scope="module")
def splits():
    return data.split(data.load("digits"), test_fraction=0.2, held_out_fraction=0.25, seed=0)


def test_noise_is_in_the_training_labels_only(splits):
    noisy = disturbed(splits, Setting("noise", 0.3), 10, 0)
    for part, share in (("fit", 0.3), ("held_out", 0.3), ("test", 0.0)):
        clean, found = getattr(splits, part), getattr(noisy, part)
        torch.testing.assert_close(found.inputs, clean.inputs)
        changed = (found.target != clean.target).float().mean()
        # Three standard deviations of a share of 287 rows.
        assert float(changed) == pytest.approx(share, abs=0.08 if share else 0.0)
    assert len(noisy.train.target) == len(noisy.fit.target) + len(noisy.held_out.target)
    assert torch.equal(disturbed(splits, Setting("noise", 0.3), 10, 0).fit.target, noisy.fit.target)


def test_fractions_keep_every_class(splits):
    few = disturbed(splits, Setting("fraction", 0.01), 10, 0)
    assert torch.bincount(few.fit.target).tolist() == [2] * 10
    assert torch.bincount(few.held_out.target).tolist() == [1] * 10
    assert len(few.test.target) == len(splits.test.target)
    torch.testing.assert_close(few.train.inputs.mean(dim=0), torch.zeros(64, dtype=torch.float64))


def test_a_shift_is_of_the_test_inputs_only(splits):
    moved = disturbed(splits, Setting("shift", 2), 10, 0)
    torch.testing.assert_close(moved.fit.inputs, splits.fit.inputs)
    step = moved.test.inputs - splits.test.inputs
    torch.testing.assert_close(step, step[:1].expand_as(step))
    assert float(step[0].norm()) == pytest.approx(2.0)


def test_generalise_runs_every_setting():
    config = GeneraliseConfig(
        dataset="iris", noise=(0.2,), fractions=(0.5,), shifts=(), seeds=1, methods=("nll", "pg_heuristic"),
        progress=False,
    )  # fmt: skip
    outcome = generalisation.run(config)
    assert [(row["dataset"], row["method"]) for row in outcome.rows] == [
        (f"iris, {setting}", method) for setting in ("noise 0.2", "fraction 0.5") for method in config.methods
    ]


def test_levels_that_agree_to_six_digits_are_two():
    noise = (0.1, 0.1 + 1e-9)
    config = GeneraliseConfig(
        dataset="iris", noise=noise, fractions=(), shifts=(), seeds=1, methods=("nll",), progress=False
    )
    assert [setting.amount for setting in generalisation.settings(config)] == list(noise)
    rows = generalisation.run(config).rows
    assert [row["dataset"] for row in rows] == ["iris, noise 0.1", "iris, noise 0.100000001"]


def test_forgetting_counts_the_training_of_both_tasks(monkeypatch):
    """A clock that ticks once for each step, and that looks at the tests would stop by an hour."""
    ticks = [0.0]
    train, score = forgetting.train_nll, forgetting._Run._score

    def counted(*arguments, **options):
        found = train(*arguments, **options)
        ticks[0] += found[1]
        return found

    def slow(*arguments):
        ticks[0] += 3600.0
        return score(*arguments)

    monkeypatch.setattr(forgetting, "train_nll", counted)
    monkeypatch.setattr(forgetting._Run, "_score", slow)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: ticks[0])
    config = ForgettingConfig(tasks=("regression",), seeds=1, steps=5, methods=("nll", "pg_heuristic"), progress=False)
    # Of the second the regression on each task, too; its policy gradient does not tick here.
    assert [row["seconds"] for row in forgetting.run(config).rows] == [10.0, 10.0]


def test_forgetting_digits():
    config = ForgettingConfig(
        tasks=("digits",), seeds=1, steps=150, methods=("nll", "pg_heuristic", "nll_replay"), progress=False
    )
    rows = {row["method"]: row for row in forgetting.run(config).rows}
    assert all(row["a_before"] > 0.9 for row in rows.values())
    assert rows["nll"]["kept"] < 0.5 < rows["nll_replay"]["kept"]
    assert rows["nll"]["won"] > 0.9
    assert rows["nll"]["kl_moved"] > rows["nll_replay"]["kl_moved"]
    assert rows["nll"]["kept_at_target"] > rows["nll"]["kept"]


def test_forgetting_regression():
    config = ForgettingConfig(
        tasks=("regression",), seeds=1, methods=("nll", "pg_learned"), outer_steps=5, progress=False
    )
    outcome = forgetting.run(config)
    for row in outcome.rows:
        assert row["a_before"] < 0.4
        assert row["won"] < row["kept"]
    first = outcome.curves["regression"]["nll"][0]
    assert first["step"][0] == 0
    assert first["a"][0] == outcome.rows[0]["a_before"]
    assert first["b"][-1] == outcome.rows[0]["won"]


@pytest.mark.parametrize(
    ("run", "config", "parts"),
    [
        (generalisation.run, GeneraliseConfig(noise=(1.5,)), ["--noise", "from 0 to 1", "1.5"]),
        (generalisation.run, GeneraliseConfig(fractions=(0.0,)), ["--fractions"]),
        (generalisation.run, GeneraliseConfig(noise=(), fractions=(), shifts=()), ["at least one"]),
        (generalisation.run, GeneraliseConfig(shifts=(-1.0,)), ["--shifts", "-1.0"]),
        (generalisation.run, GeneraliseConfig(noise=(0.1, 0.1)), ["--noise", "each once", "0.1 0.1"]),
        (generalisation.run, GeneraliseConfig(first_seed=-1), ["--first-seed", "at least 0", "-1"]),
        (generalisation.run, GeneraliseConfig(methods=()), ["--methods", "none"]),
        (forgetting.run, ForgettingConfig(tasks=("digits", "digits")), ["--tasks", "digits digits"]),
        (forgetting.run, ForgettingConfig(steps=0), ["--steps", "at least 1"]),
        (forgetting.run, ForgettingConfig(hidden=(0,)), ["--hidden"]),
    ],
)
def test_options_out_of_range(run, config, parts):
    with pytest.raises(UsageError) as caught:
        run(dataclasses.replace(config, progress=False))
    assert all(part in str(caught.value) for part in parts)
