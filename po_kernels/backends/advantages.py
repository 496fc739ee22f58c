"""The advantages over a group of samples: number, formula and definition of each, in plain torch.

A compiled backend has its own code for each number: `csrc/include/po_kernels/advantage.hpp`,
`numba/group.py` and `triton/group.py`.
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


def _relative(values: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations from the mean and their standard deviation, both over unit, and whether they are not all zero.

    Relative to the largest, squares neither overflow nor vanish.
    """
    centred = _centred(values) / unit
    variance = centred.square().mean(dim=0, keepdim=True)
    varies = variance.detach() != 0  # a nan goes on as such
    return centred, torch.where(varies, variance, 1.0).sqrt(), varies


def _unit(values: Tensor) -> Tensor:
    """The largest deviation of a group, or 1."""
    largest = _centred(values.detach()).abs().amax(dim=0, keepdim=True)
    return torch.where(largest != 0, largest, 1.0)


def group_std(values: Tensor) -> Tensor:
    """Standard deviation of (G, *) over the leading axis with G in the denominator."""
    unit = _unit(values)
    _, std, varies = _relative(values, unit)
    return torch.where(varies, std * unit, 0.0).squeeze(0)


def _standardized(rewards: Tensor) -> Tensor:
    # Derivatives divide by the square of the deviation: that of tiny rewards is a normal number in float64 alone.
    tiny = _unit(rewards) < (2.0**-60 if rewards.dtype == torch.float32 else 2.0**-500)
    usual = torch.where(tiny, 0.0, rewards)
    unit = _unit(usual)
    centred = _centred(usual)
    _, std, varies = _relative(usual, unit)
    advantages = torch.where(varies, centred / (std * unit + STANDARDIZED_EPS), 0.0)
    rest = torch.where(tiny, rewards, 0.0).double()
    unit = rest.detach().abs().amax(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    centred, std, varies = _relative(rest, unit)
    return advantages + torch.where(varies, centred / (std + STANDARDIZED_EPS / unit), 0.0).to(rewards.dtype)


ADVANTAGES = {
    "none": Advantage(0, "A = r", lambda r: r.clone()),
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
