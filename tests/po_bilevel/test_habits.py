"""What users of scikit-learn expect of an estimator beyond its checks; and the pictures of what was learned."""

import functools
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.sparse
import torch
from po_bilevel import (
    Batch,
    BilevelClassifier,
    BilevelRegressor,
    BilevelTrainer,
    HypergradientDisplay,
    LinearGaussian,
    MahalanobisReward,
    NonFiniteError,
    RewardDisplay,
    fitting,
)
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibrationDisplay
from sklearn.datasets import load_iris, make_classification, make_regression
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.utils.estimator_checks import check_param_validation
from sklearn.utils.validation import check_is_fitted

pytestmark = pytest.mark.filterwarnings("ignore:.*the reward is not where:sklearn.exceptions.ConvergenceWarning")
QUICK = {"outer_steps": 2, "folds": 2}


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    with warnings.catch_warnings():
        # matplotlib without a display.
        warnings.simplefilter("ignore", UserWarning)
        plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def two_classes():
    return make_classification(120, 4, n_informative=3, n_redundant=0, weights=[0.8], random_state=0)


@pytest.mark.parametrize("family", [BilevelClassifier, BilevelRegressor])
def test_parameters_are_validated_as_scikit_learn_does(family):
    check_param_validation(family.__name__, family())


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_class_weight_is_a_weight_of_rows(hidden, two_classes):
    X, y = two_classes
    plain = BilevelClassifier(hidden_layer_sizes=hidden, **QUICK, random_state=0).fit(X, y)
    # It makes no copies of a row, of which one fold could hold out what another part was trained on.
    nearly = clone(plain).set_params(class_weight={0: 1.0001, 1: 1.0001}).fit(X, y)
    np.testing.assert_allclose(nearly.outer_losses_, plain.outer_losses_, rtol=1e-3)
    nearly = clone(plain).fit(X, y, sample_weight=np.full(len(y), 1.0001))
    np.testing.assert_allclose(nearly.outer_losses_, plain.outer_losses_, rtol=1e-3)
    without = clone(plain).set_params(class_weight={0: 1.0, 1: 1.0}).fit(X, y)
    np.testing.assert_array_equal(without.predict_proba(X), plain.predict_proba(X))
    balanced = clone(plain).set_params(class_weight="balanced").fit(X, y)
    # As many of the rare class as there would be of half of the rows.
    assert plain.predict_proba(X)[:, 1].mean() < 0.3 < balanced.predict_proba(X)[:, 1].mean()


@pytest.mark.parametrize("classes", [2, 3])
def test_coefficients_are_those_of_the_policy(classes):
    X, y = make_classification(100, 5, n_informative=4, n_redundant=0, n_classes=classes, random_state=1)
    model = BilevelClassifier(**QUICK, l2=0.5, random_state=0).fit(3.0 * X + 1.0, y)
    with torch.no_grad():
        logits = model.policy_(torch.from_numpy(model._scaler.transform(3.0 * X + 1.0)))[0].numpy()
    found = (3.0 * X + 1.0) @ model.coef_.T + model.intercept_
    expected = logits[:, 1:] - logits[:, :1] if classes == 2 else logits
    assert found.shape == (100, 1 if classes == 2 else 3)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert not hasattr(model.set_params(hidden_layer_sizes=3).fit(X, y), "coef_")


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("reward", ["diagonal", "full"])
def test_coefficients_of_a_regression(outputs, reward):
    X, y = make_regression(60, 3, n_targets=outputs, noise=5.0, random_state=0)
    model = BilevelRegressor(reward, **QUICK).fit(X, y)
    assert model.coef_.shape == ((3,) if outputs == 1 else (2, 3))
    np.testing.assert_allclose(X @ model.coef_.T + model.intercept_, model.predict(X), rtol=1e-9, atol=1e-7)


def test_a_number_is_a_network_of_one_hidden_layer(two_classes):
    first, second = (BilevelClassifier(hidden_layer_sizes=h, **QUICK, random_state=0) for h in (4, (4,)))
    X, y = two_classes
    np.testing.assert_array_equal(first.fit(X, y).predict_proba(X), second.fit(X, y).predict_proba(X))


@pytest.mark.parametrize("error", [KeyboardInterrupt, NonFiniteError("the loss is nan")])
@pytest.mark.parametrize("hidden", [(), (3,)])
def test_a_fit_that_is_interrupted_leaves_nothing_of_itself(error, hidden, two_classes, monkeypatch):
    model = BilevelClassifier(hidden_layer_sizes=hidden, **QUICK).fit(*two_classes)
    with config_context(enable_metadata_routing=True):
        model.set_fit_request(sample_weight=True)
    place = "_learn_early" if hidden else "_on_all"

    def interrupted(*_):
        raise error

    monkeypatch.setattr(BilevelClassifier, place, interrupted)
    said = "BilevelClassifier: the fit was interrupted: it is not fitted" if error is KeyboardInterrupt else "nan"
    with pytest.raises(type(error) if isinstance(error, Exception) else error, match=said):
        model.fit(*two_classes)
    with pytest.raises(NotFittedError):
        check_is_fitted(model)
    assert set(vars(model)) == {*model.get_params(), "_metadata_request"}


