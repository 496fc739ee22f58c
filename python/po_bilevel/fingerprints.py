"""What a run was made of, as text: the same text for the same behaviour, as far as can be told."""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .losses import Batch

# Of what only a type can be told.
UNKNOWN = "contents not compared"
# Longer texts are cut to this and a digest of all.
LONGEST = 400
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def describe(name: str, value: Any) -> dict[str, str]:
    """A part of a configuration as text, by name.

    Of functions: their code, defaults, what they close over, and the constants and functions of their module that they
    name. Of other objects: their attributes; of modules the structure, shapes and modes, not the parameters; of what
    has no attributes in Python no more than the type, as `UNKNOWN` says in the text.
    """
    if isinstance(value, nn.Module):
        shapes = {
            f"{name}.{key}": f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for key, tensor in value.state_dict().items()
        }
        evaluating = [key or "all" for key, module in value.named_modules() if not module.training]
        return {name: _text(value, ()), f"{name}: in evaluation mode": ", ".join(evaluating) or "none", **shapes}
    return {name: _text(value, ())}


def _text(value: Any, above: tuple[int, ...]) -> str:
    """In words; above are the identities of what it is a part of."""
    if id(value) in above:
        return "..."
    inner = functools.partial(_text, above=(*above, id(value)))
    if isinstance(value, PLAIN):
        text = repr(value)
    elif isinstance(value, Batch):
        text = f"{tuple(value.inputs.shape)} and {tuple(value.target.shape)}, {_digest(*value)}"
    elif isinstance(value, Tensor):
        # What is learned changes.
        text = f"{tuple(value.shape)} {value.dtype}" + ("" if value.requires_grad else f", {_digest(value)}")
    elif isinstance(value, np.ndarray):
        text = f"{value.shape} {value.dtype}, {hashlib.sha256(value.tobytes()).hexdigest()[:12]}"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{inner(key)}: {inner(each)}" for key, each in value.items()) + "}"
    elif isinstance(value, (set, frozenset)):
        text = "{" + ", ".join(sorted(map(inner, value))) + "}"
    elif isinstance(value, Sequence):
        text = "(" + ", ".join(map(inner, value)) + ")"
    elif isinstance(value, Optimizer):
        groups = [{key: group[key] for key in group if key != "params"} for group in value.param_groups]
        text = f"{type(value).__name__}({groups})"
    elif isinstance(value, functools.partial):
        parts = [inner(part) for part in (value.func, *value.args)]
        text = f"partial({', '.join([*parts, *(f'{key}={inner(part)}' for key, part in value.keywords.items())])})"
    elif isinstance(value, nn.Module):
        text = " ".join(repr(value).split())
    elif isinstance(value, types.FunctionType):
        text = _function(value, inner)
    elif isinstance(value, types.MethodType):
        text = f"{inner(value.__self__)}.{value.__func__.__name__}"
    elif isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
        text = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    else:
        text = _object(value, inner)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _object(value: Any, inner: Any) -> str:
    kind = type(value)
    if dataclasses.is_dataclass(value):
        attributes = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "__dict__"):
        # The optimiser of a scheduler is a part of its own.
        attributes = {key: each for key, each in vars(value).items() if not isinstance(each, Optimizer)}
    else:
        return f"{kind.__module__}.{kind.__qualname__} ({UNKNOWN})"
    parts = [f"{key}={inner(each)}" for key, each in attributes.items()]
    if kind.__module__.startswith(("po_bilevel.", "torch.")):
        return f"{kind.__qualname__}({', '.join(parts)})"
    call = kind.__dict__.get("__call__")
    if isinstance(call, types.FunctionType):
        parts.append(f"code {_code_digest(call.__code__)}")
    return f"{kind.__module__}.{kind.__qualname__}({', '.join(parts)})"


def _function(function: types.FunctionType, inner: Any) -> str:
    code = function.__code__
    cells: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:
            # Assigned later, or never.
            continue
    for name in sorted({name for each in _codes(code) for name in each.co_names}):
        named = function.__globals__.get(name)
        same = isinstance(named, types.FunctionType) and named.__module__ == function.__module__
        if name in function.__globals__ and (same or isinstance(named, (*PLAIN, tuple))):
            cells[name] = named
    defaults = (function.__defaults__, function.__kwdefaults__)
    parts = [f"code {_code_digest(code)}", *([f"defaults {inner(defaults)}"] if any(defaults) else [])]
    parts += [f"{name}={inner(each)}" for name, each in cells.items()]
    return f"{function.__module__}.{function.__qualname__} ({', '.join(parts)})"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _code_digest(code: types.CodeType) -> str:
    def constant(value: Any) -> str:
        if isinstance(value, frozenset):
            return repr(sorted(map(repr, value)))
        return "" if isinstance(value, types.CodeType) else repr(value)

    digest = hashlib.sha256()
    for each in _codes(code):
        digest.update(each.co_code + repr((each.co_names, *map(constant, each.co_consts))).encode())
    return digest.hexdigest()[:12]


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
