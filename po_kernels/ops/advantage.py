"""Advantages over a group of samples."""

from torch import Tensor

from ..backends.contract import OpConfig
from . import _check, _loss, _value


def group_advantage(
    rewards: Tensor, kind: str = "loo", *, rbf_gamma: float | None = None, backend: str | None = None
) -> Tensor:
    """Advantages of G samples against a baseline from their own group.

    - "none": A = r;
    - "min": A = r - min r, the minimum held constant;
    - "mean": A = r - mean r;
    - "loo": A = G/(G-1) (r - mean r), the leave-one-out baseline (Kool et al. 2019);
    - "standardized": A = (r - mean r) / (std r + 1e-6), G in the denominator of std (GRPO, arXiv 2402.03300);
      a group whose rewards are all equal has A = 0 and passes no derivative.

    Args:
        rewards: (G, *), one group along the first axis.
        kind: one of the above.
        rbf_gamma: first replaces r by exp(rbf_gamma · r).
        backend: name of the backend; None for the first that can serve the call.

    Returns:
        advantages, (G, *), differentiable in rewards.

    Raises:
        TypeError, ValueError: an argument of another type or range, or G = 1 with "loo".
        RuntimeError: the backend asked for cannot serve the call.
    """
    op = "group_advantage"
    _check.floating(op, rewards=rewards)
    _check.choice(op, "kind", kind, _check.ADVANTAGES)
    if rewards.ndim < 1:
        raise ValueError(f"{op}: rewards: expected shape (G, *), got ()")
    _check.group_size(op, "rewards", rewards.shape[0], kind)
    gamma = None if rbf_gamma is None else _check.real(op, "rbf_gamma", rbf_gamma)
    (computed,) = _loss.computed(rewards.reshape(rewards.shape[0], rewards.shape[1:].numel()))
    advantages = _value.evaluate(op, backend, (computed,), (), OpConfig(advantage=kind, rbf_gamma=gamma))
    return advantages.reshape(rewards.shape).to(rewards.dtype)
