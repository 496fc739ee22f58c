"""Optimisers with the settings that the deterministic problems of this package need, and several as one."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

# Pairs of steps and gradients that L-BFGS remembers.
LBFGS_HISTORY = 10
# The most evaluations of the loss in one step of it.
LINE_SEARCH = 25
# Where a deterministic problem counts as solved: the Euclidean norm of the loss's gradient.
SOLVED = 1e-5


def lbfgs(
    parameters: Iterable[torch.nn.Parameter], tolerance: float = SOLVED, history: int = LBFGS_HISTORY
) -> Optimizer:
    """L-BFGS with a strong Wolfe line search, one iteration a step, so that `train` counts and stops the iterations.

    Args:
        tolerance: Euclidean norm of the gradient at which the caller will stop; the optimiser goes on a little further.
        history: pairs of steps and gradients to remember.
    """
    held = list(parameters)
    # Without max_eval it is 1.25 max_iter, which leaves the line search no evaluation.
    return torch.optim.LBFGS(
        held, max_iter=1, max_eval=LINE_SEARCH, history_size=history,
        tolerance_grad=0.1 * tolerance / math.sqrt(sum(p.numel() for p in held)), tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip


class Together:
    """Optimisers of groups of parameters, each with a state of its own, as one.

    Raises:
        ValueError: a parameter that two of them have.
    """

    def __init__(self, name: str, optimizers: Sequence[Optimizer]) -> None:
        self.each: tuple[Optimizer, ...] = tuple(optimizers)
        held = [id(p) for group in self.param_groups for p in group["params"]]
        if len(set(held)) < len(held):
            raise ValueError(f"{name}: expected optimisers of different parameters, got some that share one")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.each for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.each:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"each": [optimizer.state_dict() for optimizer in self.each]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, part in zip(self.each, state["each"], strict=True):
            optimizer.load_state_dict(part)
