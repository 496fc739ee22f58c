"""Networks in native calls against the ops of their outputs on the reference, and against torch's optimisers."""

import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import grad

import po_kernels as pk
from po_kernels import extension

from .bounds import near
from .cases import distance, largest
from .networks import ACTIVATIONS, ESTIMATORS, SPREADS, Policy

pytestmark = pytest.mark.skipif(extension.module is None, reason="without the extension there is nothing to test")


def agrees(case, **options):
    """Products of up to nine numbers, four layers deep: some hundred roundings of each order's largest entry."""
    for found, right in zip(
        case.derivatives(case.fused, **options), case.derivatives(case.defined, **options), strict=True
    ):  # fmt: skip
        size = largest(right)
        for x, y in zip(found, right, strict=True):
            near(x, y, 100, size=size)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spread", SPREADS)
def test_gaussian(estimator, activation, spread):
    agrees(Policy("gaussian", activation, spread=spread), entropy_coef=0.3, seed=7, **ESTIMATORS[estimator])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("precision", [0, 1, 2])
def test_full_covariance(estimator, precision):
    agrees(Policy("mvn", precision=precision, observations=2), entropy_coef=0.3, seed=7, **ESTIMATORS[estimator])


@pytest.mark.parametrize("estimator", ["closed form", "dice"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_categorical(estimator, activation):
    agrees(Policy("categorical", activation, observations=3), entropy_coef=0.3, seed=7, **ESTIMATORS[estimator])


@pytest.mark.parametrize("rows", [1, 40, 150])
@pytest.mark.parametrize(
    "arguments", [{"head": "categorical"}, {"head": "mvn"}, *({"head": "gaussian", "spread": s} for s in SPREADS)]
)
def test_likelihood(arguments, rows):
    for observations in (None, 2):
        case = Policy(rows=rows, observations=observations, **arguments)
        case.reward = None
        agrees(case, l2=0.01)


@pytest.mark.parametrize("widths", [(1, 1), (2, 17, 3), (7, 33, 1, 20, 2), (5, 3), (130, 4), (0, 3, 2), (3, 0, 2)])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 127, 128, 129, 300])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_shapes(widths, rows):
    """Of packs, blocks and tiles that are not full."""
    agrees(Policy("gaussian", widths=widths, rows=rows, precision=rows % 3), entropy_coef=0.1, l2=0.02)


@pytest.mark.parametrize("advantage", ["none", "min", "mean", "standardized"])
def test_options_reach_the_loss(advantage):
    options = {"estimator": "dice", "num_samples": 4, "advantage": advantage, "rbf_gamma": 0.1, "seed": -3}
    agrees(Policy("gaussian"), entropy_coef=0.2, **options)
    agrees(Policy("categorical"), entropy_coef=0.2, **options)


@pytest.mark.parametrize("head", ["gaussian", "mvn", "categorical"])
def test_single_precision(head):
    """No further from float64 than twice what plain torch in float32 is, and a rounding of the largest entry."""
    exact = Policy(head, widths=(6, 40, 24, 5), rows=200)
    single = Policy(head, widths=(6, 40, 24, 5), rows=200, dtype=torch.float32)
    with torch.no_grad():
        for x, y in zip([*single.leaves, single.reward], [*exact.leaves, exact.reward], strict=True):
            y.copy_(x)
        single.inputs.copy_(exact.inputs)
        exact.inputs.copy_(single.inputs)
        single.target.copy_(exact.target)
        exact.target.copy_(single.target)
    orders = zip(
        *(case.derivatives(loss, entropy_coef=0.5) for case, loss in (
            (single, single.fused), (single, single.defined), (exact, exact.defined))),
        strict=True,
    )  # fmt: skip
    for found, plain, right in orders:
        size = largest(right)
        for x, p, y in zip(found, plain, right, strict=True):
            assert distance([x], [y]) <= 2 * distance([p], [y]) + 4 * torch.finfo(torch.float32).eps * size


