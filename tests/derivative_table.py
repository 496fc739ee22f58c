"""What each op × estimator × backend provides, found by calling it, as a table.

python -m tests.derivative_table > docs/derivatives.md
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial

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
from tests.ops.test_derivatives import oracle

COLUMNS = ("value", "first", "second", "mixed", "jvp", "compile")
HEADER = """# Derivatives

What the operations provide, by estimator; "-" stands for log-probabilities, samples and advantages, which have none.
What holds on all CPU backends has one row, and an operation or backend that differs from it has its own. Written by
`python -m tests.derivative_table` from calls of every operation on every backend, each compared with the reference, and
the reference with finite differences, for the score-function estimators those of the function that they are to have
the derivatives of. A test holds this page to what it finds.

- value, first: the value, and its gradient in every floating tensor;
- second: products with the Hessian in the policy's parameters, by `autograd.grad` twice;
- mixed: the derivative of the policy's gradient in `precision`, `reward_table`, `rewards` or `value`;
- jvp: `torch.func.jvp`;
- compile: `torch.compile(fullgraph=True)` of value and gradient.

Under `torch.compile` calls without gradients (`no_grad`, `inference_mode`), statistics, dynamic batches and
`torch.export` are traced too, and a graph that autograd differentiates (`backend="eager"`) has second derivatives.
Transforms of `torch.func` under `torch.compile` (`grad`, `jvp`, `vmap`, `hessian`) are traced as plain torch, whatever
the backend; `reinforce` refuses them. `tests/ops/test_compile.py` holds this. `torch.jit.trace` is refused.

`torch.func.vmap` of an operation, of its derivatives too and however deep, is one call of the native kernel for all
problems, which have a seed, a precision or a table of their own where those are batched; what is not batched is not
copied. The other backends compute one problem after another. The policy losses take such batches without a transform
too, by `batch_dims`, which is faster. `benchmarks/bench_batches.py` compares.

The kernels of numba compute values and gradients; the reference serves its second order and jvp.

"raises" is a `RuntimeError` that says what to use instead; an operation without a tensor for "mixed" has no say in it.
`categorical_sample` draws integers and has no derivative.

"""
Function = Callable[..., Tensor]
REWARDS = ("precision", "reward_table", "rewards", "value")


Results = list[Tensor]


def entries(case: Case, backend: str) -> dict[str, str]:
    names = list(case.tensors)
    policy = [i for i, name in enumerate(names) if name not in (*REWARDS, "target")] or [0]
    reward = [i for i, name in enumerate(names) if name in REWARDS and i not in policy]
    vectors = directions(case, 0)
    cotangent = cotangent_like(case(), 0)

    def op(*inputs: Tensor, backend: str = backend) -> Tensor:
        return case(*inputs, backend=backend)

    def value(function: Function) -> Results:
        return [function(*case.inputs).detach()]

    def first(function: Function) -> Results:
        inputs = case.inputs
        return list(torch.autograd.grad(function(*inputs), inputs, cotangent, materialize_grads=True))

    def along(function: Function, inputs: Results) -> Tensor:
        """The policy's gradient times the directions."""
        gradients = torch.autograd.grad(
            function(*inputs), [inputs[i] for i in policy], cotangent, create_graph=True, materialize_grads=True
        )
        return sum((g * vectors[i]).sum() for g, i in zip(gradients, policy, strict=True))

    def again(wanted: list[int]) -> Callable[[Function], Results]:
        def second(function: Function) -> Results:
            inputs = case.inputs
            product = along(function, inputs)
            if not product.requires_grad:  # constant: plain torch says so by having no graph
                return [torch.zeros_like(inputs[i]) for i in wanted]
            return list(torch.autograd.grad(product, [inputs[i] for i in wanted], materialize_grads=True))

        return second

    def jvp(function: Function) -> Results:
        return [torch.func.jvp(function, tuple(case.tensors.values()), tuple(vectors))[1]]

    def compiled(function: Function) -> Results:
        torch._dynamo.reset()
        with warnings.catch_warnings():  # of torch.compile's own doings
            warnings.simplefilter("ignore", DeprecationWarning)
            return eager(torch.compile(function, fullgraph=True, backend="aot_eager"))

    def eager(function: Function) -> Results:
        return [*value(function), *first(function)]

    if backend == "reference":
        scored = case.options.get("estimator") in ("dice", "reinforce")
        right: Function = oracle(case) if scored else op
        start = [x.detach() for x in case.inputs]
        every = range(len(start))
        slopes = partial(differences, start)
        expected = {
            "value": lambda: value(right),
            "first": lambda: slopes(every, lambda *x: (right(*x) * cotangent).sum()),
            "second": lambda: slopes(policy, lambda *x: along(right, [y.requires_grad_() for y in x])),
            "mixed": lambda: slopes(reward, lambda *x: along(right, [y.requires_grad_() for y in x])),
            "jvp": lambda: [quotient(lambda h: right(*(x + h * v for x, v in zip(start, vectors, strict=True))))],
            "compile": lambda: eager(op),
        }
    else:
        reference = partial(op, backend="reference")
        expected = {
            "value": lambda: value(reference),
            "first": lambda: first(reference),
            "second": lambda: again(policy)(reference),
            "mixed": lambda: again(reward)(reference),
            "jvp": lambda: jvp(reference),
            "compile": lambda: eager(reference),
        }
    results = {"value": value, "first": first, "second": again(policy), "mixed": again(reward), "jvp": jvp,
               "compile": compiled}  # fmt: skip
    tolerance = 1e-6 if backend == "reference" else 1e-9
    return {
        name: "-" if name == "mixed" and not reward else _judge(partial(results[name], op), expected[name], tolerance)
        for name in COLUMNS
    }


