"""What each op × estimator × backend provides, found by calling it, as a table.

python -m tests.derivative_table > docs/derivatives.md
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from tests.ops.cases import (
    DIFFERENTIABLE,
    ESTIMATORS,
    Case,
    cotangent_like,
    directions,
    distance,
    draw,
    largest,
    serving,
)

COLUMNS = ("value", "first", "second", "mixed", "jvp", "compile")
HEADER = """# Derivatives

What each operation provides on each CPU backend. Written by `python -m tests.derivative_table` from calls of the
operations, each compared with the reference; a test holds this page to what it finds.

- value, first: the value, and its gradient in every floating tensor;
- second: products with the Hessian in the policy's parameters, by `autograd.grad` twice;
- mixed: the derivative of the policy's gradient in `precision`, `reward_table`, `rewards` or `value`;
- jvp: `torch.func.jvp`;
- compile: `torch.compile(fullgraph=True)` of value and gradient.

The kernels of numba compute values and gradients; the reference serves its second order and jvp.

"raises" is a `RuntimeError` that says what to use instead; "-" is for what an operation has no input for.
`categorical_sample` draws integers and has no derivative.

"""
REWARDS = ("precision", "reward_table", "rewards", "value")


def entries(case: Case, backend: str) -> dict[str, str]:
    names = list(case.tensors)
    policy = [i for i, name in enumerate(names) if name not in (*REWARDS, "target")] or [0]
    reward = [i for i, name in enumerate(names) if name in REWARDS and i not in policy]
    vectors = directions(case, 0)

    def value(backend: str) -> list[Tensor]:
        return [case(backend=backend)]

    def first(backend: str) -> list[Tensor]:
        inputs = case.inputs
        output = case(*inputs, backend=backend)
        return list(torch.autograd.grad(output, inputs, cotangent_like(output, 0), materialize_grads=True))

    def again(wanted: list[int]) -> Callable[[str], list[Tensor]]:
        def second(backend: str) -> list[Tensor]:
            inputs = case.inputs
            output = case(*inputs, backend=backend)
            gradients = torch.autograd.grad(
                output,
                [inputs[i] for i in policy],
                cotangent_like(output, 0),
                create_graph=True,
                materialize_grads=True,
            )
            product = sum((g * vectors[i]).sum() for g, i in zip(gradients, policy, strict=True))
            if not product.requires_grad:  # constant: plain torch says so by having no graph
                return [torch.zeros_like(inputs[i]) for i in wanted]
            return list(torch.autograd.grad(product, [inputs[i] for i in wanted], materialize_grads=True))

        return second

    def jvp(backend: str) -> list[Tensor]:
        return [torch.func.jvp(lambda *x: case(*x, backend=backend), tuple(case.tensors.values()), tuple(vectors))[1]]

    def compiled(backend: str) -> list[Tensor]:
        inputs = case.inputs
        torch._dynamo.reset()
        function = torch.compile(lambda *x: case(*x, backend=backend), fullgraph=True, backend="aot_eager")
        with warnings.catch_warnings():  # of torch.compile's own doings
            warnings.simplefilter("ignore", DeprecationWarning)
            output = function(*inputs)
        gradients = torch.autograd.grad(output, inputs, cotangent_like(output, 0), materialize_grads=True)
        return [output.detach(), *gradients]

    def eager(backend: str) -> list[Tensor]:
        return [*value(backend), *first(backend)]

    found = {
        "value": _judge(value, value, backend),
        "first": _judge(first, first, backend),
        "second": _judge(again(policy), again(policy), backend),
        "mixed": _judge(again(reward), again(reward), backend) if reward else "-",
        "jvp": _judge(jvp, jvp, backend),
        "compile": _judge(compiled, eager, backend),
    }
    return found


def _judge(found: Callable[[str], list[Tensor]], expected: Callable[[str], list[Tensor]], backend: str) -> str:
    try:
        result = found(backend)
    except RuntimeError as error:
        if "use " not in str(error):
            raise
        return "raises"
    right = expected("reference")
    if not distance(result, right) <= 1e-9 * (1 + largest(right)):
        raise AssertionError(f"{found.__name__} on {backend} is wrong by {distance(result, right)}")
    return "yes"


def table() -> str:
    lines = ["| op | estimator | backend | " + " | ".join(COLUMNS) + " |", "| --- " * (3 + len(COLUMNS)) + "|"]
    for op in DIFFERENTIABLE:
        for estimator in ESTIMATORS.get(op, (None,)):
            options = {} if estimator is None else {"estimator": estimator, "advantage": "loo"}
            case = draw(
                op, 1, lead=(5,), dim=3, group=4, precision_kind="full", shared_scale=False, mask=False, **options
            )
            for backend in serving(op):
                found = entries(case, backend)
                lines.append(f"| {op} | {estimator or '-'} | {backend} | {' | '.join(found[c] for c in COLUMNS)} |")
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
