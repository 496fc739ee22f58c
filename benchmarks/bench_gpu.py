"""The fused ops on a GPU against eager torch, torch.compile, copy bandwidth and a kernel that only draws numbers.

python -m benchmarks.bench_gpu --out gpu.json     all ratios from one process, timed with CUDA events
python -m benchmarks.bench_gpu --once             one small call of each case, for compute-sanitizer
python -m benchmarks.bench_gpu --compile          one call of each case in a process of its own: fills Triton's cache
                                                  (with --once, of the small calls)
python -m benchmarks.bench_gpu --device cpu       a dry run: tiny shapes, timed with the host's clock

Runs of both sides alternate, A B B A, and work on inputs in rotation that together exceed the L2 cache; a ratio is the
median of those of neighbouring runs. An answer is checked against the reference in float64 before it is timed.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import po_kernels as pk
from benchmarks import harness, peers
from benchmarks.bench_token import ENTROPY as TOKEN_ENTROPY
from benchmarks.bench_token import eager as tokens_eager
from benchmarks.bench_token import fused as tokens
from benchmarks.harness import categorical_inputs, check, gaussian_inputs, gradients, mvn_inputs, products
from po_kernels import dispatch

ENTROPY = 0.5
MEASURED = Path(dispatch.__file__).parent / "backends" / "cuda" / "measured.json"
CACHE = 128 * 2**20  # bytes, more than the L2 cache of any GPU this runs on


class Case(NamedTuple):
    """An op, what a user would write instead, and what its time is measured against.

    Attributes:
        op: what `fused` calls.
        fused: takes the inputs and a backend's name or None.
        inputs: makes one set of inputs, of which those with as many rows as the first have a row for each of its.
        derivatives: of a loss and inputs, what is computed.
        ceiling: the least that such an op has to do.
        others: what else to compare with, by name, where it is installed.
        size: rows, dimensions and samples of a Gaussian loss.
    """

    name: str
    op: str
    fused: Callable[..., Tensor]
    peer: Callable[..., Tensor]
    inputs: Callable[[], list[Tensor]]
    derivatives: Callable[[Callable[..., Tensor], list[Tensor]], Sequence[Tensor]]
    ceiling: Callable[[], Any] | None = None
    others: Mapping[str, Callable[..., Tensor]] = {}
    size: tuple[int, ...] = ()


def forward(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor]:
    with torch.no_grad():
        return (loss(*inputs),)


def cases(device: str, small: bool) -> list[Case]:
    def shape(*full: int) -> tuple[int, ...]:
        return (min(full[0], 64), *(min(size, 8) for size in full[1:])) if small else full

    # A seed in memory of the device, as in a captured training step.
    seed = torch.tensor(1, device=device)

    def gaussian(op: Any, peer: Any, make: Any, rows: int, dim: int, group: int) -> tuple[Any, Any, Any]:
        def fused(*x: Tensor, backend: str | None) -> Tensor:
            return op(*x, entropy_coef=ENTROPY, estimator="dice", num_samples=group, seed=seed, backend=backend)

        return fused, lambda *x: peer(*x, ENTROPY, group), on(device, lambda: make(rows, dim))

    def categorical(*x: Tensor, backend: str | None) -> Tensor:
        return pk.categorical_policy_loss(*x, entropy_coef=ENTROPY, backend=backend)

    result = []
    for size in (shape(65536, 17, 64), shape(4096, 17, 16), shape(256, 17, 5)):
        call = gaussian(pk.gaussian_policy_loss, peers.gaussian_dice, gaussian_inputs, *size)
        ceiling = partial(random_numbers_only, *size, seed) if device == "cuda" else None
        op = "gaussian_policy_loss"
        result.append(Case(f"gaussian_dice {size}", op, *call, gradients, ceiling, size=size))
        result.append(Case(f"gaussian_dice {size} second order", op, *call, products, size=size))
    size = shape(4096, 8, 16)
    call = gaussian(pk.mvn_policy_loss, peers.mvn_dice, mvn_inputs, *size)
    result.append(Case(f"mvn_dice {size}", "mvn_policy_loss", *call, gradients, size=size))
    rows, classes = shape(2**20, 32)
    # The loss reads logits and labels and writes a gradient: as many bytes as this copy.
    buffers = two_of((rows, classes + 1), torch.float32, device)
    result.append(
        Case(
            f"categorical_exact {(rows, classes)}", "categorical_policy_loss", categorical,
            lambda *x: peers.categorical_exact_to_compile(*x, ENTROPY),
            on(device, lambda: categorical_inputs(rows, classes)), gradients, lambda: buffers()[0].copy_(buffers()[1]),
        )
    )  # fmt: skip
    return result + token_cases(device, shape(8192, 151_936))


def token_cases(device: str, size: tuple[int, ...]) -> list[Case]:
    """Log-probability and entropy of tokens in bfloat16; a gradient reads and writes as much as a copy."""

    def inputs() -> list[Tensor]:
        rows, classes = size
        logits = torch.randn(rows, classes, dtype=torch.bfloat16, device=device).requires_grad_()
        return [logits, torch.randint(classes, (rows,), device=device)]

    buffers = two_of(size, torch.bfloat16, device)
    others = peers.token_kernels(TOKEN_ENTROPY) if device == "cuda" else {}
    differentiable = {name: peer for name, peer in others.items() if name != "liger"}
    name = f"token_log_prob {size} bfloat16"
    ways = (
        ("forward", forward, lambda: buffers()[0].view(torch.int16).amax(), others),
        ("gradient", gradients, lambda: buffers()[0].copy_(buffers()[1]), differentiable),
        ("second order", products, None, {}),
    )
    return [
        Case(f"{name} {way}", "token_log_prob", tokens, tokens_eager, inputs, derivatives, ceiling, peers_of)
        for way, derivatives, ceiling, peers_of in ways
    ]


def two_of(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """Tensors to copy from one to the other, from the first time that they are asked for."""
    return cache(
        lambda: (torch.zeros(shape, dtype=dtype, device=device), torch.ones(shape, dtype=dtype, device=device))
    )


def on(device: str, make: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """`make` on a device, which is the default there alone: a default device makes every call of torch slower."""

    def made() -> list[Tensor]:
        with torch.device(device):
            return make()

    return made


def random_numbers_only(rows: int, dim: int, group: int, seed: Tensor) -> Tensor:
    """The standard normals that a loss draws, with one sum a row stored."""
    import triton

    from benchmarks import noise

    arguments, tile = noise.arguments(rows, dim, group, seed)
    noise.row_sums[(triton.cdiv(rows, tile.rows),)](**arguments, num_warps=tile.warps, enable_fp_fusion=False)
    return arguments["out"]


def device_clock(run: Callable[[], Any]) -> float:
    """Seconds that a call takes, on the device's own clock."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak(run: Callable[[], Any]) -> int:
    """Bytes that a call takes besides what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def right(case: Case, backend: str | None) -> None:
    """Refuses a wrong answer for the first rows: the reference needs memory for all their samples."""
    inputs = case.inputs()
    rows = inputs[0].shape[0]
    first = [(x[:1024] if x.ndim and x.shape[0] == rows else x).detach() for x in inputs]
    asked = [x.requires_grad for x in inputs]

    def leaves(dtype: torch.dtype | None = None) -> list[Tensor]:
        return [
            x.clone().to(dtype or x.dtype).requires_grad_(needed) if x.is_floating_point() else x
            for x, needed in zip(first, asked, strict=True)
        ]

    expected = case.derivatives(partial(case.fused, backend="reference"), leaves(torch.float64))
    half = any(x.dtype == torch.bfloat16 for x in inputs)
    check(case.derivatives(partial(case.fused, backend=backend), leaves()), expected, case.name, 1e-2 if half else 1e-3)


def measure(case: Case, device: str, backend: str | None, budget: float) -> dict[str, Any]:
    right(case, backend)
    cuda = device == "cuda"
    fused = partial(case.fused, backend=backend)
    one = case.inputs()
    size = sum(x.numel() * x.element_size() for x in one)
    sets = itertools.cycle([one, *(case.inputs() for _ in range(min(8, CACHE // size) if cuda else 1))])

    def run(loss: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: case.derivatives(loss, next(sets))

    def compare(ours: Callable[[], Any], peer: Callable[[], Any]) -> dict[str, Any]:
        """A peer that fails, for want of memory for one, leaves the others their figures."""
        try:
            clock = device_clock if cuda else harness.host_clock
            return harness.compare(ours, peer, budget=budget, clock=clock)._asdict()
        except RuntimeError as error:
            return {"error": str(error)[:300]}
        finally:
            if cuda:
                torch.cuda.empty_cache()

    result: dict[str, Any] = {"case": case.name, "backend": backend or dispatch_of(case, device)}
    result["eager"] = compare(run(fused), run(case.peer))
    if case.ceiling is not None:
        result["ceiling"] = compare(run(fused), case.ceiling)
    for name, other in case.others.items():
        result[name] = compare(run(fused), run(other))
    if not cuda:
        return result
    # Of a compiled function torch has no second derivative, and of the second backend it is the same.
    if case.derivatives is not products and backend != "cuda":
        torch._dynamo.reset()
        result["compiled"] = compare(run(fused), run(torch.compile(case.peer)))
    result["peak_bytes"] = {}
    for name, loss in (("ours", fused), ("eager", case.peer)):
        with contextlib.suppress(torch.OutOfMemoryError):
            result["peak_bytes"][name] = peak(partial(case.derivatives, loss, one))
    try:
        replay = graphed(partial(case.derivatives, fused, one))
        result["graph"] = compare(replay, run(case.peer))
        if case.ceiling is not None:
            result["graph_ceiling"] = compare(replay, graphed(case.ceiling))
    except RuntimeError as error:
        result["graph"] = {"error": str(error)[:300]}
    return result


def dispatch_of(case: Case, device: str) -> str:
    return dispatch.select(case.op, device, torch.float32, None)


def one_call(case: Case, backend: str | None) -> str:
    case.derivatives(partial(case.fused, backend=backend), case.inputs())
    return f"{case.name} {backend or ''} ran"


def compile_case(name: str, small: bool) -> str:
    """One call of a case, in a process of its own."""
    return one_call(next(case for case in cases("cuda", small) if case.name == name), "triton")


def backends(case: Case, device: str, asked: str | None) -> list[str | None]:
    """What to measure: what dispatch picks, or all kernels where there are several."""
    if asked is not None:
        return [asked]
    return [None] if dispatch.refusal(case.op, "cuda", device, torch.float32) else ["triton", "cuda"]


def faster_in_cuda(found: Sequence[Case], results: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By op the least shape from which on CUDA C++ takes 5% less time on the device than Triton in all that was
    measured, in both orders."""
    seconds = {(each["case"], each["backend"]): each["graph"].get("seconds") for each in results if "graph" in each}
    wins: dict[str, dict[tuple[int, ...], list[bool]]] = {}
    for case in found:
        triton, cuda = (seconds.get((case.name, name)) for name in ("triton", "cuda"))
        if case.size and triton and cuda:
            wins.setdefault(case.op, {}).setdefault(case.size, []).append(1.05 * cuda <= triton)
    table = {}
    for op, shapes in wins.items():
        for rows, dim, group in sorted(shapes):
            if all(won == [True, True] for size, won in shapes.items() if size[0] >= rows and size[2] >= group):
                table[op] = {"rows": rows, "num_samples": group, "dim": dim}
                break
    return table


