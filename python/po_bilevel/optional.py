"""Optional dependencies: imported where they are needed, and asked for by the name of their extra."""

import importlib
import importlib.metadata
import re
from typing import Any

from .errors import MissingDependencyError


def require(module: str, extra: str | None) -> Any:
    """The module of that name.

    Args:
        module: what to import, such as "sklearn.datasets".
        extra: the extra of the distribution that installs it; None if there is none.

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
            f"{package} is needed here and is not installed: pip install {_requirement(package, extra)}"
        ) from error


def require_version(package: str, extra: str | None, least: tuple[int, int], below: tuple[int, int]) -> None:
    """Refuses a package whose version is not one that this code was written for.

    Args:
        package: name of the distribution, which is that of its module.
        extra: the extra of the distribution that installs it; None if there is none.
        least, below: the first version (major, minor) that fits, and the first one after it that does not.

    Raises:
        MissingDependencyError: it is not installed, or in another version; the installed one and the expected ones are
            named.
    """
    require(package, extra)
    installed = importlib.metadata.version(package)
    if not least <= tuple(int(x) for x in re.findall(r"\d+", installed)[:2]) < below:
        expected = f"{package}>={'.'.join(map(str, least))},<{'.'.join(map(str, below))}"
        raise MissingDependencyError(
            f"{package} {installed} is installed, but {expected} is needed here: pip install "
            f"{_requirement(expected, extra)}"
        )


def _requirement(package: str, extra: str | None) -> str:
    return f"'{package}'" if extra is None else f"'po-kernels[{extra}]'"
