"""Policies under rewards that are sampled, bounded standard deviations, full covariances."""

import math

import pytest
import torch
from po_bilevel import (
    Batch,
    ConditionalMLPReward,
    CosineReward,
    EmbeddingMahalanobisReward,
    GaussianPolicy,
    ImplicitCG,
    LinearCategorical,
    LinearFullGaussian,
    LinearGaussian,
    MahalanobisReward,
    MatrixReward,
    MLPCategorical,
    MLPFullGaussian,
    MLPGaussian,
    MLPReward,
    OneHotMahalanobisReward,
    SampledReward,
)
from problems import ROWS, seeded
from torch import nn

REWARDS = [MLPReward, ConditionalMLPReward, CosineReward, EmbeddingMahalanobisReward]
GAUSSIANS = [LinearGaussian, MLPGaussian, LinearFullGaussian, MLPFullGaussian]


@pytest.fixture
def values() -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(40, 3).double(), torch.randn(40, 2).double())


@pytest.fixture
def labels() -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(40, 3).double(), torch.randint(4, (40,)))


@pytest.mark.parametrize("make", [LinearGaussian, MLPGaussian])
@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_gaussian_policies_give_mean_and_log_std(make, state_dependent_std, regression):
    policy = seeded(make, 3, 2, state_dependent_std=state_dependent_std)
    mean, log_std = policy(regression.inputs)
    assert mean.shape == (ROWS, 2)
    assert log_std.shape == ((ROWS, 2) if state_dependent_std else (2,))
    assert (log_std == 0).all()
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(regression.target).sum(dim=-1)
    torch.testing.assert_close(policy.log_prob(regression.inputs, regression.target), expected)
    loss = policy.policy_loss(regression.inputs, regression.target, MahalanobisReward(2).double(), entropy_coef=1.0)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("make", [LinearCategorical, MLPCategorical])
def test_categorical_policies_give_logits(make, classes):
    policy = seeded(make, 2, 3)
    logits = policy(classes.inputs)
    assert logits.shape == (90, 3)
    expected = torch.distributions.Categorical(logits=logits).log_prob(classes.target)
    torch.testing.assert_close(policy.log_prob(classes.inputs, classes.target), expected)


def test_a_policy_refuses_the_reward_of_another_family(regression, classes):
    with pytest.raises(TypeError, match="MahalanobisReward"):
        LinearGaussian(3, 2).policy_loss(*regression, OneHotMahalanobisReward(2))
    with pytest.raises(TypeError, match="OneHotMahalanobisReward"):
        LinearCategorical(2, 3).policy_loss(*classes, MahalanobisReward(3))


def reward_of(make, dim: int) -> SampledReward:
    return seeded(make, 3, dim) if make is ConditionalMLPReward else seeded(make, dim)


def finite_gradients(loss, *modules: nn.Module) -> None:
    parameters = [p for module in modules for p in module.parameters()]
    for gradient in torch.autograd.grad(loss, parameters):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("make", REWARDS)
def test_rewards_broadcast(make):
    reward = reward_of(make, 2)
    answer, target, inputs = torch.randn(6, 5, 2).double(), torch.randn(5, 2).double(), torch.randn(5, 3).double()
    rewards = reward(answer, target, inputs)
    assert rewards.shape == (6, 5)
    one = reward(answer[2, 3], target[3], inputs[3])
    torch.testing.assert_close(rewards[2, 3], one)


def test_embedding_rewards_know_the_right_answer():
    y, x = torch.randn(5, 2).double(), torch.randn(5, 3).double()
    other = torch.randn(7, 5, 2).double()
    torch.testing.assert_close(reward_of(CosineReward, 2)(y, y, x), torch.ones(5).double())
    assert (reward_of(CosineReward, 2)(other, y, x).abs() <= 1).all()
    assert (reward_of(EmbeddingMahalanobisReward, 2)(y, y, x) == 0).all()
    assert (reward_of(EmbeddingMahalanobisReward, 2)(other, y, x) < 0).all()


