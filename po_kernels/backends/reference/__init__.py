"""Plain torch: the definition the other backends are tested against, differentiable to any order.

Losses also offer what `po_kernels.backends.contract` asks of other backends, as far as the estimator needs it whose
second derivative must raise: "first", and of "second" the derivative of the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..contract import OpConfig
from . import categorical, gaussian, mvn
from .losses import RowLoss, group_advantage, transform_rewards


def unavailable() -> str | None:
    return None


def refuses(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    return None


def must_be_asked(device_type: str) -> str | None:
    return None


def _policy_loss(op: str, function: Callable[..., RowLoss], check: Callable[..., None]) -> dict[str, Any]:
    def plain(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> RowLoss:
        labels, seed = (constants[:-1], constants[-1]) if config.num_samples else (constants, None)
        check(op, *inputs, *constants)
        return function(*inputs, *labels, seed, config)

    return {"plain": plain, "first": _first(plain), "second": _second(plain)}


def _surrogate_loss(op: str, function: Callable[..., RowLoss], check: Callable[..., None]) -> dict[str, Any]:
    def plain(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> RowLoss:
        check(op, *inputs, *constants)
        return function(*inputs, *constants, config)

    return {"plain": plain, "first": _first(plain), "second": _second(plain)}


def _value(op: str, function: Callable[..., Tensor], check: Callable[..., None]) -> dict[str, Any]:
    def plain(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Tensor:
        check(op, *inputs, *constants)
        return function(*inputs, *constants)

    return {"plain": plain}


def _sample(op: str, function: Callable[..., Tensor], check: Callable[..., None]) -> dict[str, Any]:
    def plain(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Tensor:
        check(op, *inputs)
        return function(*inputs, seed=constants[0], num_samples=config.num_samples, row_offset=config.row_offset)

    return {"plain": plain}


def _first(plain: Callable[..., RowLoss]) -> Callable[..., list[Tensor]]:
    def first(
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        cotangent: Tensor | None,
        needs: Sequence[bool],
        want_stats: bool,
        config: OpConfig,
    ) -> list[Tensor]:
        with torch.enable_grad():
            inputs = [x.detach().clone().requires_grad_(needed) for x, needed in zip(inputs, needs, strict=True)]
            result = plain(inputs, constants, config)
            loss = _reduced(result.loss, config)
            wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed]
            cotangent = torch.ones_like(loss) if cotangent is None else cotangent
            found = iter(torch.autograd.grad(loss, wanted, cotangent, materialize_grads=True) if wanted else ())
        gradients = [next(found) if needed else loss.new_empty(0) for needed in needs]
        stats = loss.new_empty(0)
        if want_stats:
            stats = torch.stack(result[1:])
            if config.reduction != "none":
                stats = stats.sum(dim=-1) / max(stats.shape[-1], 1)
        return [loss.detach(), stats, *gradients]

    return first


def _second(plain: Callable[..., RowLoss]) -> Callable[..., list[Tensor]]:
    def second(
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        tangents: Sequence[Tensor | None],
        cotangent: Tensor,
        cotangent_tangent: Tensor | None,
        needs: Sequence[bool],
        config: OpConfig,
    ) -> list[Tensor]:
        if any(needs):
            raise RuntimeError("the reference has derivatives of gradients by autograd only; use its plain function")
        filled = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True))

        def loss(*x: Tensor) -> Tensor:
            return _reduced(plain(x, constants, config).loss, config)

        # Forward mode takes no expanded inputs.
        tangent = torch.func.jvp(loss, tuple(x.contiguous() for x in inputs), filled)[1]
        return [tangent, *(x.new_empty(0) for x in inputs)]

    return second


def _reduced(rows: Tensor, config: OpConfig) -> Tensor:
    if config.reduction == "none":
        return rows
    return rows.sum() / (max(rows.shape[0], 1) if config.reduction == "mean" else 1)


def _group_advantage(inputs: Sequence[Tensor], constants: Sequence[Tensor], config: OpConfig) -> Tensor:
    return group_advantage(transform_rewards(inputs[0], config.rbf_gamma), config.advantage)


def _categorical_sample(logits: Tensor, seed: Tensor, num_samples: int, row_offset: int) -> Tensor:
    checks.logits("categorical_sample", logits, sampled=True)
    return categorical.sample(logits, seed=seed, num_samples=num_samples, row_offset=row_offset)


_BUILT: list[tuple[str, Callable[..., dict[str, Any]], Callable[..., Any], Callable[..., None]]] = [
    ("gaussian_sample", _sample, gaussian.sample, checks.nothing),
    ("gaussian_log_prob", _value, gaussian.log_prob, checks.nothing),
    ("gaussian_policy_loss", _policy_loss, gaussian.policy_loss, checks.gaussian_policy_loss),
    ("gaussian_surrogate_loss", _surrogate_loss, gaussian.surrogate_loss, checks.nothing),
    ("mvn_sample", _sample, mvn.sample, checks.mvn),
    ("mvn_log_prob", _value, mvn.log_prob, checks.mvn),
    ("mvn_policy_loss", _policy_loss, mvn.policy_loss, checks.mvn_policy_loss),
    ("mvn_surrogate_loss", _surrogate_loss, mvn.surrogate_loss, checks.mvn),
    ("categorical_log_prob", _value, categorical.log_prob, checks.categorical_log_prob),
    ("categorical_policy_loss", _policy_loss, categorical.policy_loss, checks.categorical_policy_loss),
    ("categorical_surrogate_loss", _surrogate_loss, categorical.surrogate_loss, checks.categorical_surrogate_loss),
]
KERNELS: dict[str, dict[str, Any]] = {op: build(op, function, check) for op, build, function, check in _BUILT}
KERNELS["categorical_sample"] = {"sample": _categorical_sample}
KERNELS["group_advantage"] = {"plain": _group_advantage}
