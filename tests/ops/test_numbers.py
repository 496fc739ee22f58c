"""Bits that repeat, values at the edges of what a dtype holds, and the layouts and callers there may be."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import po_kernels as pk
from po_kernels.backends.contract import OPS

from . import bounds
from .bounds import agrees
from .cases import (
    DIFFERENTIABLE,
    ESTIMATORS,
    GAUSSIAN_LOSSES,
    LOSSES,
    POLICY_LOSSES,
    REDUCTIONS,
    VALUES,
    Case,
    cotangent_like,
    derivatives,
    distance,
    draw,
    fused,
    fused_pairs,
    pairs,
    repeats_second_order,
    serving,
)

# The axis of each argument that counts rows; log_prob's `value` is drawn with one dimension more, in front.
ROW_AXIS = {
    "mean": 0, "log_std": 0, "scale_tril": 0, "target": 0, "logits": 0, "rewards": 1, "samples": 1, "value": 1,
    "token_ids": 0, "hidden": 0, "values": 1, "dones": 1,
}  # fmt: skip


def bits_equal(found: dict, expected: dict) -> bool:
    return all(torch.equal(x, y) for order in expected for x, y in zip(found[order], expected[order], strict=True))


def drawn(op: str, seed: int, rows: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    # Of odd sizes the matrix products of a linear head have other bits at another place of a chunk.
    dim, group = (64, 15) if op.startswith("linear") else (5, 4)
    fixed = {"lead": (rows,), "dim": dim, "group": group, "shared_scale": False}
    return draw(op, seed, dtype, **fixed, **options)


def evaluated(case: Case, backend: str) -> dict:
    return derivatives(case, backend, second=repeats_second_order(case))


@pytest.mark.parametrize(("op", "backend"), fused_pairs(DIFFERENTIABLE))
def test_the_same_bits_again_and_with_any_number_of_threads(op, backend):
    for seed in range(4):
        case = drawn(op, seed, 700)
        torch.set_num_threads(2)
        first = evaluated(case, backend)
        assert bits_equal(evaluated(case, backend), first), case
        torch.set_num_threads(1)
        assert bits_equal(evaluated(case, backend), first), case


def with_value_of_two(case: Case) -> Case:
    """A log_prob case whose value is (2, B, ...)."""
    if "value" in case.tensors:
        value = torch.randn(2, *case.tensors["mean"].shape).to(case.tensors["mean"].dtype)
        return replace(case, tensors={**case.tensors, "value": value})
    return replace(case, constants={"value": torch.zeros(2, case.tensors["logits"].shape[0], dtype=torch.int64)})


def rows_of(case: Case, start: int, stop: int) -> Case:
    def part(tensors):
        return {
            name: x.narrow(ROW_AXIS[name], start, stop - start) if name in ROW_AXIS else x
            for name, x in tensors.items()
        }

    options = dict(case.options)
    if "row_offset" in options:
        options["row_offset"] += start
    return replace(case, tensors=part(case.tensors), constants=part(case.constants), options=options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("op", "backend"), fused_pairs((*LOSSES, *VALUES)))
def test_a_row_does_not_depend_on_its_batch(op, backend, dtype):
    for seed in range(12):
        case = drawn(op, seed, 37, dtype)
        if op in LOSSES:
            case = case.with_options(reduction="none")
        elif "value" in OPS[op].axes:
            case = with_value_of_two(case)

        def rows(case):
            """The value and the gradients of the row inputs, rows first."""
            inputs = case.inputs
            value = case(*inputs, backend=backend)
            gradients = torch.autograd.grad(value.sum(), inputs)
            named = [(g, ROW_AXIS.get(name)) for name, g in zip(case.tensors, gradients, strict=True)]
            named.append((value.detach(), max(OPS[op].value.find("B"), 0)))
            return [x.movedim(axis, 0) for x, axis in named if axis is not None]

        whole = rows(case)
        for start, stop in ((0, 1), (3, 20), (36, 37)):
            for found, expected in zip(rows(rows_of(case, start, stop)), whole, strict=True):
                assert torch.equal(found, expected[start:stop]), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("log_std", [-20.0, 10.0])
@pytest.mark.parametrize(
    ("op", "backend"), fused_pairs(("gaussian_policy_loss", "gaussian_log_prob", "gaussian_sample"))
)
def test_extreme_log_std(op, backend, log_std, dtype):
    for seed in range(12):
        options = {"rbf_gamma": None} if op in LOSSES else {}
        case = draw(op, seed, dtype, lead=(3,), dim=4, group=3, **options)
        tensors = dict(case.tensors)
        # Around zero a sample and its reward keep all digits of the noise, however small σ.
        tensors["mean"] = torch.zeros_like(tensors["mean"])
        if "target" in tensors:
            tensors["target"] = torch.zeros_like(tensors["target"])
        tensors["log_std"] = torch.full_like(tensors["log_std"], log_std)
        if "value" in tensors:
            tensors["value"] = tensors["value"] * torch.tensor(log_std, dtype=dtype).exp()
        agrees(replace(case, tensors=tensors), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("op", "backend"), pairs(("categorical_policy_loss", "categorical_surrogate_loss")))
def test_extreme_and_masked_logits(op, backend, dtype):
    inf = float("inf")
    logits = torch.tensor(
        [[1e4, -1e4, 0.0, 3.0], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, 1e4, 1e4], [-inf, 2.0, -inf, -1e4],
         [-inf, -inf, -inf, 7.0], [-inf, 1.0, 2.0, 3.0]], dtype=dtype
    )  # fmt: skip
    for seed in range(12):
        case = draw(op, seed, dtype, lead=(6,), dim=4, group=3, mask=False)
        constants = {name: torch.full_like(x, 3) for name, x in case.constants.items()}
        case = replace(case, tensors={**case.tensors, "logits": logits}, constants=constants)
        if backend == "reference":
            evaluated(case, backend)
        else:
            agrees(case, backend)


@pytest.mark.parametrize("backend", serving("categorical_policy_loss"))
def test_a_masked_class_has_no_derivative(backend):
    logits = torch.tensor([[0.3, float("-inf"), 1.2]], requires_grad=True)
    table = torch.randn(3, 3, requires_grad=True)
    for options in ({}, {"estimator": "dice", "num_samples": 8, "seed": 1}):
        loss = pk.categorical_policy_loss(
            logits, torch.tensor([0]), table, entropy_coef=0.5, backend=backend, **options
        )
        for_logits, for_table = torch.autograd.grad(loss, (logits, table), create_graph=True)
        (second,) = torch.autograd.grad((for_logits * torch.tensor([1.0, 5.0, 2.0])).sum(), logits)
        assert for_logits[0, 1] == 0
        assert second[0, 1] == 0
        assert (for_table[1] == 0).all()
        assert second.isfinite().all()


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
@pytest.mark.parametrize(("op", "backend"), pairs(DIFFERENTIABLE))
def test_no_rows(op, backend, lead):
    for seed in range(6):
        for reduction in REDUCTIONS if op in LOSSES else (None,):
            case = draw(op, seed, lead=lead, dim=3, group=3)
            if reduction:
                case = case.with_options(reduction=reduction)
            inputs = case.inputs
            output = case(*inputs, backend=backend)
            if reduction:
                assert output.shape == (lead if reduction == "none" else ())
            assert output.requires_grad
            assert (output == 0).all()
            first = torch.autograd.grad(output.sum(), inputs, materialize_grads=True)
            for x, g in zip(inputs, first, strict=True):
                assert torch.equal(g, torch.zeros_like(x))
            results = evaluated(case, backend)
            for x, g in zip(inputs, results.get("second", ()), strict=False):
                assert torch.equal(g, torch.zeros_like(x))


LAYOUTS = {
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.ndim else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim else x,
    "offset": lambda x: torch.cat([x[:1], x])[1:] if x.ndim else x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "backend"), pairs(DIFFERENTIABLE))
def test_layouts(op, backend, layout):
    change = LAYOUTS[layout]
    for seed in range(6):
        case = draw(op, seed, lead=(3, 2), dim=4, group=3)
        results = []
        for function in (lambda x: x, change):
            inputs = case.inputs
            moved = replace(case, constants={name: function(x) for name, x in case.constants.items()})
            output = moved(*map(function, inputs), backend=backend)
            results.append([output, *torch.autograd.grad(output.sum(), inputs, materialize_grads=True)])
        for found, expected in zip(*results, strict=True):
            assert torch.allclose(found, expected, rtol=1e-13, atol=1e-14), case


@pytest.mark.parametrize(("op", "backend"), pairs(LOSSES))
def test_expanded_inputs(op, backend):
    """One row, repeated without a copy, in first and second order."""
    for seed in range(6):
        estimator = ("dice", ESTIMATORS[op][0])[seed % 2 if op in POLICY_LOSSES else 0]
        case = draw(op, seed, lead=(5,), dim=3, group=3, shared_scale=False, mask=False, estimator=estimator)
        name = next(iter(case.tensors))
        others = list(case.tensors.values())[1:]
        results = []
        for copy in (False, True):
            row = case.tensors[name][:1].clone().requires_grad_()
            repeated = row.expand(5, *row.shape[1:])
            output = case(repeated.contiguous() if copy else repeated, *others, backend=backend).sum()
            (first,) = torch.autograd.grad(output, row, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), row)
            results.append([output, first, second])
        for found, expected in zip(*results, strict=True):
            assert torch.allclose(found, expected, rtol=1e-13, atol=1e-14), case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "backend"), pairs(LOSSES))
def test_half_precision_is_computed_in_float32(op, backend, dtype):
    for seed in range(8):
        half = draw(op, seed, lead=(4,), dim=3, group=3, precision_kind=("scalar", "diagonal")[seed % 2]).to(dtype)
        right = bounds.expected(half.to(torch.float32), seed, second=False)
        inputs = half.inputs
        loss = half(*inputs, backend=backend)
        assert loss.dtype == torch.float32
        assert distance([loss], right.exact["value"]) <= right.bound("value", 0)
        gradients = torch.autograd.grad(loss, inputs, cotangent_like(loss, seed), materialize_grads=True)
        for index, (found, exact) in enumerate(zip(gradients, right.exact["first"], strict=True)):
            assert found.dtype == dtype
            # Rounded once to the half precision, where it may be subnormal.
            info = torch.finfo(dtype)
            rounding = info.eps / 2 * exact.abs() + info.tiny * info.eps
            assert ((found.double() - exact).abs() <= rounding + right.bound("first", index)).all(), half


@pytest.mark.parametrize(("op", "backend"), pairs(DIFFERENTIABLE))
def test_inputs_are_never_written_to(op, backend):
    for seed in range(6):
        case = draw(op, seed, lead=(4,), dim=3, group=3)
        tensors = [*case.tensors.values(), *case.constants.values()]
        before = [x.clone() for x in tensors]
        inputs = [x.requires_grad_() for x in case.tensors.values()]
        output = case(*inputs, backend=backend)
        cotangent = torch.ones_like(output).requires_grad_()
        first = torch.autograd.grad(output, inputs, cotangent, create_graph=True, materialize_grads=True)
        if repeats_second_order(case):
            torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)
        for x, y in zip(tensors, before, strict=True):
            assert torch.equal(x, y)
            assert x._version == 0
        assert torch.equal(cotangent, torch.ones_like(cotangent))


@pytest.mark.parametrize(("op", "backend"), fused_pairs(LOSSES))
def test_two_threads_at_once(op, backend):
    torch.set_num_threads(2)
    cases = [drawn(op, seed, 700) for seed in range(8)]
    expected = [evaluated(case, backend) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for found, right in zip(pool.map(lambda case: evaluated(case, backend), cases * 4), expected * 4, strict=True):
            assert bits_equal(found, right)


class Losses(torch.utils.data.Dataset):
    def __init__(self, cases: list[Case], backend: str):
        self.cases, self.backend = cases, backend

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return [x for order in evaluated(self.cases[index], self.backend).values() for x in order]


# From Python 3.12 on a fork is warned of wherever the process has threads, which is what is tried here.
FORK = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@FORK
@pytest.mark.parametrize(("op", "backend"), fused_pairs(("gaussian_policy_loss", "categorical_policy_loss")))
def test_a_forked_worker_after_threads_were_used(op, backend):
    torch.set_num_threads(2)
    data = Losses([drawn(op, seed, 700, estimator="dice") for seed in range(3)], backend)
    expected = [data[index] for index in range(3)]
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=120
    )
    for found, right in zip(loader, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


def forward_in_child(case: Case, backend: str, expected: torch.Tensor) -> None:
    assert torch.equal(case(backend=backend), expected)


@FORK
@pytest.mark.parametrize("backend", fused("gaussian_policy_loss"))
def test_a_forked_child_may_use_threads_too(backend):
    torch.set_num_threads(2)
    case = drawn("gaussian_policy_loss", 0, 700, estimator="dice")
    expected = case(backend=backend)
    process = multiprocessing.get_context("fork").Process(target=forward_in_child, args=(case, backend, expected))
    process.start()
    process.join(60)
    exitcode = process.exitcode
    process.kill()
    assert exitcode == 0, "the child hangs" if exitcode is None else "the child failed"
    assert torch.equal(case(backend=backend), expected)


@pytest.mark.parametrize(("op", "backend"), fused_pairs(GAUSSIAN_LOSSES))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 5),
    dim=st.integers(1, 19),
    group=st.integers(2, 6),
    step=st.integers(1, 3),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    log_std=st.floats(-8, 3, width=32),
    seed=st.integers(-(2**63), 2**64 - 1),
    row_offset=st.integers(0, 2**40),
    estimator=st.sampled_from(["analytic", "reparam", "dice"]),
)
def test_any_shape_stride_and_value(op, backend, rows, dim, group, step, scale, log_std, seed, row_offset, estimator):
    case = draw(op, rows + 7 * dim, lead=(rows,), dim=dim, group=group, estimator=estimator, rbf_gamma=None)
    if estimator != "analytic":
        case = case.with_options(seed=seed, row_offset=row_offset, num_samples=group)
    tensors = dict(case.tensors)
    tensors["mean"] = (tensors["mean"] * scale).repeat_interleave(step, 0)[::step]
    if "log_std" in tensors:
        tensors["log_std"] = tensors["log_std"] + log_std
    else:
        tensors["scale_tril"] = tensors["scale_tril"] * torch.tensor(log_std, dtype=torch.float64).exp()
    # Far from the target, rewards of millions have a spread of some thousands: in their deviation the rounding of each
    # is magnified, which moving the inputs does not show.
    agrees(replace(case, tensors=tensors), backend, factor=16)
