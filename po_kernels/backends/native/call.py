"""How tensors and options reach a compiled kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..contract import LossConfig

# Numbered as in csrc/include/po_kernels/group.hpp and csrc/cpu/kernels.hpp.
ESTIMATORS = {"analytic": 0, "exact": 0, "reparam": 1, "dice": 2, "reinforce": 3}
ADVANTAGES = {"none": 0, "min": 1, "mean": 2, "loo": 3, "standardized": 4}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def row_input(name: str, value: Tensor, tangent: Tensor | None, keep: list[Tensor]) -> dict[str, int]:
    """Arguments of a (B, D) input: rows may be strided or expanded, columns not.

    Args:
        keep: holds what is copied here until the kernel has run.
    """
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        value = value.contiguous()
    if tangent is not None:
        tangent = tangent.contiguous()
        keep.append(tangent)
    keep.append(value)
    return {name: value.data_ptr(), f"{name}_stride": value.stride(0), f"{name}_tangent": address(tangent)}


def shared_input(name: str, value: Tensor, tangent: Tensor | None, keep: list[Tensor]) -> dict[str, int]:
    """Arguments of an input that all rows share."""
    value = value.contiguous()
    keep.append(value)
    if tangent is not None:
        tangent = tangent.contiguous()
        keep.append(tangent)
    return {name: value.data_ptr(), f"{name}_tangent": address(tangent)}


def run_loss(
    op: str,
    kernel: Callable[..., tuple[int, int]],
    names: Sequence[str],
    inputs: Sequence[Tensor],
    arguments: dict[str, Any],
    config: LossConfig,
    *,
    seed: Tensor | None,
    needs: Sequence[bool],
    want_stats: bool,
    cotangent: Tensor | None,
    dual: bool,
    cotangent_tangent: Tensor | None = None,
) -> list[Tensor]:
    """Allocates the outputs, runs the kernel, and raises what it refuses.

    Args:
        names: of the inputs, for the arguments `grad_<name>`.
        arguments: the inputs' own.

    Returns:
        [loss, stats, *gradients] as `contract` wants them of "first".
    """
    first = inputs[0]
    rows = first.shape[0]
    shape = (rows,) if config.reduction == "none" else ()
    loss = first.new_empty(shape)
    stats = first.new_empty((5, *shape) if want_stats else 0)
    gradients = [
        torch.empty(x.shape, dtype=x.dtype) if needed else x.new_empty(0)
        for x, needed in zip(inputs, needs, strict=True)
    ]
    cotangent = None if cotangent is None else cotangent.contiguous()
    cotangent_tangent = None if cotangent_tangent is None else cotangent_tangent.contiguous()
    code, row = kernel(
        is_double=first.dtype == torch.float64,
        dual=dual,
        rows=rows,
        reduction=REDUCTIONS[config.reduction],
        estimator=ESTIMATORS[config.estimator],
        advantage=ADVANTAGES[config.advantage],
        samples=config.num_samples,
        entropy_coef=config.entropy_coef,
        rbf_gamma=config.rbf_gamma,
        seed=0 if seed is None else int(seed),
        row_offset=config.row_offset,
        threads=torch.get_num_threads(),
        cotangent=address(cotangent),
        cotangent_tangent=address(cotangent_tangent),
        loss=loss.data_ptr(),
        stats=stats.data_ptr() if want_stats else 0,
        **{
            f"grad_{name}": gradient.data_ptr() if needed else 0
            for name, gradient, needed in zip(names, gradients, needs, strict=True)
        },
        **arguments,
    )
    if code:
        contract.refuse(op, code, row)
    return [loss, stats, *gradients]
