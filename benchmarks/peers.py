"""What a user would write or call instead of the fused ops."""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def gaussian_dice(
    mean: Tensor, log_std: Tensor, target: Tensor, precision: Tensor, entropy_coef: float, group: int
) -> Tensor:
    """`gaussian_policy_loss(estimator="dice", advantage="loo")` in eager torch, as lean as it gets."""
    std = log_std.exp()
    samples = (mean + std * torch.randn(group, *mean.shape, device=mean.device)).detach()
    residual = samples - target
    rewards = -((residual @ precision) * residual).sum(-1)
    log_prob = (-0.5 * ((samples - mean) / std).square() - log_std - HALF_LOG_2PI).sum(-1)
    advantages = (rewards - rewards.mean(0)) * (group / (group - 1))
    weights = torch.exp(log_prob - log_prob.detach())
    entropy = (log_std + HALF_LOG_2PI + 0.5).sum(-1)
    return -((rewards + (weights - 1) * advantages).mean(0) + entropy_coef * entropy).mean()


def gaussian_analytic(mean: Tensor, log_std: Tensor, target: Tensor, precision: Tensor, entropy_coef: float) -> Tensor:
    delta = mean - target
    spread = torch.exp(2.0 * log_std) @ precision.diagonal()
    entropy = (log_std + HALF_LOG_2PI + 0.5).sum(-1)
    return (((delta @ precision) * delta).sum(-1) + spread - entropy_coef * entropy).mean()


def authors_gaussian(
    mean: Tensor, log_std: Tensor, target: Tensor, precision: Tensor, entropy_coef: float, group: int
) -> Tensor:
    """The score-function loss of the paper's released code: torch.distributions, einsum, mean log-density."""
    policy = torch.distributions.Normal(mean, log_std.exp())
    samples = policy.sample((group,))
    residual = samples - target
    rewards = -torch.einsum("gbi,ij,gbj->gb", residual, precision, residual)
    rewards = rewards - rewards.detach().amin(0, keepdim=True)
    loss = (-policy.log_prob(samples).mean(-1) * rewards).mean()
    return loss - entropy_coef * policy.entropy().mean()


def mvn_dice(
    mean: Tensor, scale_tril: Tensor, target: Tensor, precision: Tensor, entropy_coef: float, group: int
) -> Tensor:
    noise = torch.randn(group, *mean.shape, device=mean.device)
    samples = (mean + torch.einsum("bij,gbj->gbi", scale_tril, noise)).detach()
    residual = samples - target
    rewards = -((residual @ precision) * residual).sum(-1)
    whitened = torch.linalg.solve_triangular(scale_tril, (samples - mean).permute(1, 2, 0), upper=False)
    log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_prob = -0.5 * whitened.square().sum(1).t() - log_det - mean.shape[-1] * HALF_LOG_2PI
    advantages = (rewards - rewards.mean(0)) * (group / (group - 1))
    weights = torch.exp(log_prob - log_prob.detach())
    entropy = log_det + mean.shape[-1] * (HALF_LOG_2PI + 0.5)
    return -((rewards + (weights - 1) * advantages).mean(0) + entropy_coef * entropy).mean()


def categorical_exact(logits: Tensor, target: Tensor, table: Tensor, entropy_coef: float) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    return -((p * table.t()[target]).sum(-1) - entropy_coef * (p * log_p).sum(-1)).mean()


def categorical_exact_to_compile(logits: Tensor, target: Tensor, table: Tensor, entropy_coef: float) -> Tensor:
    """With a product in place of the index, of whose gradient inductor (torch 2.13, CPU) makes code that crashes."""
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    column = torch.nn.functional.one_hot(target, table.shape[0]).to(table.dtype) @ table.t()
    return -((p * column).sum(-1) - entropy_coef * (p * log_p).sum(-1)).mean()


def categorical_dice(logits: Tensor, target: Tensor, table: Tensor, entropy_coef: float, group: int) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    samples = torch.multinomial(p.detach(), group, replacement=True).t()
    rewards = table.t().index_select(0, target).gather(-1, samples.t()).t()
    log_prob = log_p.gather(-1, samples.t()).t()
    advantages = (rewards - rewards.mean(0)) * (group / (group - 1))
    weights = torch.exp(log_prob - log_prob.detach())
    return -((rewards + (weights - 1) * advantages).mean(0) - entropy_coef * (p * log_p).sum(-1)).mean()


def second_order(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """`harness.products` for torch.compile, which refuses a double backward: func.grad and one VJP."""

    def products(policy: Tensor, scale: Tensor, target: Tensor, precision: Tensor) -> tuple[Tensor, ...]:
        def gradient(policy: Tensor, scale: Tensor, precision: Tensor) -> tuple[Tensor, ...]:
            return torch.func.grad(loss, argnums=(0, 1))(policy, scale, target, precision)

        first, pull = torch.func.vjp(gradient, policy, scale, precision)
        return pull(first)

    return products


def token_kernels(entropy_coef: float) -> dict[str, Callable[..., Tensor]]:
    """Fused kernels of other packages, where installed, for the sum of log-probabilities of tokens and entropies."""
    found: dict[str, Callable[..., Tensor]] = {}
    with contextlib.suppress(ImportError):
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        def trl(logits: Tensor, ids: Tensor) -> Tensor:
            log_prob, entropy = selective_log_softmax_and_entropy(logits, ids)
            return (log_prob + entropy_coef * entropy).sum()

        found["trl"] = trl
    with contextlib.suppress(ImportError):
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        # Of log-probabilities alone and without a derivative; it leaves out the logits after the last token.
        def liger(logits: Tensor, ids: Tensor) -> Tensor:
            return fused_selective_log_softmax(logits[None], ids[None, :-1], 1.0).sum()

        found["liger"] = liger
    return found
