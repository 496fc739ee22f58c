"""A run in parts, one for each seed: those that are finished outlive an interrupt, and any number runs at a time."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import results
from .runs import Experiment, Options, OptionsInParts, Outcome, progress_bar, shown
from .workers import in_processes

# Of finished seeds, in the folder of --out.
UNFINISHED = "unfinished.json"
# Options that do not make another run.
ASIDE = ("out", "plot", "progress", "quiet", "jobs", "overwrite", "config")
SEEDS = ("seeds", "first_seed")


def described(config: Options) -> dict[str, Any]:
    """The options of a run as they stand in results.json."""
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in ASIDE[3:]}
    return json.loads(json.dumps(kept, default=str))


def check_folder(experiment: Experiment, config: Options) -> None:
    """Refuses a folder that has what another run found.

    Raises:
        UsageError: it has, and `overwrite` is not given.
    """
    for name, aside in (("results.json", ASIDE), (UNFINISHED, ASIDE + SEEDS)):
        before = _read(config.out / name)
        if before is None or config.overwrite:
            continue
        command, options = before.get("command"), before.get("config")
        mine = _without(described(config), aside)
        if command != experiment.name or _without(options, aside) != mine:
            what = f"of po-bilevel {command}" if command else "of another"
            other = what if command != experiment.name else f"{what} with other options"
            raise UsageError(
                f"--out: expected a folder of this run or a new one, got {str(config.out)!r} with the {name} {other}; "
                "give another, or --overwrite"
            )


def run(experiment: Experiment, config: Options) -> Outcome:
    """Runs an experiment, but for what an earlier start of the same run has finished.

    Raises:
        what the experiment raises; with several jobs, of the first seed that failed, once the others are done.
    """
    if not isinstance(config, OptionsInParts):
        return experiment.run(config)
    path, options, versions = config.out / UNFINISHED, described(config), results.versions()
    before = _read(path) or {}
    same = _without(before.get("config"), ASIDE + SEEDS) == _without(options, ASIDE + SEEDS)
    parts: dict[str, Any] = before.get("parts", {}) if same and before.get("versions") == versions else {}
    seeds = [str(seed) for seed in range(config.first_seed, config.first_seed + config.seeds)]
    left = [seed for seed in seeds if seed not in parts]
    failed: BaseException | None = None
    for seed, outcome, error in _ended(experiment, config, left):
        if outcome is None:
            failed = failed or error
            continue
        parts[seed] = outcome._asdict()
        if len(seeds) > 1:
            # A disk that is full now may not be so at the end.
            with contextlib.suppress(OSError):
                results.write_json(
                    path, {"command": experiment.name, "config": options, "versions": versions, "parts": parts}
                )
    if failed is not None:
        raise failed
    found = [parts[seed] for seed in seeds]
    return Outcome(
        [row for part in found for row in part["rows"]], _joined([part["curves"] for part in found]),
        list(dict.fromkeys(warning for part in found for warning in part["warnings"])),
    )  # fmt: skip


def finish(out: Path) -> None:
    """What was kept is in results.json now."""
    (out / UNFINISHED).unlink(missing_ok=True)


def _ended(
    experiment: Experiment, config: OptionsInParts, seeds: list[str]
) -> Iterator[tuple[str, Outcome | None, BaseException | None]]:
    alone = {seed: dataclasses.replace(config, first_seed=int(seed), seeds=1) for seed in seeds}
    if config.jobs == 1 or len(seeds) < 2:
        # A bar over seeds where there are several, above that of each.
        quiet = dataclasses.replace(config, progress=config.progress and len(seeds) > 1)
        for seed in shown(quiet, seeds, "seeds"):
            yield seed, experiment.run(alone[seed]), None
        return
    tasks = [dataclasses.replace(each, progress=False) for each in alone.values()]
    with progress_bar(config, len(seeds), "seeds") as bar:
        for task, outcome, error in in_processes(experiment.run, tasks, config.jobs):
            if isinstance(error, BrokenProcessPool):
                error = ChildProcessError(
                    f"seed {task.first_seed}: its process was killed, as where memory runs out; the finished seeds are "
                    "kept, and the same command goes on"
                )
            yield str(task.first_seed), outcome, error
            bar.update()


def _joined(curves: list[Any]) -> Any:
    """Curves of seeds one after another: dictionaries by their keys, lists end to end, the first of what is neither."""
    if all(isinstance(each, dict) for each in curves):
        keys = dict.fromkeys(key for each in curves for key in each)
        return {key: _joined([each[key] for each in curves if key in each]) for key in keys}
    if all(isinstance(each, list) for each in curves):
        return [item for each in curves for item in each]
    return curves[0]


def _without(options: Any, names: tuple[str, ...]) -> Any:
    return {name: value for name, value in options.items() if name not in names} if isinstance(options, dict) else None


def _read(path: Path) -> dict[str, Any] | None:
    """What a run left; nothing that can be told of a file that is not whole."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
