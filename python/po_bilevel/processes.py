"""Processes that train one policy together, by `torch.nn.parallel.DistributedDataParallel`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")
Maybe = Tensor | None
Form = tuple[torch.Size, torch.dtype, torch.device]


class Processes(NamedTuple):
    """One process, or those of a policy's group.

    What one of them asks for below, all have to ask for at once.

    Attributes:
        rank: of this one.
        number: of all.
        group: theirs, None for one process.
        device: of the policy, where they talk.
    """

    rank: int = 0
    number: int = 1
    group: Any = None
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, policy: nn.Module) -> "Processes":
        """Those that have a part of `policy`'s batch."""
        if not isinstance(policy, nn.parallel.DistributedDataParallel):
            return cls()
        group = policy.process_group
        rank, number = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        return cls(rank, number, group, device_of(policy))

    def average(self, x: Tensor) -> Tensor:
        """Of a tensor over the processes."""
        if self.number == 1:
            return x
        total = x.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        return (total / self.number).to(x.device)

    def averages(self, tensors: Sequence[Maybe], like: Sequence[Form]) -> list[Maybe]:
        """Of tensors of these forms over the processes, by one exchange; None where all of them have None."""
        if self.number == 1 or not tensors:
            return list(tensors)
        there = torch.tensor([float(x is not None) for x in tensors], device=self.device)
        parts = [
            torch.zeros(shape.numel(), dtype=dtype, device=device) if x is None else x.to_dense().reshape(-1)
            for x, (shape, dtype, device) in zip(tensors, like, strict=True)
        ]
        *found, some = self.average(torch.cat([*(x.to(self.device) for x in parts), there])).split(
            [*(x.numel() for x in parts), len(tensors)]
        )
        return [
            x.view(shape).to(device, dtype) if any_of_them else None
            for x, any_of_them, (shape, dtype, device) in zip(found, some.tolist(), like, strict=True)
        ]

    def shared(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors, whose derivatives of any order are averages over processes: one exchange for all of them."""
        if self.number == 1:
            return tensors
        averages = functools.partial(self.averages, like=forms(tensors))
        return cast(tuple[Tensor, ...], _Shared.apply(averages, *tensors))

    def mean_loss(self, loss: Tensor) -> Tensor:
        """Of a loss over the processes; its derivatives are this process's, as `shared` expects them."""
        if self.number == 1:
            return loss
        averages = functools.partial(self.averages, like=forms([loss]))
        return cast(tuple[Tensor], _Averaged.apply(averages, loss))[0]

    def equal(self, module: nn.Module, *, parameters: bool = True) -> None:
        """Gives all processes the first one's parameters and buffers of a module."""
        if self.number > 1:
            for tensor in (*(module.parameters() if parameters else ()), *module.buffers()):
                there = tensor.detach().to(self.device)
                torch.distributed.broadcast(there, group=self.group, group_src=0)
                tensor.detach().copy_(there)

    def gather(self, value: T) -> list[T]:
        """What each has, by rank."""
        if self.number == 1:
            return [value]
        found: list[Any] = [None] * self.number
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def any(self, here: bool) -> bool:
        """Whether it is so in one of them."""
        return here if self.number == 1 else True in self.gather(here)

    def check(self, name: str, count: int) -> None:
        """Refuses a number that cannot be shared out evenly."""
        if count % self.number:
            raise ValueError(f"{name}: expected a multiple of {self.number} processes, got {count}")

    def share(self, rows: Sequence[T]) -> tuple[list[T], int]:
        """The rows of this process, and the number of the first."""
        size = len(rows) // self.number
        return list(rows[self.rank * size : (self.rank + 1) * size]), self.rank * size


def unwrapped(policy: nn.Module, kind: type[T]) -> T:
    """The policy in `DistributedDataParallel`, or itself.

    Raises:
        TypeError: it is of another class.
    """
    found = policy.module if isinstance(policy, nn.parallel.DistributedDataParallel) else policy
    if not isinstance(found, kind):
        hint = "; compile a policy in place, by its compile()" if hasattr(found, "_orig_mod") else ""
        raise TypeError(f"policy: expected a {kind.__name__}, got {type(found).__name__}{hint}")
    return found


def device_of(module: nn.Module) -> torch.device:
    """Of its parameters."""
    return next(module.parameters()).device


def forms(tensors: Sequence[Tensor]) -> list[Form]:
    return [(x.shape, x.dtype, x.device) for x in tensors]


Averages = Callable[[Sequence[Maybe]], list[Maybe]]


class _Shared(torch.autograd.Function):
    """Identity, with averages as its derivative."""

    @staticmethod
    def forward(ctx: Any, averages: Averages, *tensors: Maybe) -> tuple[Maybe, ...]:
        ctx.averages = averages
        ctx.set_materialize_grads(False)
        return tuple(None if x is None else x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Maybe) -> Any:
        return None, *cast(Any, _Averaged.apply(ctx.averages, *gradients))


class _Averaged(torch.autograd.Function):
    """Averages, with identity as their derivative: what is done with an average, all processes do."""

    @staticmethod
    def forward(ctx: Any, averages: Averages, *tensors: Maybe) -> tuple[Maybe, ...]:
        ctx.averages = averages
        ctx.there = [x is not None for x in tensors]
        ctx.set_materialize_grads(False)
        return tuple(averages(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Maybe) -> Any:
        own = [g if there else None for g, there in zip(gradients, ctx.there, strict=True)]
        return None, *cast(Any, _Shared.apply(ctx.averages, *own))
