"""Every op on every backend against the reference: value, gradients, second derivatives, forward mode, compilation."""

import functools

import pytest
import torch
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

import po_kernels as pk
from po_kernels.backends.contract import OPS
from po_kernels.ops import _library, _modes

from . import bounds
from .cases import (
    DEVICE,
    DIFFERENTIABLE,
    LOSSES,
    Case,
    cotangent_like,
    derivatives,
    directions,
    distance,
    draw,
    fused,
    fused_pairs,
    largest,
    seeds,
    serving,
)

DTYPES = (torch.float32, torch.float64)


@functools.cache
def in_both_dtypes(op: str, seed: int) -> tuple[bounds.Expected, bounds.Expected]:
    """The backends share what the reference is asked for."""
    in_float64 = bounds.expected(draw(op, seed), seed)
    return in_float64, bounds.expected(in_float64.case.to(torch.float32), seed, units_of=in_float64)


@pytest.mark.parametrize(("op", "backend"), fused_pairs(DIFFERENTIABLE))
def test_value_gradients_and_second_derivatives(op, backend):
    wrong = []
    for seed in seeds(100):
        for each in in_both_dtypes(op, seed):
            wrong += each.complaints(derivatives(each.case, backend, seed, second=each.second))
    assert not wrong, "\n".join(wrong[:10])


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="of fewer cases no tensor has to be well conditioned")
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_an_error_of_25_eps_is_noticed(op):
    """In each tensor that is not always zero, relative to its largest entry, in both dtypes."""
    smallest: dict = {}
    for seed in seeds(100):
        for each in in_both_dtypes(op, seed):
            for order, tensors in each.exact.items():
                for index, x in enumerate(tensors):
                    if size := largest([x]):
                        key = order, index, each.dtype
                        relative = each.bound(order, index) / (torch.finfo(each.dtype).eps * size)
                        smallest[key] = min(relative, smallest.get(key, relative))
    assert max(smallest.values()) < 25, smallest


@pytest.mark.parametrize("backend", fused("categorical_sample"))
def test_labels_are_those_of_the_reference(backend):
    for seed in seeds(200):
        for dtype in DTYPES:
            case = draw("categorical_sample", seed, dtype)
            assert torch.equal(case(backend=backend), case())


@pytest.mark.parametrize("advantage", ["loo", "standardized"])
@pytest.mark.parametrize("backend", fused("gaussian_policy_loss"))
def test_products_of_a_composed_network(backend, advantage):
    """An MLP that ends in the op: its full Hessian-vector product, and the mixed product with U."""
    for seed in seeds(50):
        case = draw("gaussian_policy_loss", seed, lead=(4,), estimator="dice", group=4 + seed % 5)
        case = case.with_options(advantage=advantage, reduction="mean")
        dim = case.tensors["mean"].shape[1]
        network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2 * dim)).double()
        x = torch.randn(4, 3, dtype=torch.float64)
        weights = list(network.parameters())
        tangents = [torch.randn_like(w) for w in weights]
        precision = case.tensors["precision"].clone().requires_grad_()

        products = []
        for name in ("reference", backend):
            mean, log_std = network(x).chunk(2, dim=-1)
            loss = case(mean, log_std, case.tensors["target"], precision, backend=name)
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            inner = sum((g * v).sum() for g, v in zip(gradients, tangents, strict=True))
            products.append(torch.autograd.grad(inner, (*weights, precision)))
        for found, expected in zip(products[1], products[0], strict=True):
            # The composition adds up no more than 1e4 rounding errors of 2e-16 in units of the largest entry.
            assert (found - expected).norm() <= 1e-10 * expected.norm() + 1e-13, (seed, case)


def small_cases(op: str, count: int = 6) -> list[tuple[int, Case]]:
    found = []
    for seed in range(1000):
        case = draw(op, seed, lead=(2,), dim=1 + seed % 3, group=3, mask=False)
        if case.options.get("estimator") != "reinforce":
            found.append((seed, case))
        if len(found) == count:
            break
    return found


