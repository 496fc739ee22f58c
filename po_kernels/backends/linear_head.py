"""Token statistics of a linear head: matrix products by torch on chunks of rows, the rest by the kernel of a backend.

Of the logits there is one chunk at a time, in every pass: a backward pass computes them again. With z = h Wᵀ + bias and
g the gradient in z of what is differentiated, dh = g W, dW = gᵀ h and dbias = Σ g; along ḣ, Ẇ and the bias' tangent,
ż = ḣ Wᵀ + h Ẇᵀ + ḃ and the derivatives of these products with ġ from the kernel's second order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autocast, checks, contract
from .contract import IGNORED, NUM_TOKEN_STATS, OPS, Kernel, OpConfig, Request

OP, ROW_OP = "linear_token_log_prob", "token_log_prob"
LOGITS = "hidden, weight"  # what a message calls them, which the caller does not have
# Rows of a chunk unless the call says how many: enough for the matrix products, few enough for memory.
_CHUNK_ROWS = {"cpu": 128}
_CHUNK_ROWS_ON_A_DEVICE = 1024
_WEIGHTS_AT_ONCE = 2**20


def kernel(row_kernel: Kernel) -> Kernel:
    """The kernel of OP from that of ROW_OP."""

    def run(request: Request) -> list[Tensor | None]:
        with autocast.disabled(request.inputs.hidden):
            return in_chunks(request)

    def in_chunks(request: Request) -> list[Tensor | None]:
        inputs, _, tangents, cotangent, cotangent_tangent, needs, _, config = request
        ids = request.constants.token_ids
        checks.labels(OPS[OP], request.constants, inputs.weight.shape[0])
        hidden = inputs.hidden
        size = config.chunk_rows or _CHUNK_ROWS.get(hidden.device.type, _CHUNK_ROWS_ON_A_DEVICE)
        dtype = contract.computed(hidden.dtype)
        value = torch.empty((NUM_TOKEN_STATS, len(hidden)), dtype=dtype, device=hidden.device)
        # Sums over chunks are not in half precision.
        found = [torch.zeros_like(x, dtype=dtype) if n else None for x, n in zip(inputs, needs, strict=True)]
        logits = _matrix(size, inputs.weight.mT)
        for first in range(0, len(hidden), size):
            part = slice(first, first + size)
            left_out = (ids[part] == IGNORED).unsqueeze(1)

            def kept(rows: Tensor, left_out: Tensor = left_out) -> Tensor:
                """What is left out may be nan, and a product with 0 would be too."""
                copy = _matrix(size, rows).zero_()
                copy[: len(rows)] = rows.masked_fill(left_out, 0.0)
                return copy

            chunk = _Chunk(
                row_kernel, inputs, tangents, config, first, logits,
                hidden=kept(hidden[part]),
                moved=None if tangents is None or tangents.hidden is None else kept(tangents.hidden[part]),
                ids=_padded(ids[part], size, IGNORED),
                of_rows=[
                    None if c is None else _padded(c[:, part].mT, size).mT.contiguous()
                    for c in (cotangent, cotangent_tangent, request.constants.known)
                ],
            )  # fmt: skip
            value[:, part] = chunk.run(found, part, needs)[:, : len(hidden) - first]
        return [value, None, *[None if g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True)]]

    return run


def _padded(x: Tensor, rows: int, fill: float = 0) -> Tensor:
    """x with so many rows: a matrix product of fewer rows may round otherwise, and a row's result would depend on
    how many there are beside it."""
    if len(x) == rows:
        return x.contiguous()
    padded = x.new_full((rows, *x.shape[1:]), fill)
    padded[: len(x)] = x
    return padded


def _matrix(rows: int, like: Tensor) -> Tensor:
    """Room for so many rows of a matrix, each at a multiple of 64 bytes: a matrix product that reads or writes rows
    that lie otherwise may round each of them otherwise, and a row's result would depend on its place."""
    size = like.shape[-1]
    return like.new_empty(rows, -(-size // 32) * 32)[:, :size]


class _Chunk(NamedTuple):
    """Rows of a request from `first` on, padded with rows that are left out, with memory for their logits; `moved` is
    the tangent of `hidden`, and `of_rows` are the cotangent, its tangent and what is known, each (S, rows)."""

    row_kernel: Kernel
    inputs: Any
    tangents: Any
    config: OpConfig
    first: int
    logits: Tensor
    hidden: Tensor
    moved: Tensor | None
    ids: Tensor
    of_rows: list[Tensor | None]

    def run(self, found: list[Tensor | None], part: slice, needs: Any) -> Tensor:
        """The value; adds the chunk's gradients to `found`."""
        weight, moved = self.inputs.weight, self.tangents
        z = self._head(self.hidden, weight, self.inputs.bias, self.logits)
        if moved is None:
            value, _, g = self._row(z, None, any(needs), overwrite=True)
            if g is not None:
                self._add(found, part, g, self.hidden, weight)
            return value
        along = torch.zeros_like(z)
        if self.moved is not None:
            along += self._head(self.moved, weight)
        if moved.weight is not None:
            along += self._head(self.hidden, moved.weight)
        if moved.bias is not None and moved.bias.numel():
            along += moved.bias
        value, _, turned = self._row(z, along, any(needs))
        if turned is not None:
            self._add(found, part, turned, self.hidden, weight)
            if self.moved is not None or moved.weight is not None:
                _, _, g = self._row(z, None, True)
                self._add(found, part, g, self.moved, moved.weight, bias=False)
        return value

    def _head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """hidden · weightᵀ + bias; on the CPU by blocks of the vocabulary, whose weights are in cache for all rows."""
        if out is None:
            out = _matrix(len(hidden), weight.mT)
        bias = None if bias is None or not bias.numel() else bias
        block = len(weight)
        if weight.device.type == "cpu":
            block = max(256, _WEIGHTS_AT_ONCE // max(weight.shape[1], 1) // 64 * 64)
        for first in range(0, len(weight), block):
            part = slice(first, first + block)
            if bias is None:
                torch.mm(hidden, weight[part].mT, out=out[:, part])
            else:
                torch.addmm(bias[part], hidden, weight[part].mT, out=out[:, part])
        return out

    def _row(self, z: Tensor, along: Tensor | None, needed: bool, overwrite: bool = False) -> list[Any]:
        cotangent, cotangent_tangent, known = self.of_rows
        tangents = None if along is None else [along]
        if along is None:
            cotangent_tangent = None
        request = OPS[ROW_OP].request(
            [z], [self.ids, known], tangents, cotangent, cotangent_tangent, [needed], False,
            self.config._replace(overwrite=overwrite),
        )  # fmt: skip
        try:
            return list(self.row_kernel(request))
        except contract.RefusedError as error:
            contract.refuse(OP, error.refusal, self.first + error.row, logits=LOGITS)

    def _add(
        self, found: list[Tensor | None], part: slice, g: Tensor, hidden: Tensor | None, weight: Tensor | None,
        bias: bool = True,
    ) -> None:  # fmt: skip
        to_hidden, to_weight, to_bias = found
        if to_hidden is not None and weight is not None:
            rows = to_hidden[part]
            rows += torch.mm(g, weight, out=_matrix(len(g), weight))[: len(rows)]
        if to_weight is not None and hidden is not None:
            if g.dtype == to_weight.dtype:
                to_weight.addmm_(g.mT, hidden)
            else:
                to_weight += g.mT @ hidden
        if to_bias is not None and to_bias.numel() and bias:
            to_bias += g.sum(dim=0, dtype=to_bias.dtype)
