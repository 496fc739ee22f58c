"""An experiment that is entered in the registry, and nowhere else, is a command, in sweeps and in reports."""

import ast
import dataclasses
import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
from po_bilevel import UsageError, cli
from po_bilevel.experiments import sweep
from po_bilevel.experiments.registry import EXPERIMENTS
from po_bilevel.experiments.reproduce import ReproduceConfig, plan
from po_bilevel.experiments.runs import Experiment, OptionsInParts, Outcome, check_options, each_run


@dataclasses.dataclass(frozen=True)
class TossConfig(OptionsInParts):
    """Toss a coin."""

    bias: float = 0.5
    """Of the coin."""
    sides: tuple[str, ...] = ("nll", "pg")
    """Of the coin."""
    coin: Path | None = None
    """File that is there once the coin is."""


def check(config: TossConfig) -> None:
    check_options(config, zero=("first_seed",))


def run(config: TossConfig) -> Outcome:
    """The process of the third seed is killed as long as there is no coin."""
    check(config)
    if config.bias == 0.5 and config.first_seed == 2 and config.coin is not None and not config.coin.exists():
        config.coin.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    rows = [
        {"dataset": "coin", "method": side, "seed": seed, "heads": config.bias * seed + (side == "pg"), "seconds": 0.0}
        for seed, side in each_run(config, config.sides)
    ]
    return Outcome(rows, {"tossed": [len(rows)]}, ["the coin is a toy"])


TOSS = Experiment("toss", TossConfig, check, run, reproduced={"tosses": ({"bias": 0.25}, {"seeds": 1})})


@pytest.fixture(autouse=True)
def _entered(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toss", TOSS)


def test_a_command(tmp_path, capsys):
    assert cli.main(["toss", "--seeds", "3", "--bias", "0.5", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "pg - nll" in printed.out
    assert "warning: the coin is a toy" in printed.err
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["experiment"] == "toss"
    assert document["config"] == {
        "seeds": 3, "out": str(tmp_path), "threads": 1, "plot": True, "progress": True, "first_seed": 0, "bias": 0.5,
        "sides": ["nll", "pg"], "coin": None,
    }  # fmt: skip
    assert [row["heads"] for row in document["rows"]] == [0.0, 1.0, 0.5, 1.5, 1.0, 2.0]
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert curves["tossed"] == [2, 2, 2]
    assert curves["paired"][0]["heads"]["mean"] == 1.0
    assert (tmp_path / "toss.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["toss", "--bias", "-1", "--out", str(tmp_path)]) == 2
    assert "--bias" in capsys.readouterr().err


def test_reproduce():
    ((experiment, config),) = (step for step in plan(ReproduceConfig(quick=True)) if step[0].name == "toss")
    assert experiment is TOSS
    assert config == TossConfig(out=Path("reproduction/tosses"), bias=0.25, seeds=1)


def test_a_sweep_whose_worker_is_killed_and_its_report(tmp_path, capsys):
    """A real process, which is killed in its last run: the other five are kept, and the next start does the sixth."""
    file, out = tmp_path / "sweep.json", tmp_path / "out"
    options = {"coin": str(tmp_path / "coin"), "sides": "nll"}
    file.write_text(json.dumps({"experiment": "toss", "seeds": 3, "options": options, "grid": {"bias": [2, 0.5]}}))
    assert cli.main(["sweep", str(file), "--out", str(out), "--workers", "1", "--no-progress"]) == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert "BrokenProcessPool" in said
    assert len(list((out / "runs").glob("*.parquet"))) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweep.ENGINES, "processes", lambda runs, _: ((each, sweep.execute(each), None) for each in runs))
        assert cli.main(["sweep", str(file), "--out", str(out), "--no-progress"]) == 0
    found = pd.read_parquet(out / "results.parquet")
    assert found["heads"].tolist() == [0.0, 2.0, 4.0, 0.0, 0.5, 1.0]
    assert set(found["dataset"]) == {"coin, bias=2", "coin, bias=0.5"}
    assert cli.main(["report", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "| coin, bias=2 | nll | 3 |" in text
    assert (out / "out.png").exists()


def test_the_library_knows_nothing_of_experiments():
    package = Path(cli.__file__).parent
    library = [path for path in package.rglob("*.py") if path.parent.name != "experiments"]
    imports = {
        path.name
        for path in library
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "experiments" in ast.unparse(node)
    }
    assert imports == {"cli.py"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "much"}, "--bias: expected a JSON value for float, got 'much'"),
        ({"bias": True}, "--bias"),
        ({"bias": None}, "--bias"),
        ({"threads": 1.5}, "--threads: expected a JSON value for int, got 1.5"),
        ({"sides": [1]}, "--sides: expected a JSON value for str, got 1"),
        ({"coin": 1}, "--coin"),
    ],
)
def test_values_of_another_type(options, message):
    assert sweep.configured(TossConfig, {"bias": 1, "coin": None, "sides": "nll"}) == TossConfig(
        bias=1.0, sides=("nll",)
    )
    with pytest.raises(UsageError) as caught:
        sweep.configured(TossConfig, options)
    assert message in str(caught.value)
