"""What `make bench` measured: as a table, as a page of the documentation, against the baselines.

python -m benchmarks.report table RUN.json             the ratios of a run
python -m benchmarks.report check RUN.json             fails if one fell below its baseline, beyond the spread, or is
                                                       missing; check --part takes a run of some of the cases
python -m benchmarks.report baseline RUN.json          makes the run the baseline
python -m benchmarks.report page RUN.json RUN.json     docs/benchmarks.md and its plot, from two runs
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "benchmarks" / "baselines" / "cpu.json"
PAGE = ROOT / "docs" / "benchmarks.md"

# A ratio may fall by this much of its baseline, besides the spread of both.
ALLOWED = 0.25
# Ratios of which less is better.
COSTS = ("growth", "over_network", "copy", "read")
NAMES = {
    "eager": "eager torch",
    "compiled": "torch.compile",
    "vectorised": "torch, vectorised",
    "native": "native's speed",
    "authors": "the authors' loss",
    "jax": "JAX, compiled",
    "batch_dims_loop": "batch_dims over loop",
    "batch_dims_eager": "batch_dims over eager torch",
    "one_thread": "one thread",
    "smallest_function": "an empty autograd.Function",
    "over_network": "the network alone",
    "growth": "linear growth",
    "products": "its products alone",
    "copy": "in the time of a copy of the logits",
    "read": "in the time of reading the logits",
    "step_by_step": "the loop in Python",
    "logistic_cv": "LogisticRegressionCV",
    "logistic_cv_scaled": "LogisticRegressionCV, standardised inputs",
    "bayesian_ridge": "BayesianRidge",
    "linear_cross_entropy": "torch's linear_cross_entropy",
}
# What each case is to reach: against eager torch, against torch.compile.
GOALS: dict[str, tuple[float, float | None]] = {
    "gaussian dice 256 x 17, G = 5": (6, 8),
    "gaussian dice 4096 x 17, G = 16": (12, 12),
    "gaussian dice 4096 x 17, G = 64": (12, 12),
    "gaussian dice 65536 x 17, G = 16": (18, 12),
    "gaussian dice 4096 x 2, G = 50": (12, 12),
    "gaussian second order 4096 x 17, G = 16": (12, None),
    "gaussian analytic 65536 x 17": (4, 2),
    "mvn dice 4096 x 8, G = 16": (8, 8),
    "categorical exact 65536 x 10": (5, 3),
    "categorical dice 4096 x 10, G = 50": (12, 10),
}


class Measured(NamedTuple):
    median: float
    spread: float

    def __str__(self) -> str:
        return f"{self.median:.2f}× ± {100 * self.spread:.0f}%"


def ratios(document: dict[str, Any]) -> dict[str, Measured]:
    """Every ratio of a run, by the case's name and the peer's."""
    return {
        f"{each['name']}: {peer}": Measured(value["median"], value["spread"])
        for each in document["benchmarks"]
        for peer, value in each["extra_info"].items()
        if isinstance(value, dict) and "median" in value
    }


def table(document: dict[str, Any]) -> str:
    lines = ["| case | against | ratio |", "| --- | --- | --- |"]
    for name, value in ratios(document).items():
        case, peer = name.rsplit(": ", 1)
        lines.append(f"| {case.removeprefix('bench_')} | {NAMES.get(peer, peer)} | {value} |")
    return "\n".join(lines)


def missing(found: Iterable[str], baseline: Iterable[str]) -> list[str]:
    """A line for each name of the baseline that a run has not got."""
    return [f"{name}: in the baseline, missing from the run" for name in sorted({*baseline} - {*found})]


def fallen(found: dict[str, Measured], baseline: dict[str, list[float]]) -> list[str]:
    """A line for each ratio of the run that is worse than its baseline allows."""
    lines = []
    for name in found.keys() & baseline.keys():
        value, (median, spread) = found[name], baseline[name]
        noise = 1 + value.spread + spread
        if name.endswith(COSTS):
            worse = value.median > median * (1 + ALLOWED) * noise
        else:
            worse = value.median * noise < median * (1 - ALLOWED)
        if worse:
            lines.append(f"{name}: {value}, baseline {Measured(median, spread)}")
    return sorted(lines)


def check(document: dict[str, Any], baseline: dict[str, list[float]], part: bool = False) -> list[str]:
    """A line for each reason why a run fails; of a part of the cases only those it has are judged."""
    found = ratios(document)
    if not found.keys() & baseline.keys():
        return ["the run has no ratio of the baseline"]
    return ([] if part else missing(found, baseline)) + fallen(found, baseline)


def page(first: dict[str, Any], second: dict[str, Any]) -> str:
    info = [{each["name"]: each["extra_info"] for each in run["benchmarks"]} for run in (first, second)]
    about = next(iter(info[0].values()))
    lines = [
        "# Speed on the CPU",
        "",
        "Written by `python -m benchmarks.report page` from two runs of `make bench` in processes of their own.",
        f"Machine: {about['machine']}, {about['simd']}; torch {about['torch']}, Python {about['python']}.",
        "",
        "Loss and all gradients (second order: Hessian-vector and mixed product with U) of float32 inputs. Each ratio",
        "is the median over pairs of neighbouring runs in one process, ± half the range between their quartiles.",
        "",
        "![Ratios to eager torch and torch.compile](benchmarks.png)",
        "",
        "| case | vs eager: goal | run 1 | run 2 | vs torch.compile: goal | run 1 | run 2 | ns an element "
        "| extra memory, MB (eager) | random numbers' share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in info[0].items():
        if not name.startswith("bench_native"):
            continue
        two = info[1][name]
        eager, compiled = GOALS.get(one["shape"], (None, None))
        cells = [one["shape"], _goal(eager), _ratio(one, "eager"), _ratio(two, "eager")]
        cells += [_goal(compiled), _ratio(one, "compiled"), _ratio(two, "compiled")]
        cells += [
            f"{one['ns_per_element']:.2f}, {two['ns_per_element']:.2f}",
            f"{one['peak_extra_mb']:.1f} ({one['eager_peak_extra_mb']:.0f})",
            f"{100 * one['random_numbers_share']:.0f}%" if "random_numbers_share" in one else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The share of the random numbers is the time to make and drop them (for the second order: twice, as it does),",
        "over that of the whole; the rest is arithmetic, memory and the call. It is the distance to the limit: a loss",
        "that samples can get no faster than its random numbers.",
        "",
        "| other ratios | | run 1 | run 2 |",
        "| --- | --- | --- | --- |",
    ]
    for name, value in ratios(first).items():
        if name.startswith("bench_native"):
            continue
        case, peer = name.rsplit(": ", 1)
        again = ratios(second).get(name)
        lines.append(f"| {case.removeprefix('bench_')} | {NAMES.get(peer, peer)} | {value} | {again or '-'} |")
    for one in (info[0][name] for name in ("bench_memory", "bench_linear_token") if name in info[0]):
        lines += [
            "",
            f"Memory at once besides inputs and outputs, {one['shape']}: {one['peak_extra_mb']:.1f} MB, "
            f"eager torch {one['eager_peak_extra_mb']:.0f} MB.",
        ]
    microseconds = [run["bench_call"]["microseconds"] for run in info if "bench_call" in run]
    if microseconds:
        lines += ["", f"A call at one row, forward and backward: {', '.join(f'{x:.0f} µs' for x in microseconds)}."]
    return "\n".join(lines) + "\n"


def plot(document: dict[str, Any], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [each["extra_info"] for each in document["benchmarks"] if each["name"].startswith("bench_native")]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
    for offset, peer in ((0.2, "eager"), (-0.2, "compiled")):
        found = [(i, row[peer]) for i, row in enumerate(rows) if peer in row]
        axes.barh(
            [len(rows) - i + offset for i, _ in found],
            [value["median"] for _, value in found],
            xerr=[value["median"] * value["spread"] for _, value in found],
            height=0.38,
            label=NAMES[peer],
        )
    axes.set_yticks([len(rows) - i for i in range(len(rows))], [row["shape"] for row in rows])
    axes.set_xlabel("times as long as the fused loss and its gradients")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.legend()
    figure.savefig(to, dpi=120)


def _ratio(info: dict[str, Any], peer: str) -> str:
    return str(Measured(info[peer]["median"], info[peer]["spread"])) if peer in info else "-"


def _goal(value: float | None) -> str:
    return "-" if value is None else f"{value:g}×"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("table", "check", "baseline", "page"))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--part", action="store_true", help="the run is of some of the cases")
    arguments = parser.parse_args(argv)
    expected = 2 if arguments.command == "page" else 1
    if len(arguments.runs) != expected:
        parser.error(f"{arguments.command}: expected {expected} RUN.json, got {len(arguments.runs)}")
    runs = [json.loads(path.read_text()) for path in arguments.runs]
    if arguments.command == "table":
        print(table(runs[0]))
    elif arguments.command == "baseline":
        BASELINE.write_text(json.dumps(ratios(runs[0]), indent=1, sort_keys=True) + "\n")
    elif arguments.command == "page":
        PAGE.write_text(page(*runs))
        plot(runs[0], PAGE.with_suffix(".png"))
    else:
        lines = check(runs[0], json.loads(BASELINE.read_text()), arguments.part)
        print("\n".join(lines) if lines else "no ratio fell below its baseline")
        return 1 if lines else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
