"""Policies that `po_kernels` knows as networks, and inner loops in native calls.

The loss of a policy and the loop of `training.train` are the definition; what is here is equal to them within rounding
and is taken where it applies: policies of this package whose networks are linear layers with one activation, tanh, relu
or gelu, under a `PolicyGradient` whose reward is a matrix or a table, with Adam, AdamW or SGD, on the CPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import po_kernels as pk

_OPTIONS = {"entropy_coef", "estimator", "num_samples", "advantage", "rbf_gamma", "seed"}


def policy_loss(
    known: pk.Network | None, inputs: Tensor, target: Tensor, reward: Tensor | None, options: dict[str, Any]
) -> Tensor | None:  # fmt: skip
    """The loss of a policy whose network is known, in one native call, or None where the definition has to be taken."""
    if known is None or not options.keys() <= _OPTIONS or options.get("estimator", "") in (None, "reinforce"):
        return None
    if isinstance(options.get("entropy_coef"), Tensor):
        return None
    if pk.network_refusal(known, inputs, target, reward) is not None:
        return None
    return pk.network_policy_loss(known, inputs, target, reward, **options)


def network(
    policy: nn.Module, head: Any, module: nn.Module, spread: Sequence[Tensor] = (), *,
    spread_module: nn.Module | None = None, bounds: tuple[float, float] | None = None,
) -> pk.Network | None:  # fmt: skip
    """The network of a policy whose forward is that of its modules; None of other modules than it can have."""
    if _hooked(policy) or nn.modules.module._has_any_global_hook():
        return None
    parts = [_modules(part) for part in (module, spread_module) if part is not None]
    for part in parts:
        if len(part) % 2 == 0 or any(type(m) is not nn.Linear for m in part[::2]) or any(map(_hooked, part)):
            return None
    names: set[Any] = {_activation(m) for part in parts for m in part[1::2]} or {"tanh"}
    if len(names) > 1 or None in names:
        return None
    layers: list[Any] = [[(m.weight, m.bias) for m in part[::2]] for part in parts]
    return pk.Network(head, names.pop(), layers[0], spread, layers[1] if len(parts) > 1 else (), bounds)


def _modules(module: nn.Module) -> list[nn.Module]:
    return list(module) if type(module) is nn.Sequential and not _hooked(module) else [module]


def _activation(module: nn.Module) -> str | None:
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return {nn.Tanh: "tanh", nn.ReLU: "relu"}.get(type(module))


def _hooked(module: nn.Module) -> bool:
    """Something else than its class's forward runs when it is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in vars(module)
    )  # fmt: skip


