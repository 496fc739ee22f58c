"""Checkpoints of a training run: whole or absent, and only for the run that wrote them."""

import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .errors import UsageError
from .files import atomic
from .losses import Batch

# Changed when the contents change, so that an old file is refused and not misread.
FORMAT = 2


def save(path: Path, state: Mapping[str, Any], configuration: Mapping[str, str]) -> None:
    """Writes a checkpoint, all of it or nothing.

    Args:
        path: the file, replaced if there is one.
        state: tensors, numbers, strings and containers of them.
        configuration: what has to be the same for a run to go on from here, see `describe`.

    Raises:
        OSError: the folder cannot be written to.
    """
    with atomic(path) as temporary:
        torch.save({"format": FORMAT, "configuration": dict(configuration), "state": dict(state)}, temporary)


def load(path: Path, configuration: Mapping[str, str]) -> dict[str, Any]:
    """The state in a checkpoint. Nothing in the file is executed.

    Raises:
        UsageError: there is no such file, it is no checkpoint, or it is of another configuration: says what differs.
    """
    try:
        content = torch.load(path, weights_only=True)
        found, state = content["configuration"], content["state"]
        known = content["format"]
    except FileNotFoundError:
        raise UsageError(f"checkpoint: expected a file to resume from, got {str(path)!r}: there is none") from None
    except Exception as error:
        raise UsageError(f"checkpoint: expected a checkpoint, got {str(path)!r}: {error}") from error
    if known != FORMAT:
        raise UsageError(f"checkpoint: expected format {FORMAT}, got {known} in {str(path)!r}; train again")
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


def describe(name: str, value: Any) -> dict[str, str]:
    """A part of a configuration as text, by name: the same text for the same behaviour, as far as can be told."""
    if isinstance(value, nn.Module):
        shapes = {
            f"{name}.{key}": f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for key, tensor in value.state_dict().items()
        }
        return {name: " ".join(repr(value).split()), **shapes}
    if isinstance(value, Batch):
        digest = hashlib.sha256()
        for tensor in value:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {name: f"{tuple(value.inputs.shape)} and {tuple(value.target.shape)}, {digest.hexdigest()[:12]}"}
    if isinstance(value, Optimizer):
        groups = [{key: group[key] for key in group if key != "params"} for group in value.param_groups]
        return {name: f"{type(value).__name__}({groups})"}
    if isinstance(value, LRScheduler):
        # Functions and other objects in it have an address, which says nothing.
        return {name: f"{type(value).__name__}({re.sub(' at 0x[0-9a-f]+', '', repr(value.state_dict()))})"}
    if isinstance(value, functools.partial):
        parts = [describe("", part)[""] for part in (value.func, *value.args)]
        parts += [f"{key}={describe('', part)['']}" for key, part in value.keywords.items()]
        return {name: f"partial({', '.join(parts)})"}
    if dataclasses.is_dataclass(value) or value is None or isinstance(value, (int, float, str, tuple)):
        return {name: repr(value)}
    if not hasattr(value, "__qualname__"):
        value = type(value)
    return {name: f"{value.__module__}.{value.__qualname__}"}


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
