"""Sweeps, through SIGKILL and on Ray; reports; the small versions of all experiments."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from po_bilevel import UsageError, cli
from po_bilevel.experiments import sweep, workers
from po_bilevel.experiments.report import ReportConfig, report
from po_bilevel.experiments.runs import folder
from po_bilevel.experiments.sweep import read, runs_of

CONTENT = {
    "experiment": "classify", "seeds": 4,
    "options": {"methods": ["nll", "pg_identity"], "steps": 20}, "grid": {"dataset": ["iris"], "l2": [0.5, 1.0]},
}  # fmt: skip


def written(tmp_path, content=CONTENT):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(content))
    return str(path)


def command(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "po_bilevel", *arguments], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(folder):
    """When each run's file was written; not those that are being written, whose names begin with a dot."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("runs/[!.]*.parquet")}


def values(folder):
    return pd.read_parquet(folder / "results.parquet").drop(columns="seconds")


@pytest.fixture
def _here(monkeypatch):
    """Runs in this process, for what has nothing to do with processes, which take seconds to start."""

    def engine(runs, config):
        for run in runs:
            try:
                yield run, sweep.execute(run), None
            except UsageError as error:
                yield run, [], repr(error)

    monkeypatch.setitem(sweep.ENGINES, "processes", engine)


@pytest.mark.usefixtures("_here")
def test_a_sweep_that_is_killed_ends_as_one_that_is_not(tmp_path, capsys):
    config = written(tmp_path)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = command("sweep", config, "--out", str(broken), "--workers", "1")
    while not finished(broken) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = finished(broken)
    assert not (broken / "results.parquet").exists()
    # As a write leaves behind that was killed.
    (broken / "runs" / ".half.parquet").write_bytes(b"PAR1")
    assert cli.main(["sweep", config, "--out", str(broken)]) == 0
    assert before.items() <= finished(broken).items()
    assert cli.main(["sweep", config, "--out", str(whole)]) == 0
    pd.testing.assert_frame_equal(values(broken), values(whole))
    assert len(values(whole)) == 16
    assert set(values(whole)["dataset"]) == {"iris, l2=0.5", "iris, l2=1.0"}
    assert sorted(path.name for path in broken.iterdir()) == ["manifest.json", "results.parquet", "runs"]
    assert not list((broken / "runs").glob(".*"))
    # Nothing is left to do.
    assert cli.main(["sweep", config, "--out", str(broken)]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(whole), "--no-plot"]) == 0
    text = (whole / "report.md").read_text()
    assert "| iris, l2=0.5 | pg_identity - nll | 4 |" in text


def test_of_the_runs_of_a_broken_pool_only_the_one_that_breaks_it_fails(monkeypatch, tmp_path):
    """Pools whose runs end two at a time; the second run kills its process, and the first with it."""

    class Pool:
        def __init__(self, count, *_):
            self.count, self.tasks, self.broken = count, [], False
            counts.append(count)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, run):
            if self.broken:
                raise BrokenProcessPool
            self.tasks.append((Future(), run))
            if len(self.tasks) == self.count:
                self.broken = any(each.options["first_seed"] == 1 for _, each in self.tasks)
                ended, self.tasks = self.tasks, []
                for future, each in ended:
                    if self.broken:
                        future.set_exception(BrokenProcessPool("killed"))
                    else:
                        future.set_result([each.options["first_seed"]])
                return ended[-1][0]
            return self.tasks[-1][0]

    counts = []
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    runs = runs_of(CONTENT | {"grid": {}})
    ended = list(sweep._in_processes(runs, sweep.SweepConfig(tmp_path, workers=2)))
    assert {run.options["first_seed"]: (rows, error) for run, rows, error in ended} == {
        0: ([0], None), 1: ([], "BrokenProcessPool('killed')"), 2: ([2], None), 3: ([3], None),
    }  # fmt: skip
    assert counts == [2, 2, 1, 1]


