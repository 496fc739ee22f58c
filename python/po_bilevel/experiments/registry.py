"""The experiments by the name of their command: one that is entered here is a command, in sweeps and in `reproduce`."""

import importlib
from collections import UserDict
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from .runs import Experiment


class Experiments(UserDict[str, Any]):
    """Each by its name: an `Experiment`, or the module whose EXPERIMENT it is, imported when it is asked for."""

    def __getitem__(self, name: str) -> "Experiment":
        found = self.data[name]
        if isinstance(found, str):
            found = importlib.import_module(f"{__package__}.{found}").EXPERIMENT
        return cast("Experiment", found)


EXPERIMENTS = Experiments(
    classify="classification", gaussian="gaussian", dynamics="dynamics", generalise="generalisation",
    forgetting="forgetting", text="text",
)  # fmt: skip
