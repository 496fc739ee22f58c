"""The path that every op takes from checked, flattened tensors to its value."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import OPS, OpConfig
from . import _autograd

HALF = (torch.bfloat16, torch.float16)


def evaluate(
    op: str,
    backend: str | None,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor | None],
    config: OpConfig,
    want_stats: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value of an op on flattened rows, and the statistics of a loss if they are wanted.

    Args:
        backend: the backend asked for by name.
        inputs: the differentiable tensors in the order of the table. Half precision is computed with in float32.
        constants: the others in the order of the table.
    """
    if inputs[-1].dtype in HALF:
        inputs = [x.float() for x in inputs]
        constants = [x.float() if x is not None and x.dtype in HALF else x for x in constants]
    head = inputs[0]
    name = dispatch.select(op, head.device.type, head.dtype, backend)
    row = OPS[op]
    # Plain torch would differentiate `reinforce` twice, wrongly; a compiled function refuses that by itself.
    if name == "reference" and (config.estimator != "reinforce" or torch.compiler.is_compiling()):
        return dispatch.plain(op, row.Inputs(*inputs), row.Constants(*constants), config)
    call = _autograd.Call(op, name, config, want_stats)
    if not row.differentiable:
        return _autograd.run(call, [x.detach() for x in inputs], constants, needs=[False] * len(inputs))[0], ()
    value, stacked = _autograd.value(call, inputs, constants)
    return value, stacked.unbind(0) if want_stats else ()
