"""Policies that are networks: linear layers with an activation between them, and a loss of the policy that they make.

One native call passes blocks of rows forward through the layers and the loss and back, while they are in the cache. The
ops on a network's outputs are the definition; these are for those who train small networks, whose time goes into
calls, not into arithmetic. They serve float32 and float64 on the CPU, and `network_refusal` says what they do not.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from . import _check, _modes
from ._network import OP, Loss, Problem, room
from ._types import Advantage, Estimator

__all__ = [
    "Network", "NetworkResult", "NetworkSteps", "NetworkTask", "network_policy_loss", "network_policy_steps",
    "network_refusal",
]  # fmt: skip

Layer = tuple[Tensor, Tensor | None]
_STEPS = "network_policy_steps"


class Network(NamedTuple):
    """A policy p(y|x) with the parameters of a network of x.

    Attributes:
        head: the policy's family: "gaussian" with the mean and a spread, "mvn" likewise with a full covariance,
            "categorical" with logits.
        activation: between layers: "tanh", "relu", "gelu", or "gelu_tanh", its approximation by tanh.
        layers: (weight (out, in), bias (out) or None) of each layer of the mean, or of the logits.
        spread: what the spread is made of where it is the same for all rows: of "gaussian" (log_std (D,),), of "mvn"
            the logarithms of the Cholesky factor's diagonal and what is below it, ((D,), (D, D)).
        spread_layers: of a network of log_std with the same activation, which is there instead of `spread`.
        bounds: (low, high); log σ is then low + (high - low) sigmoid(s) of what `spread` or `spread_layers` have.
    """

    head: Literal["gaussian", "mvn", "categorical"]
    activation: Literal["tanh", "relu", "gelu", "gelu_tanh"]
    layers: Sequence[Layer]
    spread: Sequence[Tensor] = ()
    spread_layers: Sequence[Layer] = ()
    bounds: tuple[float, float] | None = None

    def parameters(self) -> list[Tensor | None]:
        """Weight and bias of each layer, then those of the spread; None where there is no bias."""
        layers = [tensor for layer in (*self.layers, *self.spread_layers) for tensor in layer]
        return [*layers, *self.spread]


class NetworkSteps(NamedTuple):
    """Steps of an optimiser, as `torch.optim` takes them.

    Attributes:
        rule: "adam", "adamw" or "sgd".
        rates: the learning rate of each step; as many steps are taken.
        moved: which of `Network.parameters` the optimiser moves.
        first, second: state of each parameter, in the order of `Network.parameters`: exp_avg and exp_avg_sq, or the
            momentum buffer; None for a parameter that stays as it is.
        steps_before: steps that the state has seen.
        beta1, beta2, epsilon: of Adam and AdamW, whose own defaults are 0.9, 0.999 and 1e-8; there are none here.
        momentum, dampening, nesterov: of SGD.
        weight_decay: as the optimiser has it.
        max_norm: gradients longer than it are scaled to this Euclidean norm; 0 leaves them.
    """

    rule: Literal["adam", "adamw", "sgd"]
    rates: Sequence[float]
    moved: Sequence[bool]
    first: Sequence[Tensor | None] = ()
    second: Sequence[Tensor | None] = ()
    steps_before: int = 0
    beta1: float = 0.0
    beta2: float = 0.0
    epsilon: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    max_norm: float = 0.0


def network_refusal(network: Network, inputs: Tensor, target: Tensor, reward: Tensor | None) -> str | None:
    """Why the ops on networks do not serve these tensors here and now, or None.

    They serve contiguous CPU tensors of one type, float32 or float64, that no transform, mode or subclass of torch is
    looking at, on the native backend.

    Args:
        network, inputs, target, reward: as in `network_policy_loss`.

    Returns:
        the reason in words, such as "autocast is on".

    Example:
        >>> import torch, po_kernels as pk
        >>> layer = torch.nn.Linear(3, 2)
        >>> network = pk.Network("gaussian", "tanh", [(layer.weight, layer.bias)], [torch.zeros(2)])
        >>> pk.network_refusal(network, torch.randn(5, 3), torch.randn(5, 2).double(), None)
        'the targets are torch.float64'
    """
    parameters = [p for p in network.parameters() if p is not None]
    every = [inputs, *parameters, *([] if reward is None else [reward])]
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a compiler traces it"
    if not _modes.may_call_directly(target, *every) or _modes.in_forward_mode():
        return "a transform or a mode of torch looks at it"
    _, backend = dispatch.requested(OP, None)
    if backend not in (None, "native"):
        return f"backend {backend!r} was asked for"
    reason = dispatch.refusal("gaussian_policy_loss", "native", inputs.device.type, inputs.dtype)
    if reason is not None:
        return reason
    if any(x.layout is not torch.strided or x.is_nested for x in (target, *every)):
        return "its tensors are not all dense"
    if any(x.dtype != inputs.dtype or x.device != inputs.device or not x.is_contiguous() for x in every):
        return "its tensors are not all contiguous and of one type and device"
    if inputs.ndim != 2 or len(inputs) == 0 or not target.is_contiguous() or target.device != inputs.device:
        return f"inputs of shape {tuple(inputs.shape)} are no rows, or the targets are not contiguous"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if inputs.requires_grad or target.requires_grad:
        return "inputs or targets require grad"
    return _wrong(network, inputs, target, reward)


def _wrong(network: Network, inputs: Tensor, target: Tensor, reward: Tensor | None) -> str | None:
    """What about the sizes does not fit, which the definition says better."""
    if network.head not in ("gaussian", "mvn", "categorical"):
        return f"{network.head!r} is no head"
    if network.activation not in ("tanh", "relu", "gelu", "gelu_tanh"):
        return f"{network.activation!r} is no activation"
    for layers in filter(len, (network.layers, network.spread_layers)):
        width = inputs.shape[1]
        for weight, bias in layers:
            if weight.ndim != 2 or weight.shape[1] != width or (bias is not None and bias.shape != weight.shape[:1]):
                return "the widths of its layers do not fit"
            width = len(weight)
    rows, dim = len(inputs), len(network.layers[-1][0]) if network.layers else 0
    if dim == 0 or (network.spread_layers and len(network.spread_layers[-1][0]) != dim):
        return "it has no outputs, or a spread of another size"
    categorical = network.head == "categorical"
    spreads = {"gaussian": [(dim,)], "mvn": [(dim,), (dim, dim)], "categorical": []}[network.head]
    if [tuple(s.shape) for s in network.spread] != ([] if network.spread_layers else spreads):
        return "its spread has other shapes"
    if network.head != "gaussian" and (network.spread_layers or network.bounds is not None):
        return f"a spread of {network.head} is neither bounded nor a network"
    if target.dtype != (torch.int64 if categorical else inputs.dtype):
        return f"the targets are {target.dtype}"
    event = () if categorical else (dim,)
    if target.shape != (rows, *event) and (target.shape[1:] != (rows, *event) or len(target) == 0):
        return f"the targets have shape {tuple(target.shape)}"
    shapes: tuple[tuple[int, ...], ...] = ((dim, dim),) if categorical else ((), (dim,), (dim, dim))
    return None if reward is None or tuple(reward.shape) in shapes else f"the reward has shape {tuple(reward.shape)}"


def network_policy_loss(
    network: Network, inputs: Tensor, target: Tensor, reward: Tensor | None, *, entropy_coef: float = 0.0,
    estimator: Estimator | None = None, num_samples: int | None = None, advantage: Advantage = "loo",
    rbf_gamma: float | None = None, l2: float = 0.0, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The policy loss of a network's outputs, (), a mean over rows and observations, plus (l2/2) ‖parameters‖².

    Equal, within rounding, to `gaussian_policy_loss`, `mvn_policy_loss` or `categorical_policy_loss` of what the layers
    put out. Differentiable twice in the network's parameters and in the reward; a third derivative raises.

    Args:
        network: the policy.
        inputs: x, (N, in).
        target: y, (N, D), or (R, N, D) for R observations of each row; labels (N) or (R, N) of a categorical.
        reward: precision (), (D,) or (D, D), or a table (C, C); None for the negative log-likelihood of the targets
            instead of a policy loss, and no option but l2.
        entropy_coef, estimator, num_samples, advantage, rbf_gamma, seed: as the policy losses take them; None for the
            estimator is the closed form.
        l2: strength of the penalty on all parameters.

    Returns:
        the loss.

    Raises:
        RuntimeError: `network_refusal` has a reason, or a third derivative was asked for.
        ValueError: an option or a value, as the policy losses; an option but l2 without a reward.

    Example:
        >>> import torch, po_kernels as pk
        >>> layer = torch.nn.Linear(3, 2)
        >>> network = pk.Network("gaussian", "tanh", [(layer.weight, layer.bias)], [torch.zeros(2)])
        >>> pk.network_policy_loss(network, torch.randn(5, 3), torch.randn(5, 2), torch.ones(())).backward()
        >>> layer.weight.grad.shape
        torch.Size([2, 3])
    """
    _serve(OP, network, inputs, target, reward)
    inputs, target, reward = map(_modes.kept, (inputs, target, reward))
    problem = Problem(
        network, inputs, target, reward, l2, estimator, num_samples, advantage, rbf_gamma, entropy_coef
    )  # fmt: skip
    key = int(_check.seed_tensor(OP, seed, 0)) if problem.config.num_samples else 0
    return Loss.apply(problem, key, torch.is_grad_enabled(), reward, *network.parameters())


