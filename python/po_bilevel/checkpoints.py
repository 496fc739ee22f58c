"""Checkpoints of a training run: whole or absent, and only for the run that wrote them.

A checkpoint is a line of text with the format and a SHA-256 of all that follows, and torch's file of tensors. The
history of the run, which grows with each step, is in a file beside it, to which steps are only ever added.
"""

import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import random
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError
from .files import atomic

# Changed when the contents change, so that an old file is refused and not misread.
FORMAT = 4
HEAD = f"po_bilevel checkpoint, format {FORMAT}, SHA-256 "


def save(path: Path, state: Mapping[str, Any], configuration: Mapping[str, str]) -> None:
    """Writes a checkpoint, all of it or nothing.

    Args:
        path: the file, replaced if there is one.
        state: tensors, numbers, strings and containers of them.
        configuration: what has to be the same for a run to go on from here, see `fingerprints`.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    # By way of memory: torch calls a full disk a RuntimeError.
    payload = io.BytesIO()
    torch.save({"configuration": dict(configuration), "state": dict(state)}, payload)
    content = payload.getbuffer()
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(f"{HEAD}{hashlib.sha256(content).hexdigest()}\n".encode())
        file.write(content)


def load(path: Path, configuration: Mapping[str, str]) -> dict[str, Any]:
    """The state in a checkpoint. Nothing in the file is executed.

    Raises:
        UsageError: there is no such file, it is no checkpoint of this format, it has changed since it was written, or
            it is of another configuration: says what differs.
    """
    try:
        head, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise UsageError(f"checkpoint: expected a file to resume from, got {str(path)!r}: there is none") from None
    except OSError as error:
        raise UsageError(f"checkpoint: expected a file to resume from, got {str(path)!r}: {error}") from None
    if not head.startswith(HEAD.encode()):
        raise UsageError(
            f"checkpoint: expected a checkpoint, got {str(path)!r}: it is none of format {FORMAT}; train again, or go "
            "on with the version that wrote it"
        )
    if head != f"{HEAD}{hashlib.sha256(content).hexdigest()}".encode():
        raise UsageError(f"checkpoint: expected a checkpoint as it was written, got {str(path)!r}, which has changed")
    try:
        read = torch.load(io.BytesIO(content), weights_only=True)
        found, state = dict(read["configuration"]), dict(read["state"])
    except Exception as error:
        raise UsageError(f"checkpoint: expected a checkpoint, got {str(path)!r}: {error}") from error
    different = [
        f"{key} was {found.get(key, 'absent')} and is {configuration.get(key, 'absent')}"
        for key in dict.fromkeys([*found, *configuration])
        if found.get(key) != configuration.get(key)
    ]
    if different:
        raise UsageError(
            f"checkpoint: expected the configuration that wrote {str(path)!r}, got another: {'; '.join(different)}; "
            "use the same, or train from the start"
        )
    return state


class History:
    """The steps of a run in a file beside its checkpoint, a line of JSON each.

    A checkpoint keeps `mark`: the file's name, how much of it was there then, and a digest of that. Lines that were
    added after the checkpoint, before the process was killed, are cut off when the run goes on.

    Args:
        checkpoint: path of the checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        # A name of its own, so that a checkpoint of another run at this path keeps its history until it is replaced.
        self._name = f"{checkpoint.name}.{secrets.token_hex(4)}.history"
        self._start()

    def _start(self) -> None:
        self._count, self._size, self._digest = 0, 0, hashlib.sha256()

    @property
    def mark(self) -> dict[str, Any]:
        return {"file": self._name, "steps": self._count, "bytes": self._size, "sha256": self._digest.hexdigest()}

    def add(self, steps: Sequence[Any]) -> None:
        """Writes what of all steps so far, dataclasses, is not in the file.

        Raises:
            OSError: the folder cannot be written to, or is full.
        """
        path = self.checkpoint.with_name(self._name)
        if not path.exists() or path.stat().st_size < self._size:
            self._start()
        new = map(dataclasses.asdict, steps[self._count :])
        lines = "".join(json.dumps(step, default=_written) + "\n" for step in new).encode()
        try:
            with path.open("r+b" if self._size else "wb") as file:
                file.seek(self._size)
                file.truncate()
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if self._size == 0:
                path.unlink(missing_ok=True)
            raise
        self._count, self._size = len(steps), self._size + len(lines)
        self._digest.update(lines)

    def sweep(self) -> None:
        """Removes the histories of other runs at this path, whose checkpoint this run has replaced."""
        for other in self.checkpoint.parent.glob(f"{glob.escape(self.checkpoint.name)}.????????.history"):
            if other.name != self._name:
                with contextlib.suppress(OSError):
                    other.unlink()

    @classmethod
    def open(cls, checkpoint: Path, mark: Mapping[str, Any]) -> tuple["History", list[dict[str, Any]]]:
        """The history of a checkpoint, to be gone on with, and its steps.

        Raises:
            UsageError: it is not there, or has changed since.
        """
        history = cls(checkpoint)
        history._name, history._count, history._size = mark["file"], mark["steps"], mark["bytes"]
        path = checkpoint.with_name(history._name)
        try:
            with path.open("rb") as file:
                lines = file.read(history._size)
        except OSError as error:
            raise UsageError(f"checkpoint: expected its history beside it, in {str(path)!r}: {error}") from None
        history._digest.update(lines)
        if history.mark != dict(mark):
            raise UsageError(f"checkpoint: expected its history as it was, got {str(path)!r}, which has changed")
        return history, [json.loads(line, object_hook=_read) for line in lines.splitlines()]


def _written(value: Any) -> Any:
    """A tensor in JSON, exactly: numbers there have all digits."""
    if not isinstance(value, Tensor):
        raise TypeError(f"history: expected numbers, texts and tensors, got {type(value).__name__}")
    return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}


def _read(found: dict[str, Any]) -> Any:
    if set(found) != {"dtype", "values"}:
        return found
    return torch.tensor(found["values"], dtype=getattr(torch, found["dtype"]))


def random_state() -> dict[str, Any]:
    """The state of every global random number generator that a loss or a callback may have drawn from."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave; the devices' part where there are as many."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
