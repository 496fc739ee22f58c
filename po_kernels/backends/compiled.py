"""How a request reaches the kernels of the compiled extension: arguments by name, made from the table of ops."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .advantages import ADVANTAGES
from .contract import ESTIMATORS, HALF, NUM_STATS, REDUCTIONS, SIZES, Op, OpConfig, Request

Arguments = dict[str, Any]

_NUMBERS: dict[str, dict[str, int]] = {
    "estimator": ESTIMATORS,
    "advantage": {name: each.number for name, each in ADVANTAGES.items()},
    "reduction": REDUCTIONS,
}


# What a loss of shape () is made like, by `empty_like` as its gradients are: a second way to make tensors takes up
# caches, which is much of a small call's time.
_SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


class Kernel(ABC):
    """One op: a function of the extension, which a backend's `call` runs.

    It is called with addresses, 0 or nothing for what is absent. An input `x` is `x`, its tangent `x_tangent` and its
    gradient `grad_x`; one whose first axis counts rows may be strided along it, by `x_stride`; of one with several
    shapes `x_ndim` tells which. Constants go by their names, sizes by those of `contract.SIZES`, the value is `out`.
    """

    def __init__(self, op: Op) -> None:
        self.op = op
        names = (*op.Inputs._fields, *op.Constants._fields)
        self.inputs: list[tuple[str, str, str, str]] = [
            (name, f"{name}_tangent", f"grad_{name}", f"{name}_stride" if op.axes[name].startswith("B") else "")
            for name in op.Inputs._fields
        ]
        self.several: list[tuple[str, int]] = [
            (f"{name}_ndim", names.index(name)) for name in names if op.axes[name] == "*"
        ]
        self.constants: list[tuple[str, int]] = [
            (name, names.index(name)) for name in op.Constants._fields if name != "seed"
        ]
        self.sizes: list[tuple[str, int, int]] = [
            (SIZES[letter], names.index(name), axis) for letter, (name, axis) in op.places.items()
        ]
        self.draws: bool = "seed" in names
        self.base: Callable[[OpConfig], Arguments] = lru_cache(maxsize=256)(self._base)

    def _base(self, config: OpConfig) -> Arguments:
        chosen = {name: getattr(config, name) for name in self.op.options}
        return {name: _NUMBERS[name][each] if name in _NUMBERS else each for name, each in chosen.items()}

    def __call__(self, request: Request) -> list[Tensor | None]:
        arguments, outputs, keep = self._prepared(request)
        self.call(arguments, request)
        del keep
        return outputs

    def _prepared(self, request: Request) -> tuple[Arguments, list[Tensor | None], list[Tensor]]:
        """Arguments, outputs to be filled, and what has to live until then."""
        inputs, constants, tangents, cotangent, cotangent_tangent, needs, want_stats, config = request
        op, head, tensors = self.op, inputs[0], (*inputs, *constants)
        shape = op.value_shape(inputs, constants, config)
        if shape or not head.is_cpu:
            out = head.new_empty(shape, dtype=op.value_dtype(head.dtype))
        else:
            out = torch.empty_like(_SCALARS[head.dtype])
        outputs: list[Tensor | None] = [out, None]
        keep: list[Tensor] = []
        arguments = self.base(config).copy()
        arguments["is_double"] = head.dtype == torch.float64
        if op.reads_half:
            arguments["half"] = HALF.index(head.dtype) + 1 if head.dtype in HALF else 0
        arguments["dual"] = tangents is not None
        arguments["out"] = out.data_ptr()
        if want_stats:
            stats = outputs[1] = head.new_empty((NUM_STATS, *shape))
            arguments["stats"] = stats.data_ptr()
        for size, position, axis in self.sizes:
            arguments[size] = tensors[position].shape[axis]
        for ndim, position in self.several:
            arguments[ndim] = tensors[position].ndim
        for (name, _, gradient_name, stride), x, needed in zip(self.inputs, inputs, needs, strict=True):
            contiguous = x.is_contiguous()
            as_it_is = contiguous or (stride and x[:1].is_contiguous())
            gradient = None
            if needed:
                in_place = config.overwrite and as_it_is
                gradient = x if in_place else torch.empty_like(x) if contiguous else x.new_empty(x.shape)
                arguments[gradient_name] = gradient.data_ptr()
            outputs.append(gradient)
            if not as_it_is:
                x = x.contiguous()
                keep.append(x)
            arguments[name] = x.data_ptr()
            if stride:
                arguments[stride] = x.stride(0)
        if tangents is not None:
            for (_, name, _, _), tangent in zip(self.inputs, tangents, strict=True):
                if tangent is not None:
                    arguments[name] = _address(tangent, keep)
        for name, position in self.constants:
            if (constant := tensors[position]) is not None:
                arguments[name] = _address(constant, keep)
        if self.draws:
            seed = constants.seed
            arguments["seed"] = 0 if seed is None else seed
        if cotangent is not None:
            arguments["cotangent"] = _address(cotangent, keep)
        if cotangent_tangent is not None:
            arguments["cotangent_tangent"] = _address(cotangent_tangent, keep)
        return arguments, outputs, keep

    def _batch(self, request: Request, problems: int) -> list[Tensor | None]:
        """The outputs of so many problems, which the first axis of every tensor counts, in one call."""
        op, names = self.op, [name for name, *_ in self.inputs]
        strided = {name for name, *_, stride in self.inputs if stride}
        steps: dict[str, Any] = {}

        def ready(tensors: Any, names: Any) -> list[Any]:
            """Such that a problem's lies in memory as a call takes it."""
            found = []
            for name, x in zip(names, tensors, strict=True):
                if x is not None:
                    first = x[0]
                    if not (first.is_contiguous() or (name in strided and first[:1].is_contiguous())):
                        x = x.contiguous()
                    steps[name] = x.stride(0) * x.element_size()
                found.append(x)
            return found

        inputs, constants, tangents, cotangent, cotangent_tangent, *rest = request
        request = op.request(
            ready(inputs, names), ready(constants, op.Constants._fields),
            None if tangents is None else ready(tangents, [name for _, name, _, _ in self.inputs]),
            *ready((cotangent, cotangent_tangent), ("cotangent", "cotangent_tangent")), *rest,
        )  # fmt: skip
        if self.draws and request.constants.seed is not None:
            steps["seed"] = request.constants.seed.tolist()
        arguments, outputs, keep = self._prepared(op.problem(request, 0))
        found: list[Tensor | None] = []
        for name, output in zip(("out", "stats", *[name for _, _, name, _ in self.inputs]), outputs, strict=True):
            if output is not None:
                steps[name] = output.numel() * output.element_size()
                output = output.new_empty((problems, *output.shape))
                arguments[name] = output.data_ptr()
            found.append(output)
        self.call(arguments, request, problems, steps)
        del keep
        return found

    @abstractmethod
    def call(self, arguments: Arguments, request: Request, *batch: Any) -> None:
        """Runs the kernel on the device of the tensors; raises what it refuses. A seed is still a tensor.

        Of a batch the request is whole, the arguments are those of its first problem, and `batch` is the number of
        problems and the bytes, or the numbers, by which one's arguments differ from those of the one before.
        """


def _address(tensor: Tensor, keep: list[Tensor]) -> int:
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        keep.append(tensor)
    return tensor.data_ptr()
