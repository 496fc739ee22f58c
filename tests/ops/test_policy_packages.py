"""Losses, aggregations, advantages and weights against the functions of TRL and verl, where they are installed."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import po_kernels as pk

from .test_policy_presets import agree, batch

# Both warn of what they import.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)


@pytest.fixture(scope="module")
def verl():
    return pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)


def trl_loss(trl, loss_type, tensors, level="token", beta=0.0, **options):
    """`GRPOTrainer._compute_loss` of a trainer that has what it asks for and nothing else."""
    log_prob, old, ref, A, mask = tensors
    names = {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None, **options}
    args = SimpleNamespace(
        delta=names["delta"], sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, use_bias_correction_kl=False,
        steps_per_generation=1, entropy_target=None,
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=args, loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_low=names["epsilon_low"],
        epsilon_high=names["epsilon_high"], aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, vllm_importance_sampling_correction=False,
        max_completion_length=mask.shape[1], current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights, get_off_policy_mask=None,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1,
                                    sync_gradients=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_prob, torch.zeros_like(log_prob), None),
    )  # fmt: skip
    ids = torch.zeros_like(mask, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :0], "prompt_mask": ids[:, :0], "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": A, "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {"loss_type": "grpo"}),
        ("bnpo", {"loss_type": "bnpo"}),
        ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
        ("dr_grpo", {"loss_type": "dr_grpo"}),
        ("gspo", {"loss_type": "grpo", "level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
        ("luspo", {"loss_type": "luspo", "level": "sequence"}),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("sapo", {"loss_type": "sapo"}),
        ("vespo", {"loss_type": "vespo"}),
    ],
)
def test_losses_of_trl(trl, name, options, beta):
    tensors = batch()
    log_prob, old, ref, A, mask = tensors
    log_prob.requires_grad_()
    expected = trl_loss(trl, tensors=tensors, beta=beta, **options)
    found = pk.policy_loss(
        log_prob, A, old_log_prob=old, ref_log_prob=ref, mask=mask, kl_coef=beta, **pk.policy_loss_preset(name)
    )
    # TRL has the temperatures of SAPO in float32.
    agree(found, expected, log_prob, tolerance=1e-12 if name != "sapo" else 1e-6)


def test_delta_of_trl(trl):
    tensors = batch()
    log_prob, old, _, A, mask = tensors
    log_prob.requires_grad_()
    found = pk.policy_loss(log_prob, A, old_log_prob=old, mask=mask, dual_clip=1.5)
    agree(found, trl_loss(trl, "bnpo", tensors, delta=1.5), log_prob)


def verl_config(**options):
    from verl.workers.config import FSDPActorConfig

    return FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=False, **options
    )


@pytest.mark.parametrize(
    ("name", "loss", "options"),
    [
        (
            "ppo_verl",
            "vanilla",
            {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0},
        ),
        ("gspo_verl", "gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
        ("cispo_verl", "cispo", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
        ("sapo_verl", "sapo", {}),
        ("gmpo", "geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
        ("gpg", "gpg", {}),
    ],
)
def test_losses_of_verl(verl, name, loss, options):
    log_prob, old, _, A, mask = batch()
    log_prob.requires_grad_()
    preset = pk.policy_loss_preset(name)
    expected, _ = verl.get_policy_loss_fn(loss)(
        old_log_prob=old, log_prob=log_prob, advantages=A.unsqueeze(1).expand_as(log_prob), response_mask=mask.double(),
        loss_agg_mode=preset["aggregation"].replace("_", "-"), config=verl_config(**options),
    )  # fmt: skip
    found = pk.policy_loss(log_prob, A, old_log_prob=old, mask=mask, **preset)
    # verl adds 1e-8 to the number of tokens that it divides by, also in exponents up to 25.
    agree(found, expected, log_prob, tolerance=1e-6)


def test_aggregations_of_verl(verl):
    log_prob, _, _, A, mask = batch()
    mask[2] = False
    tokens = torch.where(mask, -A.unsqueeze(1).expand_as(log_prob), 0.0)
    for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        expected = verl.agg_loss(tokens, mask.double(), mode)
        sequences = None if mode == "token-mean" else mask.any(1).sum()
        found = pk.policy_loss(log_prob, A, mask=mask, aggregation=mode.replace("-", "_"), normalizer=sequences)
        torch.testing.assert_close(found, expected, rtol=2e-8, atol=0)


def test_divergences_of_verl(verl):
    log_prob, _, ref, A, mask = batch()
    for name in ("k1", "abs", "k2", "k3"):
        for suffix, placement in (("", "loss"), ("+", "straight_through")):
            x = log_prob.clone().requires_grad_()
            expected = (verl.kl_penalty(x, ref, name + suffix) * mask).sum() / mask.sum()
            found = pk.policy_loss(x, 0 * A, ref_log_prob=ref, mask=mask, kl=name, kl_coef=1.0, kl_placement=placement)
            agree(found, expected, x)


def test_advantages_of_verl(verl):
    """But for groups of one, which verl gives their own reward."""
    rewards = torch.randn(9, dtype=torch.float64)
    index = torch.tensor([4, 4, 1, 4, 1, 7, 7, 7, 7])
    tokens, mask = rewards.clone().unsqueeze(1), torch.ones(9, 1, dtype=torch.float64)
    for function, kind, options in (
        ("grpo", "standardized", {"std_ddof": 1, "std_eps": 1e-6}),
        ("rloo", "loo", {}),
        ("rloo_vectorized", "loo", {}),
    ):
        expected, _ = verl.get_adv_estimator_fn(function)(tokens.clone(), mask, index=index.numpy())
        found = pk.group_advantage(rewards, kind, index=index, **options)
        torch.testing.assert_close(found, expected.squeeze(1), rtol=1e-12, atol=1e-14)


def test_weights_of_verl(verl):
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)
    log_prob, old, _, _, mask = batch()
    for level in ("token", "sequence"):
        expected, _ = helper.compute_rollout_correction_weights(log_prob - old, mask.double(), level, 2.0)
        found = pk.importance_weights(log_prob, old, mask, level=level, mode="truncate", bounds=(None, 2.0))
        # verl holds the logarithm above -20.
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=3e-9)
