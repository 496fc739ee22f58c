"""Runs a function of a test file in two processes that talk by gloo."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn


def run(file, folder, alone):
    """What `alone()` gives here, and what `results(wrap, barrier, path)` of the file gives in each of two processes.

    They have two minutes, in which this one works too.
    """
    here, common = Path(file).parent, Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(here), str(common)]!r}; import two_processes, {Path(file).stem} as file; "
    commands = [code + f"two_processes.work(file, {rank}, {str(folder)!r})" for rank in (0, 1)]
    processes = [
        subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        found = alone()
        for process in processes:
            said = process.communicate(timeout=120)[1]
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found, *(torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in (0, 1))


def work(file, rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    wrap = nn.parallel.DistributedDataParallel
    torch.save(file.results(wrap, torch.distributed.barrier, Path(folder, "run.pt")), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
