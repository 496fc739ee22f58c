"""The scikit-learn estimators: scikit-learn's own checks, the tools they have to work with, and closed forms."""

import importlib
import pickle
import sys
import warnings

import numpy as np
import pandas as pd
import po_bilevel
import pytest
import torch
from po_bilevel import BilevelClassifier, BilevelRegressor, UsageError, crossfit, estimators
from sklearn.base import clone
from sklearn.datasets import load_iris, make_blobs, make_regression
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

# Most tests try fewer rewards than it takes to find the best one.
pytestmark = pytest.mark.filterwarnings("ignore:.*the reward is not where:sklearn.exceptions.ConvergenceWarning")


@parametrize_with_checks([BilevelClassifier(), BilevelRegressor()])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def iris():
    inputs, target = load_iris(return_X_y=True, as_frame=True)
    return inputs, target.map({0: "setosa", 1: "versicolor", 2: "virginica"})


@pytest.fixture(scope="module")
def fitted(iris):
    return BilevelClassifier(outer_steps=5, folds=3, random_state=0).fit(*iris)


def test_classifier_on_a_frame_with_string_labels(iris, fitted):
    inputs, target = iris
    assert fitted.score(inputs, target) > 0.95
    assert list(fitted.feature_names_in_) == list(inputs.columns)
    assert list(fitted.classes_) == ["setosa", "versicolor", "virginica"]
    assert fitted.reward_.shape == (3, 3)
    np.testing.assert_array_equal(np.diag(fitted.reward_), np.zeros(3))
    # R[i, j] = -(U_ii + U_jj).
    assert fitted.reward_[0, 2] == pytest.approx(-(fitted.precision_[0] + fitted.precision_[2]))
    assert fitted.outer_losses_[-1] < fitted.outer_losses_[0]
    np.testing.assert_allclose(fitted.predict_proba(inputs).sum(axis=1), 1.0)
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(inputs)), fitted.predict_proba(inputs))
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(inputs.rename(columns=str.upper))


@pytest.mark.parametrize("reward", ["isotropic", "full", "table"])
def test_forms_of_the_classifier_reward(iris, reward):
    model = BilevelClassifier(reward, outer_steps=3, folds=3, random_state=0).fit(*iris)
    assert model.score(*iris) > 0.9
    assert hasattr(model, "precision_") == (reward != "table")
    if reward != "table":
        assert model.precision_.shape == {"isotropic": (), "full": (3, 3)}[reward]


def test_without_outer_steps_the_reward_stays(iris):
    model = BilevelClassifier(outer_steps=0).fit(*iris)
    np.testing.assert_allclose(model.precision_, 3.0)


