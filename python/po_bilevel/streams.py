"""Where batches come from: rows in an order of their own, or a loader of PyTorch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from .losses import Batch


class RowStream:
    """An endless stream of (rows, seed), the same for the same arguments.

    Args:
        count: of all rows.
        batch_size: rows a batch, in a new random order each epoch, the last batch of an epoch smaller if need be;
            None for all rows each time.
        seed: of the order and of the seeds handed out.
        device: of the rows' numbers.
        drop_last: leave out a smaller last batch, where it is not the only one.
    """

    def __init__(
        self, count: int, batch_size: int | None, seed: int, device: torch.device | None = None, *,
        drop_last: bool = False,
    ) -> None:  # fmt: skip
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1 or None, got {batch_size}")
        self._count, self._device, self._drop_last = count, device, drop_last
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[Tensor] = []

    def draw(self) -> tuple[Tensor | None, int]:
        """The rows of the next batch, None for all, and its seed."""
        seed = int(torch.randint(2**62, (), generator=self._generator, device="cpu"))
        if self._batch_size is None:
            return None, seed
        if not self._order:
            rows = torch.randperm(self._count, generator=self._generator, device="cpu")
            self._order = list(rows.to(self._device).split(self._batch_size))
            if self._drop_last and self._count > self._batch_size and self._count % self._batch_size:
                del self._order[-1]
        return self._order.pop(0), seed

    def draw_several(self, count: int) -> list[tuple[Tensor | None, int]]:
        """`draw` so many times; the seeds at once where nothing else is drawn between them."""
        if self._batch_size is not None:
            return [self.draw() for _ in range(count)]
        seeds = torch.randint(2**62, (count,), generator=self._generator, device="cpu")
        return [(None, seed) for seed in seeds.tolist()]

    def state(self) -> dict[str, Any]:
        """Where the stream is, for `restore`."""
        return {"generator": self._generator.get_state(), "order": list(self._order)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from where a stream of the same arguments was."""
        self._generator.set_state(state["generator"])
        self._order = list(state["order"])


class BatchStream(RowStream):
    """An endless stream of (batch, seed), the same for the same arguments.

    Args:
        data: all rows.
        batch_size, seed: as in `RowStream`.
    """

    # Several processes share a batch out among them.
    own = False

    def __init__(self, data: Batch, batch_size: int | None, seed: int) -> None:
        data.check("data")
        super().__init__(data.inputs.shape[0], batch_size, seed, data.inputs.device)
        self.data = data

    @property
    def source(self) -> Any:
        """What batches are made of, for `fingerprints`."""
        return self.data

    def next(self) -> tuple[Batch, int]:
        """The next batch, and its seed."""
        rows, seed = self.draw()
        return (self.data if rows is None else self.data.rows(rows)), seed


