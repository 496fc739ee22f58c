"""Instructions of the native kernels, which no noise of a machine moves, against a committed baseline.

python -m benchmarks.count            fails if a case takes over 3% more than its baseline, or stands on one side only
python -m benchmarks.count --renew    makes this build's counts the baseline

The calls of the extension that each case makes are recorded here, on one thread, and replayed under
`valgrind --tool=callgrind` by a process that loads nothing but the extension. Valgrind has no AVX-512, so that the
level is x86-64-v3 on every machine. A count is that of the kernel, its binding and some ten thousand instructions of
the interpreter; it depends on the compiler.
"""

import argparse
import ctypes
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from po_bilevel import Batch, MahalanobisReward, MLPCategorical, MLPGaussian, TableReward, train_policy_gradient
from torch import Tensor

import po_kernels as pk
from benchmarks import replay
from benchmarks.bench_losses import ENTROPY
from benchmarks.harness import categorical_inputs, gaussian_inputs, gradients, mvn_inputs, products
from benchmarks.report import missing
from po_kernels import extension
from po_kernels.backends.native import network

BASELINE = Path(__file__).parent / "baselines" / "instructions.json"
ALLOWED = 0.03

# Of the kernel of networks what holds addresses of tensors, and what is no tensor and is written.
NETWORK = "network_loss"
ADDRESSES, RESULTS = ("values", "gradients", "tangents", "first", "second"), ("losses", "norms")

Call = tuple[str, dict[str, Any]]
ROWS, GROUP = 1000, 16


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every op with all its gradients, and with products of second order where it has them."""
    torch.manual_seed(0)
    rewards = torch.randn(GROUP, ROWS).requires_grad_()
    for family, make, dim, estimators in (
        ("gaussian", gaussian_inputs, 17, ("analytic", "reparam", "dice")),
        ("mvn", mvn_inputs, 8, ("analytic", "reparam", "dice")),
        ("categorical", categorical_inputs, 10, ("exact", "dice")),
    ):
        op = {
            what: partial(getattr(pk, f"{family}_{what}"), backend="native")
            for what in ("policy_loss", "surrogate_loss", "log_prob", "sample")
        }
        inputs = make(ROWS, dim)
        for estimator in estimators:
            drawn = {} if estimator == estimators[0] else {"num_samples": GROUP, "seed": 1}
            loss = partial(op["policy_loss"], entropy_coef=ENTROPY, estimator=estimator, **drawn)
            yield from orders(f"{family}_policy_loss {estimator}", loss, inputs)
        policy = inputs[: 1 if family == "categorical" else 2]
        sample = partial(op["sample"], num_samples=GROUP, seed=1)
        samples = sample(*policy).detach()
        yield from orders(f"{family}_surrogate_loss", op["surrogate_loss"], [*policy, samples, rewards])
        if family == "categorical":
            yield f"{family}_sample", partial(sample, *policy)
        else:
            yield from orders(f"{family}_sample", sample, policy)
            samples = samples.clone().requires_grad_()
        yield from orders(f"{family}_log_prob", op["log_prob"], [*policy, samples])
    dice = partial(pk.gaussian_policy_loss, estimator="dice", num_samples=GROUP, seed=1, backend="native")
    mean, log_std, target, precision = gaussian_inputs(ROWS, 2)
    yield from orders("gaussian_policy_loss dice, 2 dimensions", dice, [mean, log_std, target, precision])
    diagonal = [mean, log_std, target, precision.detach().diagonal().clone().requires_grad_()]
    yield from orders(
        "gaussian_policy_loss dice, standardized, diagonal", partial(dice, advantage="standardized"), diagonal
    )
    for kind in ("loo", "standardized"):
        advantage = partial(pk.group_advantage, kind=kind, rbf_gamma=0.5, backend="native")
        yield from orders(f"group_advantage {kind}", advantage, [rewards])
    values, dones = torch.randn(GROUP + 1, ROWS).requires_grad_(), torch.rand(GROUP, ROWS) < 0.1
    yield from orders("gae", lambda *x: pk.gae(*x, dones, gamma=0.9, lam=0.9, backend="native")[0], [rewards, values])
    ids, logits = torch.randint(5000, (50,)), torch.randn(50, 5000)

    def tokens(x: Tensor, **options: Any) -> Tensor:
        found = pk.token_log_prob(x, ids, entropy=True, backend="native", **options)
        return torch.stack(found[:2])

    yield from orders("token_log_prob", tokens, [logits.requires_grad_()])
    yield from orders("token_log_prob capped", partial(tokens, softcap=30.0), [logits])
    yield from orders("token_log_prob bfloat16", tokens, [logits.detach().bfloat16().requires_grad_()])

    yield from networks()


def networks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """A policy's loss with its gradients and products, and ten steps of Adam."""
    for name, policy, reward, target in (
        ("gaussian", MLPGaussian(17, 17), MahalanobisReward(17, "full"), torch.randn(ROWS, 17)),
        ("categorical", MLPCategorical(17, 10), TableReward(torch.eye(10)), torch.randint(10, (ROWS,))),
    ):
        known, inputs = policy.fused_network(), torch.randn(ROWS, 17)
        value = reward.precision() if name == "gaussian" else reward.table()
        leaves = [*policy.parameters(), value.detach().requires_grad_()]

        def loss(*leaves: Tensor, known: Any = known, inputs: Tensor = inputs, target: Tensor = target) -> Tensor:
            return pk.network_policy_loss(known, inputs, target, leaves[-1], entropy_coef=ENTROPY)

        yield from orders(f"network_policy_loss {name}", loss, leaves)
    data, optimizer = Batch(inputs, target), torch.optim.Adam(policy.parameters())
    train = partial(train_policy_gradient, policy, reward, data, optimizer, 10)
    train()
    yield "network_policy_steps categorical", train


