"""Options of the methods, checked."""

import math
from numbers import Integral, Real
from typing import Any, NoReturn


def at_least_zero(method: object, name: str, value: Any) -> None:
    if not _is_finite(value) or value < 0:
        _refuse(method, name, "a finite number of at least 0", value)


def positive(method: object, name: str, value: Any) -> None:
    if not _is_finite(value) or not value > 0:
        _refuse(method, name, "a finite positive number", value)


def count(method: object, name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        _refuse(method, name, f"an integer of at least {least}", value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _refuse(method: object, name: str, expected: str, value: Any) -> NoReturn:
    raise ValueError(f"{type(method).__name__}: {name}: expected {expected}, got {value!r}")
