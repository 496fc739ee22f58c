"""Token statistics in plain torch. Rows are flattened: logits (N, V), token_ids (N,)."""

from typing import Any

import torch
from torch import Tensor

from .. import checks, linear_head
from ..contract import IGNORED, Definitions, OpConfig, computed
from .categorical import indices


def statistics(logits: Tensor, token_ids: Tensor, config: OpConfig) -> Tensor:
    """(6, N): log-probability, entropy, log-sum-exp, and nothing; 0 where the token is ignored."""
    left_out = token_ids == IGNORED
    z = logits.to(computed(logits.dtype)).masked_fill(left_out.unsqueeze(-1), 0.0)
    if config.softcap is not None:
        z = config.softcap * torch.tanh(z / config.softcap)
    z = z / config.temperature
    log_p = torch.log_softmax(z, dim=-1)
    index, wrong = indices(token_ids.masked_fill(left_out, 0), logits.shape[-1])
    taken = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * torch.where(torch.isneginf(log_p), 0.0, log_p)).sum(dim=-1)
    # Torch's derivative, exp(z - lse), has the rounding of lse, which is that of the logits' common offset.
    top = z.detach().amax(dim=-1, keepdim=True)
    lse = torch.logsumexp(z - top, dim=-1) + top.squeeze(-1)
    nothing = torch.zeros_like(lse)
    return (torch.stack([taken, entropy, lse, nothing, nothing, nothing]) + wrong).masked_fill(left_out, 0.0)


def linear_statistics(inputs: Any, constants: Any, config: OpConfig) -> Tensor:
    # What is left out may be nan, and the weight's gradient would be too.
    hidden = inputs.hidden.masked_fill((constants.token_ids == IGNORED).unsqueeze(-1), 0.0)
    logits = hidden @ inputs.weight.mT
    if inputs.bias.numel():
        logits = logits + inputs.bias
    checks.logits(linear_head.OP, logits, left_out=constants.token_ids == IGNORED, name=linear_head.LOGITS)
    return statistics(logits, constants.token_ids, config)


DEFINITIONS: Definitions = {
    "token_log_prob": lambda inputs, constants, config: statistics(inputs.logits, constants.token_ids, config),
    "linear_token_log_prob": linear_statistics,
}
