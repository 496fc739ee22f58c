"""The command line: `po-bilevel classify --dataset wine --seeds 10 --out DIR`, `po-bilevel gaussian --figure 3`.

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
from .optional import require

PROGRAM = "po-bilevel"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; `arguments` are those of the process if None."""
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            {"classify": ClassifyConfig, "gaussian": GaussianConfig},
            prog=PROGRAM,
            description="Learn rewards from data.",
            args=arguments,
        )
        if isinstance(config, GaussianConfig):
            run_gaussian(config)
        else:
            classify(config)
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