def about(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "po_kernels": pk.__version__, "machine": platform.machine(),
    }  # fmt: skip
    if device == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name, "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }  # fmt: skip
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def file_of(out: Path | None, device: str) -> Path | None:
    """Where results go: a file, or in a folder one with the device's name."""
    return out / f"{re.sub(r'[^a-z0-9]+', '-', device.lower())}.json" if out and out.is_dir() else out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", help="of the fused ops; without it, what dispatch picks, and cuda")
    parser.add_argument("--once", action="store_true", help="one small call of each case, nothing timed")
    parser.add_argument("--compile", action="store_true", help="one call of each case in a process of its own")
    parser.add_argument("--only", default="", help="a regular expression: cases by name; the file keeps the others'")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each ratio")
    parser.add_argument("--out", type=Path, help="a file, or a folder for one with the device's name")
    parser.add_argument("--renew", action="store_true", help="makes the package choose by what is measured here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = arguments.device
    every = cases(device, arguments.once or device == "cpu")
    found = [case for case in every if re.search(arguments.only, case.name)]
    if arguments.compile:
        with multiprocessing.get_context("spawn").Pool(
            min(len(found), os.cpu_count() or 1), maxtasksperchild=1
        ) as pool:
            names = [case.name for case in found]
            for line in pool.imap_unordered(partial(compile_case, small=arguments.once), names):
                print(line, flush=True)
        return
    pairs = [(case, backend) for case in found for backend in backends(case, device, arguments.backend)]
    if arguments.renew and not {"triton", "cuda"} <= {backend for _, backend in pairs}:
        parser.error("--renew compares triton and cuda, which both have to be here, on a GPU")
    if arguments.once:
        for case, backend in pairs:
            print(one_call(case, backend))
        return
    budget = 0.0 if device == "cpu" else arguments.seconds
    document = {**about(device), "complete": False, "wrong": [], "results": []}
    path = file_of(arguments.out, document["device"])
    if arguments.only and path and path.exists():
        earlier = json.loads(path.read_text())["results"]
        document["results"] = [each for each in earlier if not re.search(arguments.only, each["case"])]
    results, wrong = document["results"], document["wrong"]
    for measured, (case, backend) in enumerate(pairs, 1):
        try:
            results.append(measure(case, device, backend, budget))
            print(json.dumps(results[-1]), flush=True)
        except (AssertionError, RuntimeError) as error:
            wrong.append(f"{case.name} {backend or ''}: {error}")
            print(wrong[-1], flush=True)
        kept = {each["case"] for each in results} | {case.name for case in found}
        document["complete"] = measured == len(pairs) and kept >= {case.name for case in every}
        if path:  # each time, for a limit of time may end this
            path.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.renew:
        table = {"device": document["device"], "faster": faster_in_cuda(found, results)}
        MEASURED.write_text(json.dumps(table, indent=1) + "\n")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
