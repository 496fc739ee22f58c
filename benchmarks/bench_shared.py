"""Beside two processes that are always busy: what it costs to have two threads where there may be none to run on."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from po_bilevel.experiments import gaussian
from po_bilevel.experiments.gaussian import GaussianConfig

import po_kernels as pk
from benchmarks import peers
from benchmarks.harness import compare, gaussian_inputs, gradients, versions

ENTROPY, GROUP = 0.5, 5


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def figure_3() -> Callable[[], Any]:
    """One outer step with its 50 inner ones."""
    return gaussian.trainer(GaussianConfig(progress=False, outer_steps=1_000_000), 0).step


def small_loss() -> Callable[[], Any]:
    loss = partial(pk.gaussian_policy_loss, entropy_coef=ENTROPY, estimator="dice", num_samples=GROUP)
    return partial(gradients, loss, gaussian_inputs(256, 17))


def small_eager_loss() -> Callable[[], Any]:
    return partial(gradients, partial(peers.gaussian_dice, entropy_coef=ENTROPY, group=GROUP), gaussian_inputs(256, 17))


@pytest.mark.parametrize("task", [figure_3, small_loss, small_eager_loss])
def bench_beside_busy_processes(benchmark: Any, task: Callable[[], Callable[[], Any]]) -> None:
    """Two threads against one, `one_thread` being the time of one in that of two."""
    run, kept = task(), torch.get_num_threads()

    def on(threads: int) -> None:
        torch.set_num_threads(threads)
        run()

    try:
        with busy(2):
            benchmark.extra_info.update(versions(), one_thread=compare(partial(on, 2), partial(on, 1))._asdict())
            benchmark.pedantic(partial(on, 2), rounds=3)
    finally:
        torch.set_num_threads(kept)
