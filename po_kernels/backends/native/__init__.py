"""CPU kernels in C++, part of the compiled extension.

Where the environment asks for an instruction-set level that there is not, the extension does not load, and a warning
says so: automatic dispatch goes on without it.
"""

import warnings
from typing import Any

import torch

from ... import extension
from .. import checks, contract, linear_head
from ..compiled import Arguments, Kernel
from ..contract import OPS, Request
from . import network as network

# Samples times dimensions of a row: beyond it no machine has the memory, and sizes in bytes would overflow.
_MOST_SCRATCH = 2**48
_LEVEL_VARIABLE = "PO_KERNELS_SIMD"
_REFUSALS = {refusal.number: name for name, refusal in contract.REFUSALS.items()}

if extension.missing is not None and _LEVEL_VARIABLE in extension.missing:
    warnings.warn(f"po_kernels: {extension.missing}", RuntimeWarning, stacklevel=2)


def unavailable() -> str | None:
    return extension.missing


def unserved(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it serves CPU tensors, not {device_type}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {dtype}"
    return None


def must_be_asked(op: str, device_type: str) -> str | None:
    return None


class _Kernel(Kernel):
    batch = Kernel._batch

    def call(self, arguments: Arguments, request: Request, *batch: Any) -> None:
        op = self.op.name
        arguments["threads"] = torch.get_num_threads()
        if "seed" in arguments:
            seed = request.constants.seed
            arguments["seed"] = 0 if batch or seed is None else seed.item()
        samples = arguments.get("num_samples", 0)
        per_sample = max(arguments.get("dim", 1), arguments.get("classes", 1))
        try:
            if samples * per_sample > _MOST_SCRATCH:
                raise MemoryError
            code, row, problem = getattr(extension.module, op)(*batch, **arguments)
        except MemoryError:
            raise MemoryError(
                f"{op}: num_samples: expected a group whose samples fit in memory, a few rows at a time, "
                f"got {samples} samples of {per_sample} numbers"
            ) from None
        if code:
            request = self.op.problem(request, problem) if batch else request
            if _REFUSALS[code] == "label_out_of_range":
                checks.wrong_label(self.op, request.constants, self.op.classes(request.inputs), row)
            contract.refuse(op, _REFUSALS[code], row)


KERNELS: dict[str, contract.Kernel] = {name: _Kernel(op) for name, op in OPS.items() if hasattr(extension.module, name)}
if linear_head.ROW_OP in KERNELS:
    KERNELS[linear_head.OP] = linear_head.kernel(KERNELS[linear_head.ROW_OP])
