"""What a baseline chooses by cross-validation on its own training rows, and what is counted as its time."""

import dataclasses
import json

import pytest
import threadpoolctl
import torch
from po_bilevel import Batch, cli
from po_bilevel.experiments import classification, data, forgetting, plots, runs
from po_bilevel.experiments.classification import PENALTIES, ClassifyConfig
from po_bilevel.experiments.forgetting import ForgettingConfig
from sklearn.linear_model import LogisticRegression


def splits(seed: int, *, known: bool) -> data.Splits:
    """Sixty training rows whose label is the sign of the first input, or nothing that the inputs know of."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(80, 4, dtype=torch.float64, generator=generator)
    labels = (inputs[:, 0] > 0).long() if known else torch.randint(2, (80,), generator=generator)
    fit, held_out, test = (Batch(inputs[part], labels[part]) for part in (slice(45), slice(45, 60), slice(60, 80)))
    return data.Splits(fit.joined(held_out), fit, held_out, test)


@pytest.fixture
def few(monkeypatch) -> None:
    """Penalties to choose from, so few that a choice takes no time."""
    monkeypatch.setattr(classification, "PENALTIES", (1000.0, 100.0, 1.0, 0.03))


def run(method: str, parts: data.Splits, **options) -> tuple[dict, dict]:
    """The row and the curve of a method."""
    outcome = classification.new_outcome()
    classification.run_method(ClassifyConfig(**options), "data", 2, parts, 0, method, outcome)
    return outcome.rows[0], outcome.curves["curves"]["data"][method][0]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("method", ["nll_cv", "pg_heuristic_cv"])
def test_a_penalty_is_small_where_labels_are_known_and_large_where_they_are_not(method):
    known, unknown = (run(method, splits(1, known=known))[1]["l2"] for known in (True, False))
    assert known <= 1.0
    assert unknown >= 100.0


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("by", ["nll", "accuracy"])
def test_a_penalty_is_the_one_that_does_best_where_each_fold_is_tested_in_turn(by):
    parts = splits(3, known=True)
    noisy = parts.train._replace(target=torch.where(torch.arange(60) % 6 == 0, 1, parts.train.target))
    parts = dataclasses.replace(parts, train=noisy)
    folds = [data.Splits(fit, fit, fit, held_out) for fit, held_out in data.folds(noisy, 0)]
    sign = 1.0 if by == "nll" else -1.0
    loss = {
        l2: sum(sign * run("nll", fold, l2=l2)[0][by] * len(fold.test.target) for fold in folds)
        for l2 in classification.PENALTIES
    }
    assert run("nll_cv", parts, choose_by=by)[1]["l2"] == min(loss, key=loss.__getitem__)


def test_a_network_that_learns_nothing_under_strong_penalties_tries_weak_ones(monkeypatch):
    """Whether the signs of two inputs agree, which no network of small weights sees."""
    monkeypatch.setattr(classification, "PENALTIES", (30.0, 10.0, 7.0, 0.1))
    parts = splits(3, known=True)
    agree = (
        part._replace(target=(part.inputs[:, 0] * part.inputs[:, 1] > 0).long())
        for part in (parts.train, parts.fit, parts.held_out, parts.test)
    )
    row, curve = run("nll_cv", data.Splits(*agree), policy="mlp", hidden=(8,), steps=60)
    assert curve["l2"] == 0.1
    assert row["accuracy"] > 0.9


def test_training_stops_early_where_labels_are_not_known():
    lengths = [run("nll_early", splits(1, known=known), l2=0.01)[1]["step"][-1] for known in (True, False)]
    assert lengths[0] > 3 * lengths[1]


@pytest.mark.usefixtures("few")
def test_no_choice_reads_a_test_row():
    parts = splits(2, known=True)
    other = dataclasses.replace(parts, test=parts.test._replace(target=1 - parts.test.target))
    for method in ("nll_cv", "nll_early"):
        (row, curve), (wrong, same) = run(method, parts, l2=0.1), run(method, other, l2=0.1)
        assert (curve["l2"], curve["step"]) == (same["l2"], same["step"])
        assert row["accuracy"] == pytest.approx(1.0 - wrong["accuracy"])


def test_folds_hold_out_each_row_once_and_a_share_of_each_class():
    rows = Batch(torch.arange(23.0)[:, None], torch.arange(23) % 3)
    parts = data.folds(rows, 0)
    assert sorted(torch.cat([held_out.inputs[:, 0] for _, held_out in parts]).tolist()) == list(range(23))
    for fit, held_out in parts:
        assert not set(fit.inputs[:, 0].tolist()) & set(held_out.inputs[:, 0].tolist())
        assert len(fit.inputs) + len(held_out.inputs) == 23
        assert set(torch.bincount(held_out.target, minlength=3).tolist()) <= {1, 2}


def counted(monkeypatch, module) -> None:
    """A clock that ticks once for each step of likelihood."""
    ticks, train = [0.0], module.train_nll

    def ticking(*arguments, **options):
        found = train(*arguments, **options)
        ticks[0] += found[1]
        return found

    monkeypatch.setattr(module, "train_nll", ticking)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: ticks[0])


def test_seconds_are_of_all_trainings_that_a_choice_takes(monkeypatch):
    counted(monkeypatch, classification)
    parts = splits(1, known=True)
    options = {"optimizer": "adam", "steps": 4}
    assert run("nll", parts, **options)[0]["seconds"] == 4.0
    assert run("nll_cv", parts, **options)[0]["seconds"] == 4.0 * (5 * len(PENALTIES) + 1)
    row, curve = run("nll_early", parts, **options)
    assert row["seconds"] == 4.0 * 5 + curve["step"][-1]
    # The regression of its residuals; its policy gradient does not tick here.
    assert run("pg_heuristic_residual", parts, **options)[0]["seconds"] == 4.0


def test_forgetting_chooses_a_penalty_on_each_task(monkeypatch):
    counted(monkeypatch, forgetting)
    config = ForgettingConfig(tasks=("regression",), seeds=1, steps=5, methods=("nll", "nll_cv"), progress=False)
    seconds = [row["seconds"] for row in forgetting.run(config).rows]
    assert seconds == [10.0, 10.0 * (5 * len(forgetting.PENALTIES) + 1)]


def test_an_estimator_has_the_threads_of_the_other_methods(monkeypatch):
    found, fit = [], LogisticRegression.fit

    def counting(self, *arguments):
        found.extend(library["num_threads"] for library in threadpoolctl.threadpool_info())
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", counting)
    with runs.threads(1), threadpoolctl.threadpool_limits(2):
        run("logistic_regression", splits(1, known=True), threads=1)
    assert set(found) == {1}


def test_an_estimator_is_drawn_at_its_last_step():
    parts, outcome = splits(1, known=True), classification.new_outcome()
    for method in ("nll", "logistic_regression"):
        classification.run_method(ClassifyConfig(), "data", 2, parts, 0, method, outcome)
    curves = outcome.curves["curves"]["data"]
    lines = plots.figure_of_classification(outcome).axes[0].lines
    assert lines[0].get_xdata().tolist() == curves["nll"][0]["step"]
    assert lines[1].get_xdata().tolist() == curves["logistic_regression"][0]["step"]
    assert lines[1].get_marker() == "o"


def test_differences_to_both_baselines_are_printed(tmp_path, capsys):
    options = ["--dataset", "iris", "--seeds", "1", "--steps", "5", "--methods", "nll", "nll_cv", "--no-plot"]
    assert cli.main(["classify", *options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "nll_cv - nll " in printed
    assert "nll - nll_cv" in printed
    paired = json.loads((tmp_path / "curves.json").read_text())["paired"]
    assert paired[0]["nll"]["mean"] == pytest.approx(-paired[1]["nll"]["mean"])
