"""GRPO by TRL on our ops, with a reward that is learned beside the policy."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import po_kernels as pk

from .. import optional
from ..language.huggingface import HuggingFaceModel, head_scale

optional.require_version("trl", "trl", least=(1, 16), below=(2, 0))
_Trainer: Any = optional.require("trl", "trl").GRPOTrainer
_Callback: Any = optional.require("transformers", "trl").TrainerCallback

# Of each loss_type, the surrogate and the aggregation.
LOSSES = {
    "grpo": ("clip", "seq_mean_token_mean"),
    "bnpo": ("clip", "token_mean"),
    "dapo": ("clip", "token_mean"),
    "dr_grpo": ("clip", "seq_mean_token_sum_norm"),
    "luspo": ("clip", "seq_mean_token_sum"),
    "cispo": ("cispo", "token_mean"),
    "sapo": ("sapo", "seq_mean_token_mean"),
    "vespo": ("vespo", "token_mean"),
}
# Those that divide by the tokens of all processes and accumulated batches.
_BY_ITEMS = ("dapo", "cispo", "vespo")
_VESPO = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}


class GRPOTrainer(_Trainer):
    """`trl.GRPOTrainer` whose log-probabilities are `linear_token_log_prob`'s and whose loss is `policy_loss`'s.

    Loss, gradient and logged metrics are those of TRL. What is other: logits exist for 128 tokens at a time on the CPU,
    1024 elsewhere, and of prompts none are made. The outcomes of a `RewardCallback` are logged, as
    `reward_learning/...`.

    Arguments are those of `trl.GRPOTrainer`.

    Raises:
        MissingDependencyError: at the import of this module, without TRL or with another version than >= 1.16, < 2.
        ValueError: what `policy_loss` and the linear head do not have, by the name of the option: a loss_type that is
            none of `LOSSES`, Liger, models that take images, an auxiliary loss of experts, cast_lm_head_to_fp32,
            use_adaptive_entropy, other constants of VESPO, VESPO with a correction for vLLM, delta with another
            surrogate than clipping or below 1 + epsilon_high, CISPO with epsilon_high below 1, FSDP and DeepSpeed's
            ZeRO-3; and models that `HuggingFaceModel` refuses.

    Example:
        trainer = GRPOTrainer(model=model, reward_funcs=reward_function(reward), args=args, train_dataset=dataset,
                              processing_class=tokenizer, callbacks=[RewardCallback(learner, every=10)])
        trainer.train()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse()
        self._loss_options = loss_options(self.args)
        self._scored: tuple[Tensor, Tensor, None] | None = None
        for model in filter(None, (self.model, self.ref_model)):
            HuggingFaceModel(model)  # refuses what is more than hidden states and a linear head
            _score_in_chunks(model.get_base_model() if hasattr(model, "get_base_model") else model, self.temperature)

    def _refuse(self) -> None:
        sharded = self.is_fsdp_enabled or getattr(self.args.deepspeed_plugin, "zero_stage", 0) == 3
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        for name, given, refused in (
            ("use_liger_kernel", self.args.use_liger_kernel, self.args.use_liger_kernel),
            ("cast_lm_head_to_fp32", self.args.cast_lm_head_to_fp32, self.args.cast_lm_head_to_fp32),
            ("use_adaptive_entropy", self.use_adaptive_entropy, self.use_adaptive_entropy),
            ("router_aux_loss_coef", self.router_aux_loss_coef, self.aux_loss_enabled),
            ("vllm_importance_sampling_correction", True, corrected and self.loss_type == "vespo"),
            ("processing_class", type(self.processing_class).__name__, self._is_vlm),
            ("fsdp, deepspeed", "a sharded head", sharded),
        ):
            if refused:
                raise ValueError(f"GRPOTrainer: {name}: not offered here, got {given}; trl.GRPOTrainer has it")

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        return super()._get_per_token_logps_and_entropies(*args, **kwargs) if self._scored is None else self._scored

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids, present = (
            torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
        )
        length = inputs["completion_ids"].shape[1]
        log_prob, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, present, length, compute_entropy=True
        )
        self._scored = (log_prob.detach(), entropy.detach(), None)
        try:
            with torch.no_grad():
                super()._compute_loss(model, inputs)  # for its metrics: nothing here is of the vocabulary's size
        finally:
            self._scored = None

        training = self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        by_items = self.loss_type in _BY_ITEMS
        normalizer = None
        if by_items:
            normalizer = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            normalizer = normalizer * (accumulated / self.args.steps_per_generation if training else 1)
        kept, weight = self._weight(inputs, log_prob.detach(), entropy.detach(), mask)
        loss: Any = pk.policy_loss(
            log_prob, inputs["advantages"], old_log_prob=inputs.get("old_per_token_logps"), mask=mask, weight=weight,
            ref_log_prob=inputs["ref_per_token_logps"] if self.beta else None, kl_coef=self.beta, normalizer=normalizer,
            **self._loss_options,
        )  # fmt: skip
        loss = loss if by_items else loss / accumulated
        if self.entropy_coef:
            chosen = mask if kept is None else mask * kept
            bonus = (entropy * chosen).sum() / chosen.sum().clamp(min=1)
            loss = loss - self.entropy_coef * bonus / accumulated
        return loss

    def _weight(
        self, inputs: dict[str, Any], log_prob: Tensor, entropy: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens have entropy enough, and what the terms of the surrogate are multiplied by, both (B, T)."""
        factors = []
        kept = None
        if self.top_entropy_quantile < 1:
            kept = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
            factors.append(kept)
        if self.off_policy_mask_threshold is not None:
            old = inputs.get("old_per_token_logps")
            sampler = inputs.get("sampling_per_token_logps", log_prob if old is None else old)
            advantages = inputs["advantages"]
            advantages = advantages.unsqueeze(1) if advantages.ndim == 1 else advantages
            factors.append(
                self.get_off_policy_mask(advantages, log_prob, sampler, mask, self.off_policy_mask_threshold)
            )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            factors.append(inputs["importance_sampling_ratio"])
        if not factors:
            return kept, None
        return kept, functools.reduce(torch.mul, factors).to(log_prob).expand_as(log_prob)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `trl.GRPOTrainer.log`."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RewardCallback) and self.model.training:
                logs.update(callback.outcomes())
        super().log(logs, start_time)


def loss_options(args: Any) -> dict[str, Any]:
    """The options of `policy_loss` for a `trl.GRPOConfig`, but for coefficients and counts.

    Raises:
        ValueError: an option that `policy_loss` does not have, by name.
    """
    if args.loss_type not in LOSSES:
        known = ", ".join(map(repr, LOSSES))
        raise ValueError(f"GRPOTrainer: loss_type: expected one of {known}, got {args.loss_type!r}")
    surrogate, aggregation = LOSSES[args.loss_type]
    levels = {"token": "token"} if surrogate == "vespo" else {"token": "token", "sequence": "sequence_mean"}
    level = args.importance_sampling_level
    if level not in levels:
        known = " or ".join(map(repr, levels))
        raise ValueError(
            f"GRPOTrainer: importance_sampling_level: expected {known} with loss_type={args.loss_type!r}, got {level!r}"
        )
    for name, default in _VESPO.items():
        if surrogate == "vespo" and getattr(args, name) != default:
            raise ValueError(f"GRPOTrainer: {name}: expected {default}, got {getattr(args, name)}")
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.delta is not None and (surrogate != "clip" or args.delta < 1 + high):
        raise ValueError(
            f"GRPOTrainer: delta: expected None, or a number of at least 1 + epsilon_high with a loss_type that clips, "
            f"got {args.delta} with {args.loss_type!r}"
        )
    if surrogate == "cispo" and high < 1:
        raise ValueError(
            f"GRPOTrainer: epsilon_high: expected a number of at least 1 with loss_type='cispo', whose bound of "
            f"the ratio it is, got {high}"
        )
    options = {
        "ratio": levels[level],
        "surrogate": surrogate,
        "aggregation": aggregation,
        "clip": (None, high) if surrogate == "cispo" else (args.epsilon, high),
        "dual_clip": args.delta,
        "tau": (args.sapo_temperature_pos, args.sapo_temperature_neg),
        "kl_placement": "loss_times_ratio" if args.use_bias_correction_kl else "loss",
    }
    if aggregation == "seq_mean_token_sum_norm":
        options["max_length"] = args.max_completion_length
    pk.policy_loss(torch.zeros(1, 1), torch.zeros(1), **options)  # refuses what it does not have
    return options


class _Scores(NamedTuple):
    """What the trainer reads of a model that it calls with `fused_lm_head`, each (B, T - 1)."""

    log_probs: Tensor
    entropy: Tensor


def _score_in_chunks(model: Any, temperature: float) -> None:
    """Our head in place of the one that the trainer put before the model's own forward."""
    theirs = model.forward
    scale, softcap = head_scale(model.config.get_text_config())

    @functools.wraps(type(model).forward)  # whose signature `generate` reads
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        output = self.get_output_embeddings()
        scored = labels != -100
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        found = pk.linear_token_log_prob(
            hidden[scored].to(dtype), output.weight.to(dtype), labels[scored],
            bias=None if output.bias is None else output.bias.to(dtype), entropy=True,
            # scale · softcap' · tanh(x / softcap') / temperature, softcap' = softcap / scale
            temperature=temperature / scale, softcap=None if softcap is None else softcap / scale,
        )  # fmt: skip
        log_prob, entropy = (x.new_zeros(scored.shape).masked_scatter(scored, x) for x in found[:2] if x is not None)
        return _Scores(log_prob, entropy)

    model.forward = types.MethodType(forward, model)


class RewardCallback(_Callback):
    """Learns the reward beside the policy: an outer step after every so many of the trainer's.

    What the step returns, a mapping, a named tuple or an object with attributes, is averaged between two lines of the
    log; numbers and () tensors of it are logged by `GRPOTrainer`.

    Args:
        learner: an object with `step()`, such as `po_bilevel.language.RewardLearner`, which changes the parameters of
            the reward in place.
        every: optimiser steps between two of its steps.

    Raises:
        TypeError, ValueError: a learner without step(), every below 1. When the trainer is made, or at the latest when
            it starts: advantages divided by a standard deviation, which do not change with the reward's scale, so that
            it cannot be learned.
    """

    def __init__(self, learner: Any, every: int = 1) -> None:
        if not callable(getattr(learner, "step", None)):
            raise TypeError(f"RewardCallback: learner: expected an object with step(), got {type(learner).__name__}")
        if every < 1 or every != int(every):
            raise ValueError(f"RewardCallback: every: expected an integer of at least 1, got {every}")
        self.learner = learner
        self.every = every
        self._outcomes: list[dict[str, float]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses standardised advantages."""
        for name, expected, why in (
            ("scale_rewards", "none", "False or 'none'"),
            ("multi_objective_aggregation", "sum_then_normalize", "'sum_then_normalize'"),
        ):
            if getattr(args, name, expected) != expected:
                raise ValueError(
                    f"RewardCallback: {name}: expected {why}, got {getattr(args, name)!r}: advantages divided by their "
                    "standard deviation do not change with the reward's scale, so that it cannot be learned"
                )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same, for a callback that was added later."""
        self.on_init_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The outer step."""
        if state.global_step % self.every == 0:
            self._outcomes.append(_numbers(self.learner.step()))

    def outcomes(self) -> dict[str, float]:
        """Means of what the steps since the last call returned, under the names of the log."""
        found, self._outcomes = self._outcomes, []
        names = dict.fromkeys(name for each in found for name in each)
        values = {name: [each[name] for each in found if name in each] for name in names}
        return {f"reward_learning/{name}": sum(x) / len(x) for name, x in values.items()}


def _numbers(outcome: Any) -> dict[str, float]:
    if hasattr(outcome, "_asdict"):
        outcome = outcome._asdict()
    elif not isinstance(outcome, dict):
        outcome = getattr(outcome, "__dict__", {})
    return {
        name: float(x)
        for name, x in outcome.items()
        if isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.ndim == 0)
    }


def reward_function(reward: Any, target: str = "target") -> Callable[..., list[float | None]]:
    """A reward of texts as TRL calls one: with prompts, completions and the other columns of the data set.

    The same parameters are read at every call, so a learner that changes them in place changes what is trained on. A
    completion that a gate leaves out has the reward None, and no part in its group.

    Args:
        reward: a `TextReward`: `features(texts)` -> (N, n), and itself (N, n), (N, n) -> (N,).
        target: the column that has the answers of the data.

    Returns:
        a function for `reward_funcs`.

    Raises:
        ValueError: gates that multiply, for which a reward would have to know its group; by the function, a data set
            without that column.
    """
    gates = getattr(reward, "gates", ())
    if any(gate.mode != "mask" for gate in gates):
        raise ValueError(
            "reward_function: reward: expected gates of mode 'mask', got 'multiply', which needs the group"
        )

    def text_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if target not in columns:
            have = ", ".join(map(repr, columns))
            raise ValueError(f"reward_function: target: expected a column {target!r} of the data set, got {have}")
        # A conversation's completion is a list of messages.
        asked, texts, answers = (
            [x if isinstance(x, str) else x[-1]["content"] for x in each]
            for each in (prompts, completions, columns[target])
        )
        with torch.no_grad():
            found = reward(reward.features(texts), reward.features(answers)).tolist()
        kept = reward.gate(asked, texts).keep.tolist() if gates else [True] * len(found)
        return [x if keep else None for x, keep in zip(found, kept, strict=True)]

    return text_reward
