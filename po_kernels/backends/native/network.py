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


_NO_RULE = {
    "rule": 0, "nesterov": 0, "beta1": 0.0, "beta2": 0.0, "epsilon": 0.0, "weight_decay": 0.0, "momentum": 0.0,
    "dampening": 0.0, "max_norm": 0.0, "steps_before": 0,
}  # fmt: skip


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


class Prepared(NamedTuple):
    """Arguments of the kernel, what they point to, and where it writes the results."""

    arguments: dict[str, Any]
    results: Results
    keep: list[Any]


def prepared(
    shape: Shape, inputs: Tensor, target: Tensor, reward: Tensor | None, config: OpConfig, l2: float,
    batches: Batches, *, values: Optionals, gradients: Optionals, tangents: Optionals | None = None,
    reward_gradient: Tensor | None = None, reward_tangent: Tensor | None = None, norms: bool = False,
    rule: dict[str, Any] | None = None,
) -> Prepared:  # fmt: skip
    """A problem, whose gradients of the last batch, or on tangents their derivatives, are to be put in `gradients`."""
    steps = len(batches.rows)
    keep: list[Any] = []
    losses, lengths = array("d", bytes(8 * steps)), array("d", bytes(8 * steps if norms else 0))
    given: dict[str, Any] = _NO_RULE if rule is None else _NO_RULE | rule | {
        name: listed(kind, rule[name], keep) for name, kind in (("rates", "d"), ("first", "q"), ("second", "q"))
    }  # fmt: skip
    arguments = dict(
        is_double=inputs.dtype == torch.float64, dual=tangents is not None, rows=inputs.shape[0],
        threads=torch.get_num_threads(), head=HEADS[shape.head], activation=ACTIVATIONS[shape.activation],
        spread=SPREADS[shape.spread], lowest=shape.bounds[0], highest=shape.bounds[1], depth=len(shape.widths) - 1,
        spread_depth=max(len(shape.spread_widths) - 1, 0), widths=listed("q", shape.widths, keep),
        spread_widths=listed("q", shape.spread_widths, keep), dim=shape.widths[-1],
        observations=target.numel() // _numbers(shape, inputs), l2=l2,
        precision_ndim=0 if reward is None else reward.ndim, inputs=inputs.data_ptr(), target=target.data_ptr(),
        reward=0 if reward is None else reward.data_ptr(),
        reward_tangent=0 if reward_tangent is None else reward_tangent.data_ptr(),
        grad_reward=0 if reward_gradient is None else reward_gradient.data_ptr(), steps=steps,
        batch_rows=listed("q", batches.rows, keep), seeds=listed("q", batches.seeds, keep),
        index=0 if batches.places is None else batches.places.data_ptr(), values=listed("q", values, keep),
        gradients=listed("q", gradients, keep), tangents=0 if tangents is None else listed("q", tangents, keep),
        losses=losses.buffer_info()[0], norms=lengths.buffer_info()[0] if norms else 0,
        estimator=ESTIMATORS[config.estimator], advantage=ADVANTAGES[config.advantage].number,
        num_samples=config.num_samples, entropy_coef=config.entropy_coef, rbf_gamma=config.rbf_gamma, **given,
    )  # fmt: skip
    keep += [inputs, target, reward, batches.places, *values, *gradients, *(tangents or ()), reward_tangent]
    return Prepared(arguments, Results(losses, lengths), keep)


def run(problems: Sequence[Prepared]) -> list[Results]:
    """Of each problem; all in one call, whose threads share them out. It ends with one that is refused."""
    first, *others = (problem.arguments for problem in problems)
    batch: tuple[Any, ...] = ()
    if others:
        differ = [name for name, value in first.items() if any(other[name] != value for other in others)]
        batch = (len(problems), {name: [problem.arguments[name] for problem in problems] for name in differ})
    code, step, number = extension.module.network_loss(*batch, **first)  # type: ignore[union-attr]
    found = [problem.results for problem in problems]
    if code:
        found[number] = Results(*(numbers[:step] for numbers in found[number]))
    return found


def listed(kind: str, items: Sequence[Any], keep: list[Any]) -> int:
    """The address of numbers, or of the addresses of tensors."""
    if kind == "q":
        items = [0 if x is None else x.data_ptr() if isinstance(x, Tensor) else x for x in items]
    keep.append(array(kind, items))
    return keep[-1].buffer_info()[0]


def _numbers(shape: Shape, inputs: Tensor) -> int:
    """Of the targets of all rows, once."""
    return inputs.shape[0] * (1 if shape.head == "categorical" else shape.widths[-1])
