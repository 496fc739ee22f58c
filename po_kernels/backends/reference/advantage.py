"""Group advantages in plain torch."""

from typing import Any

from torch import Tensor

from ..advantages import ADVANTAGES
from ..contract import Definitions, OpConfig
from .losses import transform_rewards


def _group_advantage(inputs: Any, constants: Any, config: OpConfig) -> Tensor:
    return ADVANTAGES[config.advantage].define(transform_rewards(inputs.rewards, config.rbf_gamma))


DEFINITIONS: Definitions = {"group_advantage": _group_advantage}
