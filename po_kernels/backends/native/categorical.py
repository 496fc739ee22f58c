"""Categorical policies by the compiled extension."""

from collections.abc import Sequence

from torch import Tensor

from ... import extension
from ..contract import LossConfig
from .call import row_input, run_loss, shared_input

_POLICY_INPUTS = ("logits", "reward_table")


def policy_loss_first(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    cotangent: Tensor | None,
    needs: Sequence[bool],
    want_stats: bool,
    config: LossConfig,
) -> list[Tensor]:
    return _policy_loss(inputs, constants, (None, None), cotangent, None, needs, want_stats, False, config)


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
    logits, reward_table = inputs
    target = constants[0].contiguous()
    keep: list[Tensor] = []
    arguments = {
        "classes": logits.shape[1],
        "target": target.data_ptr(),
        **row_input("logits", logits, tangents[0], keep),
        **shared_input("reward_table", reward_table, tangents[1], keep),
    }
    assert extension.module is not None
    return run_loss(
        "categorical_policy_loss", extension.module.categorical_policy_loss, _POLICY_INPUTS, inputs, arguments,
        config, seed=constants[1] if config.num_samples else None, needs=needs, want_stats=want_stats,
        cotangent=cotangent, dual=dual, cotangent_tangent=cotangent_tangent,
    )  # fmt: skip
