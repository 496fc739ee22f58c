"""The path of ops whose value is not a loss: log-probabilities, samples, advantages."""

from collections.abc import Sequence

from torch import Tensor

from .. import dispatch
from ..backends.contract import OpConfig
from . import _autograd


def evaluate(
    op: str, backend: str | None, inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig
) -> Tensor:
    """Runs op on flattened rows.

    Args:
        backend: the backend asked for by name.
        inputs: the differentiable tensors, all of one dtype that is computed with, and one device.
        constants: labels, or the seed.
    """
    name = dispatch.select(op, inputs[0].device.type, inputs[0].dtype, backend)
    if name == "reference":
        return dispatch.plain(op)(inputs, constants, config)
    call = _autograd.Call(op, name, config, False, (None,) * len(inputs))
    return _autograd.value(call, inputs, constants)[0]
