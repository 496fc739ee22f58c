"""Losses of modules as functions of parameters that are put in the place of the modules' own."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn
from torch.func import functional_call

from .hypergradients import Tensors


class Substitution:
    """Calls functions of a policy and a reward with θ and φ in place of their parameters, and copies of their buffers.

    Args:
        policy, reward: the modules.
        theta, phi: names of the parameters that θ and φ stand for.
    """

    def __init__(self, policy: nn.Module, theta: Sequence[str], reward: nn.Module, phi: Sequence[str]) -> None:
        self._policy, self._reward = policy, reward
        self._names = [*(f"policy.{name}" for name in theta), *(f"reward.{name}" for name in phi)]
        together = _Together(policy, reward, lambda: None)
        parameters = dict(together.named_parameters(remove_duplicate=False))
        self._own = [parameters[name] for name in self._names]
        self._buffers = list(together.named_buffers())

    def __call__(self, theta: Tensors, phi: Tensors, function: Callable[..., Tensor], *arguments: object) -> Tensor:
        values = (*theta, *phi)
        if not self._buffers and all(value is own for value, own in zip(values, self._own, strict=True)):
            return function(*arguments)
        named = dict(zip(self._names, values, strict=True)) | {name: x.clone() for name, x in self._buffers}
        return functional_call(_Together(self._policy, self._reward, function), named, arguments)


class _Together(nn.Module):
    """Policy and reward as one module, which is what `functional_call` needs to replace the parameters of both."""

    def __init__(self, policy: nn.Module, reward: nn.Module, function: Callable[..., object]) -> None:
        super().__init__()
        self.policy = policy
        self.reward = reward
        self._function = function

    def forward(self, *arguments: object) -> object:
        return self._function(*arguments)


@contextlib.contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """The policy is in evaluation mode inside, and each of its modules in its own afterwards."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
