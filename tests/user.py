"""What a user writes: every public function is called here. `make lint` has mypy --strict read it, a test runs it."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import po_bilevel as pb
import po_bilevel.language as lm
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import po_kernels as pk


def operations() -> list[Tensor]:
    """All of `po_kernels`, with return_stats as the types of the results tell."""
    x, y, tril = torch.zeros(4, 2), torch.ones(4, 2), torch.eye(2)
    logits, labels, table = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), -torch.eye(3)
    loss: Tensor = pk.gaussian_policy_loss(x, x, y, 1.0, entropy_coef=0.5)
    both: tuple[Tensor, pk.LossStats] = pk.gaussian_policy_loss(
        x, x, y, 1.0, estimator="dice", num_samples=4, advantage="loo", return_stats=True
    )
    samples = pk.gaussian_sample(x, x, 3, seed=1)
    rewards = -(samples - y).square().sum(dim=-1)
    labelled = pk.categorical_sample(logits, 3)
    found = [
        loss, both[0], both[1].reward_mean, samples,
        pk.gaussian_log_prob(x, x, samples), pk.gaussian_log_prob(x, x, y, entropy=True)[1],
        pk.gaussian_surrogate_loss(x, x, samples, rewards, estimator="reinforce"),
        pk.gaussian_surrogate_loss(x, x, samples, rewards, return_stats=True)[1].entropy,
        pk.mvn_sample(x, tril, 3), pk.mvn_log_prob(x, tril, y), pk.mvn_log_prob(x, tril, y, entropy=True)[0],
        pk.mvn_policy_loss(x, tril, y, tril), pk.mvn_policy_loss(x, tril, y, tril, return_stats=True)[1].log_prob,
        pk.mvn_surrogate_loss(x, tril, samples, rewards),
        pk.mvn_surrogate_loss(x, tril, samples, rewards, return_stats=True)[0],
        pk.categorical_log_prob(logits, labels), pk.categorical_log_prob(logits, labels, entropy=True)[1],
        pk.categorical_policy_loss(logits, labels, table, reduction="none"),
        pk.categorical_policy_loss(logits, labels, table, return_stats=True, backend="reference")[1].entropy,
        pk.categorical_surrogate_loss(logits, labelled, torch.zeros(3, 4)),
        pk.categorical_surrogate_loss(logits, labelled, torch.zeros(3, 4), return_stats=True)[0],
        pk.group_advantage(rewards, "standardized"), *pk.gae(y, torch.zeros(5, 2), y, gamma=0.9, lam=0.9),
        pk.importance_weights(x, x, None, level="token", mode="truncate", bounds=(None, 2.0)),
        pk.token_kl(logits, logits, direction="forward"), pk.policy_loss(x, x, surrogate="clip", kl="k3"),
        pk.policy_loss(x, x, old_log_prob=x, mask=x > -1, **pk.policy_loss_preset("grpo")),
        pk.policy_loss(x, x, return_stats=True)[0], pk.token_log_prob(logits, labels).log_prob,
        pk.linear_token_log_prob(x, torch.ones(5, 2), labels).log_prob,
    ]  # fmt: skip
    kind: pk.Advantage = "min"
    stats: pk.PolicyStats = pk.policy_loss(x, x, return_stats=True)[1]
    tokens: pk.TokenStats = pk.token_log_prob(logits, labels)
    with pk.use_backend("reference"):
        found.append(pk.group_advantage(rewards, kind))
    state: dict[str, Any] = pk.status()
    assert state["version"] == pk.__version__ == pb.__version__
    return [*found, stats.kl_k3, tokens.log_prob, *networks(x, y)]


def networks(x: Tensor, y: Tensor) -> list[Tensor]:
    layer = torch.nn.Linear(2, 2)
    network = pk.Network("gaussian", "tanh", [(layer.weight, layer.bias)], [torch.zeros(2)])
    if pk.network_refusal(network, x, y, None) is not None:
        return []
    task = pk.NetworkTask(
        network, x, y, None, pk.NetworkSteps("sgd", rates=[0.1] * 2, moved=[True] * 3), batch_rows=[4] * 2, places=None,
        seeds=[0] * 2,
    )  # fmt: skip
    results: list[pk.NetworkResult] = pk.network_policy_steps([task])
    loss = pk.network_policy_loss(network, x, y, torch.ones(()), estimator="dice", num_samples=4, advantage="loo")
    return [loss, torch.tensor(list(results[0].losses))]


def functions() -> list[Tensor]:
    """The functions of `po_bilevel`."""
    data = pb.Batch(torch.randn(20, 3), torch.randn(20, 2))
    policy = pb.LinearGaussian(3, 2)
    optimizer = torch.optim.Adam(policy.parameters())
    reward = pb.MahalanobisReward(2, "full")
    estimator: pk.Estimator = "analytic"
    loss: tuple[float, int] = pb.train_nll(policy, data, optimizer, 2)
    pb.train_policy_gradient(policy, reward, data, optimizer, 2, loss=pb.PolicyGradient(1.0, estimator))
    pb.train(
        policy, lambda policy, batch, seed: -policy.log_prob(*batch).mean(), pb.BatchStream(data, 5, 0), optimizer, 2
    )
    rows = DataLoader(TensorDataset(*data), batch_size=5, shuffle=True)
    pb.train(
        policy, lambda policy, batch, seed: -policy.log_prob(*batch).mean(), pb.LoaderStream(rows, 0), optimizer, 2
    )
    pb.train_nll(policy, rows, optimizer, 2, autocast=torch.bfloat16, accumulation=2)
    pb.train_ensemble([policy], None, data, [optimizer], 2, loss=pb.NegativeLogLikelihood(1e-3))
    residual = data.target - policy(data.inputs)[0].detach()
    covariance = pb.residual_covariance(residual)
    best, _ = pb.iterated_precision(lambda _: residual, torch.ones(()), 1.0, "diagonal", rounds=2)
    point: Tensor = pb.solve(pb.FixedPointProblem(lambda x, a: torch.cos(a * x)), torch.ones(()), torch.tensor(0.5))
    credit, _ = pb.completion_credit(lambda theta: theta[0].square(), [torch.ones(2)], [torch.ones(2)])
    return [
        torch.tensor(loss[0]), covariance, pb.marginal_covariance(data.target), reward.precision(), credit, best, point,
        pb.optimal_precision(covariance, 1.0, "diagonal"), pb.one_hot_table(torch.ones(3), 3),
    ]  # fmt: skip


def trainer(policy: pb.Policy, reward: pb.Reward, data: pb.Batch, method: pb.HypergradientMethod) -> pb.BilevelTrainer:
    return pb.BilevelTrainer(
        policy, reward, inner_data=data, outer_data=data, hypergradient=method, inner_steps=20, progress=False,
        inner_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.1),
    )  # fmt: skip


def rewards_learned() -> list[pb.OuterStep]:
    labelled = pb.Batch(torch.randn(20, 3), torch.arange(20) % 3)
    history: list[pb.OuterStep] = []
    methods: list[pb.HypergradientMethod] = [
        pb.ImplicitCG(1e-2), pb.NormalCG(), pb.Neumann(), pb.FixedPoint(), pb.Dense(1e-2), pb.Identity(),
        pb.SingleLoop(0.1), pb.FiniteDifference(), pb.EvolutionStrategies(2, 0.1, 2, 0.1),
        pb.Penalty(10.0, 2, 0.1), pb.BOME(2, 0.1, 0.1),
    ]  # fmt: skip
    for method in methods:
        with contextlib.suppress(ValueError):
            learner = trainer(pb.MLPCategorical(3, 3, hidden=(4,)), pb.OneHotMahalanobisReward(3), labelled, method)
            history += learner.fit(1, lambda step: step.outer_loss < 0, patience=3)
    return history


def hypergradients() -> list[Tensor]:
    """Of the outer loss θ² at the minimum θ = φ = 2 of the inner one: 2φ = 4."""
    theta, phi = torch.tensor([2.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)

    def inner(theta: pb.hypergradients.Tensors, phi: pb.hypergradients.Tensors) -> Tensor:
        return (theta[0] - phi[0]).square().sum() / 2

    def outer(theta: pb.hypergradients.Tensors, phi: pb.hypergradients.Tensors) -> Tensor:
        return theta[0].square().sum()

    methods: list[pb.HypergradientMethod] = [
        pb.ImplicitCG(preconditioner=pb.Nystrom(1)), pb.ImplicitCG(preconditioner=pb.Jacobi()),
        pb.LinearSolver(lambda operator, right, **options: (right, 0)), pb.Identity(),
        pb.Unrolled(2, 1.0), pb.Truncated(2, 1, 1.0), pb.Recompute(2, 1.0),
    ]  # fmt: skip
    problems: list[Any] = [
        inner, pb.RootProblem(lambda theta, phi: (theta[0] - phi[0],), symmetric=True),
        pb.Minibatches(lambda theta, phi, scale: scale * inner(theta, phi), [1.0, 1.0]),
    ]  # fmt: skip
    found: list[pb.Hypergradient] = [method(inner, outer, (theta,), (phi,)) for method in methods]
    found += [pb.ImplicitCG()(problem, outer, (theta,), (phi,)) for problem in problems]
    objective = pb.SampledObjective(
        lambda theta: theta[0] * torch.eye(2)[:, :1], lambda phi: phi[0] * torch.eye(2)[:, :1], 1.0, advantage="none"
    )
    found += [pb.FisherCG()(objective, outer, (theta,), (phi,))]
    methods += [pb.MomentMatching(), pb.Identity(inverse=pb.QuasiNewton(torch.optim.LBFGS([theta])))]
    pb.HypergradientDisplay([0.1, 0.2], np.ones(2))
    return [each.gradient[0].detach() for each in found]


def modules() -> list[Tensor]:
    """Policies and rewards that the others have not called."""
    x, y, labels, one = torch.randn(4, 3), torch.randn(4, 2), torch.arange(4) % 2, torch.nn.Linear(3, 2)
    policies: list[pb.Policy] = [
        pb.LinearFullGaussian(3, 2), pb.MLPFullGaussian(3, 2, hidden=(4,)), pb.MLPGaussian(3, 2, std="fixed"),
        pb.GaussianPolicy(one, None, 2, std="bounded", log_std_bounds=(-3.0, 3.0)), pb.FullGaussianPolicy(one, 2),
    ]  # fmt: skip
    labelled: list[pb.Policy] = [pb.LinearCategorical(3, 2), pb.CategoricalPolicy(one)]
    rewards: list[pb.SampledReward] = [
        pb.MLPReward(2),
        pb.ConditionalMLPReward(3, 2),
        pb.CosineReward(2),
        pb.EmbeddingMahalanobisReward(2, kind="full"),
    ]
    matrix: pb.MatrixReward = pb.MahalanobisReward(2, start=pb.PositivePrecision(2, "isotropic", 2.0)().detach())
    table: pb.TabularReward = pb.TableReward(torch.eye(2))
    pb.RewardDisplay(table.table().detach().numpy(), labels=["no", "yes"])
    return [
        *(policy.log_prob(x, y) for policy in policies), *(policy.log_prob(x, labels) for policy in labelled),
        *(reward(y, y, x) for reward in rewards), matrix.precision(),
    ]  # fmt: skip


def watched(folder: Path) -> list[type[Exception]]:
    """What a run tells of itself."""
    with contextlib.suppress(pb.MissingDependencyError):
        pb.TensorBoard(folder)
    with contextlib.suppress(pb.MissingDependencyError):
        pb.WeightsAndBiases(mode="disabled", dir=folder)
    return [pb.HypergradientWarning, pb.NonFiniteError, pb.UsageError]


def texts(folder: Path) -> list[Tensor]:
    """The functions of `po_bilevel.language`."""
    (folder / "pairs.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    pairs: lm.Pairs = lm.read_pairs(folder / "pairs.jsonl")
    text: str = lm.read_text(folder / "pairs.jsonl")
    tokenizer: lm.Tokenizer = lm.BytePairTokenizer.train([text], 300)
    prompts: lm.Tokens = lm.prompt_tokens(tokenizer, pairs.prompts)
    embedded = lm.NgramEmbedder()(["2", "3", "4", "5"])
    rows = lm.residuals(embedded, torch.tensor([0, 0, 1, 1]))
    best: lm.EmbeddingPrecision = lm.embedding_precision(rows, 0.1, "isotropic", reference=lm.marginal(embedded))
    return [prompts.ids, lm.answer_tokens(tokenizer, ["2"]).ids, best.precision]


def estimators() -> Any:
    X, y = torch.randn(40, 3).numpy(), (torch.arange(40) % 2).numpy()
    classifier = pb.BilevelClassifier(outer_steps=2, folds=2).fit(X, y)
    regressor = pb.BilevelRegressor(outer_steps=2, folds=2).fit(X, X[:, 0])
    return (
        classifier.predict_proba(X),
        classifier.score(X, y),
        regressor.predict(X, return_std=True),
        regressor.sample(X),
    )