def test_without_biases_and_with_frozen_parameters():
    case = Policy("gaussian")
    layers = [(weight, None) for weight, _ in case.network.layers]
    with torch.no_grad():
        for _, bias in case.network.layers:
            bias.zero_()
    frozen = layers[1][0].requires_grad_(False)
    loss = pk.network_policy_loss(case.network._replace(layers=layers), *case.tensors()[1:])
    near(loss.detach(), case.defined().detach(), 20)
    inputs = [layers[0][0], layers[2][0], case.spread[0]]
    for x, y in zip(grad(loss, inputs), grad(case.defined(), inputs), strict=True):
        near(x, y, 100)
    assert frozen.grad is None


def test_without_derivatives():
    """The loss alone, to the bit; and a parameter that two layers share gets both its gradients."""
    case = Policy("gaussian", widths=(4, 4, 4))
    with torch.no_grad():
        alone = case.fused(entropy_coef=0.5)
    assert not alone.requires_grad
    assert torch.equal(alone, case.fused(entropy_coef=0.5).detach())
    case.net[2].weight = case.net[0].weight
    tied = case.network._replace(layers=[case.network.layers[0], (case.net[0].weight, case.network.layers[1][1])])
    found = grad(pk.network_policy_loss(tied, *case.tensors()[1:]), case.net[0].weight)
    near(found[0], grad(case.defined(), case.net[0].weight)[0], 100)


def test_threads_change_no_bit():
    case = Policy("gaussian", widths=(8, 64, 64, 8), rows=1000)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(case.derivatives(case.fused, estimator="dice", num_samples=5, seed=1))
    for other in found[1:]:
        for x, y in zip(itertools.chain(*found[0]), itertools.chain(*other), strict=True):
            assert torch.equal(x, y)


def test_cotangents():
    """One that is not one scales all orders, and has a derivative itself."""
    case = Policy("gaussian")
    by = torch.tensor(-1.7, dtype=torch.float64, requires_grad=True)
    inputs = [*case.leaves, case.reward, by]

    def second(loss):
        gradients = grad(by.square() * loss().square(), inputs, create_graph=True)
        return grad(sum((g * g).sum() for g in gradients), inputs)

    right = second(case.defined)
    for x, y in zip(second(case.fused), right, strict=True):
        near(x, y, 200, size=largest(right))


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, eps=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, eps=1e-4),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True, weight_decay=0.1),
}


