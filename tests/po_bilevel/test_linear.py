"""The second-order methods of linear policies against the fused losses, trained by autograd."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from po_bilevel import BilevelClassifier, BilevelRegressor, crossfit, linear
from po_bilevel.crossfit import FullStack, LogStd, Rows, Stack, likelihood, policy_gradient
from po_bilevel.linear import Ridge, Softmax
from po_bilevel.members import Learned, Networks
from po_bilevel.policies import CategoricalPolicy, GaussianPolicy
from po_bilevel.rewards import MahalanobisReward, OneHotMahalanobisReward, TableReward
from reference import Reference
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_iris,
    load_linnerud,
    load_wine,
    make_blobs,
    make_classification,
    make_moons,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def standardised(inputs, target):
    inputs = StandardScaler().fit_transform(inputs)
    if target.dtype.kind == "f":
        target = StandardScaler().fit_transform(target.reshape(len(target), -1))
    weight = np.random.default_rng(0).integers(1, 3, len(inputs)).astype(float)
    return Rows(*map(torch.from_numpy, (inputs, target, weight)))


def folds_of(rows, members=3):
    strata = np.zeros(len(rows.inputs), dtype=np.int64)
    return torch.from_numpy(crossfit.deal(strata, rows.weight.numpy(), members, np.random.RandomState(0)))


def softmax(rows, inside, classes, tol=1e-6):
    policy = CategoricalPolicy(Stack(len(inside), [rows.inputs.shape[1], classes], 0))
    return Softmax(policy, rows, inside, tol=tol, max_iter=500)


def test_derivatives_of_a_softmax_are_those_of_the_fused_loss():
    random = torch.Generator().manual_seed(0)
    rows = standardised(*make_classification(60, 6, n_informative=4, n_classes=4, random_state=0))
    folds = softmax(rows, folds_of(rows), 4)
    phi = Learned(TableReward(3.0 * torch.randn(4, 4, dtype=torch.float64, generator=random)), 2.0, False)
    policy = folds.policy
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=random)
    reference = Reference(policy, rows, folds_of(rows), first=likelihood, held_out=likelihood, tol=1e-6, max_iter=500)
    folds = Softmax(policy, rows, folds_of(rows), tol=1e-6, max_iter=500)
    folds._penalty = 2.0 * folds._unit_penalty

    def joined(tensors):
        return torch.cat(list(tensors), dim=1).detach().mT.numpy()

    table = phi.reward.table().detach().numpy()
    for rewards, loss in ((None, likelihood), (table[:, rows.target.numpy()], policy_gradient(phi.reward))):
        objective = reference._objective(loss, phi.l2())
        parameters = list(policy.parameters())
        gradient = torch.autograd.grad(objective, parameters, create_graph=True)
        value, found = folds._losses(folds._theta, rewards)
        assert value.sum() == pytest.approx(objective.item(), rel=1e-12)
        np.testing.assert_allclose(found, joined(gradient), atol=1e-12)
        direction = [torch.randn(p.shape, dtype=torch.float64, generator=random) for p in parameters]
        expected = joined(torch.autograd.grad(gradient, parameters, direction)) + linear.DAMPING * joined(direction)
        folds._linearise()
        # Sums of 60 rows in single precision.
        np.testing.assert_allclose(
            folds._product(joined(direction).astype(np.float32)), expected, atol=60 * 6e-8 * np.abs(expected).max()
        )


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_preconditioner_is_the_inverse_of_the_mean_hessian(monkeypatch, classes):
    rows = standardised(*make_blobs(90, 3, centers=classes, cluster_std=4.0, random_state=0))
    folds = softmax(rows, folds_of(rows), classes)
    folds.begin(1.0)
    size = classes * 4
    folds._linearise()
    folds._factor()
    basis = np.eye(size, dtype=np.float32).reshape(size, 1, classes, 4).repeat(3, axis=1)
    hessian = np.stack([folds._product(each).mean(axis=0).reshape(-1) for each in basis])
    # But for the equal shift of all intercepts, where the Hessian is the damping, and less than its own rounding. The
    # inverse has entries of 1e5 to 5e5 for it, whose single precision leaves up to 0.03 times a curvature of 0.1.
    shift = np.eye(4)[3].repeat(classes).reshape(4, classes).T.reshape(-1) / np.sqrt(classes)
    rest = np.eye(size) - np.outer(shift, shift)
    np.testing.assert_allclose(rest @ folds._inverse[0] @ hessian @ rest, rest, atol=6e-3)
    monkeypatch.setattr(linear, "LARGEST", size - 1)
    folds._factor()
    for block, inverse in enumerate(folds._inverse):
        part = hessian[4 * block : 4 * block + 4, 4 * block : 4 * block + 4]
        np.testing.assert_allclose(inverse @ part, np.eye(4), atol=2e-3)
    folds._blocks = False
    folds._factor()
    np.testing.assert_allclose(folds._inverse.reshape(-1), 1.0 / np.diag(hessian), rtol=1e-4)


@pytest.mark.parametrize(
    "reward", [None, OneHotMahalanobisReward(3, "diagonal", 1.5).double()], ids=["likelihood", "reward"]
)
def test_networks_go_where_newton_does(reward):
    """L-BFGS of each member in single precision, on networks without hidden layers, any gain being good enough."""
    rows = standardised(*make_blobs(90, 3, centers=3, cluster_std=4.0, random_state=0))
    exact = softmax(rows, folds_of(rows), 3)
    policy = CategoricalPolicy(Stack(3, [3, 3], 0))
    networks = Networks(policy, rows, folds_of(rows), held_out=likelihood, tol=1e-4, max_iter=200)
    loss, steps = networks.train(reward, 3.0, -np.inf)
    assert steps < 60
    if reward is None:
        exact.begin(3.0)
    else:
        exact.train(Learned(reward, 3.0, False))
    with torch.no_grad():
        found, expected = (torch.log_softmax(each(rows.inputs), dim=-1) for each in (policy, exact.policy))
        held_out = (folds_of(rows) * likelihood(policy, crossfit.repeated(rows, 3))).sum() / rows.weight.sum()
    # A gradient of 1e-4, over curvatures of 0.03 that the penalty leaves.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=5e-3)
    assert loss == pytest.approx(float(held_out), rel=1e-5)


class AsReference(BilevelClassifier):
    """The same fit with the fused losses, L-BFGS and implicit differentiation."""

    def _members(self, policy, rows, inside):
        return Reference(policy, rows, inside, first=likelihood, held_out=likelihood, tol=self.tol, max_iter=5000)


def labelled():
    random = np.random.default_rng(0)
    noise = random.normal(size=(120, 4))
    yield "iris", load_iris(return_X_y=True)
    yield "wine", load_wine(return_X_y=True)
    yield "breast_cancer", tuple(part[:200] for part in load_breast_cancer(return_X_y=True))
    yield "blobs", make_blobs(150, 3, centers=4, cluster_std=3.0, random_state=0)
    yield "moons", make_moons(150, noise=0.3, random_state=0)
    yield "noise", (noise, (random.random(120) < 1.0 / (1.0 + np.exp(-noise[:, 0]))).astype(int))
    yield "wide", make_classification(60, 90, n_informative=5, random_state=0)
    yield "five classes", make_classification(200, 7, n_informative=5, n_classes=5, random_state=1)


@pytest.mark.parametrize(("name", "data"), [pytest.param(*case, id=case[0]) for case in labelled()])
def test_a_fit_ends_where_that_of_the_fused_losses_does(name, data):
    options = {"folds": 2, "tol": 1e-5, "random_state": 0, "reward": "diagonal"}
    ours, theirs = (family(**options).fit(*data) for family in (BilevelClassifier, AsReference))
    # Each ends where a step gains less than 3e-5, which leaves some of them, and 60 rows leave the reward much room.
    assert min(ours.outer_losses_) == pytest.approx(min(theirs.outer_losses_), abs=3e-4)
    difference = np.abs(ours.predict_proba(data[0]) - theirs.predict_proba(data[0]))
    assert difference.mean() < (0.02 if name == "wide" else 5e-3)


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("name", ["diabetes", "linnerud", "wide", "singular"])
def test_ridge_is_the_optimum_of_the_fused_losses(name, kind):
    random = np.random.default_rng(0)
    inputs, target = {
        "diabetes": lambda: load_diabetes(return_X_y=True),
        "linnerud": lambda: load_linnerud(return_X_y=True),
        "wide": lambda: (random.normal(size=(30, 40)), random.normal(size=(30, 2))),
        "singular": lambda: (np.repeat(random.normal(size=(50, 2)), 2, axis=1), random.normal(size=(50, 2))),
    }[name]()
    rows = standardised(inputs, target)
    inside, dim = folds_of(rows), rows.target.shape[1]
    unit = torch.tril(0.3 * torch.ones(dim, dim, dtype=torch.float64)) + torch.eye(dim, dtype=torch.float64)
    if kind != "full":
        unit = torch.diag(unit.diagonal())
    phi = Learned(MahalanobisReward(dim, kind, torch.tensor(0.7, dtype=torch.float64)), 3.0, True)

    def policy():
        network = Stack(3, [rows.inputs.shape[1], dim], 0)
        network.measure_in(unit)
        return FullStack(network, 3, dim) if kind == "full" else GaussianPolicy(network, LogStd(3, dim), dim)

    folds = Ridge(policy(), rows, inside, noise=0.0)
    there = rows._replace(target=crossfit.in_units(rows.target, unit))
    other = Reference(policy(), there, inside, first=likelihood, held_out=likelihood, tol=1e-7, max_iter=5000)
    loss, gradient = folds.evaluate(phi)
    folds.train(phi)
    expected, direction = other.evaluate(phi)
    assert loss == pytest.approx(expected, abs=1e-6)
    # The other's linear solve ends at a residual of a thousandth.
    for found, right in zip(gradient, direction, strict=True):
        torch.testing.assert_close(found, right, atol=5e-3 * float(max(g.abs().max() for g in direction)), rtol=0)
    for found, right in zip(folds.policy.parameters(), other.policy.parameters(), strict=True):
        # Without its singular directions, in which nothing but the penalty acts.
        torch.testing.assert_close(found, right, atol=1e-4, rtol=0)


def test_bfgs_finds_the_minimum_of_a_valley():
    """Rosenbrock's function of arsinh φ, from where a step of full length would leave the valley."""
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64).sinh())])
    kept = []

    def evaluate():
        x, y = module[0].asinh()
        value = (1 - x) ** 2 + 20 * (y - x**2) ** 2
        return value.item(), torch.autograd.grad(value, list(module))

    left = crossfit.quasi_newton(
        module, evaluate, lambda: kept.append(module[0].detach().asinh()), 200, tolerance=1e-6, enough=0.0, prior=0.0
    )
    assert left <= 1e-6
    torch.testing.assert_close(module[0].detach().asinh(), torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(kept[-1], module[0].detach().asinh())
    assert max(float((b - a).abs().max()) for a, b in pairwise(kept)) <= crossfit.LONGEST + 1e-12


def test_a_reward_that_is_refused_leaves_the_policies_where_they_were():
    """Under a strong penalty the policies collapse to one class, and would stay there."""
    rows = standardised(*make_blobs(120, 3, centers=2, cluster_std=2.0, random_state=0))
    folds = softmax(rows, folds_of(rows), 2)
    folds.begin(1.0)
    good = Learned(OneHotMahalanobisReward(2, "diagonal", 3.0).double(), 1.0, False)
    loss, _ = folds.evaluate(good)
    folds.keep()
    theta = folds._theta
    folds.evaluate(Learned(TableReward(torch.tensor([[9.0, 9.0], [0.0, 0.0]], dtype=torch.float64)), 1e4, False))
    # A collapse takes away what tells the classes apart: weights that are of the order of one.
    assert np.abs(theta[:, :, :-1]).max() > 0.5
    assert np.abs(folds._theta[:, :, :-1]).max() < 0.05
    again, _ = folds.evaluate(good)
    assert again == pytest.approx(loss, abs=1e-6)


def test_the_reward_is_learned_from_some_rows_and_the_policy_from_all():
    inputs, target = make_classification(4000, 5, n_informative=4, n_redundant=0, class_sep=0.5, random_state=0)
    model = BilevelClassifier(reward_rows=1000, random_state=0).fit(inputs, target)
    whole = BilevelClassifier(reward_rows=None, random_state=0).fit(inputs, target)
    np.testing.assert_array_equal(model._scaler.mean_, whole._scaler.mean_)
    # A reward of 1000 rows: a number more or less a nat in all.
    assert log_loss(target, model.predict_proba(inputs)) < log_loss(target, whole.predict_proba(inputs)) + 4 / 1000
    rare = np.where(np.arange(4000) < 40, 2, target)
    assert len(BilevelClassifier(reward_rows=500, random_state=0).fit(inputs, rare).classes_) == 3


def test_the_penalty_is_learned_where_none_is_given():
    """A hundred features of noise beside one that tells: cross-validation asks for a strong penalty."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(200, 40))
    target = (inputs[:, 0] + 0.5 * random.normal(size=200) > 0).astype(int)
    model = BilevelClassifier(random_state=0).fit(inputs, target)
    fixed = BilevelClassifier(l2=1.0, random_state=0).fit(inputs, target)
    assert fixed.l2_ == 1.0
    assert model.l2_ > 3.0
    assert min(model.outer_losses_) < min(fixed.outer_losses_) - 0.01


def likelihoods(inputs, target):
    """Held-out NLL of the estimator and of logistic regression, each (folds,)."""
    found = []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(inputs, target):
        models = BilevelClassifier(random_state=0), make_pipeline(StandardScaler(), LogisticRegression())
        found.append(
            [log_loss(target[test], m.fit(inputs[train], target[train]).predict_proba(inputs[test])) for m in models]
        )
    return np.array(found).T


def test_held_out_likelihood_beside_logistic_regression():
    gains = {}
    for load in (load_iris, load_wine, load_breast_cancer):
        ours, theirs = likelihoods(*load(return_X_y=True))
        gains[load.__name__] = theirs.mean() - ours.mean()
    assert min(gains.values()) > -0.01
    assert gains["load_iris"] > 0.05
    assert gains["load_wine"] > 0.0
    random = np.random.default_rng(0)
    # Answers on an ordered scale, which rewards of one number a class cannot tell.
    inputs = random.normal(size=(900, 6))
    scale = inputs[:, 0] + 0.5 * inputs[:, 1] + random.logistic(size=900)
    ours, theirs = likelihoods(inputs, np.digitize(scale, [-2.5, -1.2, -0.4, 0.4, 1.2, 2.5]))
    assert ours.mean() < theirs.mean() + 0.01


def test_a_regressor_of_a_perfect_fit():
    inputs = np.random.default_rng(0).normal(size=(40, 3))
    mean, std = BilevelRegressor(random_state=0).fit(inputs, inputs @ [1.0, 2.0, 3.0]).predict(inputs, return_std=True)
    assert np.isfinite(mean).all()
    assert (std > 0).all()


def test_a_small_fit_has_one_thread_and_leaves_them_as_they_were(monkeypatch):
    before, seen = torch.get_num_threads(), []
    evaluate = Softmax.evaluate
    monkeypatch.setattr(
        Softmax, "evaluate", lambda self, phi: seen.append(torch.get_num_threads()) or evaluate(self, phi)
    )
    torch.set_num_threads(2)
    try:
        BilevelClassifier(random_state=0).fit(*load_iris(return_X_y=True))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
