"""Policies that are networks in one call of the extension: loss, gradient, products with the Hessian, and steps."""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import extension
from ..advantages import ADVANTAGES
from ..contract import ESTIMATORS, OpConfig

Optionals = Sequence[Tensor | None]

# With the numbers that the kernel knows them by.
HEADS = {"gaussian": 0, "mvn": 1, "categorical": 2}
ACTIVATIONS = {"tanh": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
SPREADS = {"log_std": 0, "bounded": 1, "triangular": 2}
RULES = {"none": 0, "adam": 1, "adamw": 2, "sgd": 3}


class Shape(NamedTuple):
    """What is no tensor of a network: names as above, widths of its layers, bounds of log σ."""

    head: str
    activation: str
    spread: str
    widths: tuple[int, ...]
    spread_widths: tuple[int, ...]
    bounds: tuple[float, float]


class Batches(NamedTuple):
    """Rows of one batch after the other: how many each has, where they stand, None for all rows, and its seed."""

    rows: Sequence[int]
    places: Tensor | None
    seeds: Sequence[int]


class Results(NamedTuple):
    """Of each batch before one that is refused: the loss before its step, and the gradient's norm if asked for."""

    losses: Sequence[float]
    norms: Sequence[float]


def run(
    shape: Shape, inputs: Tensor, target: Tensor, reward: Tensor, config: OpConfig, l2: float, batches: Batches, *,
    values: Optionals, gradients: Optionals, tangents: Optionals | None = None, reward_gradient: Tensor | None = None,
    reward_tangent: Tensor | None = None, norms: bool = False, rule: dict[str, Any] | None = None,
) -> Results:  # fmt: skip
    """Losses and, in `gradients` and `reward_gradient`, the gradients of the last batch; on tangents, theirs."""
    steps = len(batches.rows)
    keep = [
        array("q", part) for part in (shape.widths, shape.spread_widths, batches.rows, batches.seeds, _at(values),
                                      _at(gradients), () if tangents is None else _at(tangents))
    ]  # fmt: skip
    widths, spread_widths, rows, seeds, at, gradients_at, tangents_at = (part.buffer_info()[0] for part in keep)
    losses, lengths = array("d", bytes(8 * steps)), array("d", bytes(8 * steps if norms else 0))
    given: dict[str, Any] = {
        "rule": 0, "nesterov": 0, "beta1": 0.0, "beta2": 0.0, "epsilon": 0.0, "weight_decay": 0.0, "momentum": 0.0,
        "dampening": 0.0, "max_norm": 0.0, "steps_before": 0,
    }  # fmt: skip
    if rule is not None:
        given |= rule
        for name, kind in (("rates", "d"), ("first", "q"), ("second", "q")):
            keep.append(array(kind, given[name] if kind == "d" else _at(given[name])))
            given[name] = keep[-1].buffer_info()[0]
    code, refused, _ = extension.module.network_loss(  # type: ignore[union-attr]
        is_double=inputs.dtype == torch.float64, dual=tangents is not None, rows=inputs.shape[0],
        threads=torch.get_num_threads(), head=HEADS[shape.head], activation=ACTIVATIONS[shape.activation],
        spread=SPREADS[shape.spread], lowest=shape.bounds[0], highest=shape.bounds[1], depth=len(shape.widths) - 1,
        spread_depth=max(len(shape.spread_widths) - 1, 0), widths=widths, spread_widths=spread_widths,
        dim=shape.widths[-1], observations=target.numel() // max(_numbers(shape, inputs), 1),
        precision_ndim=reward.ndim, l2=l2, inputs=inputs.data_ptr(), target=target.data_ptr(),
        reward=reward.data_ptr(), reward_tangent=0 if reward_tangent is None else reward_tangent.data_ptr(),
        grad_reward=0 if reward_gradient is None else reward_gradient.data_ptr(), steps=steps, batch_rows=rows,
        index=0 if batches.places is None else batches.places.data_ptr(), seeds=seeds, values=at,
        gradients=gradients_at, tangents=0 if tangents is None else tangents_at, losses=losses.buffer_info()[0],
        norms=lengths.buffer_info()[0] if norms else 0, estimator=ESTIMATORS[config.estimator],
        advantage=ADVANTAGES[config.advantage].number, num_samples=config.num_samples,
        entropy_coef=config.entropy_coef, rbf_gamma=config.rbf_gamma, **given,
    )  # fmt: skip
    return Results(losses[:refused], lengths[:refused]) if code else Results(losses, lengths)


def _numbers(shape: Shape, inputs: Tensor) -> int:
    """Of the targets of all rows, once."""
    return inputs.shape[0] * (1 if shape.head == "categorical" else shape.widths[-1])


def _at(tensors: Optionals) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
