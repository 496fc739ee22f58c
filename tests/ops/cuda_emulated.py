"""The CUDA kernels on the host, against the reference: `test_cuda` runs this in a process of its own."""

import pytest
import torch

import po_kernels as pk
from po_kernels import dispatch
from po_kernels.backends import contract
from po_kernels.backends.contract import OpConfig
from po_kernels.backends.cuda import kernels

from . import test_long_sums, test_mvn, test_numbers, test_tiny
from .bounds import agrees
from .cases import (
    ADVANTAGES,
    DIFFERENTIABLE,
    ESTIMATORS,
    GAUSSIAN_LOSSES,
    LOSSES,
    PRECISIONS,
    REDUCTIONS,
    SAMPLES,
    Case,
    derivatives,
    distance,
    draw,
    repeats_second_order,
)

BACKEND = "cuda"
OPS = [op for op in DIFFERENTIABLE if op in kernels.KERNELS]


def bits(case: Case, seed: int = 0) -> list[torch.Tensor]:
    return [x for order in derivatives(case, BACKEND, seed, second=repeats_second_order(case)).values() for x in order]


def same_bits(case: Case, other: list[torch.Tensor], seed: int = 0) -> None:
    for found, expected in zip(bits(case, seed), other, strict=True):
        assert torch.equal(found, expected), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", [op for op in LOSSES if op in OPS])
def test_every_option(op, dtype):
    number = 0
    for estimator in ESTIMATORS[op]:
        for advantage in ADVANTAGES if estimator in ("dice", "reinforce") else ("loo",):
            for kind in PRECISIONS if op in GAUSSIAN_LOSSES else ("full",):
                options = {"estimator": estimator, "advantage": advantage, "reduction": REDUCTIONS[number % 3]}
                agrees(
                    draw(op, number, dtype, lead=(3,), dim=6, group=7, precision_kind=kind, **options), BACKEND, number
                )
                number += 1


SHAPES = ((1, 70), (4, 32), (8, 33), (17, 64), (31, 5), (32, 31), (33, 40), (64, 2), (64, 70), (6, 300))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_shapes(op, shape):
    dim, group = shape
    for number, dtype in enumerate((torch.float32, torch.float64)):
        estimators = ("dice", "reparam", "analytic") if op in GAUSSIAN_LOSSES else ("dice",)
        for estimator in estimators if op in LOSSES else ("",):
            options = {"estimator": estimator} if estimator else {}
            case = draw(op, number, dtype, lead=(3,), dim=dim, group=group, precision_kind="full", **options)
            # A second derivative in float64 takes four times the shared memory of a first in float32.
            agrees(case, BACKEND, second=not (dim > 33 and "mvn" in op and dtype == torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_nothing_depends_on_the_order_of_threads(op, dtype, monkeypatch):
    for seed in range(20):
        case = draw(op, seed, dtype)
        forward = bits(case)
        same_bits(case, forward)
        with monkeypatch.context() as patch:
            patch.setenv("PO_KERNELS_CUDA_EMULATE", "backward")
            same_bits(case, forward)


@pytest.mark.parametrize("op", [op for op in LOSSES if op in OPS])
def test_blocks_of_many_rows(op, monkeypatch):
    """Several rows a warp and several warps a block."""
    monkeypatch.setattr(kernels, "_MOST_BLOCKS", 2)
    for seed, dtype in enumerate((torch.float32, torch.float64)):
        options = {"estimator": "dice", "precision_kind": "full", "shared_scale": False}
        case = draw(op, seed, dtype, lead=(37,), dim=5, group=6, **options)
        for reduction in REDUCTIONS:
            agrees(case.with_options(reduction=reduction), BACKEND)
        case = case.with_options(reduction="none")
        assert torch.equal(test_numbers.rows_of(case, 3, 20)(backend=BACKEND), case(backend=BACKEND)[3:20])


@pytest.mark.parametrize("op", [op for op in SAMPLES if op in OPS])
def test_samples_are_those_of_the_cpu(op):
    for seed in range(50):
        case = draw(op, seed)
        found, expected = case(backend=BACKEND), case(backend="native")
        # The same operations, of which a compiler may contract others to fused ones: D of them in a row.
        eps = torch.finfo(torch.float64).eps
        assert distance([found], [expected]) <= (case.terms + 16) * eps * float(expected.abs().max())


def test_a_seed_is_read_when_the_kernel_runs():
    seed = torch.tensor(1)
    mean, log_std = torch.zeros(2, 5), torch.zeros(5)
    first = pk.gaussian_sample(mean, log_std, 3, seed=seed, backend=BACKEND)
    seed.fill_(2)
    second = pk.gaussian_sample(mean, log_std, 3, seed=seed, backend=BACKEND)
    assert not torch.equal(first, second)
    assert torch.equal(second, pk.gaussian_sample(mean, log_std, 3, seed=2, backend=BACKEND))


@pytest.mark.parametrize("op", GAUSSIAN_LOSSES)
def test_an_absent_tangent_is_zero(op):
    case = draw(op, 3, lead=(4,), dim=3, group=5, shared_scale=False, precision_kind="full", estimator="dice")
    inputs, seed = list(case.tensors.values()), torch.tensor(7)
    config = OpConfig("dice", 5, "loo", None, 0.5, "mean", 0)
    row, kernel = contract.OPS[op], kernels.KERNELS[op]
    cotangent = torch.tensor(0.7, dtype=torch.float64)
    for given in range(len(inputs)):
        some = [torch.ones_like(x) if i == given else None for i, x in enumerate(inputs)]
        every = [torch.ones_like(x) if i == given else torch.zeros_like(x) for i, x in enumerate(inputs)]
        results = [
            kernel(row.request(inputs, [seed], tangents, cotangent, tangent, [True] * 4, False, config))
            for tangents, tangent in ((some, None), (every, torch.zeros_like(cotangent)))
        ]
        for found, expected in zip(*results, strict=True):
            assert found is expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_gradients_that_are_not_asked_for_change_no_other(op):
    case = draw(op, 5, lead=(4,), dim=3, group=5, shared_scale=False)
    every = case.inputs
    gradients = torch.autograd.grad(case(*every, backend=BACKEND).sum(), every, materialize_grads=True)
    for index, expected in enumerate(gradients):
        inputs = list(case.tensors.values())
        inputs[index] = inputs[index].clone().requires_grad_()
        (alone,) = torch.autograd.grad(case(*inputs, backend=BACKEND).sum(), inputs[index], materialize_grads=True)
        assert torch.equal(alone, expected)


def test_shapes_beyond_shared_memory_are_refused():
    for op, dim, group in (("gaussian_policy_loss", 3, 20_000), ("mvn_policy_loss", 200, 3), ("mvn_log_prob", 200, 3)):
        options = {"estimator": "dice"} if op in LOSSES else {}
        case = draw(op, 1, torch.float32, lead=(2,), dim=dim, group=group, precision_kind="scalar", **options)
        with pytest.raises(ValueError, match=rf"^{op}: mean: .* shared memory .* got one of {dim} dimensions"):
            case(backend=BACKEND)
    with pytest.raises(ValueError, match=r"shared memory .* 4294967296 samples"):
        pk.gaussian_policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), 1.0, estimator="dice",
                                num_samples=2**32, backend=BACKEND)  # fmt: skip


