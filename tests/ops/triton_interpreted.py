"""The Triton kernels in the interpreter, against the reference: `test_triton` runs this in a process of its own."""

import pytest
import torch
import triton

import po_kernels as pk
from po_kernels import dispatch
from po_kernels.backends.contract import OPS
from po_kernels.backends.triton import categorical, launch, rescale, token

from . import bounds, test_long_sums, test_numbers, test_tiny, test_token, test_token_pitfalls
from .cases import (
    ADVANTAGES,
    ESTIMATORS,
    LOSSES,
    PRECISIONS,
    REDUCTIONS,
    VALUES,
    Case,
    derivatives,
    draw,
)
from .test_contract import compiled_agrees, small_cases, transforms_agree
from .test_derivatives import agrees_with_oracle, scored

BACKEND = "triton"
SERVED = dispatch.module(BACKEND).KERNELS


def agrees(case: Case, seed: int = 0) -> None:
    bounds.agrees(case, BACKEND, seed)


def variants(op: str) -> list[dict]:
    """Options of a loss: each estimator, and dice, whose kernels are those of reinforce, with each advantage.

    Both Gaussian policies have one kernel, and of mvn two advantages will do.
    """
    kinds = {"reparam": ("loo",), "dice": ("loo", "standardized") if op.startswith("mvn") else ADVANTAGES}
    return [
        {"estimator": estimator, "advantage": kind}
        for estimator in ESTIMATORS[op]
        if estimator != "reinforce"
        for kind in kinds.get(estimator, ("none",))
    ]


@pytest.mark.parametrize("op", LOSSES)
def test_losses(op, monkeypatch):
    monkeypatch.setattr(launch, "_SMALLEST_TILE", 32)  # the last of several blocks has fewer rows than others
    for number, options in enumerate(variants(op)):
        dtype = (torch.float64, torch.float32)[number % 2]
        turn = {"reduction": REDUCTIONS[number % 3], "precision_kind": PRECISIONS[(number + 1) % 3]}
        # Where classes are masked all samples may be of one, and the derivatives of their advantages cancel.
        agrees(draw(op, number, dtype, lead=(3,), dim=2 + number % 3, group=3, mask=number == 0, **turn, **options))


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_group_advantage(kind):
    for gamma in (None, 0.3):
        agrees(draw("group_advantage", 1, lead=(3,), group=5, kind=kind, rbf_gamma=gamma))


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("op", ["gaussian_policy_loss", "mvn_policy_loss"])
def test_precisions(op, kind):
    """Of dice `test_losses` has each."""
    for estimator in ("analytic", "reparam"):
        agrees(draw(op, 1, lead=(3,), dim=3, group=3, precision_kind=kind, estimator=estimator, reduction="mean"))


