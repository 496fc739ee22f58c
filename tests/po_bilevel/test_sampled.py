"""Hypergradients by the Fisher matrix and by moments, on policies whose completions can all be enumerated."""

import dataclasses
import itertools

import pytest
import torch
from po_bilevel import (
    Batch,
    BilevelTrainer,
    ImplicitCG,
    LinearCategorical,
    LinearFullGaussian,
    LinearGaussian,
    MahalanobisReward,
    NonFiniteError,
    OneHotMahalanobisReward,
    PolicyGradient,
)
from po_bilevel.hypergradients import (
    Dense,
    FisherCG,
    MomentMatching,
    SampledObjective,
    completion_credit,
)

LETTERS, LENGTH, BETA = 3, 3, 0.7
STRINGS = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH)))


class Strings:
    """All strings of three letters: a policy with a logit for each letter after each prefix, and a reference.

    The reward is −Σ_j u_j (e_j − e*_j)² of features e; φ is log u.
    """

    def __init__(self, beta=BETA, seed=0):
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.beta = beta
        self.features = 0.5 * normal(len(STRINGS), 4)
        self.phi = (normal(4).mul(0.3).requires_grad_(),)
        self.reference = torch.log_softmax(0.5 * normal(len(STRINGS)), 0)
        # Of a policy that is optimal for another reward.
        self.right = normal(4).mul(0.5)
        self.data = torch.softmax(self.reference + self.reward((self.right,)) / beta, 0)
        # What stands at a prefix is a number in base three, after those of shorter prefixes.
        self.places = [
            (LETTERS**t - 1) // 2 + (STRINGS[:, :t] * LETTERS ** torch.arange(t)).sum(1) for t in range(LENGTH)
        ]

    def reward(self, phi):
        return -(self.features.square() * phi[0].exp()).sum(1)

    def log_prob(self, theta):
        (logits,) = theta
        by_prefix = torch.log_softmax(logits.reshape(-1, LETTERS), -1)
        return sum(by_prefix[place, STRINGS[:, t]] for t, place in enumerate(self.places))

    def solution(self):
        """θ of p* ∝ p_0 exp(r/β): the conditional probabilities of each letter."""
        p = torch.softmax(self.reference + self.reward(self.phi).detach() / self.beta, 0)
        logits = torch.zeros((LETTERS**LENGTH - 1) // 2, LETTERS, dtype=torch.float64)
        for t, place in enumerate(self.places):
            logits.index_put_((place, STRINGS[:, t]), p, accumulate=True)
        return (logits.log().requires_grad_(),)

    def objective(self, **options):
        """A context, and each of its completions with its probability."""
        p = self.log_prob(self.solution()).detach().exp()[:, None]
        return SampledObjective(**{
            "log_prob": lambda theta: self.log_prob(theta)[:, None], "reward": lambda phi: self.reward(phi)[:, None],
            "coefficient": self.beta, "advantage": "none", "weight": p, "reference": self.reference[:, None],
            "data_reward": lambda phi: len(STRINGS) * self.data * self.reward(phi),
        } | options)  # fmt: skip

    def outer(self, theta, phi):
        return -(self.data * self.log_prob(theta)).sum()

    def exact(self):
        """dF/dφ where θ*(φ) is known."""
        log_p = torch.log_softmax(self.reference + self.reward(self.phi) / self.beta, 0)
        return torch.autograd.grad(-(self.data * log_p).sum(), self.phi)

    def regular(self, theta, phi):
        """The inner loss itself, with its second derivative, in expectation over all strings."""
        log_p = self.log_prob(theta)
        return -(log_p.exp() * (self.reward(phi) - self.beta * (log_p - self.reference))).sum()


@pytest.mark.parametrize("method", [FisherCG(tolerance=1e-12, max_iterations=200), MomentMatching()])
@pytest.mark.parametrize("seed", range(3))
def test_enumerated_strings(method, seed):
    """Equal to the derivative of the closed form, and to the dense solve with the true Hessian."""
    problem = Strings(seed=seed)
    theta, (right,) = problem.solution(), problem.exact()
    result = method(problem.objective(), problem.outer, theta, problem.phi)
    torch.testing.assert_close(result.gradient[0], right, rtol=1e-8, atol=1e-10)
    dense = Dense()(problem.regular, problem.outer, theta, problem.phi)
    torch.testing.assert_close(result.gradient[0], dense.gradient[0], rtol=1e-7, atol=1e-9)
    assert result.inner_loss == pytest.approx(float(problem.regular(theta, problem.phi).detach()))
    assert result.outer_loss == pytest.approx(float(problem.outer(theta, problem.phi).detach()))
    assert result.problems == ()
    if isinstance(method, FisherCG):
        assert result.converged
        assert result.residual_norm < 1e-10
        assert result.min_curvature >= 0


def test_learned_reward_gets_to_its_optimum():
    """Steps by FisherCG end at the reward that the data were made with, whatever the samples."""
    problem = Strings()
    optimizer = torch.optim.LBFGS(problem.phi, max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure():
        result = FisherCG(tolerance=1e-12, max_iterations=200)(
            problem.objective(), problem.outer, problem.solution(), problem.phi
        )
        problem.phi[0].grad = result.gradient[0]
        return torch.tensor(result.outer_loss)

    optimizer.step(closure)
    # The loss is flat there: at a thousandth off it is within 1e-8 of its least.
    torch.testing.assert_close(problem.phi[0].detach(), problem.right, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("advantage", ["loo", "mean"])
def test_samples_point_the_same_way(advantage):
    """64 completions of each of 32 contexts, which are the same here: a cosine of 0.994 to 1 over twenty seeds."""
    problem = Strings()
    theta, (right,) = problem.solution(), problem.exact()
    p = problem.log_prob(theta).detach().exp()
    drawn = torch.multinomial(p, 64 * 32, replacement=True, generator=torch.Generator().manual_seed(1)).reshape(64, 32)
    objective = SampledObjective(
        lambda theta: problem.log_prob(theta)[drawn], lambda phi: problem.reward(phi)[drawn], BETA, advantage
    )
    result = FisherCG(damping=1e-4, max_iterations=300)(objective, problem.outer, theta, problem.phi)
    cosine = torch.nn.functional.cosine_similarity(result.gradient[0], right, dim=0)
    assert cosine >= 0.99
    assert result.stationarity is None


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * (1 - x.tanh().square())


def test_credit_without_forward_mode():
    theta, vector = (torch.randn(5, dtype=torch.float64),), (torch.randn(5, dtype=torch.float64),)
    right = (1 - theta[0].tanh().square()) * vector[0]
    for function, expected, tolerance in (
        (torch.tanh, "forward mode", 1e-14),
        (NoForwardMode.apply, "differences", 1e-9),
    ):
        credit, how = completion_credit(lambda t, f=function: f(t[0]), theta, vector)
        assert how == expected
        torch.testing.assert_close(credit, right, rtol=0.0, atol=tolerance)
    with pytest.raises(RuntimeError, match="size"):
        completion_credit(lambda t: t[0] @ torch.ones(4, dtype=torch.float64), theta, vector)


def test_differences_serve_a_whole_hypergradient():
    problem = Strings()
    objective = problem.objective()
    halves = dataclasses.replace(
        objective, log_prob=lambda theta: objective.log_prob((theta[0] + 0 * NoForwardMode.apply(theta[0]),))
    )
    result = FisherCG(tolerance=1e-7, max_iterations=300)(halves, problem.outer, problem.solution(), problem.phi)
    torch.testing.assert_close(result.gradient[0], problem.exact()[0], rtol=1e-5, atol=1e-7)
    assert result.problems == ("log-probabilities have no derivative in forward mode: differences took its place",)


@torch.library.custom_op("po_kernels_test::dropped", mutates_args=())
def dropped(x: torch.Tensor) -> torch.Tensor:
    """Whose derivative in forward mode torch leaves out without a word."""
    return x.tanh()


dropped.register_autograd(
    lambda ctx, cotangent: cotangent * (1 - ctx.saved_tensors[0].tanh().square()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("part", [1.0, 0.3])
def test_tangents_that_an_operator_drops_are_noticed(part):
    """All of them, where torch has no tangent at all, or a part, where it has a wrong one."""
    problem = Strings()
    objective = problem.objective()

    def through(function):
        return dataclasses.replace(
            objective, log_prob=lambda t: objective.log_prob((part * function(t[0]) + (1 - part) * t[0],))
        )

    method = FisherCG(damping=1e-3, tolerance=1e-7, max_iterations=300)
    right = method(through(torch.tanh), problem.outer, problem.solution(), problem.phi)
    found = method(through(dropped), problem.outer, problem.solution(), problem.phi)
    torch.testing.assert_close(found.gradient[0], right.gradient[0], rtol=1e-5, atol=1e-7)
    assert right.problems == ()
    assert any("differences took its place" in sentence for sentence in found.problems)


def test_log_probabilities_that_draw_are_refused():
    problem = Strings()
    objective = problem.objective()
    drawing = dataclasses.replace(
        objective, log_prob=lambda t: objective.log_prob((torch.nn.functional.dropout(t[0], 0.5),))
    )
    with pytest.raises(ValueError, match=r"log_prob: expected the same numbers each time"):
        FisherCG()(drawing, problem.outer, problem.solution(), problem.phi)


def test_any_pytree_gives_what_a_tuple_does():
    problem, method = Strings(), FisherCG(damping=1e-3)
    objective = problem.objective()
    trees = dataclasses.replace(
        objective, log_prob=lambda t: objective.log_prob((t["t"],)), reward=lambda p: objective.reward((p,))
    )
    expected = method(objective, problem.outer, problem.solution(), problem.phi)
    found = method(trees, lambda t, p: problem.outer((t["t"],), (p,)), {"t": problem.solution()[0]}, problem.phi[0])
    assert torch.equal(found.gradient, expected.gradient[0])
    assert torch.equal(found.solution["t"], expected.solution[0])


def test_bad_input():
    problem = Strings()
    theta = problem.solution()
    with pytest.raises(ValueError, match=r"standardized.*loo"):
        problem.objective(advantage="standardized")
    with pytest.raises(ValueError, match="advantage: expected 'none' with a weight, got 'loo'"):
        problem.objective(advantage="loo")
    with pytest.raises(ValueError, match="coefficient: expected a positive number, got 0"):
        SampledObjective(problem.log_prob, problem.reward, 0.0)
    with pytest.raises(TypeError, match="FisherCG: inner_loss: expected a SampledObjective, got method"):
        FisherCG()(problem.regular, problem.outer, theta, problem.phi)
    with pytest.raises(ValueError, match="data_reward: expected rewards of the data"):
        MomentMatching()(problem.objective(data_reward=None), problem.outer, theta, problem.phi)
    call = lambda objective, phi=problem.phi: FisherCG()(objective, problem.outer, theta, phi)  # noqa: E731
    with pytest.raises(ValueError, match=r"log_prob: expected shape \(27, 1\)"):
        call(problem.objective(log_prob=problem.log_prob))
    flat = torch.ones(len(STRINGS), dtype=torch.float64)
    for name in ("weight", "reference"):
        for method in (FisherCG(), MomentMatching()):
            with pytest.raises(ValueError, match=rf"SampledObjective: {name}: expected shape \(27, 1\).*got \(27,\)"):
                method(problem.objective(**{name: flat}), problem.outer, theta, problem.phi)
    with pytest.raises(ValueError, match=r"phi\[1\]: expected a tensor that"):
        call(problem.objective(), (*problem.phi, torch.ones(2, dtype=torch.float64, requires_grad=True)))
    with pytest.raises(NonFiniteError, match="hypergradient"):
        call(problem.objective(reward=lambda phi: problem.reward(phi)[:, None] * torch.inf))


def trainer(kind, method, **options):
    """Two hundred rows, a policy at its optimum under the first reward, with the closed form or 64 samples a row."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight = normal(200, 3), normal(3, 4)
    torch.manual_seed(0)
    if kind == "categorical":
        policy, reward = LinearCategorical(3, 4), OneHotMahalanobisReward(4, "diagonal", 2.0)
        y = (x @ weight + normal(200, 4)).argmax(1)
    else:
        make = LinearGaussian if kind == "gaussian" else LinearFullGaussian
        policy, reward = make(3, 4), MahalanobisReward(4, "diagonal")
        y = x @ weight + torch.tensor([0.5, 0.7, 0.8, 1.0]) * normal(3, 200, 4)
    data = Batch(x, y)
    made = BilevelTrainer(
        policy.double(), reward.double(), inner_data=data.rows(torch.arange(100)),
        outer_data=data.rows(torch.arange(100, 200)), inner_steps=3, keep_inner_state=False, progress=False,
        inner_optimizer=lambda p: torch.optim.LBFGS(p, max_iter=200, line_search_fn="strong_wolfe"),
        outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.1), hypergradient=method,
        inner_loss=PolicyGradient(0.5, **options),
    )  # fmt: skip
    return made


@pytest.mark.parametrize("kind", ["gaussian", "full", "categorical"])
def test_the_trainer_draws_the_samples_itself(kind):
    """The mean over draws is the exact hypergradient, at the policy that it was taken at.

    Five of its standard errors, which twelve draws know to a fifth, and the tolerance of both solves, 1e-6.
    """
    exact = trainer(kind, ImplicitCG(damping=1e-3))
    _, (right,) = exact.evaluate()
    sampled = trainer(kind, FisherCG(damping=1e-3), estimator="dice", num_samples=256)
    sampled.policy.load_state_dict(exact.policy.state_dict())
    found = [sampled._take_hypergradient() for _ in range(12)]
    assert all(each.converged for each in found)
    gradients = torch.stack([each.gradient[0] for each in found])
    error = gradients.std(dim=0) / len(found) ** 0.5
    assert ((gradients.mean(dim=0) - right).abs() <= 5 * error + 1e-6).all()
    sampled.fit(2)
    assert len(sampled.history) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": None}, ValueError, "num_samples: expected an integer for a method of samples"),
        ({"l2": 0.1}, ValueError, "l2: expected 0 for a method of samples"),
        ({"advantage": "standardized"}, ValueError, "standardized.*loo"),
    ],
)
def test_inner_losses_that_a_method_of_samples_cannot_take(options, error, message):
    options = {"estimator": "dice", "num_samples": 4} | options
    if options["num_samples"] is None:
        del options["estimator"]
    with pytest.raises(error, match=message):
        trainer("gaussian", FisherCG(), **options)._take_hypergradient()
