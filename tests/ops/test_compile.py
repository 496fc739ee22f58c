"""Every op under torch.compile and torch.export: what programs do besides a training step."""

import pytest
import torch
import torch._dynamo.testing
from torch.func import grad, hessian, jvp, vmap

import po_kernels as pk
from po_kernels.backends.contract import OPS

from .cases import LOSSES, Case, directions, draw, fused_pairs, pairs
from .test_contract import agree

# Each trace takes a second: one backend of the kernels, and the reference.
BACKENDS = ("native", "reference")
TRACED = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def new_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(op: str, **options) -> Case:
    if op in LOSSES:
        options = {"estimator": "dice", "reduction": "mean", "advantage": "loo", "rbf_gamma": None, **options}
    return draw(op, 1, lead=(3,), dim=2, group=3, mask=False, shared_scale=False, **options)


def chosen(ops):
    return [pair for pair in pairs(ops) if pair[1] in BACKENDS]


def counting():
    """Counts graphs. Numbers become constants in AOTAutograd, unless what is made of them stays open."""
    return torch._dynamo.testing.CompileCounterWithBackend("aot_eager")


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


NO_GRAD = [(*pair, torch.no_grad) for pair in chosen(tuple(OPS)) if pair[1] == "native"]
OTHERS = [
    (*pair, mode) for pair in chosen(("gaussian_policy_loss",)) for mode in (torch.enable_grad, torch.inference_mode)
]


@pytest.mark.parametrize(("op", "backend", "mode"), [*NO_GRAD, *OTHERS])
def test_without_gradients(op, backend, mode):
    """Rollouts: no input requires grad, or nothing is recorded."""
    case = small(op)
    inputs = case.inputs if mode is torch.no_grad else list(case.tensors.values())
    with mode():
        found = compiled(lambda *xs: case(*xs, backend=backend))(*inputs)
        agree(found, case(*inputs, backend=backend), case)


@pytest.mark.parametrize(("op", "backend"), chosen(("gaussian_surrogate_loss", "categorical_policy_loss")))
def test_statistics(op, backend):
    case = small(op)
    inputs = case.inputs
    loss, stats = compiled(lambda *xs: case(*xs, backend=backend, return_stats=True))(*inputs)
    expected = case(*inputs, backend=backend, return_stats=True)
    agree((loss.detach(), *stats), (expected[0].detach(), *expected[1]), case)
    assert loss.requires_grad
    assert not any(x.requires_grad for x in stats)


