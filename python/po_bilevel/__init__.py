"""Training with the fused operations of `po_kernels`: rewards learned from data by bilevel optimisation.

What is public is in `__init__.pyi`, once for type checkers and for this file, which imports it when it is first asked
for: `po-bilevel --help` need not wait for torch.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
_HOMES = {alias.name: node.module for node in _STUB if isinstance(node, ast.ImportFrom) for alias in node.names}
# The estimators are not among these: `from po_bilevel import *` has to work without scikit-learn.
__all__ = next(
    ast.literal_eval(node.value)
    for node in _STUB
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("po_kernels").__version__
    if name in _HOMES.values():
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] == "estimators":
        importlib.import_module(f"{__name__}.optional").require("sklearn", "sklearn")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*_HOMES, "__version__"})
