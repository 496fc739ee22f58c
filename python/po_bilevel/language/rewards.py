"""Rewards of texts: r_φ(ŷ, y) of their embeddings, and gates that ask for a form.

Embeddings are constants. What is learned is φ, so a reward has one backward pass that knows nothing of the embedder.
"""

import numbers
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..rewards import MIN_PRECISION, PositivePrecision, PrecisionKind, Reward
from ..training import check_count
from .embedders import Embedder, EmbeddingCache, as_rows

Metric = Literal["mahalanobis", "cosine"]
GateMode = Literal["mask", "multiply"]


class GateValues(NamedTuple):
    """What gates make of N completions."""

    keep: Tensor  # (N,), bool; a completion that is not kept takes no part in its group
    factor: Tensor  # (N,), in [0, 1], for `gated`


@dataclass(frozen=True)
class Gate:
    """A condition on the form of an answer, such as a pattern that it has to match.

    Attributes:
        function: (prompt, answer) -> a bool, or a number in [0, 1]; what else it gives is a TypeError or ValueError.
        mode: "mask" leaves an answer out if the function gives 0 or False; "multiply" multiplies by what it gives. A
            ValueError names another one, a TypeError a function that cannot be called.

    Example:
        >>> Gate(lambda prompt, answer: answer.endswith("."))("Why?", "Because.")
        1.0
    """

    function: Callable[[str, str], Any]
    mode: GateMode = "mask"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"Gate: function: expected one of (prompt, answer), got {self.function!r:.80}")
        if self.mode not in get_args(GateMode):
            raise ValueError(f"Gate: mode: expected 'mask' or 'multiply', got {self.mode!r}")

    def __call__(self, prompt: str, answer: str) -> float:
        """What the function gives, in [0, 1]."""
        found = self.function(prompt, answer)
        wrong_type = not isinstance(found, numbers.Real | np.bool_)
        if wrong_type or not 0.0 <= float(found) <= 1.0:
            error = TypeError if wrong_type else ValueError
            raise error(f"Gate: {_name(self.function)}: expected a bool or a number in [0, 1], got {found!r:.80}")
        return float(found)


def gated(rewards: Tensor, factor: Tensor, keep: Tensor | None = None) -> Tensor:
    """r' = m + f (r − m), m the least reward of the group: what a reward is above the worst of its group, times f.

    A gate that subtracts a penalty, such as 10⁶, would erase all other differences of the group from its advantages.

    Args:
        rewards: r, (G, B), of G completions each.
        factor: f, (G, B), in [0, 1].
        keep: (G, B), bool: those that are not kept take no part, and keep their reward; None for all.

    Returns:
        (G, B), differentiable in rewards and factor, through m too.

    Raises:
        ValueError: shapes that differ, or no completions.

    Example:
        >>> gated(torch.tensor([[-3.0], [-1.0], [-1.0]]), torch.tensor([[1.0], [1.0], [0.5]])).mT
        tensor([[-3., -1., -2.]])
    """
    if rewards.ndim != 2 or not rewards.shape[0] or factor.shape != rewards.shape:
        raise ValueError(
            f"gated: rewards, factor: expected shape (G, B) of both, G of at least 1, got {tuple(rewards.shape)} and "
            f"{tuple(factor.shape)}"
        )
    there = torch.ones_like(factor, dtype=torch.bool) if keep is None else keep
    least = rewards.masked_fill(~there, torch.inf).amin(dim=0, keepdim=True).expand_as(rewards)
    # lerp gives r itself at f = 1.
    return torch.where(there, torch.lerp(torch.where(there, least, rewards), rewards, factor.to(rewards)), rewards)


