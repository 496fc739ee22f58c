"""Fits of the estimators, with their defaults, against the scikit-learn estimators that one would take instead.

`make bench` runs these; each checks its answer before it is timed. All have one thread: with two, and others on the
machine, scikit-learn's wait for each other, which is no merit of ours.
"""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from po_bilevel import BilevelClassifier, BilevelRegressor
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_wine,
    make_classification,
    make_regression,
)
from sklearn.linear_model import BayesianRidge, LogisticRegression, LogisticRegressionCV
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.harness import compare, versions

CLASSES: dict[str, Any] = {
    "wine": lambda: load_wine(return_X_y=True),
    "breast_cancer": lambda: load_breast_cancer(return_X_y=True),
    "digits": lambda: load_digits(return_X_y=True),
    "50000 x 30 x 3": lambda: make_classification(50_000, 30, n_informative=10, n_classes=3, random_state=0),
}
VALUES: dict[str, Any] = {
    "442 x 10": lambda: load_diabetes(return_X_y=True),
    "50000 x 20": lambda: make_regression(50_000, 20, noise=10.0, random_state=0),
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CLASSES)
def bench_classifier(benchmark, name):
    """Against `LogisticRegressionCV()`, whose iterations end early on inputs that are not standardised, and on such."""
    inputs, target = CLASSES[name]()
    test = np.arange(len(inputs)) % 3 == 0
    ours, theirs = (
        log_loss(target[test], model.fit(inputs[~test], target[~test]).predict_proba(inputs[test]))
        for model in (BilevelClassifier(random_state=0), make_pipeline(StandardScaler(), LogisticRegression()))
    )
    if not ours < theirs + 0.02:
        raise AssertionError(f"{name}: held-out NLL {ours:.4f}, logistic regression {theirs:.4f}")
    scaled = StandardScaler().fit_transform(inputs)
    model = BilevelClassifier(random_state=0)
    info = {}
    with warnings.catch_warnings():
        # Of LogisticRegressionCV: its defaults change, and it does not converge.
        warnings.simplefilter("ignore")
        for peer, given in (("logistic_cv", inputs), ("logistic_cv_scaled", scaled)):
            info[peer] = compare(
                lambda: model.fit(inputs, target), lambda given=given: LogisticRegressionCV().fit(given, target)
            )._asdict()
    benchmark.extra_info.update(versions(), held_out=[ours, theirs], cross_validated=min(model.outer_losses_), **info)
    benchmark.pedantic(lambda: model.fit(inputs, target), rounds=5)


@pytest.mark.parametrize("name", VALUES)
def bench_regressor(benchmark, name):
    """Against `BayesianRidge()`."""
    inputs, target = VALUES[name]()
    model, peer = BilevelRegressor(random_state=0), BayesianRidge()
    ours, theirs = (each.fit(inputs, target).score(inputs, target) for each in (model, peer))
    if not abs(ours - theirs) < 0.01:
        raise AssertionError(f"{name}: R² {ours:.4f}, BayesianRidge {theirs:.4f}")
    ratio = compare(lambda: model.fit(inputs, target), lambda: peer.fit(inputs, target))
    benchmark.extra_info.update(versions(), bayesian_ridge=ratio._asdict())
    benchmark.pedantic(lambda: model.fit(inputs, target), rounds=5)


@pytest.mark.parametrize("hidden", [(32,), (64, 64)], ids=["32", "64-64"])
def bench_network_regressor(benchmark, hidden):
    """400 rows, stopped by held-out likelihood: its seconds."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(400, 5))
    target = np.sin(2.0 * inputs[:, 0]) + inputs[:, 1] * inputs[:, 2] + 0.3 * random.normal(size=400)
    model = BilevelRegressor(hidden_layer_sizes=hidden, random_state=0)
    if not model.fit(inputs[:300], target[:300]).score(inputs[300:], target[300:]) > 0.8:
        raise AssertionError("the network does not fit")
    benchmark.extra_info.update(versions())
    benchmark.pedantic(lambda: model.fit(inputs, target), rounds=5)
