"""examples/torchrl_loss.py: what its loss module returns and trains on is what TorchRL's own does."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "examples" / "torchrl_loss.py"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchrl", reason="torchrl is in none of the extras", exc_type=ImportError)
    from tensordict import TensorDict
    from torchrl.objectives import ClipPPOLoss

    spec = importlib.util.spec_from_file_location("torchrl_loss", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_losses_what_is_logged_and_gradients():
    rows = TensorDict(
        {
            "observation": torch.randn(64, 4), "action": torch.randn(64, 2), "advantage": torch.randn(64, 1),
            "action_log_prob": -2.5 + 0.3 * torch.randn(64), "value_target": torch.randn(64, 1),
        },
        batch_size=64,
    )  # fmt: skip
    actor, critic = example.networks(4, 2)
    found = []
    for kind in (example.FusedPPOLoss, ClipPPOLoss):
        module = kind(actor, critic, entropy_coeff=0.01)
        losses = module(rows)
        loss = losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        found.append(({key: value.detach() for key, value in losses.items()}, gradients))
    (ours, slopes), (theirs, right) = found
    assert 0 < ours.pop("clip_fraction") < theirs.pop("clip_fraction") < 1
    # Means of 64 numbers of size 1 in float32: to some 1e-6.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slopes, right, rtol=1e-5, atol=1e-5)


def test_it_trains():
    torch.set_num_threads(1)
    returns, _ = example.train(4096)
    assert len(returns) == 2
    assert returns[1] > returns[0]
