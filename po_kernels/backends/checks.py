"""Refusals that depend on values, made where the values can be read without synchronising a device."""

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from . import contract


def values(op: contract.Op, inputs: Any, constants: Any) -> None:
    """All refusals of an op's values, by the names of its tensors."""
    name = op.name
    if op.axes.get("scale") == "BDD":
        scale_tril(name, inputs.scale)
    if "precision" in op.axes:
        precision(name, inputs.precision)
    if op.labels is not None:
        labels(op, constants, op.classes(inputs))
    if "logits" in op.axes:
        left_out = constants.token_ids == contract.IGNORED if op.leaves_out else None
        logits(name, inputs.logits, getattr(constants, "seed", None) is not None, left_out)
        if op.labels == "samples":
            unmasked(name, constants.samples, inputs.logits)


def precision(op: str, value: Tensor) -> None:
    u = value.detach().double()
    if value.ndim == 2:
        asymmetry = (u - u.mT).abs().amax()
        if is_true(asymmetry > contract.MATRIX_TOLERANCE * u.abs().amax()):
            contract.refuse(op, "precision_not_symmetric", 0)
        positive = _is_positive_definite(0.5 * (u + u.mT))
    else:
        positive = not is_true(~(u > 0).all())
    if not positive or is_true(~u.isfinite().all()):
        contract.refuse(op, "precision_not_positive", 0)


def labels(op: contract.Op, constants: Any, num_classes: int) -> None:
    bad = _out_of_range(op, getattr(constants, op.labels or ""), num_classes)
    if is_true(bad.any()):
        wrong_label(op, constants, num_classes, _first_row(bad))


def wrong_label(op: contract.Op, constants: Any, num_classes: int, row: int) -> NoReturn:
    """Refuses the first label of a row that is out of range."""
    value = getattr(constants, op.labels or "")[..., row]
    got = value[_out_of_range(op, value, num_classes)][0].item()
    contract.refuse(op.name, "label_out_of_range", row, got=got, last=num_classes - 1)


def _out_of_range(op: contract.Op, value: Tensor, num_classes: int) -> Tensor:
    bad = (value < 0) | (value >= num_classes)
    return bad & (value != contract.IGNORED) if op.leaves_out else bad


def logits(op: str, value: Tensor, sampled: bool = False, left_out: Tensor | None = None, name: str = "logits") -> None:
    """value: (B, C), made of what `name` says; left_out: (B,). Samples need a finite largest logit."""
    value = value.detach()
    masked = torch.isneginf(value).all(dim=-1)
    _any_row(op, "all_masked", masked if left_out is None else masked & ~left_out, logits=name)
    if sampled:
        _any_row(op, "logits_not_finite", ~(value < float("inf")).all(dim=-1))


def unmasked(op: str, value: Tensor, logits: Tensor) -> None:
    """value: (..., B)."""
    masked = torch.isneginf(logits.detach()).expand(*value.shape, -1)
    _any_row(op, "label_masked", masked.gather(-1, value.unsqueeze(-1)).squeeze(-1))


def scale_tril(op: str, value: Tensor) -> None:
    """value: (B, D, D)."""
    matrix = value.detach()
    _any_row(op, "scale_not_finite", ~matrix.isfinite().all(dim=-1).all(dim=-1))
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    _any_row(op, "singular", ~(diagonal > 0).all(dim=-1))
    scale = (diagonal.unsqueeze(-1).double() * diagonal.unsqueeze(-2).double()).sqrt()
    small = torch.triu(matrix, diagonal=1).abs() <= contract.MATRIX_TOLERANCE * scale
    _any_row(op, "not_triangular", ~small.all(dim=-1).all(dim=-1))


def _is_positive_definite(matrix: Tensor) -> bool:
    """True also where the values are not at hand."""
    if torch.compiler.is_compiling() or matrix.device.type != "cpu":
        return True
    try:
        # Of torch's own decompositions a forked child cannot be sure: its threads are gone.
        np.linalg.cholesky(matrix.numpy())
    except np.linalg.LinAlgError:
        return False
    except RuntimeError:  # wrapped by a transform of torch.func
        return not is_true(torch.linalg.cholesky_ex(matrix).info != 0)
    return True


def _any_row(op: str, refusal: str, bad: Tensor, **named: str) -> None:
    if is_true(bad.any()):
        contract.refuse(op, refusal, _first_row(bad), **named)


def _first_row(bad: Tensor) -> int:
    """bad: (..., B)."""
    return int(bad.reshape(-1, bad.shape[-1]).any(dim=0).nonzero()[0])


def is_true(condition: Tensor) -> bool:
    """False where the value is not at hand: in torch.compile and torch.vmap, and on an accelerator."""
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        return False
    try:
        return bool(condition)
    except RuntimeError:  # a batched tensor of torch.vmap has no one value
        return False