def agree(found, expected, case) -> None:
    if isinstance(expected, torch.Tensor):
        found, expected = [found], [expected]
    flat_found, flat_expected = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    bound = 1e-12 * (1.0 + largest(flat_expected))
    assert distance(flat_found, flat_expected) <= bound, case


def transforms_agree(case: Case, backend: str, seed: int) -> None:
    inputs, tangents = tuple(case.tensors.values()), tuple(directions(case, seed))
    every = tuple(range(len(inputs)))
    weight = cotangent_like(case(), seed)

    def tensor(name):
        return lambda *tensors: case(*tensors, backend=name)

    def scalar(name):
        return lambda *tensors: (case(*tensors, backend=name) * weight).sum()

    for function, transform in (
        (tensor, lambda f: jvp(f, inputs, tangents)),
        (tensor, lambda f: vjp(f, *inputs)[1](weight)),
        (scalar, lambda f: jvp(f, inputs, tangents)),
        (scalar, lambda f: grad(f, every)(*inputs)),
        (scalar, lambda f: jvp(grad(f, every), inputs, tangents)),
        (scalar, lambda f: grad(lambda *xs: jvp(f, xs, tangents)[1], every)(*inputs)),
        (scalar, lambda f: grad(lambda vs: jvp(f, inputs, vs)[1])(tangents)),
    ):
        agree(transform(function(backend)), transform(function("reference")), case)


@pytest.mark.parametrize(("op", "backend"), fused_pairs(DIFFERENTIABLE))
def test_torch_func(op, backend):
    for seed, case in small_cases(op):
        transforms_agree(case, backend, seed)


def full_hessian(case: Case, backend: str) -> tuple:
    inputs = tuple(case.tensors.values())
    return hessian(lambda *xs: case(*xs, backend=backend).sum(), tuple(range(len(inputs))))(*inputs)


@pytest.mark.parametrize(("op", "backend"), fused_pairs(LOSSES))
def test_full_hessian(op, backend):
    for _, case in small_cases(op, 3):
        for reduction in ("mean", "none"):
            case = case.with_options(reduction=reduction)
            agree(full_hessian(case, backend), full_hessian(case, "reference"), case)


@pytest.mark.parametrize(("op", "backend"), fused_pairs(LOSSES))
def test_vmap_over_problems(op, backend):
    for seed, case in small_cases(op, 3):
        inputs = tuple(case.tensors.values())
        scales = torch.tensor([1.0, 1.25, 0.75], dtype=torch.float64)
        first = torch.stack([inputs[0] * s for s in scales])

        def gradient(x, case=case, inputs=inputs):
            return grad(lambda y: case(y, *inputs[1:], backend=backend).sum())(x)

        expected = torch.stack([gradient(x) for x in first])
        agree(vmap(gradient)(first), expected, (seed, case))


@pytest.mark.parametrize(("op", "backend"), fused_pairs(DIFFERENTIABLE))
def test_a_batch_of_problems_is_as_many_calls(op, backend):
    """To the bit, in value and gradient and Hessian product, two batches deep, some inputs shared, the last strided."""
    options = {"estimator": "dice", "advantage": "loo", "reduction": "mean"} if op in LOSSES else {}
    case = draw(op, 5, lead=(3,), dim=3, group=4, mask=False, **options)
    cotangent = cotangent_like(case(), 1)
    given = tuple(case.tensors.values())
    scales = torch.tensor([[1.0, 1.25, 0.75], [0.5, 1.5, 1.1]], dtype=torch.float64)
    first = torch.stack([torch.stack([given[0] * s for s in row]) for row in scales])
    last = torch.stack([torch.stack([given[-1] * s for s in row]) for row in scales], dim=-1)

    def products(x, y):
        inputs = (x, *given[1:-1], y) if len(given) > 1 else (x,)

        def gradients(*inputs):
            return vjp(lambda *z: case(*z, backend=backend), *inputs)[1](cotangent)

        found = gradients(*inputs)
        if backend == "numba":  # whose second order is the reference's, which rounds a batch otherwise
            return case(*inputs, backend=backend), found
        return case(*inputs, backend=backend), found, jvp(gradients, inputs, tuple(z.cos() for z in inputs))[1]

    found = torch.utils._pytree.tree_leaves(vmap(vmap(products), in_dims=(0, -1))(first, last))
    one_by_one = [[products(first[i, j], last[j, ..., i]) for j in range(3)] for i in range(2)]
    for i, row in enumerate(one_by_one):
        for j, each in enumerate(row):
            for x, right in zip(found, torch.utils._pytree.tree_leaves(each), strict=True):
                assert torch.equal(x[i, j], right), (i, j)


