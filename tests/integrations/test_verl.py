"""What we register in verl against what verl has under its own names."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    from po_bilevel.errors import MissingDependencyError
    from po_bilevel.integrations import verl as ours
    from verl.workers.config import FSDPActorConfig

pytestmark = pytest.mark.filterwarnings("ignore")

INFO = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9, "loss_scale_factor": 11}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    ours.register()
    ours.register()  # the second time changes nothing


def config_of(**options):
    return FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)


def batch(seed=0):
    """(B, T) with padding on the right, and a sequence without a token."""
    generator = torch.Generator().manual_seed(seed)
    log_prob, noise = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 0, 5])[:, None]
    advantages = torch.randn(5, 1, dtype=torch.float64, generator=generator) * mask
    return log_prob - 3, log_prob - 3 + 0.4 * noise, advantages, mask


def both(mine, theirs, mode="token-mean", *, seed=0, info=None, weights=None, **options):
    """Value, gradient and metrics of two losses of the registry."""
    found = []
    for name in (mine, theirs):
        log_prob, old, advantages, mask = batch(seed)
        log_prob.requires_grad_()
        config = config_of(**options)
        config.global_batch_info.update(info or {})
        loss, metrics = core.get_policy_loss_fn(name)(
            old_log_prob=old, log_prob=log_prob, advantages=advantages, response_mask=mask, loss_agg_mode=mode,
            config=config, rollout_is_weights=weights,
        )  # fmt: skip
        found.append((loss, torch.autograd.grad(loss, log_prob)[0], metrics))
    return found


def agree(mine, theirs):
    # verl adds 1e-8 to the number of tokens that it divides by.
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-7, atol=1e-9)
    assert mine[1].abs().max() > 1e-3


CASES = [
    ("po_kernels", "vanilla", {}),
    ("po_kernels", "vanilla", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5}),
    ("po_kernels", "vanilla", {"clip_ratio": 0.05, "clip_ratio_low": None, "clip_ratio_high": None}),
    ("po_kernels_gspo_verl", "gspo", {"clip_ratio_low": 3e-2, "clip_ratio_high": 4e-2}),
    ("po_kernels_cispo_verl", "cispo", {"clip_ratio_low": 0.3}),
    ("po_kernels_gpg", "gpg", {}),
]


@pytest.mark.parametrize(("mine", "theirs", "options"), CASES)
@pytest.mark.parametrize("mode", ours.AGGREGATIONS)
@pytest.mark.parametrize("info", [{}, INFO, {**INFO, "loss_scale_factor": None}], ids=["alone", "ranks", "unscaled"])
def test_losses_are_those_of_verl(mine, theirs, options, mode, info):
    for seed in range(3):
        agree(*both(mine, theirs, mode, seed=seed, info=info, **options))


@pytest.mark.parametrize("info", [{}, INFO])
def test_sapo_has_one_aggregation_in_verl(info):
    agree(*both("po_kernels_sapo_verl", "sapo", "seq-mean-token-mean", info=info, tau_pos=1.2, tau_neg=1.4))


@pytest.mark.parametrize("weights", [None, torch.rand(5, 7, dtype=torch.float64) + 0.5])
def test_gmpo_is_a_mean_over_all_sequences_in_verl(weights):
    info = {"global_batch_size": 5}
    options = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    agree(*both("po_kernels_gmpo", "geo_mean", "seq-mean-token-mean", info=info, weights=weights, **options))


@pytest.mark.parametrize(("mine", "theirs", "options"), CASES)
def test_weights_of_a_sampler(mine, theirs, options):
    agree(*both(mine, theirs, weights=torch.rand(5, 7, dtype=torch.float64), **options))


def test_metrics():
    for mine, theirs, options in (CASES[0], CASES[3], CASES[4]):
        found, expected = both(mine, theirs, clip_ratio_c=100.0, **options)
        assert found[2] == pytest.approx({name: expected[2][name] for name in found[2]})
        assert found[2]["actor/pg_clipfrac"] > 0


@pytest.mark.parametrize("preset", ours.PRESETS)
def test_every_preset_has_a_loss(preset):
    log_prob, old, advantages, mask = batch()
    log_prob.requires_grad_()
    loss, _ = core.get_policy_loss_fn(f"po_kernels_{preset}")(old, log_prob, advantages, mask, config=config_of())
    loss.backward()
    assert log_prob.grad.isfinite().all()
    assert log_prob.grad[mask].abs().max() > 1e-3
    assert (log_prob.grad[~mask] == 0).all()


def test_advantages_are_those_of_verl():
    rewards = torch.randn(8, 5, dtype=torch.float64)
    mask = (torch.rand(8, 5) > 0.3).double()
    index = np.array(["a", "b", "a", "c", "b", "c", "c", "a"], dtype=object)
    for kind, name, options in (
        ("loo", "rloo", {}),
        ("loo", "rloo_vectorized", {}),
        ("standardized", "grpo", {}),
        ("mean", "grpo", {"norm_adv_by_std_in_grpo": False}),
    ):
        expected, _ = core.get_adv_estimator_fn(name)(rewards.clone(), mask, index=index, **options)
        found, returns = core.get_adv_estimator_fn(f"po_kernels_{kind}")(
            token_level_rewards=rewards, response_mask=mask, index=index, config=None
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert returns is found


def test_what_is_refused():
    log_prob, old, _, mask = batch()
    loss = core.get_policy_loss_fn("po_kernels_gspo")
    with pytest.raises(ValueError, match=r"advantages: expected one for all tokens .* preset 'gspo'"):
        loss(old, log_prob, torch.randn(5, 7).double(), mask, config=config_of())
    with pytest.raises(ValueError, match=r"loss_agg_mode: expected one of 'token-mean', .*got 'mean'"):
        loss(old, log_prob, torch.zeros(5, 7).double(), mask, loss_agg_mode="mean", config=config_of())
    config = config_of()
    config.global_batch_info["dp_size"] = 2
    with pytest.raises(ValueError, match="global_batch_info: expected batch_num_tokens with 2 ranks, got None"):
        loss(old, log_prob, torch.zeros(5, 7).double(), mask, config=config)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.8.3")
    with pytest.raises(MissingDependencyError, match=r"verl 0\.8\.3 is installed, but verl>=0\.9,<0\.10 is needed"):
        ours.optional.require_version("verl", None, least=(0, 9), below=(0, 10))


def test_verl_imports_a_module_that_registers(tmp_path):
    (tmp_path / "registers.py").write_text("from po_bilevel.integrations import verl\nverl.register()\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = "import verl\nfrom verl.trainer.ppo import core_algos\nprint(core_algos.get_policy_loss_fn('po_kernels'))"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "VERL_USE_EXTERNAL_MODULES": "registers"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "po_kernels_loss" in run.stdout
