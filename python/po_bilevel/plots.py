"""Figures of a run, as PNG."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import atomic
from .optional import require

if TYPE_CHECKING:
    from .experiments.classification import Outcome


def figure_of_classification(outcome: "Outcome", path: Path) -> None:
    """Learning curves on the test rows, and the reward's path: one row of panels a data set.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OSError: the folder cannot be written to.
    """
    figures = require("matplotlib.figure", "plots")
    backend = require("matplotlib.backends.backend_agg", "plots")
    names = list(outcome.curves)
    # A figure of its own and the Agg canvas: no global state, no display.
    figure = figures.Figure(figsize=(13, 3.6 * len(names)), layout="constrained")
    backend.FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 3, squeeze=False)
    for (left, middle, right), name in zip(panels, names, strict=True):
        for method, seeds in outcome.curves[name].items():
            _band(left, [seed["nll"] for seed in seeds], method)
            _band(middle, [seed["accuracy"] for seed in seeds], method)
        left.set(title=f"{name}: test NLL", xlabel="optimiser step", ylabel="nats a row", yscale="log")
        middle.set(title=f"{name}: test accuracy", xlabel="optimiser step", ylabel="fraction")
        left.legend(fontsize="small")
        _reward(right, outcome, name)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _band(panel: Any, seeds: list[list[float]], label: str) -> None:
    """Mean over seeds with a band of ± one standard deviation; a run that ended early keeps its last value."""
    length = max(map(len, seeds))
    values = np.array([seed + [seed[-1]] * (length - len(seed)) for seed in seeds])
    mean, spread = values.mean(axis=0), values.std(axis=0)
    steps = np.arange(1, length + 1)
    (line,) = panel.plot(steps, mean, label=label)
    # On the logarithmic axis of the NLL a band must stay above zero.
    panel.fill_between(steps, np.maximum(mean - spread, 0.5 * mean), mean + spread, color=line.get_color(), alpha=0.15)


def _reward(panel: Any, outcome: "Outcome", name: str) -> None:
    """The learned diagonal of U over outer steps, mean over seeds, and the outer loss on a second axis."""
    panel.set(title=f"{name}: learned reward", xlabel="outer step", ylabel="U_jj, mean over seeds")
    paths = outcome.paths.get(name)
    if not paths:
        panel.text(0.5, 0.5, "no reward was learned", ha="center", va="center", transform=panel.transAxes)
        return
    precision = np.array([path["precision"] for path in paths]).mean(axis=0)
    for dimension in range(precision.shape[1]):
        label = "isotropic" if precision.shape[1] == 1 else f"U, class {dimension}"
        panel.plot(precision[:, dimension], label=label)
    heuristic = [row["u"] for row in outcome.rows if row["dataset"] == name and row["method"] == "pg_heuristic"]
    if heuristic:
        panel.axhline(float(np.mean(heuristic)), color="grey", linestyle="--", label="pg_heuristic")
    panel.legend(fontsize="small", ncols=2 if precision.shape[1] > 4 else 1, loc="lower right", framealpha=0.6)
    loss = panel.twinx()
    loss.plot(np.array([path["outer_loss"] for path in paths]).mean(axis=0), color="black", linestyle=":")
    loss.set_ylabel("outer loss (dotted), nats a row")
