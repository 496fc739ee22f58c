"""results.json is whole or absent, and its intervals are Student's."""

import json
import os

import pytest
from po_bilevel import files
from po_bilevel.experiments import results
from scipy import stats

ROWS = [
    {"dataset": "a", "method": "nll", "seed": 0, "accuracy": 0.8, "u": None},
    {"dataset": "a", "method": "nll", "seed": 1, "accuracy": 0.9, "u": None},
    {"dataset": "a", "method": "pg", "seed": 0, "accuracy": 0.7, "u": 2.0},
]


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 30, 500])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_t_quantile(degrees, level):
    assert results.t_quantile(degrees, level) == pytest.approx(stats.t.ppf(0.5 + level / 2, degrees), rel=1e-9)


def test_summary():
    summary = results.summarise(ROWS)
    assert [(entry["dataset"], entry["method"], entry["seeds"]) for entry in summary] == [
        ("a", "nll", 2),
        ("a", "pg", 1),
    ]
    assert summary[0]["accuracy"]["mean"] == pytest.approx(0.85)
    # Two values: t = 12.7062, standard error 0.05.
    assert summary[0]["accuracy"]["half_width"] == pytest.approx(12.7062 * 0.05, rel=1e-5)
    assert "u" not in summary[0]
    assert summary[1]["u"] == {"mean": 2.0, "half_width": None}
    lines = results.table(summary).splitlines()
    assert lines[0].split() == ["dataset", "method", "seeds", "accuracy", "u"]
    assert lines[2].split() == ["a", "nll", "2", "0.850", "±", "0.635", "-"]
    assert lines[3].split() == ["a", "pg", "1", "0.7", "2"]


def test_document_is_json(tmp_path):
    path = tmp_path / "results.json"
    results.write_json(path, results.document("classification", "classify", {"seeds": 2}, ROWS))
    read = json.loads(path.read_text())
    assert list(read) == ["experiment", "command", "config", "versions", "rows", "summary"]
    assert read["rows"] == ROWS
    assert {"python", "torch", "po-kernels"} <= set(read["versions"])


def test_an_interrupted_write_leaves_the_file_of_before(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.write_json(path, {"run": 1})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        results.write_json(path, {"run": 2})
    assert json.loads(path.read_text()) == {"run": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_nothing_is_left_of_a_block_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), files.atomic(tmp_path / "figure.png") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        results.write_json(tmp_path / "results.json", {"nll": float("nan")})
    assert os.listdir(tmp_path) == []
