"""Unrolled optimisers against torch's own: their numbers, and derivatives by whatever φ they depend on."""

import pytest
import torch
from po_bilevel import FixedPointProblem, ImplicitCG, OneHotMahalanobisReward, Recompute, Truncated, Unrolled
from problems import bilevel, double, name, positive
from torch import nn
from torch.optim import SGD, Adam, AdamW

HESSIAN = positive(4, seed=40)
TARGET = double(4, seed=41)


def inner(theta, phi):
    """No minimum at zero, not quadratic, and a penalty that is learned."""
    flat = torch.cat([theta["a"], theta["b"].reshape(-1)])
    return 0.5 * flat @ HESSIAN @ flat + flat.sin().sum() + phi["penalty"] * flat.square().sum()


def outer(theta, phi):
    return (torch.cat([theta["a"], theta["b"].reshape(-1)]) - TARGET).square().sum() * phi["penalty"].cos()


def start():
    parts = double(4, seed=42)
    return {"a": parts[:3].clone().requires_grad_(), "b": parts[3:].reshape(1, 1).clone().requires_grad_()}


def learned(**values):
    return {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in values.items()}


def descended(make, phi, steps, theta=None):
    """θ after steps of torch's own optimiser."""
    theta = {key: t.detach().clone().requires_grad_() for key, t in (start() if theta is None else theta).items()}
    fixed = {key: p.detach() for key, p in phi.items()}
    optimizer = make(list(theta.values()), fixed)
    for _ in range(steps):
        optimizer.zero_grad()
        inner(theta, fixed).backward()
        optimizer.step()
    return {key: t.detach() for key, t in theta.items()}


def differences(make, phi, steps, theta=lambda phi: None):
    """dF(θ_T)/dφ through torch's own optimiser, by central differences."""
    slopes = {}
    for key, at in phi.items():
        ends = []
        for shift in (1e-5, -1e-5):
            moved = phi | {key: at.detach() + shift}
            ends.append(outer(descended(make, moved, steps, theta(moved)), moved).item())
        slopes[key] = (ends[0] - ends[1]) / 2e-5
    return slopes


def agree(result, slopes):
    # Third derivatives of order one leave 1e-10 of the differences, rounding 1e-16 / 1e-5.
    assert {key: float(g) for key, g in result.gradient.items()} == pytest.approx(slopes, rel=1e-7, abs=1e-8)


OPTIONS = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": True}),
    (SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "maximize": True}),
    (Adam, {"lr": 0.1, "weight_decay": 0.2}),
    (Adam, {"lr": 0.1, "weight_decay": 0.2, "amsgrad": True, "maximize": True, "eps": 1e-3}),
    (AdamW, {"lr": 0.1, "weight_decay": 0.2, "betas": (0.7, 0.9)}),
    (AdamW, {"lr": 0.1, "amsgrad": True, "eps": 0.1}),
]


@pytest.mark.parametrize(("optimizer", "options"), OPTIONS)
@pytest.mark.parametrize("method", [Unrolled(7, 1.0), Recompute(7, 1.0), Truncated(7, 3, 1.0)], ids=name)
def test_steps_are_those_of_torch(optimizer, options, method):
    phi = learned(penalty=0.3)

    def make(parameters, phi):
        return optimizer(parameters, **options)

    method = type(method)(**{**vars(method), "learning_rate": None, "optimizer": make})
    result = method(inner, outer, start(), phi)
    torch.testing.assert_close(result.theta, descended(make, phi, 7), rtol=1e-12, atol=1e-12)
    if not isinstance(method, Truncated):
        agree(result, differences(make, phi, 7))


CHOICES = {
    "sgd": lambda given, phi: SGD(given, lr=phi["lr"], momentum=phi["momentum"], weight_decay=phi["decay"]),
    "nesterov": lambda given, phi: SGD(
        given, lr=phi["lr"], momentum=phi["momentum"], weight_decay=phi["decay"], nesterov=True
    ),
    "dampened": lambda given, phi: SGD(given, lr=phi["lr"], momentum=phi["momentum"], dampening=phi["decay"]),
    "adam": lambda given, phi: Adam(given, lr=phi["lr"], betas=(phi["momentum"], 0.9 + 0 * phi["lr"]),
                                    weight_decay=phi["decay"]),
    "adamw": lambda given, phi: AdamW(given, lr=phi["lr"], eps=phi["momentum"], weight_decay=phi["decay"]),
    "amsgrad": lambda given, phi: AdamW(given, lr=phi["lr"] * phi["momentum"], weight_decay=phi["decay"], amsgrad=True),
}  # fmt: skip


