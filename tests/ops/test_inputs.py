"""Refusals: the error names the op and the argument, on every backend where values decide."""

import re

import pytest
import torch

import po_kernels as pk

from .cases import (
    ADVANTAGES,
    CATEGORICAL,
    GAUSSIAN_LOSSES,
    LOSSES,
    OPS,
    POLICY_LOSSES,
    SAMPLES,
    SURROGATE_LOSSES,
    VALUES,
    draw,
    pairs,
)

NAN, INF = float("nan"), float("inf")


def arguments_of(op: str, **options) -> dict:
    """Good arguments of `op`, two rows of three, by keyword."""
    fixed = {"lead": (2,), "dim": 3, "group": 4, "precision_kind": "full", "shared_scale": False, "mask": False}
    if op in LOSSES:
        options = {"estimator": "dice", "advantage": "loo", "rbf_gamma": None, **options}
    case = draw(op, 0, torch.float32, **fixed, **options)
    if "rewards" in case.tensors:
        case.tensors["rewards"] = torch.randn(4, 2)
    return {**case.tensors, **case.constants, **case.options}


def refused(op: str, argument: str, error: type, changes: dict, base: dict | None = None, **more) -> str:
    arguments = {**(arguments_of(op) if base is None else base), **changes, **more}
    with pytest.raises(error) as raised:
        getattr(pk, op)(**arguments)
    message = str(raised.value)
    assert message.startswith(f"{op}: "), message
    assert re.search(rf"\b{argument}\b", message), message
    return message


@pytest.mark.parametrize(("op", "backend"), pairs(tuple(OPS)))
def test_good_arguments_are_taken(op, backend):
    getattr(pk, op)(**arguments_of(op), backend=backend)


