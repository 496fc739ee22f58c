"""Training with the fused operations of `po_kernels`: rewards learned from data by bilevel optimisation."""

from typing import TYPE_CHECKING, Any

from .callbacks import TensorBoard, WeightsAndBiases
from .errors import HypergradientWarning, MissingDependencyError, NonFiniteError, UsageError
from .heuristics import iterated_precision, marginal_covariance, optimal_precision, residual_covariance
from .hypergradients import (
    BOME,
    Dense,
    EvolutionStrategies,
    FiniteDifference,
    FisherCG,
    FixedPoint,
    Hypergradient,
    HypergradientMethod,
    Identity,
    ImplicitCG,
    MomentMatching,
    Neumann,
    NormalCG,
    Penalty,
    Recompute,
    SampledObjective,
    SingleLoop,
    Truncated,
    Unrolled,
    completion_credit,
)
from .losses import Batch, NegativeLogLikelihood, PolicyGradient
from .optional import require
from .policies import (
    CategoricalPolicy,
    FullGaussianPolicy,
    GaussianPolicy,
    LinearCategorical,
    LinearFullGaussian,
    LinearGaussian,
    MLPCategorical,
    MLPFullGaussian,
    MLPGaussian,
    Policy,
)
from .rewards import (
    ConditionalMLPReward,
    CosineReward,
    EmbeddingMahalanobisReward,
    MahalanobisReward,
    MatrixReward,
    MLPReward,
    OneHotMahalanobisReward,
    PositivePrecision,
    Reward,
    SampledReward,
    TableReward,
    TabularReward,
    one_hot_table,
)
from .steps import OuterStep
from .trainer import BilevelTrainer
from .training import BatchStream, train, train_ensemble, train_nll, train_policy_gradient

if TYPE_CHECKING:
    from .estimators import BilevelClassifier as BilevelClassifier
    from .estimators import BilevelRegressor as BilevelRegressor

# The estimators are not among these: `from po_bilevel import *` has to work without scikit-learn.
__all__ = [
    "BOME", "Batch", "BatchStream", "BilevelTrainer", "CategoricalPolicy", "ConditionalMLPReward", "CosineReward",
    "Dense", "EmbeddingMahalanobisReward", "EvolutionStrategies", "FiniteDifference", "FisherCG", "FixedPoint",
    "FullGaussianPolicy", "GaussianPolicy", "Hypergradient", "HypergradientMethod",
    "HypergradientWarning", "Identity", "ImplicitCG",
    "LinearCategorical", "LinearFullGaussian", "LinearGaussian", "MLPCategorical", "MLPFullGaussian", "MLPGaussian",
    "MLPReward", "MahalanobisReward", "MatrixReward", "MissingDependencyError", "MomentMatching",
    "NegativeLogLikelihood", "Neumann", "NonFiniteError", "NormalCG", "OneHotMahalanobisReward", "OuterStep",
    "Penalty", "Policy", "PolicyGradient", "PositivePrecision", "Recompute", "Reward", "SampledObjective",
    "SampledReward", "SingleLoop", "TableReward", "TabularReward", "TensorBoard", "Truncated", "Unrolled",
    "UsageError", "WeightsAndBiases", "completion_credit", "iterated_precision", "marginal_covariance",
    "one_hot_table", "optimal_precision", "residual_covariance", "train", "train_ensemble", "train_nll",
    "train_policy_gradient",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The scikit-learn estimators, imported when they are first asked for."""
    if name not in ("BilevelClassifier", "BilevelRegressor"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("sklearn", "sklearn")
    from . import estimators

    return getattr(estimators, name)
