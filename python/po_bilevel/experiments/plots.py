"""Figures of a run. Those who make one need matplotlib: a MissingDependencyError says so."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import atomic
from ..optional import require

if TYPE_CHECKING:
    from .runs import Outcome


# Rows of panels in a figure: more take minutes to draw, and no one looks at them.
MOST_PANELS = 60


def figure_of_classification(outcome: "Outcome") -> Any:
    """Learning curves on the test rows, and the reward's path: one row of panels a data set."""
    names = list(outcome.curves["curves"])
    figure = _figure(13, 3.6 * len(names))
    panels = figure.subplots(len(names), 3, squeeze=False)
    for (left, middle, right), name in zip(panels, names, strict=True):
        for method, seeds in outcome.curves["curves"][name].items():
            _band(left, seeds, "nll", method)
            _band(middle, seeds, "accuracy", method)
        left.set(title=f"{name}: test NLL", xlabel="optimiser step", ylabel="nats a row", yscale="log")
        middle.set(title=f"{name}: test accuracy", xlabel="optimiser step", ylabel="fraction")
        left.legend(fontsize="x-small", framealpha=0.6)
        _reward(right, outcome, name)
    return figure


def figure_of_gaussian(outcome: "Outcome", number: int) -> Any:
    """Figure 1, 2 or 3 of the Gaussian experiments."""
    return {1: _moments, 2: _densities, 3: _learned_path}[number](outcome)


def figure_of_summary(summary: list[dict[str, Any]]) -> Any:
    """Means with their 95% intervals: one row of panels a data set, one panel a metric, one mark a method."""
    names = list(dict.fromkeys(entry["dataset"] for entry in summary))
    known = ("dataset", "method", "seeds", "seconds", "u")
    metrics = list(dict.fromkeys(key for entry in summary for key in entry if key not in known))
    methods = list(dict.fromkeys(entry["method"] for entry in summary))
    figure = _figure(2.0 + 2.2 * len(metrics), len(names) * (0.8 + 0.25 * len(methods)))
    panels = figure.subplots(len(names), len(metrics), squeeze=False, sharey=True)
    places = {method: len(methods) - index for index, method in enumerate(methods)}
    for line, name in zip(panels, names, strict=True):
        for panel, metric in zip(line, metrics, strict=True):
            there = [entry for entry in summary if entry["dataset"] == name and metric in entry]
            panel.errorbar(
                [entry[metric]["mean"] for entry in there], [places[entry["method"]] for entry in there],
                xerr=[entry[metric]["half_width"] or 0.0 for entry in there], fmt="o", markersize=4, capsize=3,
            )  # fmt: skip
            panel.set_yticks(list(places.values()), list(places), fontsize="small")
            panel.set_title(metric, fontsize="small")
            panel.grid(axis="x", alpha=0.3)
        line[0].set_ylabel(name, fontsize="small")
    return figure