@pytest.mark.parametrize("make", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("method", [Unrolled, Recompute])
def test_derivatives_by_hyperparameters(make, method):
    phi = learned(penalty=0.3, lr=0.05, momentum=0.7, decay=0.1)
    result = method(6, optimizer=make)(inner, outer, start(), phi)
    slopes = differences(make, phi, 6)
    agree(result, slopes)
    assert all(abs(slope) > 1e-4 for slope in slopes.values())


def test_groups_and_what_is_in_none():
    """Learning rates of parts of θ, and a part that no group has."""
    phi = learned(penalty=0.3, a=0.1, b=0.2)

    def make(given, phi):
        return SGD([{"params": given[:1], "lr": phi["a"]}, {"params": given[1:], "lr": phi["b"], "momentum": 0.5}])

    agree(Unrolled(5, optimizer=make)(inner, outer, start(), phi), differences(make, phi, 5))
    frozen = Unrolled(5, optimizer=lambda given, phi: Adam(given[:1], lr=phi["a"]))
    result = frozen(inner, outer, start(), learned(penalty=0.3, a=0.1))
    assert torch.equal(result.theta["b"], start()["b"])
    assert not torch.equal(result.theta["a"], start()["a"])
    # A part that does not require grad is not among the parameters at all.
    theta = start()
    theta["b"].requires_grad_(False)
    again = frozen(inner, outer, theta, learned(penalty=0.3, a=0.1))
    torch.testing.assert_close(again.gradient, result.gradient)


@pytest.mark.parametrize("method", [Unrolled, Recompute])
@pytest.mark.parametrize("make", [CHOICES["sgd"], CHOICES["adam"]])
def test_phi_in_the_initial_theta(method, make):
    """MAML: θ_0 is φ, or computed from it; second-order terms included."""
    phi = learned(penalty=0.3, lr=0.05, momentum=0.7, decay=0.1, weight=0.4)

    def initial(phi):
        return {key: t.detach() * phi["weight"] for key, t in start().items()}

    result = method(5, optimizer=make, initial=initial)(inner, outer, start(), phi)
    agree(result, differences(make, phi, 5, initial))
    # φ may be θ_0 itself, and nothing else of the problem.
    whole = {key: t.detach().clone().requires_grad_() for key, t in start().items()}
    fixed = {"penalty": torch.tensor(0.3, dtype=torch.float64)}
    found = method(3, 0.1, initial=lambda phi: phi)(
        lambda theta, _: inner(theta, fixed), lambda theta, _: outer(theta, fixed), start(), whole
    )
    theta = whole
    for _ in range(3):
        slopes = torch.autograd.grad(inner(theta, fixed), tuple(theta.values()), create_graph=True)
        theta = {key: t - 0.1 * g for (key, t), g in zip(theta.items(), slopes, strict=True)}
    expected = torch.autograd.grad(outer(theta, fixed), tuple(whole.values()))
    torch.testing.assert_close(tuple(found.gradient.values()), expected, rtol=1e-12, atol=1e-12)


def test_a_parameter_without_gradient_under_adam():
    """√v has an infinite derivative at zero, where the first moment is zero too."""
    phi = learned(lr=0.1, scale=1.5)
    theta = (torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True),)
    method = Unrolled(3, optimizer=lambda given, phi: Adam(given, lr=phi["lr"]))
    result = method(lambda t, phi: phi["scale"] * t[0][0] ** 2, lambda t, phi: t[0].square().sum(), theta, phi)
    assert result.gradient["lr"] < 0
    assert float(result.theta[0][1]) == 2.0


def test_inner_optimisers_that_cannot_be_unrolled():
    phi = learned(penalty=0.3)

    def call(make):
        return Unrolled(2, optimizer=make)(inner, outer, start(), phi)

    for kind in (torch.optim.RMSprop, torch.optim.LBFGS, torch.optim.NAdam):
        with pytest.raises(ValueError, match=rf"optimizer: expected .*, SGD, Adam, AdamW, got {kind.__name__}"):
            call(lambda given, phi, kind=kind: kind(given, lr=0.1))
    with pytest.raises(ValueError, match="optimizer: expected parameters that are among those given, got others"):
        call(lambda given, phi: SGD([torch.ones(1, requires_grad=True)], lr=0.1))
    with pytest.raises(ValueError, match=r"optimizer: weight_decay: expected one element, got shape \(2,\)"):
        call(lambda given, phi: SGD([{"params": given, "weight_decay": torch.ones(2)}], lr=0.1))
    for arguments in ({}, {"learning_rate": 0.1, "optimizer": CHOICES["sgd"]}):
        with pytest.raises(ValueError, match="learning_rate: expected it or an optimizer, got both or neither"):
            Unrolled(2, **arguments)
    with pytest.raises(TypeError, match="Unrolled: optimizer: expected a function, got str"):
        Unrolled(2, optimizer="adam")
    with pytest.raises(ValueError, match=r"Unrolled: initial: expected shapes .* like theta"):
        Unrolled(2, 0.1, initial=lambda phi: {"a": phi["penalty"], "b": phi["penalty"]})(inner, outer, start(), phi)