@pytest.mark.parametrize("policy", GAUSSIANS)
@pytest.mark.parametrize("make", REWARDS)
@pytest.mark.parametrize("estimator", ["dice", "reparam"])
def test_gaussian_policies_take_any_reward(policy, make, estimator, values):
    policy, reward = seeded(policy, 3, 2), reward_of(make, 2)
    options = {"entropy_coef": 0.5, "estimator": estimator, "num_samples": 8, "seed": 3}
    finite_gradients(policy.policy_loss(*values, reward, **options), policy, reward)


class Quadratic(SampledReward):
    """The isotropic Mahalanobis reward, known by its values only."""

    def __init__(self, u: float) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor(u).double())

    def forward(self, answer, target, inputs):
        return -self.u * (answer - target).square().sum(dim=-1)


class Fused(MatrixReward):
    """The same, known by its precision."""

    def __init__(self, u: float) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor(u).double())

    def precision(self):
        return self.u


@pytest.mark.parametrize("make", [LinearGaussian, LinearFullGaussian])
@pytest.mark.parametrize("estimator", ["dice", "reparam"])
def test_a_sampled_reward_is_the_fused_one_to_second_order(make, estimator, values):
    """The same samples by the same seed: the loss, its gradients and the hypergradient are the fused loss's."""
    policy = seeded(make, 3, 2)
    options = {"entropy_coef": 0.5, "estimator": estimator, "num_samples": 8, "seed": 3}
    found = []
    for reward in (Quadratic(0.7), Fused(0.7)):
        u = reward.u
        loss = policy.policy_loss(*values, reward, **options)
        first = torch.autograd.grad(loss, [*policy.parameters(), u], create_graph=True)
        along = sum((g * g.detach()).sum() for g in first[:-1])
        second = torch.autograd.grad(along, [*policy.parameters(), u])
        found.append([loss.detach(), *(g.detach() for g in first), *second])
    for sampled, fused in zip(*found, strict=True):
        torch.testing.assert_close(sampled, fused, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [LinearCategorical, MLPCategorical])
@pytest.mark.parametrize("reward", REWARDS)
def test_categorical_policies_take_any_reward(make, reward, labels):
    policy, reward = seeded(make, 3, 4), reward_of(reward, 4)
    options = {"entropy_coef": 0.5, "estimator": "dice", "num_samples": 8, "seed": 3}
    finite_gradients(policy.policy_loss(*labels, reward, **options), policy, reward)
    if reward.uses_inputs:
        with pytest.raises(ValueError, match=r"LinearCategorical|MLPCategorical.*'dice'.*no closed form"):
            policy.policy_loss(*labels, reward, entropy_coef=0.5)
        return
    exact = policy.policy_loss(*labels, reward, entropy_coef=0.5)
    finite_gradients(exact, policy, reward)
    many = policy.policy_loss(*labels, reward, **(options | {"num_samples": 4000}))
    # 160000 samples of rewards of order one.
    assert float(many.detach()) == pytest.approx(float(exact.detach()), abs=0.01)


def test_a_reward_without_closed_form_says_which_estimators_there_are(values):
    policy, reward = seeded(LinearGaussian, 3, 2), reward_of(MLPReward, 2)
    with pytest.raises(ValueError, match=r"LinearGaussian.*'reparam', 'dice'.*MLPReward, which has no closed form"):
        policy.policy_loss(*values, reward)
    with pytest.raises(ValueError, match="num_samples=None"):
        policy.policy_loss(*values, reward, estimator="dice")
    with pytest.raises(TypeError, match=r"SampledReward, got OneHotMahalanobisReward"):
        policy.policy_loss(*values, OneHotMahalanobisReward(2))


def test_a_neural_reward_gets_a_hypergradient(values):
    policy, reward = seeded(LinearGaussian, 3, 2), reward_of(MLPReward, 2)
    names = [name for name, _ in policy.named_parameters()], [name for name, _ in reward.named_parameters()]

    def inner(theta, phi):
        from torch.func import functional_call

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.policy, self.reward = policy, reward

            def forward(self):
                return self.policy.policy_loss(
                    *values, self.reward, entropy_coef=1.0, estimator="dice", num_samples=16, seed=1
                )

        tensors = {f"policy.{n}": t for n, t in zip(names[0], theta, strict=True)}
        tensors |= {f"reward.{n}": t for n, t in zip(names[1], phi, strict=True)}
        return functional_call(Both(), tensors, ())

    def outer(theta, phi):
        return sum(t.square().sum() for t in theta)

    # The last bias of a reward moves all rewards alike: it has no effect, but its gradient is known to be zero.
    theta, phi = tuple(policy.parameters()), tuple(reward.parameters())
    result = ImplicitCG(damping=5.0)(inner, outer, theta, phi)
    assert all(g.isfinite().all() for g in result.gradient)
    assert float(result.gradient[-1].abs()) < 1e-10
    assert float(result.gradient[0].norm()) > 0


