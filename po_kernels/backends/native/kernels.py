"""How tensors and options reach the compiled kernels: what each op passes, and one way to pass it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import extension
from .. import contract
from ..contract import OpConfig

# Numbered as in csrc/include/po_kernels/group.hpp and csrc/cpu/kernels.hpp.
_ESTIMATORS = {"analytic": 0, "exact": 0, "reparam": 1, "dice": 2, "reinforce": 3}
_ADVANTAGES = {"none": 0, "min": 1, "mean": 2, "loo": 3, "standardized": 4}
_REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}

Arguments = dict[str, Any]

# Samples times dimensions of a row: beyond it no machine has the memory, and sizes in bytes would overflow.
_MOST_SCRATCH = 2**48


class _Input(NamedTuple):
    """How the extension calls an input, and what goes with it."""

    value: str
    tangent: str
    gradient: str
    stride: str  # empty for an input that is passed contiguous


def _rows(name: str) -> _Input:
    """A (B, ...) input, whose rows may be strided or expanded."""
    return _Input(name, f"{name}_tangent", f"grad_{name}", f"{name}_stride")


def _whole(name: str) -> _Input:
    return _Input(name, f"{name}_tangent", f"grad_{name}", "")


class _Kernel:
    """One op: `first` and `second` of `contract` on the extension's function of the same name.

    Args:
        names: of the inputs.
        value_shape: shape of the value, from (inputs, constants, config).
        options: the op's own arguments, from (inputs, constants, config).
        labels: the constants to pass, by name.
    """

    def __init__(
        self,
        op: str,
        names: Sequence[_Input],
        value_shape: Callable[[Sequence[Tensor], Sequence[Tensor], OpConfig], Sequence[int]],
        options: Callable[[Sequence[Tensor], Sequence[Tensor], OpConfig], Arguments],
        labels: Sequence[str] = (),
        labels_name: str = "target",
    ) -> None:
        self.op = op
        self.names = names
        self.value_shape = value_shape
        self.options = options
        self.labels = labels
        self.labels_name = labels_name

    def first(
        self,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        cotangent: Tensor | None,
        needs: Sequence[bool],
        want_stats: bool,
        config: OpConfig,
    ) -> list[Tensor]:
        return self._run(inputs, constants, None, cotangent, None, needs, want_stats, config)

    def second(
        self,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        tangents: Sequence[Tensor | None],
        cotangent: Tensor,
        cotangent_tangent: Tensor | None,
        needs: Sequence[bool],
        config: OpConfig,
    ) -> list[Tensor]:
        value, _, *gradients = self._run(
            inputs, constants, tangents, cotangent, cotangent_tangent, needs, False, config
        )
        return [value, *gradients]

    def _run(
        self,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        tangents: Sequence[Tensor | None] | None,
        cotangent: Tensor | None,
        cotangent_tangent: Tensor | None,
        needs: Sequence[bool],
        want_stats: bool,
        config: OpConfig,
    ) -> list[Tensor]:
        head = inputs[0]
        shape = self.value_shape(inputs, constants, config)
        outputs = [head.new_empty(shape), head.new_empty((5, *shape) if want_stats else 0)]
        keep: list[Tensor] = []  # what is copied for the call lives until its end
        arguments = self.options(inputs, constants, config)
        arguments["is_double"] = head.dtype == torch.float64
        arguments["dual"] = tangents is not None
        arguments["threads"] = torch.get_num_threads()
        arguments["value"] = outputs[0].data_ptr()
        if want_stats:
            arguments["stats"] = outputs[1].data_ptr()
        for names, x, needed in zip(self.names, inputs, needs, strict=True):
            _pass_input(arguments, names, x, keep)
            if needed:
                gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
                arguments[names.gradient] = gradient.data_ptr()
            else:
                gradient = x.new_empty(0)
            outputs.append(gradient)
        for names, tangent in zip(self.names, tangents or (), strict=False):
            if tangent is not None:
                arguments[names.tangent] = _address(tangent, keep)
        for label, constant in zip(self.labels, constants, strict=False):
            arguments[label] = _address(constant, keep)
        if cotangent is not None:
            arguments["cotangent"] = _address(cotangent, keep)
        if cotangent_tangent is not None:
            arguments["cotangent_tangent"] = _address(cotangent_tangent, keep)
        _call(self.op, arguments, self.labels_name)
        return outputs


def categorical_sample(logits: Tensor, seed: Tensor, num_samples: int, row_offset: int) -> Tensor:
    rows, classes = logits.shape
    labels = logits.new_empty((num_samples, rows), dtype=torch.int64)
    keep: list[Tensor] = []
    arguments = {
        "is_double": logits.dtype == torch.float64,
        "dual": False,
        "rows": rows,
        "threads": torch.get_num_threads(),
        "classes": classes,
        "samples": num_samples,
        "seed": int(seed),
        "row_offset": row_offset,
        "value": labels.data_ptr(),
    }
    _pass_input(arguments, _rows("logits"), logits, keep)
    _call("categorical_sample", arguments)
    return labels


def _call(op: str, arguments: Arguments, labels_name: str = "target") -> None:
    """Runs the extension's function; raises what it refuses."""
    samples = arguments.get("samples", 0)
    per_sample = max(arguments.get("dim", 1), arguments.get("classes", 1))
    try:
        if samples * per_sample > _MOST_SCRATCH:
            raise MemoryError
        code, row = getattr(extension.module, op)(**arguments)
    except MemoryError:
        raise MemoryError(
            f"{op}: num_samples: expected a group whose samples fit in memory, a few rows at a time, "
            f"got {samples} samples of {per_sample} numbers"
        ) from None
    if code:
        contract.refuse(op, code, row, labels_name)


