"""Callbacks of `BilevelTrainer.fit` that write each outer step to an experiment tracker."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .optional import require
from .rewards import diagonal

if TYPE_CHECKING:
    from .steps import OuterStep


# What is no number of a curve.
UNTOLD = ("step", "native", "reward_norm")


def scalars(step: "OuterStep") -> dict[str, float]:
    """The numbers of an outer step by name; a reward's tensor, or its diagonal, as reward/0, reward/1, ..."""
    values = {field.name: getattr(step, field.name) for field in dataclasses.fields(step) if field.name not in UNTOLD}
    # Those of language models are nan or None where there is nothing to tell.
    found = {name: float(x) for name, x in values.items() if isinstance(x, (int, float)) and math.isfinite(x)}
    if step.reward is not None:
        found |= {f"reward/{index}": value for index, value in enumerate(diagonal(step.reward).tolist())}
    return found


class TensorBoard:
    """Writes every outer step to an event file.

    Args:
        folder: of the event file.

    Raises:
        MissingDependencyError: tensorboard is not installed.

    Example:
        >>> def fit(trainer, folder):
        ...     writer = TensorBoard(folder)
        ...     history = trainer.fit(100, callback=writer)
        ...     writer.close()
        ...     return history
    """

    def __init__(self, folder: Path) -> None:
        require("tensorboard", "tracking")
        self._writer: Any = require("torch.utils.tensorboard", "tracking").SummaryWriter(str(folder))

    def __call__(self, step: "OuterStep") -> None:
        for name, value in scalars(step).items():
            self._writer.add_scalar(name, value, step.step)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """Logs every outer step to a run of Weights & Biases.

    Args:
        options: keyword arguments of `wandb.init`: project, name, config, ...

    Raises:
        MissingDependencyError: wandb is not installed.

    Example:
        >>> def fit(trainer):
        ...     run = WeightsAndBiases(project="rewards", mode="offline")
        ...     history = trainer.fit(100, callback=run)
        ...     run.close()
        ...     return history
    """

    def __init__(self, **options: Any) -> None:
        self._run: Any = require("wandb", "tracking").init(**options)

    def __call__(self, step: "OuterStep") -> None:
        self._run.log(scalars(step), step=step.step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
