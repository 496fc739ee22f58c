"""Where a tensor's values may lie: layouts of one tensor, and tensors that share memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.ops.cases import Case


@dataclass(frozen=True)
class Placed(Case):
    """A case whose tensors are taken as they lie: its leaves share their memory."""

    @property
    def inputs(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self.tensors.values()]


def _strided(x: Tensor) -> Tensor:
    """Every other entry of a buffer, from the second on; what lies between may not be read."""
    shape = (*x.shape[:-1], 2 * x.shape[-1] + 1) if x.ndim else (3,)
    buffer = x.new_full(shape, float("nan") if x.is_floating_point() else -(2**20))
    view = buffer[..., 1::2] if x.ndim else buffer[1]
    return view.copy_(x)


def _transposed(x: Tensor) -> Tensor:
    axes = tuple(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def _negated(x: Tensor) -> Tensor:
    """The negative lies in memory, and a bit says so."""
    return torch._neg_view(_strided(-x)) if x.is_floating_point() else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "strided": _strided,
    "transposed": _transposed,
    "negated": _negated,
    "expanded": lambda x: x,
    "aliased": lambda x: x,
}


def place(case: Case, memory: str, lead: int) -> Placed:
    """The case with its tensors in that memory; "expanded" and "aliased" make some values equal.

    Args:
        lead: how many leading dimensions the batch has.
    """
    move = LAYOUTS[memory]
    tensors = {name: move(x) for name, x in case.tensors.items()}
    constants = {name: move(x) for name, x in case.constants.items()}
    if memory == "expanded":
        tensors = {name: _expanded(name, x, lead) for name, x in tensors.items()}
        constants = {name: _expanded(name, x, lead) for name, x in constants.items()}
    elif memory == "aliased":
        first, head = next(iter(tensors.items()))
        samples = constants.get("samples")
        if samples is not None and samples.shape[1:] == head.shape:
            tensors[first] = head = samples[0]
        for name in ("log_std", "target", "value"):
            if name in tensors and tensors[name].shape == head.shape:
                tensors[name] = head
    return Placed(case.op, tensors, constants, case.options, case.terms)


def _expanded(name: str, x: Tensor, lead: int) -> Tensor:
    """One row for all along the first axis of the batch, or one number for a diagonal."""
    if name == "precision":
        return x[:1].expand(x.shape) if x.ndim == 1 else x
    events = {"mean": 1, "log_std": 1, "scale_tril": 2, "target": 1, "logits": 1, "rewards": 0, "samples": None}
    if name not in events or lead == 0:
        return x
    axis = 1 if name in ("rewards", "samples") else 0
    if axis == 0 and x.ndim != lead + events[name] and name != "target":
        return x  # a scale that the batch shares
    if axis >= x.ndim:
        return x
    return x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape)


def unaliased(case: Case) -> Case:
    """The same values, each tensor in memory of its own."""

    def own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.resolve_neg().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}

    return replace(
        Case(case.op, case.tensors, case.constants, case.options, case.terms),
        tensors=own(case.tensors),
        constants=own(case.constants),
    )
