"""The runs behind docs/experiments.md."""

import dataclasses
from pathlib import Path
from typing import Any

from .classification import ClassifyConfig, Method
from .dynamics import DynamicsConfig
from .forgetting import ForgettingConfig
from .gaussian import GaussianConfig
from .generalisation import GeneraliseConfig

# All methods of the table of classification.
CLASSIFY: tuple[Method, ...] = (
    "nll", "pg_identity", "pg_heuristic", "pg_heuristic_residual", "pg_learned_isotropic", "pg_learned_diagonal",
    "pg_learned_full", "pg_learned_table", "pg_learned_cv",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """Make every table and figure of docs/experiments.md."""

    out: Path = Path("reproduction")
    """Folder, with one below it for each experiment, and report.md."""
    quick: bool = False
    """Small versions of all, to see that they run; their numbers mean nothing."""
    plot: bool = True
    """Draw the figures."""
    progress: bool = True
    """Show progress bars on a terminal."""


def plan(config: ReproduceConfig) -> list[Any]:
    """The configurations, in the order in which they are run."""
    full: dict[str, Any] = {
        "gaussian1": GaussianConfig(figure=1),
        "gaussian2": GaussianConfig(figure=2),
        "gaussian3": GaussianConfig(figure=3),
        "classification": ClassifyConfig(dataset=("wine", "iris", "breast_cancer", "digits"), methods=CLASSIFY),
        "estimators": ClassifyConfig(
            dataset=("wine", "iris", "breast_cancer", "digits"), outer_steps=30,
            methods=("nll", "logistic_regression", "pg_learned_cv"),
        ),
        "dynamics": DynamicsConfig(),
        "planning": DynamicsConfig(
            env="Pendulum-v1", transitions=2000, steps=2000, seeds=3, plan_episodes=2,
            methods=("mse", "nll", "pg_diagonal_residual", "pg_learned_diagonal"),
        ),
        "generalisation": GeneraliseConfig(),
        "forgetting": ForgettingConfig(),
    }  # fmt: skip
    quick: dict[str, dict[str, Any]] = {
        "gaussian1": {"targets": 5},
        "gaussian2": {},
        "gaussian3": {"seeds": 1, "outer_steps": 3, "inner_steps": 10},
        "classification": {"dataset": ("iris",), "seeds": 2, "outer_steps": 2, "steps": 20, "inner_steps": 10},
        "estimators": {"dataset": ("iris",), "seeds": 2, "outer_steps": 2, "steps": 20, "inner_steps": 10},
        "dynamics": {"seeds": 1, "transitions": 600, "horizon": 60, "steps": 50, "outer_steps": 2, "inner_steps": 5},
        "planning": {
            "seeds": 1, "transitions": 600, "steps": 50, "outer_steps": 2, "plan_episodes": 1, "plan_steps": 3,
        },
        "generalisation": {
            "dataset": "iris", "seeds": 1, "outer_steps": 2, "noise": (0.2,), "fractions": (0.5,), "shifts": (1.0,),
        },
        "forgetting": {"seeds": 1, "steps": 20, "outer_steps": 2, "inner_steps": 5},
    }  # fmt: skip
    common = {"plot": config.plot, "progress": config.progress}
    return [
        dataclasses.replace(step, out=config.out / name, **common, **(quick[name] if config.quick else {}))
        for name, step in full.items()
    ]
