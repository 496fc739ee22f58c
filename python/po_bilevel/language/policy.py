"""Policies of texts: a causal language model that samples completions of prompts and knows their log-probabilities."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import po_kernels as pk

from .causal import CausalModel, logits

_INTEGERS = (torch.int32, torch.int64)


class Tokens(NamedTuple):
    """Rows of tokens of different lengths, padded.

    Attributes:
        ids: (B, T), integers; what stands where the mask is False is of no account.
        mask: (B, T), bool: which tokens are there. They are next to each other.

    Example:
        >>> Tokens.padded([[3, 4], [5]], left=True).ids
        tensor([[3, 4],
                [0, 5]])
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def padded(
        cls, rows: Sequence[Sequence[int]], *, left: bool = False, device: torch.device | None = None
    ) -> "Tokens":
        """Rows as (B, T), T the length of the longest; prompts are padded on the left, completions on the right."""
        longest = max(map(len, rows), default=0)
        ids, mask = (
            torch.zeros(len(rows), longest, dtype=torch.int64),
            torch.zeros(len(rows), longest, dtype=torch.bool),
        )
        for number, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[number, place] = torch.tensor(list(row), dtype=torch.int64)
            mask[number, place] = True
        return cls(ids.to(device), mask.to(device))

    @classmethod
    def read(cls, ids: Tensor, *, pad: int, end: int) -> "Tokens":
        """Rows that were padded with a token of its own.

        Raises:
            ValueError: the padding is the token that ends a text, so that ends could not be told from padding.
        """
        if pad == end:
            raise ValueError(
                f"Tokens: pad: expected another token than the one that ends a text, got {pad} for both: give a mask, "
                "which has each text up to its first end"
            )
        return cls(ids, ids != pad)

    def rows(self, index: Tensor) -> "Tokens":
        """The rows at integer positions."""
        return Tokens(self.ids[index], self.mask[index])

    def lists(self) -> list[list[int]]:
        """The tokens that are there, row by row."""
        pairs = zip(self.ids.tolist(), self.mask.tolist(), strict=True)
        return [[token for token, there in zip(ids, mask, strict=True) if there] for ids, mask in pairs]


class Completions(NamedTuple):
    """Completions that a policy sampled, a prompt's next to each other: N = B · G rows.

    Attributes:
        tokens: (N, T), the token that ends a text with them where it was drawn.
        log_prob: (N, T), of each token under what it was sampled from, temperature and top-p included; 0 where masked.
        log_support: (N, T), log of the probability that the policy gives to all tokens that could have been drawn: 0
            but for top-p. `po_kernels.importance_weights` takes both.

    Example:
        >>> import torch
        >>> from po_bilevel.language import Decoder
        >>> policy = TokenPolicy(Decoder(vocabulary=20, context=16, width=32), end=0)
        >>> found = policy.generate(Tokens.padded([[3, 4]], left=True), num_samples=3, max_tokens=1, seed=1)
        >>> isinstance(found, Completions), found.tokens.ids.shape
        (True, torch.Size([3, 1]))
    """

    tokens: Tokens
    log_prob: Tensor
    log_support: Tensor


