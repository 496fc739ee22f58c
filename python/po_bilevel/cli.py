"""The command line: `po-bilevel classify --dataset wine --seeds 10 --out DIR`, `po-bilevel sweep FILE`, ...

Exit codes: 0 done; 1 training diverged; 2 something about the command, a file or the installation is wrong;
130 interrupted.
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

from . import plots, results
from .errors import MissingDependencyError, NonFiniteError, UsageError
from .experiments import classification, gaussian
from .experiments.classification import ClassifyConfig
from .experiments.gaussian import GaussianConfig
from .experiments.registry import EXPERIMENTS
from .optional import require
from .report import ReportConfig, report
from .reproduce import ReproduceConfig, plan
from .sweep import SweepConfig, sweep
from .sweep import check as check_sweep

PROGRAM = "po-bilevel"
# What the files of an experiment are called after.
NAMES = {"dynamics": "dynamics", "generalise": "generalisation", "forgetting": "forgetting"}


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
            run_experiment(config)
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


def classify(config: ClassifyConfig) -> None:
    """Runs the classification experiment, prints its table, and writes its files.

    Raises:
        UsageError, MissingDependencyError, NonFiniteError: as `classification.run`, or --out cannot be written to.
    """
    classification.check(config)
    _prepare(config.out, config.plot)
    outcome = classification.run(config)
    paired = results.paired(outcome.rows, "nll")
    _write(
        "classification", config, outcome.rows,
        {"curves": outcome.curves, "reward_paths": outcome.paths, "paired": paired}, outcome.warnings,
        lambda path: plots.figure_of_classification(outcome, path), results.table(paired) if paired else "",
    )  # fmt: skip


def run_gaussian(config: GaussianConfig) -> None:
    """Runs a Gaussian experiment, prints its table and the path of u, and writes its files.

    Raises:
        UsageError, MissingDependencyError, NonFiniteError: as `gaussian.run`, or --out cannot be written to.
    """
    gaussian.check(config)
    _prepare(config.out, config.plot)
    outcome = gaussian.run(config)
    name = f"gaussian_figure{config.figure}"
    _write(
        name, config, outcome.rows, outcome.curves, outcome.warnings,
        lambda path: plots.figure_of_gaussian(outcome, config.figure, path), gaussian.summary_of_paths(outcome),
    )  # fmt: skip


def run_experiment(config: Any) -> None:
    """Runs the experiment of a configuration, prints its table, and writes its files.

    Raises:
        UsageError, MissingDependencyError, NonFiniteError: as its `run`, or --out cannot be written to.
    """
    if isinstance(config, GaussianConfig):
        run_gaussian(config)
    elif isinstance(config, ClassifyConfig):
        classify(config)
    else:
        name, experiment = next((n, e) for n, e in EXPERIMENTS.items() if type(config) is e.config)
        experiment.check(config)
        _prepare(config.out, config.plot)
        outcome = experiment.run(config)
        paired = results.paired(outcome.rows, "nll")
        _write(
            NAMES[name], config, outcome.rows, {**outcome.curves, "paired": paired}, outcome.warnings,
            lambda path: plots.figure_of_summary(results.summarise(outcome.rows), path),
            results.table(paired) if paired else "",
        )  # fmt: skip


def run_sweep(config: SweepConfig) -> int:
    """Runs a sweep; returns 1 if a run failed.

    Raises:
        UsageError, MissingDependencyError: as `sweep.sweep`, or --out cannot be written to.
    """
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
    """Writes the report of a folder.

    Raises:
        UsageError, MissingDependencyError: as `report.report`.
    """
    if config.plot:
        require("matplotlib", "plots")
    _make_folder(config.folder)
    print(f"wrote {report(config)}", flush=True)


def reproduce(config: ReproduceConfig) -> None:
    """Runs every experiment of docs/experiments.md into a folder of its own, then reports on all.

    Raises:
        UsageError, MissingDependencyError, NonFiniteError: as the experiments.
    """
    for step in plan(config):
        print(f"{step.out.name}:", flush=True)
        run_experiment(step)
    write_report(ReportConfig(config.out, plot=config.plot))


def _prepare(out: Path, plot: bool) -> None:
    """What is better said now than after the run."""
    if plot:
        require("matplotlib", "plots")
    _make_folder(out)


def _write(
    experiment: str, config: Any, rows: list[results.Row], curves: dict[str, Any], warnings: list[str],
    draw: Callable[[Path], None], more: str = "",
) -> None:  # fmt: skip
    """Writes curves.json, the figure and results.json, then prints the table."""
    options = dataclasses.asdict(config) | {"out": str(config.out)}
    document = results.document(experiment, options, rows)
    written = [config.out / "curves.json", config.out / "results.json"]
    results.write_json(written[0], curves)
    if config.plot:
        written.insert(1, config.out / f"{experiment}.png")
        draw(written[1])
    results.write_json(written[-1], document)
    # Last, so that no trouble with the terminal costs the run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    print(results.table(document["summary"]))
    if more:
        print(more)
    print("wrote " + ", ".join(map(str, written)), flush=True)
    for warning in warnings:
        print(f"{PROGRAM}: warning: {warning}", file=sys.stderr)


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
