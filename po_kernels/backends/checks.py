"""Refusals that depend on values, made where the values can be read without synchronising a device."""

import numpy as np
import torch
from torch import Tensor

from . import contract


def precision(op: str, value: Tensor) -> None:
    u = value.detach().double()
    if value.ndim == 2:
        asymmetry = (u - u.mT).abs().amax()
        if _is_true(asymmetry > contract.MATRIX_TOLERANCE * u.abs().amax()):
            contract.refuse(op, contract.PRECISION_NOT_SYMMETRIC, 0)
        positive = _is_positive_definite(0.5 * (u + u.mT))
    else:
        positive = not _is_true(~(u > 0).all())
    if not positive or _is_true(~u.isfinite().all()):
        contract.refuse(op, contract.PRECISION_NOT_POSITIVE, 0)


def labels(op: str, name: str, value: Tensor, num_classes: int) -> None:
    """value: (..., B)."""
    _any_row(op, contract.LABEL_OUT_OF_RANGE, (value < 0) | (value >= num_classes), name)


def logits(op: str, value: Tensor, sampled: bool = False) -> None:
    """value: (B, C). Samples can be drawn only where the largest logit is finite."""
    value = value.detach()
    _any_row(op, contract.ALL_MASKED, torch.isneginf(value).all(dim=-1))
    if sampled:
        _any_row(op, contract.LOGITS_NOT_FINITE, ~(value < float("inf")).all(dim=-1))


def scale_tril(op: str, value: Tensor) -> None:
    """value: (B, D, D)."""
    matrix = value.detach()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    _any_row(op, contract.SINGULAR, ~(diagonal > 0).all(dim=-1))
    scale = (diagonal.unsqueeze(-1).double() * diagonal.unsqueeze(-2).double()).sqrt()
    small = torch.triu(matrix, diagonal=1).abs() <= contract.MATRIX_TOLERANCE * scale
    _any_row(op, contract.NOT_TRIANGULAR, ~small.all(dim=-1).all(dim=-1))


# By op, from its (*inputs, *constants) as in `contract`; a seed at the end is not looked at.


def nothing(op: str, *tensors: Tensor) -> None:
    pass


def gaussian_policy_loss(op: str, mean: Tensor, log_std: Tensor, target: Tensor, u: Tensor, *seed: Tensor) -> None:
    precision(op, u)


def mvn(op: str, mean: Tensor, matrix: Tensor, *rest: Tensor) -> None:
    scale_tril(op, matrix)


def mvn_policy_loss(op: str, mean: Tensor, matrix: Tensor, target: Tensor, u: Tensor, *seed: Tensor) -> None:
    scale_tril(op, matrix)
    precision(op, u)


def categorical_policy_loss(op: str, logit: Tensor, table: Tensor, target: Tensor, *seed: Tensor) -> None:
    labels(op, "target", target, logit.shape[-1])
    logits(op, logit, sampled=bool(seed))


def categorical_surrogate_loss(op: str, logit: Tensor, rewards: Tensor, samples: Tensor) -> None:
    labels(op, "samples", samples, logit.shape[-1])
    logits(op, logit)
    masked = torch.isneginf(logit.detach()).expand(*samples.shape, -1)
    _any_row(op, contract.LABEL_MASKED, masked.gather(-1, samples.unsqueeze(-1)).squeeze(-1), "samples")


def categorical_log_prob(op: str, logit: Tensor, value: Tensor) -> None:
    labels(op, "value", value, logit.shape[-1])
    logits(op, logit)


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
        return not _is_true(torch.linalg.cholesky_ex(matrix).info != 0)
    return True


def _any_row(op: str, code: int, bad: Tensor, name: str = "target") -> None:
    if _is_true(bad.any()):
        row = int(bad.reshape(-1, bad.shape[-1]).any(dim=0).nonzero()[0])
        contract.refuse(op, code, row, name)


def _is_true(condition: Tensor) -> bool:
    """False where the value is not at hand: in torch.compile and torch.vmap, and on an accelerator."""
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        return False
    try:
        return bool(condition)
    except RuntimeError:  # a batched tensor of torch.vmap has no one value
        return False
