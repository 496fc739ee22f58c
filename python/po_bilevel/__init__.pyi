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
    FixedPointProblem,
    Hypergradient,
    HypergradientMethod,
    Identity,
    ImplicitCG,
    Jacobi,
    LinearSolver,
    Minibatches,
    MomentMatching,
    Neumann,
    NormalCG,
    Nystrom,
    Penalty,
    QuasiNewton,
    Recompute,
    RootProblem,
    SampledObjective,
    SingleLoop,
    Truncated,
    Unrolled,
    completion_credit,
    solve,
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
from .streams import BatchStream, LoaderStream
from .trainer import BilevelTrainer
from .training import train, train_ensemble, train_nll, train_policy_gradient

__version__: str

# The estimators are not among these: `from po_bilevel import *` has to work without scikit-learn.
__all__ = [
    "BOME", "Batch", "BatchStream", "BilevelTrainer", "CategoricalPolicy", "ConditionalMLPReward", "CosineReward",
    "Dense", "EmbeddingMahalanobisReward", "EvolutionStrategies", "FiniteDifference", "FisherCG", "FixedPoint",
    "FixedPointProblem", "FullGaussianPolicy", "GaussianPolicy", "Hypergradient", "HypergradientDisplay",
    "HypergradientMethod", "HypergradientWarning", "Identity", "ImplicitCG", "Jacobi", "LinearCategorical",
    "LinearFullGaussian", "LinearGaussian", "LinearSolver", "LoaderStream", "MLPCategorical", "MLPFullGaussian",
    "MLPGaussian", "MLPReward", "MahalanobisReward", "MatrixReward", "Minibatches", "MissingDependencyError",
    "MomentMatching", "NegativeLogLikelihood", "Neumann", "NonFiniteError", "NormalCG", "Nystrom",
    "OneHotMahalanobisReward", "OuterStep", "Penalty", "Policy", "PolicyGradient", "PositivePrecision",
    "QuasiNewton", "Recompute", "Reward", "RewardDisplay", "RootProblem", "SampledObjective", "SampledReward",
    "SingleLoop", "TableReward", "TabularReward", "TensorBoard", "Truncated", "Unrolled", "UsageError",
    "WeightsAndBiases", "completion_credit", "iterated_precision", "marginal_covariance", "one_hot_table",
    "optimal_precision", "residual_covariance", "solve", "train", "train_ensemble", "train_nll",
    "train_policy_gradient",
]  # fmt: skip