class NetworkTask(NamedTuple):
    """Steps of one network's training.

    Attributes:
        network, inputs, target, reward: as in `network_policy_loss`.
        steps: the optimiser's rule, state and learning rates.
        batch_rows: how many rows each step's batch has; as many entries as there are steps, that is learning rates.
        places: int64 (Σ batch_rows,), the rows of all batches by their number, one batch after the other; None for all
            rows each time.
        seeds: of the samples of each step; closed forms have no use for them.
    """

    network: Network
    inputs: Tensor
    target: Tensor
    reward: Tensor | None
    steps: NetworkSteps
    batch_rows: Sequence[int]
    places: Tensor | None
    seeds: Sequence[int]


class NetworkResult(NamedTuple):
    """What steps of one network's training gave.

    Attributes:
        losses: of each step's batch, before the step. There are fewer than steps if the native kernel refused a value
            in the batch after them, such as a label out of range, which the policy loss of the network's outputs names.
        norms: of the gradient at each, before it was scaled, if asked for.
        gradients: of the last step, scaled, for each of `Network.parameters`; None for one that does not move.

    Example:
        >>> import torch, po_kernels as pk
        >>> pk.NetworkResult(losses=[0.7, 0.5], norms=[], gradients=[]).losses[-1]  # `network_policy_steps` makes it
        0.5
    """

    losses: Sequence[float]
    norms: Sequence[float]
    gradients: list[Tensor | None]


