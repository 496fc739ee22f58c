"""Steps in mixed precision, in parts, and compiled."""

import threading
import time

import pytest
import torch
from po_bilevel import (
    BOME,
    Batch,
    BatchStream,
    BilevelTrainer,
    CategoricalPolicy,
    Dense,
    EvolutionStrategies,
    ImplicitCG,
    LinearCategorical,
    LinearGaussian,
    NegativeLogLikelihood,
    NonFiniteError,
    OneHotMahalanobisReward,
    PolicyGradient,
    Unrolled,
    UsageError,
    train,
    train_nll,
)
from po_bilevel.hypergradients import FisherCG
from problems import bilevel, seeded
from torch import nn
from torch._dynamo.backends.debugging import aot_eager


def small_network():
    layers = nn.Linear(2, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)
    return CategoricalPolicy(nn.Sequential(*layers))


def trainer(data: Batch, policy, **options) -> BilevelTrainer:
    dtype = next(policy.parameters()).dtype
    arguments = {
        "inner_data": Batch(data.inputs[:61].to(dtype), data.target[:61]),
        "outer_data": Batch(data.inputs[61:].to(dtype), data.target[61:]),
        "inner_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.2),
        "inner_steps": 5,
        "hypergradient": ImplicitCG(damping=0.5),
    }
    return bilevel(data, policy=policy, reward=OneHotMahalanobisReward(3).to(dtype), **(arguments | options))