@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_bounds_of_the_standard_deviation_bind(state_dependent_std, values):
    """Whatever the parameters and the data ask for, and with a gradient left at a bound."""
    low, high = -1.0, 0.5
    policy = seeded(
        LinearGaussian, 3, 2, state_dependent_std=state_dependent_std, std="bounded", log_std_bounds=(low, high),
        initial_log_std=-0.3,
    )  # fmt: skip
    torch.testing.assert_close(policy(values.inputs)[1].mean(), torch.tensor(-0.3).double())
    # An entropy bonus with no reward to speak of asks for an infinite std, a sharp reward for none.
    for u, entropy_coef, bound in ((1e-4, 1.0, high), (1e3, 1e-3, low)):
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.3)
        reward = MahalanobisReward(2, "isotropic", u).double()
        for _ in range(300):
            optimizer.zero_grad()
            loss = policy.policy_loss(*values, reward, entropy_coef=entropy_coef)
            loss.backward()
            optimizer.step()
            log_std = policy(values.inputs)[1].detach()
            assert (log_std >= low).all()
            assert (log_std <= high).all()
        if not state_dependent_std:
            torch.testing.assert_close(log_std, torch.full((2,), bound).double(), rtol=0.0, atol=0.05)
    far = torch.full((3,), 1e6).double()
    assert ((policy(far)[1] >= low) & (policy(far)[1] <= high)).all()
    with torch.no_grad():
        for p in policy.parameters():
            p.fill_(30.0)
    assert (policy(values.inputs)[1] <= high).all()


def test_fixed_standard_deviations_stay(values):
    policy = seeded(LinearGaussian, 3, 2, std="fixed", initial_log_std=-0.7)
    assert [name for name, _ in policy.named_parameters()] == ["mean_network.weight", "mean_network.bias"]
    assert "log_std" in policy.state_dict()
    torch.testing.assert_close(policy(values.inputs)[1], torch.full((2,), -0.7).double())
    finite_gradients(policy.policy_loss(*values, MahalanobisReward(2).double()), policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": "free"}, "std: expected one of 'learned', 'fixed', 'bounded'"),
        ({"std": "fixed", "state_dependent_std": True}, "std: expected 'learned' or 'bounded'"),
        ({"std": "bounded", "log_std_bounds": (0.5, 2.0)}, "log_std_bounds: expected finite bounds on both sides"),
        ({"std": "bounded", "log_std_bounds": (-5.0, math.inf)}, "log_std_bounds: expected finite bounds"),
        ({"log_std_bounds": (-1.0, 0.5)}, "log_std_bounds: expected None with std='learned'"),
        ({"initial_log_std": math.nan}, "initial_log_std: expected a finite number"),
    ],
)
def test_bad_standard_deviations(options, message):
    with pytest.raises(ValueError, match=message):
        LinearGaussian(3, 2, **options)


def test_a_network_of_ones_own_is_left_as_it_is():
    network = nn.Linear(3, 2)
    weight = network.weight.detach().clone()
    GaussianPolicy(nn.Linear(3, 2), network, 2)
    assert torch.equal(network.weight, weight)


def test_full_covariance(values):
    policy = seeded(LinearFullGaussian, 3, 2)
    with torch.no_grad():
        policy.below_diagonal.copy_(torch.tensor([[9.0, 9.0], [0.4, 9.0]]))
        policy.log_diagonal.copy_(torch.tensor([0.2, -0.5]))
    mean, scale_tril = policy(values.inputs)
    expected = torch.distributions.MultivariateNormal(mean, scale_tril=scale_tril).log_prob(values.target)
    torch.testing.assert_close(policy.log_prob(*values), expected)
    assert float(scale_tril[0, 1].detach()) == 0.0
    assert float(scale_tril[1, 1].detach()) == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize("make", GAUSSIANS)
