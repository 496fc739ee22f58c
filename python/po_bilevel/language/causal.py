"""What a policy of texts has to know of a causal language model: its hidden states and its head, never its logits."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Head(NamedTuple):
    """How logits are made of hidden states: scale · (h Wᵀ + bias), and softcap · tanh(·/softcap) of that.

    Attributes:
        weight: W, (V, H).
        bias: (V,), or None.
        scale: a constant of the model, above 0.
        softcap: above 0, or None.

    Example:
        >>> import torch
        >>> from po_bilevel.language import Decoder
        >>> head = Decoder(vocabulary=20, context=16, width=32).head()
        >>> isinstance(head, Head), head.weight.shape
        (True, torch.Size([20, 32]))
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class CausalModel(nn.Module, ABC):
    """A causal language model over a vocabulary of V tokens.

    Rows may be padded on either side. Positions count the tokens that the mask has, so that padding changes nothing.

    Attributes:
        context: the most tokens of a sequence, None if there is no limit.

    Example:
        >>> import torch
        >>> class Bag(CausalModel):  # hidden states are means of the embeddings so far
        ...     def __init__(self, vocabulary, width):
        ...         super().__init__()
        ...         self.embedding = torch.nn.Embedding(vocabulary, width)
        ...
        ...     def forward(self, ids, mask):
        ...         return self.extend(ids, mask)[0]
        ...
        ...     def extend(self, ids, mask, cache=None):
        ...         new = mask[:, -ids.shape[1] :, None] * self.embedding(ids)
        ...         total = new.cumsum(1) if cache is None else cache[:, None] + new.cumsum(1)
        ...         count = mask.cumsum(1)[:, -ids.shape[1] :, None].clamp(min=1)
        ...         return total / count, total[:, -1]
        ...
        ...     def repeated(self, cache, times):
        ...         return cache.repeat_interleave(times, 0)
        ...
        ...     def head(self):
        ...         return Head(self.embedding.weight)
        >>> from po_bilevel.language import TokenPolicy, Tokens
        >>> policy = TokenPolicy(Bag(20, 8), end=0)
        >>> prompts = Tokens.padded([[3, 4], [5]], left=True)
        >>> drawn = policy.generate(prompts, num_samples=3, max_tokens=8, seed=1)
        >>> bool(torch.allclose(policy(prompts, drawn.tokens).log_prob, drawn.log_prob, atol=1e-6))
        True
    """

    context: int | None = None

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (B, T, H) for the tokens (B, T), of which the mask (B, T), bool, has those that are there."""

    @abstractmethod
    def extend(self, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Hidden states of tokens that come after those in a cache of keys and values.

        Args:
            ids: (B, T), the new tokens.
            mask: (B, S + T), bool, of the S tokens in the cache and the new ones.
            cache: what the last call gave, not to be used again; None for none.

        Returns:
            hidden states (B, T, H), and the cache of all S + T tokens.
        """

    @abstractmethod
    def repeated(self, cache: Any, times: int) -> Any:
        """The cache with each row repeated: rows 0, 0, ..., 1, 1, ...; the one given is not to be used again."""

    @abstractmethod
    def head(self) -> Head:
        """The head, of parameters and not of copies of them."""


def positions(mask: Tensor) -> Tensor:
    """The place of each token among those that the mask (B, T) has, from 0; of others some number that is allowed."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits (*, V) of hidden states (*, H), at least in float32."""
    found = torch.nn.functional.linear(hidden, head.weight, head.bias)
    found = head.scale * found.to(torch.promote_types(found.dtype, torch.float32))
    return found if head.softcap is None else head.softcap * torch.tanh(found / head.softcap)
