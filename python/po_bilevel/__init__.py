"""Training with the fused operations of `po_kernels`: rewards learned from data by bilevel optimisation."""

from .errors import MissingDependencyError, NonFiniteError, UsageError
from .heuristics import marginal_covariance, optimal_precision, residual_covariance
from .hypergradient import Hypergradient, HypergradientMethod, ImplicitCG
from .losses import Batch, NegativeLogLikelihood, PolicyGradient
from .policies import (
    CategoricalPolicy,
    GaussianPolicy,
    LinearCategorical,
    LinearGaussian,
    MLPCategorical,
    MLPGaussian,
    Policy,
)
from .rewards import (
    MahalanobisReward,
    MatrixReward,
    OneHotMahalanobisReward,
    PositivePrecision,
    TableReward,
    TabularReward,
    one_hot_table,
)
from .trainer import BatchStream, BilevelTrainer, OuterStep, train, train_nll, train_policy_gradient

__all__ = [
    "Batch",
    "BatchStream",
    "BilevelTrainer",
    "CategoricalPolicy",
    "GaussianPolicy",
    "Hypergradient",
    "HypergradientMethod",
    "ImplicitCG",
    "LinearCategorical",
    "LinearGaussian",
    "MLPCategorical",
    "MLPGaussian",
    "MahalanobisReward",
    "MatrixReward",
    "MissingDependencyError",
    "NegativeLogLikelihood",
    "NonFiniteError",
    "OneHotMahalanobisReward",
    "OuterStep",
    "Policy",
    "PolicyGradient",
    "PositivePrecision",
    "TableReward",
    "TabularReward",
    "UsageError",
    "marginal_covariance",
    "one_hot_table",
    "optimal_precision",
    "residual_covariance",
    "train",
    "train_nll",
    "train_policy_gradient",
]
