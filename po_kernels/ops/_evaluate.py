"""The path that every op takes from checked, flattened tensors to its value."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import OPS, OpConfig, computed
from . import _autograd, _modes

_select = _modes.asked_once(dispatch.select)  # a compiled function keeps its backend


def evaluate(
    op: str,
    backend: str | None,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor | None],
    config: OpConfig,
    want_stats: bool = False,
    problems: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value of an op on flattened rows, and the statistics of a loss if they are wanted.

    Args:
        backend: the backend asked for by name.
        inputs: the differentiable tensors in the order of the table, as `_check.floating` gives them.
        constants: the others in the order of the table.
        problems: 0, or of how many problems the call is, as many as the first axis of every tensor then has.
    """
    head = inputs[0]
    row = OPS[op]
    name = _select(op, head.device.type, computed(head.dtype), backend)
    compiling = torch.compiler.is_compiling()
    if head.is_cuda and not compiling:
        name = dispatch.by_shape(op, name, backend, inputs, config.num_samples)
    if problems and (compiling or name == "reference" or not _modes.may_call_directly(*inputs, *constants)):
        one = partial(evaluate, op, backend, config=config, want_stats=want_stats)
        places = [[None if x is None else 0 for x in tensors] for tensors in (inputs, constants)]
        return torch.func.vmap(one, tuple(map(tuple, places)))(tuple(inputs), tuple(constants))
    if compiling and _modes.traced_by_a_transform():
        # The operators have no rules for transforms of torch.func, which torch.compile takes through plain torch.
        if config.estimator == "reinforce":
            raise RuntimeError(
                f"{op}: estimator='reinforce' is not available to torch.func under torch.compile, which would "
                "differentiate it twice without notice; use estimator='dice'"
            )
        name = "reference"
    call = _autograd.Call(op, name, config, want_stats, problems)
    if not row.differentiable and not compiling and _modes.transforms_active():
        return _autograd.drawn(call, inputs, constants), ()
    if name == "reference" and config.estimator != "reinforce":  # which plain torch would differentiate twice, wrongly
        if not compiling and _modes.transforms_active():
            _autograd.refuse_hidden_values(op, inputs, constants)
        return dispatch.plain(op, row.Inputs(*inputs), row.Constants(*constants), config)
    if not row.differentiable:
        return _autograd.run(call, [x.detach() for x in inputs], constants, needs=[False] * len(inputs))[0], ()
    value, stacked = _autograd.value(call, inputs, constants, compiling)
    return value, stacked.unbind(1 if problems else 0) if want_stats else ()