# Its processes leave pipes and threads to the garbage collector.
@pytest.mark.filterwarnings("ignore")
def test_the_example_on_ray(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    content = json.loads((Path(__file__).parents[2] / "examples" / "sweep.json").read_text())
    runs = len(runs_of(content))
    small = content | {"seeds": 1, "options": content["options"] | {"methods": ["nll"], "steps": 20}}
    config = written(tmp_path, small)
    assert cli.main(["sweep", config, "--out", str(tmp_path / "out"), "--engine", "ray", "--workers", "1"]) == 0
    assert len(values(tmp_path / "out")) == runs / content["seeds"]


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("ray", "ray", ["sweep", "FILE", "--engine", "ray"]),
        ("pyarrow", "sklearn", ["sweep", "FILE"]),
        ("gymnasium", "mbrl", ["dynamics", "--no-plot"]),
        ("minari", "mbrl", ["dynamics", "--no-plot", "--minari", "any/set-v0"]),
    ],
)
def test_a_missing_dependency_is_named(tmp_path, capsys, monkeypatch, package, extra, arguments):
    monkeypatch.setitem(sys.modules, package, None)
    file = written(tmp_path)
    code = cli.main([file if each == "FILE" else each for each in arguments] + ["--out", str(tmp_path / "out")])
    assert code == 2
    assert f"pip install '.[{extra}]'" in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
def test_a_run_that_fails_is_said_and_tried_again(tmp_path, capsys):
    # Known only when the data are read.
    config = written(tmp_path, CONTENT | {"seeds": 1, "grid": {"dataset": ["iris", str(tmp_path / "none.csv")]}})
    for _ in range(2):
        assert cli.main(["sweep", config, "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
        said = capsys.readouterr().err
        # The point of the grid, and what is wrong with it; not all options.
        assert f"error: dataset={tmp_path}/none.csv, seed=0: " in said
        assert "steps" not in said
    assert len(finished(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"experiment": "cook"}, "experiment: expected one of classify, gaussian"),
        ({"grid": {}}, "expected an object with experiment"),
        (CONTENT | {"grid": {"colour": ["red"]}}, "'colour'"),
        (CONTENT | {"grid": {"seeds": [1]}}, "'seeds'"),
        (CONTENT | {"grid": {"l2": 1.0}}, "list of values for 'l2'"),
        (CONTENT | {"grid": {"l2": [-1.0]}}, "--l2"),
        (CONTENT | {"grid": {"l2": ["much"]}}, "--l2"),
        (CONTENT | {"seeds": 0}, "seeds: expected from 1"),
        (CONTENT | {"options": []}, "options: expected a JSON dict"),
    ],
)
def test_bad_files(tmp_path, content, part):
    with pytest.raises(UsageError) as caught:
        runs_of(read(tmp_path.__class__(written(tmp_path, content))))
    assert part in str(caught.value)


