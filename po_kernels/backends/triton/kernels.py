"""The ops of this backend, as `po_kernels.backends.contract` describes them."""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .. import checks, contract
from ..contract import OPS, Request
from . import advantage, categorical, family, launch
from .launch import Call

Evaluate = Callable[[Call], tuple[Tensor, Tensor]]

_LABELS_AT_ONCE = 256  # of a row


class _Kernel:
    """`first` and `second` of an op from one function.

    Args:
        evaluate: gives value and statistics, and writes call.gradients.
    """

    def __init__(self, op: str, evaluate: Evaluate) -> None:
        self.op, self.evaluate = op, evaluate

    def __call__(self, request: Request) -> list[Tensor]:
        if request.inputs[0].device.type == "cpu":  # where values are at hand
            checks.values(OPS[self.op], request.inputs, request.constants)
        call = Call(self.op, request)
        value, stats = self.evaluate(call)
        return [value, stats, *call.gradients]


def _policy_loss(triangular: bool) -> Evaluate:
    def evaluate(call: Call) -> tuple[Tensor, Tensor]:
        mean, precision = call.pairs[0][0], call.pairs[3][0]
        dim, kind = mean.shape[1], precision.ndim
        group = call.whole_group(max(call.config.num_samples, 1))
        if bool(family.taken_apart(dim, triangular, call.dual)):
            blocks = launch.drawn_tile(group, dim, call.dtype, matrix=kind == 2)
        else:
            blocks = launch.tile(group, dim, matrix=kind == 2)
        shared = ((1,), (dim,), (dim, dim))[kind] if call.needs[3] else (0,)
        u, tangent = (None if x is None else _symmetric(x) for x in call.pairs[3])
        value, stats, sums = launch.loss(
            call, family.policy_loss, blocks, shared,
            **call.rows("mean", 0), **call.rows("scale", 1), **call.rows("target", 2),
            precision=u, precision_t=tangent,
            seed=call.seed(call.constants[0]) if call.config.num_samples else None,
            **call.outputs("mean", "scale", "target"), NEED_PRECISION=bool(call.needs[3]),
            row_offset=call.config.row_offset, dim=dim, count=group,
            TRIANGULAR=triangular, KIND=kind, CLOSED_FORM=call.config.estimator == "analytic",
            PATHWISE=call.config.estimator == "reparam", EACH=blocks.each,
            BLOCK_G=blocks.group, CHUNKS=blocks.chunks, BLOCK_D=blocks.dim,
        )  # fmt: skip
        if call.needs[3]:
            found = _symmetric(sums) if kind == 2 else sums[0] if kind == 0 else sums
            call.gradients[3] = found.to(precision.dtype)
        return value, stats

    return evaluate


def _symmetric(u: Tensor) -> Tensor:
    return (0.5 * (u + u.mT) if u.ndim == 2 else u).contiguous()


def _surrogate_loss(triangular: bool) -> Evaluate:
    def evaluate(call: Call) -> tuple[Tensor, Tensor]:
        samples = launch.with_contiguous_rows(call.constants[0], 2)
        count, _, dim = samples.shape
        blocks = launch.tile(call.whole_group(count), dim)
        value, stats, _ = launch.loss(
            call, family.surrogate_loss, blocks, (0,),
            **call.rows("mean", 0), **call.rows("scale", 1), **call.rows("rewards", 2, leading=2),
            samples=samples, samples_stride_g=samples.stride(0), samples_stride=samples.stride(1),
            **call.outputs("mean", "scale", "rewards"), dim=dim, count=count,
            TRIANGULAR=triangular, SCORE=call.config.estimator != "reparam",
            BLOCK_G=blocks.group, CHUNKS=blocks.chunks, BLOCK_D=blocks.dim,
        )  # fmt: skip
        return value, stats

    return evaluate


