"""Derivatives against finite differences, and those of the score-function estimators against an oracle."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck

import po_kernels as pk

from . import test_advantage
from .cases import (
    ADVANTAGES,
    GAUSSIAN_LOSSES,
    LOSSES,
    PRECISIONS,
    REDUCTIONS,
    SURROGATE_LOSSES,
    VALUES,
    Case,
    directions,
    distance,
    draw,
    fused_pairs,
    largest,
    pairs,
    serving,
)

SMALL = {"lead": (2,), "dim": 2, "group": 3, "mask": False, "rbf_gamma": None}


def check(case: Case, backend: str) -> None:
    """First and second derivatives by finite differences along random directions.

    In forward mode too, but for the reference, whose forward mode is torch's own.
    """
    inputs, forward = case.inputs, backend != "reference"

    def function(*tensors):
        return case(*tensors, backend=backend)

    assert gradcheck(function, inputs, check_forward_ad=forward, fast_mode=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=forward, fast_mode=True)


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize(("op", "backend"), pairs(GAUSSIAN_LOSSES))
def test_finite_differences_of_gaussian_policy_losses(op, backend, kind):
    for number, reduction in enumerate(REDUCTIONS):
        for estimator in ("analytic", "reparam"):
            for shared in (False, True):
                case = draw(op, number, **SMALL, precision_kind=kind, shared_scale=shared, estimator=estimator)
                case = case.with_options(reduction=reduction, entropy_coef=0.7)
                check(case, backend)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize(("op", "backend"), pairs(GAUSSIAN_LOSSES))
def test_finite_differences_of_reparam_whatever_the_advantage(op, backend, gamma, advantage):
    options = {**SMALL, "rbf_gamma": gamma}
    case = draw(op, 0, **options, precision_kind="full", estimator="reparam", advantage=advantage, reduction="mean")
    check(case, backend)


@pytest.mark.parametrize("gamma", [None, 0.4])
@pytest.mark.parametrize("backend", serving("categorical_policy_loss"))
def test_finite_differences_of_the_exact_categorical_loss(backend, gamma):
    for number, reduction in enumerate(REDUCTIONS):
        options = {**SMALL, "rbf_gamma": gamma, "dim": 3}
        case = draw("categorical_policy_loss", number, **options, estimator="exact", reduction=reduction)
        check(case, backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("op", "backend"), pairs(("gaussian_surrogate_loss", "mvn_surrogate_loss")))
def test_finite_differences_of_reparam_surrogates(op, backend, reduction):
    case = draw(op, 0, **{**SMALL, "rbf_gamma": 0.4}, estimator="reparam", reduction=reduction, entropy_coef=0.7)
    check(case, backend)


@pytest.mark.parametrize(("op", "backend"), pairs(VALUES))
def test_finite_differences_of_values(op, backend):
    for seed in range(3):
        case = draw(op, seed, lead=(2,), dim=1 + seed, group=2, mask=False)
        check(case, backend)


# The oracle of the score-function estimators: the samples, and what a weight is divided by, held at θ0.


def oracle_log_prob(family: str, parameters: list[Tensor], samples: Tensor) -> Tensor:
    """(G, B)."""
    if family == "categorical":
        return torch.log_softmax(parameters[0], -1).expand(*samples.shape, -1).gather(-1, samples[..., None])[..., 0]
    mean, scale = parameters
    dim = mean.shape[-1]
    root = torch.diag_embed(scale.exp()) if family == "gaussian" else torch.tril(scale)
    covariance = (root @ root.mT).expand(*mean.shape, dim)
    residual = samples - mean
    square = (residual.unsqueeze(-2) @ torch.linalg.inv(covariance) @ residual.unsqueeze(-1))[..., 0, 0]
    return -0.5 * (square + torch.logdet(covariance) + dim * math.log(2 * math.pi))


def oracle_entropy(family: str, parameters: list[Tensor]) -> Tensor:
    if family == "categorical":
        p = torch.softmax(parameters[0], -1)
        return -(p * torch.log(p)).sum(-1)
    mean, scale = parameters
    dim = mean.shape[-1]
    root = torch.diag_embed(scale.exp()) if family == "gaussian" else torch.tril(scale)
    covariance = (root @ root.mT).expand(*mean.shape, dim)
    return 0.5 * torch.logdet(2 * math.pi * math.e * covariance)


def oracle_rewards(case: Case, inputs: dict[str, Tensor], samples: Tensor) -> Tensor:
    if "rewards" in inputs:
        return inputs["rewards"]
    if "reward_table" in inputs:
        return inputs["reward_table"][samples, case.constants["target"]]
    u = inputs["precision"]
    dim = inputs["mean"].shape[-1]
    matrix = u * torch.eye(dim, dtype=u.dtype) if u.ndim == 0 else torch.diag(u) if u.ndim == 1 else (u + u.T) / 2
    residual = samples - inputs["target"]
    return -torch.einsum("gbi,ij,gbj->gb", residual, matrix, residual)


def oracle(case: Case):
    """f(x; x0) of the inputs x, explicit and smooth, whose derivatives at x0 are those the estimator is to have."""
    family = case.op.split("_")[0]
    names = list(case.tensors)
    parameters = 1 if family == "categorical" else 2
    start = list(case.tensors.values())[:parameters]
    if "samples" in case.constants:
        samples = case.constants["samples"]
    else:
        draw_samples = getattr(pk, f"{family}_sample")
        options = {key: case.options[key] for key in ("num_samples", "seed", "row_offset")}
        samples = draw_samples(*start, **options, backend="reference")
    frozen = oracle_log_prob(family, start, samples).detach()
    gamma = case.options["rbf_gamma"]

    def transformed(inputs):
        rewards = oracle_rewards(case, inputs, samples)
        return rewards if gamma is None else torch.exp(gamma * rewards)

    held = transformed(case.tensors).detach()

    def function(*tensors: Tensor) -> Tensor:
        inputs = dict(zip(names, tensors, strict=True))
        rewards = transformed(inputs)
        advantage = test_advantage.ORACLE[case.options["advantage"]](rewards, held)
        log_prob = oracle_log_prob(family, list(tensors[:parameters]), samples)
        weight = torch.exp(log_prob - frozen)
        entropy = oracle_entropy(family, list(tensors[:parameters]))
        rows = -((rewards + (weight - 1) * advantage).mean(0) + case.options["entropy_coef"] * entropy)
        reduction = case.options["reduction"]
        return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()

    return function


def scored(op: str, seed: int, estimator: str, **options) -> Case:
    return draw(op, seed, lead=(3,), dim=3, group=4, mask=False, estimator=estimator, **options)


def orders(function, case: Case, seed: int, *, second: bool = True) -> list[list[Tensor]]:
    inputs = case.inputs
    output = function(*inputs)
    weight = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape).requires_grad_()
    first = grad(output, inputs, weight, create_graph=True, materialize_grads=True)
    result = [[output], list(first)]
    if second:
        inner = sum((g * v).sum() for g, v in zip(first, directions(case, seed), strict=True))
        result.append(list(grad(inner, (*inputs, weight), materialize_grads=True)))
    return result


def agrees_with_oracle(case: Case, backend: str, seed: int, *, second: bool) -> None:
    found = orders(lambda *xs: case(*xs, backend=backend), case, seed, second=second)
    expected = orders(oracle(case), case, seed, second=second)
    for x, y in zip(found, expected, strict=True):
        # Some hundred float64 operations an entry, whose terms are within 1e3 of the largest entry.
        assert distance(x, y) <= 1e-10 * (1.0 + largest(y)), case


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize(("op", "backend"), pairs(LOSSES))
def test_dice_has_the_derivatives_of_the_oracle(op, backend, advantage):
    for seed in range(12):
        options = {"precision_kind": PRECISIONS[seed % 3], "reduction": REDUCTIONS[seed // 3 % 3]}
        case = scored(op, seed, "dice", advantage=advantage, **options)
        agrees_with_oracle(case, backend, seed, second=True)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize(("op", "backend"), pairs(LOSSES))
def test_reinforce_has_the_first_derivative_of_the_oracle(op, backend, advantage):
    for seed in range(6):
        options = {"precision_kind": PRECISIONS[seed % 3], "reduction": REDUCTIONS[seed // 3 % 3]}
        agrees_with_oracle(scored(op, seed, "reinforce", advantage=advantage, **options), backend, seed, second=False)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("op", LOSSES)
def test_the_oracle_itself(op, advantage):
    case = draw(op, 2, **{**SMALL, "rbf_gamma": 0.2}, estimator="dice", advantage=advantage, precision_kind="full")
    inputs = case.inputs
    assert gradcheck(oracle(case), inputs, fast_mode=True)
    assert gradgradcheck(oracle(case), inputs, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("op", "backend"), pairs(LOSSES))
def test_a_second_derivative_of_reinforce_raises(op, backend, reduction):
    case = scored(op, 0, "reinforce", reduction=reduction)

    def function(x):
        return case(x, *list(case.tensors.values())[1:], backend=backend).sum()

    start = next(iter(case.tensors.values()))
    x = start.clone().requires_grad_()
    (first,) = grad(function(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{op}.*dice"):
        grad(first.sum(), x)
    with pytest.raises(RuntimeError, match=rf"{op}.*dice"):
        torch.func.hessian(function)(start)
    with pytest.raises(RuntimeError, match=rf"{op}.*dice"):
        torch.func.jvp(torch.func.grad(function), (start,), (torch.ones_like(start),))
    with pytest.raises(RuntimeError, match=rf"{op}.*dice"):
        torch.func.grad(lambda y: torch.func.jvp(function, (y,), (torch.ones_like(y),))[1])(start)
    torch.func.jvp(function, (start,), (torch.ones_like(start),))


@pytest.mark.parametrize(("op", "backend"), pairs(SURROGATE_LOSSES))
def test_a_second_derivative_of_reinforce_raises_in_the_rewards_too(op, backend):
    case = scored(op, 0, "reinforce", reduction="mean", advantage="mean")
    *_, rewards = inputs = case.inputs
    first = grad(case(*inputs, backend=backend), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{op}.*dice"):
        grad(first[0].sum(), rewards)


@pytest.mark.parametrize(("op", "backend"), fused_pairs(LOSSES))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(op, backend, reduction):
    """Also after the caller has changed those it got, which may be what the forward pass computed."""
    case = draw(op, 5, **SMALL, estimator="dice", reduction=reduction)
    inputs = [x.requires_grad_() for x in case.inputs]
    loss = case(*inputs, backend=backend)
    cotangent = torch.rand_like(loss) + 0.5
    expected = grad(case(*inputs, backend="reference"), inputs, cotangent)
    for _ in range(3):
        found = grad(loss, inputs, cotangent, retain_graph=True)
        # float64, sums of some tens of terms of size 1 or so
        assert distance(found, expected) < 1e-12 * max(1.0, largest(expected))
        for x in found:
            x.mul_(7)
    unit = torch.ones_like(loss)
    expected = grad(case(*inputs, backend="reference"), inputs, unit)
    for _ in range(2):
        found = grad(loss, inputs, unit, create_graph=True)
        assert distance(found, expected) < 1e-12 * max(1.0, largest(expected))


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize(("op", "backend"), fused_pairs(LOSSES))
def test_second_derivatives_along_the_policy_alone(op, backend, gamma, advantage):
    """As in an inner loop's Hessian and mixed products: the other inputs have no tangent at all."""
    options = {**SMALL, "lead": (5,), "group": 6, "rbf_gamma": gamma}
    case = draw(op, 8, **options, estimator="dice", advantage=advantage, reduction="mean")
    inputs = [x.requires_grad_() for x in case.inputs]
    policy = inputs[: 1 if op.startswith("categorical") else 2]
    along = directions(case, 9)[: len(policy)]

    def products(backend):
        first = grad(case(*inputs, backend=backend), policy, create_graph=True)
        return grad(first, inputs, along)

    expected = products("reference")
    # float64, sums of some hundreds of terms of size 1 or so
    assert distance(products(backend), expected) < 1e-10 * max(1.0, largest(expected))


