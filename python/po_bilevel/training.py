"""One level: a policy trained under one loss, by likelihood or by policy gradient under a reward that stays."""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from .errors import NonFiniteError
from .fused import Steps
from .losses import Batch, Likelihood, NegativeLogLikelihood, PolicyGradient, PolicyGradientUnder
from .optimizers import Together
from .passes import Passes
from .policies import Policy
from .processes import Processes, device_of, unwrapped
from .streams import BatchStream, LoaderStream, stream_of

InnerLoss = Callable[[Policy, nn.Module, Batch, int], Tensor]

# Losses read at once where nothing asks for each: reading one waits for the device that computes it.
_READ_TOGETHER = 100


def train(
    policy: nn.Module, loss: Callable[[Policy, Batch, int], Tensor], stream: BatchStream | LoaderStream,
    optimizer: Optimizer, steps: int, *, tolerance: float = 0.0, patience: int | None = None, min_delta: float = 0.0,
    max_grad_norm: float | None = None, scheduler: LRScheduler | None = None,
    callback: Callable[[int, float], Any] | None = None, autocast: torch.dtype | None = None, accumulation: int = 1,
    scaler: GradScaler | None = None,
) -> tuple[float, int]:  # fmt: skip
    """Takes optimiser steps on the policy until there is a reason to stop.

    With Adam, AdamW or SGD on a policy of this package that is made of linear layers and tanh, relu or gelu, under its
    likelihood or a `PolicyGradient`, up to a hundred steps, their schedule's included, run in one native call. They
    are equal to steps in Python within rounding. What asks for each loss, such as `patience`, makes it a call a step,
    and so does a scheduler that is not torch's or moves momentum too, as `OneCycleLR` does. Mixed precision, parts of a
    batch and several processes take theirs in Python.

    Args:
        policy: a `Policy`; or one in `DistributedDataParallel`, with the same arguments in each of its processes, which
            share the rows of each batch out among them, draw samples of their own, and average loss and gradient in
            one exchange a step, not through that class's own hooks.
        loss: (policy, batch, seed) -> (), evaluated with one batch and seed for the whole of a step, however often
            the optimiser calls for it (as `torch.optim.LBFGS` does). A mean over rows, where parts or processes share
            them, and what does not depend on rows.
        stream: where batches and seeds come from.
        optimizer: any torch optimiser over parameters of the policy.
        steps: the most steps to take.
        tolerance: stop after a step if the Euclidean norm of the last gradient that it used, before it was scaled, is
            at most this.
        patience: stop after so many steps in a row whose loss did not fall below the least before; None for never.
        min_delta: by how much a loss has to fall below it to count.
        max_grad_norm: longer gradients are scaled to this Euclidean norm; None leaves them.
        scheduler: of the optimiser's learning rates, stepped after each step; `ReduceLROnPlateau` is given the loss.
        callback: called after each step with its number, from 0, and its loss; True from it stops.
        autocast: torch.bfloat16 or torch.float16, for what `torch.autocast` computes in such a type of the network and
            the loss; None for the parameters' own. With float16 a `torch.amp.GradScaler` scales the loss, and leaves
            out steps whose gradient is infinite, which count for neither patience nor scheduler.
        accumulation: parts that a batch is split into, one after another, whose gradients add up: saves memory.
        scaler: to go on with, for float16; None for a new one.

    Returns:
        the loss at the start of the last step, and the number of steps taken.

    Raises:
        ValueError: an option out of range, inputs that do not fit the policy, or an optimiser of parameters that the
            loss does not depend on.
        TypeError: an optimiser that is none, or a policy of another class.
        NonFiniteError: a loss or a parameter is infinite or not a number, or a gradient in float16 at any scale. Losses
            are read a hundred at a time, for a device not to be waited for at each step, unless one of the other
            options asks for each.
    """
    check_loop(steps, tolerance, patience, min_delta, max_grad_norm)
    check_optimizer("optimizer", optimizer)
    passes = Passes(Processes.of(policy), stream.data.inputs.device, autocast, accumulation, scaler)
    policy = unwrapped(policy, Policy)  # type: ignore[type-abstract]
    stream.data.check_for(policy, "data", autocast=autocast is not None)
    parameters = trained(optimizer)
    if not parameters:
        raise ValueError("optimizer: expected parameters that require grad, got none")
    value, waiting = float("nan"), Patience(patience, min_delta)
    norm: Tensor | float = 0.0
    unread: list[Tensor] = []
    at_once = tolerance > 0 or patience is not None or callback is not None or isinstance(scheduler, ReduceLROnPlateau)
    passes.check(optimizer)
    # A stream of another class may have other batches than it draws.
    native = None
    if type(stream) is BatchStream and passes.plain:
        native = native_steps(policy, loss, stream.data, optimizer, max_grad_norm)
    ahead = 1 if at_once or not _known_ahead(scheduler) else _READ_TOGETHER
    of_policy = functools.partial(loss, policy)
    step, stepped = -1, True
    while step < steps - 1:
        if native is not None and native.ready():
            taken = min(steps - 1 - step, ahead)
            member = _Member(policy, cast(BatchStream, stream), optimizer, scheduler, native)
            [(value, norm)] = _take([member], loss, step + 1, taken, norms=tolerance > 0)
            step += taken
        else:
            batch, seed = stream.next()
            step += 1

            def closure(batch: Batch = batch, seed: int = seed) -> Tensor:
                nonlocal norm
                # `optimizer.zero_grad()` does the same, with a hook for profilers that costs a tenth of a small step.
                for parameter in parameters:
                    parameter.grad = None
                result = passes.gradient(of_policy, batch, seed, parameters, own=stream.own)
                if all(p.grad is None for p in parameters):
                    raise ValueError("optimizer: expected parameters that the loss depends on, got others")
                if passes.scaler is not None:
                    passes.scaler.unscale_(optimizer)
                # A norm costs as much as a small optimiser's step, so there is none where nothing asks for it: a
                # gradient that is not finite makes the next loss so, or the parameters below.
                if max_grad_norm is not None:
                    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
                elif tolerance > 0:
                    norm = norm_of([p.grad for p in parameters if p.grad is not None])
                return result

            found, stepped = passes.step(optimizer, closure)
            unread.append(found)
            if at_once or native is not None or step == steps - 1 or len(unread) == _READ_TOGETHER:
                value = _read(unread, step)
        if scheduler is not None and stepped:
            advance(scheduler, value)
        if callback is not None and passes.processes.any(callback(step, value) is True):
            break
        if not stepped:
            continue
        if tolerance > 0:
            check_finite(f"the gradient's norm at step {step}", float(norm))
            if norm <= tolerance:
                break
        if waiting.over(value):
            break
    passes.processes.equal(policy, parameters=False)
    _check_parameters(parameters)
    return value, step + 1