def test_a_reward_that_is_not_the_best_is_named(iris):
    with pytest.warns(ConvergenceWarning, match=r"after outer_steps=3: its slope is .* raise outer_steps"):
        BilevelClassifier(outer_steps=3, folds=3, random_state=0).fit(*iris)
    model = BilevelClassifier(folds=3, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(*iris)
    assert len(model.outer_losses_) < 30
    # 30 steps of Adam ended at 0.080, still falling.
    assert min(model.outer_losses_) < 0.065
    numbers = make_regression(80, 4, noise=5.0, random_state=0)
    for family, rows in ((BilevelClassifier, iris), (BilevelRegressor, numbers)):
        network = family(hidden_layer_sizes=(4,), folds=3, outer_steps=1, random_state=0)
        with pytest.warns(ConvergenceWarning, match=r"after outer_steps=1: its last step still gained more") as said:
            network.fit(*rows)
        assert said[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network.set_params(outer_steps=30).fit(*rows)


def cells(count, seed=0):
    """Eight kinds of rows with known chances of two labels, from 0.002 to 0.998: a linear policy can be anything."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, 8, count)
    chance = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, 8)))
    return np.eye(8)[kind], (random.random(count) < chance[kind]).astype(int), chance


def test_probabilities_of_a_flexible_policy_are_consistent():
    """The policy alone, softmax(R P(·|x)), stays 0.01 off."""
    found = []
    for count in (1000, 8000, 64000):
        inputs, target, chance = cells(count)
        model = BilevelClassifier(random_state=0).fit(inputs, target)
        true = np.stack([1.0 - chance, chance], axis=1)
        for shares in ((model.belief_share_, model.likelihood_share_), (0.0, 0.0)):
            model.belief_share_, model.likelihood_share_ = shares
            found.append(float((true * (np.log(true) - model.predict_log_proba(np.eye(8)))).sum(axis=1).mean()))
    # Likelihood's is eight parameters' 8/2N: a half to a tenth of these bounds.
    assert found[0] < 8e-3
    assert found[2] < 1e-3
    assert found[4] < 1.25e-4
    assert min(found[1::2]) > 0.01


def test_beliefs_invert_the_optimal_policy():
    random = torch.Generator().manual_seed(0)
    table = torch.randn(4, 4, dtype=torch.float64, generator=random)
    chances = torch.softmax(torch.randn(5, 4, dtype=torch.float64, generator=random), dim=-1)
    logits = torch.log_softmax(chances @ table.mT, dim=-1)
    torch.testing.assert_close(crossfit.beliefs(logits, table), chances)
    likely = torch.randn(5, 4, dtype=torch.float64, generator=random)
    mixed = crossfit.mixed(crossfit.answers(logits, table, likely), np.array([0.5, 0.25, 0.25]))
    torch.testing.assert_close(
        mixed.exp(), 0.5 * logits.exp() + 0.25 * chances + 0.25 * torch.softmax(likely, dim=-1)
    )  # fmt: skip
    torch.testing.assert_close(
        crossfit.mixed(crossfit.answers(logits, table, likely), np.array([1.0, 0.0, 0.0])), logits
    )


def test_shares_are_where_the_held_out_rows_are_likeliest():
    """Against a search over all shares; one row more is known to the policy and to likelihood, half each."""
    random = np.random.default_rng(0)
    chances = random.uniform(0.01, 1.0, size=(3, 2, 30))
    inside = np.stack([np.arange(30) % 2, 1 - np.arange(30) % 2]) * random.integers(1, 3, 30)
    logs = torch.from_numpy(np.log(chances))
    grid = np.stack(np.meshgrid(np.linspace(0.0, 1.0, 101), np.linspace(0.0, 1.0, 101)), axis=-1).reshape(-1, 2)
    grid = np.column_stack([grid, 1.0 - grid.sum(axis=1)])
    grid = grid[grid[:, [0, 2]].min(axis=1) > 1e-9]
    value = (inside * np.log(np.einsum("gk,kmn->gmn", grid, chances))).sum(axis=(1, 2))
    best = grid[(value + 0.5 * np.log(grid[:, 0] * grid[:, 2])).argmax()]
    # A step of the grid.
    np.testing.assert_allclose(crossfit.shares_of(logs, torch.from_numpy(inside), estimators.KNOWN), best, atol=0.01)
    # Logs of any size, and an answer that is never given.
    logs = torch.stack([logs[0] - 2000.0, torch.full_like(logs[0], -torch.inf), logs[0] - 2001.0])
    shares = crossfit.shares_of(logs, torch.from_numpy(inside), estimators.KNOWN)
    assert shares[1] < 1e-4
    assert shares[0] > 0.9
    assert shares.sum() == pytest.approx(1.0, rel=1e-12)


def test_a_table_is_learned_where_data_allow():
    """Where the classes' logits are linear in x, a diagonal U cannot make a linear policy likely at all x."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(2000, 5))
    logits = inputs @ random.normal(scale=1.5, size=(5, 4))
    target = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
    model = BilevelClassifier(folds=2, tol=1e-3, random_state=0).fit(inputs, target)
    assert not hasattr(model, "precision_")
    # By more than a diagonal U, whose losses come first, and than eight numbers gain by chance.
    assert min(model.outer_losses_) < min(model.outer_losses_[:6]) - 4 / 2000
    # Fewer than 100 rows for each of 4 classes.
    assert hasattr(model.fit(inputs[:390], target[:390]), "precision_")


def test_likelihood_has_a_share_where_a_reward_says_less():
    """Six classes of two clumps each, 160 rows: by what the reward tells alone the held-out rows are less likely."""
    gaps = []
    for seed in (1, 2, 3):
        random = np.random.default_rng(seed)
        means, chances = 1.3 * random.normal(size=(6, 2, 6)), random.dirichlet(np.full(6, 1.5))
        target, part = random.choice(6, 1500, p=chances), random.integers(0, 2, 1500)
        inputs = means[target, part] + random.normal(size=(1500, 6)) * (1.0 + random.random((1500, 1)))
        model = BilevelClassifier(random_state=0).fit(inputs[:160], target[:160])
        scaler = StandardScaler().fit(inputs[:160])
        peer = LogisticRegression().fit(scaler.transform(inputs[:160]), target[:160])
        other = log_loss(target[160:], peer.predict_proba(scaler.transform(inputs[160:])))
        both = log_loss(target[160:], model.predict_proba(inputs[160:]))
        model.likelihood_share_ = 0.0
        gaps.append((both - other, log_loss(target[160:], model.predict_proba(inputs[160:])) - other))
    both, told = np.mean(gaps, axis=0)
    assert both < 0.01
    assert told > 0.02


def test_likelihoods_share_is_logistic_regression(iris):
    model = BilevelClassifier(folds=2, tol=1e-7, random_state=0).fit(*iris)
    model.belief_share_, model.likelihood_share_ = 0.0, 1.0
    inputs = StandardScaler().fit_transform(iris[0])
    peer = LogisticRegression(tol=1e-8, max_iter=1000).fit(inputs, iris[1])
    np.testing.assert_allclose(model.predict_proba(iris[0]), peer.predict_proba(inputs), atol=1e-5)


def test_networks(iris):
    model = BilevelClassifier(hidden_layer_sizes=(8,), outer_steps=2, folds=2, tol=1e-3, random_state=0)
    assert model.fit(*iris).score(*iris) > 0.95
    again = clone(model).fit(*iris)
    np.testing.assert_array_equal(again.predict_proba(iris[0]), model.predict_proba(iris[0]))


def test_likelihood_of_the_classifier_beside_logistic_regression():
    """Where the labels are noisy the reward's confidence is what matters: held-out NLL no worse than likelihood's."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 5))
    target = (rng.random(400) < 1 / (1 + np.exp(-1.5 * inputs[:, 0]))).astype(int)
    model = BilevelClassifier(outer_steps=10, random_state=0).fit(inputs[:200], target[:200])
    other = LogisticRegression().fit(inputs[:200], target[:200])
    ours, theirs = (
        -np.log(each.predict_proba(inputs[200:])[np.arange(200), target[200:]]).mean() for each in (model, other)
    )
    assert ours < theirs + 0.02


@pytest.mark.parametrize("family", [BilevelClassifier, BilevelRegressor])
def test_a_weight_is_as_many_copies_to_the_bit(family):
    inputs, target = make_blobs(40, centers=2, random_state=0)
    weight = np.random.default_rng(0).integers(0, 4, 40)
    order = np.random.default_rng(1).permutation(int(weight.sum()))
    model = family(outer_steps=2, folds=2, random_state=3)
    copies = clone(model).fit(np.repeat(inputs, weight, axis=0)[order], np.repeat(target, weight)[order])
    model.fit(inputs, target, sample_weight=weight)
    np.testing.assert_array_equal(copies.predict(inputs), model.predict(inputs))
    np.testing.assert_array_equal(copies.precision_, model.precision_)


@pytest.mark.parametrize("features", [1, 3])
def test_rows_that_repeat_are_observations(features):
    """Few cells and noisy labels: the confidence that is learned is that of the cells' frequencies."""
    random = np.random.default_rng(0)
    inputs = random.integers(0, 2, (2400, features)).astype(float)
    chance = 1.0 / (1.0 + np.exp(-(inputs - 0.5) @ np.linspace(3.0, -3.0, features)))
    target = (random.random(2400) < chance).astype(int)
    losses = [
        log_loss(target[400:], model.fit(inputs[:400], target[:400]).predict_proba(inputs[400:]))
        for model in (BilevelClassifier(random_state=0), LogisticRegression())
    ]
    assert losses[0] < losses[1] + 0.01
    assert losses[0] < log_loss(target[400:], chance[400:]) + 0.03
    values = np.round(inputs @ np.arange(1.0, features + 1) + 0.7 * random.standard_normal(2400))
    model = BilevelRegressor(random_state=0).fit(inputs, values)
    mean, std = model.predict(inputs, return_std=True)
    assert std[0] == pytest.approx((values - mean).std(), rel=0.01)


@pytest.mark.parametrize(
    "weight", [np.ones(23), np.array([200.0, 3.0, 7.0]), np.linspace(0.1, 1.9, 40), np.full(9, 1e-3)]
)
def test_folds_share_out_the_weight(weight):
    strata = np.arange(len(weight)) % 2
    dealt = crossfit.deal(strata, weight, 5, np.random.RandomState(0))
    np.testing.assert_allclose(dealt.sum(axis=0), weight, rtol=1e-12)
    assert (dealt >= 0).all()
    shares = dealt.sum(axis=1) / min(1.0, weight.mean())
    # In turn: no fold is a unit ahead of another.
    assert shares.max() - shares.min() <= 1.0 + 1e-9
    for each in (0, 1):
        part = dealt[:, strata == each].sum(axis=1) / min(1.0, weight.mean())
        assert part.max() - part.min() <= 2.0 + 1e-9


def test_pickle_pipeline_and_search(iris, fitted):
    inputs, target = iris
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(fitted)).predict_proba(inputs), fitted.predict_proba(inputs)
    )
    search = GridSearchCV(
        make_pipeline(MinMaxScaler(), BilevelClassifier(outer_steps=1, folds=2, random_state=0)),
        {"bilevelclassifier__reward": ["isotropic", "table"], "bilevelclassifier__l2": [1.0]},
        scoring="neg_log_loss",
        cv=2,
    ).fit(inputs, target)
    assert search.best_score_ > -0.4
    assert (
        cross_val_score(BilevelRegressor(outer_steps=1, folds=2), *make_regression(80, 4, random_state=0)).min() > 0.9
    )


