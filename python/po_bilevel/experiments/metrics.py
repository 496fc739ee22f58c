"""Metrics of predicted class probabilities (N, C), whose rows sum to one, and integer labels, the target, (N,)."""

import torch
from torch import Tensor


def accuracy(probabilities: Tensor, target: Tensor) -> float:
    """Fraction of rows whose most probable class is the label."""
    return float((probabilities.argmax(dim=-1) == target).double().mean())


def nll(log_probabilities: Tensor, target: Tensor) -> float:
    """Mean negative log-probability of the label, in nats; logarithms, for a confident error to cost what it should."""
    return float(-log_probabilities.gather(-1, target[:, None]).mean())


def brier(probabilities: Tensor, target: Tensor) -> float:
    """Brier's score, the mean over rows of the squared distance to the one-hot label: from 0 to 2."""
    one_hot = torch.nn.functional.one_hot(target, probabilities.shape[-1])
    return float((probabilities - one_hot).square().sum(dim=-1).mean())


def ece(probabilities: Tensor, target: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error of the most probable class (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    The mean over rows of |accuracy - confidence| of the row's bin, bins of equal width over confidences from 0 to 1.

    Args:
        num_bins: number of bins.
    """
    confidence, answer = probabilities.double().max(dim=-1)
    right = (answer == target).double()
    # A confidence on an edge belongs to the bin below, as in the paper; 0 has none below.
    bins = (torch.ceil(confidence * num_bins).long() - 1).clamp(0, num_bins - 1)
    gap = torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, right - confidence)
    return float(gap.abs().sum() / target.shape[0])


def classification(log_probabilities: Tensor, target: Tensor) -> dict[str, float]:
    """All of the above, by name: accuracy, nll, brier, ece."""
    probabilities = log_probabilities.exp()
    return {
        "accuracy": accuracy(probabilities, target),
        "nll": nll(log_probabilities, target),
        "brier": brier(probabilities, target),
        "ece": ece(probabilities, target),
    }
