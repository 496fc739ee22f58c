"""How far from the exact result a backend may be: a bound for each tensor of a call, from its size and conditioning."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from po_kernels.backends.reference import philox

from .cases import Case, cotangent_like, derivatives, directions, distance, largest, repeats_second_order, uniform

# A sound algorithm returns the rounded result of slightly other inputs. So the error of a tensor is, in units of eps,
# about the sum of
#   - its largest entry: the result is rounded, and so are its terms;
#   - how far the exact result goes, over STEP, when all inputs, cotangents and directions move by up to STEP of their
#     largest entry, each entry at random: as the rounding errors of its n terms add up, and are magnified; normal
#     numbers move by up to π STEP, as they do when their angle of up to 2π is rounded, however small they are;
#   - twice the error of plain torch in float32, over the eps of float32: where terms cancel whatever the inputs, as
#     those of the derivative of two samples' standardized advantages, the two others see nothing of them.
# The last two are the largest of a few draws, and a draw for a tensor of one entry may be some times smaller than
# usual: hence the FACTOR. The largest error seen, of any op and backend in 200 cases each, was 3.2 units.
# Of a tensor that is zero but for rounding, as the gradient in a single logit, all terms may cancel to the last bit in
# every draw: its unit is the largest entry of any tensor of its order.
# Of a token, the rounding of a p near 1 stays in α (1 - p), and that of t near 1 in a capped logit's slope 1 - t². Both
# are 1 to the last bit in plain torch, which then sees nothing of them: a unit is at least what they multiply.
FACTOR = 4
STEP = 2.0**-18  # far above the eps of float64, and derivatives are straight within it
MOVES = 2
ZERO = 1e-14

Derivatives = dict[str, list[Tensor]]


def near(found: Tensor, right: Tensor, roundings: int, size: float | None = None) -> None:
    """Two computations of a tensor, of so many roundings each, of numbers up to `size`: half an eps a rounding in each.

    Args:
        size: if None 1, of which normal numbers are, or the largest entry where that is more.
    """
    size = max(1.0, largest([right])) if size is None else size
    error, bound = distance([found], [right]), roundings * torch.finfo(found.dtype).eps * size
    assert error <= bound, f"off by {error:.3g}, more than {bound:.3g}"


@dataclass(frozen=True)
class Expected:
    """The derivatives of a call, computed in float64, and how far from each a backend may be.

    Attributes:
        units: of each tensor, what an eps stands for.
        factor: how many of them a tensor may be off.
    """

    case: Case
    seed: int
    second: bool
    exact: Derivatives
    units: dict[str, list[float]]
    factor: float = FACTOR

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.case.tensors.values())).dtype

    def bound(self, order: str, index: int) -> float:
        return self.factor * torch.finfo(self.dtype).eps * self.units[order][index]

    def complaints(self, found: Derivatives) -> list[str]:
        """A line for each tensor that is further off."""
        assert found.keys() == self.exact.keys()
        lines = []
        for order, tensors in found.items():
            for index, (x, y) in enumerate(zip(tensors, self.exact[order], strict=True)):
                assert x.dtype == self.dtype
                error, bound = distance([x], [y]), self.bound(order, index)
                if not error <= bound:
                    lines.append(f"{order} {index} off by {error:.3g}, more than {bound:.3g}: {self.seed} {self.case}")
        return lines


def expected(case: Case, seed: int = 0, *, second: bool = True, units_of: Expected | None = None) -> Expected:
    """What a call returns, in second order where it has it. The units may be those of the call in another dtype."""
    second = second and repeats_second_order(case)
    exact = derivatives(case.to(torch.float64), "reference", seed, second=second)
    return Expected(case, seed, second, exact, units_of.units if units_of else _units(case, seed, second, exact))


def agrees(case: Case, backend: str, seed: int = 0, *, second: bool = True, factor: float = FACTOR) -> None:
    """Value, statistics, first and second derivatives are within their bounds."""
    right = replace(expected(case, seed, second=second), factor=factor)
    lines = right.complaints(derivatives(case, backend, seed, second=right.second))
    assert not lines, "\n".join(lines)


def _units(case: Case, seed: int, second: bool, exact: Derivatives) -> dict[str, list[float]]:
    def plain(case: Case, move: Callable[..., Tensor] = lambda x, *_: x) -> Derivatives:
        with mock.patch.object(philox, "normal", lambda *arguments: move(normal(*arguments), math.pi)):
            return derivatives(case, "reference", seed, second=second, move=move)

    def distances(found: Derivatives, other: Derivatives) -> list[float]:
        return [distance([x], [y]) for order in exact for x, y in zip(found[order], other[order], strict=True)]

    normal, moved, rounding = philox.normal, [], []
    for number in range(MOVES + 1):
        case_there = case.to(torch.float64)
        if number:
            move = _mover(number)
            case_there = replace(
                case_there,
                tensors={name: move(x) for name, x in case_there.tensors.items()},
                constants={name: move(x) for name, x in case_there.constants.items()},
            )
            moved.append(distances(plain(case_there, move), exact))
        in_float32 = case_there.to(torch.float32)
        rounding.append(distances(plain(in_float32), plain(in_float32.to(torch.float64))))
    sizes = iter(
        largest([x]) + max(steps) / STEP + 2 * max(errors) / torch.finfo(torch.float32).eps
        for x, steps, errors in zip(
            (x for order in exact for x in exact[order]), zip(*moved, strict=True), zip(*rounding, strict=True),
            strict=True,
        )
    )  # fmt: skip
    units = {}
    for order, tensors in exact.items():
        zero = ZERO * largest(tensors)
        units[order] = [
            size if largest([x]) > zero else max(size, largest(tensors))
            for x, size in zip(tensors, sizes, strict=False)
        ]
    if case.op == "token_log_prob":
        multiplied = largest([cotangent_like(exact["value"][0], seed)])
        for order, factor in (("first", 1.0), ("second", largest(directions(case, seed)))):
            if order in units:
                units[order][0] = max(units[order][0], multiplied * factor)
    return units


def _mover(number: int) -> Callable[..., Tensor]:
    rng = random.Random(f"moved {number}")

    def move(x: Tensor, size: float | None = None) -> Tensor:
        if not x.is_floating_point():
            return x
        size = largest([x]) if size is None else size
        return x + STEP * size * (2 * uniform(rng, *x.shape) - 1)

    return move
