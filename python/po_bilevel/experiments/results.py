"""What a run leaves behind: results.json and the table on the terminal."""

import functools
import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import po_kernels

from ..errors import UsageError
from ..files import atomic
from ..optional import require

Row = dict[str, Any]
KEYS = ("dataset", "method", "seed")


def document(experiment: str, command: str, config: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The contents of results.json.

    Args:
        experiment: its title.
        command: of `po-bilevel`, to repeat it with: `po-bilevel COMMAND --config results.json --out AGAIN`.
        config: the options of the run.
        rows: one dictionary a run: "dataset", "method", "seed" and metrics, None where one does not apply.

    Returns:
        {"experiment", "command", "config", "versions", "rows", "summary"}, see `summarise`.
    """
    parts = {"experiment": experiment, "command": command, "config": dict(config), "versions": versions()}
    return parts | {"rows": list(rows), "summary": summarise(rows)}


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over seeds, for each data set and method in the order of first appearance.

    Returns:
        dictionaries {"dataset", "method", "seeds": how many, metric: {"mean", "half_width"}, ...}: the 95% interval
        is mean ± half_width by Student's t, None for a single seed. A metric that does not apply is left out.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["method"]), []).append(row)
    summary = []
    for (dataset, method), members in groups.items():
        entry: dict[str, Any] = {"dataset": dataset, "method": method, "seeds": len(members)}
        for metric in members[0]:
            values = [member[metric] for member in members if member.get(metric) is not None]
            if metric not in KEYS and len(values) == len(members):
                entry[metric] = interval(values)
        summary.append(entry)
    return summary


def paired(rows: Sequence[Row], baseline: str) -> list[dict[str, Any]]:
    """Differences of each method to `baseline` on the same data set and seed, which take out what a split is worth.

    Returns:
        as `summarise`, of "method - baseline"; empty if no row is of the baseline.
    """
    base = {(row["dataset"], row["seed"]): row for row in rows if row["method"] == baseline}
    differences = []
    for row in rows:
        other = base.get((row["dataset"], row["seed"]))
        if other is None or row["method"] == baseline:
            continue
        difference: Row = {key: row[key] for key in KEYS} | {"method": f"{row['method']} - {baseline}"}
        for metric, value in row.items():
            if metric not in (*KEYS, "seconds"):
                both = value is not None and other.get(metric) is not None
                difference[metric] = value - other[metric] if both else None
        differences.append(difference)
    return summarise(differences)


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """{"mean", "half_width"} of the two-sided 95% Student t interval of the mean; None for a single value."""
    mean = float(np.mean(values))
    count = len(values)
    if count < 2:
        return {"mean": mean, "half_width": None}
    return {"mean": mean, "half_width": t_quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)}


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """t with P(|T| < t) = level, for Student's t with `degrees` of freedom.

    With t = √ν tan s, P(|T| < t) = 2 Γ((ν+1)/2) / (√π Γ(ν/2)) ∫₀ˢ cosᵛ⁻¹ ds: a smooth integrand over a bounded range,
    so that quadrature and bisection do, and scipy need not be there.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    scale = 2.0 * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        angles = 0.5 * middle * (nodes + 1.0)
        inside = scale * 0.5 * middle * float(weights @ np.cos(angles) ** (degrees - 1))
        low, high = (middle, high) if inside < level else (low, middle)
    return math.sqrt(degrees) * math.tan(0.5 * (low + high))


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on, None for one that is not installed.

    And the commit, where this is a repository's tree: with "-dirty" if it has changes that are not committed.
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "po-kernels": po_kernels.__version__}
    for package in ("torch", "numpy", "scikit-learn", "pandas", "gymnasium", "mujoco", "minari", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"commit": commit()}


@functools.cache
def commit() -> str | None:
    """Of the tree that this file is in, None if it is in none of its own."""
    root = Path(__file__).parents[3]
    if not ((root / ".git").exists() and (root / "pyproject.toml").exists()):
        return None
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Writes content as JSON, all of it or nothing.

    Raises:
        ValueError: it holds an infinity or a NaN, which JSON does not have.
        OSError: the folder cannot be written to.
    """
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_run(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows of a run of a sweep as Parquet, with a digest of them, all of it or nothing."""
    frame = require("pandas", "sklearn").DataFrame(rows)
    frame.attrs["sha256"] = _digest(frame)
    with atomic(path) as temporary:
        frame.to_parquet(temporary)


def read_run(path: Path) -> Any:
    """The rows of a run of a sweep, a pandas frame; None if there is no file.

    Raises:
        UsageError: the file is not whole, or not that run's.
    """
    pandas = require("pandas", "sklearn")
    require("pyarrow", "sklearn")
    if not path.exists():
        return None
    try:
        frame = pandas.read_parquet(path)
        # Of before there were digests, if there is none.
        if set(frame["run"]) != {path.stem} or frame.attrs.pop("sha256", None) not in (None, _digest(frame)):
            raise ValueError("others")
    except Exception as error:
        # Whatever a reader raises on bytes that it cannot make sense of.
        raise UsageError(f"{path}: expected the rows of a run, got {error}") from None
    return frame


def _digest(frame: Any) -> str:
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()


def check_rows(rows: Any) -> list[Row]:
    """Rows as `document` takes them, read from a file.

    Raises:
        ValueError: they are not: says which row and what.
    """
    if not isinstance(rows, list):
        raise ValueError(f"expected a list of rows, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not set(KEYS) <= set(row):
            raise ValueError(f"expected {', '.join(KEYS)} in row {number}, got {row!r:.100}")
        for key, value in row.items():
            if key in ("dataset", "method"):
                right, expected = isinstance(value, str), "a text"
            else:
                real = isinstance(value, (int, float)) and math.isfinite(value)
                right, expected = real or (value is None and key != "seed"), "a finite number"
            if not right:
                raise ValueError(f"expected {expected} as {key!r} of row {number}, got {value!r:.100}")
    return rows


def cells(summary: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The summary as text: a head, and a line for each entry with mean ± half-width of the 95% interval."""
    metrics = list(dict.fromkeys(key for entry in summary for key in entry if key not in (*KEYS, "seeds")))
    lines = [["dataset", "method", "seeds", *metrics]]
    for entry in summary:
        values = [_cell(entry.get(metric)) for metric in metrics]
        lines.append([entry["dataset"], entry["method"], str(entry["seeds"]), *values])
    return lines


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as lines of a table, see `cells`."""
    lines = cells(summary)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _cell(value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return "-"
    mean, half_width = value["mean"], value["half_width"]
    if half_width is None:
        return f"{mean:.4g}"
    digits = 1 if abs(mean or 0.0) >= 10 else 3
    return f"{mean:.{digits}f} ± {half_width:.{digits}f}"
