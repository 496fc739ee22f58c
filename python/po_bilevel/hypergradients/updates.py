"""A step of torch's SGD, Adam and AdamW as a function of parameter, gradient, state and hyperparameters.

torch's own functional forms write into what they are given, and `torch.optim.sgd.sgd` detaches the first gradient that
momentum remembers; these give the same numbers, differentiably in all of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interface import Tensors

Number = float | Tensor
OptimizerFactory = Callable[[list[Tensor], Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Rule:
    """How a parameter moves.

    Attributes:
        update: (parameter, gradient, state, number of the step from 1) -> (parameter, *state).
        size: tensors of the state, of the parameter's shape and zero to begin with.
    """

    update: Callable[[Tensor, Tensor, Tensors, int], Tensors]
    size: int = 0


def rules(make: OptimizerFactory, theta: Tensors, phi: Any) -> list[Rule]:
    """One for each of θ, from the parameter groups of the optimiser that `make` makes of θ and φ.

    Raises:
        ValueError: it cannot be unrolled, has a hyperparameter of several elements, or other parameters than θ.
    """
    stand_ins = [t.detach().requires_grad_() for t in theta]
    optimizer = make(list(stand_ins), phi)
    if type(optimizer) not in _UPDATES:
        names = ", ".join(each.__name__ for each in _UPDATES)
        raise ValueError(f"optimizer: expected one that can be unrolled, {names}, got {type(optimizer).__name__}")
    places = {id(t): place for place, t in enumerate(stand_ins)}
    # What is in no group stays as it is.
    found = [Rule(lambda parameter, gradient, state, step: (parameter,)) for _ in theta]
    for group in optimizer.param_groups:
        options = {name: _scalar(name, value) for name, value in group.items() if name != "params"}
        for parameter in group["params"]:
            if id(parameter) not in places:
                raise ValueError("optimizer: expected parameters that are among those given, got others")
            found[places[id(parameter)]] = _UPDATES[type(optimizer)](**options)
    return found


def gradient_descent(learning_rate: float) -> Rule:
    return Rule(lambda parameter, gradient, state, step: (parameter - learning_rate * gradient,))


def _scalar(name: str, value: Any) -> Any:
    """A hyperparameter, or a pair of them, whose tensors have the shape ()."""
    if isinstance(value, (tuple, list)):
        return tuple(_scalar(name, each) for each in value)
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"optimizer: {name}: expected one element, got shape {tuple(value.shape)}")
    return value.reshape(())


def _used(hyperparameter: Number) -> bool:
    """A zero that is learned is one that matters."""
    return isinstance(hyperparameter, Tensor) or hyperparameter != 0


def _sgd(
    *, lr: Number, momentum: Number, dampening: Number, weight_decay: Number, nesterov: bool, maximize: bool, **_: Any
) -> Rule:  # fmt: skip
    def update(parameter: Tensor, gradient: Tensor, state: Tensors, step: int) -> Tensors:
        along = -gradient if maximize else gradient
        if _used(weight_decay):
            along = along + weight_decay * parameter
        if not state:
            return (parameter - lr * along,)
        buffer = along if step == 1 else momentum * state[0] + (1 - dampening) * along
        return parameter - lr * (along + momentum * buffer if nesterov else buffer), buffer

    return Rule(update, size=int(_used(momentum)))


def _adam(
    *, lr: Number, betas: Sequence[Number], eps: Number, weight_decay: Number, amsgrad: bool, maximize: bool,
    decoupled_weight_decay: bool, **_: Any,
) -> Rule:  # fmt: skip
    def update(parameter: Tensor, gradient: Tensor, state: Tensors, step: int) -> Tensors:
        along = -gradient if maximize else gradient
        if _used(weight_decay) and decoupled_weight_decay:
            parameter = parameter * (1 - lr * weight_decay)
        elif _used(weight_decay):
            along = along + weight_decay * parameter
        first = betas[0] * state[0] + (1 - betas[0]) * along
        second = betas[1] * state[1] + (1 - betas[1]) * along.square()
        largest = torch.maximum(state[2], second) if amsgrad else second
        # Where no gradient has been, the first moment is zero too, and the root's infinite derivative has no part.
        seen = largest > 0
        root = torch.where(seen, (torch.where(seen, largest, 1.0) / (1 - betas[1] ** step)).sqrt(), 0.0)
        moved = parameter - lr / (1 - betas[0] ** step) * first / (root + eps)
        return (moved, first, second, largest) if amsgrad else (moved, first, second)

    return Rule(update, size=2 + amsgrad)


_UPDATES: dict[type, Callable[..., Rule]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
}