def floating_arguments(op: str) -> list[str]:
    return [name for name, x in arguments_of(op).items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_floating_tensor(op):
    for name in floating_arguments(op):
        good = arguments_of(op)[name]
        refused(op, name, TypeError, {name: good.long()})
        refused(op, name, TypeError, {name: good > 0})
        refused(op, name, TypeError, {name: good.to(torch.complex64)})
        refused(op, name, TypeError, {name: "0.5"})
        if name != "precision":
            refused(op, name, TypeError, {name: good.tolist()})
            if name != "bias":
                refused(op, name, TypeError, {name: None})


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes(op):
    first, *others = floating_arguments(op)
    for name in others:
        good = arguments_of(op)
        refused(op, name, TypeError, {name: good[name].double()})
        refused(op, name, TypeError, {name: good[name].bfloat16()})
    if others:
        with pytest.raises(TypeError, match=rf"^{op}: .*{first}"):
            getattr(pk, op)(**{**arguments_of(op), first: arguments_of(op)[first].double()})


@pytest.mark.parametrize("op", OPS)
def test_mixed_devices(op):
    for name in floating_arguments(op)[1:]:
        refused(op, name, ValueError, {name: arguments_of(op)[name].to("meta")})


WRONG_SHAPES = {
    "mean": [(), (2, 0)],
    "log_std": [(), (2,), (3, 3), (1, 3), (2, 3, 1), (2, 4)],
    "scale_tril": [(), (3,), (2, 3), (3, 3, 3), (2, 3, 2), (1, 3, 3)],
    "target": [(), (3,), (3, 3), (2, 3, 1), (3,)],
    "precision": [(2,), (1,), (3, 1), (2, 2), (1, 3, 3)],
    "logits": [(), (2, 0)],
    "reward_table": [(), (3,), (2, 2), (3, 4), (1, 3, 3)],
    "rewards": [(), (4,), (4, 3), (4, 2, 1), (2, 4)],
    "samples": [(), (2, 3), (4, 3, 3), (4, 2, 2), (5, 2, 3), (4, 2, 3, 1)],
    "value": [(), (3,), (2, 2), (3, 2), (5, 3, 3)],
    "token_ids": [(), (3,), (1,), (2, 1)],
    "hidden": [()],
    "weight": [(), (3,), (0, 5), (3, 4), (1, 3, 5)],
    "bias": [(), (2,), (1,), (3, 1)],
}


@pytest.mark.parametrize("op", OPS)
def test_wrong_shapes(op):
    for name, x in arguments_of(op).items():
        if not isinstance(x, torch.Tensor) or op == "group_advantage":
            continue
        shapes = WRONG_SHAPES.get(name, [])
        if op.startswith("categorical") and name in ("samples", "value", "target"):
            shapes = {"samples": [(), (4,), (4, 3), (5, 2)], "value": [(), (3,), (2, 3)], "target": [(), (3,), (1,)]}[
                name
            ]
        if op == "gae":
            shapes = {"rewards": [()], "values": [(), (4, 2), (5,), (5, 3)], "dones": [(), (4,), (4, 3)]}[name]
        for shape in shapes:
            refused(op, name, ValueError, {name: torch.ones(shape, dtype=x.dtype)})
    if op == "group_advantage":
        refused(op, "rewards", ValueError, {"rewards": torch.tensor(1.0)})
        refused(op, "rewards", ValueError, {"rewards": torch.ones(0, 2)}, kind="none")


@pytest.mark.parametrize("op", LOSSES)
def test_unknown_names(op):
    for name in ("estimator", "advantage", "reduction"):
        for bad in ("", "Mean", "leave-one-out", None, 3):
            refused(op, name, ValueError, {name: bad})
    other = "analytic" if op.startswith("categorical") else "exact"
    refused(op, "estimator", ValueError, {"estimator": other})


def test_unknown_kind_of_advantage():
    for bad in ("", "LOO", None, 3):
        refused("group_advantage", "kind", ValueError, {"kind": bad})


@pytest.mark.parametrize("op", OPS)
def test_unknown_backend(op):
    for bad in ("fast", "", "Native"):
        refused(op, "backend", ValueError, {"backend": bad})


@pytest.mark.parametrize(("op", "backend"), pairs((*LOSSES, "group_advantage")))
def test_a_group_of_one_has_no_leave_one_out_baseline(op, backend):
    if op in POLICY_LOSSES:
        refused(op, "num_samples", ValueError, {"num_samples": 1}, backend=backend)
    elif op == "group_advantage":
        refused(op, "rewards", ValueError, {"rewards": torch.ones(1, 2), "kind": "loo"}, backend=backend)
    else:
        good = arguments_of(op)
        changes = {name: good[name][:1] for name in ("samples", "rewards")}
        refused(op, "rewards", ValueError, changes, backend=backend)


@pytest.mark.parametrize("op", SURROGATE_LOSSES)
def test_no_samples_at_all(op):
    good = arguments_of(op)
    changes = {name: good[name][:0] for name in ("samples", "rewards")}
    for advantage in ADVANTAGES:
        refused(op, "rewards", ValueError, changes, advantage=advantage)


@pytest.mark.parametrize("op", [*POLICY_LOSSES, *SAMPLES])
def test_num_samples(op):
    for bad, error in ((0, ValueError), (-1, ValueError), (2**63, ValueError), (2.0, TypeError), ("4", TypeError),
                       (True, TypeError), (torch.tensor(4.0), TypeError)):  # fmt: skip
        refused(op, "num_samples", error, {"num_samples": bad})
    if op in POLICY_LOSSES:
        refused(op, "num_samples", ValueError, {"num_samples": None})
        closed = "exact" if op.startswith("categorical") else "analytic"
        refused(op, "num_samples", ValueError, {"estimator": closed, "num_samples": 4})


@pytest.mark.parametrize("op", [*POLICY_LOSSES, *SAMPLES])
def test_seed_and_row_offset(op):
    for bad, error in ((2**64, ValueError), (-(2**63) - 1, ValueError), (1.0, TypeError), ("1", TypeError),
                       (True, TypeError), (torch.tensor(1.0), TypeError), (torch.tensor([1]), TypeError)):  # fmt: skip
        refused(op, "seed", error, {"seed": bad})
    for bad, error in ((-1, ValueError), (2**63, ValueError), (0.5, TypeError), ("0", TypeError), (True, TypeError)):
        refused(op, "row_offset", error, {"row_offset": bad})


@pytest.mark.parametrize("op", LOSSES)
def test_numbers_and_flags(op):
    for name in ("entropy_coef", "rbf_gamma"):
        for bad, error in ((NAN, ValueError), (INF, ValueError), (-INF, ValueError), ("0.1", TypeError),
                           (True, TypeError), (1j, TypeError)):  # fmt: skip
            refused(op, name, error, {name: bad})
    refused(op, "entropy_coef", TypeError, {"entropy_coef": None})
    for bad in (1, "yes", None):
        refused(op, "return_stats", TypeError, {"return_stats": bad})


@pytest.mark.parametrize("op", GAUSSIAN_LOSSES)
def test_rbf_gamma_has_no_closed_form(op):
    changes = {"estimator": "analytic", "num_samples": None, "rbf_gamma": 0.5}
    refused(op, "rbf_gamma", ValueError, changes)


BAD_PRECISIONS = [
    0.0, -1.0, torch.tensor(0.0), torch.tensor(-2.0), torch.tensor(NAN), torch.tensor(INF),
    torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, NAN, 1.0]),
    torch.zeros(3, 3), -torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 1.0])), torch.full((3, 3), NAN),
    torch.ones(3, 3) + torch.diag(torch.tensor([-0.5, 0.0, 0.0])),
    torch.eye(3) + torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, NAN]]),
]  # fmt: skip


