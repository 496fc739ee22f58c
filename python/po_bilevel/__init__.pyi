# What `import po_bilevel` offers, and where it is: type checkers read it, and `__init__.py` does.

from .callbacks import TensorBoard, WeightsAndBiases
from .displays import HypergradientDisplay, RewardDisplay
from .errors import HypergradientWarning, MissingDependencyError, NonFiniteError, UsageError
from .estimators import BilevelClassifier as BilevelClassifier
from .estimators import BilevelRegressor as BilevelRegressor
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

__version__: str

# The estimators are not among these: `from po_bilevel import *` has to work without scikit-learn.
__all__ = [
    "BOME", "Batch", "BatchStream", "BilevelTrainer", "CategoricalPolicy", "ConditionalMLPReward", "CosineReward",
    "Dense", "EmbeddingMahalanobisReward", "EvolutionStrategies", "FiniteDifference", "FisherCG", "FixedPoint",
    "FullGaussianPolicy", "GaussianPolicy", "Hypergradient", "HypergradientDisplay", "HypergradientMethod",
    "HypergradientWarning", "Identity", "ImplicitCG", "LinearCategorical", "LinearFullGaussian", "LinearGaussian",
    "MLPCategorical", "MLPFullGaussian", "MLPGaussian", "MLPReward", "MahalanobisReward", "MatrixReward",
    "MissingDependencyError", "MomentMatching", "NegativeLogLikelihood", "Neumann", "NonFiniteError", "NormalCG",
    "OneHotMahalanobisReward", "OuterStep", "Penalty", "Policy", "PolicyGradient", "PositivePrecision", "Recompute",
    "Reward", "RewardDisplay", "SampledObjective", "SampledReward", "SingleLoop", "TableReward", "TabularReward",
    "TensorBoard", "Truncated", "Unrolled", "UsageError", "WeightsAndBiases", "completion_credit",
    "iterated_precision", "marginal_covariance", "one_hot_table", "optimal_precision", "residual_covariance",
    "train", "train_ensemble", "train_nll", "train_policy_gradient",
]  # fmt: skip
