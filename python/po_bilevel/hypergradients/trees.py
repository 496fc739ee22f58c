"""θ and φ as they come, any pytree of tensors, and as the flat tuple that the methods compute with."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree

from .interface import Hypergradient, Tensors
from .minibatches import Minibatches

Tree = Any


class Leaves(tuple[Tensor, ...]):
    """The variables of a `Structure`, which know their names."""

    structure: "Structure"

    @property
    def names(self) -> tuple[str, ...]:
        """Such as phi[0] or theta['layer']['weight']."""
        return self.structure.names


class Structure:
    """A pytree of tensors, some of which are variables.

    A list or an iterator of tensors, such as `module.parameters()`, counts as the tuple of them.

    Attributes:
        leaves: the variables, in the order of the tree.

    Args:
        name: of the argument.
        tree: what came.
        variable: which of its tensors are variables, those that require grad as it stands. The others are constants:
            the losses are given them as they are, and what is made in the form of the tree has None in their place.

    Raises:
        TypeError: something in it is no tensor.
        ValueError: it has no tensor, or none that is a variable.
    """

    def __init__(
        self, name: str, tree: Tree, variable: Callable[[Tensor], bool] = lambda tensor: tensor.requires_grad
    ) -> None:  # fmt: skip
        tree = _tuple(tree)
        self._name, self._tree = name, tree
        self._all, self._form = _pytree.tree_flatten(tree)
        if not self._all:
            raise ValueError(f"{name}: expected at least one tensor, got none")
        for place, leaf in enumerate(self._all):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{self._named(place)}: expected a tensor, got {type(leaf).__name__}")
        self._places = [place for place, leaf in enumerate(self._all) if variable(leaf)]
        if not self._places:
            raise ValueError(
                f"{self._named(0)}: expected a tensor that requires grad, got one that does not, as all of them"
            )
        # What is a tuple already needs no making.
        self._plain = (
            type(tree) is tuple and len(self._places) == len(tree) and all(isinstance(t, Tensor) for t in tree)
        )  # fmt: skip
        self.leaves: Leaves = Leaves(self._all[place] for place in self._places)
        self.leaves.structure = self

    def _named(self, place: int) -> str:
        return self._name + _pytree.keystr(_pytree.tree_flatten_with_path(self._tree)[0][place][0])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variables."""
        return tuple(map(self._named, self._places))

    def filled(self, tensors: Tensors) -> Tree:
        """The tree with other tensors in place of the variables."""
        return tensors if self._plain else self._made(tensors, list(self._all))

    def alone(self, tensors: Tensors | None) -> Tree:
        """The tree of what belongs to the variables, with None for the constants."""
        return tensors if self._plain or tensors is None else self._made(tensors, [None] * len(self._all))

    def _made(self, tensors: Tensors, leaves: list[Any]) -> Tree:
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return _pytree.tree_unflatten(leaves, self._form)

    def taken(self, what: str, tree: Tree) -> Tensors:
        """The tensors of another tree in the places of the variables.

        Raises:
            ValueError: it has another form, or tensors of other shapes; what names it.
        """
        try:
            # Of dicts in whatever order.
            leaves = self._form.flatten_up_to(_tuple(tree))
        except ValueError as error:
            raise ValueError(f"{what}: expected shapes like {self._name}, got another form: {error}") from None
        expected, came = [], []
        taken = tuple(leaves[place] for place in self._places)
        for leaf, like in zip(taken, self.leaves, strict=True):
            expected.append(tuple(like.shape))
            came.append(tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__)
        if came != expected:
            raise ValueError(f"{what}: expected shapes {expected} like {self._name}, got {came}")
        return taken


def _tuple(tree: Tree) -> Tree:
    return tuple(tree) if isinstance(tree, (list, Iterator)) else tree


class Point:
    """θ and φ, as trees and as tuples.

    Attributes:
        theta, phi: their variables; those of θ are leaves of autograd, for how θ was come by, maybe from φ, is no part
            of the losses.
    """

    def __init__(self, theta: Structure, phi: Structure) -> None:
        self._theta, self._phi = theta, phi
        self.theta: Tensors = tuple(t if t.is_leaf else t.detach().requires_grad_() for t in theta.leaves)
        self.phi: Leaves = phi.leaves

    def flat(self, function: Callable[[Tree, Tree], Any]) -> Callable[[Tensors, Tensors], Any]:
        """A function of trees as one of tuples."""

        def of_tuples(theta: Tensors, phi: Tensors) -> Any:
            return function(self._theta.filled(theta), self._phi.filled(phi))

        of_tuples.repeatable = getattr(function, "repeatable", False)  # type: ignore[attr-defined]
        parts = function.parts if isinstance(function, Minibatches) else ()
        of_tuples.parts = list(map(self.flat, parts))  # type: ignore[attr-defined]
        return of_tuples

    def map(self, function: Callable[[Tree], Tree]) -> Callable[[Tensors], Tensors]:
        """A function from trees like θ to such trees as one of tuples."""
        return lambda tensors: self._theta.taken("preconditioner", function(self._theta.alone(tensors)))

    def tree_of_phi(self, phi: Tensors) -> Tree:
        return self._phi.filled(phi)

    def theta_of(self, what: str, tree: Tree) -> Tensors:
        """See `Structure.taken`."""
        return self._theta.taken(what, tree)

    def start(self, start: Tree | None) -> Tensors | None:
        return None if start is None else self._theta.taken("start", start)

    def result(self, found: Hypergradient) -> Hypergradient:
        """A result in tuples as one in trees."""
        return dataclasses.replace(
            found, gradient=self._phi.alone(found.gradient), solution=self._theta.alone(found.solution),
            theta=None if found.theta is None else self._theta.filled(found.theta),
        )  # fmt: skip
