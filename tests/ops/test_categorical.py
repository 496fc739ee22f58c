"""The categorical against closed forms, torch.distributions, and itself by Monte Carlo."""

import pytest
import torch
from torch.autograd import grad

import po_kernels as pk

from .cases import serving
from .monte_carlo import monte_carlo

F64 = {"dtype": torch.float64}
LOSS = pytest.mark.parametrize("backend", serving("categorical_policy_loss"))


@LOSS
@pytest.mark.parametrize("gamma", [None, 0.3])
def test_exact_loss(backend, gamma):
    logits, table, target = torch.randn(5, 4, **F64), torch.randn(4, 4, **F64), torch.tensor([0, 3, 1, 1, 2])
    found, stats = pk.categorical_policy_loss(
        logits, target, table, entropy_coef=0.6, rbf_gamma=gamma, reduction="none", return_stats=True, backend=backend
    )
    policy = torch.distributions.Categorical(logits=logits)
    rewards = table.T[target] if gamma is None else torch.exp(gamma * table.T[target])
    expected = (policy.probs * rewards).sum(-1)
    spread = (policy.probs * (rewards - expected[:, None]).square()).sum(-1).sqrt()
    assert torch.allclose(found, -expected - 0.6 * policy.entropy(), rtol=1e-13)
    assert torch.allclose(stats.reward_mean, expected, rtol=1e-12)
    assert torch.allclose(stats.reward_std, spread, rtol=1e-12)
    assert torch.allclose(stats.advantage_std, spread, rtol=1e-12)
    assert torch.allclose(stats.entropy, policy.entropy(), rtol=1e-13)
    assert torch.allclose(stats.log_prob, policy.log_prob(target), rtol=1e-13)


@LOSS
def test_inner_optimum(backend):
    """p* = softmax(E_y R[·, y] / λ), where the derivative vanishes; and any other policy is worse."""
    entropy_coef, table = 0.7, torch.randn(4, 4, **F64)
    target = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    logits = (table.T[target].mean(0) / entropy_coef).requires_grad_()

    def loss(logits):
        return pk.categorical_policy_loss(
            logits.expand(10, 4), target, table, entropy_coef=entropy_coef, backend=backend
        )

    best = loss(logits)
    (first,) = grad(best, logits)
    assert first.abs().max() < 1e-14
    for _ in range(5):
        assert loss(logits + 0.1 * torch.randn(4, **F64)) > best


@LOSS
def test_distance_from_the_optimum_is_a_divergence(backend):
    """L(θ) = λ KL(p_θ ‖ p*) + const."""
    entropy_coef, table, target = 0.7, torch.randn(4, 4, **F64), torch.tensor([0, 0, 1, 2, 3, 3])
    optimum = torch.distributions.Categorical(logits=table.T[target].mean(0) / entropy_coef)
    constants = []
    for _ in range(5):
        logits = torch.randn(4, **F64)
        loss = pk.categorical_policy_loss(
            logits.expand(6, 4), target, table, entropy_coef=entropy_coef, backend=backend
        )
        policy = torch.distributions.Categorical(logits=logits)
        constants.append(loss - entropy_coef * torch.distributions.kl_divergence(policy, optimum))
    assert (torch.stack(constants) - constants[0]).abs().max() < 1e-13


@LOSS
def test_one_hot_mahalanobis_rewards(backend):
    """R[i, j] = −(e_i − e_j)ᵀU(e_i − e_j), with U = u·I: 0 for the right answer and −2u for any other."""
    u = torch.tensor(0.9, **F64, requires_grad=True)
    table = -2 * u * (1 - torch.eye(3, **F64))
    logits, target = torch.randn(4, 3, **F64), torch.tensor([0, 1, 2, 2])
    loss = pk.categorical_policy_loss(logits, target, table, backend=backend)
    wrong = 1 - torch.softmax(logits, -1)[torch.arange(4), target]
    assert torch.allclose(loss, 2 * u * wrong.mean(), rtol=1e-13)
    assert torch.allclose(grad(loss, u)[0], 2 * wrong.mean(), rtol=1e-13)


@LOSS
@pytest.mark.parametrize("advantage", ["none", "loo"])
@pytest.mark.parametrize("gamma", [None, 0.3])
def test_monte_carlo(backend, advantage, gamma):
    target = torch.tensor([0, 2])
    options = {"entropy_coef": 0.5, "rbf_gamma": gamma, "backend": backend}
    monte_carlo(
        lambda logits, table, seed: pk.categorical_policy_loss(
            logits, target, table, estimator="dice", num_samples=4096, advantage=advantage, seed=seed, **options
        ),
        lambda logits, table: pk.categorical_policy_loss(logits, target, table, **options),
        [torch.randn(2, 3, **F64), torch.randn(3, 3, **F64)],
    )