class LoaderStream:
    """An endless stream of (batch, seed) from a loader of PyTorch, epoch after epoch, the same for the same arguments.

    The order of an epoch, and what a data set draws from torch's generators, depend on the seed alone, and so can be
    gone on with: the batches of an epoch that were there are read again. Generators that the loader, its samplers or
    its data set have are seeded anew for each batch; those of NumPy and Python are not. Of several processes each has
    a loader of its own rows.

    Attributes:
        data: the first batch.
        own: batches are this process's own.

    Args:
        loader: gives (inputs, target), of one batch each.
        seed: of the order and of the seeds handed out.
        device: that batches are moved to; None for where they are.
        name: of the argument, in errors.

    Raises:
        TypeError: batches that are no pairs of tensors.
        ValueError: a loader without batches, or with persistent workers, whose order is not known from a seed; rows as
            `Batch.check` refuses them.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> rows = TensorDataset(torch.randn(50, 3), torch.randint(4, (50,)))
        >>> stream = LoaderStream(DataLoader(rows, batch_size=20, shuffle=True), seed=0)
        >>> [len(stream.next()[0].inputs) for _ in range(4)]
        [20, 20, 10, 20]
    """

    own = True

    def __init__(
        self, loader: DataLoader[Any], seed: int, device: torch.device | None = None, name: str = "data"
    ) -> None:  # fmt: skip
        if getattr(loader, "persistent_workers", False):
            raise ValueError(f"{name}: expected a loader with persistent_workers=False, got one with True")
        self._loader, self._device, self._name = loader, device, name
        samplers = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
        self._samplers: list[Any] = [each for each in samplers if each is not None]
        self._generator = torch.Generator().manual_seed(seed)
        self._begin()
        first = self._following()
        if first is None:
            raise ValueError(f"{name}: expected a loader that gives at least one batch, got one that gives none")
        self.data: Batch = first
        self._ahead: Batch | None = first

    @property
    def source(self) -> Any:
        """What tells the batches from others, for `fingerprints`; of a data set of one's own its kind and its size."""
        loader, rows = self._loader, self._loader.dataset
        kept = int, float, str, Tensor
        samplers = [
            (type(each), {k: v for k, v in vars(each).items() if isinstance(v, kept) and k != "epoch"})
            if hasattr(each, "__dict__")
            else each
            for each in self._samplers
        ]
        size = len(rows) if hasattr(rows, "__len__") else None
        tensors = rows.tensors if isinstance(rows, TensorDataset) else [x.shape[1:] for x in self.data]
        return type(rows), size, tensors, loader.batch_size, loader.drop_last, loader.collate_fn, samplers

    def next(self) -> tuple[Batch, int]:
        """The next batch, and its seed."""
        seed = self._number()
        batch, self._ahead = self._ahead, None
        if batch is None:
            batch = self._following()
        if batch is None:
            self._begin()
            batch = self._following()
        if batch is None:
            raise ValueError(f"{self._name}: expected a loader that begins anew, got one that gives a single epoch")
        self._taken += 1
        return batch, seed

    def state(self) -> dict[str, Any]:
        """Where the stream is, for `restore`."""
        return {"generator": self._generator.get_state(), "epoch": self._epoch, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from where a stream of the same arguments was."""
        self._generator.set_state(state["generator"])
        self._open(state["epoch"])
        self._ahead = None
        for _ in range(state["taken"]):
            self._following()
        self._taken = state["taken"]

    def _number(self) -> int:
        return int(torch.randint(2**62, (), generator=self._generator, device="cpu"))

    def _begin(self) -> None:
        """The next epoch."""
        self._open(self._number())

    def _open(self, epoch: int) -> None:
        self._epoch, self._taken, self._read = epoch, 0, 0
        self._batches: Iterator[Any] = iter(())
        for each in self._samplers:
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch % 2**31)  # of `DistributedSampler`

    def _following(self) -> Batch | None:
        """The next batch of the epoch, None at its end."""
        with torch.random.fork_rng(devices=[]):
            own = [getattr(each, "generator", None) for each in (self._loader, self._loader.dataset, *self._samplers)]
            for generator in (torch.default_generator, *own):
                if isinstance(generator, torch.Generator):
                    generator.manual_seed((self._epoch + self._read) % 2**62)
            if self._read == 0:
                self._batches = iter(self._loader)
            found = next(self._batches, self)
        self._read += 1
        if found is self:
            return None
        if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(x, Tensor) for x in found):
            kinds = [type(x).__name__ for x in found] if isinstance(found, tuple | list) else type(found).__name__
            raise TypeError(f"{self._name}: expected a loader that gives (inputs, target), two tensors, got {kinds}")
        batch = Batch(*found).check(self._name)
        return batch if self._device is None else Batch(*(x.to(self._device, non_blocking=True) for x in batch))


def stream_of(
    name: str, data: Batch | DataLoader[Any], batch_size: int | None, seed: int, device: torch.device | None = None
) -> BatchStream | LoaderStream:  # fmt: skip
    """Of rows, or of a loader, whose batches are moved to the device.

    Raises:
        TypeError: data that are neither.
        ValueError: rows that `Batch.check` refuses, or a batch_size for a loader, which has its own.
    """
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError(f"{name}: expected a loader with batches of its own and no batch size, got {batch_size}")
        return LoaderStream(data, seed, device, name)
    if not isinstance(data, Batch):
        raise TypeError(f"{name}: expected a Batch of inputs and targets, or a DataLoader, got {type(data).__name__}")
    return BatchStream(data.check(name), batch_size, seed)