def _address(tensor: Tensor, keep: list[Tensor]) -> int:
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        keep.append(tensor)
    return tensor.data_ptr()


def _pass_input(arguments: Arguments, names: _Input, x: Tensor, keep: list[Tensor]) -> None:
    if names.stride:
        if not x.is_contiguous() and not x[:1].is_contiguous():
            x = x.contiguous()
            keep.append(x)
        arguments[names.stride] = x.stride(0)
        arguments[names.value] = x.data_ptr()
    else:
        arguments[names.value] = _address(x, keep)


def _loss(inputs: Sequence[Tensor], config: OpConfig) -> Arguments:
    return {
        "rows": inputs[0].shape[0],
        "reduction": _REDUCTIONS[config.reduction],
        "estimator": _ESTIMATORS[config.estimator],
        "advantage": _ADVANTAGES[config.advantage],
        "samples": config.num_samples,
        "entropy_coef": config.entropy_coef,
        "rbf_gamma": config.rbf_gamma,
    }


def _random(constants: Sequence[Tensor], config: OpConfig) -> Arguments:
    seed = int(constants[-1]) if config.num_samples else 0
    return {"seed": seed, "row_offset": config.row_offset}


def _loss_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Sequence[int]:
    return (inputs[0].shape[0],) if config.reduction == "none" else ()


def _gaussian(family: str, scale: str) -> dict[str, _Kernel]:
    mean, scale_rows = _rows("mean"), _rows(scale)
    return {
        f"{family}_policy_loss": _Kernel(
            f"{family}_policy_loss",
            (mean, scale_rows, _rows("target"), _whole("precision")),
            _loss_shape,
            lambda inputs, constants, config: {
                **_loss(inputs, config),
                **_random(constants, config),
                "dim": inputs[0].shape[1],
                "precision_kind": inputs[3].ndim,
            },
        ),
        f"{family}_surrogate_loss": _Kernel(
            f"{family}_surrogate_loss",
            (mean, scale_rows, _whole("rewards")),
            _loss_shape,
            lambda inputs, constants, config: {**_loss(inputs, config), "dim": inputs[0].shape[1]},
            labels=("given",),
        ),
        f"{family}_log_prob": _Kernel(
            f"{family}_log_prob",
            (mean, scale_rows, _whole("at")),
            lambda inputs, constants, config: inputs[2].shape[:-1],
            lambda inputs, constants, config: {
                "rows": inputs[0].shape[0],
                "dim": inputs[0].shape[1],
                "count": inputs[2].shape[0],
            },
        ),
        f"{family}_sample": _Kernel(
            f"{family}_sample",
            (mean, scale_rows),
            lambda inputs, constants, config: (config.num_samples, *inputs[0].shape),
            lambda inputs, constants, config: {
                **_random(constants, config),
                "rows": inputs[0].shape[0],
                "dim": inputs[0].shape[1],
                "samples": config.num_samples,
            },
        ),
    }


_CATEGORICAL = {
    "categorical_policy_loss": _Kernel(
        "categorical_policy_loss",
        (_rows("logits"), _whole("reward_table")),
        _loss_shape,
        lambda inputs, constants, config: {
            **_loss(inputs, config),
            **_random(constants, config),
            "classes": inputs[0].shape[1],
        },
        labels=("target",),
    ),
    "categorical_surrogate_loss": _Kernel(
        "categorical_surrogate_loss",
        (_rows("logits"), _whole("rewards")),
        _loss_shape,
        lambda inputs, constants, config: {**_loss(inputs, config), "classes": inputs[0].shape[1]},
        labels=("given",),
        labels_name="samples",
    ),
    "categorical_log_prob": _Kernel(
        "categorical_log_prob",
        (_rows("logits"),),
        lambda inputs, constants, config: constants[0].shape,
        lambda inputs, constants, config: {
            "rows": inputs[0].shape[0],
            "classes": inputs[0].shape[1],
            "count": constants[0].shape[0],
        },
        labels=("at",),
        labels_name="value",
    ),
}

_ADVANTAGE = {
    "group_advantage": _Kernel(
        "group_advantage",
        (_whole("rewards"),),
        lambda inputs, constants, config: inputs[0].shape,
        lambda inputs, constants, config: {
            "rows": inputs[0].shape[1],
            "samples": inputs[0].shape[0],
            "advantage": _ADVANTAGES[config.advantage],
            "rbf_gamma": config.rbf_gamma,
        },
    )
}

KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    op: {"first": kernel.first, "second": kernel.second}
    for op, kernel in (
        _gaussian("gaussian", "log_std") | _gaussian("mvn", "scale_tril") | _CATEGORICAL | _ADVANTAGE
    ).items()
}
KERNELS["categorical_sample"] = {"sample": categorical_sample}
