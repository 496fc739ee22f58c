"""What type checkers know of the options: values that the checks at run time accept, and losses' options by name."""

from typing import Literal

from torch import Tensor
from typing_extensions import TypedDict

Backend = Literal["native", "numba", "cuda", "triton", "reference"]
Advantage = Literal["none", "min", "mean", "loo", "standardized"]
Reduction = Literal["mean", "sum", "none"]
Sampled = Literal["reparam", "dice", "reinforce"]
GaussianEstimator = Literal["analytic", "reparam", "dice", "reinforce"]
CategoricalEstimator = Literal["exact", "dice", "reinforce"]
Estimator = Literal["analytic", "exact", "reparam", "dice", "reinforce"]
Ratio = Literal["token", "sequence_mean", "sequence_mean_token", "sequence_sum"]
SurrogateName = Literal["clip", "is", "sapo", "geo_mean", "cispo", "vespo", "reinforce"]
Divergence = Literal["k1", "abs", "k2", "k3"]
Placement = Literal["loss", "loss_times_ratio", "straight_through", "reward"]
Aggregation = Literal["token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]
Direction = Literal["reverse", "forward"]


class SurrogateOptions(TypedDict, total=False):
    """Of the surrogate losses, but for the estimator and return_stats."""

    entropy_coef: float | Tensor
    advantage: Advantage
    rbf_gamma: float | None
    reduction: Reduction
    backend: Backend | None


class PolicyOptions(SurrogateOptions, total=False):
    """Of the policy losses."""

    num_samples: int | None
    seed: int | Tensor | None
    stream: int
    row_offset: int
    batch_dims: int


class ActionOptions(TypedDict, total=False):
    """Of `policy_loss`."""

    old_log_prob: Tensor | None
    ref_log_prob: Tensor | None
    entropy: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    ratio: Ratio
    surrogate: SurrogateName
    clip: tuple[float | None, float]
    dual_clip: float | None
    tau: tuple[float, float]
    log_ratio_max: float | None
    kl: Divergence
    kl_coef: float
    kl_placement: Placement
    entropy_coef: float | Tensor
    aggregation: Aggregation
    normalizer: float | Tensor | None
    max_length: int | None
    cu_seqlens: Tensor | None