@pytest.mark.parametrize("estimator", ["analytic", "dice"])
def test_observations_of_a_row_are_rows(make, estimator, values):
    """R observations of each of N rows cost one pass of the network, and mean what R N rows mean."""
    policy = seeded(make, 3, 2)
    target = torch.randn(5, 40, 2).double()
    inputs = values.inputs.expand(5, 40, 3).reshape(200, 3)
    options = {"entropy_coef": 0.5, "estimator": estimator, "seed": 3}
    if estimator == "dice":
        options["num_samples"] = 4
    reward = MahalanobisReward(2).double()
    together = policy.policy_loss(values.inputs, target, reward, **options)
    torch.testing.assert_close(together, policy.policy_loss(inputs, target.reshape(200, 2), reward, **options))
    log_prob = policy.log_prob(values.inputs, target)
    torch.testing.assert_close(log_prob.reshape(200), policy.log_prob(inputs, target.reshape(200, 2)))
    sampled = policy.policy_loss(
        values.inputs, target, reward_of(ConditionalMLPReward, 2), estimator="dice", num_samples=4
    )
    assert sampled.isfinite()


def test_observations_of_labels(labels):
    policy = seeded(LinearCategorical, 3, 4)
    target = torch.randint(4, (5, 40))
    inputs = labels.inputs.expand(5, 40, 3).reshape(200, 3)
    reward = OneHotMahalanobisReward(4).double()
    together = policy.policy_loss(labels.inputs, target, reward, entropy_coef=0.5)
    torch.testing.assert_close(together, policy.policy_loss(inputs, target.reshape(-1), reward, entropy_coef=0.5))
    torch.testing.assert_close(
        policy.log_prob(labels.inputs, target).reshape(-1), policy.log_prob(inputs, target.reshape(-1))
    )


def test_batches_split_and_select(values):
    inner, outer = values.split(0.25, seed=1)
    assert len(inner.inputs) == 30
    assert len(outer.inputs) == 10
    rows = {tuple(row) for row in [*inner.inputs.tolist(), *outer.inputs.tolist()]}
    assert rows == {tuple(row) for row in values.inputs.tolist()}
    assert torch.equal(values.split(0.25, seed=1)[1].target, outer.target)
    observed = Batch(values.inputs, torch.randn(5, 40, 2).double())
    part = observed.rows(torch.tensor([3, 7]))
    assert torch.equal(part.target, observed.target[:, [3, 7]])
    with pytest.raises(ValueError, match="fraction"):
        values.split(1.0, seed=0)
    with pytest.raises(ValueError, match="two rows"):
        values.rows(torch.tensor([0])).split(0.5, seed=0)


@pytest.mark.parametrize("target", [(7, 1), (6, 3), (3,), (2, 2, 7, 3), (7,)], ids=str)
@pytest.mark.parametrize("make", [LinearGaussian, LinearFullGaussian])
def test_targets_of_other_shapes(make, target):
    policy = make(2, 3)
    with pytest.raises(ValueError, match=rf"{make.__name__}.policy_loss: target: expected shape \(7, 3\)"):
        policy.policy_loss(torch.zeros(7, 2), torch.zeros(target), MahalanobisReward(3))


def test_labels_of_other_shapes_and_types():
    policy, reward, inputs = LinearCategorical(2, 3), MLPReward(3), torch.zeros(7, 2)
    sampled = {"estimator": "dice", "num_samples": 2, "seed": 0}
    with pytest.raises(ValueError, match=r"target: expected shape \(7,\)"):
        policy.policy_loss(inputs, torch.zeros(7, 1, dtype=torch.int64), reward, **sampled)
    with pytest.raises(TypeError, match="target: expected integer labels"):
        policy.policy_loss(inputs, torch.zeros(7), reward, **sampled)
    with pytest.raises(ValueError, match="target: expected labels from 0 to 2, got labels from 0 to 3"):
        policy.policy_loss(inputs, torch.tensor([0, 1, 2, 3, 0, 0, 0]), reward, **sampled)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    losses = [policy.policy_loss(inputs, labels.to(d), reward, **sampled) for d in (torch.int32, torch.int64)]
    assert torch.equal(*losses)
