"""TorchRL's PPO with the fused ops in its loss module, beside its own, in a minute (extra mbrl, and torchrl).

pip install '.[mbrl]' 'torchrl>=0.14' && python examples/torchrl_loss.py
"""

import time

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import Compose, DoubleToFloat, RewardSum, TransformedEnv
from torchrl.envs.libs.gym import GymEnv
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import po_kernels as pk


class FusedPPOLoss(ClipPPOLoss):
    """`ClipPPOLoss` of a Gaussian actor; its `clip_fraction` counts the rows whose loss a bound changed."""

    def forward(self, tensordict):
        with self.actor_network_params.to_module(self.actor_network):
            normal = self.actor_network.get_dist(tensordict).base_dist
        new, entropy = pk.gaussian_log_prob(normal.loc, normal.scale.log(), tensordict["action"], entropy=True)
        loss, stats = pk.policy_loss(
            new, tensordict["advantage"].squeeze(-1), old_log_prob=tensordict["action_log_prob"],
            clip=(float(self.clip_epsilon), float(self.clip_epsilon)), return_stats=True,
        )  # fmt: skip
        loss_critic, _, explained_variance = self.loss_critic(tensordict)
        return TensorDict(
            loss_objective=loss, loss_entropy=-self.entropy_coeff * entropy.mean(), loss_critic=loss_critic.mean(),
            entropy=entropy.detach().mean(), clip_fraction=stats.clip_fraction_low + stats.clip_fraction_high,
            kl_approx=stats.kl_k1, ESS=stats.effective_sample_size / len(new), max_ratio=stats.ratio_max,
            mean_ratio=stats.ratio_mean, explained_variance=explained_variance,
        )  # fmt: skip


def networks(inputs, outputs):
    def mlp(out):
        return MLP(in_features=inputs, out_features=out, num_cells=[64, 64], activation_class=nn.Tanh)

    keys = ["loc", "scale"]
    heads = TensorDictModule(nn.Sequential(mlp(2 * outputs), NormalParamExtractor()), ["observation"], keys)
    actor = ProbabilisticActor(heads, in_keys=keys, distribution_class=IndependentNormal, return_log_prob=True)
    return actor, ValueOperator(mlp(1), in_keys=["observation"])


def train(frames, loss_class=FusedPPOLoss, seed=1):
    """The mean return of the episodes that ended in each batch of 2048 frames, and the seconds in losses."""
    torch.manual_seed(seed)
    env = TransformedEnv(GymEnv("InvertedPendulum-v5"), Compose(DoubleToFloat(), RewardSum()))
    env.set_seed(seed)
    actor, critic = networks(env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1])
    loss_of = loss_class(actor, critic, entropy_coeff=0.0)
    estimate = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    optimizer, returns, spent = torch.optim.Adam(loss_of.parameters(), lr=1e-3), [], 0.0
    options = {"frames_per_batch": 2048, "total_frames": frames, "auto_register_policy_transforms": False}
    for data in Collector(env, actor, **options):
        returns.append(data["next", "episode_reward"][data["next", "done"]].mean().item())
        estimate(data)
        for part in (rows for _ in range(10) for rows in torch.randperm(len(data)).chunk(32)):
            few, begin = data[part], time.perf_counter()
            losses = loss_of(few)
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]).backward()
            spent += time.perf_counter() - begin
            optimizer.step()
    return returns, spent


if __name__ == "__main__":
    torch.set_num_threads(1)  # of so small networks more only wait for each other
    for each in (FusedPPOLoss, ClipPPOLoss):
        found, seconds = train(20480, each)
        print(f"{each.__name__:12} returns", *(round(value) for value in found), f"{seconds:.1f} s in losses")
