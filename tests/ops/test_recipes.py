"""The page on policy losses: its table of presets is that of the code, and its recipes do what they say."""

import math

import pytest
import torch
from torch.autograd import grad
from torch.distributions import Categorical, MultivariateNormal, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import po_kernels as pk
from po_kernels.ops.presets import PRESETS

from ..pages import ROOT, blocks
from .bounds import near
from .test_gae import loop, trajectories


def table():
    """python -c "from tests.ops.test_recipes import table; print(table())" """
    lines = []
    for name, each in PRESETS.items():
        options = ", ".join(f"{key}={value!r}".replace("'", '"') for key, value in each.options.items())
        lines.append(f"| {name} | {options} | {each.paper} | {each.equals} |")
    return "\n".join(lines)


def test_the_table_of_presets():
    assert table() in (ROOT / "docs" / "policy_loss.md").read_text()


@pytest.fixture(scope="module")
def recipes():
    names: dict = {}
    torch.set_num_threads(1)
    for _, block in blocks("docs/policy_loss.md")[1:]:  # the first trains a decoder: tests/test_docs.py
        exec(block, names)
    return names


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def cases(recipes):
    mean, log_std, logits = normal(6, 3), 0.3 * normal(3), normal(6, 10)
    tril = torch.tril(0.2 * normal(6, 3, 3), -1) + torch.diag_embed(1 + normal(6, 3).square())
    label = torch.arange(6) % 4
    heads, sizes = torch.stack([label % 3, label % 5, label % 2], -1), (3, 5, 2)
    allowed = torch.ones(6, 10, dtype=torch.bool)
    allowed[:, 5:8] = False
    diagonal = Normal(mean, log_std.exp())
    several = [Categorical(logits=x) for x in logits.split(sizes, -1)]
    yield (
        recipes["gaussian"](mean, log_std, mean + 1),
        [diagonal.log_prob(mean + 1).sum(-1), diagonal.entropy().sum(-1)],
    )
    full = MultivariateNormal(mean, scale_tril=tril)
    yield recipes["full_covariance"](mean, tril, mean + 1), [full.log_prob(mean + 1), full.entropy()]
    one = Categorical(logits=logits)
    yield recipes["categorical"](logits, label), [one.log_prob(label), one.entropy()]
    total = [
        sum(x.log_prob(a) for x, a in zip(several, heads.unbind(-1), strict=True)),
        sum(x.entropy() for x in several),
    ]
    yield recipes["multi_discrete"](logits, heads, sizes), total
    some = Categorical(logits=logits.masked_fill(~allowed, -torch.inf))
    yield recipes["masked"](logits, label, allowed), [some.log_prob(label), some.entropy()]
    squashed = TransformedDistribution(diagonal, TanhTransform())
    right = squashed.log_prob(torch.tanh(mean + 0.3)).sum(-1)
    yield recipes["squashed"](mean, log_std, mean + 0.3), [right, -right]


def test_recipes_are_the_distributions_of_torch(recipes):
    for found, expected in cases(recipes):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)  # tanh and its inverse lose some digits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_entropy_beside_a_log_density(dtype):
    """Of the policy, in the shape of its leading dimensions, with two derivatives in a scale of any shape."""
    mean, value = torch.randn(2, 3, 4, dtype=dtype), torch.randn(5, 2, 3, 4, dtype=dtype)
    tril, label = torch.eye(4, dtype=dtype), torch.ones(5, 2, 3, dtype=torch.int64)

    def of_log_std(mean, log_std):
        return Normal(mean, log_std.exp()).entropy().sum(-1)

    def of_tril(mean, tril):
        return MultivariateNormal(mean, scale_tril=tril.tril(), validate_args=False).entropy()

    def of_logits(logits):
        return Categorical(logits=logits).entropy()

    for op, policy, x, right in (
        (pk.gaussian_log_prob, (mean, torch.zeros(4, dtype=dtype)), value, of_log_std),
        (pk.gaussian_log_prob, (mean, torch.zeros_like(mean)), value, of_log_std),
        (pk.mvn_log_prob, (mean, tril), value, of_tril),
        (pk.mvn_log_prob, (mean, tril.expand(2, 3, 4, 4)), value, of_tril),
        (pk.categorical_log_prob, (mean,), label, of_logits),
    ):
        policy = [y.clone().requires_grad_() for y in policy]
        log_prob, entropy = op(*policy, x, entropy=True)
        assert torch.equal(log_prob, op(*policy, x))
        assert (log_prob.shape, entropy.shape) == ((5, 2, 3), (2, 3))
        assert entropy.dtype == log_prob.dtype == (dtype if dtype == torch.float64 else torch.float32)
        derivatives = []
        for found in (entropy, right(*(y.double() for y in policy)).expand(2, 3)):
            (first,) = grad(found.sum(), policy[-1], create_graph=True)
            # A derivative that depends on nothing is one of zero.
            derivatives.append((found, first, *grad(first.square().sum() + 0 * policy[-1].sum(), policy[-1])))
        # Sums over 4 classes or dimensions, and 6 rows, and as many operations.
        for x_found, x_right in zip(*derivatives, strict=True):
            near(x_found, x_right, 2 * (4 + 6))
        with pytest.raises(TypeError, match="entropy: expected True or False"):
            op(*policy, x, entropy=1)