def network_policy_steps(
    tasks: Sequence[NetworkTask], *, norms: bool = False, entropy_coef: float = 0.0,
    estimator: Estimator | None = None, num_samples: int | None = None, advantage: Advantage = "loo",
    rbf_gamma: float | None = None, l2: float = 0.0,
) -> list[NetworkResult]:  # fmt: skip
    """Takes steps of optimisers under `network_policy_loss`, of one network or an ensemble, in one native call.

    Parameters and states change in place, `steps_before` does not. Networks share out the threads between them. A
    step's arithmetic is that of `torch.optim`, within rounding.

    Args:
        tasks: of each network; none has tensors in common with another but rows and reward.
        norms: report the norms of the gradients; they are with `max_norm`.
        entropy_coef, estimator, num_samples, advantage, rbf_gamma, l2: as in `network_policy_loss`.

    Raises:
        RuntimeError: `network_refusal` has a reason.
        TypeError, ValueError: no task; an option, as the policy losses; a state unlike its parameter; batches that do
            not fit together, or places outside the rows.

    Example:
        >>> import torch, po_kernels as pk
        >>> layer, log_std = torch.nn.Linear(3, 2), torch.zeros(2)
        >>> network = pk.Network("gaussian", "tanh", [(layer.weight, layer.bias)], [log_std])
        >>> steps = pk.NetworkSteps("sgd", rates=[0.1] * 20, moved=[True] * 3)
        >>> x, y = torch.randn(5, 3), torch.randn(5, 2)
        >>> task = pk.NetworkTask(network, x, y, None, steps, batch_rows=[5] * 20, places=None, seeds=[0] * 20)
        >>> [stepped] = pk.network_policy_steps([task])
        >>> len(stepped.losses), stepped.losses[-1] < stepped.losses[0]
        (20, True)
    """
    if not tasks:
        raise ValueError(f"{_STEPS}: tasks: expected at least one, got none")
    native = dispatch.module("native").network
    problems, every, changed = [], [], []
    for network, inputs, target, reward, steps, batch_rows, places, seeds in tasks:
        _serve(_STEPS, network, inputs, target, reward)
        problem = Problem(
            network, inputs, target, reward, l2, estimator, num_samples, advantage, rbf_gamma, entropy_coef
        )  # fmt: skip
        parameters = [None if p is None else p.detach() for p in network.parameters()]
        _check_steps(steps, network.parameters())
        _check_batches(len(inputs), len(steps.rates), batch_rows, places, seeds)
        every.append(room(parameters, steps.moved))
        rule = steps._asdict() | {"rule": native.RULES[steps.rule]}
        del rule["moved"]
        problems.append(problem.prepared(
            None if reward is None else reward.detach(), native.Batches(batch_rows, places, seeds), values=parameters,
            gradients=every[-1], norms=norms or steps.max_norm > 0, rule=rule,
        ))  # fmt: skip
        # A graph of before must not be differentiated with the values of after, as with torch's own steps.
        states = (parameters, steps.first, steps.second)
        changed += [x for xs in states for x, moved in zip(xs, steps.moved, strict=False) if moved and x is not None]
    found = native.run(problems)
    torch.autograd.graph.increment_version(changed)
    return [NetworkResult(each.losses, each.norms, gradients) for each, gradients in zip(found, every, strict=True)]