def _log_prob(triangular: bool) -> Evaluate:
    def evaluate(call: Call) -> tuple[Tensor, Tensor]:
        count, rows, dim = call.pairs[2][0].shape
        value = call.empty(count, rows)
        if value.numel() == 0:
            return value, call.no_rows()
        blocks = launch.tile(count, dim)
        programs, chunks = launch.chunked(count, blocks, call.needs[0] or call.needs[1])
        call.run(
            family.log_prob, (triton.cdiv(rows, blocks.rows), programs), blocks.warps,
            **call.rows("mean", 0), **call.rows("scale", 1), **call.rows("at", 2, leading=2),
            **call.cotangents(), out=value, **call.outputs("mean", "scale", "at"),
            rows=rows, chunks=chunks, dim=dim, count=count,
            TRIANGULAR=triangular,
            BLOCK_B=blocks.rows, BLOCK_G=blocks.group, BLOCK_D=blocks.dim, **call.options(),
        )  # fmt: skip
        return value, call.empty(0)

    return evaluate


def _sample(triangular: bool) -> Evaluate:
    def evaluate(call: Call) -> tuple[Tensor, Tensor]:
        rows, dim = call.pairs[0][0].shape
        count = call.config.num_samples
        value = call.empty(count, rows, dim)
        if value.numel() == 0:
            return value, call.no_rows()
        blocks = launch.tile(count, dim)
        programs, chunks = launch.chunked(count, blocks, call.needs[0] or call.needs[1])
        call.run(
            family.sample, (triton.cdiv(rows, blocks.rows), programs), blocks.warps,
            **call.rows("mean", 0), **call.rows("scale", 1), seed=call.seed(call.constants[0]),
            **call.cotangents(), out=value, **call.outputs("mean", "scale"),
            rows=rows, row_offset=call.config.row_offset, chunks=chunks, dim=dim, count=count,
            TRIANGULAR=triangular,
            BLOCK_B=blocks.rows, BLOCK_G=blocks.group, BLOCK_D=blocks.dim, **call.options(),
        )  # fmt: skip
        return value, call.empty(0)

    return evaluate


def _categorical_policy_loss(call: Call) -> tuple[Tensor, Tensor]:
    classes = call.pairs[0][0].shape[1]
    count = call.whole_group(max(call.config.num_samples, 1))
    exact = call.config.estimator == "exact"
    blocks = launch.expected_tile(classes, call.needs[1]) if exact else launch.class_tile(count, classes)
    # By label first, for the rewards of a row to be neighbours.
    table, tangent = (None if x is None else x.t().contiguous() for x in call.pairs[1])
    value, stats, sums = launch.loss(
        call, categorical.policy_loss, blocks,
        (classes, classes) if call.needs[1] else (0,),
        **call.rows("logits", 0), table=table, table_t=tangent, target=call.constants[0].contiguous(),
        seed=call.seed(call.constants[1]) if call.config.num_samples else None,
        **call.outputs("logits"), NEED_TABLE=bool(call.needs[1]),
        row_offset=call.config.row_offset, classes=classes, count=count, CLOSED_FORM=exact,
        BLOCK_G=blocks.group, BLOCK_C=blocks.dim,
    )  # fmt: skip
    if call.needs[1]:
        call.gradients[1] = sums.t().contiguous().to(call.gradients[1].dtype)
    return value, stats


def _categorical_surrogate_loss(call: Call) -> tuple[Tensor, Tensor]:
    classes = call.pairs[0][0].shape[1]
    count = call.whole_group(call.constants[0].shape[0])
    blocks = launch.class_tile(count, classes)
    value, stats, _ = launch.loss(
        call, categorical.surrogate_loss, blocks, (0,),
        **call.rows("logits", 0), **call.rows("rewards", 1, leading=2), samples=call.constants[0].contiguous(),
        **call.outputs("logits", "rewards"), classes=classes, count=count, BLOCK_G=blocks.group, BLOCK_C=blocks.dim,
    )  # fmt: skip
    return value, stats


