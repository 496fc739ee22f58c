"""Policy losses of many problems by `batch_dims`: as many calls, in one."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

import po_kernels as pk
from po_kernels import dispatch

from .cases import POLICY_LOSSES, Case, draw, fused_pairs, pairs
from .test_contract import agree

BATCH = (2, 3)
PROBLEMS = [(i, j) for i in range(2) for j in range(3)]
SEEDS = torch.tensor([[1, 2, 3], [-4, 2**40, 6]])


def problems(case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Inputs, leaves, and constants of problems that differ in all of them."""
    scales = torch.tensor([[1.0, 1.25, 0.75], [0.5, 1.5, 1.1]], dtype=torch.float64)
    inputs = [(scales.reshape(*BATCH, *[1] * x.ndim) * x.detach()).requires_grad_() for x in case.tensors.values()]
    constants = {
        name: torch.stack([torch.stack([x.roll(3 * i + j, 0) for j in range(3)]) for i in range(2)])
        for name, x in case.constants.items()
    }
    return inputs, constants


def products(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a weighted sum, and their products with the Hessian."""
    weight = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    first = grad(value, inputs, weight, create_graph=True)
    return *first, *grad(first, inputs, [g.detach().cos() for g in first], materialize_grads=True)


@pytest.mark.parametrize("shared_scale", [False, True])
@pytest.mark.parametrize(("op", "backend"), pairs(POLICY_LOSSES))
def test_as_many_calls(op, backend, shared_scale):
    for number, reduction in enumerate(("mean", "sum", "none")):
        case = draw(
            op, number, lead=(4,), dim=3, group=4, mask=False, shared_scale=shared_scale, estimator="dice",
            advantage="loo", reduction=reduction, rbf_gamma=None, num_samples=4,
        )  # fmt: skip
        case.options.pop("seed", None)
        inputs, constants = problems(case)
        changes = {**case.options, "return_stats": True, "backend": backend}
        fused = getattr(pk, op)
        names = list(case.tensors)
        value, stats = fused(**dict(zip(names, inputs, strict=True)), **constants, seed=SEEDS, batch_dims=2, **changes)
        calls = [
            fused(
                **{name: x[i] for name, x in zip(names, inputs, strict=True)},
                **{name: x[i] for name, x in constants.items()}, seed=SEEDS[i], **changes,
            )
            for i in PROBLEMS
        ]  # fmt: skip
        right = torch.stack([call[0] for call in calls]).unflatten(0, BATCH)
        agree(value, right, case)
        for column, each in zip(stats, zip(*[call[1] for call in calls], strict=True), strict=True):
            agree(column, torch.stack(each).unflatten(0, BATCH), case)
        agree(products(value, inputs), products(right, inputs), case)


@pytest.mark.parametrize(("op", "backend"), fused_pairs(POLICY_LOSSES))
def test_in_whatever_mode_or_transform(op, backend):
    case = draw(op, 1, lead=(4,), dim=3, mask=False, estimator="dice", advantage="loo", group=4, reduction="mean")
    inputs, constants = problems(case)

    def loss(*inputs: Tensor) -> Tensor:
        named = dict(zip(case.tensors, inputs, strict=True))
        return getattr(pk, op)(**named, **constants, **case.options, batch_dims=2, backend=backend)

    right = loss(*inputs)
    slopes = grad(right.sum(), inputs)
    plain = [x.detach() for x in inputs]
    tangents = [x.cos() for x in plain]
    agree(torch.func.grad(lambda *x: loss(*x).sum(), tuple(range(len(plain))))(*plain), slopes, case)
    value, along = torch.func.jvp(loss, tuple(plain), tuple(tangents))
    agree(value, right, case)
    agree(along.sum(), sum((g * v).sum() for g, v in zip(slopes, tangents, strict=True)), case)
    agree(torch.func.vmap(loss)(*[torch.stack([x, x]) for x in plain]), torch.stack([right, right]), case)
    agree(torch.compile(loss, backend="eager", fullgraph=True)(*plain), right, case)
    half = loss(*inputs)  # a graph that is kept hands out its gradients once, and what was handed out is not its own
    first = grad(half, inputs, torch.full(BATCH, 2.0, dtype=half.dtype), retain_graph=True)
    agree(first, [2 * g for g in slopes], case)
    agree(grad(half.sum(), inputs), slopes, case)


def test_is_one_native_call():
    kernel = dispatch.kernel("gaussian_policy_loss", "native")
    if not hasattr(kernel, "batch"):
        pytest.skip("the extension was not built")
    mean = torch.randn(5, 3, 2, requires_grad=True)
    with mock.patch.object(type(kernel), "batch", autospec=True, side_effect=type(kernel).batch) as batch:
        pk.gaussian_policy_loss(mean, torch.zeros(5, 2), torch.zeros(5, 3, 2), 1.0, batch_dims=1, backend="native")
    assert batch.call_count == 1


@pytest.mark.parametrize("backend", [None, "reference"])
def test_seeds_and_what_is_shared(backend):
    mean, log_std, u = torch.zeros(3, 4, 2), torch.zeros(2), torch.tensor([1.0, 2.0])

    def loss(**options):
        return pk.gaussian_policy_loss(
            mean, log_std.expand(3, 2), mean, u.expand(3, 2), estimator="reparam", num_samples=3, batch_dims=1,
            backend=backend, **options,
        )  # fmt: skip

    one = pk.gaussian_policy_loss(
        mean[0], log_std, mean[0], u, estimator="reparam", num_samples=3, seed=7, stream=2, backend=backend
    )
    torch.testing.assert_close(loss(seed=7, stream=2), one.expand(3))
    torch.testing.assert_close(loss(seed=torch.tensor([5, 7, 9]), stream=2)[1], one)
    torch.manual_seed(0)
    drawn = loss()
    assert len(set(drawn.tolist())) == 3
    torch.manual_seed(0)
    assert torch.equal(loss(), drawn)
    coefficient = torch.tensor(0.5, requires_grad=True)
    torch.testing.assert_close(loss(seed=7, entropy_coef=coefficient), loss(seed=7, entropy_coef=0.5))
    (slope,) = grad(loss(seed=7, entropy_coef=coefficient)[0], coefficient)
    # Minus the entropy of two standard normals.
    assert abs(float(slope) + 2.8378770664) < 1e-5


def test_errors_name_the_argument():
    mean, target, labels = torch.zeros(3, 4, 2), torch.zeros(3, 4, 2), torch.zeros(3, 4, dtype=torch.int64)

    def refused(message: str, *given: Tensor, error: type = ValueError, **options) -> None:
        op = pk.categorical_policy_loss if given[1].dtype == torch.int64 else pk.gaussian_policy_loss
        with pytest.raises(error, match=message):
            op(*given, **options)

    one = {"batch_dims": 1}
    scale = torch.zeros(3, 2)
    refused(
        r"precision: expected shape \(3,\) or \(3, 2\) or \(3, 2, 2\), got \(2,\)",
        mean,
        scale,
        target,
        torch.ones(2),
        **one,
    )
    refused(
        r"log_std: expected shape \(3, 4, 2\) or \(3, 2\), got \(2,\)", mean, scale[0], target, torch.ones(3), **one
    )
    refused(r"target: expected shape \(3, 4, 2\), got \(4, 2\)", mean, scale, target[0], torch.ones(3), **one)
    refused(r"mean: expected at least one problem", mean[:0], scale[:0], target[:0], torch.ones(0), **one)
    refused(r"batch_dims: expected an integer of at most 2, got 3", mean, scale, target, torch.ones(3), batch_dims=3)
    refused(
        r"batch_dims: expected an integer, got bool",
        mean,
        scale,
        target,
        torch.ones(3),
        error=TypeError,
        batch_dims=True,
    )
    refused(
        r"seed: expected an int64 tensor of shape \(\) or \(3,\)", mean, scale, target, torch.ones(3), error=TypeError,
        seed=torch.tensor([1, 2]), num_samples=2, estimator="dice", **one,
    )  # fmt: skip
    refused(r"reward_table: expected shape \(3, 2, 2\), got \(2, 2\)", mean, labels, torch.eye(2), **one)
    refused(r"precision: expected positive", mean, scale, target, torch.tensor([1.0, -1.0, 1.0]), **one)
