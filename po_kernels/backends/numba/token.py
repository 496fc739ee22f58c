"""Token statistics: a kernel that runs one row after another. Arrays of a row are (V,)."""

import math

import numpy as np

from .. import linear_head
from ..contract import IGNORED, NUM_TOKEN_STATS, Request, computed
from . import rows
from .rows import dot, helper, kernel, total


@helper
def _scaled(logits, row, inverse_temperature, softcap, z):
    """z of a row, and the largest of them."""
    own = row if len(logits) > 1 else 0
    top = -np.inf
    for v in range(len(z)):
        x = np.float64(logits[own, v])
        if softcap > 0.0:
            x = softcap * math.tanh(x / softcap)
        z[v] = x * inverse_temperature
        top = max(top, z[v])
    return top


@kernel
def _token_kernel(chunks, logits, token_ids, inverse_temperature, softcap, cotangent, out, to_logits):
    """cotangent and out (6, N), of which it has no use for the last three."""
    classes, refused = logits.shape[1], False
    d, e = np.empty(classes), np.empty(classes)
    for row in range(chunks.first, chunks.last):
        token = token_ids[row]
        if not 0 <= token < classes:
            refused |= token != IGNORED
            out[:, row] = 0.0
            if to_logits.size > 0:
                to_logits[row, :] = 0.0
            continue
        top = _scaled(logits, row, inverse_temperature, softcap, d)
        refused |= top == -np.inf
        taken = d[token]
        for v in range(classes):
            e[v] = math.exp(d[v] - top)
            d[v] = d[v] - top if e[v] != 0.0 else 0.0
        mass, product = total(e), dot(e, d)
        log_mass = math.log(mass)
        out[3:, row] = 0.0
        out[0, row] = taken - top - log_mass
        out[1, row] = log_mass - product / mass
        out[2, row] = log_mass + top
        if to_logits.size > 0:
            alpha, factor = cotangent[0, row], cotangent[1, row] / mass
            offset = (cotangent[2, row] - alpha + factor * product) / mass
            for v in range(classes):
                g = e[v] * (offset - factor * d[v]) + (alpha if v == token else 0.0)
                y = math.tanh(np.float64(logits[row if len(logits) > 1 else 0, v]) / softcap) if softcap > 0.0 else 0.0
                to_logits[row, v] = g * inverse_temperature * (1.0 - y * y)
    return refused


def _token_log_prob(request: Request) -> rows.Served:
    (logits,), config = request.inputs, request.config
    read = logits.to(computed(logits.dtype))
    refused, (value, _, gradient) = rows.valued(
        request._replace(inputs=type(request.inputs)(read)), _token_kernel, len(read),
        read.new_empty((NUM_TOKEN_STATS, len(read))), rows.once(read), request.constants.token_ids,
        1.0 / config.temperature, config.softcap or 0.0,
    )  # fmt: skip
    return refused, [value, None, None if gradient is None else gradient.to(logits.dtype)]


KERNELS = rows.served({linear_head.ROW_OP: _token_log_prob})
KERNELS[linear_head.OP] = linear_head.kernel(KERNELS[linear_head.ROW_OP])
