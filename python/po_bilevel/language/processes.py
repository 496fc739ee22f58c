"""Processes that train one policy together, by `torch.nn.parallel.DistributedDataParallel`."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Processes(NamedTuple):
    """One process, or those of a policy's group.

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
        """Of a tensor over the processes, which all ask for it at once."""
        if self.number == 1:
            return x
        total = x.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        return (total / self.number).to(x.device)

    def check(self, name: str, count: int) -> None:
        """Refuses a number that cannot be shared out evenly."""
        if count % self.number:
            raise ValueError(f"{name}: expected a multiple of {self.number} processes, got {count}")

    def share(self, rows: Sequence[T]) -> tuple[list[T], int]:
        """The rows of this process, and the number of the first."""
        size = len(rows) // self.number
        return list(rows[self.rank * size : (self.rank + 1) * size]), self.rank * size
