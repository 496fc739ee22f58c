"""Which of torch's modes and transforms is looking at a call: the only place that uses private symbols of torch.

`PRIVATE` names them; a test asks the installed torch for each.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad

PRIVATE = (
    "torch._C._are_functorch_transforms_active",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch.autograd.forward_ad._current_level",
    "torch.Tensor._is_zerotensor",
    "torch._C._SetExcludeDispatchKeyGuard",
    "torch._C.DispatchKey.AutogradFunctionality",
)

transforms_active = torch._C._are_functorch_transforms_active
is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor
_dispatch_modes = torch._C._len_torch_dispatch_stack
_ORDINARY = (Tensor, torch.nn.Parameter)


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def is_differentiated() -> bool:
    """A backward pass is differentiated, in whichever mode, or batched: it has to be made of Functions."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or transforms_active()


def may_call_directly(*tensors: Tensor | None) -> bool:
    """A kernel may be called without torch's dispatcher.

    No transform, mode or subclass of tensor is looking, and no tensor is one whose memory does not hold its values: a
    zero without storage, as autograd hands out, or a view that is to be negated.
    """
    if transforms_active() or _dispatch_modes():
        return False
    for x in tensors:  # noqa: SIM110, a generator takes longer than all of it
        if x is not None and (type(x) not in _ORDINARY or x._is_zerotensor() or x.is_neg()):
            return False
    return True


def autograd_in_kernels() -> AbstractContextManager[None]:
    """Under a dispatch mode or in a compiled function torch records nothing: autograd in a kernel would find zeros."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