def train_nll(
    policy: nn.Module, data: Batch | DataLoader[Any], optimizer: Optimizer, steps: int, *,
    loss: NegativeLogLikelihood | None = None, batch_size: int | None = None, seed: int = 0, **options: Any,
) -> tuple[float, int]:  # fmt: skip
    """Maximum likelihood; the default loss has no penalty. Arguments, options, result and errors as in `train`; data as
    in `BilevelTrainer`.

    Example:
        >>> import torch
        >>> policy, data = LinearGaussian(3, 2), Batch(torch.randn(50, 3), torch.randn(50, 2))
        >>> loss, steps = train_nll(policy, data, torch.optim.Adam(policy.parameters(), lr=0.1), 20)
        >>> steps
        20
    """
    objective = NegativeLogLikelihood() if loss is None else loss
    stream = stream_of("data", data, batch_size, seed, device_of(policy))
    return train(policy, Likelihood(objective), stream, optimizer, steps, **options)


def train_policy_gradient(
    policy: nn.Module, reward: nn.Module, data: Batch | DataLoader[Any], optimizer: Optimizer, steps: int, *,
    loss: InnerLoss | None = None, batch_size: int | None = None, seed: int = 0, **options: Any,
) -> tuple[float, int]:  # fmt: skip
    """Policy gradient under a reward that stays as it is. Arguments, options, result and errors as in `train`.

    Example:
        >>> import torch
        >>> policy, data = LinearGaussian(3, 2), Batch(torch.randn(50, 3), torch.randn(50, 2))
        >>> optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
        >>> loss = PolicyGradient(entropy_coef=0.5, estimator="dice", num_samples=16)
        >>> train_policy_gradient(policy, MahalanobisReward(2), data, optimizer, 200, loss=loss)[1]
        200
    """
    objective = PolicyGradient() if loss is None else loss
    stream = stream_of("data", data, batch_size, seed, device_of(policy))
    Processes.of(policy).equal(reward)
    with under(reward, objective) as fixed:
        return train(policy, fixed, stream, optimizer, steps, **options)