def steps_of(optimizer, parameters, rates, max_norm):
    group = optimizer.param_groups[0]
    state = lambda key: [optimizer.state[p].get(key) for p in parameters]  # noqa: E731
    common = {"rates": rates, "moved": [True] * len(parameters), "weight_decay": group["weight_decay"]}
    if isinstance(optimizer, torch.optim.SGD):
        return pk.NetworkSteps("sgd", momentum=group["momentum"], dampening=group["dampening"], max_norm=max_norm,
                               nesterov=group["nesterov"], first=state("momentum_buffer"), **common)  # fmt: skip
    return pk.NetworkSteps(
        "adamw" if isinstance(optimizer, torch.optim.AdamW) else "adam", first=state("exp_avg"), max_norm=max_norm,
        second=state("exp_avg_sq"), steps_before=1, beta1=0.9, beta2=0.999, epsilon=group["eps"], **common,
    )  # fmt: skip


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [0.0, 0.3])
@pytest.mark.parametrize("batches", [None, (8, 8, 5, 8)])
def test_steps_are_those_of_torch(rule, max_norm, batches):
    """Four steps after a first of torch's own, each on its rows, with its seed and learning rate."""
    ours, theirs = Policy("gaussian", observations=2), Policy("gaussian", observations=2)
    rates, seeds = (
        [rate * (1.0 if rule.startswith("adam") else 1e-3) for rate in (2e-2, 1e-2, 3e-2, 2e-2)],
        [5, 6, 7, 8],
    )
    options = {"estimator": "dice", "num_samples": 3, "entropy_coef": 0.5}
    order = torch.randperm(21).repeat(2)[:29]
    rows = [torch.arange(21)] * 4 if batches is None else order.split(batches)
    optimizers = [OPTIMIZERS[rule](case.leaves) for case in (ours, theirs)]

    def step(case, optimizer, rows, seed, rate):
        optimizer.param_groups[0]["lr"] = rate
        case_rows = case.inputs, case.target
        case.inputs, case.target = case.inputs[rows], case.target[:, rows]
        optimizer.zero_grad()
        loss = case.defined(seed=seed, **options)
        loss.backward(inputs=case.leaves)
        norm = nn.utils.clip_grad_norm_(case.leaves, max_norm or torch.inf)
        optimizer.step()
        case.inputs, case.target = case_rows
        return float(loss.detach()), float(norm)

    for case, optimizer in zip((ours, theirs), optimizers, strict=True):
        step(case, optimizer, torch.arange(21), 1, rates[0])
    expected = [step(theirs, optimizers[1], *each) for each in zip(rows, seeds, rates, strict=True)]
    task = pk.NetworkTask(
        *ours.tensors(), steps_of(optimizers[0], ours.leaves, rates, max_norm), [len(r) for r in rows],
        None if batches is None else order, seeds,
    )  # fmt: skip
    [(losses, norms, gradients)] = pk.network_policy_steps([task], norms=True, **options)
    for found, right in ((losses, [e[0] for e in expected]), (norms, [e[1] for e in expected])):
        near(torch.tensor(list(found), dtype=torch.float64), torch.tensor(right, dtype=torch.float64), 500)
    for x, y, g in zip(ours.leaves, theirs.leaves, gradients, strict=True):
        near(x.detach(), y.detach(), 500)
        near(g, y.grad, 500)
        state, other = (o.state[p] for o, p in zip(optimizers, (x, y), strict=True))
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if state.get(name) is not None:
                near(state[name], other[name], 500)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_ensemble_is_its_members(threads):
    """Of different sizes, in one call, to the bit; those that are refused have fewer losses."""
    torch.set_num_threads(threads)

    def tasks():
        made = []
        for seed, widths in enumerate([(3, 9, 4), (3, 30, 4), (3, 4), (5, 70, 70, 2)]):
            case = Policy("categorical", widths=widths, rows=200, seed=seed)
            steps = pk.NetworkSteps("sgd", [0.1, 0.05], [True] * len(case.leaves))
            made.append(pk.NetworkTask(*case.tensors(), steps, [200, 200], None, [seed, seed + 1]))
        return made

    together, alone = tasks(), tasks()
    found = pk.network_policy_steps(together, norms=True)
    for one, task, other in zip(found, alone, together, strict=True):
        [right] = pk.network_policy_steps([task], norms=True)
        assert (list(one.losses), list(one.norms)) == (list(right.losses), list(right.norms))
        for x, y in zip(task.network.parameters(), other.network.parameters(), strict=True):
            assert torch.equal(x, y)
    together[2].target[0] = 9
    together[0].target[1] = 9
    assert [len(each.losses) for each in pk.network_policy_steps(together)] == [0, 2, 0, 2]
    with pytest.raises(ValueError, match="tasks: expected at least one"):
        pk.network_policy_steps([])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": {"rule": "rmsprop"}}, "rule: .*'rmsprop'"),
        ({"steps": {"moved": [True]}}, r"moved: expected one for each of 7 parameters, got 1"),
        ({"steps": {"first": [None] * 7}}, r"first\[0\]: expected .*float64 .*\(9, 3\), got None"),
        ({"steps": {"first": [torch.zeros(9, 3, device="meta").double()] * 7}}, r"first\[0\]: expected .*on meta"),
        ({"steps": {"second": [torch.zeros(2)] * 7}}, r"second\[0\]: expected .*got torch.float32 of shape \(2,\)"),
        ({"steps": {"rates": []}}, "batch_rows, seeds: .*1 and 1 for 0"),
        ({"batch_rows": [20]}, "all 21 rows without places"),
        ({"places": torch.arange(21) + 1}, "21 rows from 0 to 20, got 21 from 1 to 21"),
        ({"places": torch.arange(20)}, "21 rows from 0 to 20, got 20"),
        ({"places": torch.arange(21.0)}, "int64"),
    ],
)
def test_steps_that_would_write_elsewhere_are_refused(wrong, message):
    case = Policy("gaussian")
    optimizer = OPTIMIZERS["adam"](case.leaves)
    case.defined().backward(inputs=case.leaves)
    optimizer.step()
    steps = steps_of(optimizer, case.leaves, [0.1], 0.0)._replace(**wrong.pop("steps", {}))
    batches = {"batch_rows": [21], "places": None, "seeds": [0]} | wrong
    before = [p.detach().clone() for p in case.leaves]
    with pytest.raises((TypeError, ValueError), match=f"network_policy_steps: .*{message}"):
        pk.network_policy_steps([pk.NetworkTask(*case.tensors(), steps, **batches)])
    assert all(torch.equal(x, y) for x, y in zip(before, case.leaves, strict=True))


