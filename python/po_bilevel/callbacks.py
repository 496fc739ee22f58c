"""Callbacks of `BilevelTrainer.fit` that write each outer step to an experiment tracker."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .optional import require
from .rewards import diagonal

if TYPE_CHECKING:
    from .steps import OuterStep


def scalars(step: "OuterStep") -> dict[str, float]:
    """The numbers of an outer step by name; a reward's tensor, or its diagonal, as reward/0, reward/1, ..."""
    named: dict[str, float | None] = {
        "inner_loss": step.inner_loss,
        "outer_loss": step.outer_loss,
        "inner_steps": float(step.inner_steps),
        "gradient_norm": step.gradient_norm,
        "residual_norm": step.residual_norm,
        "num_products": float(step.num_products),
        "converged": None if step.converged is None else float(step.converged),
        "negative_curvature": float(step.negative_curvature),
        "inner_gradient_norm": step.inner_gradient_norm,
        "stationarity": step.stationarity,
    }
    found = {name: value for name, value in named.items() if value is not None}
    if step.reward is not None:
        found |= {f"reward/{index}": value for index, value in enumerate(diagonal(step.reward).tolist())}
    return found


class TensorBoard:
    """Writes every outer step to an event file.

    Args:
        folder: of the event file.

    Raises:
        MissingDependencyError: tensorboard is not installed.
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
    """

    def __init__(self, **options: Any) -> None:
        self._run: Any = require("wandb", "tracking").init(**options)

    def __call__(self, step: "OuterStep") -> None:
        self._run.log(scalars(step), step=step.step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
