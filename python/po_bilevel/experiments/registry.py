"""The experiments by the name of their command."""

from collections.abc import Callable
from typing import Any, NamedTuple

from . import classification, dynamics, forgetting, gaussian, generalisation


class Experiment(NamedTuple):
    """What a command and a sweep need of an experiment.

    Attributes:
        config: its dataclass of options, each with a default.
        check: refuses options that no run can have.
        run: what it found, with `rows` and `warnings`.
    """

    config: type[Any]
    check: Callable[[Any], None]
    run: Callable[[Any], Any]


EXPERIMENTS = {
    "classify": Experiment(classification.ClassifyConfig, classification.check, classification.run),
    "gaussian": Experiment(gaussian.GaussianConfig, gaussian.check, gaussian.run),
    "dynamics": Experiment(dynamics.DynamicsConfig, dynamics.check, dynamics.run),
    "generalise": Experiment(generalisation.GeneraliseConfig, generalisation.check, generalisation.run),
    "forgetting": Experiment(forgetting.ForgettingConfig, forgetting.check, forgetting.run),
}
