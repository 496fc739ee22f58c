"""What a program may do with a call: each transform gives what can be held against the derivatives of `bounds`."""

import multiprocessing
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vmap

from tests.ops.cases import LOSSES, Case, cotangent_like, derivatives, directions

# By order as in `cases.derivatives`; None stands for what the transform does not compute.
Found = dict[str, list[Tensor | None]]
Move = Callable[[Tensor], Tensor]


class Transform(NamedTuple):
    """One of TRANSFORMS.

    Attributes:
        run: (case, backend, seed, move) -> what it finds for each of `cases`, and again for each repetition.
        order: 0, 1 or 2, the highest derivative that it computes.
        weight: how often it is drawn, against the others.
        cases: the calls that it makes of one.
    """

    run: Callable[[Case, str, int, Move], list[Found]]
    order: int
    weight: int = 8
    cases: Callable[[Case], list[Case]] = lambda case: [case]


def _value(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    if case.op not in LOSSES:
        return [{"value": [case(backend=backend)]}]
    value, statistics = case(backend=backend, return_stats=True)
    return [{"value": [value], "statistics": list(statistics)}]


def _gradient(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    return [derivatives(case, backend, seed, second=False, move=move)]


def _again(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    """Twice, with the same bits; then twice from one graph, of which a backward pass may use up nothing."""
    found = [derivatives(case, backend, seed, second=False, move=move) for _ in range(2)]
    for order, tensors in found[0].items():
        if not all(torch.equal(x, y) for x, y in zip(tensors, found[1][order], strict=True)):
            raise AssertionError(f"{order} has other bits in a second run")
    inputs = case.inputs
    output = case(*inputs, backend=backend)
    cotangent = move(cotangent_like(output, seed))
    for scale in (-2.0, 1.0):  # a power of two, which rounds nothing but what is subnormal
        gradients = torch.autograd.grad(output, inputs, scale * cotangent, retain_graph=True, materialize_grads=True)
    return [*found, {"first": list(gradients)}]


def _second(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    return [derivatives(case, backend, seed, second=True, move=move)]


def _gradients_and_value(case: Case, backend: str, seed: int) -> Callable[..., Any]:
    """inputs -> (gradients, (scalar, value)), by torch.func."""
    cotangent = cotangent_like(case(), seed)

    def weighted(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = case(*inputs, backend=backend)
        return (output * cotangent).sum(), output

    return grad_and_value(weighted, tuple(range(len(case.tensors))), has_aux=True)


def _func_grad(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    gradients, (_, output) = _gradients_and_value(case, backend, seed)(*case.tensors.values())
    return [{"value": [output], "first": list(gradients)}]


def _jvp(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    tangents = tuple(map(move, directions(case, seed)))
    output, derivative = jvp(partial(case, backend=backend), tuple(case.tensors.values()), tangents)
    return [{"value": [output], "second": [*[None] * len(tangents), derivative]}]


def _forward_over_reverse(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    function = _gradients_and_value(case, backend, seed)
    tangents = tuple(map(move, directions(case, seed)))
    primal, tangent = jvp(lambda *xs: function(*xs)[0], tuple(case.tensors.values()), tangents)
    return [{"first": list(primal), "second": [*tangent, None]}]


def _with_half_of_it(case: Case) -> list[Case]:
    return [case, replace(case, tensors={name: 0.5 * x for name, x in case.tensors.items()})]


def _vmap(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    columns = zip(*(each.tensors.values() for each in _with_half_of_it(case)), strict=True)
    batches = [move(torch.stack(column)) for column in columns]
    if case.op == "categorical_sample":
        return [{"value": [x]} for x in vmap(partial(case, backend=backend))(*batches)]
    gradients, (_, output) = vmap(_gradients_and_value(case, backend, seed))(*batches)
    return [{"value": [output[i]], "first": [g[i] for g in gradients]} for i in range(2)]


def _recorded(function: Any, case: Case, seed: int, move: Move) -> Found:
    inputs = case.inputs
    output = function(*inputs)
    if not output.is_floating_point():
        return {"value": [output]}
    gradients = torch.autograd.grad(output, inputs, move(cotangent_like(output, seed)), materialize_grads=True)
    return {"value": [output.detach()], "first": list(gradients)}


def _compiled(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    torch._dynamo.reset()
    with warnings.catch_warnings():  # of torch.compile's own doings
        warnings.simplefilter("ignore", DeprecationWarning)
        function = torch.compile(partial(case, backend=backend), fullgraph=True, backend="aot_eager")
        found = _recorded(function, case, seed, move)
    torch._dynamo.reset()
    return [found]


def _inference(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    with torch.inference_mode():
        return _value(case, backend, seed, move)


def _autocast(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    """The backward pass within too, which torch advises against and programs do."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [_recorded(partial(case, backend=backend), case, seed, move)]


def _with_a_half_head(case: Case) -> list[Case]:
    name, head = next(iter(case.tensors.items()))
    return [replace(case, tensors={**case.tensors, name: head.bfloat16().to(head.dtype)})]


def _mixed(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    """Under autocast, the first input in bfloat16 and the others as they are."""
    name, head = next(iter(case.tensors.items()))
    case = replace(case, tensors={**case.tensors, name: move(head.bfloat16())})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [_recorded(partial(case, backend=backend), case, seed, move)]


def _each_tensor(found: list[Any], change: Callable[[Any], Any]) -> list[Any]:
    return [{order: list(map(change, tensors)) for order, tensors in each.items()} for each in found]


def _in_child(connection: Any, case: Case, backend: str, seed: int) -> None:
    torch.set_num_threads(1)  # torch's own operations: those of ours find out by themselves
    found = _value(case, backend, seed, lambda x: x)
    connection.send(_each_tensor(found, lambda x: (x.tolist(), x.dtype, x.shape)))


FORK_SECONDS = 60


def _forked(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    """The value in a child of a process that has used threads."""
    _threads(case, backend, seed, move)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork where there are threads
        child = context.Process(target=_in_child, args=(sender, case, backend, seed))
        child.start()
    sender.close()
    try:
        if not receiver.poll(FORK_SECONDS):
            raise AssertionError("a forked child hangs")
        found = receiver.recv()
    except EOFError:
        raise AssertionError("a forked child failed") from None
    finally:
        child.kill()
        child.join()
    return _each_tensor(found, lambda sent: torch.tensor(sent[0], dtype=sent[1]).reshape(sent[2]))


def _threads(case: Case, backend: str, seed: int, move: Move) -> list[Found]:
    """Three at once: calls of their own, and the backward pass of one graph."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    inputs = case.inputs
    torch.set_num_threads(2)
    output = case(*inputs, backend=backend)

    def work(_: int) -> list[Found]:
        if not output.is_floating_point():
            return _value(case, backend, seed, move)
        cotangent = move(cotangent_like(output, seed))
        gradients = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, materialize_grads=True)
        return [{"first": list(gradients)}, *_gradient(case, backend, seed, move)]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            return [found for each in pool.map(work, range(3)) for found in each]
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)


TRANSFORMS = {
    "value": Transform(_value, 0),
    "gradient": Transform(_gradient, 1),
    "second": Transform(_second, 2, 16),
    "again": Transform(_again, 1),
    "inference": Transform(_inference, 0, 4),
    "autocast": Transform(_autocast, 1, 4),
    "mixed": Transform(_mixed, 1, 4, _with_a_half_head),
    "func_grad": Transform(_func_grad, 1),
    "jvp": Transform(_jvp, 2),
    "forward_over_reverse": Transform(_forward_over_reverse, 2),
    "vmap": Transform(_vmap, 1, 8, _with_half_of_it),
    "threads": Transform(_threads, 1, 4),
    "forked": Transform(_forked, 0, 1),
    "compiled": Transform(_compiled, 1, 1),
}
# For integers, and for an estimator that has no second derivative.
WITHOUT_DERIVATIVES = ("value", "inference", "vmap", "threads", "forked", "compiled")
