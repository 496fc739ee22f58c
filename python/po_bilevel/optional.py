"""Optional dependencies: imported where they are needed, and asked for by the name of their extra."""

import importlib
from typing import Any

from .errors import MissingDependencyError


def require(module: str, extra: str) -> Any:
    """The module of that name.

    Args:
        module: what to import, such as "sklearn.datasets".
        extra: the extra of the distribution that installs it.

    Raises:
        MissingDependencyError: the package that holds it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingDependencyError(
            f"{package} is needed here and is not installed: pip install 'po-kernels[{extra}]'"
        ) from error
