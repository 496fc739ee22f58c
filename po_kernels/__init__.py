"""Fused, twice differentiable operations for policy optimisation.

They sample, and compute log-probabilities, rewards, advantages, entropy, the loss and its gradients in one
pass. See `status()` for the backends that this installation can use.
"""

from importlib.metadata import version as _version

from .dispatch import use_backend
from .ops._loss import LossStats
from .ops.advantage import group_advantage
from .ops.categorical import (
    categorical_log_prob,
    categorical_policy_loss,
    categorical_sample,
    categorical_surrogate_loss,
)
from .ops.gaussian import gaussian_log_prob, gaussian_policy_loss, gaussian_sample, gaussian_surrogate_loss
from .ops.mvn import mvn_log_prob, mvn_policy_loss, mvn_sample, mvn_surrogate_loss
from .report import status

__version__ = _version("po-kernels")

__all__ = [
    "LossStats",
    "categorical_log_prob",
    "categorical_policy_loss",
    "categorical_sample",
    "categorical_surrogate_loss",
    "gaussian_log_prob",
    "gaussian_policy_loss",
    "gaussian_sample",
    "gaussian_surrogate_loss",
    "group_advantage",
    "mvn_log_prob",
    "mvn_policy_loss",
    "mvn_sample",
    "mvn_surrogate_loss",
    "status",
    "use_backend",
]
