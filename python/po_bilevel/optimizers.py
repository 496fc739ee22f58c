"""Optimisers with the settings that the deterministic problems of this package need."""

import math
from collections.abc import Iterable

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
