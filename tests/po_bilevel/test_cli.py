"""The command line, end to end and with bad input, through main()."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from po_bilevel import NonFiniteError, cli
from po_bilevel.experiments import classification, data

SMALL = ["--seeds", "2", "--outer-steps", "3", "--steps", "30", "--inner-steps", "20"]
METHODS = ["nll", "nll_cv", "pg_identity", "pg_heuristic", "pg_heuristic_residual", "pg_learned"]
HEADER = "length,width,kind"


def csv(tmp_path, rows, header=HEADER):
    path = tmp_path / "flowers.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def rows(count=30, kinds=("rose", "tulip")):
    return [f"{i % 7},{i * 0.5},{kinds[i % len(kinds)]}" for i in range(count)]


def classify(tmp_path, *options):
    return cli.main(["classify", "--out", str(tmp_path / "out"), *options])


def read(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def refused(capsys, code, *parts):
    """The command failed as a user should see it."""
    captured = capsys.readouterr()
    assert code == 2
    for part in parts:
        assert part in " ".join(captured.err.replace("│", " ").split())
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_end_to_end_on_iris(tmp_path, capsys):
    assert classify(tmp_path, "--dataset", "iris", *SMALL) == 0
    printed = capsys.readouterr().out
    result = read(tmp_path)
    assert list(result) == ["experiment", "command", "config", "versions", "rows", "summary"]
    assert result["experiment"] == "classification"
    assert result["config"]["outer_steps"] == 3
    assert [(row["seed"], row["method"]) for row in result["rows"]] == [(s, m) for s in range(2) for m in METHODS]
    for row in result["rows"]:
        assert set(row) == {"dataset", "method", "seed", "accuracy", "nll", "brier", "ece", "u", "seconds"}
        assert (row["u"] is None) == (row["method"] in ("nll", "nll_cv"))
        assert row["accuracy"] > 0.8
    for entry, method in zip(result["summary"], METHODS, strict=True):
        assert (entry["dataset"], entry["method"], entry["seeds"]) == ("iris", method, 2)
        values = [row["accuracy"] for row in result["rows"] if row["method"] == method]
        assert entry["accuracy"]["mean"] == pytest.approx(np.mean(values))
        assert entry["accuracy"]["half_width"] >= 0
        assert method in printed
    assert (tmp_path / "out" / "classification.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    curves = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert list(curves["curves"]["iris"]) == METHODS
    assert np.array(curves["reward_paths"]["iris"][0]["precision"]).shape == (3, 3)
    learned = [row["u"] for row in result["rows"] if row["method"] == "pg_learned"]
    assert all(u > 1.2 for u in learned)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classification.png", "curves.json", "results.json",
    ]  # fmt: skip


def test_same_options_same_results(tmp_path):
    def run(name):
        options = ["--dataset", "iris", *SMALL, "--methods", "nll", "pg_learned", "--no-plot"]
        assert cli.main(["classify", "--out", str(tmp_path / name), *options]) == 0
        found = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found]

    state = torch.random.get_rng_state()
    assert run("first") == run("second")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "options",
    [
        ["--estimator", "dice", "--num-samples", "8", "--steps", "60"],
        ["--reward", "full", "--batch-size", "40"],
        ["--reward", "isotropic", "--policy", "mlp", "--hidden", "5", "4"],
    ],
)
def test_variants(tmp_path, options):
    arguments = ["--dataset", "iris", *SMALL, "--seeds", "1", "--no-plot", *options]
    assert classify(tmp_path, *arguments) == 0
    assert all(np.isfinite(row["nll"]) for row in read(tmp_path)["rows"])
    assert all(entry["accuracy"]["half_width"] is None for entry in read(tmp_path)["summary"])
    assert not (tmp_path / "out" / "classification.png").exists()


def test_csv_file(tmp_path):
    path = csv(tmp_path, rows(60, ("rose", "tulip", "lily")))
    assert classify(tmp_path, "--dataset", path, "iris", *SMALL, "--target", "kind") == 2
    assert classify(tmp_path, "--dataset", path, *SMALL, "--target", "kind", "--methods", "nll", "pg_learned") == 0
    assert {row["dataset"] for row in read(tmp_path)["rows"]} == {"flowers"}
    table = data.load(path, "kind")
    assert table.classes == ("lily", "rose", "tulip")
    assert table.inputs.shape == (60, 2)


@pytest.mark.parametrize("bad", [
    (rows(), None, "--target", "'length', 'width', 'kind'"),
    (rows(), "colour", "--target", "'colour'"),
    ([*rows(), "1,,rose"], "kind", "1 missing value", "'width'", "row 31"),
    ([*rows(), "1,wide,rose"], "kind", "finite numbers", "'width'", "'wide'"),
    ([*rows(), "1,inf,rose"], "kind", "finite numbers", "'inf'"),
    ([*rows(), "1,2,"], "kind", "--target", "1 missing value"),
    (rows(kinds=("rose",)), "kind", "two classes", "'rose'"),
    ([*rows(), "1,2,lily"], "kind", "at least 5 rows of each class", "1 of class 'lily'"),
    (rows(6), "kind", "at least 5 rows of each class", "6 rows"),
    ([], "kind", "rows", "none"),
    (["1,2,rose,4", *rows()], "kind", "--dataset"),
], ids=lambda bad: str(bad[2:]))  # fmt: skip
def test_bad_csv_files(tmp_path, capsys, bad):
    lines, target, *parts = bad
    options = [] if target is None else ["--target", target]
    refused(capsys, classify(tmp_path, "--dataset", csv(tmp_path, lines), *options), *parts)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--dataset", "whine"], ["--dataset", "wine, iris, breast_cancer, digits", "'whine'"]),
        (["--dataset", "missing.csv", "--target", "y"], ["--dataset", "there is none", "missing.csv"]),
        (["--dataset", "iris", "iris"], ["--dataset", "iris iris"]),
        (["--dataset", "iris", "--target", "species"], ["--target", "'species'"]),
        (["--seeds", "0"], ["--seeds", "at least 1", "got 0"]),
        (["--seeds", "ten"], ["--seeds", "ten"]),
        (["--l2", "-1"], ["--l2", "at least 0", "-1"]),
        (["--l2", "0", "--damping", "0"], ["--damping", "singular"]),
        (["--entropy-coef", "nan"], ["--entropy-coef", "finite positive", "nan"]),
        (["--test-fraction", "1.5"], ["--test-fraction", "between 0 and 1", "1.5"]),
        (["--held-out-fraction", "0"], ["--held-out-fraction", "between 0 and 1"]),
        (["--estimator", "reinforce"], ["--estimator", "exact", "dice", "reinforce"]),
        (["--estimator", "dice"], ["--num-samples", "at least 2", "None"]),
        (["--num-samples", "4"], ["--num-samples", "--estimator exact", "got 4"]),
        (["--batch-size", "16", "--optimizer", "lbfgs"], ["--optimizer", "adam", "lbfgs"]),
        (["--hidden", "0"], ["--hidden", "at least 1"]),
        (["--methods", "sgd"], ["--methods", "sgd"]),
        (["--learning", "1"], ["--learning"]),
    ],
)
def test_bad_options(tmp_path, capsys, options, parts):
    refused(capsys, classify(tmp_path, *options), *parts)


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    refused(capsys, classify(tmp_path, "--dataset", "iris"), "--out", "folder")


def test_no_command(capsys):
    refused(capsys, cli.main([]), "classify")


def test_help(capsys):
    assert cli.main(["classify", "--help"]) == 0
    assert "--dataset" in capsys.readouterr().out


@pytest.mark.parametrize(("package", "extra"), [("sklearn", "sklearn"), ("pandas", "sklearn"), ("matplotlib", "plots")])
def test_missing_dependency_names_its_extra(tmp_path, capsys, monkeypatch, package, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Hidden:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Hidden, *sys.meta_path])
    options = ["--dataset", csv(tmp_path, rows()), "--target", "kind"] if package == "pandas" else ["--dataset", "iris"]
    refused(capsys, classify(tmp_path, *options), f"pip install '.[{extra}]' in a clone of po-kernels")


def test_interrupt_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(classification, "train_nll", interrupt)
    assert classify(tmp_path, "--dataset", "iris") == 130
    assert list((tmp_path / "out").iterdir()) == []
    assert "interrupted" in capsys.readouterr().err


def test_divergence_is_one_line(tmp_path, capsys, monkeypatch):
    def diverge(*_, **__):
        raise NonFiniteError("the loss at step 3 is not finite (nan)")

    monkeypatch.setattr(classification, "train_nll", diverge)
    assert classify(tmp_path, "--dataset", "iris") == 1
    assert capsys.readouterr().err.strip() == (
        "po-bilevel: error: iris, seed 0, nll: the loss at step 3 is not finite (nan)"
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_no_test_row_reaches_training_or_the_scaler():
    table = data.load("wine")
    splits = data.split(table, test_fraction=0.2, held_out_fraction=0.25, seed=3)
    torch.testing.assert_close(splits.train.inputs.mean(dim=0), torch.zeros(13, dtype=torch.float64))
    torch.testing.assert_close(splits.train.inputs.std(dim=0, correction=0), torch.ones(13, dtype=torch.float64))
    assert float(splits.test.inputs.mean(dim=0).abs().max()) > 1e-3
    seen = {tuple(row) for part in (splits.fit, splits.held_out) for row in part.inputs.tolist()}
    assert seen == {tuple(row) for row in splits.train.inputs.tolist()}
    assert not seen & {tuple(row) for row in splits.test.inputs.tolist()}
    assert len(splits.fit.target) + len(splits.held_out.target) + len(splits.test.target) == len(table.labels)
    for part in (splits.fit, splits.held_out, splits.train, splits.test):
        assert set(part.target.tolist()) == {0, 1, 2}
    other = data.split(table, test_fraction=0.2, held_out_fraction=0.25, seed=4)
    assert not torch.equal(other.test.target, splits.test.target) or not torch.equal(
        other.test.inputs, splits.test.inputs
    )


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("classify", "--first-seed"), ("dynamics", "--first-seed"), ("classify", "--seeds"), ("dynamics", "--hidden"),
        ("gaussian", "--hidden"), ("classify", "--batch-size"), ("dynamics", "--horizon"),
        ("forgetting", "--first-seed"),
    ],
)  # fmt: skip
def test_integers_that_are_too_large_for_others(command, option, tmp_path, capsys):
    code = cli.main([command, option, str(2**31), "--no-plot", "--out", str(tmp_path / "out")])
    refused(capsys, code, f"{option}: expected an integer of at most 2147483647, got 2147483648")


def test_a_network_that_does_not_fit_is_one_line(tmp_path, capsys):
    options = ["--policy", "mlp", "--hidden", str(2**31 - 1), "--methods", "nll", "--seeds", "1", "--no-plot"]
    refused(capsys, classify(tmp_path, *options), "out of memory; smaller --hidden")


def test_a_full_disk_does_not_cost_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    real = os.fsync

    def full(handle):
        if "out" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr("os.fsync", full)
    assert classify(tmp_path, "--dataset", "iris", "--methods", "nll", "--seeds", "1", "--no-plot") == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("iris")
    assert "No space left on device" in captured.err
    (kept,) = tmp_path.glob("po-bilevel-*/results.json")
    assert f"results.json is in {kept.parent}" in captured.err
    assert [row["method"] for row in json.loads(kept.read_text())["rows"]] == ["nll"]
    assert list((tmp_path / "out").iterdir()) == []
