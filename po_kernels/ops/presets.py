"""The options of `policy_loss` under the names that algorithms go by."""

from typing import Any, NamedTuple

__all__ = ["policy_loss_preset"]


class Preset(NamedTuple):
    """Options of `policy_loss`, where they are published, and which implementation they are equal to."""

    options: dict[str, Any]
    paper: str
    equals: str


def _preset(paper: str, equals: str, **options: Any) -> Preset:
    return Preset(options, paper, equals)


_BY_SEQUENCE = "seq_mean_token_mean"

PRESETS = {
    "ppo": _preset("arXiv 1707.06347", "CleanRL, Stable-Baselines3", clip=(0.2, 0.2), aggregation="token_mean"),
    "ppo_verl": _preset(
        "arXiv 1707.06347, 1912.09729", "verl `vanilla`",
        clip=(0.2, 0.2), dual_clip=3.0, log_ratio_max=20.0, aggregation="token_mean",
    ),
    "grpo": _preset(
        "arXiv 2402.03300", "TRL `grpo`", clip=(0.2, 0.2), kl="k3", kl_placement="loss", aggregation=_BY_SEQUENCE
    ),
    "bnpo": _preset(
        "arXiv 2506.02864", "TRL `bnpo`", clip=(0.2, 0.2), kl="k3", kl_placement="loss", aggregation="token_mean"
    ),
    "dapo": _preset(
        "arXiv 2503.14476", "TRL `dapo` with epsilon_high=0.28 and normalizer=num_items_in_batch/processes",
        clip=(0.2, 0.28), kl="k3", kl_placement="loss", aggregation="token_mean",
    ),
    "dr_grpo": _preset(
        "arXiv 2503.20783", "TRL `dr_grpo` with max_length=max_completion_length; verl `seq-mean-token-sum-norm`",
        clip=(0.2, 0.2), kl="k3", kl_placement="loss", aggregation="seq_mean_token_sum_norm",
    ),
    "gspo": _preset(
        "arXiv 2507.18071", "TRL `grpo` with importance_sampling_level='sequence'",
        ratio="sequence_mean", clip=(3e-4, 4e-4), kl="k3", kl_placement="loss", aggregation=_BY_SEQUENCE,
    ),
    "gspo_verl": _preset(
        "arXiv 2507.18071", "verl `gspo` with `seq-mean-token-mean`, but for log-ratios below -10, which verl leaves",
        ratio="sequence_mean_token", clip=(3e-4, 4e-4), log_ratio_max=10.0, aggregation=_BY_SEQUENCE,
    ),
    "luspo": _preset(
        "arXiv 2602.05261", "TRL `luspo` with importance_sampling_level='sequence'",
        ratio="sequence_mean", clip=(0.2, 0.2), kl="k3", kl_placement="loss", aggregation="seq_mean_token_sum",
    ),
    "cispo": _preset(
        "arXiv 2506.13585, 2510.13786", "TRL `cispo` with epsilon_high=5",
        surrogate="cispo", clip=(None, 5.0), kl="k3", kl_placement="loss", aggregation="token_mean",
    ),
    "cispo_verl": _preset(
        "arXiv 2506.13585", "verl `cispo`",
        surrogate="cispo", clip=(0.8, 1.2), log_ratio_max=20.0, aggregation="token_mean",
    ),
    "sapo": _preset(
        "arXiv 2511.20347", "TRL `sapo`",
        surrogate="sapo", tau=(1.0, 1.05), kl="k3", kl_placement="loss", aggregation=_BY_SEQUENCE,
    ),
    "sapo_verl": _preset(
        "arXiv 2511.20347", "verl `sapo`",
        surrogate="sapo", tau=(1.0, 1.05), log_ratio_max=20.0, aggregation=_BY_SEQUENCE,
    ),
    "gmpo": _preset(
        "arXiv 2507.20673", "verl `geo_mean`", surrogate="geo_mean", clip=(0.4, 0.4), aggregation=_BY_SEQUENCE
    ),
    "vespo": _preset(
        "arXiv 2602.10693", "TRL `vespo`; the sampler's correction as old_log_prob of the sampler",
        surrogate="vespo", kl="k3", kl_placement="loss", aggregation="token_mean",
    ),
    "rloo": _preset(
        "arXiv 2402.14740", "TRL's RLOOTrainer",
        ratio="sequence_sum", clip=(0.2, 0.2), kl="k1", kl_placement="reward", aggregation=_BY_SEQUENCE,
    ),
    "dice": _preset(
        "arXiv 1802.05098", "none: right to second order",
        ratio="sequence_sum", surrogate="is", aggregation=_BY_SEQUENCE,
    ),
    "reinforce": _preset(
        "Williams 1992", "verl `reinforce` of its rollout correction",
        surrogate="reinforce", aggregation="seq_mean_token_sum",
    ),
    "gpg": _preset("arXiv 2504.02546", "verl `gpg`", surrogate="reinforce", aggregation="token_mean"),
}  # fmt: skip


def policy_loss_preset(name: str) -> dict[str, Any]:
    """Options of `policy_loss` by the name of an algorithm, to be handed in as they are or changed.

    {names}

    The log-probabilities, advantages and coefficients of divergence and entropy are yours: presets say how a
    divergence is placed, and kl_coef is 0. verl counts no sequence without a token: hand in the number of the others as
    `normalizer` where there are such.

    Args:
        name: one of the above.

    Returns:
        a new dictionary of keyword arguments.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> policy_loss_preset("gmpo")
        {{'surrogate': 'geo_mean', 'clip': (0.4, 0.4), 'aggregation': 'seq_mean_token_mean'}}
    """
    if not isinstance(name, str) or name not in PRESETS:
        known = ", ".join(map(repr, PRESETS))
        raise ValueError(f"policy_loss_preset: name: expected one of {known}, got {name!r}")
    return dict(PRESETS[name].options)


policy_loss_preset.__doc__ = (policy_loss_preset.__doc__ or "").format(
    names="\n    ".join(f'- "{name}": {each.paper}; equal to {each.equals}.' for name, each in PRESETS.items())
)