def test_it_is_never_chosen_unasked():
    assert dispatch.module(BACKEND).unavailable() is None
    for op in OPS:
        assert dispatch.select(op, "cpu", torch.float32, None) != BACKEND
        assert dispatch.select(op, "cpu", torch.float32, BACKEND) == BACKEND


@pytest.mark.parametrize("advantage", sorted(ADVANTAGES))
@pytest.mark.parametrize("op", ["gaussian_surrogate_loss", "mvn_surrogate_loss"])
def test_rewards_among_the_subnormal_numbers(op, advantage):
    test_tiny.test_rewards_of_a_loss(op, BACKEND, advantage)


def test_scales_among_the_subnormal_numbers():
    test_tiny.test_log_std_of_a_subnormal_deviation(BACKEND)
    test_tiny.test_subnormal_scale_tril(BACKEND)


def test_a_scale_that_is_not_finite():
    test_mvn.test_a_scale_that_is_not_finite(BACKEND, float("inf"))


@pytest.mark.parametrize("family", ["gaussian", "mvn"])
def test_sums_over_samples(family):
    """A large number and then small ones, of which a chunk of those held makes less than half the last digit of it."""
    count, small = 200_000, 0.4 / 1000
    large = torch.full((count, 1, 2), small)
    large[0] = 2.0**24
    mean, scale = torch.zeros(1, 2, requires_grad=True), torch.eye(2) if family == "mvn" else torch.zeros(2)
    samples = getattr(pk, f"{family}_sample")(mean, scale, count, seed=1, backend=BACKEND)
    log_prob = getattr(pk, f"{family}_log_prob")(mean, scale, large, backend=BACKEND)
    for value in ((samples * large).sum(), log_prob.sum()):
        (found,) = torch.autograd.grad(value, mean)
        # Of a run of 32 chunks nothing need be left of 32 times 0.4.
        assert (found.double() - 2.0**24 - (count - 1) * small).abs().max() <= 32 * 0.4 + 2


def test_sums_over_rows_of_equal_numbers():
    test_long_sums.test_rows_share_a_precision(BACKEND)