def train_ensemble(
    policies: Sequence[Policy], reward: nn.Module | None, data: Batch | Sequence[Batch],
    optimizers: Sequence[Optimizer], steps: int, *, loss: PolicyGradient | NegativeLogLikelihood | None = None,
    batch_size: int | None = None, seed: int = 0, schedulers: Sequence[LRScheduler] | None = None,
    max_grad_norm: float | None = None,
) -> list[float]:  # fmt: skip
    """Trains policies apart from one another, each as `train_policy_gradient` or `train_nll` does with its own seed.

    Where native calls serve, see `train`, a hundred steps of all policies are one call, whose threads share them out.

    Args:
        policies: M, without a parameter in common.
        reward: r_φ, which stays as it is; None to train by likelihood.
        data: rows, those of all, or M of them.
        optimizers: M, of a policy's parameters each.
        steps: of each.
        loss: `PolicyGradient()` with a reward, `NegativeLogLikelihood()` without, as it stands.
        batch_size, max_grad_norm: as in `train`.
        seed: of the first policy's batches and samples; the next has the next.
        schedulers: M, or None for none; with `ReduceLROnPlateau` policies are trained one after another.

    Returns:
        each policy's loss at the start of the last step.

    Raises:
        ValueError: numbers of policies, data, optimisers or schedulers that differ; a parameter that is trained and
            that two policies have in common; as `train`.
        NonFiniteError: as `train`.
        TypeError: a loss of the other kind, or a policy of another class.

    Example:
        >>> import torch
        >>> from po_bilevel import Batch, LinearGaussian, train_ensemble
        >>> policies = [LinearGaussian(3, 2) for _ in range(4)]
        >>> data = Batch(torch.randn(50, 3), torch.randn(50, 2))
        >>> optimizers = [torch.optim.Adam(policy.parameters(), lr=1e-2) for policy in policies]
        >>> len(train_ensemble(policies, None, data, optimizers, steps=20, batch_size=10))
        4
    """
    for policy in policies:
        if not isinstance(policy, Policy):
            raise TypeError(f"policies: expected each to be a Policy, got {type(policy).__name__}")
    several = [data] * len(policies) if isinstance(data, Batch) else list(data)
    plans: list[LRScheduler | None] = [None] * len(policies) if schedulers is None else list(schedulers)
    check_count("steps", steps, 0)
    for name, given in (("data", several), ("optimizers", optimizers), ("schedulers", plans)):
        if len(given) != len(policies):
            raise ValueError(f"{name}: expected one for each of {len(policies)} policies, got {len(given)}")
    moved = {id(p) for optimizer in optimizers for p in trained(optimizer)}
    counts = Counter(id(p) for policy in policies for p in policy.parameters() if id(p) in moved)
    if any(count > 1 for count in counts.values()):
        raise ValueError("policies: expected parameters of their own, got one that two of them have in common")
    streams = [BatchStream(each, batch_size, seed + number) for number, each in enumerate(several)]
    with contextlib.ExitStack() as stack:
        objective: Callable[[Policy, Batch, int], Tensor]
        kind = NegativeLogLikelihood if reward is None else PolicyGradient
        if loss is not None and not isinstance(loss, kind):
            with_reward = "without a reward" if reward is None else "with a reward"
            raise TypeError(f"loss: expected a {kind.__name__} {with_reward}, got {type(loss).__name__}")
        if reward is None:
            objective = Likelihood(cast(NegativeLogLikelihood, loss or NegativeLogLikelihood()))
        else:
            objective = stack.enter_context(under(reward, cast(PolicyGradient, loss or PolicyGradient())))
        each = list(zip(policies, streams, optimizers, plans, strict=True))

        def alone(count: int) -> list[float]:
            return [
                train(policy, objective, stream, optimizer, count, scheduler=plan, max_grad_norm=max_grad_norm)[0]
                for policy, stream, optimizer, plan in each
            ]

        found = [native_steps(p, objective, s.data, o, max_grad_norm) for p, s, o, _ in each]
        natives = [native for native in found if native is not None]
        if not each or len(natives) < len(each) or any(isinstance(plan, ReduceLROnPlateau) for plan in plans):
            return alone(steps)
        done = min(steps, 1)
        values = alone(done)
        if not all(native.ready() for native in natives):
            return alone(steps - done) if done < steps else values
        members = [_Member(*one, native) for one, native in zip(each, natives, strict=True)]
        ahead = _READ_TOGETHER if all(map(_known_ahead, plans)) else 1
        while done < steps:
            taken = min(steps - done, ahead)
            values = [value for value, _ in _take(members, objective, done, taken, norms=False)]
            for plan in plans:
                if plan is not None:
                    advance(plan, math.nan)
            done += taken
        for optimizer in optimizers:
            _check_parameters(trained(optimizer))
        return values