def test_a_parameter_does_not_move_twice():
    case = Policy("gaussian", widths=(4, 4))
    weight, bias = case.network.layers[0]
    tied = case.network._replace(layers=[(weight, bias), (weight, None)])
    steps = pk.NetworkSteps("sgd", [0.1], [True, True, True, False, False])
    with pytest.raises(ValueError, match=r"moved\[2\]: expected False for a parameter that moves already"):
        pk.network_policy_steps([pk.NetworkTask(tied, *case.tensors()[1:], steps, [21], None, [0])])


def test_gradients_belong_to_whoever_asked_for_them():
    """They may be changed, and have a graph of their own that ends with them."""
    case = Policy("gaussian")
    loss = case.fused()
    right = [g.clone() for g in grad(loss, case.leaves, retain_graph=True)]
    for gradient in grad(loss, case.leaves, retain_graph=True):
        gradient.zero_()
    for x, y in zip(grad(loss, case.leaves, retain_graph=True), right, strict=True):
        assert torch.equal(x, y)
    one, other = torch.ones(2, dtype=torch.float64, requires_grad=True)
    first, second = (grad(by * loss, case.leaves[0], create_graph=True)[0] for by in (one, other))
    assert grad(first.sum(), one, retain_graph=True)[0] == grad(second.sum(), other)[0] == right[0].sum()
    left = weakref.ref(first)
    del loss, first, second
    assert left() is None


