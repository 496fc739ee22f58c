"""Optional dependencies: imported where they are needed, and asked for by the name of their extra."""

import importlib
import importlib.metadata
import re
from collections.abc import Iterable
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
            f"{package} is needed here and is not installed: {_remedy(package, extra)}"
        ) from error


def require_all(needed: Iterable[tuple[str, str]]) -> None:
    """Refuses to begin where any of several is not installed.

    Args:
        needed: modules, each with the extra that installs it.

    Raises:
        MissingDependencyError: names all that are not installed, and the extras that bring them.
    """
    missing: dict[str, str] = {}
    for module, extra in needed:
        try:
            require(module, extra)
        except MissingDependencyError:
            missing[module.partition(".")[0]] = extra
    if missing:
        names, extras = ", ".join(missing), ",".join(dict.fromkeys(missing.values()))
        verb = "is" if len(missing) == 1 else "are"
        raise MissingDependencyError(f"{names} {verb} needed here and {verb} not installed: {_remedy('', extras)}")


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
            f"{package} {installed} is installed, but {expected} is needed here: {_remedy(expected, extra)}"
        )


def _remedy(package: str, extra: str | None) -> str:
    # No index has po-kernels yet.
    return f"pip install '{package}'" if extra is None else f"pip install '.[{extra}]' in a clone of po-kernels"
