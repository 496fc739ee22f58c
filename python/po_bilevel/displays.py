"""Pictures of what was learned, as scikit-learn has them: `RewardDisplay`, `HypergradientDisplay`.

They need matplotlib (extra `[plots]`) once they are drawn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .optional import require
from .rewards import diagonal
from .steps import OuterStep


class RewardDisplay:
    """A learned reward as a heat map, and how it came about over outer steps.

    Args:
        reward: (C, C) rewards of answers by labels, or U as (D, D); None for none to draw.
        labels: of its rows and columns.
        path: (steps, K), what is drawn over outer steps; None for none.
        path_label: of its axis.

    Attributes:
        ax_, path_ax_: matplotlib's axes of the two, None of what is not drawn.
        figure_: their figure.
        im_, lines_: what was drawn on them.
    """

    ax_: Any
    path_ax_: Any

    def __init__(
        self, reward: np.ndarray | None = None, labels: Sequence[Any] | None = None, path: np.ndarray | None = None,
        path_label: str = "reward",
    ) -> None:  # fmt: skip
        self.reward: np.ndarray | None = reward
        self.labels: Sequence[Any] | None = labels
        self.path: np.ndarray | None = path
        self.path_label: str = path_label

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, **options: Any) -> "RewardDisplay":
        """Draws what a fitted `BilevelClassifier` or `BilevelRegressor` learned.

        Args:
            estimator: a fitted one: its `reward_` or the matrix of its `precision_`, and its `outer_losses_`.
            ax: as in `plot`.
            options: of the heat map, as in `plot`.

        Raises:
            NotFittedError: it is not fitted.
            MissingDependencyError: matplotlib is not installed.

        Example:
            >>> from po_bilevel import BilevelClassifier, RewardDisplay
            >>> from sklearn.datasets import load_iris
            >>> model = BilevelClassifier(random_state=0).fit(*load_iris(return_X_y=True))
            >>> RewardDisplay.from_estimator(model).reward.shape
            (3, 3)
        """
        require("sklearn.utils.validation", "sklearn").check_is_fitted(estimator)
        losses = getattr(estimator, "outer_losses_", None)
        path = None if losses is None else np.asarray(losses)[:, None]
        if hasattr(estimator, "reward_"):
            reward, labels = estimator.reward_, list(estimator.classes_)
        else:
            u = np.asarray(estimator.precision_)
            reward = u if u.ndim == 2 else np.diag(u)
            labels = list(range(len(reward)))
        return cls(reward, labels, path, "held-out NLL, nats a row").plot(ax=ax, **options)

    @classmethod
    def from_history(cls, history: Sequence[OuterStep], *, ax: Any = None) -> "RewardDisplay":
        """Draws the path of a trainer's reward: the diagonals of U or of the table, or ‖φ‖ of others.

        Args:
            history: of `BilevelTrainer.fit`.
            ax: as in `plot`.
        """
        shown = [None if step.reward is None else diagonal(step.reward).reshape(-1).tolist() for step in history]
        path = [[step.reward_norm] if each is None else each for step, each in zip(history, shown, strict=True)]
        return cls(None, None, np.asarray(path), "‖φ‖" if None in shown else "reward").plot(ax=ax)

    def plot(self, ax: Any = None, **options: Any) -> "RewardDisplay":
        """Draws.

        Args:
            ax: matplotlib's axes, one for the heat map or the path, whichever there is, or both; None for a new figure.
            options: keyword arguments of `Axes.imshow`.
        """
        wanted = [each is not None for each in (self.reward, self.path)]
        axes = _axes(ax, sum(wanted))
        places = iter(axes)
        self.ax_, self.path_ax_ = (next(places, None) if each else None for each in wanted)
        self.figure_: Any = axes[0].figure
        if self.ax_ is not None and self.reward is not None:
            self.im_: Any = self.ax_.imshow(self.reward, **options)
            self.figure_.colorbar(self.im_, ax=self.ax_)
            ticks = range(len(self.reward))
            named = [str(each) for each in (ticks if self.labels is None else self.labels)]
            self.ax_.set(xticks=ticks, yticks=ticks, xticklabels=named, yticklabels=named, title="learned reward")
        if self.path_ax_ is not None:
            self.lines_: Any = self.path_ax_.plot(self.path)
            self.path_ax_.set(xlabel="outer step", ylabel=self.path_label)
        return self


class HypergradientDisplay:
    """How well hypergradients were solved for: the relative residual of each outer step, and the least curvature met.

    Args:
        residual: (steps,), nan where there is none.
        curvature: (steps,), likewise; below zero θ is not at a minimum.

    Attributes:
        ax_: matplotlib's axes, of the residual and of the curvature.
        figure_: their figure.

    Example:
        >>> from po_bilevel import HypergradientDisplay
        >>> HypergradientDisplay([1e-7, 1e-6], [0.1, -0.1]).plot().ax_[1].get_ylabel()
        'least curvature'
    """

    def __init__(self, residual: Sequence[float] | np.ndarray, curvature: Sequence[float] | np.ndarray) -> None:
        self.residual: np.ndarray = np.asarray(residual)
        self.curvature: np.ndarray = np.asarray(curvature)

    @classmethod
    def from_history(cls, history: Sequence[OuterStep], *, ax: Any = None) -> "HypergradientDisplay":
        """Draws those of a trainer's outer steps.

        Args:
            history: of `BilevelTrainer.fit`.
            ax: as in `plot`.
        """
        told = [(step.residual_norm, step.min_curvature) for step in history]
        residual, curvature = np.array([[np.nan if x is None else x for x in each] for each in told]).reshape(-1, 2).T
        return cls(residual, curvature).plot(ax=ax)

    def plot(self, ax: Any = None) -> "HypergradientDisplay":
        """Draws.

        Args:
            ax: two of matplotlib's axes; None for a new figure.
        """
        self.ax_: list[Any] = _axes(ax, 2)
        self.figure_: Any = self.ax_[0].figure
        self.ax_[0].plot(self.residual, ".-")
        self.ax_[0].set(xlabel="outer step", ylabel="relative residual", yscale="log")
        self.ax_[1].plot(self.curvature, ".-")
        self.ax_[1].axhline(0.0, color="grey", linewidth=0.8)
        self.ax_[1].set(xlabel="outer step", ylabel="least curvature")
        return self


def _axes(given: Any, count: int) -> list[Any]:
    pyplot = require("matplotlib.pyplot", "plots")
    if given is None:
        return list(pyplot.subplots(1, count, figsize=(4.5 * count, 4.0), layout="constrained", squeeze=False)[1][0])
    return list(np.atleast_1d(np.asarray(given, dtype=object)))
