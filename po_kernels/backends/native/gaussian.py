"""Diagonal Gaussian policies by the compiled extension."""

from collections.abc import Sequence

from torch import Tensor

from ... import extension
from ..contract import LossConfig
from .call import row_input, run_loss, shared_input

_POLICY_INPUTS = ("mean", "log_std", "target", "precision")


def policy_loss_first(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    cotangent: Tensor | None,
    needs: Sequence[bool],
    want_stats: bool,
    config: LossConfig,
) -> list[Tensor]:
    return _policy_loss(inputs, constants, (None,) * 4, cotangent, None, needs, want_stats, False, config)


def policy_loss_second(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    cotangent: Tensor,
    cotangent_tangent: Tensor | None,
    needs: Sequence[bool],
    config: LossConfig,
) -> list[Tensor]:
    loss, _, *gradients = _policy_loss(
        inputs, constants, tangents, cotangent, cotangent_tangent, needs, False, True, config
    )
    return [loss, *gradients]


def _policy_loss(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    cotangent: Tensor | None,
    cotangent_tangent: Tensor | None,
    needs: Sequence[bool],
    want_stats: bool,
    dual: bool,
    config: LossConfig,
) -> list[Tensor]:
    mean, log_std, target, precision = inputs
    keep: list[Tensor] = []
    arguments = {
        "dim": mean.shape[1],
        "precision_kind": precision.ndim,
        **row_input("mean", mean, tangents[0], keep),
        **row_input("log_std", log_std, tangents[1], keep),
        **row_input("target", target, tangents[2], keep),
        **shared_input("precision", precision, tangents[3], keep),
    }
    assert extension.module is not None
    return run_loss(
        "gaussian_policy_loss", extension.module.gaussian_policy_loss, _POLICY_INPUTS, inputs, arguments, config,
        seed=constants[0] if constants else None, needs=needs, want_stats=want_stats, cotangent=cotangent,
        dual=dual, cotangent_tangent=cotangent_tangent,
    )  # fmt: skip
