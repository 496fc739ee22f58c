"""The runs behind docs/experiments.md: those that the experiments of the registry ask for."""

import dataclasses
from pathlib import Path

from .registry import EXPERIMENTS
from .runs import Experiment, Options


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """Make every table and figure of docs/experiments.md."""

    out: Path = Path("reproduction")
    """Folder, with one below it for each run, and report.md."""
    quick: bool = False
    """Small versions of all, to see that they run; their numbers mean nothing."""
    plot: bool = True
    """Draw the figures."""
    progress: bool = True
    """Show progress bars on a terminal."""
    quiet: bool = False
    """Print warnings and errors only."""
    overwrite: bool = False
    """Replace what other runs have left in these folders."""


def plan(config: ReproduceConfig) -> list[tuple[Experiment, Options]]:
    """The experiments and their options, in the order in which they are run."""
    common = {"plot": config.plot, "progress": config.progress, "overwrite": config.overwrite}
    return [
        (each, each.config(out=config.out / folder, **(common | full | (quick if config.quick else {}))))
        for each in EXPERIMENTS.values()
        for folder, (full, quick) in each.reproduced.items()
    ]
