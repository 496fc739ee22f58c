"""What is installed, what each extra would add, and whether the device and the compiler serve."""

import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata

import torch

import po_kernels as pk

# The extras of pyproject.toml that bring others together.
BUNDLES = ("test", "all")
OWN = "po-kernels"


def examine() -> str:
    """The report, readable."""
    state = pk.status()
    lines = [
        f"po-kernels {pk.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "", "backends", *_table({name: reason or "serves" for name, reason in state["backends"].items()}),
        "", "devices", *_table({"cpu": f"serves, kernels of {state['simd'] or 'no extension'}", "cuda": _cuda()}),
        "", "compilers", *_table({"C++": _compiler(), "torch.compile": _compile()}),
        "", "extras", *_table(extras()),
    ]  # fmt: skip
    return "\n".join(lines)


def extras() -> dict[str, str]:
    """For each extra what of it is not installed, and how to have it."""
    try:
        requirements = metadata.requires(OWN) or []
    except metadata.PackageNotFoundError:
        return {"all": "not known: po-kernels runs from a source tree that was never installed"}
    asked: dict[str, list[tuple[str, str | None]]] = {}
    for requirement in requirements:
        named = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?.*extra == .(\w+)", requirement)
        if named and named[3] not in BUNDLES:
            asked.setdefault(named[3], []).append((named[1], named[2]))

    def packages(extra: str) -> Iterator[str]:
        for package, others in asked.get(extra, ()):
            # Of itself an extra asks for other extras.
            if package == OWN and others:
                yield from (each for other in others.split(",") for each in packages(other))
            else:
                yield package

    return {extra: _missing(extra, list(packages(extra))) for extra in asked}


def _missing(extra: str, packages: list[str]) -> str:
    lacking = [package for package in packages if not _installed(package)]
    return f"lacks {', '.join(lacking)}: pip install '.[{extra}]' in a clone of po-kernels" if lacking else "installed"


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "does not serve: torch was built without it" if torch.version.cuda is None else "none that torch can use"
    return f"serves: {', '.join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))}"


def _compiler() -> str:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return found or "none found: an install has no C++ extension, and torch.compile does not serve CPU tensors"


def _compile() -> str:
    """By a try, which takes some seconds."""
    try:
        torch.compile(torch.sin)(torch.zeros(2))
    except Exception as error:
        # Whatever a compiler and what calls it raise.
        return f"does not serve: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return "serves"


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]
