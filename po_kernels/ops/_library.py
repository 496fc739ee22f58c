"""The opaque kernels as torch.library operators: the schema and the fake of every op of the table.

`torch.ops.po_kernels.<op>` takes what a `Request` has, flat, and the name of the backend. No tangents, an empty
list, ask for first order.
"""

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import NUM_STATS, OPS, Op, OpConfig
from . import _modes

_SCHEMA = (
    "(Tensor[] inputs, Tensor?[] constants, Tensor?[] tangents, Tensor? cotangent, Tensor? cotangent_tangent, "
    "bool[] needs, bool want_stats, str backend, str estimator, int num_samples, str advantage, float? rbf_gamma, "
    "float entropy_coef, str reduction, int row_offset) -> Tensor[]"
)

_library = torch.library.Library("po_kernels", "DEF")


def _define(op: Op) -> None:
    _library.define(op.name + _SCHEMA)

    def run(inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, backend, *config):
        request = op.request(
            inputs, constants, tangents or None, cotangent, cotangent_tangent, needs, want_stats, OpConfig(*config)
        )
        with _modes.autograd_in_kernels():
            found = dispatch.kernel(op.name, backend)(request)
        return [inputs[0].new_empty(0) if x is None else x for x in found]  # for what was not asked for

    def fake(inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, backend, *config):
        head = inputs[0]
        shape = op.value_shape(op.Inputs(*inputs), op.Constants(*constants), OpConfig(*config))
        value = head.new_empty(shape, dtype=head.dtype if op.differentiable else torch.int64)
        stats = head.new_empty((NUM_STATS, *shape) if want_stats else (0,))
        return [value, stats, *_gradients(inputs, needs)]

    _library.impl(op.name, run, "CPU")
    _library.impl(op.name, run, "CUDA")
    torch.library.register_fake(f"po_kernels::{op.name}", fake, lib=_library)


def _gradients(inputs: list[Tensor], needs: list[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape) if needed else x.new_empty(0) for x, needed in zip(inputs, needs, strict=True)]


for _op in OPS.values():
    _define(_op)

OPERATORS = {op: getattr(torch.ops.po_kernels, op).default for op in OPS}
