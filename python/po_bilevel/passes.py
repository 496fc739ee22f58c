"""Forward and backward passes of a batch: in mixed precision, in parts, and by several processes."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import LBFGS, Optimizer

from .errors import NonFiniteError
from .losses import Batch
from .processes import Processes, forms

# A scale of the loss so small that gradients in float16 must have been infinite whatever it was.
LEAST_SCALE = 2.0**-24


class Share(NamedTuple):
    """Rows of a batch, the seed of their samples, and the weight that makes the mean over shares the batch's loss.

    What of a loss is no mean over rows, such as a penalty, is in each of them.
    """

    batch: Batch
    seed: int
    weight: float


class Passes:
    """How the gradient of a step is come by.

    Args:
        processes: that share a batch.
        device: of the batch.
        autocast: type that the forward pass computes in where it may, or None for that of the parameters.
        accumulation: how many parts a process splits its share into, one after another, which saves memory.
        scaler: of the loss, so that small gradients are no zeros in float16; None for a new one.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self, processes: Processes, device: torch.device, autocast: torch.dtype | None = None, accumulation: int = 1,
        scaler: GradScaler | None = None,
    ) -> None:  # fmt: skip
        if autocast not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"autocast: expected torch.bfloat16, torch.float16 or None, got {autocast!r}")
        if not hasattr(accumulation, "__index__") or accumulation < 1:
            raise ValueError(f"accumulation: expected an integer of at least 1, got {accumulation}")
        if scaler is not None and autocast is not torch.float16:
            raise ValueError(f"scaler: expected None without autocast=torch.float16, got {type(scaler).__name__}")
        self.processes = processes
        self.autocast = autocast
        self.accumulation = accumulation
        self.scaler = scaler
        if autocast is torch.float16 and scaler is None:
            self.scaler = GradScaler(device.type)

    @property
    def plain(self) -> bool:
        """A pass is that of the whole batch, in the parameters' own type."""
        return self.processes.number == 1 and self.accumulation == 1 and self.autocast is None

    @property
    def options(self) -> dict[str, Any]:
        """Of `train`."""
        return {"autocast": self.autocast, "accumulation": self.accumulation, "scaler": self.scaler}

    def check(self, optimizer: Optimizer) -> None:
        """Refuses one that asks for several gradients a step, where a scaler looks at each."""
        if self.scaler is not None and isinstance(optimizer, LBFGS):
            raise ValueError("autocast: expected torch.bfloat16 or None with LBFGS, got torch.float16")

    def shares(self, batch: Batch, seed: int, *, own: bool = False) -> list[Share]:
        """This process's of a batch, each to be one pass; own where each process has a batch of its own."""
        rows, first = len(batch.inputs), self.processes.rank * self.accumulation
        number = self.accumulation if own else self.processes.number * self.accumulation
        if number == 1:
            return [Share(batch, seed + first, 1.0)]
        result = []
        for index in range(self.accumulation):
            place = index if own else first + index
            start, stop = place * rows // number, (place + 1) * rows // number
            # A share without rows has one, of no weight: all processes take as many passes.
            taken = torch.arange(start, max(stop, start + 1), device=batch.inputs.device)
            result.append(Share(batch.rows(taken), seed + first + index, (stop - start) * number / rows))
        return result

    def gradient(
        self, loss: Callable[[Batch, int], Tensor], batch: Batch, seed: int, parameters: list[Tensor], *,
        own: bool = False,
    ) -> Tensor:  # fmt: skip
        """Sets the parameters' gradients, scaled where there is a scaler; returns the loss.

        Raises:
            ValueError: a loss that is no scalar.
        """
        values = []
        for share in self.shares(batch, seed, own=own):
            kind = batch.inputs.device.type
            if self.autocast is not None or torch.is_autocast_enabled(kind):
                # Within another one around the loop it knows nothing of parameters that were changed in place since.
                torch.clear_autocast_cache()
            with contextlib.nullcontext() if self.autocast is None else torch.autocast(kind, self.autocast):
                value = loss(share.batch, share.seed)
            if value.ndim != 0:
                raise ValueError(f"loss: expected a loss of shape (), got {tuple(value.shape)}")
            if self.accumulation > 1 or share.weight != 1.0:
                value = value * (share.weight / self.accumulation)
            (value if self.scaler is None else self.scaler.scale(value.float())).backward(inputs=parameters)
            values.append(value.detach())
        total = values[0] if len(values) == 1 else torch.stack(values).sum()
        if self.processes.number == 1:
            return total
        *gradients, average = self.processes.averages(
            [*(p.grad for p in parameters), total], forms([*parameters, total])
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return cast(Tensor, average)

    def step(self, optimizer: Optimizer, closure: Callable[[], Tensor]) -> tuple[Any, bool]:
        """A step of the optimiser on the gradient that the closure sets; the loss, and whether the step was taken.

        With a scaler a step whose gradient is infinite is left out, and the next one has a smaller scale.

        Raises:
            NonFiniteError: the scale is so small that gradients must have been infinite at any.
        """
        if self.scaler is None:
            return optimizer.step(closure), True  # type: ignore[arg-type]
        loss, before = closure(), self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        scale = self.scaler.get_scale()
        if scale < LEAST_SCALE:
            raise NonFiniteError("gradients in float16 are not finite, however small the loss is scaled")
        return loss, scale >= before
