"""Sweeps: an experiment over a grid of options, in processes or on Ray, resumable whenever it is stopped.

A sweep's file is JSON:

    {"experiment": "classify", "seeds": 10, "options": {"l2": 1.0},
     "grid": {"dataset": ["wine", "iris"], "reward": ["isotropic", "full"]}}

A run is one point of the grid and one seed. The folder has manifest.json, which lists the runs; runs/ID.parquet for
each that is finished, written as a whole by the one process that starts them; and results.parquet of all at the end.
A run is finished if its file is there and whole, so that a sweep that was killed goes on by being started again.

What cannot be used is a UsageError that names the option or the key, what was expected and what came; a package that is
not installed a MissingDependencyError.
"""

import dataclasses
import hashlib
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tqdm import tqdm

from ..errors import MissingDependencyError, NonFiniteError, UsageError
from ..files import atomic
from ..optional import require, require_all
from . import results
from .parts import ASIDE
from .registry import EXPERIMENTS
from .results import Row
from .runs import MOST, OptionsInParts, Outcome, check_options, folder
from .workers import in_processes

# A run, its rows, and what went wrong or None.
Ended = tuple["Run", list[Row], str | None]


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Run an experiment over a grid of options and seeds; start it again to go on after a stop."""

    config: tyro.conf.Positional[Path]
    """JSON file: {"experiment": NAME, "seeds": N, "options": {...}, "grid": {OPTION: [VALUE, ...], ...}}."""
    out: Path = Path("sweep")
    """Folder for manifest.json, runs/ and results.parquet; made if it is not there."""
    engine: Literal["processes", "ray"] = "processes"
    """Processes of this machine, or a Ray cluster."""
    workers: int | None = None
    """Runs at a time; by default one for each processor. With Ray, processors of a cluster that is started here."""
    address: str | None = None
    """Of a Ray cluster to join; by default one is started on this machine."""
    gpus: float = 0.0
    """GPUs of a run, also a fraction; with Ray."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    quiet: bool = False
    """Print warnings and errors only."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of the grid and one seed.

    Attributes:
        id: of its options, the same in every sweep.
        options: all that are not defaults, as they stand in the sweep's file.
        point: the grid's options and the seed, for people.
        label: what of the grid tells it from others besides the data set, and the methods if no two lists of them have
            one in common.
        config: the experiment's, of these options.
        start: the experiment's `run`.
    """

    id: str
    options: dict[str, Any]
    point: str
    label: str
    config: Any
    start: Callable[[Any], Outcome]


def check(config: SweepConfig) -> list[Run]:
    """The runs of a sweep, or what is wrong with it."""
    check_options(config, zero=("gpus",))
    if config.engine == "processes" and (config.gpus > 0 or config.address is not None):
        raise UsageError("--engine: expected ray with --gpus or --address, got processes")
    return runs_of(read(config.config))


def read(path: Path) -> dict[str, Any]:
    """The contents of a sweep's file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"config: expected a JSON file, got {str(path)!r}: {error}") from None
    known = {"experiment": str, "seeds": int, "options": dict, "grid": dict}
    if not isinstance(content, dict) or "experiment" not in content or set(content) - set(known):
        raise UsageError(f"config: expected an object with {', '.join(known)} in {str(path)!r}")
    content = dict[str, Any](seeds=1, options={}, grid={}) | content
    for key, kind in known.items():
        if not isinstance(content[key], kind):
            raise UsageError(f"config: {key}: expected a JSON {kind.__name__}, got {content[key]!r}")
    if content["experiment"] not in EXPERIMENTS:
        raise UsageError(f"config: experiment: expected one of {', '.join(EXPERIMENTS)}, got {content['experiment']!r}")
    if not 1 <= content["seeds"] <= MOST:
        raise UsageError(f"config: seeds: expected from 1 to {MOST}, got {content['seeds']}")
    for option, values in content["grid"].items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"config: grid: expected a list of values for {option!r}, got {values!r}")
    return content


def runs_of(content: dict[str, Any]) -> list[Run]:
    """The runs of a sweep's file, each checked."""
    experiment = EXPERIMENTS[content["experiment"]]
    names = {field.name for field in dataclasses.fields(experiment.config)}
    own = {"seeds", "first_seed", *ASIDE}
    for option in (*content["options"], *content["grid"]):
        if option not in names - own:
            raise UsageError(f"config: expected options of {content['experiment']}, got {option!r}")
    # Without a first seed an experiment runs all its seeds at once.
    apart = issubclass(experiment.config, OptionsInParts)
    parts = [{"first_seed": seed, "seeds": 1} for seed in range(content["seeds"])]
    seeds = parts if apart else [{"seeds": content["seeds"]}]
    lists = [value if isinstance(value, list) else [value] for value in content["grid"].get("methods", [])]
    named = {"dataset"} if sum(map(len, lists)) > len(set(itertools.chain(*lists))) else {"dataset", "methods"}
    found: dict[str, Run] = {}
    for point in itertools.product(*content["grid"].values()):
        chosen = dict(zip(content["grid"], point, strict=True))
        label = ", ".join(f"{name}={_text(value)}" for name, value in chosen.items() if name not in named)
        for seed in seeds:
            options = content["options"] | chosen | seed
            key = json.dumps([content["experiment"], options], sort_keys=True)
            config = configured(experiment.config, options | {"plot": False, "progress": False})
            experiment.check(config)
            which = chosen | ({"seed": seed["first_seed"]} if apart else {})
            where = ", ".join(f"{name}={_text(value)}" for name, value in which.items()) or content["experiment"]
            run = Run(hashlib.sha256(key.encode()).hexdigest()[:16], options, where, label, config, experiment.run)
            found[run.id] = run
    return list(found.values())


