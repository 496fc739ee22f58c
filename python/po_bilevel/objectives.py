"""The inner problem of a policy as samples tell it, for the hypergradients that take no second derivative."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from .hypergradients import SampledObjective, Tensors
from .hypergradients.problem import Average, same
from .losses import Batch, PolicyGradient
from .policies import Policy
from .rewards import SampledReward


def sampled_objective(
    policy: Policy, reward: nn.Module, loss: Any, batch: Batch, seed: int, substituted: Callable[..., Tensor],
    theta: Tensors, phi: Tensors, average: Average = same,
) -> SampledObjective:  # fmt: skip
    """The inner problem of a `PolicyGradient` through samples of the policy as it is, several for each target.

    Args:
        policy, reward: as in the loss.
        loss: its number of samples, its entropy coefficient and its baseline are taken; a penalty is not.
        batch: the rows.
        seed: of the samples.
        substituted: (θ, φ, function, *arguments) -> function(*arguments) with θ and φ in the modules.
        theta, phi: what the modules have.
        average: as in `SampledObjective`.

    Raises:
        TypeError: a loss that is no `PolicyGradient`, or one of a subclass.
        ValueError: one without samples, or with a penalty, whose curvature the Fisher matrix lacks; a baseline that
            `SampledObjective` refuses.
    """
    # What a subclass makes of the loss would be ignored.
    if type(loss) is not PolicyGradient:
        raise TypeError(f"inner_loss: expected a PolicyGradient for a method of samples, got {type(loss).__name__}")
    if loss.num_samples is None:
        raise ValueError("inner_loss: num_samples: expected an integer for a method of samples, got None")
    if loss.l2 != 0:
        raise ValueError(f"inner_loss: l2: expected 0 for a method of samples, which has a damping, got {loss.l2}")
    inputs, target = batch
    repeated = (len(target),) if batch.row_axis else ()
    samples = policy.sample(inputs, (loss.num_samples, *repeated), seed=seed)
    rows = samples.shape[: 1 + len(repeated) + inputs.ndim - 1]

    def score() -> Tensor:
        if not isinstance(reward, SampledReward):
            return reward(samples, target)
        if samples.is_floating_point():
            return reward(samples, target, inputs)
        classes = policy(inputs).shape[-1]
        answers, labels = (functional.one_hot(x.long(), classes).to(inputs.dtype) for x in (samples, target))
        return reward(answers, labels, inputs)

    return SampledObjective(
        log_prob=lambda theta: substituted(
            theta, phi, policy.log_prob, inputs, samples.flatten(0, len(repeated))
        ).reshape(rows),
        reward=lambda phi: substituted(theta, phi, score),
        coefficient=loss.entropy_coef,
        advantage=loss.advantage,
        average=average,
    )
