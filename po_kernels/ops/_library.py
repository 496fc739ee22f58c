"""The opaque kernels as torch.library operators: one schema and one fake for all loss families.

A loss kernel has two entry points. `<op>_first` returns the reduced loss, its statistics and the
gradient of each input asked for; `<op>_second` returns the directional derivative of the loss and
the derivative of the gradients in that direction. Backends only implement them; see
`po_kernels.backends.contract`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import LossConfig

NUM_STATS = 5

_CONFIG = (
    "bool want_stats, str backend, str estimator, int num_samples, str advantage, float? rbf_gamma, "
    "float entropy_coef, str reduction, int row_offset"
)

LOSS_OPS = (
    "gaussian_policy_loss",
    "gaussian_surrogate_loss",
    "mvn_policy_loss",
    "mvn_surrogate_loss",
    "categorical_policy_loss",
    "categorical_surrogate_loss",
)

_library = torch.library.Library("po_kernels", "DEF")


def _loss_shape(inputs: Sequence[Tensor], reduction: str) -> tuple[int, ...]:
    return (inputs[0].shape[0],) if reduction == "none" else ()


def _gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape) if needed else x.new_empty(0) for x, needed in zip(inputs, needs, strict=True)]


def _define(op: str) -> None:
    _library.define(
        f"{op}_first(Tensor[] inputs, Tensor[] constants, Tensor? cotangent, bool[] needs, {_CONFIG}) -> Tensor[]"
    )
    _library.define(
        f"{op}_second(Tensor[] inputs, Tensor[] constants, Tensor?[] tangents, Tensor cotangent, "
        f"Tensor? cotangent_tangent, bool[] needs, {_CONFIG}) -> Tensor[]"
    )

    def first(inputs, constants, cotangent, needs, want_stats, backend, *config):
        return dispatch.kernel(backend, op, "first")(
            inputs, constants, cotangent, needs, want_stats, LossConfig(*config)
        )

    def second(inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, backend, *config):
        return dispatch.kernel(backend, op, "second")(
            inputs, constants, tangents, cotangent, cotangent_tangent, needs, LossConfig(*config)
        )

    def fake_first(inputs, constants, cotangent, needs, want_stats, backend, *config):
        shape = _loss_shape(inputs, LossConfig(*config).reduction)
        stats = (NUM_STATS, *shape) if want_stats else (0,)
        return [inputs[0].new_empty(shape), inputs[0].new_empty(stats), *_gradients(inputs, needs)]

    def fake_second(inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, backend, *config):
        shape = _loss_shape(inputs, LossConfig(*config).reduction)
        return [inputs[0].new_empty(shape), *_gradients(inputs, needs)]

    for name, kernel, fake in (("first", first, fake_first), ("second", second, fake_second)):
        _library.impl(f"{op}_{name}", kernel, "CPU")
        _library.impl(f"{op}_{name}", kernel, "CUDA")
        torch.library.register_fake(f"po_kernels::{op}_{name}", fake, lib=_library)


for _op in LOSS_OPS:
    _define(_op)

FIRST = {op: getattr(torch.ops.po_kernels, f"{op}_first").default for op in LOSS_OPS}
SECOND = {op: getattr(torch.ops.po_kernels, f"{op}_second").default for op in LOSS_OPS}