@pytest.mark.parametrize(("op", "backend"), fused_pairs(("gaussian_policy_loss", "categorical_policy_loss")))
def test_functional_call(op, backend):
    case = draw(op, 3, lead=(4,), dim=3, group=4, estimator="dice", advantage="loo", reduction="mean")
    inputs = list(case.tensors.values())
    network = torch.nn.Linear(2, 3).double()
    weights = {name: w.detach() for name, w in network.named_parameters()}
    x = torch.randn(4, 2, dtype=torch.float64)
    tangents = {name: torch.randn_like(w) for name, w in weights.items()}

    def loss(weights, name):
        return case(functional_call(network, weights, (x,)), *inputs[1:], backend=name)

    for transform in (
        lambda f: grad(f)(weights),
        lambda f: jvp(grad(f), (weights,), (tangents,)),
        lambda f: hessian(f)(weights),
    ):
        found, expected = (transform(lambda w, n=name: loss(w, n)) for name in (backend, "reference"))
        agree(found, expected, case)


def training_step(case: Case, backend: str, inputs: list) -> torch.Tensor:
    loss = case(*inputs, backend=backend)
    return loss.sum() * 2.0


def compiled_agrees(case: Case, backend: str, compiler: str) -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda *inputs: training_step(case, backend, inputs), fullgraph=True, backend=compiler, dynamic=False
    )
    eager_inputs, inputs = case.inputs, case.inputs
    training_step(case, backend, eager_inputs).backward()
    loss = step(*inputs)
    loss.backward()
    agree(loss.detach(), training_step(case, backend, eager_inputs).detach(), case)
    for x, y in zip(inputs, eager_inputs, strict=True):
        agree(x.grad, torch.zeros_like(x) if y.grad is None else y.grad, case)
    torch._dynamo.reset()


# Dynamo itself makes an instance of a Function to trace its forward, of which torch warns.
TRACED = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@TRACED
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # of inductor's own modules
@pytest.mark.parametrize("backend", serving("gaussian_policy_loss")[:2][-1:])
def test_compiled_by_inductor(backend):
    case = draw("gaussian_policy_loss", 1, lead=(3,), dim=2, group=3, estimator="dice", reduction="mean")
    compiled_agrees(case, backend, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize(("op", "backend"), fused_pairs(tuple(OPS)))
def test_opcheck(op, backend, monkeypatch):
    """The arguments are those of real calls, kept on their way to the kernel."""
    calls = []
    kernel = _library.OPERATORS[op]

    def kept(*arguments):
        calls.append(torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments))
        return kernel(*arguments)

    monkeypatch.setattr(_modes, "may_call_directly", lambda *_: False)  # around torch's dispatcher
    monkeypatch.setitem(_library.OPERATORS, op, kept)
    for reduction in ("mean", "none"):
        options = {"estimator": "dice", "reduction": reduction} if op in LOSSES else {}
        case = draw(op, 2, lead=(3,), dim=2, group=3, mask=False, **options)
        derivatives(case, backend) if OPS[op].differentiable else case(backend=backend)
    assert {bool(tangents) for _, _, tangents, *_ in calls} == {False, OPS[op].differentiable}
    for arguments in calls:
        torch.library.opcheck(kernel, arguments)


def test_every_op_is_in_the_table():
    families = {name.split("_")[0] for name in OPS}
    plain = {"token_kl"}  # has no kernels
    assert {name for name in pk.__all__ if name.split("_")[0] in families} == {*OPS, *plain}