def configured(kind: type[Any], options: dict[str, Any]) -> Any:
    """The dataclass with options from JSON: lists are tuples, and what is no list is one of one; texts are paths."""
    hints = get_type_hints(kind)
    for name in options:
        if name not in hints:
            raise UsageError(f"config: expected options of {kind.__name__}, which has no {name!r}")
    return kind(**{name: _typed(hints[name], value, name) for name, value in options.items()})


def _typed(hint: Any, value: Any, name: str) -> Any:
    origin, choices = get_origin(hint), get_args(hint)
    if origin is tuple:
        return tuple(_typed(choices[0], each, name) for each in (value if isinstance(value, list) else [value]))
    if origin in (Union, types.UnionType):
        (hint,) = (each for each in choices if each is not type(None))
        return None if value is None else _typed(hint, value, name)
    if origin is Literal:
        right = any(value == each and type(value) is type(each) for each in choices)
    else:
        accepted = {float: (int, float), Path: (str,)}.get(hint, (hint,))
        right = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    if not right:
        expected = "one of " + ", ".join(map(repr, choices)) if choices else f"a JSON value for {hint.__name__}"
        raise UsageError(f"config: --{name.replace('_', '-')}: expected {expected}, got {value!r}")
    return value if origin is Literal else hint(value)


def sweep(config: SweepConfig) -> list[str]:
    """Runs what is not finished, then writes results.parquet.

    Returns:
        for people, one sentence for each run that failed; those are tried again next time.
    """
    runs = check(config)
    experiment = EXPERIMENTS[read(config.config)["experiment"]]
    needed = [("pandas", "sklearn"), ("pyarrow", "sklearn"), *experiment.needs(runs[0].config)]
    require_all([*needed, *((("ray", "ray"),) if config.engine == "ray" else ())])
    pandas = require("pandas", "sklearn")
    with folder(config.out):
        (config.out / "runs").mkdir(exist_ok=True)
        _manifest(config.out / "manifest.json", read(config.config), runs)
        for left in (config.out / "runs").glob(".*"):
            # Of a write that was killed.
            left.unlink()
        return _finish(config, runs, pandas)


def _finish(config: SweepConfig, runs: list[Run], pandas: Any) -> list[str]:
    """Runs what has no file yet, or a broken one, and puts all together when none failed; returns the failures."""
    paths = {run.id: config.out / "runs" / f"{run.id}.parquet" for run in runs}
    waiting: list[Run] = []
    failures: list[str] = []
    for run in runs:
        try:
            if results.read_run(paths[run.id]) is None:
                waiting.append(run)
        except UsageError as broken:
            print(f"{broken}; it is run again", file=sys.stderr)
            waiting.append(run)
    with tqdm(
        total=len(runs), initial=len(runs) - len(waiting), desc="runs", disable=None if config.progress else True
    ) as bar:
        for run, rows, error in ENGINES[config.engine](waiting, config):
            if error is None:
                results.write_run(paths[run.id], rows)
            else:
                failures.append(f"{run.point}: {error}")
            bar.update()
    if not failures:
        parts = [results.read_run(path) for path in paths.values()]
        with atomic(config.out / "results.parquet") as temporary:
            pandas.concat(parts, ignore_index=True).to_parquet(temporary)
    return failures


def execute(run: Run) -> list[Row]:
    """What a run finds, its id with each row."""
    rows = []
    for row in run.start(run.config).rows:
        name = f"{row['dataset']}, {run.label}" if run.label else row["dataset"]
        rows.append({"run": run.id} | row | {"dataset": name})
    return rows


def _manifest(path: Path, content: dict[str, Any], runs: list[Run]) -> None:
    listed = [{"id": run.id, "options": run.options} for run in runs]
    if path.exists():
        try:
            before = json.loads(path.read_text())["runs"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--out: expected a sweep's manifest or none, got {str(path)!r}: {error}") from None
        if before != json.loads(json.dumps(listed)):
            raise UsageError(
                f"--out: expected a folder of this sweep or a new one, got {str(path.parent)!r} of another"
            )
        return
    results.write_json(path, {"sweep": content, "versions": results.versions(), "runs": listed})


def _in_processes(runs: list[Run], config: SweepConfig) -> Iterator[Ended]:
    for run, rows, error in in_processes(execute, runs, config.workers):
        told = isinstance(error, (UsageError, MissingDependencyError, NonFiniteError))
        yield run, rows or [], (str(error) if told else repr(error)) if error else None


def _on_ray(runs: list[Run], config: SweepConfig) -> Iterator[Ended]:
    ray = require("ray", "ray")
    here = {} if config.address else {"num_cpus": config.workers, "include_dashboard": False}
    ray.init(address=config.address, log_to_driver=False, logging_level="ERROR", **here)
    try:
        remote = ray.remote(num_cpus=1, num_gpus=config.gpus)(execute)
        tasks = {remote.remote(run): run for run in runs}
        while tasks:
            (done, *_), _ = ray.wait(list(tasks))
            run = tasks.pop(done)
            try:
                yield run, ray.get(done), None
            except ray.exceptions.RayError as error:
                yield run, [], str(error).strip().splitlines()[-1]
    finally:
        ray.shutdown()


ENGINES = {"processes": _in_processes, "ray": _on_ray}


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
