"""A small decoder to be trained from scratch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from .causal import CausalModel, Head, positions

# Of the embedding and of all weights that end in the residual stream, as in GPT-2.
INITIAL_STD = 0.02

Cache = list[tuple[Tensor, Tensor]]


class Decoder(CausalModel):
    """A pre-norm transformer decoder whose head is tied to its embedding (Radford et al. 2019, "GPT-2").

    Args:
        vocabulary: V.
        context: the most tokens of a sequence, for which there are learned positions.
        width: H, a multiple of heads.
        layers: blocks of attention and a network of four times the width.
        heads: of attention.

    Raises:
        ValueError: a size below 1, or a width that heads do not divide.

    Example:
        >>> import torch
        >>> decoder = Decoder(vocabulary=100, context=16, width=32, layers=2, heads=4)
        >>> ids = torch.randint(100, (3, 7))
        >>> decoder(ids, torch.ones_like(ids, dtype=torch.bool)).shape
        torch.Size([3, 7, 32])
    """

    def __init__(
        self, vocabulary: int, context: int, *, width: int = 128, layers: int = 2, heads: int = 4
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"vocabulary": vocabulary, "context": context, "width": width, "layers": layers, "heads": heads}
        for name, size in sizes.items():
            if size < 1 or size != int(size):
                raise ValueError(f"Decoder: {name}: expected an integer of at least 1, got {size}")
        if width % heads:
            raise ValueError(f"Decoder: width: expected a multiple of {heads} heads, got {width}")
        self.context: int = context
        self.embedding: nn.Embedding = nn.Embedding(vocabulary, width)
        self.place: nn.Embedding = nn.Embedding(context, width)
        self.blocks: nn.ModuleList = nn.ModuleList([_Block(width, heads) for _ in range(layers)])
        self.norm: nn.LayerNorm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        nn.init.normal_(self.place.weight, std=INITIAL_STD)
        for module in self.blocks.modules():
            if isinstance(module, _Block):
                for last in (module.out, module.down):
                    nn.init.normal_(last.weight, std=INITIAL_STD / (2 * layers) ** 0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `CausalModel.forward`."""
        return self._run(ids, mask, None)[0]

    def extend(self, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Cache]:
        """See `CausalModel.extend`."""
        return self._run(ids, mask, [] if cache is None else cache)

    def repeated(self, cache: Cache, times: int) -> Cache:
        """See `CausalModel.repeated`."""
        return [(k.repeat_interleave(times, dim=0), v.repeat_interleave(times, dim=0)) for k, v in cache]

    def head(self) -> Head:
        """See `CausalModel.head`."""
        return Head(self.embedding.weight)

    def _run(self, ids: Tensor, mask: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        new = ids.shape[1]
        x = self.embedding(ids) + self.place(positions(mask)[:, -new:])
        # Which of all tokens a new one sees: those before it that are there, and itself, so that no row is empty.
        total = mask.shape[1]
        order = torch.arange(total, device=ids.device)
        here = order[-new:, None]
        seen = ((order < here) & mask[:, None, :] | (order == here))[:, None]
        kept: Cache = []
        for number, block in enumerate(self.blocks):
            x, keys = block(x, seen, cache[number] if cache else None)
            if cache is not None:
                kept.append(keys)
        return self.norm(x), kept


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def extra_repr(self) -> str:
        # No shape tells it, and a run is known again by this text.
        return f"heads={self._heads}"

    def forward(
        self, x: Tensor, seen: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        parts = self.into(self.norms[0](x)).unflatten(-1, (3, self._heads, -1))
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(dim=2))
        if before is not None:
            key, value = (torch.cat(both, dim=2) for both in zip(before, (key, value), strict=True))
        x = x + self.out(_attention(query, key, value, seen).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x)))), (key, value)


def _attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    if forward_ad.unpack_dual(query).tangent is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    # The fused kernels have no derivative in forward mode.
    scores = query.shape[-1] ** -0.5 * query @ key.mT
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value
