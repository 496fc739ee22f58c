"""The command line: `po-bilevel classify --dataset wine --seeds 10 --out DIR`, `po-bilevel sweep FILE`, ...

Exit codes: 0 done; 1 training diverged; 2 something about the command, a file or the installation is wrong;
130 interrupted. The functions of the commands raise, and `main` makes a line of that.
"""

import contextlib
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
from .experiments.runs import Experiment, Options, Outcome, folder
from .experiments.sweep import SweepConfig, sweep
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
    except RuntimeError as error:
        # torch's word for a MemoryError, with lines of frames below.
        if not any(part in str(error) for part in ("allocate memory", "CUDA out of memory", "calculation overflowed")):
            raise
        return _fail(2, f"out of memory; smaller --hidden, --dim or the like may help: {str(error).splitlines()[0]}")
    return 0


def run_experiment(experiment: Experiment, config: Options) -> None:
    """Runs an experiment: writes curves.json, its figure and results.json, and prints its table."""
    experiment.check(config)
    if config.plot:
        # Better said now than after the run.
        require("matplotlib", "plots")
    with folder(config.out):
        _write(experiment, config, experiment.run(config))


def _write(experiment: Experiment, config: Options, outcome: Outcome) -> None:
    """Writes what a run found and prints its table, whatever becomes of the files."""
    title, curves = experiment.title_of(config), outcome.curves
    if experiment.baselines:
        paired = [line for each in experiment.baselines for line in results.paired(outcome.rows, each)]
        curves = curves | {"paired": paired}
    options = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()
    }
    document = results.document(title, options, outcome.rows)
    written, trouble = [config.out / "curves.json", config.out / "results.json"], None
    try:
        results.write_json(written[0], curves)
        if config.plot:
            written.insert(1, config.out / f"{title}.png")
            plots.save(experiment.figure(config, outcome), written[1])
        results.write_json(written[-1], document)
    except OSError as error:
        trouble = error
    # Last, so that no trouble with the terminal costs the run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    differences = results.table(curves["paired"]) if curves.get("paired") else ""
    for text in (results.table(document["summary"]), differences, experiment.summary(config, outcome)):
        if text:
            print(text)
    for warning in outcome.warnings:
        print(f"{PROGRAM}: warning: {warning}", file=sys.stderr)
    if trouble is not None:
        sys.stdout.flush()
        kept = Path(tempfile.mkdtemp(prefix=f"{PROGRAM}-")) / "results.json"
        with contextlib.suppress(OSError):
            results.write_json(kept, document)
        where = f"results.json is in {kept.parent}" if kept.exists() else "the table above is all there is"
        raise OSError(f"{config.out}: cannot be written to: {trouble}; {where}") from trouble
    print("wrote " + ", ".join(map(str, written)), flush=True)


def run_sweep(config: SweepConfig) -> int:
    """Runs a sweep; returns 1 if a run failed."""
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


def _fail(code: int, message: str) -> int:
    print(f"{PROGRAM}: {'error: ' if code != 130 else ''}{message}", file=sys.stderr)
    return code