def test_a_squashed_action_at_the_bound_has_a_density(recipes):
    """tanh(20) is 1 in float32, and the density there is known from the action before."""
    before = torch.tensor([[20.0, -30.0]], requires_grad=True)
    log_prob, _ = recipes["squashed"](torch.zeros(1, 2), torch.zeros(2), before)
    right = Normal(0.0, 1.0).log_prob(before).sum() - 2 * (2 * math.log(2) - 50)
    torch.testing.assert_close(log_prob.sum(), right)
    assert grad(log_prob.sum(), before)[0].isfinite().all()


@pytest.mark.parametrize("family", ["gaussian", "full_covariance", "categorical"])
def test_the_gradient_of_a_ppo_update(recipes, family):
    """That of the usual eager form, and an update that raises the objective."""
    torch.manual_seed(0)
    sizes = {"gaussian": 4, "full_covariance": 4, "categorical": 5}
    network = torch.nn.Linear(3, sizes[family]).double()
    scale = torch.nn.Parameter(torch.zeros(4).double() if family == "gaussian" else torch.eye(4).double())
    parameters = [*network.parameters(), *([] if family == "categorical" else [scale])]

    def of(x):
        """The recipe's arguments but the actions, and torch's distribution."""
        out = network(x)
        if family == "categorical":
            return [out], Categorical(logits=out)
        if family == "gaussian":
            return [out, scale], torch.distributions.Independent(Normal(out, scale.exp()), 1)
        return [out, scale.tril()], MultivariateNormal(out, scale_tril=scale.tril())

    def log_prob(x, actions):
        return recipes[family](*of(x)[0], actions)

    x = normal(64, 3)
    with torch.no_grad():
        actions = of(x)[1].sample()
        old = of(x)[1].log_prob(actions) + 0.3 * normal(64)
    A = normal(64)
    new, entropy = log_prob(x, actions)
    loss = pk.policy_loss(new, A, old_log_prob=old, entropy=entropy, entropy_coef=0.01, **pk.policy_loss_preset("ppo"))
    ratio = (of(x)[1].log_prob(actions) - old).exp()
    eager = torch.max(-A * ratio, -A * ratio.clamp(0.8, 1.2)).mean() - 0.01 * of(x)[1].entropy().mean()
    torch.testing.assert_close(loss, eager)
    for found, expected in zip(grad(loss, parameters), grad(eager, parameters), strict=True):
        torch.testing.assert_close(found, expected)

    def objective():
        return (A * (log_prob(x, actions)[0].detach() - before).exp()).mean()

    before = log_prob(x, actions)[0].detach()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    stats = recipes["ppo_update"](log_prob, parameters, optimizer, (x, actions, before, A))
    assert stats.tokens == 16
    assert objective() > A.mean()


def test_the_recipe_of_advantages(recipes):
    """Standardised over steps and episodes; returns are not."""
    rewards, values, terminated, truncated = trajectories(5, 2)
    right = loop(rewards, values, terminated, 0.99, 0.95, truncated)
    A, returns = recipes["advantages_of"](rewards, values, terminated, truncated)
    near(returns, right + values[:-1], 4 * 5 + 1)  # four roundings a step
    near(A, (right - right.mean()) / (right.std() + 1e-8), 4 * 5 + 2 * 10)  # and a mean and a deviation of 10