def _moments(outcome: "Outcome") -> Any:
    """Boxes over targets of the errors of the moments and of the likelihood."""
    figure = _figure(12, 3.8)
    methods = list(dict.fromkeys(row["method"] for row in outcome.rows))
    titles = {
        "mean_error": "error of the mean",
        "covariance_error": "error of the covariance",
        "nll": "NLL under the target, nats",
    }
    for panel, (metric, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        values = [[row[metric] for row in outcome.rows if row["method"] == method] for method in methods]
        panel.boxplot(values, showfliers=False)
        panel.set_xticks(range(1, len(methods) + 1), methods, rotation=20)
        panel.set(title=title, yscale="log" if metric != "nll" else "linear")
    return figure


def _densities(outcome: "Outcome") -> Any:
    """Samples of the target, and the ellipses of one and two standard deviations that each method learned."""
    densities = dict(outcome.curves["densities"])
    target = densities.pop("target")
    samples = np.array(outcome.curves["samples"])
    figure = _figure(3.4 * len(densities), 3.6)
    angles = np.linspace(0.0, 2.0 * np.pi, 200)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    panels = figure.subplots(1, len(densities), sharex=True, sharey=True)
    for panel, (method, density) in zip(panels, densities.items(), strict=True):
        panel.scatter(*samples.T, s=4, color="grey", alpha=0.5)
        for each, color, label in ((target, "black", "target"), (density, "tab:red", "learned")):
            factor = np.linalg.cholesky(np.array(each["covariance"]))
            for radius in (1.0, 2.0):
                ellipse = np.array(each["mean"])[:, None] + radius * factor @ circle
                panel.plot(*ellipse, color=color, linewidth=1.2, label=label if radius == 1.0 else None)
        panel.set(title=method, aspect="equal")
    panels[0].legend(fontsize="small")
    return figure


def _learned_path(outcome: "Outcome") -> Any:
    """u over outer steps for each seed, their mean, and the optimum; beside it the outer loss."""
    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    paths = np.array([path["u"] for path in outcome.curves["paths"]]).mean(axis=2)
    losses = np.array([path["outer_loss"] for path in outcome.curves["paths"]])
    left.plot(paths.T, color="tab:blue", alpha=0.25)
    left.plot(paths.mean(axis=0), color="tab:blue", label="u, mean over seeds")
    optimum = np.array(outcome.curves["optimum"])
    mean = np.diag(optimum).mean() if optimum.ndim == 2 else optimum.mean()
    left.axhline(mean, color="grey", linestyle="--", label="u*")
    left.set(title="learned reward", xlabel="outer step", ylabel="u")
    left.legend()
    right.plot(losses.T, color="black", alpha=0.25)
    right.plot(losses.mean(axis=0), color="black")
    right.set(title="outer loss", xlabel="outer step", ylabel="nats a row", yscale="log")
    return figure


def figure_of_text(outcome: "Outcome") -> Any:
    """The outer loss and U over outer steps, means over seeds, and the metrics of each method."""
    steps: dict[str, list[dict[str, Any]]] = {}
    for each in outcome.curves["steps"]:
        steps.setdefault(each["method"], []).append(each)
    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    for method, seeds in steps.items():
        # With moments the outer loss is of each step's own prompts, and no curve.
        if all("outer_loss" in seed for seed in seeds) and method != "pg_learned_moments":
            left.plot(np.array([seed["outer_loss"] for seed in seeds]).mean(axis=0), label=method)
        shortest = min(len(seed["u"]) for seed in seeds)
        if method.startswith("pg_learned") and shortest:
            line = right.plot(
                np.array([np.array(seed["u"])[:shortest] for seed in seeds]).mean(axis=(0, 2)), label=method
            )
            for seed in seeds:
                if "true" in seed:
                    right.axhline(np.mean(seed["true"]), color=line[0].get_color(), linestyle=":", alpha=0.5)
    left.set(title="outer loss", xlabel="outer step", ylabel="nats an answer")
    right.set(title="learned reward", xlabel="outer step", ylabel="U_jj, mean over dimensions and seeds")
    for panel in (left, right):
        if panel.lines:
            panel.legend(fontsize="x-small", framealpha=0.6)
    return figure


def _figure(width: float, height: float) -> Any:
    """A figure of its own and the Agg canvas: no global state, no display."""
    figure = require("matplotlib.figure", "plots").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", "plots").FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, all of it or nothing.

    Raises:
        OSError: the folder cannot be written to.
    """
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _band(panel: Any, seeds: list[dict[str, list[float]]], metric: str, label: str) -> None:
    """Mean over seeds with a band of ± one standard deviation; a run that ended early keeps its last value.

    Of an estimator there is the one point at its last step.
    """
    length = max(len(seed["step"]) for seed in seeds)
    values, steps = (
        np.array([seed[key] + seed[key][-1:] * (length - len(seed[key])) for seed in seeds]) for key in (metric, "step")
    )
    mean, spread = values.mean(axis=0), values.std(axis=0)
    steps = steps.max(axis=0)
    (line,) = panel.plot(steps, mean, "o" if length == 1 else "-", label=label)
    # On the logarithmic axis of the NLL a band must stay above zero.
    panel.fill_between(steps, np.maximum(mean - spread, 0.5 * mean), mean + spread, color=line.get_color(), alpha=0.15)


def _reward(panel: Any, outcome: "Outcome", name: str) -> None:
    """The learned diagonal of U over outer steps, mean over seeds, and the outer loss on a second axis.

    Where several forms of a reward were learned, the mean of each form's diagonal.
    """
    panel.set(title=f"{name}: learned reward", xlabel="outer step", ylabel="U_jj, mean over seeds")
    paths = outcome.curves["reward_paths"]
    forms = {key.removeprefix(f"{name}, "): paths[key] for key in paths if key.startswith(f"{name}, ")}
    if name in paths:
        precision = np.array([path["precision"] for path in paths[name]]).mean(axis=0)
        for dimension in range(precision.shape[1]):
            label = "isotropic" if precision.shape[1] == 1 else f"U, class {dimension}"
            panel.plot(precision[:, dimension], label=label)
        forms["pg_learned"] = paths[name]
    else:
        for method, seeds in forms.items():
            panel.plot(np.array([path["precision"] for path in seeds]).mean(axis=(0, 2)), label=method)
    if not forms:
        panel.text(0.5, 0.5, "no path of a reward", ha="center", va="center", transform=panel.transAxes)
        return
    heuristic = [row["u"] for row in outcome.rows if row["dataset"] == name and row["method"] == "pg_heuristic"]
    if heuristic:
        panel.axhline(float(np.mean(heuristic)), color="grey", linestyle="--", label="pg_heuristic")
    panel.legend(fontsize="small", ncols=2 if len(panel.lines) > 5 else 1, framealpha=0.6)
    loss = panel.twinx()
    for seeds in forms.values():
        loss.plot(np.array([path["outer_loss"] for path in seeds]).mean(axis=0), color="black", linestyle=":")
    loss.set_ylabel("outer loss (dotted), nats a row")