def test_what_cannot_be_used_is_refused_by_name(two_classes):
    X, y = two_classes
    for model in (BilevelClassifier(**QUICK), BilevelRegressor(**QUICK)):
        with pytest.raises(TypeError, match="Sparse data was passed for X"):
            model.fit(scipy.sparse.csr_matrix(X), y)
    labels = np.where(y == 1, "yes", "no").astype(object)
    labels[7] = None
    with pytest.raises(ValueError, match="BilevelClassifier: y: expected labels, got None in row 7"):
        BilevelClassifier(**QUICK).fit(X, labels)
    with pytest.raises(ValueError, match="BilevelRegressor: y: expected numbers, got None"):
        BilevelRegressor(**QUICK).fit(X, [None] * len(y))


def test_sample_weight_is_routed(two_classes):
    X, y = two_classes
    weight = np.where(np.arange(len(y)) % 2, 1.0, 0.0)
    with config_context(enable_metadata_routing=True):
        model = BilevelClassifier(**QUICK, random_state=0).set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=False)
        found = cross_validate(model, X, y, params={"sample_weight": weight}, cv=2, return_estimator=True)
    for (rows, _), fitted in zip(StratifiedKFold(2).split(X, y), found["estimator"], strict=True):
        expected = clone(model).fit(X[rows], y[rows], sample_weight=weight[rows])
        np.testing.assert_array_equal(fitted.predict_proba(X), expected.predict_proba(X))


def test_jobs_are_threads(two_classes, monkeypatch):
    seen = []
    begin = fitting.BilevelEstimator._begin
    monkeypatch.setattr(
        fitting.BilevelEstimator, "_begin", lambda *given: (seen.append(torch.get_num_threads()), begin(*given))[1]
    )
    before = torch.get_num_threads()
    BilevelClassifier(**QUICK, n_jobs=3).fit(*two_classes)
    monkeypatch.setattr(fitting, "PARALLEL", 0)
    for jobs in (None, 1, 3):
        BilevelClassifier(**QUICK, n_jobs=jobs).fit(*two_classes)
    assert seen == [1, before, 1, 3]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_a_bar_says_how_far_a_fit_is(hidden, two_classes, capsys, monkeypatch):
    monkeypatch.setattr(fitting, "tqdm", functools.partial(fitting.tqdm, mininterval=0.0))
    BilevelClassifier(hidden_layer_sizes=hidden, **QUICK, verbose=1).fit(*two_classes)
    said = capsys.readouterr().err
    assert "outer steps" in said
    assert "held-out NLL 0." in said
    BilevelClassifier(hidden_layer_sizes=hidden, **QUICK).fit(*two_classes)
    assert capsys.readouterr().err == ""


def test_calibration_display_takes_the_classifier(two_classes):
    X, y = two_classes
    model = BilevelClassifier(**QUICK).fit(X, y)
    display = CalibrationDisplay.from_estimator(model, X, y, n_bins=4)
    np.testing.assert_array_equal(display.y_prob, model.predict_proba(X)[:, 1])


def test_rewards_are_drawn():
    X, y = load_iris(return_X_y=True)
    model = BilevelClassifier(**QUICK).fit(X, y)
    display = RewardDisplay.from_estimator(model, cmap="magma")
    np.testing.assert_array_equal(display.im_.get_array(), model.reward_)
    np.testing.assert_array_equal(display.lines_[0].get_ydata(), model.outer_losses_)
    assert [label.get_text() for label in display.ax_.get_xticklabels()] == ["0", "1", "2"]
    # One of the two where there is one place, and U of a regression.
    figure, ax = plt.subplots()
    display = RewardDisplay.from_estimator(BilevelRegressor(**QUICK).fit(X[:, :3], X[:, 2:]), ax=ax)
    assert (display.ax_, display.path_ax_, display.figure_) == (ax, None, figure)
    assert display.im_.get_array().shape == (2, 2)
    with pytest.raises(NotFittedError):
        RewardDisplay.from_estimator(BilevelClassifier())


def history_of(reward):
    data = Batch(torch.randn(30, 3), torch.randn(30, 2))
    return BilevelTrainer(
        LinearGaussian(3, 2), reward, inner_data=data, outer_data=data, inner_steps=2, progress=False,
        inner_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.1),
    ).fit(3)  # fmt: skip


@pytest.mark.filterwarnings("ignore::po_bilevel.HypergradientWarning")
def test_the_course_of_a_training_is_drawn():
    history = history_of(MahalanobisReward(2, "diagonal"))
    display = RewardDisplay.from_history(history)
    drawn = np.stack([line.get_ydata() for line in display.lines_], axis=1)
    np.testing.assert_array_equal(drawn, [step.reward.tolist() for step in history])
    course = HypergradientDisplay.from_history(history)
    np.testing.assert_array_equal(course.ax_[0].lines[0].get_ydata(), [step.residual_norm for step in history])
    np.testing.assert_array_equal(course.ax_[1].lines[0].get_ydata(), [step.min_curvature for step in history])
    assert course.ax_[0].get_yscale() == "log"
