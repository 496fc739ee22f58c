"""Metrics by hand and against scikit-learn."""

import numpy as np
import pytest
import torch
from po_bilevel.experiments import metrics
from sklearn.metrics import accuracy_score, log_loss


def test_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]], dtype=torch.float64)
    y = torch.tensor([0, 2, 2])
    found = metrics.classification(p.log(), y)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-np.mean(np.log([0.7, 0.3, 0.5])))
    brier = [0.3**2 + 0.2**2 + 0.1**2, 0.1**2 + 0.6**2 + 0.7**2, 0.2**2 + 0.3**2 + 0.5**2]
    assert found["brier"] == pytest.approx(np.mean(brier))
    # Three rows in three bins: confidences 0.7 and 0.5 were right, 0.6 was wrong.
    assert found["ece"] == pytest.approx((0.3 + 0.6 + 0.5) / 3)


def test_ece_averages_within_a_bin():
    p = torch.tensor([[0.75, 0.25], [0.77, 0.23], [0.2, 0.8], [1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0])
    # Bins of width 0.25, (0.5, 0.75] and (0.75, 1]: one right at 0.75; two of three right at 0.77, 0.8, 1.
    assert metrics.ece(p, y, num_bins=4) == pytest.approx((0.25 + abs(2 - 2.57)) / 4)


def test_against_scikit_learn():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(200, 4)), rng.integers(0, 4, 200)
    log_p = torch.log_softmax(torch.from_numpy(logits), dim=-1)
    found = metrics.classification(log_p, torch.from_numpy(y))
    assert found["accuracy"] == pytest.approx(accuracy_score(y, logits.argmax(axis=1)))
    assert found["nll"] == pytest.approx(log_loss(y, log_p.exp().numpy()))


def test_a_certain_error_costs_its_logit_and_not_infinity():
    log_p = torch.log_softmax(torch.tensor([[2000.0, 0.0]], dtype=torch.float64), dim=-1)
    assert metrics.classification(log_p, torch.tensor([1]))["nll"] == 2000.0
