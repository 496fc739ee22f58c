"""The compiled extension and the record of its build, or why there is none."""

import importlib
from types import ModuleType
from typing import Any

missing: str | None = None
module: ModuleType | None = None

try:
    build: dict[str, Any] = importlib.import_module("po_kernels._build").RECORD
except ModuleNotFoundError:
    build = {}
    missing = "po_kernels was not built: it runs from a source tree that was never installed"
else:
    if not build["native"]:
        missing = f"po_kernels was installed without its C++ extension: {build['reason']}"
    else:
        try:
            module = importlib.import_module("po_kernels._native")
        except ImportError as error:
            missing = f"the C++ extension does not load: {error}"