@pytest.mark.parametrize("estimator", ["dice", "reinforce"])
@pytest.mark.parametrize(("op", "backend"), fused_pairs(LOSSES))
def test_forward_mode_through_a_backward_pass_without_a_graph(op, backend, estimator):
    """Gradients of dual tensors are dual tensors, whether or not a graph of them is asked for."""
    case = draw(op, 6, **SMALL, estimator="dice", reduction="mean")
    tangents = directions(case, 7)

    def products(backend, **changes):
        with forward_ad.dual_level():
            inputs = [
                forward_ad.make_dual(x.clone().requires_grad_(), v) for x, v in zip(case.inputs, tangents, strict=True)
            ]
            found = grad(case(*inputs, backend=backend, **changes), inputs)
            return [forward_ad.unpack_dual(g).tangent for g in found]

    if estimator == "reinforce":
        with pytest.raises(RuntimeError, match="dice"):
            products(backend, estimator="reinforce")
        return
    expected = products("reference")
    # float64, sums of some tens of terms of size 1 or so
    assert distance(products(backend), expected) < 1e-11 * max(1.0, largest(expected))


@pytest.mark.parametrize(("op", "backend"), fused_pairs(LOSSES))
def test_a_third_derivative_raises(op, backend):
    case = scored(op, 0, "dice", reduction="mean")
    others = list(case.tensors.values())[1:]

    def function(x):
        return case(x, *others, backend=backend)

    start = next(iter(case.tensors.values()))
    x = start.clone().requires_grad_()
    (first,) = grad(function(x), x, create_graph=True)
    (second,) = grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{op}.*backend='reference'"):
        grad(second.sum(), x)
    with pytest.raises(RuntimeError, match=rf"{op}.*backend='reference'"):
        torch.func.grad(lambda y: torch.func.hessian(function)(y).sum())(start)
    case(*case.tensors.values(), backend="reference")


