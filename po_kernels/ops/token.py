"""Log-probabilities and entropies of tokens of a vocabulary, from logits or from the hidden states before the head."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import IGNORED, OpConfig, computed
from . import _check
from ._evaluate import evaluate
from ._types import Backend

__all__ = ["TokenStats", "linear_token_log_prob", "token_log_prob"]


class TokenStats(NamedTuple):
    """What a token op returns, each (*), in nats and in float32 for half-precision inputs.

    Attributes:
        log_prob: log p of the token.
        entropy: of the distribution it was taken from, None unless asked for.
        lse: log Σ exp of the scaled logits, None unless asked for.

    Example:
        >>> import torch, po_kernels as pk
        >>> found = pk.token_log_prob(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> isinstance(found, pk.TokenStats), found.log_prob.exp(), found.entropy
        (True, tensor([0.2500, 0.2500]), None)
    """

    log_prob: Tensor
    entropy: Tensor | None
    lse: Tensor | None


def token_log_prob(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    entropy: bool = False,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> TokenStats:
    """log p of tokens under z = logits / temperature, and the entropy of p = softmax z, with two derivatives.

    log p_a = z_a - log Σ_j exp z_j,   H = -Σ_j p_j log p_j,   ∂ log p_a / ∂z = δ_a - p,   ∂H / ∂z = -p (log p + H)

    All are made in one pass over the logits, and the gradient in a second one; nothing of the logits' size is stored.
    -inf masks an entry. It is right to second order: Hessian products, `torch.func` and `torch.compile` work as of
    every op.

    Args:
        logits: (*, V), float32, float64, bfloat16 or float16. Half precision is read as such and computed in float32;
            its gradient is in half precision.
        token_ids: (*), integers from 0 to V - 1.
        temperature: logits are divided by it. It, softcap and softcap / temperature have to be normal numbers of the
            dtype that is computed in, as their reciprocals have to be.
        softcap: c, which first replaces a logit ℓ by c tanh(ℓ / c) (Gemma 2, arXiv 2408.00118, section 2), also -inf.
        ignore_index: the id of tokens that are left out: their results are 0, and so are their gradients.
        entropy: also returns H.
        return_lse: also returns log Σ exp z.
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        TokenStats of tensors (*).

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; an id out of range, or a row that is all
            -inf, which is named. Values of device tensors are not read.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch
        >>> import po_kernels as pk
        >>> logits = torch.tensor([[0.0, 1.0, float("-inf")]], requires_grad=True)
        >>> found = pk.token_log_prob(logits, torch.tensor([1]), entropy=True)
        >>> [round(x.item(), 4) for x in found[:2]]
        [-0.3133, 0.5822]
    """
    op = "token_log_prob"
    (logits,) = _check.floating(op, ("logits",), logits, reads_half=True)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits: expected shape (*, V) with V of at least 1, got {_check.shape_of(logits)}")
    lead = logits.shape[:-1]
    ids, config = _options(op, logits, token_ids, lead, temperature, softcap, ignore_index)
    rows = _check.rows(logits, math.prod(lead), logits.shape[-1])
    value, _ = evaluate(op, backend, (rows,), (ids, None), config)
    return _stats(op, value, lead, entropy, return_lse)


def linear_token_log_prob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    entropy: bool = False,
    return_lse: bool = False,
    chunk_rows: int | None = None,
    backend: Backend | None = None,
) -> TokenStats:
    """`token_log_prob` of logits = hidden · weightᵀ + bias, of which there are only `chunk_rows` rows at a time.

    Backward passes, of both orders, compute the logits of a chunk again; the reference alone, which also serves the
    second order of numba and `torch.func` under `torch.compile`, has all logits at once. Chunks are filled up to one
    size, and their rows lie alike in memory, so that a row's results depend neither on another row nor on its place.
    The weight of an embedding that is tied to the head gets the sum of both gradients; a weight that needs no gradient
    costs none. Matrix products are torch's, in the inputs' dtype; sums over chunks are at least in float32.

    Args:
        hidden: (*, H).
        weight: (V, H), as that of `torch.nn.Linear(H, V)`.
        token_ids: (*), integers from 0 to V - 1.
        bias: (V,), or None.
        chunk_rows: rows whose logits there are at a time; None for 128 on the CPU and 1024 elsewhere.
        temperature, softcap, ignore_index, entropy, return_lse, backend: as in `token_log_prob`.

    Returns:
        TokenStats of tensors (*).

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range; an id out of range, or a row that
            is all -inf, which is named.
        RuntimeError: the backend asked for cannot serve the call.

    Example:
        >>> import torch
        >>> import po_kernels as pk
        >>> head = torch.nn.Linear(16, 1000, bias=False)
        >>> hidden, ids = torch.randn(2, 7, 16), torch.randint(1000, (2, 7))
        >>> pk.linear_token_log_prob(hidden, head.weight, ids).log_prob.shape
        torch.Size([2, 7])
    """
    op = "linear_token_log_prob"
    names = ("hidden", "weight") if bias is None else ("hidden", "weight", "bias")
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    hidden, weight, *rest = _check.floating(op, names, *tensors, reads_half=True)
    if hidden.ndim < 1:
        raise ValueError(f"{op}: hidden: expected shape (*, H), got ()")
    lead, size = hidden.shape[:-1], hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != size:
        raise ValueError(
            f"{op}: weight: expected shape (V, {size}) with V of at least 1, got {_check.shape_of(weight)}"
        )
    bias = rest[0] if rest else weight.new_empty(0)
    if rest:
        _check.has_shape(op, "bias", bias, (weight.shape[0],))
    chunk_rows = 0 if chunk_rows is None else _check.integer(op, "chunk_rows", chunk_rows, 1)
    ids, config = _options(op, hidden, token_ids, lead, temperature, softcap, ignore_index)
    rows = _check.rows(hidden, math.prod(lead), size)
    value, _ = evaluate(op, backend, (rows, weight, bias), (ids, None), config._replace(chunk_rows=chunk_rows))
    return _stats(op, value, lead, entropy, return_lse)


def _options(
    op: str, like: Tensor, token_ids: Any, lead: Any, temperature: Any, softcap: Any, ignore_index: Any
) -> tuple[Tensor, OpConfig]:
    """Ids (N,) of which those to leave out are IGNORED, and the configuration."""
    ids = _check.integral(op, "token_ids", token_ids, like)
    _check.has_shape(op, "token_ids", ids, lead)
    given = _check.rows(ids, math.prod(lead))
    ids = given.clamp(min=IGNORED + 1)  # no id that is given is IGNORED
    if ignore_index is not None:
        ids = ids.masked_fill(given == _check.integer(op, "ignore_index", ignore_index, -(2**63)), IGNORED)
    temperature = _scale(op, "temperature", temperature, like)
    if softcap is not None:
        softcap = _scale(op, "softcap", softcap, like)
        _scale(op, "softcap / temperature", softcap / temperature, like)
    return ids, OpConfig(temperature=temperature, softcap=softcap)


def _scale(op: str, name: str, given: Any, like: Tensor) -> float:
    """A positive number that is normal in the dtype of the computation, as its reciprocal is: logits are multiplied and
    divided by it."""
    scale, dtype = _check.positive(op, name, given), computed(like.dtype)
    least = torch.finfo(dtype).tiny
    if not least <= scale <= 1 / least:
        raise ValueError(
            f"{op}: {name}: expected a number from {least:.2g} to {1 / least:.2g}, whose reciprocal {dtype} holds too, "
            f"got {given}"
        )
    return scale


def _stats(op: str, value: Tensor, lead: Any, entropy: bool, return_lse: bool) -> TokenStats:
    log_prob, h, lse = (_check.rows(x, *lead) for x in value.unbind(0)[:3])
    wanted = _check.flag(op, "entropy", entropy), _check.flag(op, "return_lse", return_lse)
    return TokenStats(log_prob, h if wanted[0] else None, lse if wanted[1] else None)
