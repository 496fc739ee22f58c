"""The gates on benchmarks fail when they should, and say why."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

import po_kernels as pk
from benchmarks import bench_gpu, count, replay, report
from po_kernels import extension

BASELINE = {"bench_loss: eager": [10.0, 0.0], "bench_update: over_network": [2.0, 0.0]}


def run_of(**ratios):
    """A run as pytest-benchmark writes it, of cases with one ratio each."""
    return {
        "benchmarks": [
            {"name": name.rsplit("__", 1)[0], "extra_info": {name.rsplit("__", 1)[1]: {"median": x, "spread": 0.0}}}
            for name, x in ratios.items()
        ]
    }


@pytest.mark.parametrize(
    ("run", "part", "says"),
    [
        ({"bench_loss__eager": 8.0, "bench_update__over_network": 2.4}, False, []),
        ({"bench_loss__eager": 7.0, "bench_update__over_network": 2.0}, False, ["bench_loss: eager: 7.00"]),
        ({"bench_loss__eager": 10.0, "bench_update__over_network": 2.6}, False, ["bench_update: over_network: 2.60"]),
        ({"bench_loss__eager": 10.0}, False, ["bench_update: over_network: in the baseline, missing"]),
        ({"bench_loss__eager": 10.0}, True, []),
        ({"bench_renamed__eager": 10.0}, True, ["no ratio of the baseline"]),
        ({}, False, ["no ratio of the baseline"]),
    ],
)
def test_a_run_is_held_against_its_baseline(run, part, says):
    lines = report.check(run_of(**run), BASELINE, part)
    assert len(lines) == len(says)
    for line, expected in zip(lines, says, strict=True):
        assert expected in line


def test_an_empty_run_fails_the_command(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": []}))
    assert report.main(["check", str(path)]) == 1
    assert "no ratio of the baseline" in capsys.readouterr().out


def test_a_page_is_of_two_runs(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(SystemExit):
        report.main(["page", str(path)])
    assert "page: expected 2 RUN.json, got 1" in capsys.readouterr().err


def test_instructions_are_held_against_their_baseline():
    baseline = {"same": 1000, "more": 1000, "fewer": 1000, "gone": 1000}
    worse, better = count.compare({"same": 1029, "more": 1031, "fewer": 900, "new": 1}, baseline)
    assert [line.split(":")[0] for line in worse] == ["gone", "new", "more"]
    assert better == ["fewer: 900 instructions, -10.0% of the baseline's 1,000"]


def test_nothing_is_counted_without_valgrind(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="valgrind is not installed"):
        count.count({})


@pytest.mark.skipif(extension.module is None, reason=str(extension.missing))
def test_recorded_calls_run_without_torch(tmp_path):
    mean = torch.zeros(8, 3, requires_grad=True)
    calls = count.recorded(
        lambda: pk.gaussian_policy_loss(mean, torch.zeros(3), torch.ones(8, 3), 1.0, backend="native").backward()
    )
    assert [name for name, _ in calls] == ["gaussian_policy_loss"]
    # The mean has 8 · 3 float32; what is expanded to a row each has the memory of one.
    assert {len(x) for x in calls[0][1].values() if isinstance(x, bytes)} >= {96, 12}
    path = tmp_path / "calls.pickle"
    path.write_bytes(pickle.dumps([calls, calls]))
    subprocess.run([sys.executable, "-S", replay.__file__, extension.module.__file__, path], check=True)


def test_classes_of_shapes_where_cuda_is_faster():
    """In both orders, by over 5%, and for all that is as large."""

    def case(name, op, size):
        return bench_gpu.Case(name, op, None, None, None, None, size=size)

    cases = [
        case("few", "a", (64, 3, 4)), case("many", "a", (4096, 3, 4)), case("many, second", "a", (4096, 3, 4)),
        case("many samples", "a", (4096, 3, 64)), case("many samples, second", "a", (4096, 3, 64)),
        case("one order", "b", (4096, 3, 4)), case("no class", "c", ()),
    ]  # fmt: skip
    seconds = {
        "few": 1.2, "many": 0.9, "many, second": 0.97, "many samples": 0.5, "many samples, second": 0.9,
        "one order": 0.5, "no class": 0.1,
    }  # fmt: skip
    results = [
        {"case": name, "backend": backend, "graph": {"seconds": taken if backend == "cuda" else 1.0}}
        for name, taken in seconds.items()
        for backend in ("triton", "cuda")
    ]
    assert bench_gpu.faster_in_cuda(cases, results) == {"a": {"rows": 4096, "num_samples": 64, "dim": 3}}
    assert bench_gpu.faster_in_cuda(cases, [{**each, "graph": {"error": "none"}} for each in results]) == {}
