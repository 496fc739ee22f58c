"""Generalisation: the methods of tabular classification where the training data are noisy, few, or from elsewhere.

Noise: a fraction of the training labels is replaced by another class, drawn evenly. Fraction: so much of the training
rows, at least three of each class. Shift: the test inputs are moved by so many standard deviations, along a random
direction in the space of standardised inputs. Test labels are never touched; what a method holds out for its reward is
as noisy and as small a share as the rest of its training rows.
"""

import dataclasses
from pathlib import Path

import torch

from ..errors import UsageError
from ..losses import Batch
from . import classification, data
from .classification import ClassifyConfig, Method
from .runs import Outcome, check_counts, check_reals, each_run, first_step_of_torch, threads

# The least rows of a class that a training fraction keeps, in the fitted and in the held-out part.
LEAST = {"fit": 2, "held_out": 1}


@dataclasses.dataclass(frozen=True)
class GeneraliseConfig:
    """Compare methods under label noise, with few training rows and on shifted test inputs."""

    dataset: str = "digits"
    """As of `classify`."""
    target: str | None = None
    """Column of the file that holds the classes."""
    max_rows: int | None = None
    """A stratified random choice of so many rows, where the data set has more."""
    noise: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    """Fractions of training labels that are wrong."""
    fractions: tuple[float, ...] = (0.01, 0.05, 0.2)
    """Fractions of the training rows; all of them are there under noise 0."""
    shifts: tuple[float, ...] = (1.0, 2.0, 4.0)
    """How far the test inputs are moved, in standard deviations."""
    seeds: int = 10
    """How many random splits and initial weights, numbered from --first-seed."""
    first_seed: int = 0
    """The number of the first, where they are run in parts."""
    out: Path = Path("results")
    """Folder for results.json, curves.json and generalisation.png; made if it is not there."""
    methods: tuple[Method, ...] = ("nll", "pg_identity", "pg_heuristic", "pg_heuristic_residual", "pg_learned")
    """As of `classify`."""
    outer_steps: int = 20
    """Updates of the learned reward."""
    threads: int = 1
    """Threads of torch."""
    plot: bool = True
    """Draw generalisation.png."""
    progress: bool = True
    """Show progress bars on a terminal."""


def check(config: GeneraliseConfig) -> None:
    """Refuses options that no run can have.

    Raises:
        UsageError: naming the option, what was expected and what came.
    """
    if not config.methods or len(set(config.methods)) < len(config.methods):
        raise UsageError(f"--methods: expected at least one and each once, got {' '.join(config.methods) or 'none'}")
    check_counts(config, "seeds", "max_rows", "outer_steps", "threads")
    for option, values, most in (("noise", config.noise, 1.0), ("fractions", config.fractions, 1.0)):
        if not all(0 <= value <= most for value in values) or (option == "fractions" and 0 in values):
            raise UsageError(f"--{option}: expected numbers from 0 to 1, got {' '.join(map(str, values))}")
    for option in ("noise", "fractions", "shifts"):
        values = getattr(config, option)
        if len(set(values)) < len(values):
            raise UsageError(f"--{option}: expected each once, got {' '.join(map(str, values))}")
    check_reals(config, "first_seed", zero=True)
    if any(not 0 <= value < float("inf") for value in config.shifts):
        raise UsageError(f"--shifts: expected finite numbers of at least 0, got {' '.join(map(str, config.shifts))}")
    if not config.noise + config.fractions + config.shifts:
        raise UsageError("--noise: expected at least one of --noise, --fractions and --shifts, got none")


def run(config: GeneraliseConfig) -> Outcome:
    """Runs every method in every setting, on every seed.

    Returns:
        rows of data set "NAME, noise 0.1" and so on, with the metrics of `classify`.

    Raises:
        UsageError: an option or a data set that cannot be used.
        MissingDependencyError: scikit-learn or pandas is not installed.
        NonFiniteError: training diverged.
    """
    check(config)
    table = data.subset(data.load(config.dataset, config.target), config.max_rows)
    base = ClassifyConfig(outer_steps=config.outer_steps, progress=False)
    found = Outcome([], {"curves": {}, "reward_paths": {}}, [])
    with threads(config.threads):
        first_step_of_torch()
        for seed, setting in each_run(config, settings(config)):
            splits = data.split(
                table, test_fraction=base.test_fraction, held_out_fraction=base.held_out_fraction, seed=seed
            )
            splits = disturbed(splits, setting, len(table.classes), seed)
            for method in config.methods:
                classification.run_method(
                    base, f"{table.name}, {setting}", len(table.classes), splits, seed, method, found
                )
    return Outcome(found.rows, {}, found.warnings)


def settings(config: GeneraliseConfig) -> list[str]:
    """What is disturbed and how much, such as "noise 0.1"."""
    named = (("noise", config.noise), ("fraction", config.fractions), ("shift", config.shifts))
    return [f"{name} {value:g}" for name, values in named for value in values]


def disturbed(splits: data.Splits, setting: str, num_classes: int, seed: int) -> data.Splits:
    """The splits with the disturbance of a setting, standardised by what is left of the training rows.

    Args:
        splits: as of `data.split`.
        setting: one of `settings`.
        num_classes: C.
        seed: of the disturbance.
    """
    kind, amount = setting.split()
    size = float(amount)
    generator = torch.Generator().manual_seed(seed)
    fit, held_out, test = splits.fit, splits.held_out, splits.test
    if kind == "noise":
        fit, held_out = (_noisy(part, size, num_classes, generator) for part in (fit, held_out))
    elif kind == "fraction":
        fit = _part(fit, size, LEAST["fit"], generator)
        held_out = _part(held_out, size, LEAST["held_out"], generator)
    else:
        direction = torch.randn(test.inputs.shape[1], generator=generator, dtype=test.inputs.dtype)
        test = test._replace(inputs=test.inputs + size * direction / direction.norm())
    train = Batch(torch.cat([fit.inputs, held_out.inputs]), torch.cat([fit.target, held_out.target]))
    mean, std = train.inputs.mean(dim=0), train.inputs.std(dim=0, correction=0)
    std = torch.where(std > 1e-8, std, torch.ones_like(std))
    parts = (part._replace(inputs=(part.inputs - mean) / std) for part in (train, fit, held_out, test))
    return data.Splits(*parts)


def _noisy(rows: Batch, share: float, num_classes: int, generator: torch.Generator) -> Batch:
    count = len(rows.target)
    wrong = torch.rand(count, generator=generator) < share
    other = (rows.target + torch.randint(1, num_classes, (count,), generator=generator)) % num_classes
    return rows._replace(target=torch.where(wrong, other, rows.target))


def _part(rows: Batch, share: float, least: int, generator: torch.Generator) -> Batch:
    """That share of each class, at least so many rows of it or all there are."""
    kept = []
    for label in rows.target.unique():
        index = (rows.target == label).nonzero()[:, 0]
        chosen = torch.randperm(len(index), generator=generator)[: max(least, round(share * len(index)))]
        kept.append(index[chosen])
    return rows.rows(torch.cat(kept).sort().values)
