"""The advantages over a group of samples: number, formula and definition of each, in plain torch.

A compiled backend has its own code for each number: `csrc/include/po_kernels/group.hpp`, `numba/group.py` and
`triton/group.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STANDARDIZED_EPS = 1e-6


class Advantage(NamedTuple):
    """One kind of advantage.

    Attributes:
        number: what compiled kernels know it by.
        formula: as the documentation has it.
        define: rewards (G, *) -> advantages (G, *), differentiable.
        least: the least G that it is defined for.
    """

    number: int
    formula: str
    define: Callable[[Tensor], Tensor]
    least: int = 1


def _centred(rewards: Tensor) -> Tensor:
    # On the first sample before the mean is taken: a group of equal rewards is then exactly zero.
    shifted = rewards - rewards[:1]
    return shifted - shifted.mean(dim=0, keepdim=True)


def _spread(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x - mean x) / unit, the standard deviation over unit, unit, and whether the members of a group differ.

    In float64, where the squares and inverses of float32 numbers, the subnormal ones too, are normal numbers; relative
    to the largest member, so that those of float64 are.
    """
    x = values.double()
    unit = x.detach().abs().amax(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    centred = _centred(x / unit)
    variance = centred.square().mean(dim=0, keepdim=True)
    varies = variance.detach() != 0  # a nan goes on as such
    return centred, torch.where(varies, variance, 1.0).sqrt(), unit, varies


def group_std(values: Tensor) -> Tensor:
    """Standard deviation of (G, *) over the leading axis with G in the denominator."""
    _, std, unit, varies = _spread(values)
    return torch.where(varies, std * unit, 0.0).squeeze(0).to(values.dtype)


def _standardized(rewards: Tensor) -> Tensor:
    centred, std, unit, varies = _spread(rewards)
    return torch.where(varies, centred / (std + STANDARDIZED_EPS / unit), 0.0).to(rewards.dtype)


ADVANTAGES = {
    "none": Advantage(0, "A = r", lambda r: r),
    "min": Advantage(1, "A = r - min r, the minimum held constant", lambda r: r - r.detach().amin(dim=0, keepdim=True)),
    "mean": Advantage(2, "A = r - mean r", _centred),
    "loo": Advantage(
        3,
        "A = G/(G-1) (r - mean r), the leave-one-out baseline (Kool et al. 2019)",
        lambda r: _centred(r) * (r.shape[0] / (r.shape[0] - 1)),
        least=2,
    ),
    "standardized": Advantage(
        4,
        "A = (r - mean r) / (std r + 1e-6), G in the denominator of std (GRPO, arXiv 2402.03300); "
        "a group whose rewards are all equal has A = 0 and passes no derivative",
        _standardized,
    ),
}
