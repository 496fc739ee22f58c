"""Options of the methods, checked."""


def at_least_zero(method: object, name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{type(method).__name__}: {name}: expected a number of at least 0, got {value}")


def positive(method: object, name: str, value: float | None) -> None:
    """None passes: where it is allowed it has a meaning of its own."""
    if value is not None and not value > 0:
        raise ValueError(f"{type(method).__name__}: {name}: expected a positive number, got {value}")


def count(method: object, name: str, value: int, least: int = 1) -> None:
    if not value >= least:
        raise ValueError(f"{type(method).__name__}: {name}: expected at least {least}, got {value}")