@pytest.mark.parametrize("backend", serving("gaussian_policy_loss"))
def test_the_hessian_in_log_std_has_the_right_sign(backend):
    """In one dimension, at the optimum σ² = λ/(2u), with data a distance s from the mean.

    The surrogate r·log p, differentiated twice, loses the product of the scores: its expectation is
    −2u(3σ² + s²), negative, where the truth, which dice has, is 2λ.
    """
    u, entropy_coef, s, rows, group = 1.3, 0.8, 0.6, 4000, 50
    sigma = math.sqrt(entropy_coef / (2 * u))
    mean = torch.zeros(rows, 1, dtype=torch.float64)
    target = torch.full_like(mean, s)
    target[::2] *= -1
    log_std = torch.full_like(mean, math.log(sigma)).requires_grad_()

    def second_derivative(loss: Tensor) -> Tensor:
        (first,) = grad(loss, log_std, create_graph=True)
        (second,) = grad(first.sum(), log_std)
        return second

    def estimates(values: Tensor, expected: float) -> None:
        error = values.std() / math.sqrt(values.numel())
        assert abs(values.mean() - expected) < 4 * error
        assert error < 0.05 * abs(expected)

    dice = pk.gaussian_policy_loss(
        mean, log_std, target, u, entropy_coef=entropy_coef, estimator="dice", num_samples=group,
        advantage="none", reduction="sum", seed=11, backend=backend,
    )  # fmt: skip
    estimates(second_derivative(dice), 2 * entropy_coef)

    samples = pk.gaussian_sample(mean, log_std.detach(), group, seed=11)
    rewards = -u * (samples - target).square().squeeze(-1)
    plain = -((rewards * pk.gaussian_log_prob(mean, log_std, samples, backend="reference")).mean(0)).sum()
    estimates(second_derivative(plain), -2 * u * (3 * sigma**2 + s**2))


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_views_that_are_to_be_negated(backend):
    """The imaginary part of a conjugate shares memory with that of the number, and has its sign elsewhere."""
    lazy = torch.view_as_complex(torch.randn(6, 3, 2, dtype=torch.float64)).conj().imag
    assert lazy.is_neg()
    target, scale = torch.zeros(6, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    results = []
    for mean in (lazy, lazy.resolve_neg()):
        mean = mean.detach().requires_grad_()
        loss = pk.gaussian_policy_loss(mean, scale, target, 1.5, entropy_coef=0.2, backend=backend)
        (gradient,) = torch.autograd.grad(loss, mean, create_graph=True)
        (product,) = torch.autograd.grad(gradient, mean, lazy)
        plain = pk.gaussian_policy_loss(mean.detach(), scale, target, 1.5, entropy_coef=0.2, backend=backend)
        results.append((loss, gradient, product, plain))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_cotangents_in_batches(backend):
    """By torch.func.vmap of a backward pass; torch's older ways are refused where a kernel would have to run."""
    generator = torch.Generator().manual_seed(3)
    mean, target = (torch.randn(7, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    log_std, precision = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)
    loss = pk.gaussian_policy_loss(
        mean, log_std, target, precision, estimator="dice", num_samples=4, seed=1, backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, log_std, create_graph=True)
    basis = torch.eye(log_std.numel(), dtype=torch.float64).reshape(-1, *log_std.shape)
    expected = torch.stack([torch.autograd.grad(gradient, log_std, v, retain_graph=True)[0] for v in basis])
    got = torch.func.vmap(lambda v: torch.autograd.grad(gradient, log_std, v, retain_graph=True)[0])(basis)
    torch.testing.assert_close(got, expected)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    scaled = torch.func.vmap(lambda w: torch.autograd.grad(loss, log_std, w, retain_graph=True)[0])(weights)
    torch.testing.assert_close(scaled, weights.reshape(-1, *[1] * gradient.ndim) * gradient.detach())
    with pytest.raises(RuntimeError, match=r"gaussian_policy_loss: .*is_grads_batched.*torch\.func\.vmap"):
        torch.autograd.grad(gradient, log_std, basis, is_grads_batched=True)
