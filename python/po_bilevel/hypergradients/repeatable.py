"""Losses that draw the same random numbers each time that they are evaluated."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .eager import eagerly
from .equations import Residual
from .interface import Loss, Tensors
from .trees import Point


class Repeatable:
    """A loss under torch's default generators at one state, whatever was drawn before; these move on by nothing.

    Attributes:
        parts: those of the loss, if it is a mean of several, each under the same state.

    Args:
        name: of the argument that the loss was.
        loss: (θ, φ) -> (). With an attribute `repeatable` that is True it is evaluated once at the first point.
        seed: of the generators.
        devices: indices of the CUDA devices whose generators are meant, besides the CPU's.
    """

    def __init__(self, name: str, loss: Loss, seed: int, devices: list[int]) -> None:
        self._draws = False
        self._problems: tuple[str, ...] = ()
        self._name, self._loss, self._seed = name, loss, seed
        self._devices = devices
        # What says that it is, need not be compared.
        self._compared = getattr(loss, "repeatable", False) is True
        self.parts: list[Repeatable] = [Repeatable(name, part, seed, devices) for part in getattr(loss, "parts", ())]

    @property
    def draws(self) -> bool:
        """It has drawn from them."""
        return self._draws or any(part.draws for part in self.parts)

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence if two evaluations at the first point differed all the same."""
        return self._problems or next((part.problems for part in self.parts if part.problems), ())

    def __call__(self, theta: Tensors, phi: Tensors) -> Tensor:
        if self._compared:
            return self._evaluate(theta, phi)
        self._compared = True
        # As a number: its graph is gone before there is another.
        before = _number(self._evaluate(theta, phi))
        loss = self._evaluate(theta, phi)
        after = _number(loss)
        # Sums whose order is not fixed, as on a GPU, are no randomness.
        if before is not None and after is not None and not math.isclose(
            before, after, rel_tol=torch.finfo(theta[0].dtype).eps ** 0.5
        ):  # fmt: skip
            self._problems = (
                f"{self._name}: two evaluations at one point differ, {before:.6g} and {after:.6g}: it draws from other "
                "generators than torch's default ones, or has a state; give it a fixed seed",
            )
        return loss

    def _evaluate(self, theta: Tensors, phi: Tensors) -> Tensor:
        with torch.random.fork_rng(devices=self._devices):
            generators = [torch.default_generator, *(torch.cuda.default_generators[index] for index in self._devices)]
            for generator in generators:
                generator.manual_seed(self._seed)
            states = [generator.get_state() for generator in generators]
            if torch.is_autocast_enabled(theta[0].device.type):
                # It knows nothing of parameters that were changed in place since.
                torch.clear_autocast_cache()
            loss = self._loss(theta, phi)
            self._draws |= any(not torch.equal(g.get_state(), s) for g, s in zip(generators, states, strict=True))
            return loss


@contextlib.contextmanager
def repeatable(point: Point, **losses: Loss) -> Iterator[list[Repeatable]]:
    """The losses by their names, on the devices of θ and φ, with one seed that torch's default generator gives.

    Where one of them draws, that generator has moved on at the end, so that the next seed is another; else it has not.
    """
    with torch.random.fork_rng(devices=[]):
        # Not the next number, which the method may make a seed of.
        seed = int(torch.randint(2**62, (2,))[1])
    devices = sorted({tensor.get_device() for tensor in point.theta + point.phi if tensor.is_cuda})
    made = [Repeatable(name, loss, seed, devices) for name, loss in losses.items()]
    with eagerly():
        yield made
    if any(each.draws for each in made):
        torch.randint(2**62, (2,))


def _number(loss: Any) -> float | None:
    """None of what is no loss: whoever asked for it will say so."""
    if isinstance(loss, Residual):
        loss = loss.size
    return float(loss.detach()) if isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point() else None
