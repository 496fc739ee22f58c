"""The command line: `po-bilevel classify --dataset wine --seeds 10 --out DIR`, `po-bilevel sweep FILE`, ...

Exit codes: 0 done; 1 training diverged; 2 something about the command, a file or the installation is wrong;
130 interrupted. The functions of the commands raise, and `main` makes a line of that.
"""

import dataclasses
import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from .errors import MissingDependencyError, NonFiniteError, UsageError
from .experiments import plots, results
from .experiments.registry import EXPERIMENTS
from .experiments.report import ReportConfig, report
from .experiments.reproduce import ReproduceConfig, plan
from .experiments.runs import Experiment, Options
from .experiments.sweep import SweepConfig, sweep
from .experiments.sweep import check as check_sweep
from .optional import require

PROGRAM = "po-bilevel"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; `arguments` are those of the process if None."""
    try:
        commands: dict[str, Callable[..., Any]] = {name: each.config for name, each in EXPERIMENTS.items()}
        commands |= {"sweep": SweepConfig, "report": ReportConfig, "reproduce": ReproduceConfig}
        config = tyro.extras.subcommand_cli_from_dict(
            commands, prog=PROGRAM, description="Learn rewards from data.", args=arguments
        )
        if isinstance(config, SweepConfig):
            return run_sweep(config)
        if isinstance(config, ReportConfig):
            write_report(config)
        elif isinstance(config, ReproduceConfig):
            reproduce(config)
        else:
            run_experiment(next(each for each in EXPERIMENTS.values() if type(config) is each.config), config)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except NonFiniteError as error:
        return _fail(1, str(error))
    except (UsageError, MissingDependencyError) as error:
        return _fail(2, str(error))
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter would complain once more on closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as error:
        return _fail(2, str(error) or "out of memory")
    return 0


def run_experiment(experiment: Experiment, config: Options) -> None:
    """Runs an experiment: writes curves.json, its figure and results.json, and prints its table."""
    experiment.check(config)
    if config.plot:
        # Better said now than after the run.
        require("matplotlib", "plots")
    _make_folder(config.out)
    outcome = experiment.run(config)
    title, curves = experiment.title_of(config), outcome.curves
    if experiment.baseline is not None:
        curves = curves | {"paired": results.paired(outcome.rows, experiment.baseline)}
    options = dataclasses.asdict(config) | {"out": str(config.out)}
    document = results.document(title, options, outcome.rows)
    written = [config.out / "curves.json", config.out / "results.json"]
    results.write_json(written[0], curves)
    if config.plot:
        written.insert(1, config.out / f"{title}.png")
        plots.save(experiment.figure(config, outcome), written[1])
    results.write_json(written[-1], document)
    # Last, so that no trouble with the terminal costs the run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    paired = results.table(curves["paired"]) if curves.get("paired") else ""
    for text in (results.table(document["summary"]), paired, experiment.summary(config, outcome)):
        if text:
            print(text)
    print("wrote " + ", ".join(map(str, written)), flush=True)
    for warning in outcome.warnings:
        print(f"{PROGRAM}: warning: {warning}", file=sys.stderr)


def run_sweep(config: SweepConfig) -> int:
    """Runs a sweep; returns 1 if a run failed."""
    check_sweep(config)
    _make_folder(config.out)
    failures = sweep(config)
    for failure in failures:
        print(f"{PROGRAM}: error: {failure}", file=sys.stderr)
    if failures:
        return 1
    print(f"wrote {config.out / 'results.parquet'}", flush=True)
    return 0


def write_report(config: ReportConfig) -> None:
    """Writes the report of a folder."""
    if config.plot:
        require("matplotlib", "plots")
    print(f"wrote {report(config)}", flush=True)


def reproduce(config: ReproduceConfig) -> None:
    """Runs every experiment of docs/experiments.md into a folder of its own, then reports on all."""
    for experiment, options in plan(config):
        print(f"{options.out.name}:", flush=True)
        run_experiment(experiment, options)
    write_report(ReportConfig(config.out, plot=config.plot))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"--out: expected a folder to write to, got {str(path)!r}: {error.strerror}") from None


def _fail(code: int, message: str) -> int:
    print(f"{PROGRAM}: {'error: ' if code != 130 else ''}{message}", file=sys.stderr)
    return code