def orders(name: str, op: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The gradients of a value, or of the sum of its squares, and their products."""

    def scalar(*inputs: Tensor) -> Tensor:
        value = op(*inputs)
        return value if value.ndim == 0 else value.square().sum()

    yield name, partial(gradients, scalar, inputs)
    yield f"{name}, second order", partial(products, scalar, inputs)


def recorded(run: Callable[[], Any]) -> list[Call]:
    """The extension's functions that it calls and their arguments, with the memory behind an address for that."""
    calls: list[Call] = []
    sizes: dict[int, int] = {}
    data_ptr, plain_list = Tensor.data_ptr, network.listed

    def noted(tensor: Tensor) -> int:
        address = data_ptr(tensor)
        sizes[address] = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
        return address

    def memory(address: int) -> bytes:
        return ctypes.string_at(address, sizes[address])

    def listed(*arguments: Any) -> int:
        address = plain_list(*arguments)
        sizes[address] = 8 * len(arguments[-1][-1])
        return address

    def recording(name: str) -> Callable[..., Any]:
        function = getattr(extension.module, name)

        def call(**arguments: Any) -> Any:
            content = {key: memory(x) if isinstance(x, int) and sizes.get(x) else x for key, x in arguments.items()}
            if name == NETWORK:
                for key in filter(content.get, ADDRESSES):
                    content[key] = [memory(at) if at else 0 for at in array("q", content[key])]
                for key in filter(content.get, RESULTS):
                    content[key] = bytes(8 * arguments["steps"])
            calls.append((name, content))
            return function(**arguments)

        return call

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Tensor, "data_ptr", noted))
        patches.enter_context(mock.patch.object(network, "listed", listed))
        for name in dir(extension.module):
            if not name.startswith("_"):
                patches.enter_context(mock.patch.object(extension.module, name, recording(name)))
        run()
    return calls


def count(recordings: dict[str, list[Call]]) -> dict[str, int]:
    """Instructions of each."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise SystemExit("benchmarks.count: valgrind is not installed (apt-get install valgrind); nothing was counted")
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder, "calls.pickle")
        calls.write_bytes(pickle.dumps(list(recordings.values())))
        command = [
            valgrind, "--tool=callgrind", f"--callgrind-out-file={folder}/out", f"--dump-before={replay.MARKER}",
            os.path.realpath(sys.executable), "-S", replay.__file__, extension.module.__file__, calls,
        ]  # fmt: skip
        # Python's hashes decide how long it looks for a name.
        environment = {"PO_KERNELS_SIMD": "x86-64-v3", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"benchmarks.count: valgrind exits with {done.returncode}:\n{done.stderr[-3000:]}")
        # The marker stands before and after each case: every second dump is a case.
        found = []
        for number in range(2, 2 * len(recordings) + 1, 2):
            total = re.search(r"^(?:totals|summary): (\d+)", Path(folder, f"out.{number}").read_text(), re.MULTILINE)
            found.append(int(total[1]))
    return dict(zip(recordings, found, strict=True))


def compare(found: dict[str, int], baseline: dict[str, int]) -> tuple[list[str], list[str]]:
    """What fails, and what takes fewer instructions by more than may be added."""
    worse = missing(found, baseline)
    worse += [f"{name}: in the run, missing from the baseline" for name in sorted(found.keys() - baseline.keys())]
    better = []
    for name in sorted(found.keys() & baseline.keys()):
        change = found[name] / baseline[name] - 1
        if abs(change) > ALLOWED:
            line = f"{name}: {found[name]:,} instructions, {change:+.1%} of the baseline's {baseline[name]:,}"
            (worse if change > 0 else better).append(line)
    return worse, better


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="make this build's counts the baseline")
    arguments = parser.parse_args()
    if extension.module is None:
        raise SystemExit(f"benchmarks.count: {extension.missing}")
    torch.set_num_threads(1)
    found = count({name: recorded(run) for name, run in cases()})
    compiler = extension.build["compiler"]
    if arguments.renew:
        BASELINE.write_text(json.dumps({"compiler": compiler, "instructions": found}, indent=1) + "\n")
        return 0
    baseline = json.loads(BASELINE.read_text())
    worse, better = compare(found, baseline["instructions"])
    if better:
        print("\n".join(["Fewer instructions; `python -m benchmarks.count --renew` makes them the baseline:", *better]))
    if worse:
        print("\n".join(["More instructions than in the baseline, or missing:", *worse]))
        print(f"Baseline of {baseline['compiler']}, this build of {compiler}.")
    else:
        print(f"{len(found)} cases, none over {ALLOWED:.0%} more instructions than its baseline")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
