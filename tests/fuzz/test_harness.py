"""The harness finds faults that are planted, and prints code that shows them."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from po_kernels import dispatch
from po_kernels.ops import _autograd, _library, _modes

from .calls import FaultError, calls

# The first fault ends a search. What is drawn depends on which modules are loaded: hypothesis uses their constants.
EXAMPLES = 1000
pytestmark = pytest.mark.slow


def shown(op, transform=None):
    """What a fault in `op` is printed as, if random calls find it."""

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    @given(calls(op, "native", transform))
    def run(call):
        call.check()

    with pytest.raises(FaultError) as caught:
        run()
    return str(caught.value).split("\n\n")


def rerun(code):
    lines = code.splitlines()
    assert len(lines) <= 10
    exec(compile(code, "reproduction", "exec"), {})


def plant(monkeypatch, change):
    """`change` takes what a kernel is asked for and what it returns, and returns what is wrong."""
    right = dispatch.kernel

    def kernel(op, name):
        found = right(op, name)
        return (lambda request: change(request, list(found(request)))) if name == "native" else found

    monkeypatch.setattr(dispatch, "kernel", kernel)


def a_gradient_off_by_a_thousandth(request, found):
    return [*found[:2], *(None if g is None else g * (1 + 1e-3) for g in found[2:])]


def a_product_off_by_a_thousandth(request, found):
    return found if request.tangents is None else a_gradient_off_by_a_thousandth(request, found)


def memory_that_is_not_written(request, found):
    """The last row's gradient."""
    for g in found[2:3]:
        if g is not None and g.ndim > 1 and g.shape[0] > 1:
            g[-1:] = torch.empty_like(g[-1:])
    return found


def a_nan_where_squares_vanish(request, found):
    rewards = request.inputs.rewards
    vanish = rewards.numel() and rewards.abs().amax().square() < torch.finfo(torch.float32).tiny
    return [x if x is None or not vanish else x * float("nan") for x in found]


def an_input_that_is_written(request, found):
    request.inputs[0].mul_(1.5)
    return found


def a_float32_in_between(request, found):
    return [x if x is None else x.float().to(x.dtype) for x in found]


PLANTED = {
    "gaussian_policy_loss": (
        a_gradient_off_by_a_thousandth, a_product_off_by_a_thousandth, memory_that_is_not_written,
        an_input_that_is_written, a_float32_in_between,
    ),
    "categorical_surrogate_loss": (a_gradient_off_by_a_thousandth,),
    "group_advantage": (a_float32_in_between, a_nan_where_squares_vanish),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(torch_state):
    torch.set_num_threads(1)


def found_and_gone(monkeypatch, op, transform=None):
    what, code = shown(op, transform)
    with pytest.raises(FaultError):
        rerun(code)
    monkeypatch.undo()
    rerun(code)
    return what, code


@pytest.mark.parametrize(("op", "change"), [(op, change) for op, changes in PLANTED.items() for change in changes])
def test_faults_of_a_kernel(op, change, monkeypatch):
    plant(monkeypatch, change)
    found_and_gone(monkeypatch, op)


def test_a_sign_that_is_not_in_memory(monkeypatch):
    monkeypatch.setattr(_modes, "resolved", lambda x: x)
    monkeypatch.setattr(_library._modes, "may_call_directly", lambda *tensors: not _modes.transforms_active())
    _, code = found_and_gone(monkeypatch, "gaussian_log_prob")
    assert "negated" in code


def test_a_graph_that_is_used_up(monkeypatch):
    """The gradients of the forward pass are handed out twice, multiplied in place."""
    right = _autograd._PlainValue.backward

    def backward(ctx, cotangent, *others):
        known = ctx.__dict__.get("known")
        found = right(ctx, cotangent, *others)
        ctx.known = known
        return found

    monkeypatch.setattr(_autograd._PlainValue, "backward", staticmethod(backward))
    found_and_gone(monkeypatch, "gaussian_surrogate_loss", "again")


def test_problems_that_vmap_mixes_up(monkeypatch):
    right = _autograd._batch

    def batch(*arguments):
        found, dims = right(*arguments)
        return tuple(x if x is None else x.flip(0) for x in found) if isinstance(found, tuple) else found.flip(0), dims

    monkeypatch.setattr(_autograd, "_batch", batch)
    found_and_gone(monkeypatch, "mvn_log_prob", "vmap")
