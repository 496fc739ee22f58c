"""What a row takes by the PTX that runs, not by the text of it: python -m tests.ptx [part of an op's name].

Of first order with all gradients, in float32 for sm_90: instructions of a warp, bytes of global memory, and passes over
the banks of shared memory beyond the least.
"""

import sys

import torch

from tests.ops.cases import DIFFERENTIABLE, LOSSES, draw

from . import cuda_calls
from .calls import Calls, simulated
from .triton_calls import TritonCalls

ROWS, DIM, GROUP = 64, 17, 16


def row(op: str, name: str, calls: Calls) -> str:
    how = {"precision_kind": "diagonal", "estimator": "dice", "reduction": "mean"} if op in LOSSES else {}
    case = draw(op, 1, torch.float32, lead=(ROWS,), dim=DIM, group=GROUP, mask=False, **how)
    with simulated(calls):
        torch.autograd.grad(case(*(inputs := case.inputs), backend=name).sum(), inputs)
    fields = ("instructions", "read", "written", "conflicts")
    counts = [[getattr(each, field) for _, each in calls.counts] for field in fields]
    return f"| {op} | {name} | " + " | ".join(f"{sum(each) / ROWS:,.0f}" for each in counts) + " |"


def main(part: str = "") -> None:
    print("| | | instructions | bytes read | written | conflicts |\n|---|---|---|---|---|---|")
    for op in DIFFERENTIABLE:
        if part in op:
            print(row(op, "triton", TritonCalls(90)))
            if op.startswith(cuda_calls.FAMILIES) and cuda_calls.missing() is None:
                print(row(op, "cuda", cuda_calls.CudaCalls()))


if __name__ == "__main__":
    main(*sys.argv[1:])
