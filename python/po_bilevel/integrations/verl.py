"""Our losses and advantages in verl's registries."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import po_kernels as pk

from .. import optional

optional.require_version("verl", None, least=(0, 9), below=(0, 10))
_core: Any = optional.require("verl.trainer.ppo.core_algos", None)

# Of `policy_loss_preset`; divergence and entropy bonus are verl's own. The first is verl's "vanilla".
PRESETS = (
    "ppo_verl", "ppo", "gspo_verl", "gspo", "cispo_verl", "sapo_verl", "gmpo", "gpg", "vespo", "dice",
)  # fmt: skip
# Kinds of `group_advantage`; "standardized" with the estimate of the deviation that verl has.
ADVANTAGES: dict[pk.Advantage, dict[str, Any]] = {
    "loo": {}, "mean": {}, "none": {}, "standardized": {"std_ddof": 1, "std_eps": 1e-6},
}  # fmt: skip
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def register() -> None:
    """Registers losses as `po_kernels`, `po_kernels_<preset>`, and advantages as `po_kernels_<kind>`.

    `actor.policy_loss.loss_mode` names a loss: `po_kernels` is `policy_loss` with the preset "ppo_verl", the others are
    those of `PRESETS`. `algorithm.adv_estimator` names advantages: `po_kernels_loo`, and the others of `ADVANTAGES`,
    over the samples of one `uid`. It has to run in each of verl's processes: in a module that the environment variable
    VERL_USE_EXTERNAL_MODULES names (see examples/verl_register.py).

    Raises:
        MissingDependencyError: at the import of this module, without verl or with another version than 0.9.
    """
    _core.register_policy_loss("po_kernels")(_loss("ppo_verl"))
    for preset in PRESETS:
        _core.register_policy_loss(f"po_kernels_{preset}")(_loss(preset))
    for kind in ADVANTAGES:
        if f"po_kernels_{kind}" not in _core.ADV_ESTIMATOR_REGISTRY:
            _core.register_adv_est(f"po_kernels_{kind}")(_advantages(kind))


def _loss(preset: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def po_kernels_loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """`po_kernels.policy_loss` of (B, T), with bounds and temperatures from the config as verl's losses have them.

        Unlike verl's, every loss is aggregated as `loss_agg_mode` says, and one without a token is 0.

        Raises:
            ValueError: advantages of a sequence that differ between its tokens, where the loss has a sequence's ratio
                or term; counts of the whole batch that are missing with several ranks.
        """
        options = _options(preset, config)
        by_sequence = options.get("ratio", "token") != "token" or options["surrogate"] in ("geo_mean", "vespo")
        mask = response_mask.bool()
        weight = rollout_is_weights
        if weight is not None and options["surrogate"] == "geo_mean":  # verl's geometric mean of them
            logs = torch.where(mask, torch.log(weight + 1e-10), 0.0).sum(-1)
            weight = torch.exp(logs / mask.sum(-1).clamp(min=1))
        aggregation, normalizer, factor = _aggregation(loss_agg_mode, mask, config.global_batch_info)
        loss, stats = pk.policy_loss(
            log_prob, _of_sequences(advantages, mask, preset) if by_sequence else advantages, old_log_prob=old_log_prob,
            mask=mask, weight=weight, aggregation=aggregation, normalizer=normalizer, return_stats=True, **options,
        )  # fmt: skip
        lower, upper, kl = (float(x) for x in (stats.clip_fraction_low, stats.clip_fraction_high, stats.kl_k1))
        return loss * factor, {"actor/pg_clipfrac": lower + upper, "actor/ppo_kl": kl}

    return po_kernels_loss


def _options(preset: str, config: Any) -> dict[str, Any]:
    options = {"surrogate": "clip", **pk.policy_loss_preset(preset)}
    del options["aggregation"]
    low, high = (
        config.clip_ratio if bound is None else bound for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    if options["surrogate"] in ("clip", "geo_mean"):
        options["clip"] = (low, high)
    elif options["surrogate"] == "cispo":
        options["clip"] = (1 - low, 1 + high)
    elif options["surrogate"] == "sapo":
        options["tau"] = (config.tau_pos, config.tau_neg)
    if "dual_clip" in options:
        options["dual_clip"] = config.clip_ratio_c
    return options


def _aggregation(mode: str, mask: Tensor, info: dict[str, Any]) -> tuple[Any, Any, float]:
    """An aggregation, what it divides by, and a factor: so that the mean over ranks is that of the whole batch."""
    if mode not in AGGREGATIONS:
        known = ", ".join(map(repr, AGGREGATIONS))
        raise ValueError(f"po_kernels: loss_agg_mode: expected one of {known}, got {mode!r}")
    ranks = info.get("dp_size", 1)
    if mode == "token-sum":
        return "token_sum", None, ranks
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count = info.get(name)
    if count is None:
        if ranks > 1:
            raise ValueError(f"po_kernels: global_batch_info: expected {name} with {ranks} ranks, got None")
        count = (mask if mode == "token-mean" else mask.any(-1)).sum().clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        longest = info.get("loss_scale_factor")
        return "seq_mean_token_sum", count / ranks, 1 / (mask.shape[-1] if longest is None else longest)
    return mode.replace("-", "_"), count / ranks, 1.0


def _of_sequences(advantages: Tensor, mask: Tensor, preset: str) -> Tensor:
    """(B,) from (B, T) that are one number over a sequence's tokens; 0 for a sequence without any."""
    first = advantages.gather(1, mask.long().argmax(1, keepdim=True))
    if ((advantages != first) & mask).any():
        raise ValueError(
            f"po_kernels: advantages: expected one for all tokens of a sequence with the preset {preset!r}, got others"
        )
    return torch.where(mask.any(1), first[:, 0], 0.0)


def _advantages(kind: pk.Advantage) -> Callable[..., tuple[Tensor, Tensor]]:
    def po_kernels_advantages(
        token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, config: Any = None, **others: Any
    ) -> tuple[Tensor, Tensor]:
        """`po_kernels.group_advantage` of the sums (B,) of rewards (B, T), samples of one index being a group."""
        with torch.no_grad():
            groups = torch.from_numpy(np.unique(index, return_inverse=True)[1].reshape(-1))
            found = pk.group_advantage(
                token_level_rewards.sum(-1), kind, index=groups.to(token_level_rewards.device), **ADVANTAGES[kind]
            )
            spread = found[:, None] * response_mask
        return spread, spread

    return po_kernels_advantages