def test_warm_start(iris):
    model = BilevelClassifier(outer_steps=3, folds=2, warm_start=True, random_state=0).fit(*iris)
    first = model.outer_losses_
    model.fit(*iris)
    assert model.outer_losses_[0] < first[0]
    assert model.outer_losses_[-1] < first[-1]
    with pytest.raises(UsageError, match="classes of the last fit"):
        model.fit(iris[0], iris[1].str.upper())


def test_regressor_finds_the_noise():
    rng = np.random.default_rng(0)
    inputs = pd.DataFrame(rng.normal(size=(2000, 3)), columns=["a", "b", "c"])
    mixing = np.array([[1.0, 0.0], [0.6, 0.8]])
    noise = rng.normal(size=(2000, 2)) @ np.diag([0.5, 5.0]) @ mixing
    target = np.stack([inputs.a - inputs.b, 10 * inputs.c], axis=1) + noise
    covariance = mixing.T @ np.diag([0.25, 25.0]) @ mixing
    model = BilevelRegressor("full", random_state=0).fit(inputs, target)
    # U* = Σ⁻¹/2. Each entry of a covariance of 2000 rows is right to some 1/√1000, three of which are 10%.
    np.testing.assert_allclose(
        model.precision_, np.linalg.inv(covariance) / 2, atol=0.1 * np.abs(np.linalg.inv(covariance) / 2).max()
    )
    mean, std = model.predict(inputs, return_std=True)
    assert mean.shape == std.shape == (2000, 2)
    # A standard deviation of 2000 rows is right to 1/√4000, three of which are 5%.
    np.testing.assert_allclose(std, np.sqrt(np.diag(covariance)) * np.ones((2000, 1)), rtol=0.05)
    samples = model.sample(inputs[:3], 4000, random_state=0)
    assert samples.shape == (4000, 3, 2)
    # The 10% of the fit, and of 4000 samples two times 1/√2000.
    np.testing.assert_allclose(np.cov(samples[:, 0].T), covariance, rtol=0.15)
    diagonal = BilevelRegressor("isotropic", random_state=0).fit(inputs, target)
    assert diagonal.precision_.shape == (2,)
    # One number in standardised units: the outputs' share of noise is averaged, the ratio of their scales is not.
    assert diagonal.precision_[0] * target[:, 0].var() == pytest.approx(diagonal.precision_[1] * target[:, 1].var())


