"""The version of what is running."""

import re
from importlib import metadata
from pathlib import Path

try:
    __version__ = metadata.version("po-kernels")
except metadata.PackageNotFoundError:
    # A source tree that was never installed, see `extension.missing`.
    _PROJECT = Path(__file__).parents[1] / "pyproject.toml"
    _FOUND = re.search(r'^version = "(.+)"', _PROJECT.read_text(), re.MULTILINE) if _PROJECT.exists() else None
    __version__ = f"{_FOUND[1] if _FOUND else '0'}+source"