def _check_steps(steps: NetworkSteps, parameters: Sequence[Tensor | None]) -> None:
    """The kernel writes where the state is: it has to be as large as it should."""
    _check.choice(_STEPS, "rule", steps.rule, ("adam", "adamw", "sgd"))
    states = {"first": steps.first, "second": steps.second}
    if steps.rule == "sgd":
        del states["second"]
        if steps.momentum == 0:
            states.clear()
    for name, given in ({"moved": steps.moved} | states).items():
        if len(given) != len(parameters):
            raise ValueError(
                f"{_STEPS}: {name}: expected one for each of {len(parameters)} parameters, got {len(given)}"
            )
    seen: set[int] = set()
    for index, (parameter, moved) in enumerate(zip(parameters, steps.moved, strict=True)):
        if not moved:
            continue
        if parameter is None:
            raise ValueError(f"{_STEPS}: moved[{index}]: expected False where there is no parameter, got True")
        if id(parameter) in seen:
            raise ValueError(f"{_STEPS}: moved[{index}]: expected False for a parameter that moves already, got True")
        seen.add(id(parameter))
        for name, given in states.items():
            x = given[index]
            like = (parameter.shape, parameter.dtype, parameter.device)
            if x is None or (x.shape, x.dtype, x.device) != like or not x.is_contiguous():
                got = "None" if x is None else f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
                raise ValueError(
                    f"{_STEPS}: {name}[{index}]: expected contiguous {parameter.dtype} of shape "
                    f"{tuple(parameter.shape)}, got {got}"
                )


def _check_batches(
    rows: int, count: int, batch_rows: Sequence[int], places: Tensor | None, seeds: Sequence[int]
) -> None:  # fmt: skip
    if count < 1 or len(batch_rows) != count or len(seeds) != count:
        raise ValueError(
            f"{_STEPS}: batch_rows, seeds: expected one for each of at least one learning rate, got {len(batch_rows)} "
            f"and {len(seeds)} for {count}"
        )
    if places is None:
        if set(batch_rows) != {rows}:
            raise ValueError(f"{_STEPS}: batch_rows: expected all {rows} rows without places, got {list(batch_rows)}")
        return
    if places.dtype != torch.int64 or places.ndim != 1 or not places.is_contiguous():
        raise TypeError(
            f"{_STEPS}: places: expected contiguous int64 of one axis, got {places.dtype} {tuple(places.shape)}"
        )
    if min(batch_rows) < 1 or sum(batch_rows) != len(places) or not 0 <= int(places.min()) <= int(places.max()) < rows:
        raise ValueError(
            f"{_STEPS}: places: expected {sum(batch_rows)} rows from 0 to {rows - 1}, got {len(places)} from "
            f"{int(places.min())} to {int(places.max())}"
        )


def _serve(op: str, network: Network, inputs: Tensor, target: Tensor, reward: Tensor | None) -> None:
    for name, x in {"inputs": inputs, "target": target, "reward": reward}.items():
        if not isinstance(x, Tensor) and not (x is None and name == "reward"):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(x).__name__}")
    _check.choice(op, "head", network.head, ("gaussian", "mvn", "categorical"))
    _check.choice(op, "activation", network.activation, ("tanh", "relu", "gelu", "gelu_tanh"))
    reason = network_refusal(network, inputs, target, reward)
    if reason is not None:
        raise RuntimeError(f"{op}: {reason}; use the policy loss of the network's outputs")
    dispatch.serve_natively(op, "cpu", inputs.dtype)