@TRACED
@pytest.mark.parametrize(("op", "backend"), chosen(("gaussian_policy_loss", "categorical_log_prob"))[1::2])
def test_transforms_of_torch_func(op, backend):
    case = small(op)
    inputs, tangents = tuple(case.tensors.values()), tuple(directions(case, 1))

    def scalar(x):
        return case(x, *inputs[1:], backend=backend).sum()

    batch = torch.stack([inputs[0], 0.5 * inputs[0]])
    for function, argument in (
        (grad(scalar), inputs[0]),
        (lambda x: jvp(grad(scalar), (x,), (tangents[0],))[1], inputs[0]),
        (hessian(scalar), inputs[0]),
        (vmap(scalar), batch),
        (vmap(grad(scalar)), batch),
    ):
        agree(compiled(function)(argument), function(argument), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_refuse_reinforce(backend):
    case = small("gaussian_policy_loss", estimator="reinforce")
    with pytest.raises(Exception, match=r"gaussian_policy_loss: estimator='reinforce'.*use estimator='dice'"):
        compiled(grad(lambda x: case(x, backend=backend)))(case.tensors["mean"])


@pytest.mark.parametrize(("op", "backend"), fused_pairs(("gaussian_policy_loss", "categorical_surrogate_loss")))
def test_a_gradient_penalty_through_a_graph_that_autograd_differentiates(op, backend):
    """`backend="eager"` runs a traced graph under autograd, which asks the operators for second derivatives."""

    def penalised(step, case):
        inputs = case.inputs
        loss = step(*inputs)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + sum(g.square().sum() for g in gradients)).backward()
        return [x.grad for x in inputs]

    for reduction in ("mean", "none"):
        case = small(op, reduction=reduction)

        def step(*xs, case=case):
            return case(*xs, backend=backend).sum()

        traced = torch.compile(step, backend="eager", fullgraph=True)
        agree(penalised(traced, case), penalised(step, case), case)
        torch._dynamo.reset()
    case = small(op, estimator="reinforce")
    traced = torch.compile(lambda *xs: case(*xs, backend=backend), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=rf"{op}: estimator='reinforce'.*use estimator='dice'"):
        penalised(traced, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_are_made_once(backend):
    """No recompilation from the second batch size on, nor from the second value of an annealed coefficient."""
    counter = counting()

    @torch.compile(backend=counter, fullgraph=True)
    def step(mean, coefficient):
        return pk.gaussian_policy_loss(
            mean, torch.zeros(2), 0.5 * mean, 1.0, entropy_coef=coefficient, estimator="dice", num_samples=4, seed=3,
            backend=backend,
        )  # fmt: skip

    for rows in (3, 5, 7, 9):
        step(torch.randn(rows, 2, requires_grad=True), 0.1)
    assert counter.frame_count == 2
    for coefficient in (0.2, 0.3, 0.4):
        step(torch.randn(3, 2, requires_grad=True), coefficient)
    assert counter.frame_count <= 4
    torch._dynamo.reset()
    counter.frame_count = 0
    for coefficient in (0.2, 0.3, 0.4):
        step(torch.randn(3, 2, requires_grad=True), torch.tensor(coefficient))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_annealed_temperature_makes_two_graphs(backend):
    counter = counting()
    logits, hidden, ids = torch.randn(3, 5, requires_grad=True), torch.randn(3, 2), torch.tensor([0, 4, 2])

    def of_tokens(temperature):
        options = {"temperature": temperature, "backend": backend}
        found = pk.token_log_prob(logits, ids, **options).log_prob
        return found + pk.linear_token_log_prob(hidden, logits[:, :2].repeat(2, 1), ids, **options).log_prob

    step = torch.compile(of_tokens, backend=counter, fullgraph=True)
    for temperature in (0.7, 0.8, 1.3, 2.0):
        torch.testing.assert_close(step(temperature), of_tokens(temperature), rtol=0, atol=2**-20)  # of numbers near 1
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("op", "backend"), chosen(("categorical_policy_loss",)))
def test_dynamic_shapes(op, backend):
    case = small(op, reduction="none")
    step = compiled(lambda *xs: case(*xs, backend=backend), dynamic=True)
    inputs = case.inputs
    agree(step(*inputs).detach(), case(*inputs, backend=backend).detach(), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_export_with_a_dynamic_batch(backend):
    class Module(torch.nn.Module):
        def forward(self, mean):
            return pk.gaussian_policy_loss(mean, torch.zeros(2), 0.5 * mean, 1.5, reduction="none", backend=backend)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), (torch.randn(3, 2),), dynamic_shapes={"mean": {0: rows}})
    mean = torch.randn(7, 2)
    assert torch.equal(program.module()(mean), Module()(mean))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize(("op", "backend"), fused_pairs(("gaussian_policy_loss", "categorical_sample")))
def test_tracing_by_torch_jit_is_refused(op, backend):
    case = small(op)
    head = next(iter(case.tensors.values()))
    with pytest.raises(RuntimeError, match=rf"{op}: torch.jit.trace .*use torch.export"):
        torch.jit.trace(lambda x: case(x, backend=backend), (head,), check_trace=False)


@TRACED
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("family", ["gaussian", "categorical"])
def test_a_network_under_bf16_autocast_with_targets_in_float32(family, traced):
    """Loss, statistics and gradients are those of the network's bfloat16 outputs in float32."""
    network = torch.nn.Linear(3, 4)
    x, y = torch.randn(32, 3), torch.randn(32, 2)
    labels, table = torch.arange(32) % 4, -torch.eye(4)

    def of_outputs(out):
        if family == "categorical":
            return pk.categorical_policy_loss(
                out, labels, table, estimator="dice", num_samples=4, seed=0, return_stats=True
            )
        mean, log_std = out.chunk(2, dim=-1)
        return pk.gaussian_policy_loss(
            mean, log_std, y, 2.0, estimator="dice", num_samples=4, entropy_coef=0.5, seed=0, return_stats=True
        )

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return of_outputs(network(x))

    loss, stats = (compiled(step) if traced else step)(x)
    found = torch.autograd.grad(loss, network.weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(x)
    assert out.dtype == torch.bfloat16
    expected_loss, expected = of_outputs(out.float())
    assert loss.dtype == stats.reward_mean.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(tuple(stats), tuple(expected))
    torch.testing.assert_close(found, torch.autograd.grad(expected_loss, network.weight)[0])
