"""Fused, twice differentiable operations for policy optimisation.

They sample, and compute log-probabilities, rewards, advantages, entropy, the loss and its gradients in one
pass. See `status()` for the backends that this installation can use.
"""

from .dispatch import use_backend
from .ops import advantage as _advantage
from .ops import categorical as _categorical
from .ops import gae as _gae
from .ops import gaussian as _gaussian
from .ops import mvn as _mvn
from .ops import network as _network
from .ops import off_policy as _off_policy
from .ops import policy as _policy
from .ops import presets as _presets
from .ops import token as _token
from .ops._loss import LossStats
from .ops._types import Advantage, Estimator
from .ops.advantage import *
from .ops.categorical import *
from .ops.gae import *
from .ops.gaussian import *
from .ops.mvn import *
from .ops.network import *
from .ops.off_policy import *
from .ops.policy import *
from .ops.presets import *
from .ops.token import *
from .report import status
from .version import __version__ as __version__

__all__ = ["Advantage", "Estimator", "LossStats", "status", "use_backend"]
__all__ += _advantage.__all__
__all__ += _categorical.__all__
__all__ += _gae.__all__
__all__ += _gaussian.__all__
__all__ += _mvn.__all__
__all__ += _network.__all__
__all__ += _off_policy.__all__
__all__ += _policy.__all__
__all__ += _presets.__all__
__all__ += _token.__all__
