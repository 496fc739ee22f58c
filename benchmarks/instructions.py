"""Static instruction counts of the Triton kernels, without a GPU: what a change did to registers, spills and loops.

python -m benchmarks.instructions                          typical cases, compiled ahead of time for sm_90
python -m benchmarks.instructions gaussian --capability 80

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
