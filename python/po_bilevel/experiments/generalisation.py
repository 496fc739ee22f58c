"""Generalisation: the methods of tabular classification where the training data are noisy, few, or from elsewhere.

Noise: a fraction of the training labels is replaced by another class, drawn evenly. Fraction: so much of the training
rows, at least three of each class. Shift: the test inputs are moved by so many standard deviations, along a random
direction in the space of standardised inputs. Test labels are never touched; what a method holds out for its reward is
as noisy and as small a share as the rest of its training rows.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch

from ..errors import UsageError
from ..losses import Batch
from . import classification, data, runs
from .classification import ClassifyConfig, Method
from .runs import SKLEARN, Experiment, OptionsInParts, Outcome, each_run, threads

# The least rows of a class that a training fraction keeps, in the fitted and in the held-out part.
LEAST = {"fit": 2, "held_out": 1}


@dataclasses.dataclass(frozen=True)
class GeneraliseConfig(OptionsInParts):
    """Compare methods under label noise, with few training rows and on shifted test inputs."""

    dataset: str = "digits"
    """As of `classify`."""
    target: str | None = None
    """Column of the file that holds the classes."""
    encoding: data.Encoding = "none"
    """Of a file's columns of text: a column of zeros and ones for each text, or its place in alphabetical order."""
    max_rows: int | None = None
    """A stratified random choice of so many rows, where the data set has more."""
    noise: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    """Fractions of training labels that are wrong."""
    fractions: tuple[float, ...] = (0.01, 0.05, 0.2)
    """Fractions of the training rows; all of them are there under noise 0."""
    shifts: tuple[float, ...] = (1.0, 2.0, 4.0)
    """How far the test inputs are moved, in standard deviations."""
    methods: tuple[Method, ...] = (
        "nll", "nll_cv", "pg_identity", "pg_heuristic", "pg_heuristic_cv", "pg_heuristic_residual", "pg_learned",
    )  # fmt: skip
    """As of `classify`."""
    choose_by: Literal["nll", "accuracy"] = "nll"
    """As of `classify`, and so are the next six."""
    policy: Literal["linear", "mlp"] = "linear"
    """Multinomial logistic regression, or a tanh network."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the network's hidden layers."""
    optimizer: Literal["auto", "lbfgs", "adam"] = "auto"
    """The policy's."""
    learning_rate: float = 0.05
    """Of adam for the policy."""
    steps: int | None = None
    """The most optimiser steps of a training."""
    l2: float = 1.0
    """Penalty of the methods that do not choose theirs."""
    outer_steps: int = 20
    """Updates of the learned reward."""


class Setting(NamedTuple):
    """What is disturbed, and how much."""

    kind: Literal["noise", "fraction", "shift"]
    amount: float

    def __str__(self) -> str:
        """Such as "noise 0.1": two settings never have the same text."""
        short = f"{self.amount:g}"
        return f"{self.kind} {short if float(short) == self.amount else repr(self.amount)}"


def check(config: GeneraliseConfig) -> None:
    """See `Experiment`."""
    runs.check_options(config, zero=("noise", "fractions", "shifts", "l2", "first_seed"))
    for option in ("noise", "fractions"):
        if any(value > 1 or (value == 0 and option == "fractions") for value in getattr(config, option)):
            values = " ".join(map(str, getattr(config, option)))
            raise UsageError(f"--{option}: expected numbers from 0 to 1, got {values}")
    if not config.noise + config.fractions + config.shifts:
        raise UsageError("--noise: expected at least one of --noise, --fractions and --shifts, got none")


def run(config: GeneraliseConfig) -> Outcome:
    """Runs every method in every setting, on every seed.

    Returns:
        rows of data set "NAME, noise 0.1" and so on, with the metrics of `classify`.
    """
    check(config)
    table = data.subset(data.load(config.dataset, config.target, config.encoding), config.max_rows)
    shared = (
        "choose_by", "policy", "hidden", "optimizer", "learning_rate", "steps", "l2", "outer_steps"
    )  # fmt: skip
    base = ClassifyConfig(progress=False, **{name: getattr(config, name) for name in shared})
    found = classification.new_outcome()
    with threads(config.threads):
        for seed, setting, method in each_run(config, settings(config), config.methods):
            splits = disturbed(classification.splits_of(base, table, seed), setting, len(table.classes), seed)
            name = f"{table.name}, {setting}"
            classification.run_method(base, name, len(table.classes), splits, seed, method, found)
    return Outcome(found.rows, {}, found.warnings)


def settings(config: GeneraliseConfig) -> list[Setting]:
    """All that are asked for."""
    return [
        *(Setting("noise", amount) for amount in config.noise),
        *(Setting("fraction", amount) for amount in config.fractions),
        *(Setting("shift", amount) for amount in config.shifts),
    ]


def disturbed(splits: data.Splits, setting: Setting, num_classes: int, seed: int) -> data.Splits:
    """The splits with the disturbance of a setting, standardised by what is left of the training rows.

    Args:
        splits: as of `data.split`.
        setting: of the disturbance.
        num_classes: C.
        seed: of the disturbance.
    """
    kind, size = setting
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
    train = fit.joined(held_out)
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


# The runs of docs/experiments.md, and their quick versions.
_NOISE = {"choose_by": "accuracy", "fractions": (), "shifts": ()}
_LINEAR = {"noise": (0.1, 0.2, 0.3, 0.4), "methods": ("nll", "nll_cv", "pg_heuristic_cv")}
_NETWORK = {
    "max_rows": 500, "policy": "mlp", "optimizer": "adam", "learning_rate": 5e-3, "steps": 300, "l2": 0.01,
    "noise": (0.2, 0.4), "seeds": 5,
    "methods": ("nll", "nll_early", "pg_identity", "pg_identity_early", "pg_heuristic", "pg_heuristic_early"),
}  # fmt: skip
_QUICK = {"dataset": "iris", "seeds": 1, "outer_steps": 2, "steps": 20, "noise": (0.2,)}

EXPERIMENT = Experiment(
    "generalise", GeneraliseConfig, check, run, "generalisation", needs=lambda config: SKLEARN,
    reproduced={
        "generalisation": ({}, _QUICK | {"fractions": (0.5,), "shifts": (1.0,)}),
        "generalisation_linear": (_NOISE | _LINEAR, _QUICK),
        "generalisation_network": (_NOISE | _NETWORK, _QUICK | {"hidden": (5,), "max_rows": None}),
    },
)  # fmt: skip
