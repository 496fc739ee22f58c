"""The ops of this backend, as `po_kernels.backends.contract` describes them."""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .. import checks
from ..contract import OPS, Kernel, Request
from . import advantage, categorical, family, launch
from .launch import Call

_LABELS_AT_ONCE = 256  # of a row
_MOST_IN_REGISTERS = 64  # rows of a matrix of sums


def _policy_loss(call: Call) -> tuple[Tensor, Tensor]:
    precision = call.inputs.precision
    dim, kind = call.inputs.mean.shape[1], precision.ndim
    group = call.whole_group(max(call.config.num_samples, 1))
    apart = _taken_apart(dim, call.known["TRIANGULAR"], call.dual)
    tile = launch.drawn_tile(group, dim, call.dtype, kind == 2) if apart else launch.tile(group, dim, kind == 2)
    shared = ((1,), (dim,), (dim, dim))[kind] if call.needs.precision else (0,)
    value, stats, sums = launch.loss(
        call, family.policy_loss, tile, shared,
        {"dim": dim, "count": group, "KIND": kind, "APART": apart,
         "CLOSED_FORM": call.config.estimator == "analytic", "WHITE": call.known["SCORE"],
         "IN_MEMORY": tile.dim > _MOST_IN_REGISTERS},
        **call.rows("mean"), **call.rows("scale"), **call.rows("target"),
        precision=launch.Pair(*(_symmetric(x) for x in call.pairs.precision)), seed=call.seed,
        row_offset=call.config.row_offset,
    )  # fmt: skip
    if call.needs.precision:
        found = _symmetric(sums) if kind == 2 else sums.reshape(precision.shape)
        call.gradients = call.gradients._replace(precision=found)
    return value, stats


def _taken_apart(dim: int, triangular: bool, dual: bool) -> bool:
    """Whether a thread has all dimensions of a drawn sample, and loops over them are unrolled.

    Code grows with their square, and the time to compile it faster: at these limits it is less than a minute.
    """
    return dim <= ((8 if dual else 16) if triangular else (17 if dual else 32))


def _symmetric(u: Tensor) -> Tensor:
    return (0.5 * (u + u.mT) if u.ndim == 2 else u).contiguous()


def _surrogate_loss(call: Call) -> tuple[Tensor, Tensor]:
    samples = launch.with_contiguous_rows(call.constants.samples, 2)
    count, _, dim = samples.shape
    value, stats, _ = launch.loss(
        call, family.surrogate_loss, launch.tile(call.whole_group(count), dim), (0,),
        {"dim": dim, "count": count},
        **call.rows("mean"), **call.rows("scale"), **call.rows("rewards", 2),
        samples=samples, samples_stride_g=samples.stride(0), samples_stride=samples.stride(1),
    )  # fmt: skip
    return value, stats


def _log_prob(call: Call) -> tuple[Tensor, Tensor]:
    count, rows, dim = call.inputs.value.shape
    return launch.in_chunks(
        call, family.log_prob, call.empty(count, rows), launch.tile(count, dim),
        {"dim": dim}, call.needs.mean or call.needs.scale,
        **call.rows("mean"), **call.rows("scale"), **call.rows("value", 2),
        cotangent=call.cotangent, to=call.gradients,
    )  # fmt: skip


def _sample(call: Call) -> tuple[Tensor, Tensor]:
    rows, dim = call.inputs.mean.shape
    count = call.config.num_samples
    return launch.in_chunks(
        call, family.draw, call.empty(count, rows, dim), launch.tile(count, dim),
        {"dim": dim}, call.needs.mean or call.needs.scale,
        **call.rows("mean"), **call.rows("scale"), cotangent=call.cotangent, to=call.gradients,
        seed=call.seed, row_offset=call.config.row_offset,
    )  # fmt: skip


