"""How tensors and options reach the compiled kernels: what each op passes, and one way to pass it."""

from collections.abc import Callable, Sequence
from typing import Any

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


class _Rows(str):
    """Name of a (B, ...) input, whose rows may be strided or expanded."""


class _Whole(str):
    """Name of an input that is passed contiguous."""


class _Kernel:
    """One op: `first` and `second` of `contract` on the extension's function of the same name.

    Args:
        names: of the inputs, as the extension calls them; the gradient of x is `grad_x`.
        value_shape: shape of the value, from (inputs, constants, config).
        options: the op's own arguments, from (inputs, constants, config).
        labels: the constants to pass, by name.
    """

    def __init__(
        self,
        op: str,
        names: Sequence[_Rows | _Whole],
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
        tangents = [None] * len(inputs)
        return self._run(inputs, constants, tangents, cotangent, None, needs, want_stats, config, dual=False)

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
            inputs, constants, tangents, cotangent, cotangent_tangent, needs, False, config, dual=True
        )
        return [value, *gradients]

    def _run(
        self,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        tangents: Sequence[Tensor | None],
        cotangent: Tensor | None,
        cotangent_tangent: Tensor | None,
        needs: Sequence[bool],
        want_stats: bool,
        config: OpConfig,
        dual: bool,
    ) -> list[Tensor]:
        head = inputs[0]
        shape = self.value_shape(inputs, constants, config)
        value = head.new_empty(shape)
        stats = head.new_empty((5, *shape) if want_stats else 0)
        gradients = [
            x.new_empty(x.shape) if needed else x.new_empty(0) for x, needed in zip(inputs, needs, strict=True)
        ]
        keep: list[Tensor] = []  # what is copied for the call lives until its end
        arguments = self.options(inputs, constants, config)
        if "stats" in arguments:
            arguments["stats"] = stats.data_ptr() if want_stats else 0
        for name, x, tangent, gradient, needed in zip(self.names, inputs, tangents, gradients, needs, strict=True):
            arguments.update(_input(name, x, tangent, keep))
            arguments[f"grad_{name}"] = gradient.data_ptr() if needed else 0
        for label, constant in zip(self.labels, constants, strict=False):
            arguments[label] = _address(constant, keep)
        code, row = _function(self.op)(
            is_double=head.dtype == torch.float64,
            dual=dual,
            threads=torch.get_num_threads(),
            cotangent=_address(cotangent, keep),
            cotangent_tangent=_address(cotangent_tangent, keep),
            value=value.data_ptr(),
            **arguments,
        )
        if code:
            contract.refuse(self.op, code, row, self.labels_name)
        return [value, stats, *gradients]


def categorical_sample(logits: Tensor, seed: Tensor, num_samples: int, row_offset: int) -> Tensor:
    rows, classes = logits.shape
    labels = logits.new_empty((num_samples, rows), dtype=torch.int64)
    keep: list[Tensor] = []
    code, row = _function("categorical_sample")(
        is_double=logits.dtype == torch.float64,
        dual=False,
        rows=rows,
        threads=torch.get_num_threads(),
        classes=classes,
        samples=num_samples,
        seed=int(seed),
        row_offset=row_offset,
        value=labels.data_ptr(),
        **_input(_Rows("logits"), logits, None, keep),
    )
    if code:
        contract.refuse("categorical_sample", code, row)
    return labels


def _function(op: str) -> Callable[..., tuple[int, int]]:
    function = getattr(extension.module, op)

    def named(**arguments: Any) -> tuple[int, int]:
        per_sample = max(arguments.get("dim", 1), arguments.get("classes", 1))
        try:
            if arguments.get("samples", 0) * per_sample > _MOST_SCRATCH:
                raise MemoryError
            return function(**arguments)
        except MemoryError:
            raise MemoryError(
                f"{op}: num_samples: expected a group whose samples fit in memory, a few rows at a time, "
                f"got {arguments.get('samples', 0)} samples of {per_sample} numbers"
            ) from None

    return named


def _address(tensor: Tensor | None, keep: list[Tensor]) -> int:
    if tensor is None:
        return 0
    tensor = tensor.contiguous()
    keep.append(tensor)
    return tensor.data_ptr()


def _input(name: _Rows | _Whole, x: Tensor, tangent: Tensor | None, keep: list[Tensor]) -> Arguments:
    arguments: Arguments = {f"{name}_tangent": _address(tangent, keep)}
    if isinstance(name, _Rows):
        row = x[:1]
        if not row.is_contiguous():
            x = x.contiguous()
        keep.append(x)
        arguments[f"{name}_stride"] = x.stride(0)
        arguments[name] = x.data_ptr()
    else:
        arguments[name] = _address(x, keep)
    return arguments


def _loss(rows: int, config: OpConfig) -> Arguments:
    return {
        "rows": rows,
        "reduction": _REDUCTIONS[config.reduction],
        "estimator": _ESTIMATORS[config.estimator],
        "advantage": _ADVANTAGES[config.advantage],
        "samples": config.num_samples,
        "entropy_coef": config.entropy_coef,
        "rbf_gamma": config.rbf_gamma,
        "stats": 0,
    }


def _random(constants: Sequence[Tensor], config: OpConfig) -> Arguments:
    seed = int(constants[-1]) if config.num_samples else 0
    return {"seed": seed, "row_offset": config.row_offset}


def _loss_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Sequence[int]:
    return (inputs[0].shape[0],) if config.reduction == "none" else ()


def _gaussian(family: str, scale: str) -> dict[str, _Kernel]:
    mean, scale_rows = _Rows("mean"), _Rows(scale)
    return {
        f"{family}_policy_loss": _Kernel(
            f"{family}_policy_loss",
            (mean, scale_rows, _Rows("target"), _Whole("precision")),
            _loss_shape,
            lambda inputs, constants, config: {
                **_loss(inputs[0].shape[0], config),
                **_random(constants, config),
                "dim": inputs[0].shape[1],
                "precision_kind": inputs[3].ndim,
            },
        ),
        f"{family}_surrogate_loss": _Kernel(
            f"{family}_surrogate_loss",
            (mean, scale_rows, _Whole("rewards")),
            _loss_shape,
            lambda inputs, constants, config: {**_loss(inputs[0].shape[0], config), "dim": inputs[0].shape[1]},
            labels=("given",),
        ),
        f"{family}_log_prob": _Kernel(
            f"{family}_log_prob",
            (mean, scale_rows, _Whole("at")),
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
        (_Rows("logits"), _Whole("reward_table")),
        _loss_shape,
        lambda inputs, constants, config: {
            **_loss(inputs[0].shape[0], config),
            **_random(constants, config),
            "classes": inputs[0].shape[1],
        },
        labels=("target",),
    ),
    "categorical_surrogate_loss": _Kernel(
        "categorical_surrogate_loss",
        (_Rows("logits"), _Whole("rewards")),
        _loss_shape,
        lambda inputs, constants, config: {**_loss(inputs[0].shape[0], config), "classes": inputs[0].shape[1]},
        labels=("given",),
        labels_name="samples",
    ),
    "categorical_log_prob": _Kernel(
        "categorical_log_prob",
        (_Rows("logits"),),
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
        (_Whole("rewards"),),
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
