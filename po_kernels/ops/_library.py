"""The opaque kernels as torch.library operators: schemas and fakes of all ops.

A differentiable op has two entry points. `<op>_first` returns its value, the statistics of a loss and the
gradient of each input asked for; `<op>_second` returns the derivative of both in a direction. Backends
only implement them; see `po_kernels.backends.contract`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import OpConfig

NUM_STATS = 5

_CONFIG = (
    "bool want_stats, str backend, str estimator, int num_samples, str advantage, float? rbf_gamma, "
    "float entropy_coef, str reduction, int row_offset"
)

_library = torch.library.Library("po_kernels", "DEF")


def _loss_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> tuple[int, ...]:
    return (inputs[0].shape[0],) if config.reduction == "none" else ()


def _sample_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> tuple[int, ...]:
    return (config.num_samples, *inputs[0].shape)


def _value_argument_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> tuple[int, ...]:
    return tuple(inputs[2].shape[:-1])


def _labels_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> tuple[int, ...]:
    return tuple(constants[0].shape)


def _rewards_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> tuple[int, ...]:
    return tuple(inputs[0].shape)


VALUE_SHAPE: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor], OpConfig], tuple[int, ...]]] = {
    "gaussian_policy_loss": _loss_shape,
    "gaussian_surrogate_loss": _loss_shape,
    "gaussian_log_prob": _value_argument_shape,
    "gaussian_sample": _sample_shape,
    "mvn_policy_loss": _loss_shape,
    "mvn_surrogate_loss": _loss_shape,
    "mvn_log_prob": _value_argument_shape,
    "mvn_sample": _sample_shape,
    "categorical_policy_loss": _loss_shape,
    "categorical_surrogate_loss": _loss_shape,
    "categorical_log_prob": _labels_shape,
    "group_advantage": _rewards_shape,
}


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
        return dispatch.kernel(backend, op, "first")(inputs, constants, cotangent, needs, want_stats, OpConfig(*config))

    def second(inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, backend, *config):
        return dispatch.kernel(backend, op, "second")(
            inputs, constants, tangents, cotangent, cotangent_tangent, needs, OpConfig(*config)
        )

    def fake_first(inputs, constants, cotangent, needs, want_stats, backend, *config):
        shape = VALUE_SHAPE[op](inputs, constants, OpConfig(*config))
        stats = (NUM_STATS, *shape) if want_stats else (0,)
        return [inputs[0].new_empty(shape), inputs[0].new_empty(stats), *_gradients(inputs, needs)]

    def fake_second(inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, backend, *config):
        shape = VALUE_SHAPE[op](inputs, constants, OpConfig(*config))
        return [inputs[0].new_empty(shape), *_gradients(inputs, needs)]

    for name, kernel, fake in (("first", first, fake_first), ("second", second, fake_second)):
        _library.impl(f"{op}_{name}", kernel, "CPU")
        _library.impl(f"{op}_{name}", kernel, "CUDA")
        torch.library.register_fake(f"po_kernels::{op}_{name}", fake, lib=_library)


for _op in VALUE_SHAPE:
    _define(_op)

FIRST = {op: getattr(torch.ops.po_kernels, f"{op}_first").default for op in VALUE_SHAPE}
SECOND = {op: getattr(torch.ops.po_kernels, f"{op}_second").default for op in VALUE_SHAPE}


_library.define(
    "categorical_sample(Tensor logits, Tensor seed, str backend, int num_samples, int row_offset) -> Tensor"
)


def _categorical_sample(logits: Tensor, seed: Tensor, backend: str, num_samples: int, row_offset: int) -> Tensor:
    return dispatch.kernel(backend, "categorical_sample", "sample")(logits, seed, num_samples, row_offset)


def _fake_categorical_sample(logits: Tensor, seed: Tensor, backend: str, num_samples: int, row_offset: int) -> Tensor:
    return logits.new_empty((num_samples, logits.shape[0]), dtype=torch.int64)


_library.impl("categorical_sample", _categorical_sample, "CPU")
_library.impl("categorical_sample", _categorical_sample, "CUDA")
torch.library.register_fake("po_kernels::categorical_sample", _fake_categorical_sample, lib=_library)

categorical_sample = torch.ops.po_kernels.categorical_sample.default
