"""The command line: `po-bilevel classify --dataset wine --seeds 10 --out DIR`.

Exit codes: 0 done; 1 training diverged; 2 something about the command, a file or the installation is wrong;
130 interrupted.
"""

import dataclasses
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro

from . import plots, results
from .errors import MissingDependencyError, NonFiniteError, UsageError
from .experiments import classification
from .experiments.classification import ClassifyConfig
from .optional import require

PROGRAM = "po-bilevel"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; `arguments` are those of the process if None."""
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            {"classify": ClassifyConfig}, prog=PROGRAM, description="Learn rewards from data.", args=arguments
        )
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
    if config.plot:
        # Better said now than after the run.
        require("matplotlib", "plots")
    _make_folder(config.out)
    outcome = classification.run(config)
    options = dataclasses.asdict(config) | {"out": str(config.out)}
    document = results.document("classification", options, outcome.rows)
    written = [config.out / "curves.json", config.out / "results.json"]
    results.write_json(written[0], {"curves": outcome.curves, "reward_paths": outcome.paths})
    if config.plot:
        written.insert(1, config.out / "classification.png")
        plots.figure_of_classification(outcome, written[1])
    results.write_json(written[-1], document)
    # Last, so that no trouble with the terminal costs the run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    print(results.table(document["summary"]))
    print("wrote " + ", ".join(map(str, written)), flush=True)
    for warning in outcome.warnings:
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