def test_singular_noise_has_a_full_precision():
    """Four outputs, noise in two directions of them: the residuals' factor makes the problem well conditioned."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(300, 3))
    noise = random.normal(size=(300, 2)) @ random.normal(size=(2, 4))
    target = inputs @ random.normal(size=(3, 4)) + noise
    model = BilevelRegressor("full", random_state=0).fit(inputs, target)
    assert model.n_iter_ < 30
    assert len(model.outer_losses_) < 20
    # Σ of 300 rows is right to 1/√150, two of which are 16%.
    covariance = np.linalg.inv(model.precision_) / 2
    truth = noise.T @ noise / 300
    np.testing.assert_allclose(covariance, truth, atol=0.16 * np.abs(truth).max())
    # And in the directions without noise is no more than the floor of a thousandth of y's deviation.
    assert np.sqrt(np.linalg.eigvalsh(covariance)[1]) < 5e-3 * target.std(axis=0).max()


def test_a_network_stops_where_the_held_out_rows_are_likeliest():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(400, 5))
    target = np.sin(2 * inputs[:, 0]) + inputs[:, 1] * inputs[:, 2] + 0.3 * random.normal(size=400)
    model = BilevelRegressor(hidden_layer_sizes=(32,), random_state=0).fit(inputs[:280], target[:280])
    # Trained to the minimum it takes more than 500 iterations and ends at 0.83.
    assert model.n_iter_ < 200
    assert model.score(inputs[280:], target[280:]) > 0.86
    mean, std = model.predict(inputs[280:], return_std=True)
    # The last fit saw the rows that are held out in the next one, and so is no start for it.
    again = model.set_params(warm_start=True).fit(inputs[:280], target[:280])
    assert again.predict(inputs, return_std=True)[1][0] == std[0]
    assert std[0] == pytest.approx(np.sqrt(0.5 / model.precision_[0]), rel=1e-6)
    # The deviations of 280 and of 120 residuals are right to 1/√560 and 1/√240, together 7.7%: three of that are 23%.
    assert std[0] == pytest.approx(np.sqrt(np.square(mean - target[280:]).mean()), rel=0.25)


def test_a_network_classifier_stops_where_the_held_out_rows_are_likeliest():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(1400, 2))
    chance = 1.0 / (1.0 + np.exp(-4.0 * np.sin(2.0 * inputs[:, 0]) - 2.0 * inputs[:, 1]))
    target = (random.random(1400) < chance).astype(int)
    model = BilevelClassifier(hidden_layer_sizes=(16,), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(inputs[:400], target[:400])
    assert model.l2_ in estimators.PENALTIES
    assert model.n_iter_ < 300
    # The chances themselves have 0.29, and LogisticRegression 0.58.
    assert log_loss(target[400:], model.predict_proba(inputs[400:])) < log_loss(target[400:], chance[400:]) + 0.05
    model.belief_share_ = model.likelihood_share_ = 0.0
    assert log_loss(target[400:], model.predict_proba(inputs[400:])) < log_loss(target[400:], chance[400:]) + 0.1


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (pd.date_range("2020", periods=4), ["expected numbers", "datetime64", "row 0"]),
        (np.array(["1", "2", "3", "4"]), ["expected numbers", "'1'", "row 0"]),
        (np.arange(4).astype("timedelta64[s]"), ["expected numbers", "timedelta64"]),
        (pd.DataFrame({"a": range(4), "b": [1, 2, "3", 4]}), ["'3'", "column 'b', row 2"]),
    ],
    ids=["dates", "strings", "durations", "column"],
)
def test_targets_that_are_no_numbers(target, named):
    with pytest.raises(UsageError, match="BilevelRegressor: y") as caught:
        BilevelRegressor().fit(np.eye(4), target)
    for part in named:
        assert part in str(caught.value)


def test_regressor_of_one_output():
    inputs, target = make_regression(200, 5, noise=20.0, random_state=0)
    model = BilevelRegressor(random_state=0).fit(inputs, target)
    mean, std = model.predict(inputs, return_std=True)
    assert mean.shape == std.shape == (200,)
    assert model.sample(inputs, 3, random_state=1).shape == (3, 200)
    assert model.score(inputs, target) == pytest.approx(Ridge().fit(inputs, target).score(inputs, target), abs=0.01)
    # Σ = U⁻¹/2, and the noise of 20 to some 1/√200, four of which are 20%.
    assert std[0] == pytest.approx(np.sqrt(0.5 / model.precision_[0]), rel=1e-3)
    assert std[0] == pytest.approx(20.0, rel=0.2)


@pytest.mark.parametrize(
    ("estimator", "parts"),
    [
        (BilevelClassifier("round"), ["'reward' parameter of BilevelClassifier", "'table'", "'round'"]),
        (BilevelRegressor("table"), ["'reward' parameter of BilevelRegressor", "'table'"]),
        (BilevelClassifier(folds=1), ["'folds'", "[2, inf)", "Got 1"]),
        (BilevelClassifier(l2=-1.0), ["'l2'", "[0.0, inf)", "'auto'", "-1.0"]),
        (BilevelClassifier(tol=np.inf), ["'tol'", "Got inf"]),
        (BilevelClassifier(hidden_layer_sizes=(0,)), ["hidden_layer_sizes", "at least 1"]),
        (BilevelClassifier(hidden_layer_sizes=0), ["'hidden_layer_sizes'", "[1, inf)"]),
        (BilevelClassifier(np.array(["full", "table"])), ["'reward' parameter of BilevelClassifier"]),
        (BilevelRegressor(max_iter=2.5), ["'max_iter'", "an int", "2.5"]),
        (BilevelClassifier(class_weight="even"), ["'class_weight'", "'balanced'"]),
        (BilevelRegressor(n_jobs=0), ["n_jobs == 0"]),
    ],
)
def test_bad_parameters(estimator, parts):
    with pytest.raises(ValueError) as caught:
        estimator.fit(np.eye(4), [0, 1, 0, 1])
    for part in parts:
        assert part in str(caught.value)


def test_another_fit_starts_from_nothing(iris):
    model = BilevelClassifier(outer_steps=1, folds=2).fit(*iris)
    model.set_params(reward="table", outer_steps=0).fit(*iris)
    assert not hasattr(model, "precision_")
    assert not hasattr(model, "outer_losses_")


@pytest.mark.parametrize(
    "change", [{"reward": "table"}, {"reward": "isotropic"}, {"hidden_layer_sizes": (4,)}], ids=str
)
def test_a_warm_start_is_of_the_same_model(iris, change):
    model = BilevelClassifier(outer_steps=1, folds=2, warm_start=True).fit(*iris)
    with pytest.raises(UsageError, match="BilevelClassifier: warm_start: expected the model of the last fit"):
        model.set_params(**change).fit(*iris)
    inputs = iris[0].to_numpy()
    model = BilevelRegressor(outer_steps=1, folds=2, warm_start=True).fit(inputs[:, :3], inputs[:, 3])
    with pytest.raises(UsageError, match=r"BilevelRegressor: warm_start: .*'features': 3.* got .*'features': 2"):
        model.fit(inputs[:, :2], inputs[:, 3])


def test_a_number_of_samples_that_is_none():
    model = BilevelRegressor(outer_steps=0, folds=2).fit(np.eye(4), np.arange(4.0))
    with pytest.raises(UsageError, match="n_samples: expected an integer of at least 1, got 0"):
        model.sample(np.eye(4), 0)


def test_what_cannot_be_fitted(iris):
    with pytest.raises(UsageError, match="two classes"):
        BilevelClassifier().fit([[1.0], [2.0], [3.0]], ["a", "a", "b"], sample_weight=[1, 1, 0])
    with pytest.raises(UsageError, match="two distinct samples"):
        BilevelRegressor().fit([[1.0], [1.0]], [2.0, 2.0])
    with pytest.raises(NotFittedError):
        BilevelRegressor().predict([[1.0]])
    with pytest.warns(ConvergenceWarning, match="max_iter=1"):
        BilevelClassifier(max_iter=1, outer_steps=0).fit(*iris)


def test_a_missing_scikit_learn_is_named(monkeypatch):
    """All but the estimators is there without it: the package is imported anew, as where it is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("po_bilevel", "sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    anew = importlib.import_module("po_bilevel")
    assert anew is not po_bilevel
    assert all(hasattr(anew, name) for name in anew.__all__)
    with pytest.raises(anew.MissingDependencyError, match=r"pip install '\.\[sklearn\]'"):
        _ = anew.BilevelClassifier
    with pytest.raises(AttributeError, match="no attribute 'BilevelRanker'"):
        _ = po_bilevel.BilevelRanker