def _categorical_log_prob(call: Call) -> tuple[Tensor, Tensor]:
    count, rows = call.constants[0].shape
    classes = call.pairs[0][0].shape[1]
    value = call.empty(count, rows)
    if value.numel() == 0:
        return value, call.no_rows()
    blocks = launch.class_tile(min(count, _LABELS_AT_ONCE), classes)
    programs, chunks = launch.chunked(count, blocks, call.needs[0])
    call.run(
        categorical.log_prob, (triton.cdiv(rows, blocks.rows), programs), blocks.warps,
        **call.rows("logits", 0), at=call.constants[0].contiguous(), **call.cotangents(),
        out=value, **call.outputs("logits"), rows=rows, chunks=chunks, classes=classes, count=count,
        BLOCK_B=blocks.rows, BLOCK_G=blocks.group, BLOCK_C=blocks.dim, **call.options(),
    )  # fmt: skip
    return value, call.empty(0)


def _categorical_sample(request: Request) -> list[Tensor]:
    (logits,), num_samples, row_offset = request.inputs, request.config.num_samples, request.config.row_offset
    if logits.device.type == "cpu":
        checks.logits("categorical_sample", logits, sampled=True)
    call = Call("categorical_sample", request)
    rows, classes = logits.shape
    labels = torch.empty((num_samples, rows), dtype=torch.int64, device=logits.device)
    if rows:
        blocks = launch.class_tile(min(num_samples, _LABELS_AT_ONCE), classes)
        programs, chunks = launch.chunked(num_samples, blocks, together=False)
        logits = launch.with_contiguous_rows(logits, 1)
        call.run(
            categorical.sample, (triton.cdiv(rows, blocks.rows), programs), blocks.warps,
            logits=logits, logits_stride=logits.stride(0), seed=call.seed(call.constants[0]), out=labels, rows=rows,
            row_offset=row_offset, chunks=chunks, classes=classes, count=num_samples, T=call.triton_dtype,
            BLOCK_B=blocks.rows, BLOCK_G=blocks.group, BLOCK_C=blocks.dim,
        )  # fmt: skip
    return [labels, logits.new_empty(0), logits.new_empty(0)]


def _group_advantage(call: Call) -> tuple[Tensor, Tensor]:
    count, rows = call.pairs[0][0].shape
    value = call.empty(count, rows)
    if rows == 0:
        return value, call.no_rows()
    # The groups stand in columns: rows of a program are neighbours in memory.
    blocks = launch.class_tile(call.whole_group(count), 1)
    call.run(
        advantage.group_advantage, (triton.cdiv(rows, blocks.rows),), blocks.warps,
        **call.rows("rewards", 0, leading=2), **call.cotangents(), out=value,
        **call.outputs("rewards"), rows=rows, count=count, rbf_gamma=call.config.rbf_gamma or 0.0,
        ADVANTAGE=launch.ADVANTAGES[call.config.advantage], HAS_RBF=call.config.rbf_gamma is not None,
        BLOCK_B=blocks.rows, BLOCK_G=blocks.group, **call.options(),
    )  # fmt: skip
    return value, call.empty(0)


KERNELS: dict[str, contract.Kernel] = {
    kernel.op: kernel
    for kernel in (
        _Kernel("gaussian_policy_loss", _policy_loss(False)),
        _Kernel("gaussian_surrogate_loss", _surrogate_loss(False)),
        _Kernel("gaussian_log_prob", _log_prob(False)),
        _Kernel("gaussian_sample", _sample(False)),
        _Kernel("mvn_policy_loss", _policy_loss(True)),
        _Kernel("mvn_surrogate_loss", _surrogate_loss(True)),
        _Kernel("mvn_log_prob", _log_prob(True)),
        _Kernel("mvn_sample", _sample(True)),
        _Kernel("categorical_policy_loss", _categorical_policy_loss),
        _Kernel("categorical_surrogate_loss", _categorical_surrogate_loss),
        _Kernel("categorical_log_prob", _categorical_log_prob),
        _Kernel("group_advantage", _group_advantage),
    )
}
KERNELS["categorical_sample"] = _categorical_sample
