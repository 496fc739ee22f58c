"""What the experiments have in common: their form, options and checks of these, the loop over seeds, and the clock."""

import contextlib
import dataclasses
import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from .. import steps
from ..errors import HypergradientWarning, NonFiniteError, UsageError
from ..files import alone
from ..resumable import Resumable, Step
from ..steps import OuterStep
from . import plots, results
from .results import Row

T = TypeVar("T")


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


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of every experiment."""

    seeds: int = 10
    """How many random data sets, splits and initial weights, numbered from 0, or from --first-seed if there is one."""
    out: Path = Path("results/{title}")
    """Folder for results.json, curves.json and the figure, {title} standing for the run's; made if it is not there."""
    threads: int = 1
    """Threads of torch; problems of this size lose time with more, and a great deal on a busy machine."""
    plot: bool = True
    """Draw the figure."""
    progress: bool = True
    """Show progress bars on a terminal."""
    quiet: bool = False
    """Print warnings and errors only."""
    overwrite: bool = False
    """Replace what another run has left in --out."""
    config: Path | None = None
    """JSON file of options, which those of the command line go before: results.json of a run, which is repeated so, or
    {"options": {...}}."""


@dataclasses.dataclass(frozen=True)
class OptionsInParts(Options):
    """The options of an experiment whose seeds can be run apart: a sweep makes a run of each.

    Lists in the curves of an outcome are over seeds: those of the parts are put end to end.
    """

    first_seed: int = 0
    """The number of the first, where they are run in parts."""
    jobs: int = 1
    """Seeds at a time, each in a process."""


def _figure(config: Any, outcome: Outcome) -> Any:
    return plots.figure_of_summary(results.summarise(outcome.rows))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that the command line, sweeps and `po-bilevel reproduce` know of an experiment.

    Attributes:
        name: of its command.
        config: its options, a frozen dataclass derived from `Options`, each with a default and a docstring.
        check: refuses options that no run can have: a UsageError names the option and what was expected.
        run: runs it, checking first. Raises UsageError, MissingDependencyError, NonFiniteError (training diverged).
        title: of its results and its figure's file, {option} standing for that option's value; the name if empty.
        figure: the figure of (config, outcome), see `plots`; means and intervals of all metrics as it stands.
        summary: what is printed of (config, outcome) under the table.
        baselines: methods whose differences to the others on the same seed are printed and kept, where they were run.
        needs: the optional modules that a run of (config) imports, each with its extra.
        reproduced: its runs in `po-bilevel reproduce`: by folder, options, and what the quick version changes.
    """

    name: str
    config: type[Options]
    check: Callable[[Any], object]
    run: Callable[[Any], Outcome]
    title: str = ""
    figure: Callable[[Any, Outcome], Any] = _figure
    summary: Callable[[Any, Outcome], str] = lambda config, outcome: ""
    baselines: tuple[str, ...] = ("nll", "nll_cv")
    needs: Callable[[Any], Sequence[tuple[str, str]]] = lambda config: ()
    reproduced: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def title_of(self, config: Options) -> str:
        """The title of a run."""
        return (self.title or self.name).format(**vars(config))


Names = tuple[str, ...]
MOST = 2**31 - 1
PROGRAM = "po-bilevel"
SKLEARN = (("sklearn", "sklearn"),)


def check_options(config: Any, *, zero: Names = (), fractions: Names = (), free: Names = ()) -> None:
    """Refuses counts below 1, reals that are not finite and positive, and lists that are empty or name a thing twice.

    Integers end at `MOST`, as many libraries' do, and so do the seeds' numbers. Lists of counts are sizes, and may.

    Args:
        config: of a run.
        zero: options that may be zero, or empty.
        fractions: options between 0 and 1.
        free: options that are any number.

    Raises:
        UsageError: naming the option, what was expected and what came, as all checks do.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        flag, values = f"--{name.replace('_', '-')}", value if isinstance(value, tuple) else (value,)
        sizes = field.type in ("tuple[int, ...]", tuple[int, ...])
        if isinstance(value, tuple) and not sizes and (len(set(value)) < len(value) or not (value or name in zero)):
            expected = "each once" if name in zero else "at least one and each once"
            raise UsageError(f"{flag}: expected {expected}, got {' '.join(map(str, value)) or 'none'}")
        for number in values:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or name in free:
                continue
            if name in fractions:
                right, expected = 0 < number < 1, "a number between 0 and 1"
            elif isinstance(number, int) and number > MOST:
                right, expected = False, f"an integer of at most {MOST}"
            elif name in zero:
                right, expected = 0 <= number < math.inf, "a finite number of at least 0"
            elif isinstance(number, int):
                right, expected = number >= 1, "an integer of at least 1"
            else:
                right, expected = 0 < number < math.inf, "a finite positive number"
            if not right:
                raise UsageError(f"{flag}: expected {expected}, got {number}")
    if getattr(config, "threads", 1) > 4096:
        raise UsageError(f"--threads: expected at most 4096, got {config.threads}")


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """The folder of --out is there, can be written to, and is that of no other run until the block ends."""
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            stack.enter_context(alone(path))
        except BlockingIOError:
            raise UsageError(
                f"--out: expected a folder that no run is writing to, got {str(path)!r}; wait for that to end"
            ) from None
        except OSError as error:
            raise UsageError(f"--out: expected a folder to write to, got {str(path)!r}: {error.strerror}") from None
        yield