@pytest.mark.parametrize("changed", ["inputs", "target", "reward", "weight", "steps"])
def test_a_graph_of_what_has_changed_is_not_differentiated(changed):
    case = Policy("gaussian")
    first = grad(case.fused(), case.leaves, create_graph=True)
    with torch.no_grad():
        if changed == "steps":
            steps = pk.NetworkSteps("sgd", [0.1], [True] * len(case.leaves))
            pk.network_policy_steps([pk.NetworkTask(*case.tensors(), steps, [21], None, [0])])
        else:
            (case.leaves[0] if changed == "weight" else getattr(case, changed)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(sum(g.sum() for g in first), case.leaves)


def test_vectors_and_rows_of_any_kind():
    case = Policy("gaussian")
    first = grad(case.fused(), case.leaves, create_graph=True)
    negative = [torch._neg_view(torch.ones_like(g)) for g in first]
    for x, y in zip(grad(first, case.leaves, negative, retain_graph=True),
                    grad(first, case.leaves, [-torch.ones_like(g) for g in first]), strict=True):  # fmt: skip
        assert torch.equal(x, y)
    with torch.inference_mode():
        rows = case.inputs.clone(), case.target.clone(), torch.ones((), dtype=torch.float64)
    first = grad(pk.network_policy_loss(case.network, *rows), case.leaves, create_graph=True)
    assert grad(first[0].sum(), case.leaves[0])[0].isfinite().all()


def test_cotangents_in_batches():
    case = Policy("gaussian")
    loss, weights = case.fused(), torch.tensor([1.0, -2.0], dtype=torch.float64)
    (right,) = grad(loss, case.leaves[:1], retain_graph=True)
    one = lambda by: grad(loss, case.leaves[0], by, retain_graph=True)[0]  # noqa: E731
    for found in (torch.func.vmap(one)(weights), grad(loss, case.leaves[0], weights, is_grads_batched=True)[0]):
        torch.testing.assert_close(found, torch.stack([right, -2 * right]))
    (first,) = grad(case.fused(), case.leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"batch of second ones.*use_backend"):
        grad(first, case.leaves[0], torch.ones(2, *first.shape, dtype=torch.float64), is_grads_batched=True)


def refused(reason, call):
    with pytest.raises(RuntimeError, match=f"network_policy_loss: .*{reason}"):
        call()


def test_what_is_not_served_is_refused():
    case = Policy("gaussian")
    network, inputs, target, reward = case.tensors()
    loss = pk.network_policy_loss
    for name in ("reference", "numba"):
        with pk.use_backend(name):
            refused(f"backend '{name}'", case.fused)
    refused("transform", lambda: torch.func.grad(lambda r: loss(network, inputs, target, r))(reward.detach()))
    with torch.autograd.forward_ad.dual_level():
        refused("transform", case.fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused("autocast", case.fused)
    refused("require grad", lambda: loss(network, inputs.clone().requires_grad_(), target, reward))
    refused("one type", lambda: loss(network, inputs, target, reward.float()))
    refused("contiguous", lambda: loss(network, inputs.mT.contiguous().mT, target, reward))
    refused("no rows", lambda: loss(network, inputs[:0], target[:0], reward))
    refused("targets have shape", lambda: loss(network, inputs, target[:3], reward))
    refused("reward has shape", lambda: loss(network, inputs, target, torch.ones(3, dtype=torch.float64)))
    refused("widths", lambda: loss(network._replace(layers=network.layers[1:]), inputs, target, reward))
    refused("spread", lambda: loss(network._replace(spread=()), inputs, target, reward))
    refused("neither bounded", lambda: loss(Policy("mvn").network._replace(bounds=(0, 1)), inputs, target, reward))


def test_derivatives_that_there_are_not():
    case = Policy("gaussian")
    first = grad(case.fused(), case.leaves, create_graph=True)
    second = lambda **options: grad(sum(g.sum() for g in first), case.leaves, **options)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"third derivative.*use_backend"):
        second(create_graph=True)
    first = grad(case.fused(estimator="reinforce", num_samples=3, seed=0), case.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"reinforce.*dice"):
        second()


def test_bad_options():
    case = Policy("gaussian")
    with pytest.raises(ValueError, match=r"gaussian_policy_loss: estimator: .*'exact'"):
        case.fused(estimator="exact")
    with pytest.raises(ValueError, match="num_samples"):
        case.fused(estimator="dice")
    with pytest.raises(TypeError, match="entropy_coef"):
        case.fused(entropy_coef=torch.tensor(0.1))
    for l2 in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="network_policy_loss: l2: expected a finite number"):
            case.fused(l2=l2)
    network, inputs, target, reward = case.tensors()
    for wrong, error, message in (
        ({"head": "poisson"}, ValueError, "head: expected one of .*'poisson'"),
        ({"activation": "swish"}, ValueError, "activation: expected one of .*'swish'"),
        ({"bounds": (1.0, -5.0)}, ValueError, "bounds: expected two finite numbers in their order"),
    ):
        with pytest.raises(error, match=f"network_policy_loss: {message}"):
            pk.network_policy_loss(network._replace(**wrong), inputs, target, reward)
    with pytest.raises(TypeError, match="network_policy_loss: inputs: expected a tensor, got list"):
        pk.network_policy_loss(network, inputs.tolist(), target, reward)
    for name, value in {"entropy_coef": 0.1, "estimator": "dice", "rbf_gamma": 1.0, "advantage": "mean"}.items():
        with pytest.raises(ValueError, match=f"network_policy_loss: {name}: expected .* without a reward, got"):
            pk.network_policy_loss(network, inputs, target, None, **{name: value})


def test_values_that_the_kernel_refuses():
    labels = Policy("categorical")
    labels.target[3] = 4
    with pytest.raises(
        ValueError, match="categorical_policy_loss: target: expected labels from 0 to 3, got 4 in row 3"
    ):
        labels.fused()
    labels.reward = None
    with pytest.raises(ValueError, match="categorical_log_prob: value: expected labels from 0 to 3, got 4 in row 3"):
        labels.fused()
    negative = Policy("gaussian", precision=0)
    with torch.no_grad():
        negative.reward.neg_()
    with pytest.raises(ValueError, match="gaussian_policy_loss: precision: expected positive values"):
        negative.fused()
    endless = Policy("mvn")
    with torch.no_grad():
        endless.spread[0][0] = torch.inf
    with pytest.raises(ValueError, match="mvn_policy_loss: expected finite outputs of the network"):
        endless.fused()


def test_values_that_are_not_finite_stay_so():
    for activation in ACTIVATIONS:
        case = Policy("gaussian", activation)
        case.inputs[4, 1] = torch.nan
        assert case.fused().isnan()


def test_status_says_what_serves():
    Policy("gaussian").fused()
    assert pk.status()["decisions"]["network_policy_loss on cpu in float64"]["backend"] == "native"