@pytest.mark.parametrize("backend", serving("categorical_log_prob"))
def test_log_prob(backend):
    for lead in ((), (3,), (2, 3)):
        for extra in ((), (4,), (2, 2)):
            logits, value = torch.randn(*lead, 5, **F64), torch.randint(5, (*extra, *lead))
            found = pk.categorical_log_prob(logits, value, backend=backend)
            expected = torch.distributions.Categorical(logits=logits).log_prob(value)
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("backend", serving("categorical_log_prob"))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_every_integer_type(backend, dtype):
    logits, value = torch.randn(3, 5), torch.tensor([4, 0, 2])
    found = pk.categorical_log_prob(logits, value.to(dtype), backend=backend)
    assert torch.equal(found, pk.categorical_log_prob(logits, value, backend=backend))


@pytest.mark.parametrize("backend", serving("categorical_surrogate_loss"))
def test_the_surrogate_of_the_ops_own_samples_is_the_policy_loss(backend):
    logits, table, target = torch.randn(3, 4, **F64), torch.randn(4, 4, **F64), torch.tensor([1, 3, 0])
    options = {"entropy_coef": 0.4, "estimator": "dice", "advantage": "standardized", "backend": backend}
    results = []
    for surrogate in (True, False):
        inputs = [logits.clone().requires_grad_(), table.clone().requires_grad_()]
        if surrogate:
            samples = pk.categorical_sample(logits, 6, seed=2)
            loss = pk.categorical_surrogate_loss(inputs[0], samples, inputs[1][samples, target], **options)
        else:
            loss = pk.categorical_policy_loss(inputs[0], target, inputs[1], num_samples=6, seed=2, **options)
        first = grad(loss, inputs, create_graph=True)
        second = grad(sum(g.square().sum() for g in first), inputs)
        results.append([loss, *first, *second])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [1024, 1029])
@pytest.mark.parametrize("backend", serving("categorical_log_prob"))
def test_many_classes(backend, classes):
    """So many that the CPU's lanes hold those of one row: both orders, masks, and rows that depend on no other."""
    eps = torch.finfo(torch.float32).eps
    logits = torch.randn(19, classes)
    logits[3, 5:] = logits[:, 0] = -torch.inf
    labels, rewards = torch.randint(1, 5, (3, 19)), torch.randn(3, 19)
    labels[0, 4], labels[1] = classes - 1, labels[2]

    def log_prob(x):
        return torch.log_softmax(x, -1).gather(1, labels.T).T

    def surrogate(x):
        log_p, entropy = log_prob(x), -(torch.softmax(x, -1) * torch.log_softmax(x, -1)).sum(-1)
        return -(rewards * torch.exp(log_p - log_p.detach())).mean(0) - 0.3 * entropy

    def found_surrogate(x):
        return pk.categorical_surrogate_loss(
            x, labels[:, : len(x)], rewards[:, : len(x)], entropy_coef=0.3, advantage="none", reduction="none",
            backend=backend,
        )  # fmt: skip

    def orders(function, x):
        x = x.clone().requires_grad_()
        value = function(x)
        (first,) = grad(value.square().sum(), x, create_graph=True)
        return value, first, grad(first.square().sum(), x)[0]

    for function, exact in (
        (lambda x: pk.categorical_log_prob(x, labels[:, : len(x)], backend=backend), log_prob),
        (found_surrogate, surrogate),
    ):
        found = orders(function, logits)
        expected = orders(exact, logits.double().clamp(min=-1e5))  # as good as masked
        for x, y, alone in zip(found, expected, orders(function, logits[:1]), strict=True):
            assert (x - y).abs().max() <= 72 * eps * y.abs().max()  # of a run, as of sums in test_long_sums.py
            assert torch.equal(x[..., :1, :] if x.shape == logits.shape else x[..., :1], alone)
    seeds = {"seed": 5, "row_offset": 2**33}
    drawn = pk.categorical_sample(logits, 7, **seeds, backend=backend)
    assert torch.equal(drawn, pk.categorical_sample(logits, 7, **seeds, backend="reference"))
    assert torch.equal(drawn[:, :3], pk.categorical_sample(logits[:3], 7, **seeds, backend=backend))
    assert (logits.gather(1, drawn.T) > -torch.inf).all()