def check_device(device: str) -> None:
    """Refuses a device that torch does not see."""
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
    """torch has that many threads inside, and has taken the first optimiser step of its process.

    That step imports a second's worth of torch: no method's time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter]).step()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Clock:
    """Measures what the rows of every experiment call `seconds`: the time to train a method's model from the data.

    All that the method needs for it counts, such as its reward and what that is computed from, whether or not another
    method has had it computed before (see `Once`). Reading data does not count, nor what is measured on a model.

    It runs inside `with clock:`, and stands still inside `with clock.paused():`.
    """

    def __init__(self) -> None:
        self.seconds: float = 0.0
        self._started = 0.0

    def __enter__(self) -> "Clock":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no part of training."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class Once(Generic[T]):
    """What several methods need and is computed when the first asks; each is charged the time that it took, once.

    Args:
        compute: what to call once.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._found: tuple[T, float] | None = None
        self._charged: set[Clock] = set()

    def __call__(self, clock: Clock) -> T:
        """What was computed.

        Args:
            clock: a running one, of the method that asks.
        """
        with clock.paused():
            if self._found is None:
                with Clock() as own:
                    value = self._compute()
                self._found = value, own.seconds
        if clock not in self._charged:
            self._charged.add(clock)
            clock.seconds += self._found[1]
        return self._found[0]


def progress_bar(config: Options, total: int, label: str) -> "tqdm[Any]":
    """A bar, if one is asked for and standard error is a terminal."""
    return tqdm(total=total, desc=label, disable=None if config.progress else True, leave=False)


def shown(config: Options, cases: Sequence[T], label: str = "runs") -> Iterator[T]:
    """The cases behind a `progress_bar`."""
    with progress_bar(config, len(cases), label) as bar:
        for case in cases:
            bar.set_postfix_str(", ".join(map(str, case)) if isinstance(case, tuple) else str(case))
            yield case
            bar.update()


def each_run(config: OptionsInParts, *axes: Iterable[Any], label: str = "runs") -> Iterator[tuple[Any, ...]]:
    """Every seed of a configuration with every combination of the axes, such as the methods; see `shown`."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return shown(config, list(itertools.product(seeds, *axes)), label)


@contextlib.contextmanager
def named(*parts: object) -> Iterator[None]:
    """Training that diverges inside says of what run it was."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{', '.join(map(str, parts))}: {error}") from error


def learn(trainer: Resumable[Step], outer_steps: int) -> list[Step]:
    """`fit`, whose warning of imperfect hypergradients an experiment gives by `imperfect`, beside the run's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypergradientWarning)
        return trainer.fit(outer_steps)


def imperfect(where: str, history: Sequence[OuterStep]) -> list[str]:
    """A warning if there were problems with hypergradients of these outer steps, or none; where says of what run."""
    found = steps.imperfect(history)
    return [f"{where}: {found}"] if found else []
