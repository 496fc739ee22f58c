"""The ops of the compiled extension on a GPU, or on the host by emulation."""

import os
from typing import Any

import torch
from torch import Tensor

from ... import extension
from .. import checks, contract
from ..compiled import Arguments, Kernel
from ..contract import OPS, Request

# Blocks, each of which sums over its rows: as many for a multiprocessor as 1, 2, 3, 4 or 6 of them at a time divide, so
# that none idles at the end. On the host, in all. And numbers that these sums may take together.
_BLOCKS_PER_MULTIPROCESSOR = 12
_MOST_BLOCKS = 4096
_MOST_SUMS = 2**20
_RUN = 32  # samples, as kRun in csrc/include/po_kernels/sums.hpp
_HEAD = 6  # the loss and its statistics, as in csrc/cuda/loss_sums.hpp


def emulated() -> bool:
    return os.environ.get("PO_KERNELS_CUDA_EMULATE", "0").lower() in ("1", "true", "on", "yes", "backward")


class _Kernel(Kernel):
    def call(self, arguments: Arguments, request: Request, *batch: Any) -> None:
        op, device = self.op.name, request.inputs[0].device
        if device.type == "cpu":  # where values are at hand
            checks.values(self.op, request.inputs, request.constants)
        if "seed" in arguments:
            seed = arguments["seed"]
            if isinstance(seed, Tensor) and seed.device == device:
                # Read by the kernel: nothing waits for it, and a captured graph draws anew when it has changed.
                arguments["device_seed"], arguments["seed"] = seed.data_ptr(), 0
            else:
                arguments["seed"] = int(seed)
        rows, terms = arguments["rows"], 0
        if "grad_precision" in arguments:
            dim = arguments["dim"]
            terms = (1, dim, dim * (dim + 1) // 2)[arguments["precision_ndim"]]
        most = _MOST_BLOCKS
        if device.type == "cuda":
            most = _BLOCKS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
        arguments["blocks"] = blocks = min(rows, most, max(64, _MOST_SUMS // (_HEAD + terms)))
        if "reduction" in arguments:
            numbers = blocks * (_HEAD + terms)
        else:
            many = (arguments.get("count") or arguments.get("num_samples") or 0) > _RUN
            summed = many and any(request.needs[:2])  # over samples: the gradients in the mean and the scale
            numbers = sum(x.numel() for x in request.inputs[:2]) if summed else 0
        if numbers:
            partials = torch.empty(numbers, dtype=torch.float64, device=device)
            arguments["partials"] = partials.data_ptr()
        arguments["emulate"] = device.type == "cpu"
        arguments["backward"] = os.environ.get("PO_KERNELS_CUDA_EMULATE", "").lower() == "backward"
        arguments["device"] = device.index or 0
        if device.type == "cuda":
            arguments["stream"] = torch.cuda.current_stream(device).cuda_stream
        refused, failed = getattr(extension.module, f"cuda_{op}")(**arguments)
        if refused:
            raise ValueError(f"{op}: mean: backend 'cuda' {refused}; use another backend")
        if failed:
            raise RuntimeError(f"{op}: backend 'cuda' could not launch its kernel: {failed}")


KERNELS: dict[str, contract.Kernel] = {
    name: _Kernel(op) for name, op in OPS.items() if hasattr(extension.module, f"cuda_{name}")
}
