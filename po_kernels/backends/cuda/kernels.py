"""The ops of the compiled extension on a GPU, or on the host by emulation."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import extension
from .. import checks
from ..compiled import Arguments, Kernel, gaussian
from ..contract import Request

# Blocks, each of which sums over its rows: as many for a multiprocessor as 1, 2, 3, 4 or 6 of them at a time divide, so
# that none idles at the end. On the host, in all. And numbers that these sums may take together.
_BLOCKS_PER_MULTIPROCESSOR = 12
_MOST_BLOCKS = 4096
_MOST_SUMS = 2**20
_HEAD = 6  # the loss and its statistics, as in csrc/cuda/loss_sums.hpp

_CHECKS: dict[str, Callable[..., None]] = {
    "gaussian_policy_loss": checks.gaussian_policy_loss,
    "mvn_policy_loss": checks.mvn_policy_loss,
    "mvn_surrogate_loss": checks.mvn,
    "mvn_log_prob": checks.mvn,
    "mvn_sample": checks.mvn,
}


def emulated() -> bool:
    return os.environ.get("PO_KERNELS_CUDA_EMULATE", "0").lower() in ("1", "true", "on", "yes", "backward")


class _Kernel(Kernel):
    def run(self, request: Request) -> list[Tensor]:
        if request.inputs[0].device.type == "cpu":  # where values are at hand
            _CHECKS.get(self.op, checks.nothing)(self.op, *request.inputs, *request.constants)
        return super().run(request)

    def call(self, arguments: Arguments, head: Tensor) -> None:
        device = head.device
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
            partials = torch.empty(blocks * (_HEAD + terms), dtype=torch.float64, device=device)
            arguments["partials"] = partials.data_ptr()
        arguments["emulate"] = device.type == "cpu"
        arguments["backward"] = os.environ.get("PO_KERNELS_CUDA_EMULATE", "").lower() == "backward"
        arguments["device"] = device.index or 0
        if device.type == "cuda":
            arguments["stream"] = torch.cuda.current_stream(device).cuda_stream
        refused, failed = getattr(extension.module, f"cuda_{self.op}")(**arguments)
        if refused:
            raise ValueError(f"{self.op}: mean: backend 'cuda' {refused}; use another backend")
        if failed:
            raise RuntimeError(f"{self.op}: backend 'cuda' could not launch its kernel: {failed}")


KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    op: {"first": kernel.first, "second": kernel.second}
    for op, kernel in (gaussian(_Kernel, "gaussian") | gaussian(_Kernel, "mvn")).items()
}