class Steps:
    """Steps of an optimiser on a policy's network.

    Args:
        network: of the policy.
        data: the rows that batches are drawn from.
        reward: the precision or the table; None for the likelihood of the targets.
        options: of the loss, with `l2`.
        optimizer: one that `of` has found to serve.
        max_grad_norm: as `train` takes it.
    """

    def __init__(
        self, network: pk.Network, data: Any, reward: Tensor | None, options: dict[str, Any], optimizer: Optimizer,
        max_grad_norm: float | None,
    ) -> None:  # fmt: skip
        self._network, self._data, self._reward, self._options = network, data, reward, options
        self._optimizer, self._group = optimizer, optimizer.param_groups[0]
        self._max_norm = 0.0 if max_grad_norm is None else max_grad_norm
        self._parameters = network.parameters()
        # What its own `step` leaves for schedulers, which warn of an optimiser that takes none.
        optimizer._opt_called = True  # type: ignore[attr-defined]

    @classmethod
    def of(
        cls, policy: Any, data: Any, reward: Tensor | None, options: dict[str, Any], optimizer: Optimizer,
        max_grad_norm: float | None,
    ) -> "Steps | None":  # fmt: skip
        """None where a native call would not do what the optimiser does."""
        network = policy.fused_network()
        if network is None or type(optimizer) not in (Adam, AdamW, SGD) or len(optimizer.param_groups) != 1:
            return None
        group = optimizer.param_groups[0]
        if any(group.get(name) for name in ("amsgrad", "maximize", "differentiable")):
            return None
        if any((
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks,
            _global_optimizer_pre_hooks, _global_optimizer_post_hooks,
        )):  # fmt: skip
            return None
        # A scheduler's own wrapper counts the steps, and does no more.
        if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            return None
        if torch.is_inference_mode_enabled() or isinstance(options.get("entropy_coef"), Tensor):
            return None
        known = [p for p in network.parameters() if p is not None]
        each = {id(p) for p in known}
        if not {id(p) for p in group["params"]} <= each or len(each) < len(known):
            return None
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in known):
            return None
        # An optimiser moves a parameter that has a gradient, whether it requires one or not.
        if any(p.grad is not None and not p.requires_grad for p in group["params"]):
            return None
        # The penalty is on all parameters of the policy, and a std that is fixed is none.
        if options["l2"] and {id(p) for p in policy.parameters()} != each:
            return None
        if pk.network_refusal(network, data.inputs, data.target, reward) is not None:
            return None
        return cls(network, data, reward, options, optimizer, max_grad_norm)

    def ready(self) -> bool:
        """The optimiser has a state, which its own first step makes."""
        if isinstance(self._optimizer, SGD):
            return not self._group["momentum"] or self._has("momentum_buffer")
        return self._has("exp_avg") and self._has("exp_avg_sq") and len(set(map(float, self._counts()))) == 1

    @staticmethod
    def take(
        each: Sequence["tuple[Steps, Sequence[float], Sequence[int], Tensor | None, Sequence[int]]"], *, norms: bool
    ) -> list[pk.NetworkResult]:  # fmt: skip
        """Takes the steps of several under one loss in one native call.

        Args:
            each: with its learning rates, rows, places and seeds, see `NetworkTask`.
        """
        tasks = [
            pk.NetworkTask(s._network, s._data.inputs, s._data.target, s._reward, s._rule(rates), rows, places, seeds)
            for s, rates, rows, places, seeds in each
        ]
        found = pk.network_policy_steps(tasks, norms=norms, **each[0][0]._options)
        for (steps, *_), done in zip(each, found, strict=True):
            for count in steps._counts():
                count += len(done.losses)
            for parameter, gradient in zip(steps._parameters, done.gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient  # type: ignore[union-attr]
        return found

    def _moved(self) -> list[Tensor]:
        return [p for p in self._group["params"] if p.requires_grad]

    def _has(self, name: str) -> bool:
        """Each parameter has a state of that name, and of its type and layout."""
        pairs = [(p, self._optimizer.state.get(p, {}).get(name)) for p in self._moved()]
        return all(x is not None and x.dtype == p.dtype and x.shape == p.shape and x.is_contiguous() for p, x in pairs)

    def _state(self, name: str) -> list[Tensor | None]:
        """Of each parameter of the network that moves."""
        moved = {id(p): p for p in self._moved()}
        return [self._optimizer.state[moved[id(p)]].get(name) if id(p) in moved else None for p in self._parameters]

    def _counts(self) -> list[Tensor]:
        return [] if isinstance(self._optimizer, SGD) else [self._optimizer.state[p]["step"] for p in self._moved()]

    def _rule(self, rates: Sequence[float]) -> pk.NetworkSteps:
        group = self._group
        moved = {id(p) for p in self._moved()}
        common: dict[str, Any] = {
            "rates": rates, "weight_decay": float(group["weight_decay"]), "max_norm": self._max_norm,
            "moved": [id(p) in moved for p in self._parameters],
        }  # fmt: skip
        if isinstance(self._optimizer, SGD):
            return pk.NetworkSteps(
                "sgd", momentum=group["momentum"], dampening=group["dampening"], nesterov=group["nesterov"],
                first=self._state("momentum_buffer") if group["momentum"] else (), **common,
            )  # fmt: skip
        beta1, beta2 = group["betas"]
        return pk.NetworkSteps(
            "adamw" if group.get("decoupled_weight_decay", isinstance(self._optimizer, AdamW)) else "adam",
            first=self._state("exp_avg"), second=self._state("exp_avg_sq"), steps_before=int(self._counts()[0]),
            beta1=float(beta1), beta2=float(beta2), epsilon=float(group["eps"]), **common,
        )  # fmt: skip
