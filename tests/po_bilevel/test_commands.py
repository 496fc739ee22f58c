"""The commands as people use them: folders, interrupts, processes, configuration files, help."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from interrupts import interrupt_itself
from po_bilevel import MissingDependencyError, cli, doctor
from po_bilevel.experiments import parts, results, workers
from po_bilevel.experiments.registry import EXPERIMENTS
from po_bilevel.optional import require_all
from test_experiment import TOSS, TossConfig
from test_experiment import run as toss


@pytest.fixture(autouse=True)
def _entered(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toss", TOSS)


def start(tmp_path, *options, command="toss"):
    return cli.main([command, "--out", str(tmp_path / "out"), "--no-plot", *options])


def read(tmp_path, name="results.json"):
    return json.loads((tmp_path / "out" / name).read_text())


def test_a_folder_of_another_run_is_refused(tmp_path, capsys):
    assert start(tmp_path, "--seeds", "2") == 0
    # The same run may be repeated in place; what makes no other run does not count.
    assert start(tmp_path, "--seeds", "2", "--no-progress", "--jobs", "1") == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    capsys.readouterr()
    for options, of, command in (
        (["--seeds", "3"], "po-bilevel toss with other options", "toss"),
        (["--seeds", "2", "--bias", "0.1"], "po-bilevel toss with other options", "toss"),
        (["--seeds", "1", "--methods", "nll", "--dataset", "iris"], "po-bilevel toss;", "classify"),
    ):
        assert start(tmp_path, *options, command=command) == 2
        said = capsys.readouterr().err
        assert (
            f"--out: expected a folder of this run or a new one, got '{tmp_path}/out' with the results.json of" in said
        )
        assert of in said
        assert "--overwrite" in said
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert start(tmp_path, "--bias", "0.1", "--seeds", "1", "--overwrite") == 0
    assert read(tmp_path)["config"]["bias"] == 0.1
    (tmp_path / "out" / "results.json").write_text("{")
    assert start(tmp_path) == 2


def test_an_interrupted_run_keeps_its_finished_seeds(tmp_path, capsys, monkeypatch):
    begun = []

    def interrupted(config):
        begun.append(config.first_seed)
        if config.first_seed == 2 and begun.count(2) == 1:
            raise KeyboardInterrupt
        return toss(config)

    monkeypatch.setitem(EXPERIMENTS, "toss", dataclasses.replace(TOSS, run=interrupted))
    assert start(tmp_path, "--seeds", "4") == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == [parts.UNFINISHED]
    # Not another run's, however many seeds that has.
    assert start(tmp_path, "--seeds", "4", "--bias", "0.1") == 2
    assert "unfinished.json of po-bilevel toss with other options" in capsys.readouterr().err
    assert start(tmp_path, "--seeds", "4") == 0
    assert begun == [0, 1, 2, 2, 3]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.json", "results.json"]
    found = read(tmp_path)["rows"]
    assert found == toss(TossConfig(seeds=4, bias=0.5)).rows
    assert read(tmp_path, "curves.json")["tossed"] == [2, 2, 2, 2]
    assert capsys.readouterr().err.count("the coin is a toy") == 1


def test_what_another_version_left_is_not_gone_on_with(tmp_path, monkeypatch):
    config = TossConfig(seeds=2, out=tmp_path, plot=False)
    left = {"command": "toss", "config": parts.described(config), "parts": {"0": None}, "versions": {"torch": "0"}}
    results.write_json(tmp_path / parts.UNFINISHED, left)
    assert len(parts.run(TOSS, config).rows) == 4


def test_seeds_in_processes_outlive_one_that_is_killed(tmp_path, capsys, monkeypatch):
    def processes(call, tasks, count):
        assert count == 2
        for task in tasks:
            killed = task.first_seed == 1 and len(tasks) > 2
            yield (task, None, BrokenProcessPool()) if killed else (task, call(task), None)

    monkeypatch.setattr(parts, "in_processes", processes)
    assert start(tmp_path, "--seeds", "4", "--jobs", "2") == 2
    said = capsys.readouterr().err
    assert "seed 1: its process was killed" in said
    assert "the same command goes on" in said
    assert list(read(tmp_path, parts.UNFINISHED)["parts"]) == ["0", "2", "3"]
    assert start(tmp_path, "--seeds", "5", "--jobs", "2") == 0
    assert read(tmp_path)["rows"] == toss(TossConfig(seeds=5)).rows


def test_a_worker_that_is_interrupted_does_not_fail_the_others(tmp_path, capfd):
    tasks = [(number, tmp_path / "there") for number in range(3)]
    ended = {task[0]: (found, error) for task, found, error in workers.in_processes(interrupt_itself, tasks, 2)}
    # Whose fault it was is found by another try of each.
    assert ended == {number: (number, None) for number in range(3)}
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_is_repeated_from_its_folder(tmp_path, capsys):
    assert start(tmp_path, "--seeds", "2", "--bias", "0.25", "--sides", "nll") == 0
    document = read(tmp_path)
    assert document["command"] == "toss"
    assert {"po-kernels", "torch", "python", "commit"} <= set(document["versions"])
    repeated = ["toss", "--config", str(tmp_path / "out" / "results.json"), "--no-plot", "--out"]
    assert cli.main([*repeated, str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["rows"] == document["rows"]
    # What the command line says goes before what is in the file.
    assert cli.main([*repeated, str(tmp_path / "more"), "--seeds", "1"]) == 0
    assert json.loads((tmp_path / "more" / "results.json").read_text())["config"] == document["config"] | {
        "seeds": 1, "out": str(tmp_path / "more"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "--config: expected a JSON file"),
        ("[1]", "--config: expected results.json of a run or"),
        ('{"options": {"bias": 1}, "grid": {"bias": [1]}}', "without a grid"),
        ('{"experiment": "classify", "options": {}}', "--config: expected options of toss, got those of classify"),
        ('{"options": {"weight": 1}}', "no 'weight'"),
        ('{"options": {"bias": "much"}}', "--bias: expected a JSON value for float"),
    ],
)
def test_bad_configuration_files(content, part, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(content)
    assert start(tmp_path, "--config", str(path)) == 2
    assert part in capsys.readouterr().err


def test_a_configuration_file_by_hand(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"experiment": "toss", "seeds": 3, "options": {"bias": 0.75}}))
    assert start(tmp_path, "--config", str(path)) == 0
    assert (read(tmp_path)["config"]["seeds"], read(tmp_path)["config"]["bias"]) == (3, 0.75)


def test_without_out_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["toss", "--no-plot"]) == 0
    assert json.loads(Path("results/toss/results.json").read_text())["config"]["out"] == "results/toss"


def test_quiet(tmp_path, capsys):
    assert start(tmp_path, "--quiet", "--seeds", "1") == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "po-bilevel: warning: the coin is a toy\n"


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in (*EXPERIMENTS, *cli.OTHERS, "completion"):
        assert f"\n  {name} " in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("po-bilevel 0.")
    assert cli.main(["classfy"]) == 2
    assert "expected a command, got classfy" in capsys.readouterr().err


def test_help_waits_for_nothing():
    """What takes seconds to import is not: the help took six."""
    asked = "import sys; from po_bilevel.cli import main; main(['--help']); print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "tyro", "sklearn"} & set(printed.splitlines()[-1].split())


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    for part in ("classify", "doctor", "--held-out-fraction"):
        assert part in printed
    assert cli.main(["completion", "fish"]) == 2
    assert "expected one of bash, zsh, got fish" in capsys.readouterr().err


def test_the_doctor(capsys, monkeypatch):
    def fails(_):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(doctor, "_installed", lambda package: package not in ("wandb", "matplotlib"))
    needed = ["numpy>=1", 'matplotlib>=3; extra == "plots"', 'po-kernels[plots]; extra == "report"', 'b; extra == "c"']
    monkeypatch.setattr("importlib.metadata.requires", lambda _: needed)
    assert cli.main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("po-kernels ")
    assert "torch.compile does not serve: RuntimeError: no compiler" in lines
    assert "reference serves" in lines
    assert "plots lacks matplotlib: pip install '.[plots]' in a clone of po-kernels" in lines
    assert "report lacks matplotlib: pip install '.[report]' in a clone of po-kernels" in lines
    assert "c installed" in lines


def test_all_missing_extras_are_named_at_once():
    with pytest.raises(MissingDependencyError) as caught:
        require_all([("json", "a"), ("nowhere.at_all", "b"), ("not_there", "c"), ("nor_there", "b")])
    assert str(caught.value) == (
        "nowhere, not_there, nor_there are needed here and are not installed: pip install '.[b,c]' in a clone of "
        "po-kernels"
    )


def test_a_command_names_all_that_it_lacks(tmp_path, capsys, monkeypatch):
    for name in ("sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["classify", "--out", str(tmp_path)]) == 2
    assert "sklearn, matplotlib are needed here and are not installed: pip install '.[sklearn,plots]'" in (
        capsys.readouterr().err
    )


def test_every_command_but_the_doctor_has_its_options_in_a_dataclass():
    from po_bilevel.experiments.commands import kind_of

    for name in (*EXPERIMENTS, *cli.OTHERS):
        if name != "doctor":
            assert "quiet" in {field.name for field in dataclasses.fields(kind_of(name))}
    assert Path(cli.__file__).with_name("doctor.py").exists()
