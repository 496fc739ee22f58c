"""A loss over more rows than one graph can hold."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interface import Loss


@dataclass(frozen=True)
class Minibatches:
    """L as the mean of a loss over batches: a product is the mean of their products (stocBiO, Ji et al. 2021).

    A method by the implicit function theorem has the graph of one batch at a time, which it makes anew for each
    product, and an outer loss is differentiated one batch at a time; methods that unroll, or take first derivatives
    only, have all of an inner loss. All products of a solve are of the same batches, so that the system is one and
    conjugate gradients serve; draw the batches anew for each call, apart from those of the inner steps.

    Attributes:
        loss: (θ, φ, batch) -> ().
        batches: of equal weight, of any type.

    Example:
        >>> import torch
        >>> halves = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> inner = Minibatches(lambda theta, phi, x: (theta - phi * x).square().mean(), halves)
        >>> phi = torch.tensor(1.0, requires_grad=True)
        >>> ImplicitCG()(inner, lambda theta, phi: theta, torch.tensor(3.0, requires_grad=True), phi).gradient
        tensor(3.)
    """

    loss: Callable[[Any, Any, Any], Tensor]
    batches: Sequence[Any]

    def __post_init__(self) -> None:
        if len(self.batches) == 0:
            raise ValueError("Minibatches: batches: expected at least one, got none")

    @property
    def parts(self) -> list[Loss]:
        """The loss of each batch."""
        return [functools.partial(self._of, batch) for batch in self.batches]

    def _of(self, batch: Any, theta: Any, phi: Any) -> Tensor:
        return self.loss(theta, phi, batch)

    def __call__(self, theta: Any, phi: Any) -> Tensor:
        """L."""
        return torch.stack([part(theta, phi) for part in self.parts]).mean()