def _categorical_policy_loss(call: Call) -> tuple[Tensor, Tensor]:
    classes = call.inputs.logits.shape[1]
    count = call.whole_group(max(call.config.num_samples, 1))
    exact, need = call.config.estimator == "exact", call.needs.reward_table
    tile = launch.expected_tile(classes, need) if exact else launch.class_tile(count, classes)
    in_registers = need and call.dtype == torch.float32 and tile.rows >= 16 and 16 <= tile.dim <= _MOST_IN_REGISTERS
    value, stats, sums = launch.loss(
        call, categorical.policy_loss, tile, (classes, classes) if need else (0,),
        {"CLOSED_FORM": exact, "IN_REGISTERS": in_registers},
        **call.rows("logits"), target=call.constants.target.contiguous(),
        # By label first, for the rewards of a row to be neighbours.
        table=launch.Pair(*(x.t().contiguous() for x in call.pairs.reward_table)),
        seed=call.seed, row_offset=call.config.row_offset, classes=classes, count=count,
    )  # fmt: skip
    if need:
        call.gradients = call.gradients._replace(reward_table=sums.t().contiguous())
    return value, stats


def _categorical_surrogate_loss(call: Call) -> tuple[Tensor, Tensor]:
    samples, classes = call.constants.samples.contiguous(), call.inputs.logits.shape[1]
    count = call.whole_group(samples.shape[0])
    value, stats, _ = launch.loss(
        call, categorical.surrogate_loss, launch.class_tile(count, classes), (0,), {},
        **call.rows("logits"), **call.rows("rewards", 2), samples=samples, classes=classes, count=count,
    )  # fmt: skip
    return value, stats


def _categorical_log_prob(call: Call) -> tuple[Tensor, Tensor]:
    at, classes = call.constants.value.contiguous(), call.inputs.logits.shape[1]
    return launch.in_chunks(
        call, categorical.log_prob, call.empty(*at.shape), launch.class_tile(min(len(at), _LABELS_AT_ONCE), classes),
        {}, call.needs.logits, **call.rows("logits"), at=at, cotangent=call.cotangent, to=call.gradients,
        classes=classes,
    )  # fmt: skip


def _categorical_sample(call: Call) -> tuple[Tensor, Tensor]:
    rows, classes = call.inputs.logits.shape
    count = call.config.num_samples
    labels = torch.empty((count, rows), dtype=torch.int64, device=call.device)
    return launch.in_chunks(
        call, categorical.sample, labels, launch.class_tile(min(count, _LABELS_AT_ONCE), classes), {}, False,
        **call.rows("logits"), seed=call.seed, row_offset=call.config.row_offset, classes=classes,
    )  # fmt: skip


def _group_advantage(call: Call) -> tuple[Tensor, Tensor]:
    count, rows = call.inputs.rewards.shape
    value = call.empty(count, rows)
    # The groups stand in columns: rows of a program are neighbours in memory.
    tile = launch.class_tile(call.whole_group(count), 1)
    if rows == 0:
        return value, call.no_rows()
    call.run_tiles(
        advantage.group_advantage, (triton.cdiv(rows, tile.rows),), tile, {},
        **call.rows("rewards", 2), cotangent=call.cotangent, out=value, to=call.gradients, rows=rows, count=count,
        rbf_gamma=call.config.rbf_gamma or 0.0,
    )  # fmt: skip
    return value, call.empty(0)


def _kernel(op: str, evaluate: Callable[[Call], tuple[Tensor, Tensor]]) -> Kernel:
    """Of a function that gives value and statistics, and writes call.gradients."""

    def kernel(request: Request) -> list[Tensor]:
        if request.inputs[0].device.type == "cpu":  # on a GPU values are not at hand
            checks.values(OPS[op], request.inputs, request.constants)
        call = Call(OPS[op], request)
        value, stats = evaluate(call)
        return [value, stats, *call.gradients]

    return kernel


KERNELS: dict[str, Kernel] = {
    op: _kernel(op, evaluate)
    for op, evaluate in {
        "gaussian_policy_loss": _policy_loss,
        "gaussian_surrogate_loss": _surrogate_loss,
        "gaussian_log_prob": _log_prob,
        "gaussian_sample": _sample,
        "mvn_policy_loss": _policy_loss,
        "mvn_surrogate_loss": _surrogate_loss,
        "mvn_log_prob": _log_prob,
        "mvn_sample": _sample,
        "categorical_policy_loss": _categorical_policy_loss,
        "categorical_surrogate_loss": _categorical_surrogate_loss,
        "categorical_log_prob": _categorical_log_prob,
        "categorical_sample": _categorical_sample,
        "group_advantage": _group_advantage,
    }.items()
}
