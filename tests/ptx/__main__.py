"""What a row takes by the code that runs, against a committed baseline; no GPU is needed.

    python -m tests.ptx [--part OP]     a table of what each op takes
    python -m tests.ptx --check         fails if a kernel takes over 5% more than benchmarks/baselines/gpu.json says
    python -m tests.ptx --check --quick of float32 and bfloat16, and of sm_90, alone
    python -m tests.ptx --renew         makes this code the baseline

Of first order with all gradients: instructions of a warp, bytes of global memory, and passes over the banks of shared
memory beyond the least, by running the PTX; and registers, spilled bytes a thread and shared memory, by ptxas. Triton's
kernels for sm_80 and sm_90, those in CUDA C++ for the one that `cuda_calls` compiles for.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import ahead_of_time
from tests.ops.cases import DIFFERENTIABLE, LOSSES, draw

from . import cuda_calls
from .calls import Calls, simulated
from .triton_calls import TritonCalls

BASELINE = Path(__file__).parents[2] / "benchmarks" / "baselines" / "gpu.json"
ALLOWED = 0.05
ROWS, DIM, GROUP = 64, 17, 16
COUNTED = ("instructions", "read", "written", "conflicts")


class Measured(TritonCalls):
    """Calls of Triton whose launches are remembered, to be compiled to the end."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self.launched: list[ahead_of_time.Launch] = []

    def run(
        self, kernel: Any, grid: tuple[int, ...], warps: int, registers: int | None = None, **arguments: Any
    ) -> None:
        self.launched.append(ahead_of_time.Launch(kernel, dict(arguments), warps, registers))
        super().run(kernel, grid, warps, registers, **arguments)

    def resources(self) -> dict[str, int]:
        """The most that a launch takes of each."""
        found = [ahead_of_time.compiled(each, self.capability)[1]._asdict() for each in self.launched]
        return {name: max(each[name] for each in found) for name in found[0]}


def row(op: str, dtype: torch.dtype, calls: Calls, name: str) -> dict[str, float]:
    """What a row of a call takes, by name."""
    how = {"precision_kind": "diagonal", "estimator": "dice", "reduction": "mean"} if op in LOSSES else {}
    case = draw(op, 1, dtype, lead=(ROWS,), dim=DIM, group=GROUP, mask=False, **how)
    with simulated(calls):
        torch.autograd.grad(case(*(inputs := case.inputs), backend=name).sum(), inputs)
    return {field: sum(getattr(each, field) for _, each in calls.counts) / ROWS for field in COUNTED}


def measured(part: str, quick: bool = False) -> Iterator[tuple[str, dict[str, float]]]:
    """Every kernel, by its name, dtype and architecture; the quick ones without float64 and sm_80."""
    for op in DIFFERENTIABLE:
        if part not in op:
            continue
        half = (torch.bfloat16,) if op.endswith("token_log_prob") else ()
        for dtype in (torch.float32, *half) if quick else (torch.float32, torch.float64, *half):
            kind = str(dtype).removeprefix("torch.")
            for capability in (90,) if quick else (80, 90):
                calls = Measured(capability)
                yield f"{op} triton {kind} sm_{capability}", row(op, dtype, calls, "triton") | calls.resources()
            served = op.startswith(cuda_calls.FAMILIES) and dtype != torch.bfloat16
            if served and cuda_calls.missing() is None:
                yield f"{op} cuda {kind}", row(op, dtype, cuda_calls.CudaCalls(), "cuda")


def worse(found: dict[str, dict[str, float]], baseline: dict[str, Any], part: str = "") -> list[str]:
    """What takes more than it did, in words, of the ops with that part in their names."""
    if baseline["triton"] != triton.__version__:
        return [f"the baseline is of Triton {baseline['triton']}, not of {triton.__version__}: --renew it"]
    known = {name: each for name, each in baseline["kernels"].items() if part in name.split()[0]}
    problems = [f"{name}: not in the baseline" for name in found if name not in known]
    problems += [f"{name}: only in the baseline" for name in known if name not in found]
    for name in found.keys() & known.keys():
        for what, value in found[name].items():
            before = known[name][what]
            if value > (1 + ALLOWED) * before:
                problems.append(f"{name}: {what} {value:,.6g}, was {before:,.6g}")
    return sorted(problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="", help="part of the ops' names")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--renew", action="store_true")
    arguments = parser.parse_args()
    found, names = {}, (*COUNTED, *ahead_of_time.Resources._fields)
    print("| | " + " | ".join(names) + " |\n|---" * 1 + "|---" * len(names) + "|")
    for name, each in measured(arguments.part, arguments.quick):
        found[name] = each
        print(
            f"| {name} | " + " | ".join(f"{each[what]:,.0f}" if what in each else "-" for what in names) + " |",
            flush=True,
        )
    if arguments.renew:
        BASELINE.write_text(
            json.dumps({"triton": triton.__version__, "kernels": found}, indent=1, sort_keys=True) + "\n"
        )
    problems = []
    if arguments.check:
        baseline = json.loads(BASELINE.read_text())
        if (reason := cuda_calls.missing()) is not None:
            print(f"not counted: kernels in CUDA C++, for {reason}")
            baseline["kernels"] = {name: each for name, each in baseline["kernels"].items() if " cuda " not in name}
        if arguments.quick:
            kernels = baseline["kernels"].items()
            baseline["kernels"] = {name: each for name, each in kernels if not re.search("float64|sm_80", name)}
        problems = worse(found, baseline, arguments.part)
    print(*problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