@pytest.mark.parametrize("op", [op for op in VALUES if op in SERVED])
def test_values(op):
    options = {"chunk_rows": 2} if "chunk_rows" in OPS[op].options else {}
    for seed in range(3):
        agrees(draw(op, seed, (torch.float64, torch.float32)[seed % 2], dim=1 + 2 * seed, **options), seed)


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_tokens_in_blocks(softcap, monkeypatch):
    """Of columns, the first of them masked in one row; and half precision read as it lies."""
    monkeypatch.setattr(token, "_LARGEST_BLOCK", 4)
    case = draw("token_log_prob", 2, lead=(3,), dim=11, mask=False, softcap=softcap, ignore_index=None)
    case.tensors["logits"][1, :5] = -float("inf")
    case.constants["token_ids"][:] = torch.tensor([2, 9, 10])
    agrees(case)
    if softcap is None:
        half = case.to(torch.bfloat16)
        found, right = (derivatives(half, backend, second=False) for backend in (BACKEND, "reference"))
        for order in right:
            for x, y in zip(found[order], right[order], strict=True):
                assert x.dtype == y.dtype
                assert torch.allclose(x.float(), y.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of numpy, as the hardware does silently
def test_tokens_far_apart():
    test_token.test_large_logits(BACKEND)
    test_token.test_logits_as_far_apart_as_numbers_can_be(BACKEND)
    test_token_pitfalls.test_rows_beyond_what_32_bits_address(BACKEND)


def in_chunks_of_two(group: int, dim: int, *_: object, **__: object) -> launch.Tile:
    block_d, whole = (triton.next_power_of_2(size) for size in (dim, group))
    return launch.Tile(1, min(2, whole), max(1, whole // 2), max(4, block_d), 1)


@pytest.mark.parametrize("op", [op for op in LOSSES if "categorical" not in op])
def test_groups_in_chunks_and_programs_of_many_blocks(op, monkeypatch):
    for name in ("tile", "drawn_tile"):
        monkeypatch.setattr(launch, name, in_chunks_of_two)
    monkeypatch.setattr(launch, "_USUAL_PROGRAMS", 2)
    options = {"precision_kind": "full", "advantage": "standardized", "estimator": "dice", "reduction": "mean"}
    agrees(draw(op, 2, lead=(3,), dim=2, group=3, **options))
    if op == "gaussian_policy_loss":
        agrees(draw(op, 2, lead=(3,), dim=2, group=3, **{**options, "estimator": "reparam", "reduction": "none"}))


@pytest.mark.parametrize("op", ["gaussian_log_prob", "mvn_log_prob", "gaussian_sample", "mvn_sample"])
def test_values_in_chunks(op, monkeypatch):
    for name in ("tile", "drawn_tile"):
        monkeypatch.setattr(launch, name, in_chunks_of_two)
    for seed in range(2):
        agrees(draw(op, seed, lead=(2,), dim=3, group=5), seed)


def test_a_precision_of_many_dimensions():
    """Its gradient is summed in memory."""
    options = {"precision_kind": "full", "estimator": "dice", "advantage": "loo", "reduction": "mean"}
    agrees(draw("gaussian_policy_loss", 1, lead=(2,), dim=65, group=2, **options))


@pytest.mark.parametrize("op", LOSSES)
def test_dice_has_the_derivatives_of_the_oracle(op):
    agrees_with_oracle(scored(op, 1, "dice", advantage="loo", precision_kind="full"), BACKEND, 1, second=True)


@pytest.mark.parametrize("op", ["gaussian_policy_loss", "group_advantage"])
def test_transforms(op):
    ((seed, case),) = small_cases(op, 1)
    transforms_agree(case, BACKEND, seed)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    options = {"estimator": "dice", "advantage": "loo", "reduction": "mean", "rbf_gamma": None}
    compiled_agrees(draw("gaussian_policy_loss", 1, lead=(3,), dim=2, group=3, **options), BACKEND, "aot_eager")


@pytest.mark.parametrize("op", [*LOSSES, "mvn_log_prob"])
def test_a_row_does_not_depend_on_its_batch(op):
    options = {"reduction": "none", "estimator": "dice"} if op in LOSSES else {}
    case = draw(op, 3, torch.float32, lead=(7,), dim=3, group=3, shared_scale=False, **options)
    if op not in LOSSES:
        case = test_numbers.with_value_of_two(case)
    whole, part = (each(backend=BACKEND) for each in (case, test_numbers.rows_of(case, 2, 5)))
    assert torch.equal(part, whole[..., 2:5])


@pytest.mark.parametrize(
    "op", ["gaussian_policy_loss", "mvn_surrogate_loss", "categorical_log_prob", "group_advantage"]
)
def test_no_rows(op):
    test_numbers.test_no_rows(op, BACKEND, (2, 0, 3))


@pytest.mark.parametrize("layout", test_numbers.LAYOUTS)
def test_layouts(layout):
    test_numbers.test_layouts("gaussian_surrogate_loss", BACKEND, layout)


def test_expanded_inputs():
    test_numbers.test_expanded_inputs("gaussian_policy_loss", BACKEND)


def test_extreme_and_masked_logits():
    inf = float("inf")
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [-inf, 2.0, -1e4], [-inf, -inf, 7.0]])
    case = draw("categorical_policy_loss", 1, torch.float32, lead=(4,), dim=3, group=3, estimator="dice", mask=False)
    case.tensors["logits"] = logits
    agrees(case)


def test_a_row_that_is_not_a_number_stays_in_its_part_of_the_table():
    """Of 16 classes and more the table's gradient is a matrix product, which would spread it."""
    logits, target = torch.randn(5, 17), torch.tensor([0, 3, 3, 16, 7])
    logits[1, 2] = float("nan")
    gradients = {}
    for backend in ("reference", BACKEND):
        table = torch.linspace(-1, 1, 17 * 17).reshape(17, 17).requires_grad_()
        loss = pk.categorical_policy_loss(logits, target, table, entropy_coef=0.5, reduction="sum", backend=backend)
        (gradients[backend],) = torch.autograd.grad(loss, table)
    assert gradients[BACKEND][:, 3].isnan().all()
    torch.testing.assert_close(gradients[BACKEND], gradients["reference"], equal_nan=True)


def test_numbers_among_the_subnormal_ones():
    test_tiny.test_standardized(BACKEND, torch.float32)
    test_tiny.test_second_derivative_of_standardized(BACKEND)
    test_tiny.test_statistics_of_tiny_rewards_by_enumeration(BACKEND)
    test_tiny.test_log_std_of_a_subnormal_deviation(BACKEND)
    test_tiny.test_subnormal_scale_tril(BACKEND)
    test_tiny.test_rewards_of_a_loss("gaussian_surrogate_loss", BACKEND, "standardized")


def test_vocabularies():
    test_long_sums.test_classes(BACKEND, 151_936)


# A large number and then small ones, each less than half the last digit of the sum: an accumulator of float32 loses all
# of them, one of a run of four tiles those three. Memory is for one program, so that runs do not end with it.
LARGE, SMALL, COUNT = 2.0**24, 0.4, 30
LEFT_OUT = 3 * 2 * SMALL + 2  # a tile has two, and the result is rounded to an even number


@pytest.fixture
def short_runs(monkeypatch):
    for name in ("tile", "drawn_tile"):
        monkeypatch.setattr(launch, name, in_chunks_of_two)
    for module in (launch, categorical):
        monkeypatch.setattr(module, "RUN", 4)
    monkeypatch.setattr(launch, "_MOST_SUMS", 1)


def one_and_then_many() -> torch.Tensor:
    return torch.tensor([LARGE, *[SMALL] * (COUNT - 1)])


def has_all_terms(found: torch.Tensor, sum_of: torch.Tensor) -> None:
    assert (found.double() - sum_of.double().sum()).abs().max() <= LEFT_OUT


@pytest.mark.usefixtures("short_runs")
def test_sums_over_chunks():
    mean, zero = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1)
    root = torch.ones(1, 1, 1, requires_grad=True)
    large = one_and_then_many().reshape(COUNT, 1, 1)
    (found,) = torch.autograd.grad(pk.gaussian_log_prob(mean, zero, large, backend=BACKEND).sum(), mean)
    has_all_terms(found, large)
    (found,) = torch.autograd.grad((pk.gaussian_sample(mean, zero, COUNT, seed=1, backend=BACKEND) * large).sum(), mean)
    has_all_terms(found, large)
    value = (large + 1).sqrt()
    (found,) = torch.autograd.grad(pk.mvn_log_prob(zero, root, value, backend=BACKEND).sum(), root)
    has_all_terms(found, value.double().square() - 1)


