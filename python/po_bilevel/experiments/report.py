"""Tables and figures of what is in a folder: of runs with results.json, and of sweeps."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import tyro

from ..errors import UsageError
from ..files import atomic
from . import plots, results
from .results import Row


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Make report.md and figures of the runs and sweeps in a folder and below it."""

    folder: tyro.conf.Positional[Path]
    """Where results.json, or manifest.json and runs/ of a sweep, are; also below."""
    baseline: str = "nll"
    """Method that the others are compared with, on the same data set and seed."""
    plot: bool = True
    """Draw the figures."""
    quiet: bool = False
    """Print warnings and errors only."""


def report(config: ReportConfig) -> Path:
    """Writes report.md, and a PNG for each run and sweep.

    Returns:
        the path of report.md.

    Raises:
        UsageError: no such folder, nothing to report on, a file that cannot be read, or a baseline that is nowhere.
        MissingDependencyError: matplotlib, or for a sweep pandas or pyarrow, is not installed.
    """
    if not config.folder.is_dir():
        raise UsageError(f"folder: expected a folder, got {str(config.folder)!r}")
    found = {path.parent: _rows(path) for path in sorted(config.folder.rglob("results.json"))}
    found |= {path.parent: _sweep_rows(path) for path in sorted(config.folder.rglob("manifest.json"))}
    if not any(found.values()):
        raise UsageError(f"folder: expected results.json or a sweep in {str(config.folder)!r}, found neither")
    methods = {row["method"] for rows in found.values() for row in rows}
    if config.baseline not in methods and config.baseline != ReportConfig.baseline:
        raise UsageError(f"--baseline: expected one of {', '.join(sorted(methods))}, got {config.baseline}")
    lines = ["# Results", ""]
    for folder, rows in sorted(found.items()):
        if not rows:
            continue
        name = str(folder.relative_to(config.folder)) if folder != config.folder else config.folder.resolve().name
        lines += [f"## {name}", "", "Mean ± 95% interval over seeds.", "", *markdown(results.summarise(rows)), ""]
        if paired := results.paired(rows, config.baseline):
            lines += [f"Differences to {config.baseline} on the same seed:", "", *markdown(paired), ""]
        if config.plot and len({row["dataset"] for row in rows}) > plots.MOST_PANELS:
            lines += [f"No figure: it would have more than {plots.MOST_PANELS} rows of panels.", ""]
        elif config.plot:
            image = f"{name.replace('/', '-')}.png"
            plots.save(plots.figure_of_summary(results.summarise(rows)), config.folder / image)
            lines += [f"![{name}]({image})", ""]
    path = config.folder / "report.md"
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    return path


def markdown(summary: list[dict[str, Any]]) -> list[str]:
    """The lines of a summary's table in Markdown."""
    head, *rest = results.cells(summary)
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest)]


def _rows(path: Path) -> list[Row]:
    try:
        return results.check_rows(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"folder: expected a results.json of a run, got {str(path)!r}: {error!r}") from None


def _sweep_rows(manifest: Path) -> list[Row]:
    """Rows of the finished runs of a sweep, in the order of its manifest."""
    try:
        names = [run["id"] for run in json.loads(manifest.read_text(encoding="utf-8"))["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"folder: expected a manifest of a sweep, got {str(manifest)!r}: {error!r}") from None
    rows: list[Row] = []
    for name in names:
        frame = results.read_run(manifest.parent / "runs" / f"{name}.parquet")
        if frame is not None:
            for row in frame.drop(columns="run").to_dict("records"):
                rows.append({key: None if _absent(value) else value for key, value in row.items()})
    return rows


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
