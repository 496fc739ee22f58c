"""The compiled extension and the record of its build, or why there is none."""

import importlib
import os
from types import ModuleType
from typing import Any

ENVIRONMENT_VARIABLE = "PO_KERNELS_EXTENSION"

missing: str | None = None
module: ModuleType | None = None

try:
    build: dict[str, Any] = importlib.import_module("po_kernels._build").RECORD
except ModuleNotFoundError:
    build = {}
    missing = "po_kernels was not built: it runs from a source tree that was never installed"
else:
    if os.environ.get(ENVIRONMENT_VARIABLE, "").upper() == "OFF":
        missing = f"{ENVIRONMENT_VARIABLE}=OFF in the environment leaves the C++ extension out"
    elif not build["native"]:
        missing = f"po_kernels was installed without its C++ extension: {build['reason']}"
    else:
        try:
            module = importlib.import_module("po_kernels._native")
        except ImportError as _error:
            missing = f"the C++ extension does not load: {_error}"
