"""Processes that train one policy together, by `torch.nn.parallel.DistributedDataParallel`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")
Optional = Tensor | None


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
        return cls(rank, number, group, next(policy.parameters()).device)

    def average(self, x: Tensor) -> Tensor:
        """Of a tensor over the processes."""
        if self.number == 1:
            return x
        total = x.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        return (total / self.number).to(x.device)

    def averages(self, tensors: Sequence[Optional]) -> list[Optional]:
        """Of tensors over the processes, all at once; None where all of them have None."""
        some = [x for x in tensors if x is not None]
        if self.number == 1 or not some:
            return list(tensors)
        parts = iter(self.average(torch.cat([x.reshape(-1) for x in some])).split([x.numel() for x in some]))
        return [None if x is None else next(parts).view_as(x).to(x.dtype) for x in tensors]

    def together(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors, whose derivatives of any order are averages over processes: one exchange for all of them."""
        return tensors if self.number == 1 else cast(tuple[Tensor, ...], _Together.apply(self.averages, *tensors))

    def mean(self, loss: Tensor) -> Tensor:
        """Of a loss over the processes; its derivatives are this process's, as `together` expects them."""
        return loss if self.number == 1 else cast(tuple[Tensor], _Averaged.apply(self.averages, loss))[0]

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
        raise TypeError(f"policy: expected a {kind.__name__}, got {type(found).__name__}")
    return found


Averages = Callable[[Sequence[Optional]], list[Optional]]


class _Together(torch.autograd.Function):
    """Identity, with averages as its derivative."""

    @staticmethod
    def forward(ctx: Any, averages: Averages, *tensors: Optional) -> tuple[Optional, ...]:
        ctx.averages = averages
        ctx.set_materialize_grads(False)
        return tuple(None if x is None else x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Optional) -> Any:
        return None, *cast(Any, _Averaged.apply(ctx.averages, *gradients))


class _Averaged(torch.autograd.Function):
    """Averages, with identity as their derivative: what is done with an average, all processes do."""

    @staticmethod
    def forward(ctx: Any, averages: Averages, *tensors: Optional) -> tuple[Optional, ...]:
        ctx.averages = averages
        ctx.set_materialize_grads(False)
        return tuple(averages(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Optional) -> Any:
        return None, *cast(Any, _Together.apply(ctx.averages, *gradients))