# Of size 1, derivatives of third order make an error of 1e-10, and rounding one of 1e-11.
STEP = 1e-5


def quotient(function: Callable[[float], Tensor]) -> Tensor:
    return (function(STEP) - function(-STEP)).detach() / (2 * STEP)


def differences(start: Results, wanted: Iterable[int], function: Function) -> Results:
    """The gradient of a number in the inputs `wanted`, by central differences."""

    def at(which: int, entry: int, step: float) -> Tensor:
        inputs = [x.clone() for x in start]
        inputs[which].view(-1)[entry] += step
        return function(*inputs)

    return [
        torch.stack([quotient(partial(at, i, entry)) for entry in range(start[i].numel())]).reshape(start[i].shape)
        for i in wanted
    ]


def _judge(found: Callable[[], Results], expected: Callable[[], Results], tolerance: float) -> str:
    try:
        result = found()
    except RuntimeError as error:
        if "use " not in str(error):
            raise
        return "raises"
    right = expected()
    if not distance(result, right) <= tolerance * (1 + largest(right)):
        raise AssertionError(f"{found} is wrong by {distance(result, right)}")
    return "yes"


def table() -> str:
    lines = ["| estimator | operations | " + " | ".join(COLUMNS) + " |", "| --- " * (2 + len(COLUMNS)) + "|"]
    found: dict[str, dict[str, dict[str, str]]] = {}  # by estimator, and by operation and backend
    for op in DIFFERENTIABLE:
        for estimator in ESTIMATORS.get(op, ("-",)):
            options = {} if estimator == "-" else {"estimator": estimator, "advantage": "loo"}
            case = draw(
                op, 1, lead=(2,), dim=2, group=4, precision_kind="full", shared_scale=False, mask=False, **options
            )
            for backend in serving(op):
                found.setdefault(estimator, {})[f"{op} on {backend}"] = entries(case, backend)
    for estimator, each in found.items():
        usual = {c: next((x[c] for x in each.values() if x[c] != "-"), "-") for c in COLUMNS}
        others = {name: x for name, x in each.items() if any(x[c] not in ("-", usual[c]) for c in COLUMNS)}
        for name, x in {"all" if not others else "all others": usual, **others}.items():
            lines.append(f"| {estimator} | {name} | {' | '.join(x[c] for c in COLUMNS)} |")
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
