"""Static instruction counts of the Triton kernels, without a GPU: what a change did to registers, spills and loops.

python -m benchmarks.instructions                          typical cases, compiled ahead of time for sm_90
python -m benchmarks.instructions gaussian --capability 80
python -m benchmarks.instructions tokens                   the table of docs/gpu.md, by row of a vocabulary

Counts are those of the code, of all its loops once; a warp executes them for each block of `rows` rows. The last case
only draws the normals of the first.
"""

import argparse
import collections
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks import ahead_of_time, noise
from po_kernels.backends.contract import OPS, OpConfig

# op, order, estimator, dimensions or classes, samples
CASES = (
    ("gaussian_policy_loss", "first", "dice", 17, 64),
    ("gaussian_policy_loss", "first", "dice", 17, 16),
    ("gaussian_policy_loss", "second", "dice", 17, 16),
    ("mvn_policy_loss", "first", "dice", 8, 16),
    ("categorical_policy_loss", "first", "exact", 32, 1),
    ("categorical_policy_loss", "first", "dice", 32, 16),
)
CLASSES = {
    "shuffle": ("SHFL",), "barrier": ("BAR", "WARPSYNC"), "shared": ("LDS", "STS", "LDSM", "STSM"),
    "global": ("LDG", "STG"), "spill": ("LDL", "STL"), "tensor": ("HMMA", "DMMA"),
    "float": ("FADD", "FMUL", "FFMA", "DADD", "DMUL", "DFMA", "MUFU"),
}  # fmt: skip


def disassembler() -> str:
    """nvdisasm, of Triton or of CUDA."""
    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    found = str(beside) if beside.exists() else shutil.which("nvdisasm")
    if found is None:
        raise SystemExit(f"benchmarks.instructions: no nvdisasm, neither at {beside} nor on the PATH")
    return found


def instructions(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes in order, and the loops among them, by their first and last."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([disassembler(), "-c", file.name], capture_output=True, text=True, check=True).stdout
    found: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*);", line):
            target = re.search(r"`\((\.L_x_\d+)\)", code[2])
            # The last instruction jumps to itself.
            if code[1] == "BRA" and target and labels.get(target[1], len(found)) < len(found):
                loops.append((labels[target[1]], len(found)))
            found.append(code[1])
    return found, loops


def traffic(ptx: str) -> list[tuple[int, int]]:
    """Bytes that a thread reads from global memory and writes there, in a pass of each loop."""
    lines, labels, loops = ptx.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = i
        elif (jump := re.search(r"\bbra\S*\s+(\$L__BB\w+)", line)) and jump[1] in labels:
            body = "\n".join(lines[labels[jump[1]] : i])
            read, written = (
                sum(int(times or 1) * int(bits) // 8 for times, bits in re.findall(access, body))
                for access in (rf"\b{kind}\.global(?:\.v(\d))?\.[a-z](\d+)" for kind in ("ld", "st"))
            )
            loops.append((read, written))
    return loops


class Row(NamedTuple):
    """What a row of logits takes: streams are its bytes that are read and written, as multiples of the logits' own."""

    read: float
    written: float
    instructions: int


def token_row(dtype: torch.dtype, classes: int, order: str, capability: int) -> Row:
    """Of `token_log_prob`, whose loops are over blocks of columns: forward, backward or second order."""
    call = ahead_of_time.request("token_log_prob", 64, classes, 1, OpConfig(), dtype=dtype, second=order == "second")
    if order == "forward":
        constants = call.constants._replace(known=None)
        call = call._replace(constants=constants, cotangent=None, needs=type(call.needs)(False))
    (launched,) = ahead_of_time.launches_of("token_log_prob", call)
    kernel, _ = ahead_of_time.compiled(launched, capability)
    block, threads = launched.arguments["K"].BLOCK_D.value, 32 * launched.warps
    read, written = (
        sum(each) * threads / (block * dtype.itemsize) for each in zip(*traffic(kernel.asm["ptx"]), strict=True)
    )
    found, loops = instructions(kernel.asm["cubin"])
    looped = sum(last + 1 - first for first, last in loops)
    passes = triton.cdiv(classes, block)
    return Row(read, written, launched.warps * (len(found) - looped + looped * passes))


def tokens() -> None:
    print("| | dtype | floor | read | written | instructions of a warp, sm_80 | sm_90 |\n|---|---|---|---|---|---|---|")
    for order, floor in (("forward", 1), ("backward", 2), ("second", 3)):
        for dtype in (torch.float32, torch.bfloat16):
            old, new = (token_row(dtype, 151_936, order, capability) for capability in (80, 90))
            assert old[:2] == new[:2]
            kind = str(dtype).removeprefix("torch.")
            print(f"| {order} | {kind} | {floor} | {new.read:g} | {new.written:g} | {old[2]:,} | {new[2]:,} |")


def describe(name: str, launched: ahead_of_time.Launch, capability: int) -> None:
    kernel, resources = ahead_of_time.compiled(launched, capability)
    found, loops = instructions(kernel.asm["cubin"])
    given = launched.arguments
    rows = int(given["BLOCK_B"] if "BLOCK_B" in given else given["K"].BLOCK_B)
    print(f"\n{name}: {rows} rows by {launched.warps} warps, {resources._asdict()}, {len(found)} instructions")
    for first, last in loops:
        count = collections.Counter(found[first : last + 1])
        kinds = {kind: sum(count[code] for code in codes) for kind, codes in CLASSES.items()}
        rest = last + 1 - first - sum(kinds.values())
        print(f"  loop of {last + 1 - first}:", *(f"{kind} {n}," for kind, n in kinds.items() if n), f"other {rest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filter", nargs="?", default="", help="part of the names to show")
    parser.add_argument("--capability", type=int, default=90)
    arguments = parser.parse_args()
    if arguments.filter == "tokens":
        return tokens()
    for op, order, estimator, dim, group in CASES:
        name = f"{op} {order} {estimator} {(dim, group)}"
        if arguments.filter not in name:
            continue
        closed = estimator == OPS[op].closed_form
        config = OpConfig(estimator, 0 if closed else group, "loo", None, 0.5, "mean", 0)
        call = ahead_of_time.request(op, 64, dim, group, config, second=order == "second")
        if order == "first":  # the fast path, of the gradient in a loss alone
            call = call._replace(cotangent=None)
        describe(name, ahead_of_time.launches_of(op, call)[0], arguments.capability)
    if arguments.filter in "noise":
        options, tile = noise.arguments(64, 17, 64, torch.tensor(1))
        launched = ahead_of_time.Launch(noise.row_sums, options, tile.warps)
        describe("noise (17, 64)", launched, arguments.capability)


if __name__ == "__main__":
    main()