def check_loop(
    steps: int, tolerance: float, patience: int | None, min_delta: float, max_grad_norm: float | None, prefix: str = ""
) -> None:  # fmt: skip
    """Refuses options that no loop can have; prefix is that of two of their names."""
    check_count(f"{prefix}steps", steps, 0)
    if patience is not None:
        check_count("patience", patience, 1)
    for name, value in ((f"{prefix}tolerance", tolerance), ("min_delta", min_delta)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    check_norm("max_grad_norm", max_grad_norm)


class Patience:
    """Counts steps in a row whose loss did not fall, by more than min_delta, below the least before."""

    def __init__(self, patience: int | None, min_delta: float) -> None:
        self._patience, self._min_delta = patience, min_delta
        self._least, self._since = math.inf, 0

    def over(self, loss: float) -> bool:
        """Whether the patience is at its end after a step of this loss."""
        self._since = 0 if loss < self._least - self._min_delta else self._since + 1
        self._least = min(self._least, loss)
        return self._patience is not None and self._since >= self._patience


def check_count(name: str, value: int, least: int) -> None:
    if value < least or value != int(value):
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")


def check_norm(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name}: expected a positive number or None, got {value}")


def check_optimizer(name: str, optimizer: object) -> None:
    if not isinstance(optimizer, Optimizer | Together):
        raise TypeError(f"{name}: expected an optimiser of torch, got {type(optimizer).__name__}")


def trained(optimizer: Optimizer | Together) -> list[Tensor]:
    """What of an optimiser's parameters requires grad."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _known_ahead(scheduler: LRScheduler | None) -> bool:
    """Steps have learning rates that depend on nothing but their number, and no other option that changes."""
    if scheduler is None:
        return True
    if type(scheduler).__module__ != "torch.optim.lr_scheduler" or getattr(scheduler, "cycle_momentum", False):
        return False
    return all(map(_known_ahead, getattr(scheduler, "_schedulers", ())))


def advance(scheduler: LRScheduler, loss: float) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


@contextlib.contextmanager
def under(reward: nn.Module, loss: InnerLoss) -> Iterator[Callable[[Policy, Batch, int], Tensor]]:
    """The loss under a reward that stays as it is inside: no derivative is computed for its parameters."""
    parameters = [p for p in reward.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        if isinstance(loss, PolicyGradient):
            yield loss.under(reward)
        else:
            yield lambda policy, batch, seed: loss(policy, reward, batch, seed)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def norm_of(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors]).norm()) if tensors else 0.0


def native_steps(
    policy: Policy, loss: Callable[[Policy, Batch, int], Tensor], data: Batch, optimizer: Optimizer,
    max_grad_norm: float | None,
) -> Steps | None:  # fmt: skip
    """What takes `train`'s steps in native calls, or None where they are taken in Python."""
    if type(loss) is Likelihood or type(loss) is PolicyGradientUnder:
        return loss.steps(policy, data, optimizer, max_grad_norm)
    return None


class _Member(NamedTuple):
    policy: Policy
    stream: BatchStream
    optimizer: Optimizer
    scheduler: LRScheduler | None
    native: Steps

    def ahead(self, count: int) -> tuple[list[tuple[Tensor | None, int]], list[float]]:
        """The next batches and seeds, and learning rates; the scheduler's last step is left to do."""
        rates = []
        for step in range(count):
            if step > 0 and self.scheduler is not None:
                advance(self.scheduler, math.nan)
            rates.append(float(self.optimizer.param_groups[0]["lr"]))
        return self.stream.draw_several(count), rates


def _take(
    members: Sequence[_Member], loss: Callable[[Policy, Batch, int], Tensor], first: int, count: int, *, norms: bool
) -> list[tuple[float, float]]:  # fmt: skip
    """Takes steps, the first of which has the number `first`, in one native call.

    Returns:
        of each member the loss before the last step, and its gradient's norm.
    """
    tasks, batches = [], []
    for member in members:
        drawn, rates = member.ahead(count)
        places = [rows for rows, _ in drawn if rows is not None]
        sizes = [len(member.stream.data.inputs) if rows is None else len(rows) for rows, _ in drawn]
        seeds = [seed for _, seed in drawn]
        tasks.append((member.native, rates, sizes, torch.cat(places) if places else None, seeds))
        batches.append(drawn)
    found = Steps.take(tasks, norms=norms)
    for member, drawn, done in zip(members, batches, found, strict=True):
        for number, value in enumerate(done.losses, first):
            check_finite(f"the loss at step {number}", value)
        if len(done.losses) < count:
            rows, seed = drawn[len(done.losses)]
            data = member.stream.data
            loss(member.policy, data if rows is None else data.rows(rows), seed)  # says what is wrong
            raise RuntimeError(f"the native kernel refused the batch of step {first + len(done.losses)}")
    return [(done.losses[-1], done.norms[-1] if done.norms else 0.0) for done in found]


def _read(unread: list[Tensor], step: int) -> float:
    """Empties the list of the losses up to that of a step; returns the last, and refuses one that is not finite."""
    values = torch.stack(unread).tolist()
    unread.clear()
    for number, value in enumerate(values, step + 1 - len(values)):
        check_finite(f"the loss at step {number}", value)
    return values[-1]


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    check_finite("the norm of the policy's parameters", norm_of([p.detach() for p in parameters]))


def check_finite(what: str, value: float, more: str = "") -> None:
    if not math.isfinite(value):
        raise NonFiniteError(f"{what} is not finite ({value}); a smaller learning rate or other data may help{more}")