@pytest.mark.parametrize("method", [ImplicitCG(0.5, 1e-12), Dense(0.5), Unrolled(3, 0.1), BOME(3, 0.1, 0.5)])
@pytest.mark.parametrize("batch_size", [None, 20])
def test_parts_add_up_to_the_batch(classes, method, batch_size):
    """Of 61 rows, and of batches that end with one of a single row: parts of other sizes, and without rows."""
    ends = []
    for accumulation in (1, 4):
        run = trainer(
            classes, seeded(small_network), hypergradient=method, batch_size=batch_size, accumulation=accumulation
        )
        run.fit(3)
        ends.append((run.history, [*run.policy.parameters(), *run.reward.parameters()]))
    (whole, right), (parts, found) = ends
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for a, b in zip(parts, whole, strict=True):
        assert (a.inner_loss, a.outer_loss) == pytest.approx((b.inner_loss, b.outer_loss), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_inner_steps(classes, dtype):
    """The network computes in the type, the loss does not; hypergradients are in the parameters' own."""
    seen = []
    policy = seeded(small_network).float()
    policy.register_forward_hook(lambda module, inputs, logits: seen.append((logits.dtype, torch.is_grad_enabled())))
    runs = []
    for autocast in (None, dtype):
        seen.clear()
        run = trainer(classes, seeded(small_network).float() if autocast is None else policy, autocast=autocast)
        runs.append((run.fit(4), [p.detach() for p in run.policy.parameters()]))
    assert {kind for kind, _ in seen} == {dtype, torch.float32}
    for a, b in zip(runs[1][1], runs[0][1], strict=True):
        # Of parameters near one: roundings of the type, which steps go on from, add up to less than a single one.
        torch.testing.assert_close(a, b, rtol=0.0, atol=torch.finfo(dtype).eps)
    assert not all(torch.equal(a, b) for a, b in zip(runs[1][1], runs[0][1], strict=True))
    assert all(step.residual_norm < 1e-5 for step in runs[1][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_policies_of_native_calls_too(regression, dtype):
    data = Batch(regression.inputs.float(), regression.target.float())
    ends = []
    for autocast in (None, dtype):
        policy = seeded(LinearGaussian, 3, 2).float()
        # Small enough that no step is left out.
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if autocast is torch.float16 else None
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        loss, steps = train_nll(policy, data, optimizer, 20, autocast=autocast, scaler=scaler)
        ends.append(loss)
        assert steps == 20
    assert ends[0] != ends[1]
    assert ends[1] == pytest.approx(ends[0], rel=torch.finfo(dtype).eps)


def test_steps_with_infinite_gradients_are_left_out(classes):
    data = Batch(classes.inputs.float(), classes.target)
    policy = seeded(small_network).float()
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=10**6)
    options = {"autocast": torch.float16, "scaler": scaler, "tolerance": 1e-30, "max_grad_norm": 1e30}
    train_nll(policy, data, optimizer, 1, **options)
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    train_nll(policy, data, optimizer, 40, **options)
    assert scaler.get_scale() < 2.0**30
    assert not any(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_gradients_that_are_infinite_at_any_scale_are_refused(classes):
    data = Batch(classes.inputs.float(), classes.target)
    policy = seeded(small_network).float()
    next(policy.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError, match="gradients in float16 are not finite, however small the loss is scaled"):
        train_nll(policy, data, optimizer, 60, autocast=torch.float16)


def test_the_scaler_is_in_the_checkpoint(classes, tmp_path):
    path = tmp_path / "run.pt"
    ends = []
    for stops in ([9], [3, 9]):
        for total in stops:
            run = trainer(
                classes, seeded(small_network).float(), autocast=torch.float16, accumulation=2, checkpoint=path,
                batch_size=20,
            )  # fmt: skip
            run.fit(total, resume=path if total == 9 and len(stops) > 1 else None)
        ends.append((run._passes.scaler.state_dict(), [p.detach() for p in run.policy.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert ends[0][0]["_growth_tracker"] > 15  # steps since the scale was changed, of more than one run
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    for options in ({}, {"autocast": torch.bfloat16}, {"autocast": torch.float16}):
        with pytest.raises(UsageError, match="expected the configuration that wrote"):
            trainer(classes, seeded(small_network).float(), batch_size=20, **options).resume(path)


@pytest.fixture
def compiled():
    """A backend, and the graphs that it has compiled. It differentiates as torch's own does: once."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return aot_eager(module, inputs)

    yield backend, graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("method", [ImplicitCG(damping=0.5), Unrolled(3, 0.1), EvolutionStrategies(2, 0.1, 3, 0.1)])
@pytest.mark.parametrize("how", ["trainer", "policy", "network"])
def test_compiled_policies(classes, method, how, compiled, monkeypatch):
    """Their steps are compiled, their hypergradients, of which torch has no second derivative then, are not."""
    backend, graphs = compiled
    ends = []
    for compiles in (False, True):
        policy = seeded(small_network)
        if compiles and how == "trainer":
            monkeypatch.setattr(CategoricalPolicy, "compile", lambda self: nn.Module.compile(self, backend=backend))
        elif compiles and how == "policy":
            policy.compile(backend=backend)
        elif compiles:
            policy.network = torch.compile(policy.network, backend=backend)
        run = trainer(classes, policy, hypergradient=method, compile=compiles and how == "trainer")
        torch.manual_seed(3)
        run.fit(2)
        ends.append([*run.policy.parameters(), *run.reward.parameters()])
    assert len(graphs) > 0
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_refused(classes):
    data = Batch(classes.inputs.float(), classes.target)
    policy = seeded(small_network).float()
    optimizer = torch.optim.LBFGS(policy.parameters())
    with pytest.raises(ValueError, match=r"autocast: expected torch\.bfloat16 or None with LBFGS, got torch\.float16"):
        train_nll(policy, data, optimizer, 1, autocast=torch.float16)
    with pytest.raises(ValueError, match=r"autocast: expected .* or None, got torch\.float64"):
        train_nll(policy, data, optimizer, 1, autocast=torch.float64)
    for accumulation in (0, 2.0, float("inf")):
        with pytest.raises(ValueError, match=f"accumulation: expected an integer of at least 1, got {accumulation}"):
            trainer(classes, policy, accumulation=accumulation)
    scaler = torch.amp.GradScaler("cpu")
    for autocast in (None, torch.bfloat16):
        with pytest.raises(ValueError, match=r"scaler: expected None without autocast=torch\.float16, got GradScaler"):
            train_nll(policy, data, torch.optim.SGD(policy.parameters()), 1, autocast=autocast, scaler=scaler)
    wide = LinearCategorical(3, 3)
    with pytest.raises(ValueError, match="data: expected inputs of the policy's 3 features, got shape"):
        train_nll(wide, data, torch.optim.SGD(wide.parameters()), 1, autocast=torch.bfloat16)
    narrow, double = LinearCategorical(2, 3), Batch(data.inputs.double(), data.target)
    with pytest.raises(ValueError, match=r"data: expected inputs of torch\.float32 as the policy has"):
        train_nll(narrow, double, torch.optim.SGD(narrow.parameters()), 1, autocast=torch.bfloat16)
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="optimizer: expected parameters that the loss depends on, got others"):
        train_nll(policy, data, unused, 1, autocast=torch.float16)
    with pytest.raises(
        TypeError, match="policy: expected a Policy, got OptimizedModule; compile a policy in place, by"
    ):
        train_nll(torch.compile(policy), data, unused, 1)
    with pytest.raises(TypeError, match="policy: expected a Policy, got Linear"):
        train_nll(nn.Linear(2, 3), data, optimizer, 1)
    loss = PolicyGradient(estimator="dice", num_samples=8)
    with pytest.raises(ValueError, match=r"product_batches: expected 1 with FisherCG, .* got 2"):
        trainer(classes, policy, inner_loss=loss, hypergradient=FisherCG(), product_batches=2)


def test_autocast_around_the_loop_sees_parameters_that_were_changed(classes):
    """What it has cast is kept until its end, however often an optimiser changes in place what that was cast from."""
    data = Batch(classes.inputs.float(), classes.target)
    ends = []
    for around in (False, True):
        policy = seeded(small_network).float()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            ends.append(train_nll(policy, data, optimizer, 50, autocast=None if around else torch.bfloat16)[0])
        run = trainer(classes, policy, inner_steps=20)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            ends.append(run.fit(2)[-1].outer_loss)
    # Inside, the backward pass and the hypergradient are rounded too: to a rounding of the type in all.
    assert ends[2:] == pytest.approx(ends[:2], rel=torch.finfo(torch.bfloat16).eps)


def test_steps_that_are_left_out_count_for_nothing(classes):
    data = Batch(classes.inputs.float(), classes.target)
    policy, seen = seeded(small_network).float(), []
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-6)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    loss = lambda policy, batch, seed: -1e4 * policy.log_prob(*batch).mean()  # noqa: E731
    _, steps = train(
        policy, loss, BatchStream(data, None, 0), optimizer, 60, autocast=torch.float16, patience=2, min_delta=1e9,
        scheduler=scheduler, callback=lambda step, value: seen.append((step, scheduler.last_epoch)),
    )  # fmt: skip
    assert seen[5] == (5, 0)  # the scale falls: nothing else does
    assert 10 < steps < 25
    assert scheduler.last_epoch == 3


def test_a_penalty_in_float16_does_not_overflow(classes):
    data, policy = Batch(classes.inputs.float(), classes.target), seeded(small_network).float()
    with torch.no_grad():
        policy.network[0].weight.fill_(200.0)
    optimizer, loss = torch.optim.SGD(policy.parameters(), lr=1e-3), NegativeLogLikelihood(l2=1e-3)
    value, _ = train_nll(policy, data, optimizer, 1, loss=loss, autocast=torch.float16)
    assert value > 0.5 * 1e-3 * 16 * 200.0**2


@pytest.mark.usefixtures("compiled")
def test_compiled_policies_of_samples_in_threads_and_in_compiled_functions(classes):
    loss = PolicyGradient(estimator="dice", num_samples=8)
    policy = seeded(small_network)
    policy.compile(backend="aot_eager")
    run = trainer(classes, policy, inner_loss=loss, hypergradient=FisherCG(0.1))
    assert run.fit(1)[0].gradient_norm > 0
    x = torch.ones(2, requires_grad=True)

    def slow(theta, phi):
        time.sleep(0.02)
        return (theta - phi).square().sum()

    def gradient(seconds=0.0):
        time.sleep(seconds)
        return ImplicitCG()(slow, lambda theta, phi: theta.sum(), x.detach().clone().requires_grad_(), x).gradient

    threads = [threading.Thread(target=gradient, args=(seconds,)) for seconds in (0.0, 0.03)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    graphs = []
    torch.compile(torch.sin, backend=lambda module, inputs: graphs.append(module) or module)(x.detach())
    assert len(graphs) == 1


@pytest.mark.usefixtures("compiled")
@pytest.mark.filterwarnings("ignore")
def test_a_hypergradient_in_a_compiled_function():
    theta, phi = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    def inside(scale):
        method = ImplicitCG()
        return scale * method(lambda t, p: (t - p).square().sum(), lambda t, p: t.sum(), theta, phi).gradient

    torch.testing.assert_close(torch.compile(inside, backend="eager")(torch.tensor(3.0)), torch.full((2,), 3.0))