class TextReward(Reward):
    """A reward of an answer's text for a target's, both seen through features.

    Attributes:
        gates: conditions on the form of answers.

    Example:
        >>> import torch
        >>> class Length(TextReward):  # an answer is to be as long as the target
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log_price = torch.nn.Parameter(torch.zeros(()))
        ...
        ...     def features(self, texts):
        ...         return torch.tensor([[float(len(text))] for text in texts])
        ...
        ...     def forward(self, answer, target):
        ...         return -self.log_price.exp() * (answer - target).abs().sum(-1)
        >>> reward = Length()
        >>> reward(reward.features(["no", "maybe"]), reward.features(["yes"])).tolist()
        [-1.0, -2.0]
    """

    gates: tuple[Gate, ...] = ()

    @abstractmethod
    def features(self, texts: Sequence[str]) -> Tensor:
        """Features (N, n) of N texts: constants, in which no parameter of the reward has a part."""

    @abstractmethod
    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        """Rewards (...), differentiable in the parameters, of features (..., n) whose leading dimensions broadcast."""

    def gate(self, prompts: Sequence[str], answers: Sequence[str]) -> GateValues:
        """What all gates together make of N answers to N prompts: kept if all keep it, factors multiplied."""
        if len(prompts) != len(answers):
            raise ValueError(
                f"{type(self).__name__}: prompts: expected one for each of {len(answers)} answers, got {len(prompts)}"
            )
        values = {m: torch.ones(len(answers), dtype=torch.float64) for m in get_args(GateMode)}
        for gate in self.gates:
            found = [gate(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
            values[gate.mode] *= torch.tensor(found, dtype=torch.float64)
        return GateValues(values["mask"] > 0, values["multiply"].to(torch.get_default_dtype()))


class TextEmbeddingReward(TextReward):
    """A distance or a similarity of embeddings, under a U that is learned.

    mahalanobis: r = −(e(ŷ)−e(y))ᵀ U (e(ŷ)−e(y)), the reward of arXiv 2510.07624 on embeddings; at most 0.
    cosine: r = e(ŷ)ᵀ U e(y) / (‖e(ŷ)‖_U ‖e(y)‖_U), from -1 to 1, 0 for an embedding that is 0; without U the plain
    cosine, which has nothing to learn. The scale of U cancels in it.

    Args:
        embedder: N texts -> (N, n), a floating tensor or NumPy array.
        dim: n; None embeds a short text to see.
        metric: "mahalanobis" or "cosine".
        kind, U: kind and start of U, see `PositivePrecision`; a U of None is the identity, for the cosine no U at all.
            `embedding_precision` computes one. Features and rewards are of U's dtype.
        gates: conditions on the form of answers.
        cache_size: how many texts' embeddings are remembered.

    Raises:
        ValueError, TypeError: an unknown metric or kind, a U of another dimension or not positive definite, an
            isotropic U of a cosine, gates that are none; here and in `features`, an embedder that gives another
            number of rows or columns, what is not floating or not finite.

    Example:
        >>> reward = TextEmbeddingReward(lambda texts: torch.tensor([[float(len(t)), 1.0] for t in texts]), U=2.0)
        >>> answers, target = reward.features(["abc", "ab"]), reward.features(["a"])
        >>> reward(answers, target).detach()
        tensor([-8., -2.])
        >>> reward.precision().detach()
        tensor([2., 2.])
    """

    matrix: PositivePrecision | None
    _like: Tensor

    def __init__(
        self, embedder: Embedder, dim: int | None = None, *, metric: Metric = "mahalanobis",
        kind: PrecisionKind = "diagonal", U: Tensor | float | None = None, gates: Sequence[Gate] = (),
        cache_size: int = 65536,
    ) -> None:  # fmt: skip
        super().__init__()
        if metric not in get_args(Metric):
            raise ValueError(f"TextEmbeddingReward: metric: expected 'mahalanobis' or 'cosine', got {metric!r}")
        if dim is not None:
            check_count("TextEmbeddingReward: dim", dim, 1)
        if wrong := [gate for gate in gates if not isinstance(gate, Gate)]:
            raise TypeError(f"TextEmbeddingReward: gates: expected a sequence of Gate, got {wrong[0]!r} in it")
        if metric == "cosine" and U is not None and kind == "isotropic":
            raise ValueError(
                "TextEmbeddingReward: kind: expected 'diagonal' or 'full' with metric='cosine', in which the scale of "
                "U cancels, got 'isotropic'"
            )
        if not (U is None or isinstance(U, Tensor | numbers.Real)):
            raise TypeError(f"TextEmbeddingReward: U: expected a tensor, a number or None, got {type(U).__name__}")
        self.metric: Metric = metric
        self.gates: tuple[Gate, ...] = tuple(gates)
        self.dim: int = dim or 0
        # Neither holds the embedder as a submodule, whose parameters would count as the reward's.
        self._embedder = (embedder,)
        self._cache = EmbeddingCache(self._embed, cache_size)
        dtype = torch.get_default_dtype()
        if not self.dim:
            probe = self._cache(["text"])
            self.dim, dtype = probe.shape[1], torch.promote_types(probe.dtype, torch.float32)
        if metric == "cosine" and U is None:
            self.matrix = None
        else:
            start = torch.ones((), dtype=dtype) if U is None else torch.as_tensor(U)
            try:
                self.matrix = PositivePrecision(self.dim, kind, start)
            except ValueError as error:
                raise ValueError(f"TextEmbeddingReward: {str(error).replace('precision', 'U', 1)}") from error
            dtype = self.matrix.raw.dtype
        # Knows the dtype and the device that the reward has been moved to, even if it has no parameter.
        self.register_buffer("_like", torch.zeros((), dtype=dtype), persistent=False)

    def extra_repr(self) -> str:
        # Names, not addresses: a run is known again by this text.
        gates = [f"{gate.mode} {_name(gate.function)}" for gate in self.gates]
        return f"{_name(self._embedder[0])}, dim={self.dim}, metric={self.metric!r}, gates={gates}"

    def features(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, n) of N texts, constants; those of texts that it has met lately are remembered."""
        if isinstance(texts, str) or any(not isinstance(text, str) for text in texts):
            raise TypeError(f"TextEmbeddingReward: texts: expected a sequence of strings, got {texts!r:.80}")
        if not texts:
            return self._like.new_zeros(0, self.dim)
        return self._cache(texts).to(self._like)

    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        """See `TextReward.forward`."""
        for name, value in (("answer", answer), ("target", target)):
            if value.shape[-1:] != (self.dim,):
                raise ValueError(
                    f"TextEmbeddingReward: {name}: expected shape (..., {self.dim}), got {tuple(value.shape)}"
                )
        u = None if self.matrix is None else self.matrix()
        if self.metric == "mahalanobis":
            residual = answer - target
            return -_inner(residual, u, residual)
        # Of length one first, so that norms under U stay away from zero but where an embedding is zero.
        answer, target = functional.normalize(answer, dim=-1), functional.normalize(target, dim=-1)
        cosine = _inner(answer, u, target)
        if u is None:
            return cosine
        for unit in (answer, target):
            cosine = cosine * _inner(unit, u, unit).clamp_min(0.5 * MIN_PRECISION).rsqrt()
        return cosine

    def precision(self) -> Tensor:
        """U: () isotropic, (n,) diagonal, (n, n) full; differentiable.

        Raises:
            ValueError: the plain cosine has none.
        """
        if self.matrix is None:
            raise ValueError("TextEmbeddingReward: precision: the plain cosine has none; give it a U")
        return self.matrix()

    def shown(self) -> Tensor | None:
        """U; None for the plain cosine."""
        return None if self.matrix is None else self.precision().detach().clone()

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """What the embedder gives for texts, refused if it is no embedding."""
        found = as_rows("TextEmbeddingReward: embedder", self._embedder[0](texts), texts)
        if self.dim not in (0, found.shape[1]):
            expected, got = (len(texts), self.dim), tuple(found.shape)
            raise ValueError(f"TextEmbeddingReward: embedder: expected shape {expected}, got {got}")
        return found


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _inner(a: Tensor, u: Tensor | None, b: Tensor) -> Tensor:
    """aᵀ U b, aᵀ b without U."""
    if u is not None:
        a = a @ u if u.ndim == 2 else a * u
    return (a * b).sum(dim=-1)
