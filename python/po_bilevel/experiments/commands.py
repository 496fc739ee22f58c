"""What the commands do, once their options are known."""

import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..optional import require, require_all
from . import parts, plots, results
from .registry import EXPERIMENTS
from .report import ReportConfig, report
from .reproduce import ReproduceConfig, plan
from .runs import PROGRAM, Experiment, Options, Outcome, folder
from .sweep import SweepConfig, configured, sweep

KINDS = {"sweep": SweepConfig, "report": ReportConfig, "reproduce": ReproduceConfig}


def kind_of(command: str) -> type[Any]:
    """The dataclass of a command's options."""
    return KINDS[command] if command in KINDS else EXPERIMENTS[command].config


def from_file(command: str, path: Path) -> Any:
    """The options of an experiment's command that are in a file, see `Options.config`.

    Raises:
        UsageError: it cannot be read, is of another experiment, or has an option that there is not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config: expected a JSON file, got {str(path)!r}: {error}") from None
    options = content.get("config", content.get("options")) if isinstance(content, dict) else None
    if not isinstance(options, dict) or content.get("grid"):
        raise UsageError(
            f'--config: expected results.json of a run or {{"options": {{...}}}}, without a grid, in {str(path)!r}'
        )
    of = content.get("command", content.get("experiment", command))
    if of != command:
        raise UsageError(f"--config: expected options of {command}, got those of {of} in {str(path)!r}")
    options = {name: value for name, value in options.items() if name not in parts.ASIDE}
    return configured(kind_of(command), options | ({"seeds": content["seeds"]} if "seeds" in content else {}))


def start(command: str, config: Any) -> int:
    """Does what a command is to do; returns its exit code."""
    with contextlib.ExitStack() as stack:
        if config.quiet:
            # Warnings and errors go to the other stream.
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            if hasattr(config, "progress"):
                object.__setattr__(config, "progress", False)
        if isinstance(config, SweepConfig):
            return run_sweep(config)
        if isinstance(config, ReportConfig):
            write_report(config)
        elif isinstance(config, ReproduceConfig):
            reproduce(config)
        else:
            run_experiment(EXPERIMENTS[command], config)
    return 0


def run_experiment(experiment: Experiment, config: Options) -> None:
    """Runs an experiment: writes curves.json, its figure and results.json, and prints its table."""
    config = dataclasses.replace(config, out=Path(str(config.out).replace("{title}", experiment.title_of(config))))
    experiment.check(config)
    # Better said now than after the run.
    require_all([*experiment.needs(config), *((("matplotlib", "plots"),) if config.plot else ())])
    with folder(config.out):
        parts.check_folder(experiment, config)
        _write(experiment, config, parts.run(experiment, config))


def _write(experiment: Experiment, config: Options, outcome: Outcome) -> None:
    """Writes what a run found and prints its table, whatever becomes of the files."""
    title, curves = experiment.title_of(config), outcome.curves
    if experiment.baselines:
        paired = [line for each in experiment.baselines for line in results.paired(outcome.rows, each)]
        curves = curves | {"paired": paired}
    document = results.document(title, experiment.name, parts.described(config), outcome.rows)
    written, trouble = [config.out / "curves.json", config.out / "results.json"], None
    try:
        results.write_json(written[0], curves)
        if config.plot:
            written.insert(1, config.out / f"{title}.png")
            plots.save(experiment.figure(config, outcome), written[1])
        results.write_json(written[-1], document)
        parts.finish(config.out)
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