def test_a_folder_of_another_sweep(tmp_path, capsys):
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "manifest.json").write_text('{"runs": []}')
    assert cli.main(["sweep", written(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "of another" in capsys.readouterr().err
    assert cli.main(["sweep", written(tmp_path), "--gpus", "0.5"]) == 2
    assert "--engine: expected ray" in capsys.readouterr().err


def test_an_experiment_without_a_first_seed_is_one_run():
    (run,) = runs_of({"experiment": "gaussian", "seeds": 3, "options": {"figure": 3}, "grid": {}})
    assert run.options == {"figure": 3, "seeds": 3}


def test_methods_in_two_lists_tell_runs_apart():
    def labels(methods):
        content = {"experiment": "classify", "seeds": 1, "options": {"dataset": "iris"}, "grid": {"methods": methods}}
        return [run.label for run in runs_of(content)]

    assert labels([["nll"], ["pg_identity"]]) == ["", ""]
    assert labels([["nll"], ["nll", "pg_identity"]]) == ["methods=nll", "methods=nll pg_identity"]


def test_one_run_at_a_time_in_a_folder(tmp_path, capsys):
    out = tmp_path / "out"
    classify = ["classify", "--dataset", "iris", "--methods", "nll", "--seeds", "1", "--no-plot"]
    with folder(out):
        for arguments in (["sweep", written(tmp_path)], classify):
            assert cli.main([*arguments, "--out", str(out)]) == 2
            assert "--out: expected a folder that no run is writing to" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    assert cli.main([*classify, "--out", str(out)]) == 0


def test_a_broken_run_of_a_sweep_is_run_again(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["sweep", written(tmp_path, CONTENT | {"seeds": 2}), "--out", str(out), "--workers", "1"]
    assert cli.main(arguments) == 0
    runs = sorted((out / "runs").iterdir())
    contents = [path.read_bytes() for path in runs]
    before = pd.read_parquet(out / "results.parquet").drop(columns="seconds")
    capsys.readouterr()
    # A flipped bit of a number, which Parquet does not notice.
    value = np.float64(pd.read_parquet(runs[1])["nll"][0]).tobytes()
    flipped = contents[1].replace(value, bytes([value[0] ^ 4]) + value[1:])
    assert flipped != contents[1]
    for path, broken in zip(runs, (contents[0][:-100], flipped, b"", contents[0]), strict=True):
        path.write_bytes(broken)
    with pytest.raises(UsageError, match=r"\.parquet: expected the rows of a run"):
        report(ReportConfig(out, plot=False))
    assert cli.main(arguments) == 0
    error = capsys.readouterr().err
    assert error.count("it is run again") == 4
    for path in runs:
        assert f"{path}: expected the rows of a run" in error
    pd.testing.assert_frame_equal(pd.read_parquet(out / "results.parquet").drop(columns="seconds"), before)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "[1, 2]"), ("results.json", '{"rows": [{"a": 1}]}'), ("results.json", '{"rows": {"a": 1}}'),
        *(
            ("results.json", json.dumps({"rows": [{"dataset": "d", "method": "m", "seed": 0} | row]}))
            for row in ({"nll": "0.3"}, {"nll": float("nan")}, {"seed": None}, {"method": 3}, {"nll": [1.0]})
        ),
        ("manifest.json", "[]"), ("manifest.json", '{"runs": [{"x": 1}]}'),
    ],
)  # fmt: skip
def test_reports_of_other_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=f"folder: expected a .*{name}"):
        report(ReportConfig(tmp_path, plot=False))


def test_a_report_of_a_folder_and_a_baseline_that_are_not_there(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "absent"), "--no-plot"]) == 2
    assert not (tmp_path / "absent").exists()
    assert "expected a folder" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(
        json.dumps({"rows": [{"dataset": "d", "method": "nll", "seed": 0, "accuracy": 1.0}]})
    )
    with pytest.raises(UsageError, match="--baseline: expected one of nll, got mle"):
        report(ReportConfig(tmp_path, baseline="mle", plot=False))


def test_a_report_of_rows_that_lack_a_metric(tmp_path):
    rows = [{"dataset": "d", "method": "nll", "seed": seed, "nll": 0.5, "brier": 0.1} for seed in range(2)]
    del rows[1]["brier"]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    text = report(ReportConfig(tmp_path, plot=False)).read_text()
    assert "| 0.500 ± 0.000 |" in text
    assert "brier" not in text


def test_nothing_to_report(tmp_path):
    with pytest.raises(UsageError, match="found neither"):
        report(ReportConfig(tmp_path))


def test_all_experiments_in_small(tmp_path, capsys):
    assert cli.main(["reproduce", "--quick", "--no-plot", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for name in ("gaussian1", "gaussian2", "gaussian3", "classification", "dynamics", "planning", "generalisation",
                 "forgetting"):  # fmt: skip
        assert f"## {name}" in text
        assert (tmp_path / name / "results.json").exists()
