"""The table of ops, which code reads, against what it stands for elsewhere: C++, torch, the signatures."""

import inspect
import operator
import subprocess
import sys
from functools import reduce

import pytest
import torch

import po_kernels as pk
from po_kernels import dispatch, extension
from po_kernels.backends.advantages import ADVANTAGES
from po_kernels.backends.contract import ESTIMATORS, OPS, REDUCTIONS, REFUSALS, OpConfig, Request
from po_kernels.backends.native import network
from po_kernels.ops import _modes

from .cases import draw, serving


def numbers(table):
    return {name: getattr(entry, "number", entry) for name, entry in table.items()}


def test_numbers_are_those_of_the_extension():
    if extension.module is None:
        assert extension.missing
        return
    expected = {
        "Estimator": ESTIMATORS, "Advantage": ADVANTAGES, "Reduction": REDUCTIONS, "Refusal": REFUSALS,
        "Head": network.HEADS, "Activation": network.ACTIVATIONS, "Spread": network.SPREADS, "Rule": network.RULES,
    }  # fmt: skip
    assert extension.module.enums() == {name: numbers(table) for name, table in expected.items()}


@pytest.mark.parametrize("table", [ADVANTAGES, REDUCTIONS, REFUSALS])
def test_numbers_are_unique(table):
    assert len(set(numbers(table).values())) == len(table)


@pytest.mark.parametrize("name", _modes.PRIVATE)
def test_private_symbols_of_torch(name):
    assert reduce(getattr, name.split(".")[1:], torch) is not None


def test_functions_that_torch_compile_asks_once():
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked) == vars(_modes.asked_once(lambda: None)) == {"_dynamo_marked_constant": True}


def test_dynamo_is_not_imported_before_it_is_used():
    program = "import sys, po_kernels; assert not {'torch._dynamo', 'triton', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_private_symbols_are_all_listed():
    """What `_modes` takes from torch and begins with an underscore."""
    source = inspect.getsource(_modes)
    for found in ("torch._C._functorch.", "torch._C._are", "torch._C._len", "forward_ad._", "x._"):
        assert source.count(found) >= 1
    assert source.count("torch._C.") == 2 * sum(name.startswith("torch._C.") for name in _modes.PRIVATE)


@pytest.mark.parametrize("op", OPS)
def test_shapes_of_the_table(op):
    """The value of a call, on rows flattened to one axis, has the shape that the table says."""
    row = OPS[op]
    case = draw(op, 1, lead=(3,), dim=2, group=4, shared_scale=False, mask=False)
    names = {"log_std": "scale", "scale_tril": "scale"}
    tensors = {names.get(name, name): x for name, x in {**case.tensors, **case.constants}.items()}
    inputs = row.Inputs(*(tensors[name] for name in row.Inputs._fields))
    constants = row.Constants(*(tensors.get(name) for name in row.Constants._fields))
    inputs, constants = (
        type(named)(*(flat(x, row.axes[name]) for name, x in zip(named._fields, named, strict=True)))
        for named in (inputs, constants)
    )
    for reduction in REDUCTIONS if row.is_loss else ("none",):
        config = OpConfig(num_samples=4, reduction=reduction)
        found = case.with_options(reduction=reduction)() if row.is_loss else case()
        shape = row.value_shape(inputs, constants, config)
        if row.knows:  # more than is returned
            shape = (3, *shape[1:])
        assert shape == tuple(flat(found, row.value).shape)
    for tensor, axis in row.places.values():
        assert getattr(inputs if tensor in inputs._fields else constants, tensor).ndim > axis


def flat(x, letters):
    """N in place of any axes before those of a row."""
    if x is None or "N" not in letters:
        return x
    return x.reshape(-1, *x.shape[x.ndim - len(letters) + 1 :])


def test_an_op_that_a_backend_lacks(monkeypatch):
    """Automatic dispatch goes on to the next backend; asked for by name it says which op is missing."""
    names = [*serving("gaussian_policy_loss")[1:], "reference"]
    case = draw("gaussian_policy_loss", 1, torch.float32, lead=(4,), dim=2)
    for name in names[:-1]:
        monkeypatch.delitem(dispatch.module(name).KERNELS, "gaussian_policy_loss")
        monkeypatch.setattr(dispatch, "_decisions", {})
        with pytest.raises(RuntimeError, match=rf"{name}.*it has no kernel for gaussian_policy_loss"):
            case(backend=name)
        expected = names[names.index(name) + 1]
        case(backend=None)
        decision = dispatch.decisions()["gaussian_policy_loss", "cpu", torch.float32]
        assert decision.backend == expected
        assert decision.refused[name] == "it has no kernel for gaussian_policy_loss"


def test_second_order_by_the_reference(monkeypatch):
    """A backend that has first order only is not asked for more."""
    calls = []

    def first(request: Request):
        calls.append(request.tangents)
        return dispatch.module("reference").KERNELS["group_advantage"](request)

    backend = dispatch.module("numba")
    monkeypatch.setattr(backend, "KERNELS", {"group_advantage": first}, raising=False)
    monkeypatch.setattr(backend, "FIRST_ORDER_ONLY", "for a test", raising=False)
    dispatch.kernel.cache_clear()
    try:
        case = draw("group_advantage", 3, lead=(3,), group=4)
        rewards = case.inputs[0]
        found, expected = (
            torch.func.hessian(lambda r, name=name: case(r, backend=name).square().sum())(rewards)
            for name in ("numba", "reference")
        )
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)  # the same operations
        assert calls
        assert not any(calls)
        assert pk.status()["second_order"]["numba"] == "for a test"
    finally:
        dispatch.kernel.cache_clear()


def test_signatures_have_the_names_of_the_table():
    for op, row in OPS.items():
        parameters = inspect.signature(getattr(pk, op)).parameters
        scale = {"gaussian": "log_std", "mvn": "scale_tril"}.get(op.split("_")[0])
        for name in set(row.axes) - {"known"}:
            assert (scale if name == "scale" else name) in parameters, (op, name)
        assert operator.contains(parameters, "backend")
