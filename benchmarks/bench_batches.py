"""Many problems in one call, by torch.func.vmap or batch_dims, against a loop of calls and vmap of eager torch."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import po_kernels as pk
from benchmarks import peers
from benchmarks.harness import check, compare, gaussian_inputs, versions

PROBLEMS, DIM, GROUP, ENTROPY = 64, 17, 5, 0.5


def problems(rows: int) -> list[Tensor]:
    """Mean, log_std and target of every problem, and its precision."""
    torch.manual_seed(0)
    each = [gaussian_inputs(rows, DIM) for _ in range(PROBLEMS)]
    mean, log_std, target, precision = (torch.stack(x).detach() for x in zip(*each, strict=True))
    return [mean, log_std, target, precision]


@pytest.mark.parametrize("rows", [256])
def bench_problems(benchmark: Any, rows: int) -> None:
    """Gradients of all inputs of 64 dice losses, each with a precision of its own."""
    inputs = problems(rows)

    def fused(*inputs: Tensor, seed: Tensor, **options: Any) -> Tensor:
        return pk.gaussian_policy_loss(
            *inputs, entropy_coef=ENTROPY, estimator="dice", num_samples=GROUP, seed=seed, **options
        )

    def eager(*inputs: Tensor) -> Tensor:
        return peers.gaussian_dice(*inputs, entropy_coef=ENTROPY, group=GROUP)

    seeds, places = torch.arange(PROBLEMS), (0, 1, 2, 3)
    each = grad(fused, places)
    ours = partial(vmap(lambda seed, *x: each(*x, seed=seed)), seeds, *inputs)
    theirs = partial(vmap(grad(eager, places), randomness="different"), *inputs)

    def loop() -> list[Tensor]:
        found = []
        for seed, *x in zip(seeds, *inputs, strict=True):
            leaves = [leaf.requires_grad_() for leaf in x]
            found.append(torch.autograd.grad(fused(*leaves, seed=seed), leaves))
        return [torch.stack(x) for x in zip(*found, strict=True)]

    right = grad(partial(fused, backend="reference"), places)
    check(ours(), vmap(lambda seed, *x: right(*x, seed=seed))(seeds, *[x.double() for x in inputs]), "problems", 1e-2)
    benchmark.extra_info.update(versions(), shape=f"{PROBLEMS} problems of {rows} x {DIM}, G = {GROUP}")
    leaves, ones = [x.clone().requires_grad_() for x in inputs], torch.ones(PROBLEMS)

    def by_batch_dims() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fused(*leaves, seed=seeds, batch_dims=1), leaves, ones)

    check(by_batch_dims(), ours(), "problems by batch_dims", 1e-5)
    for way, run in {"": ours, "batch_dims_": by_batch_dims}.items():
        for name, peer in {"loop": loop, "eager": theirs}.items():
            benchmark.extra_info[way + name] = compare(run, peer)._asdict()
    benchmark.pedantic(ours, rounds=3)