@pytest.mark.parametrize(("op", "backend"), pairs(GAUSSIAN_LOSSES))
def test_bad_precisions(op, backend):
    for bad in BAD_PRECISIONS:
        for options in ({"estimator": "dice"}, {"estimator": "analytic", "num_samples": None}):
            refused(op, "precision", ValueError, {"precision": bad, **options}, backend=backend)
            if isinstance(bad, torch.Tensor):
                good = {name: x.double() for name, x in arguments_of(op).items() if isinstance(x, torch.Tensor)}
                changes = {**good, "precision": bad.double(), **options}
                refused(op, "precision", ValueError, changes, backend=backend)
    for bad in (NAN, INF):
        refused(op, "precision", ValueError, {"precision": bad}, backend=backend)
    for bad in ("1.0", True, None, [1.0, 1.0, 1.0]):
        refused(op, "precision", TypeError, {"precision": bad}, backend=backend)


@pytest.mark.parametrize(
    ("op", "backend"), pairs(("mvn_policy_loss", "mvn_surrogate_loss", "mvn_log_prob", "mvn_sample"))
)
def test_bad_scale_tril(op, backend):
    good = arguments_of(op)["scale_tril"]
    for row in (0, 1):
        for i, j, entry in ((0, 2, 0.5), (1, 2, -1.0), (0, 0, 0.0), (2, 2, 0.0), (1, 1, -1.0)):
            bad = good.clone()
            bad[row, i, j] = entry
            refused(op, "scale_tril", ValueError, {"scale_tril": bad}, backend=backend)
            refused(op, "scale_tril", ValueError, {"scale_tril": bad[row]}, backend=backend)


LABELS = {name: op.labels for name, op in OPS.items() if op.labels}


@pytest.mark.parametrize(("op", "backend"), pairs(tuple(LABELS)))
def test_labels_out_of_range(op, backend):
    name = LABELS[op]
    good = arguments_of(op)[name]
    for bad in (-1, 3, 2**31, 2**62, -(2**63)):
        for row in (0, -1):
            labels = good.clone()
            labels.view(-1)[row] = bad
            message = refused(op, name, ValueError, {name: labels}, backend=backend)
            # The least integer means a token that is left out to the kernels; what is given is counted as the next.
            named = max(bad, 1 - 2**63) if OPS[op].leaves_out else bad
            assert f"{name}: expected labels from 0 to 2, " in message
            assert message.endswith(f", got {named} in row {row % 2}")
    if op == "categorical_policy_loss":
        labels = torch.tensor([0, 3])
        changes = {name: labels, "estimator": "exact", "num_samples": None}
        refused(op, name, ValueError, changes, backend=backend)


@pytest.mark.parametrize("op", LABELS)
def test_labels_that_are_no_integers(op):
    name = LABELS[op]
    good = arguments_of(op)[name]
    for bad in (good.float(), good > 0, good.tolist(), None):
        refused(op, name, TypeError, {name: bad})
    refused(op, name, ValueError, {name: good.to("meta")})


@pytest.mark.parametrize(("op", "backend"), pairs(CATEGORICAL))
def test_a_row_without_a_class(op, backend):
    logits = arguments_of(op)["logits"].clone()
    logits[1] = -INF
    refused(op, "logits", ValueError, {"logits": logits}, backend=backend)


@pytest.mark.parametrize(("op", "backend"), pairs(VALUES))
def test_one_class_or_one_dimension_is_enough(op, backend):
    assert draw(op, 0, lead=(2,), dim=1, mask=False)(backend=backend).isfinite().all()


@pytest.mark.parametrize(("op", "backend"), pairs(("categorical_surrogate_loss",)))
def test_a_sample_that_the_policy_masks_is_refused(op, backend):
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    with pytest.raises(ValueError, match=rf"{op}: samples: .*mask"):
        pk.categorical_surrogate_loss(logits, torch.tensor([[1], [0]]), torch.zeros(2, 1), backend=backend)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("op", "backend"), pairs(("categorical_sample",)))
def test_no_samples_from_logits_that_are_no_numbers(op, backend, bad):
    with pytest.raises(ValueError, match=rf"{op}: logits: .*row 1"):
        pk.categorical_sample(torch.tensor([[0.0, 1.0], [bad, 0.0]]), 3, backend=backend)


@pytest.mark.parametrize(("op", "backend"), pairs(("gaussian_policy_loss", "gaussian_sample", "categorical_sample")))
def test_more_samples_than_the_counter_has_words_for(op, backend):
    mean = torch.zeros(2, 3)
    arguments = {"gaussian_policy_loss": (mean, mean, mean, 1.0), "gaussian_sample": (mean, mean)}.get(op, (mean,))
    options = {"estimator": "dice"} if op == "gaussian_policy_loss" else {}
    with pytest.raises(ValueError, match=rf"{op}: num_samples: "):
        getattr(pk, op)(*arguments, num_samples=2**58, backend=backend, **options)


@pytest.mark.parametrize("above", [0.9, float("nan")])
@pytest.mark.parametrize(("op", "backend"), pairs(("mvn_log_prob",)))
def test_an_entry_above_the_diagonal_is_judged_by_its_own_rows(op, backend, above):
    tril = torch.tensor([[1e4, above], [0.0, 1e-2]])
    with pytest.raises(ValueError, match=rf"{op}: scale_tril"):
        pk.mvn_log_prob(torch.zeros(2), tril, torch.zeros(2), backend=backend)
