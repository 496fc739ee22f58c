"""Where programs live: lazy tensors, threads, autocast, half precision, options as tensors, groups of one."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import po_kernels as pk
from po_kernels import dispatch
from po_kernels.backends.contract import OPS
from po_kernels.backends.reference import philox

from . import bounds
from .cases import (
    DIFFERENTIABLE,
    LOSSES,
    SAMPLES,
    SURROGATE_LOSSES,
    derivatives,
    directions,
    distance,
    draw,
    fused,
    fused_pairs,
    largest,
    pairs,
    repeats_second_order,
    serving,
)
from .test_contract import agree


def lazily_negated(x):
    return torch._neg_view(-x)


def lazily_zero(x):
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


@pytest.mark.parametrize("lazy", [lazily_negated, lazily_zero])
@pytest.mark.parametrize(("op", "backend"), fused_pairs(DIFFERENTIABLE))
def test_lazy_tensors_in_both_orders(op, backend, lazy):
    """Tensors whose memory does not hold their values, as inputs, cotangents and tangents."""
    options = {"estimator": "dice", "advantage": "loo", "rbf_gamma": None} if op in LOSSES else {}
    case = draw(op, 4, lead=(3,), dim=2, group=4, mask=False, **options)
    inputs, tangents = tuple(case.tensors.values()), tuple(map(lazy, directions(case, 0)))
    plain = tuple(t.clone() for t in tangents)
    if lazy is lazily_negated:
        agree(case(*map(lazy, inputs), backend=backend), case(), case)
    value = case(backend=backend)

    def products(name, moved):
        xs = case.inputs
        weight = lazy(torch.ones_like(value)) if moved is tangents else lazy(torch.ones_like(value)).clone()
        gradients = torch.autograd.grad(case(*xs, backend=name), xs, weight, create_graph=True, materialize_grads=True)
        kept = [(g, v) for g, v in zip(gradients, moved, strict=True) if g.requires_grad]
        if not kept:
            return [torch.zeros_like(x) for x in xs]
        outputs, weights = zip(*kept, strict=True)
        return torch.autograd.grad(outputs, xs, weights, materialize_grads=True)

    agree(products(backend, tangents), products("reference", plain), case)
    found = torch.func.jvp(lambda *xs: case(*xs, backend=backend), inputs, tangents)
    agree(found, torch.func.jvp(lambda *xs: case(*xs), inputs, plain), case)


@pytest.mark.parametrize("backend", serving("gaussian_policy_loss"))
def test_threads_in_one_kept_graph(backend):
    """Each backward pass adds the same gradient, however the threads take turns."""
    case = draw("gaussian_policy_loss", 2, lead=(4,), dim=3, group=4, estimator="dice", reduction="mean")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            inputs = case.inputs
            loss = case(*inputs, backend=backend)
            with ThreadPoolExecutor(4) as pool:
                grads = list(
                    pool.map(
                        lambda _, loss=loss, xs=inputs: torch.autograd.grad(3.0 * loss, xs, retain_graph=True), "abcd"
                    )
                )
            for other in grads[1:]:  # one has the gradient of the forward pass times 3, the others compute it anew
                agree(other, grads[0], case)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(("op", "backend"), pairs(tuple(OPS)))
def test_autocast_changes_no_number(op, backend):
    case = draw(op, 5, torch.float32, lead=(3,), dim=4, group=4, mask=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case(backend=backend)
    if backend == "reference" and repeats_second_order(case):  # plain torch, which computes in float64 there
        case = case.to(torch.float64)
    expected = case(backend=backend)
    assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE if op.startswith("mvn") or op == "gaussian_policy_loss"])
def test_matrix_products_of_backward_passes_within_autocast(op):
    """Torch advises against such passes, and programs have them. Of the kernels there are none that torch would see."""
    options = {"estimator": "dice", "precision_kind": "full"} if op in LOSSES else {}
    case = draw(op, 5, torch.float32, lead=(3,), dim=4, group=4, **options)
    right = bounds.expected(case, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = derivatives(case, "reference", 5, second=True)
    assert not right.complaints(found)


@pytest.mark.parametrize("op", [op for op in OPS if len(OPS[op].Inputs._fields) > 1])
def test_mixed_dtypes_are_promoted_under_autocast_alone(op):
    case = draw(op, 5, torch.float32, lead=(3,), dim=4, group=4, mask=False)
    head, *rest = case.tensors.values()
    half = head.bfloat16()
    with pytest.raises(TypeError, match=rf"^{op}: .*: expected torch.bfloat16 like .*, got torch.float32"):
        case(half, *rest, backend=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case(half, *rest, backend=None)
    # Nothing is cast but the head, which is exact in float32.
    expected = case(half.float(), *rest, backend=None)
    assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", [1e-8, 1e5, 1.0009765625 + 2**-20])
def test_a_number_for_the_precision_is_not_rounded_to_half(precision, dtype):
    case = draw("gaussian_policy_loss", 1, dtype, lead=(3,), dim=2, estimator="analytic")
    found = pk.gaussian_policy_loss(case.tensors["mean"], case.tensors["log_std"], case.tensors["target"], precision)
    expected = pk.gaussian_policy_loss(
        *(case.tensors[name].double() for name in ("mean", "log_std", "target")), precision
    )
    # In float32: 8 sums of 2 dimensions and 3 rows, whose terms are all positive.
    assert abs(float(found) / float(expected) - 1) <= 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("op", "backend"), [p for p in pairs(LOSSES) if "reparam" in OPS[p[0]].estimators])
def test_one_sample_of_the_path(op, backend):
    """The advantage has no use but in the statistics, where one sample deviates by nothing."""
    case = draw(op, 3, lead=(3,), dim=2, group=1, estimator="reparam", advantage="loo", rbf_gamma=None)
    loss, stats = case(backend=backend, return_stats=True)
    assert loss.isfinite().all()
    for name in ("reward_std", "advantage_std"):
        assert torch.equal(getattr(stats, name), torch.zeros_like(stats.reward_std))


@pytest.mark.parametrize("estimator", ["dice", "reinforce", "reparam"])
@pytest.mark.parametrize("op", [op for op in SURROGATE_LOSSES if op != "categorical_surrogate_loss"])
def test_samples_with_a_derivative(op, estimator):
    case = draw(op, 3, lead=(3,), dim=2, group=4, estimator=estimator, rbf_gamma=None)
    samples = case.constants["samples"].clone().requires_grad_()
    arguments = {**case.tensors, **case.options, "samples": samples}
    if estimator == "reparam":
        getattr(pk, op)(**arguments)
        return
    with pytest.raises(ValueError, match=rf"^{op}: samples: .*samples\.detach\(\)"):
        getattr(pk, op)(**arguments)
    with torch.no_grad():
        getattr(pk, op)(**{**arguments, "samples": samples.detach()})


@pytest.mark.parametrize(("op", "backend"), pairs(LOSSES))
def test_a_tensor_for_the_entropy_coefficient(op, backend):
    """The same loss and derivatives as of the number, and its own: less the mean entropy."""
    for seed in range(4):
        case = draw(op, seed, estimator="dice", entropy_coef=0.75)
        inputs = case.inputs
        coefficient = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
        number, stats = case(*inputs, backend=backend, return_stats=True)
        tensor = case(*inputs, backend=backend, entropy_coef=coefficient)
        bound = 1e-13 * case.terms * (1 + largest([number]))  # the same sums, in another order
        assert distance([tensor], [number]) <= bound
        for xs in zip(
            *(torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (tensor, number)), strict=True
        ):
            assert distance([xs[0]], [xs[1]]) <= 1e-13 * case.terms * (1 + largest([xs[1]]))
        (slope,) = torch.autograd.grad(tensor.sum(), coefficient, create_graph=True)
        # A sum over rows, of which there are as many as the statistics were averaged over but with reduction="sum".
        rows = math.prod(stats.entropy.shape) if case.options["reduction"] == "none" else 1
        if case.options["reduction"] == "sum":
            rows = math.prod(next(iter(case.tensors.values())).shape[:-1])
        expected = -stats.entropy.mean() * rows
        assert distance([slope.detach()], [expected]) <= 1e-13 * case.terms * (1 + largest([expected]))
        mixed = torch.autograd.grad(slope, inputs, materialize_grads=True)  # of the entropy, through the policy
        assert (
            sum(float(x.abs().sum()) for x in mixed[1 if op.split("_")[0] != "categorical" else 0 :]) > 0
            or case.terms < 8
        )


def test_the_entropy_coefficient_is_a_scalar_of_floats():
    case = draw("gaussian_policy_loss", 0)
    for wrong, error, message in (
        (torch.zeros(1), ValueError, r"entropy_coef: expected shape \(\), got \(1,\)"),
        (torch.tensor(1), TypeError, "entropy_coef: expected a floating tensor"),
    ):
        with pytest.raises(error, match=rf"^gaussian_policy_loss: {message}"):
            case(entropy_coef=wrong)


@pytest.mark.parametrize(("op", "backend"), pairs((*SAMPLES, "gaussian_policy_loss")))
def test_streams(op, backend):
    """Stream 0 is the seed itself; every other one has numbers of its own, the same on every backend."""
    case = draw(op, 2, lead=(40,), dim=4, group=8, mask=False, **({"estimator": "dice"} if op in LOSSES else {}))
    plain = case(backend=backend)
    assert torch.equal(plain, case(backend=backend, stream=0))
    streams = [case(backend=backend, stream=stream) for stream in (1, 2, 2**40)]
    for number, found in enumerate(streams):
        assert not any(torch.equal(found, other) for other in (plain, *streams[:number]))
        stream = (1, 2, 2**40)[number]
        assert distance([found], [case(stream=stream)]) <= 1e-12 * case.terms * (1 + largest([found]))
        key = philox.stream_key(torch.tensor(_signed(case.options["seed"])), stream)
        assert torch.equal(found, case(backend=backend, seed=key))


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def test_streams_of_one_seed_are_independent():
    draws = [pk.gaussian_sample(torch.zeros(20000), torch.zeros(20000), 1, seed=7, stream=i)[0] for i in range(4)]
    correlation = np.corrcoef(torch.stack(draws).numpy())
    # Of 20,000 pairs: standard deviation 0.0071, and six pairs within five of them.
    assert np.abs(correlation - np.eye(4)).max() < 5 / math.sqrt(20000)


def test_known_keys_of_streams():
    """Philox4x32-10 at counter (2^32 - 1, 2^32 - 1, stream, 0), by integers written out here."""
    for seed in (0, 1, -1, 2**63 - 1):
        for stream in (1, 2**33 + 5):
            key = philox.stream_key(torch.tensor(seed), stream)
            counter = [torch.tensor(c) for c in (2**32 - 1, 2**32 - 1, stream & (2**32 - 1), stream >> 32)]
            words = philox.philox4x32(
                tuple(counter), (torch.tensor(seed & (2**32 - 1)), torch.tensor(seed >> 32 & (2**32 - 1)))
            )
            assert int(key) == _signed(int(words[1]) << 32 | int(words[0]))


@pytest.mark.parametrize(
    "make",
    [lambda x: x.to_sparse(), lambda x: torch.nested.nested_tensor([x[0], x[1]]), lambda x: x.float().to_mkldnn()],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning", "ignore:.*prototype.*:UserWarning")
def test_tensors_that_are_not_dense(make):
    mean = torch.zeros(3, 2)
    for index, name in enumerate(("mean", "log_std", "target", "precision")):
        arguments = [mean, mean, mean, torch.ones(2, 2)]
        arguments[index] = make(arguments[index])
        with pytest.raises(TypeError, match=rf"^gaussian_policy_loss: {name}: expected a dense \(strided\) tensor"):
            pk.gaussian_policy_loss(*arguments)
    with pytest.raises(TypeError, match=r"^categorical_log_prob: value: expected"):
        pk.categorical_log_prob(mean, torch.zeros(3, dtype=torch.int64).to_sparse())


def test_options_that_are_arrays_or_have_no_value():
    mean = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"^group_advantage: kind: expected one of .*array"):
        pk.group_advantage(mean, np.array(["loo", "mean"]))
    with pytest.raises(TypeError, match=r"^gaussian_sample: seed: .* on meta"):
        pk.gaussian_sample(mean, mean, 2, seed=torch.zeros((), dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"^gaussian_sample: stream: expected an integer of at least 0, got -1"):
        pk.gaussian_sample(mean, mean, 2, stream=-1)


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad, torch.func.hessian])
@pytest.mark.parametrize("backend", serving("gaussian_policy_loss"))
def test_values_are_refused_within_transforms(backend, transform):
    """The one negative precision of three problems, and a label out of range."""
    case = draw("gaussian_policy_loss", 1, lead=(3,), dim=2, estimator="analytic", reduction="mean")
    mean, log_std, target, _ = case.tensors.values()
    precisions = torch.tensor([[1.0, 2.0], [1.0, -1.0], [3.0, 1.0]], dtype=torch.float64)

    def loss(u):
        return case(mean, log_std, target, u, backend=backend)

    found = torch.func.vmap(transform(loss))(precisions.abs())
    agree(found, torch.stack([transform(loss)(u) for u in precisions.abs()]), case)
    with pytest.raises(ValueError, match="precision: expected positive values"):
        torch.func.vmap(transform(loss))(precisions)
    labels = torch.tensor([[0, 1], [2, 1]])
    with pytest.raises(ValueError, match="value: expected labels from 0"):
        torch.func.vmap(lambda y: pk.categorical_log_prob(torch.zeros(2, 2), y, backend=backend))(labels)
    with pytest.raises(ValueError, match=r"torch\.vmap: expected a batch of at least 1, got 0"):
        torch.func.vmap(transform(loss))(precisions[:0])


POINT = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
GIVEN = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def scored(samples, mean=POINT, estimator="dice", backend=None):
    rewards = -GIVEN.square().sum(-1)
    return pk.gaussian_surrogate_loss(
        mean, torch.zeros(2).double(), samples, rewards, estimator=estimator, backend=backend
    )


@pytest.mark.parametrize(
    "derivative",
    [
        lambda q: torch.func.jvp(scored, (q,), (q,)),
        lambda q: torch.func.grad(scored)(q),
        lambda q: torch.func.grad(lambda x: torch.func.vmap(scored)(x).sum())(torch.stack([q, q])),
        lambda q: torch.func.vmap(lambda x: scored(x))(torch.stack([q, q]).requires_grad_()),
    ],
)
def test_samples_with_a_derivative_in_any_mode(derivative):
    with pytest.raises(ValueError, match=r"^gaussian_surrogate_loss: samples: .*samples\.detach\(\)"):
        derivative(GIVEN)


@pytest.mark.parametrize("backend", serving("gaussian_surrogate_loss"))
@pytest.mark.parametrize("estimator", ["dice", "reinforce"])
def test_inference_mode(backend, estimator):
    """Transforms within it, and training on what was made in it."""

    def loss(mean):
        return scored(GIVEN, mean, estimator, backend)

    expected = torch.func.grad(loss)(POINT)
    with torch.inference_mode():
        if torch.func.grad(torch.sum)(POINT).any():  # torch 2.11 gives zeros here, of whatever function
            agree(torch.func.grad(loss)(POINT), expected, estimator)
            if estimator == "dice":
                assert largest([torch.func.jvp(torch.func.grad(loss), (POINT,), (POINT,))[1]]) > 0
        samples = GIVEN.clone()
    mean = POINT.clone().requires_grad_()
    scored(samples, mean, estimator, backend).backward()
    agree(mean.grad, expected, estimator)


@pytest.mark.parametrize("backend", serving("gaussian_policy_loss"))
def test_autocast_changes_no_derivative_of_kernels(backend):
    """Those of reinforce are made by kernels on every backend; backward passes leave autocast first, as torch asks."""
    case = draw("mvn_policy_loss", 3, torch.float32, lead=(3,), dim=4, group=5, estimator="reinforce")
    found = []
    for enabled in (False, True):
        inputs = case.inputs
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = case(*inputs, backend=backend).sum()
        found.append(torch.autograd.grad(loss, inputs, materialize_grads=True))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("backend", fused("gaussian_policy_loss"))
def test_a_pass_within_another_of_the_same_graph(backend):
    """One backward pass is made in the middle of another, as a thread may: each has its own gradients."""
    case = draw("gaussian_policy_loss", 2, lead=(4,), dim=3, group=4, estimator="dice", reduction="mean")
    inputs, armed = case.inputs, [False]

    def unpack(x):
        if armed[0]:
            armed[0] = False
            other = partial(torch.autograd.grad, 3.0 * loss, inputs, retain_graph=True)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(other).result(timeout=60)
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        loss = case(*inputs, backend=backend)
    expected = torch.autograd.grad(case(*inputs, backend=backend), inputs)
    armed[0] = True
    agree(torch.autograd.grad(loss, inputs, create_graph=True), expected, case)


@pytest.mark.parametrize(("op", "backend"), pairs(("group_advantage",)))
def test_a_value_is_never_an_input(op, backend):
    rewards = torch.ones(3, 2)
    pk.group_advantage(rewards, "none", backend=backend).zero_()
    assert torch.equal(rewards, torch.ones(3, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_forward_mode_from_outside_of_a_compiled_function():
    case = draw("gaussian_policy_loss", 2, lead=(3,), dim=2, group=4, estimator="dice", reduction="mean")
    compiled = torch.compile(lambda mean: case(mean, backend=None), backend="eager")
    mean = case.tensors["mean"]
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"gaussian_policy_loss: .*compile torch\.func\.jvp"),
    ):
        compiled(torch.autograd.forward_ad.make_dual(mean, torch.ones_like(mean)))


def test_seeds_are_checked_where_nothing_is_drawn():
    case = draw("gaussian_policy_loss", 2, estimator="analytic")
    for wrong, error, message in (({"seed": "abc"}, TypeError, "seed"), ({"stream": -7}, ValueError, "stream")):
        with pytest.raises(error, match=rf"^gaussian_policy_loss: {message}: expected"):
            case(backend=None, **wrong)
    for wrong, message in (
        (torch.tensor(0.1, device="meta"), "a tensor on"),
        (torch.tensor(float("nan")), "a finite number"),
        (torch.tensor(float("inf")), "a finite number"),
    ):
        with pytest.raises(ValueError, match=rf"^gaussian_policy_loss: entropy_coef: expected {message}"):
            case(backend=None, entropy_coef=wrong)


@pytest.mark.parametrize("op", OPS)
def test_shapes_without_values(op):
    """On the meta device, by the reference."""
    options = {"estimator": OPS[op].closed_form or "dice"} if op in LOSSES else {}
    case = draw(op, 2, torch.float32, lead=(3,), dim=2, group=4, mask=False, **options)
    expected = case(backend="reference")
    meta = replace(
        case,
        tensors={name: x.to("meta") for name, x in case.tensors.items()},
        constants={name: x.to("meta") for name, x in case.constants.items()},
    )
    found = meta(backend=None)
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")
    for name in list(case.tensors)[1:2]:
        with pytest.raises(TypeError, match=rf"^{op}: {name}: expected torch.float32"):
            replace(meta, tensors={**meta.tensors, name: meta.tensors[name].double()})(backend=None)


@pytest.mark.parametrize("backend", serving("gaussian_log_prob"))
def test_what_a_transform_left_behind(backend):
    """A tensor that leaves a transform is a wrapper without memory: what it wraps stands in its place."""
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(torch.ones(3))
    log_std = torch.zeros(3, requires_grad=True)
    found = pk.gaussian_log_prob(left[0], log_std, torch.zeros(3), backend=backend)
    right = pk.gaussian_log_prob(torch.ones(3), log_std, torch.zeros(3), backend=backend)
    assert torch.equal(found, right)
    assert torch.equal(torch.autograd.grad(found, log_std)[0], torch.autograd.grad(right, log_std)[0])


@pytest.mark.skipif("native" not in fused("gaussian_policy_loss"), reason="the extension was not built")
def test_the_kernel_that_multiplies_known_gradients_gets_a_cotangent_as_it_lies(monkeypatch):
    """Not one that is to be negated when it is read, as complex numbers make them."""
    given = []

    def rescale(tensors, factor):
        given.append(factor.item())
        for x in tensors:
            x.mul_(factor)
        return True

    monkeypatch.setattr(dispatch, "rescale", rescale)

    def gradient(of_loss):
        mean = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2).requires_grad_()
        loss = pk.gaussian_policy_loss(mean, 0 * mean.detach(), torch.ones_like(mean), 2.0, backend="native")
        return torch.autograd.grad(of_loss(loss), mean)[0]

    right = gradient(lambda loss: loss)
    assert given == []
    assert torch.equal(gradient(lambda loss: 2.0 * loss), 2.0 * right)
    assert given == [2.0]
    negated = gradient(lambda loss: (torch.complex(0 * loss.detach(), loss).conj() * (1 + 2j)).real)
    torch.testing.assert_close(negated, 2.0 * right)
    assert given == [2.0]