@pytest.mark.usefixtures("short_runs")
def test_sums_over_rows():
    target = one_and_then_many().sqrt().unsqueeze(-1)
    precision = torch.tensor(1.0, requires_grad=True)
    zero = torch.zeros(COUNT, 1)
    loss = pk.gaussian_policy_loss(zero, zero - 20, target, precision, reduction="sum", backend=BACKEND)
    has_all_terms(loss, target.double().square())
    (found,) = torch.autograd.grad(loss, precision)
    has_all_terms(found, target.double().square())


@pytest.mark.usefixtures("short_runs")
def test_samples_of_one_class():
    logits, labels = torch.zeros(1, 2, requires_grad=True), torch.ones(COUNT, 1, dtype=torch.int64)
    rewards = 2 * COUNT * one_and_then_many().unsqueeze(-1)
    loss = pk.categorical_surrogate_loss(logits, labels, rewards, advantage="none", backend=BACKEND)
    (found,) = torch.autograd.grad(loss, logits)
    has_all_terms(-found[:, 1], rewards / (2 * COUNT))


@pytest.mark.parametrize("factor", [1.0, -2.5, float("nan")])
def test_gradients_times_a_cotangent(factor):
    tensors = [torch.randn(shape) for shape in ((7,), (70, 70), (), (3,), (2, 5))]
    right = [factor * x for x in tensors]
    rescale.in_place(tensors, torch.tensor(factor))
    assert all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(tensors, right, strict=True))
