"""Numba against the reference: value and gradients of every op on one thread, in one process.

`python -m benchmarks.bench_numba` writes the ratios to benchmarks/baselines/numba.json. Automatic dispatch prefers
numba for the ops that are faster at every size there; `po_kernels/backends/numba/__init__.py` names them.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import po_kernels as pk
from benchmarks.bench_losses import categorical_inputs, gaussian_inputs, mvn_inputs
from benchmarks.harness import Ratio, check, compare, versions
from po_kernels.backends import numba

TABLE = Path(__file__).parent / "baselines" / "numba.json"
ROWS = (1, 256, 4096)
_GROUP, _DIM, _CLASSES, _STEPS = 8, 8, 1000, 128


def _call(op: str, rows: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A usual call of the op, and its differentiable inputs."""
    family, _, what = op.partition("_")
    function: Any = getattr(pk, op)
    torch.manual_seed(1)
    rewards = torch.randn(_GROUP, rows, requires_grad=True)
    drawn = {"estimator": "dice", "num_samples": _GROUP, "seed": 1, "entropy_coef": 0.5}
    if op == "group_advantage":
        return partial(function, kind="standardized"), [rewards]
    if op == "gae":
        values, dones = torch.randn(_STEPS + 1, rows, requires_grad=True), torch.rand(_STEPS, rows) < 0.01
        call = partial(function, dones=dones, gamma=0.99, lam=0.95)
        return lambda *x, **options: call(*x, **options)[0], [torch.randn(_STEPS, rows, requires_grad=True), values]
    if family in ("token", "linear"):
        ids = torch.randint(_CLASSES, (rows,))
        inputs = [torch.randn(rows, _CLASSES), torch.randn(rows, _DIM), torch.randn(_CLASSES, _DIM)]
        inputs = [x.requires_grad_() for x in (inputs[:1] if family == "token" else inputs[1:])]
        return lambda *x, **options: function(*x, ids, entropy=True, **options).log_prob, inputs
    if family == "categorical":
        logits, target, table = categorical_inputs(rows, _DIM)
        labels = torch.randint(_DIM, (_GROUP, rows))
        return {
            "policy_loss": (lambda x, r, **options: function(x, target, r, **drawn, **options), [logits, table]),
            "surrogate_loss": (lambda x, r, **options: function(x, labels, r, **options), [logits, rewards]),
            "log_prob": (partial(function, value=labels), [logits]),
            "sample": (partial(function, num_samples=_GROUP, seed=1), [logits]),
        }.get(what, (function, [logits]))
    mean, scale, target, precision = (gaussian_inputs if family == "gaussian" else mvn_inputs)(rows, _DIM)
    samples = torch.randn(_GROUP, rows, _DIM)
    return {
        "policy_loss": (partial(function, **drawn), [mean, scale, target, precision]),
        "surrogate_loss": (lambda m, s, r, **options: function(m, s, samples, r, **options), [mean, scale, rewards]),
        "log_prob": (function, [mean, scale, samples.clone().requires_grad_()]),
        "sample": (partial(function, num_samples=_GROUP, seed=1), [mean, scale]),
    }[what]


def against_reference(op: str, rows: int) -> Ratio:
    """How many times as long the reference takes."""
    function, inputs = _call(op, rows)

    def run(backend: str) -> list[Tensor]:
        value = function(*inputs, backend=backend)
        if not value.requires_grad:
            return [value]
        wanted = [x for x in inputs if x.requires_grad]
        cotangent = torch.linspace(0.5, 2.0, value.numel()).view(value.shape)
        return [value.detach(), *torch.autograd.grad(value, wanted, cotangent)]

    check(run("numba"), run("reference"), f"{op} on numba")
    return compare(partial(run, "numba"), partial(run, "reference"))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("op", numba.KERNELS)
def bench_numba_against_reference(benchmark, op, rows):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.extra_info.update(versions(), shape=f"{rows} rows", reference=against_reference(op, rows)._asdict())
    finally:
        torch.set_num_threads(threads)
    benchmark.pedantic(lambda: None)


def main() -> None:
    torch.set_num_threads(1)
    table = {op: {str(rows): round(against_reference(op, rows).median, 2) for rows in ROWS} for op in numba.KERNELS}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
