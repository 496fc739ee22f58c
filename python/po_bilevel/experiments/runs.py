"""What the experiments have in common: checks of options, threads, and the clock."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..errors import UsageError
from .results import Row


def flag(option: str) -> str:
    """The option as it is written on the command line."""
    return "--" + option.replace("_", "-")


def check_counts(config: Any, *options: str) -> None:
    """Refuses counts below 1, and threads by the thousand; None passes.

    Raises:
        UsageError: naming the option, what was expected and what came.
    """
    for option in options:
        count = getattr(config, option)
        if count is not None and count < 1:
            raise UsageError(f"{flag(option)}: expected an integer of at least 1, got {count}")
        if option == "threads" and count > 4096:
            raise UsageError(f"--threads: expected at most 4096, got {count}")


def check_reals(config: Any, *options: str, zero: bool = False) -> None:
    """Refuses numbers that are not finite and positive, or zero if that is allowed; None passes.

    Raises:
        UsageError: naming the option, what was expected and what came.
    """
    for option in options:
        value = getattr(config, option)
        if value is not None and (not math.isfinite(value) or value < 0 or (value == 0 and not zero)):
            expected = "a finite number of at least 0" if zero else "a finite positive number"
            raise UsageError(f"{flag(option)}: expected {expected}, got {value}")


def check_device(device: str) -> None:
    """Refuses a device that torch does not see.

    Raises:
        UsageError: naming the option, what was expected and what came.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda and a number, got {device}")
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if (found.index or 0) >= count:
        raise UsageError(f"--device: expected a device that torch sees, of {count} of this kind, got {device}")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch has that many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def first_step_of_torch() -> None:
    """The first optimiser step of a process imports a second's worth of torch: no method's time."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter]).step()


class Outcome(NamedTuple):
    """What a run found.

    Attributes:
        rows: one for each data set, method and seed.
        curves: what else the figure draws, by name.
        warnings: for people, what happened that makes a result less than it should be.
    """

    rows: list[Row]
    curves: dict[str, Any]
    warnings: list[str]


def each_run(config: Any, methods: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Every seed of a configuration with every method, behind a progress bar if standard error is a terminal."""
    total = config.seeds * len(methods)
    with tqdm(total=total, desc="runs", disable=None if config.progress else True, leave=False) as bar:
        for seed in range(config.first_seed, config.first_seed + config.seeds):
            for method in methods:
                bar.set_postfix_str(f"seed {seed}, {method}")
                yield seed, method
                bar.update()