class TokenPolicy(nn.Module):
    """p_θ(completion | prompt) = Π_t softmax(logits_t / temperature) of a causal language model.

    Args:
        model: such as `Decoder`, or `HuggingFaceModel`.
        end: the token that ends a completion, and is a part of it.
        temperature: of the policy: its log-probabilities, and what it samples from.

    Raises:
        ValueError: a temperature that is not positive, or an end outside of the vocabulary.

    Example:
        >>> import torch
        >>> from po_bilevel.language import Decoder, TokenPolicy, Tokens
        >>> policy = TokenPolicy(Decoder(vocabulary=20, context=16, width=32), end=0)
        >>> prompts = Tokens.padded([[3, 4], [5]], left=True)
        >>> completions = policy.generate(prompts, num_samples=3, max_tokens=8, seed=1)
        >>> policy.log_prob(prompts, completions.tokens).shape  # 2 prompts, 3 completions of each
        torch.Size([6])
    """

    def __init__(self, model: CausalModel, end: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"TokenPolicy: temperature: expected a finite positive number, got {temperature}")
        vocabulary = model.head().weight.shape[0]
        if not 0 <= end < vocabulary or end != int(end):
            raise ValueError(f"TokenPolicy: end: expected a token from 0 to {vocabulary - 1}, got {end}")
        self.model = model
        self.end = end
        self.temperature = temperature

    def extra_repr(self) -> str:
        # A run is known again by this text.
        return f"end={self.end}, temperature={self.temperature}"

    def forward(self, prompts: Tokens, completions: Tokens, entropy: bool = False) -> pk.TokenStats:
        """Log-probability of each token of completions, and the entropy of what it was taken from, in nats.

        Args:
            prompts: B of them, padded on the left, each with at least one token.
            completions: B · G, those of a prompt next to each other, padded on the right.
            entropy: also compute it.

        Returns:
            `TokenStats` of (B · G, T), 0 where masked: once differentiable in θ with fused attention, twice else, and
            in forward mode where the model is.

        Raises:
            ValueError: a prompt without a token, or padded on the right; completions padded on the left; numbers of
                rows that do not fit; tokens outside of the vocabulary; a prompt and a completion of more tokens than
                the model's context has.
        """
        self._check_tokens("completions", completions)
        times, rest = divmod(len(completions.ids), max(len(prompts.ids), 1))
        if rest or not times:
            raise ValueError(
                f"TokenPolicy: completions: expected a multiple of {len(prompts.ids)} rows, as many as there are "
                f"prompts, got {len(completions.ids)}"
            )
        before, after = completions.mask[:, :-1], completions.mask[:, 1:]
        if (wrong := (after & ~before).any(dim=1)).any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"TokenPolicy: completions[{row}]: expected padding on the right only, got the mask "
                f"{completions.mask[row].long().tolist()}"
            )
        prompts = self._checked(prompts, completions.mask.sum(dim=1).reshape(-1, times).amax(dim=1))
        ids, mask = (
            torch.cat([before.repeat_interleave(times, dim=0), after], dim=1)
            for before, after in zip(prompts, completions, strict=True)
        )
        ids = ids.masked_fill(~mask, self.end)
        hidden = self.model(ids[:, :-1], mask[:, :-1])[:, prompts.ids.shape[1] - 1 :]
        # Only the tokens that are there meet the head.
        there = completions.mask
        head = self.model.head()
        found = pk.linear_token_log_prob(
            hidden[there], head.weight, completions.ids[there], bias=head.bias,
            temperature=self.temperature / head.scale, entropy=entropy,
            softcap=None if head.softcap is None else head.softcap / head.scale,
        )  # fmt: skip
        place = there.reshape(-1).nonzero()[:, 0]

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(there.numel()).index_put((place,), x).reshape(there.shape)

        return pk.TokenStats(spread(found.log_prob), None if found.entropy is None else spread(found.entropy), None)

    def log_prob(self, prompts: Tokens, completions: Tokens) -> Tensor:
        """log p of whole completions, (B · G,), in nats; see `forward`."""
        return self(prompts, completions).log_prob.sum(dim=1)

    @torch.no_grad()
    def generate(
        self, prompts: Tokens, num_samples: int, max_tokens: int, *, temperature: float | None = None,
        top_p: float = 1.0, seed: int | None = None, row_offset: int = 0,
    ) -> Completions:  # fmt: skip
        """Samples completions, token by token, with a cache of keys and values.

        Token t of a row is drawn from stream t of the seed, at the row's number: the same seed gives the same
        completions whatever the batch they are in, within rounding. A model with dropout has to be in evaluation mode.

        Args:
            prompts: B of them, padded on the left, each with at least one token.
            num_samples: G, completions of each.
            max_tokens: the most of a completion, with the token that ends it.
            temperature: of the sampler; None for the policy's, 0 for the likeliest token.
            top_p: tokens are drawn among the likeliest ones, the fewest whose probability together is at least this
                (Holtzman et al. 2020, arXiv 1904.09751).
            seed: of the samples; None draws one from torch's default generator.
            row_offset: the number of the first prompt, of a batch that is a part of a larger one.

        Returns:
            `Completions`, B · G of at most max_tokens tokens.

        Raises:
            ValueError: as `forward`, or an option out of range.
        """
        for name, count in (("num_samples", num_samples), ("max_tokens", max_tokens)):
            if count < 1 or count != int(count):
                raise ValueError(f"TokenPolicy.generate: {name}: expected an integer of at least 1, got {count}")
        temperature = self.temperature if temperature is None else temperature
        if not 0 <= temperature < math.inf:
            raise ValueError(f"TokenPolicy.generate: temperature: expected a number of at least 0, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"TokenPolicy.generate: top_p: expected a number above 0 and at most 1, got {top_p}")
        prompts = self._checked(prompts, max_tokens)
        seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        rows = len(prompts.ids) * num_samples
        alive = torch.ones(rows, dtype=torch.bool, device=prompts.ids.device)
        mask = prompts.mask
        hidden, cache = self.model.extend(prompts.ids.masked_fill(~mask, self.end), mask)
        hidden, cache = hidden[:, -1:].repeat_interleave(num_samples, dim=0), self.model.repeated(cache, num_samples)
        mask = mask.repeat_interleave(num_samples, dim=0)
        found: list[tuple[Tensor, ...]] = []
        for step in range(max_tokens):
            raw = logits(hidden[:, -1], self.model.head())
            drawn = self._draw(raw, temperature, top_p, seed, step, row_offset * num_samples)
            ids = drawn[0].masked_fill(~alive, self.end)
            found.append((ids, alive, *(x.masked_fill(~alive, 0.0) for x in drawn[1:])))
            mask = torch.cat([mask, alive[:, None]], dim=1)
            alive = alive & (ids != self.end)
            if step == max_tokens - 1 or not alive.any():
                break
            hidden, cache = self.model.extend(ids[:, None], mask, cache)
        ids, there, log_prob, log_support = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
        return Completions(Tokens(ids, there), log_prob, log_support)

    def _draw(
        self, raw: Tensor, temperature: float, top_p: float, seed: int, step: int, row_offset: int
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Tokens (N,), their log-probability as they are drawn, and the log of the policy's mass on what could be."""
        policy = torch.log_softmax(raw / self.temperature, dim=-1)
        if temperature == 0:
            ids = raw.argmax(dim=-1)
            return ids, raw.new_zeros(len(ids)), policy.gather(1, ids[:, None])[:, 0]
        sampler = policy if temperature == self.temperature else torch.log_softmax(raw / temperature, dim=-1)
        support = raw.new_zeros(len(raw))
        if top_p < 1:
            ordered, order = sampler.exp().sort(dim=-1, descending=True, stable=True)
            left = torch.zeros_like(raw, dtype=torch.bool).scatter(1, order, ordered.cumsum(dim=-1) - ordered < top_p)
            support = policy.masked_fill(~left, -torch.inf).logsumexp(dim=-1)
            sampler = torch.log_softmax(sampler.masked_fill(~left, -torch.inf), dim=-1)
        ids = pk.categorical_sample(sampler, 1, seed=seed, stream=step, row_offset=row_offset)[0]
        return ids, sampler.gather(1, ids[:, None])[:, 0], support

    def _checked(self, prompts: Tokens, more: Tensor | int) -> Tokens:
        """The prompts, if they and so many tokens more, of all or of each (B,), can be read."""
        self._check_tokens("prompts", prompts)
        if 0 in prompts.ids.shape:
            raise ValueError(f"TokenPolicy: prompts: expected at least one token, got shape {tuple(prompts.ids.shape)}")
        # Padded on the left, the last token of each row is there.
        last = prompts.mask[:, -1] & ((~prompts.mask[:, 1:] & prompts.mask[:, :-1]).sum(dim=1) == 0)
        if not last.all():
            row = int((~last).nonzero()[0])
            raise ValueError(
                f"TokenPolicy: prompts[{row}]: expected at least one token, and padding on the left only, got the mask "
                f"{prompts.mask[row].long().tolist()}"
            )
        context, lengths = self.model.context, prompts.mask.sum(dim=1)
        totals = lengths + more
        if context is not None and int(totals.max()) > context:
            row = int(totals.argmax())
            length = int(lengths[row])
            left = int(totals[row]) - length
            if left >= context:
                raise ValueError(
                    f"TokenPolicy: completions: expected fewer tokens than the model's context of {context}, which has "
                    f"the prompt too, got {left}"
                )
            raise ValueError(
                f"TokenPolicy: prompts[{row}]: expected at most {context - left} tokens, so that {left} more fit into "
                f"the model's context of {context}, got {length}"
            )
        return prompts

    def _check_tokens(self, name: str, tokens: Tokens) -> None:
        """Refuses what are no rows of tokens of the vocabulary."""
        ids, mask = tokens
        if ids.ndim != 2 or ids.shape != mask.shape or ids.dtype not in _INTEGERS or mask.dtype != torch.bool:
            raise ValueError(
                f"TokenPolicy: {name}: expected integer ids and a bool mask of one shape (N, T), got {ids.dtype}, "
                f"{tuple(ids.shape)} and {mask.dtype}, {tuple(mask.shape)}"
            )
        vocabulary = self.model.head().weight.shape[0]
        if (wrong := mask & ((ids < 0) | (ids >= vocabulary))).any():
            row, place = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"TokenPolicy: {name}[{row}]: expected tokens from 0 to {vocabulary - 1}, got {int(ids[row, place])}; "
                "look for a tokenizer that is another model's"
            )
