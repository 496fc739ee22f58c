"""How tensors and options reach the kernels of the compiled extension: what each op passes, and one way to pass it."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import BothOrders, OpConfig, Request

# Numbered as in csrc/include/po_kernels/group.hpp and csrc/calls.hpp.
_ESTIMATORS = {"analytic": 0, "exact": 0, "reparam": 1, "dice": 2, "reinforce": 3}
ADVANTAGES = {"none": 0, "min": 1, "mean": 2, "loo": 3, "standardized": 4}
_REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}

Arguments = dict[str, Any]


class Input(NamedTuple):
    """How the extension calls an input, and what goes with it."""

    value: str
    tangent: str
    gradient: str
    stride: str  # empty for an input that is passed contiguous


def rows(name: str) -> Input:
    """A (B, ...) input, whose rows may be strided or expanded."""
    return Input(name, f"{name}_tangent", f"grad_{name}", f"{name}_stride")


def whole(name: str) -> Input:
    return Input(name, f"{name}_tangent", f"grad_{name}", "")


class Kernel(BothOrders):
    """One op: `first` and `second` of `contract` on a function of the extension, which a backend's `call` runs.

    Args:
        names: of the inputs.
        value_shape: shape of the value, from (inputs, constants, config).
        options: the op's own arguments, from (inputs, constants, config).
        labels: the constants to pass, by name.
    """

    def __init__(
        self,
        op: str,
        names: Sequence[Input],
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

    def run(self, request: Request) -> list[Tensor]:
        inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, config = request
        head = inputs[0]
        shape = self.value_shape(inputs, constants, config)
        outputs = [head.new_empty(shape), head.new_empty((5, *shape) if want_stats else 0)]
        keep: list[Tensor] = []  # what is copied for the call lives until its end
        arguments = self.options(inputs, constants, config)
        arguments["is_double"] = head.dtype == torch.float64
        arguments["dual"] = tangents is not None
        arguments["out"] = outputs[0].data_ptr()
        if want_stats:
            arguments["stats"] = outputs[1].data_ptr()
        for names, x, needed in zip(self.names, inputs, needs, strict=True):
            pass_input(arguments, names, x, keep)
            if needed:
                gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
                arguments[names.gradient] = gradient.data_ptr()
            else:
                gradient = x.new_empty(0)
            outputs.append(gradient)
        for names, tangent in zip(self.names, tangents or (), strict=False):
            if tangent is not None:
                arguments[names.tangent] = address(tangent, keep)
        for label, constant in zip(self.labels, constants, strict=False):
            arguments[label] = address(constant, keep)
        if cotangent is not None:
            arguments["cotangent"] = address(cotangent, keep)
        if cotangent_tangent is not None:
            arguments["cotangent_tangent"] = address(cotangent_tangent, keep)
        self.call(arguments, head)
        return outputs

    @abstractmethod
    def call(self, arguments: Arguments, head: Tensor) -> None:
        """Runs the kernel on the device of `head`; raises what it refuses. A seed is still a tensor."""


def address(tensor: Tensor, keep: list[Tensor]) -> int:
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        keep.append(tensor)
    return tensor.data_ptr()


def pass_input(arguments: Arguments, names: Input, x: Tensor, keep: list[Tensor]) -> None:
    if names.stride:
        if not x.is_contiguous() and not x[:1].is_contiguous():
            x = x.contiguous()
            keep.append(x)
        arguments[names.stride] = x.stride(0)
        arguments[names.value] = x.data_ptr()
    else:
        arguments[names.value] = address(x, keep)


def loss(inputs: Sequence[Tensor], config: OpConfig) -> Arguments:
    return {
        "rows": inputs[0].shape[0],
        "reduction": _REDUCTIONS[config.reduction],
        "estimator": _ESTIMATORS[config.estimator],
        "advantage": ADVANTAGES[config.advantage],
        "num_samples": config.num_samples,
        "entropy_coef": config.entropy_coef,
        "rbf_gamma": config.rbf_gamma,
    }


def random(constants: Sequence[Tensor], config: OpConfig) -> Arguments:
    return {"seed": constants[-1] if config.num_samples else 0, "row_offset": config.row_offset}


def loss_shape(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Sequence[int]:
    return (inputs[0].shape[0],) if config.reduction == "none" else ()


def gaussian(kernel: Callable[..., Kernel], family: str) -> dict[str, Kernel]:
    """The ops of one Gaussian; `kernel` takes what Kernel does."""
    mean, scale_rows = rows("mean"), rows("scale")
    return {
        f"{family}_policy_loss": kernel(
            f"{family}_policy_loss",
            (mean, scale_rows, rows("target"), whole("precision")),
            loss_shape,
            lambda inputs, constants, config: {
                **loss(inputs, config),
                **random(constants, config),
                "dim": inputs[0].shape[1],
                "precision_ndim": inputs[3].ndim,
            },
        ),
        f"{family}_surrogate_loss": kernel(
            f"{family}_surrogate_loss",
            (mean, scale_rows, whole("rewards")),
            loss_shape,
            lambda inputs, constants, config: {**loss(inputs, config), "dim": inputs[0].shape[1]},
            labels=("samples",),
        ),
        f"{family}_log_prob": kernel(
            f"{family}_log_prob",
            (mean, scale_rows, whole("value")),
            lambda inputs, constants, config: inputs[2].shape[:-1],
            lambda inputs, constants, config: {
                "rows": inputs[0].shape[0],
                "dim": inputs[0].shape[1],
                "count": inputs[2].shape[0],
            },
        ),
        f"{family}_sample": kernel(
            f"{family}_sample",
            (mean, scale_rows),
            lambda inputs, constants, config: (config.num_samples, *inputs[0].shape),
            lambda inputs, constants, config: {
                **random(constants, config),
                "rows": inputs[0].shape[0],
                "dim": inputs[0].shape[1],
                "num_samples": config.num_samples,
            },
        ),
    }