def test_a_phi_that_only_the_optimiser_might_see_is_refused_if_it_does_not():
    phi = learned(penalty=0.3, lr=0.1)
    method = Unrolled(2, optimizer=lambda given, phi: SGD(given, lr=float(phi["lr"].detach())))
    with pytest.raises(ValueError, match=r"phi\['lr'\]: .*does not reach"):
        method(inner, outer, start(), phi)


def test_momentum_on_a_map():
    """The residual of a map takes the place of the gradient: the heavy ball gets to the same fixed point."""
    phi = learned(bias=0.3)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    problem = FixedPointProblem(lambda z, phi: torch.cos(z) * phi["bias"])
    plain = Unrolled(60, 1.0)(problem, lambda z, phi: z.square(), theta, phi)
    heavy = Unrolled(120, optimizer=lambda given, phi: SGD(given, lr=1.0, momentum=0.3))(
        problem, lambda z, phi: z.square(), theta, phi
    )
    torch.testing.assert_close(heavy.theta, plain.theta)
    torch.testing.assert_close(heavy.gradient, plain.gradient)


class WithRate(OneHotMahalanobisReward):
    """A reward that has the learning rate of the inner optimiser with it."""

    def __init__(self):
        super().__init__(3)
        self.log_rate = nn.Parameter(torch.tensor(-3.0))


def with_rate(data, **options):
    """Two groups of φ, each with an optimiser of its own."""
    reward = WithRate().double()
    optimizers = [torch.optim.Adam(reward.matrix.parameters(), lr=0.1), SGD([reward.log_rate], lr=0.5)]
    method = Unrolled(5, optimizer=lambda given, phi: Adam(given, lr=phi[0].exp()))
    return bilevel(data, reward=reward, **{
        "outer_optimizer": optimizers, "hypergradient": method, "inner_steps": 0, **options,
    })  # fmt: skip


def test_the_trainer_learns_groups_of_phi_with_optimisers_of_their_own(classes, tmp_path):
    trainer = with_rate(classes, checkpoint=tmp_path / "state")
    history = trainer.fit(4)
    assert history[-1].outer_loss < history[0].outer_loss
    assert float(trainer.reward.log_rate.detach()) != -3.0
    # Each optimiser took its steps, and all of it is in the checkpoint.
    assert len(trainer._outer_optimizer.each[0].state) == 1
    resumed = with_rate(classes)
    resumed.resume(tmp_path / "state")
    trainer.fit(2)
    resumed.fit(2)
    for mine, other in zip(trainer.reward.parameters(), resumed.reward.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_groups_of_phi_that_do_not_add_up(classes):
    reward = WithRate().double()
    matrix, rate = SGD(reward.matrix.parameters(), lr=0.1), SGD([reward.log_rate], lr=0.1)
    with pytest.raises(ValueError, match=r"outer_optimizer: .*lacks log_rate"):
        bilevel(classes, reward=reward, outer_optimizer=[matrix])
    with pytest.raises(ValueError, match="outer_optimizer: expected optimisers of different parameters"):
        bilevel(classes, reward=reward, outer_optimizer=[matrix, rate, rate])
    with pytest.raises(ValueError, match="got LBFGS"):
        bilevel(classes, reward=reward, outer_optimizer=[matrix, torch.optim.LBFGS([reward.log_rate])])


@pytest.mark.parametrize("method", [Unrolled(5, 0.1), ImplicitCG(damping=0.1)], ids=name)
def test_frozen_parameters_and_buffers_are_left_alone(classes, method):
    trainer = bilevel(classes, hypergradient=method, inner_steps=0 if isinstance(method, Unrolled) else 5)
    network = trainer.policy.network
    network.bias.requires_grad_(False)
    trainer.policy.register_buffer("count", torch.zeros(1))
    weight, bias = network.weight.detach().clone(), network.bias.clone()
    trainer.fit(2)
    assert torch.equal(trainer.policy.count, torch.zeros(1))
    assert torch.equal(network.bias, bias)
    assert not torch.equal(network.weight, weight)
