"""Which of torch's modes and transforms is looking at a call: the only place that uses private symbols of torch.

`PRIVATE` names them, and `asked_once` has one more; a test asks the installed torch for each.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

PRIVATE = (
    "torch._C._are_functorch_transforms_active",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.get_unwrapped",
    "torch.autograd.forward_ad._current_level",
    "torch.Tensor._is_zerotensor",
    "torch._C._SetExcludeDispatchKeyGuard",
    "torch._C.DispatchKey.AutogradFunctionality",
)

F = TypeVar("F", bound=Callable[..., Any])

transforms_active = torch._C._are_functorch_transforms_active
is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrapped = torch._C._functorch.get_unwrapped
_dispatch_modes = torch._C._len_torch_dispatch_stack
_ORDINARY = (Tensor, torch.nn.Parameter)


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def is_differentiated() -> bool:
    """A backward pass is differentiated, in whichever mode, or batched: it has to be made of Functions."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or transforms_active()


def asked_once(function: F) -> F:
    """A function that torch.compile calls when it traces, and whose result is then a constant.

    It is torch.compiler.assume_constant_result, which would import all of Dynamo: a second of every start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@asked_once
def traced_by_a_transform() -> bool:
    return transforms_active()


def autograd_on() -> Any:
    """A context in which autograd records. Torch turns it off while an operator runs, and the reference needs it."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def may_call_directly(*tensors: Tensor | None) -> bool:
    """A kernel may be called without torch's dispatcher.

    No transform, mode or subclass of tensor is looking, and no tensor is one whose memory does not hold its values: a
    zero without storage, as autograd hands out, a view that is to be negated, or what a transform left behind.
    """
    if transforms_active() or _dispatch_modes():
        return False
    for x in tensors:  # a generator takes longer than all of it
        if x is not None and (type(x) not in _ORDINARY or x._is_zerotensor() or x.is_neg() or _is_wrapped(x)):
            return False
    return True


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply, without what it does for transforms where there is none: binding the arguments to a signature
    takes longer than a small kernel does."""
    return function.apply if transforms_active() else super(torch.autograd.Function, function).apply  # type: ignore


def kept(x: Any) -> Any:
    """A tensor or None, or a copy of what inference mode made, such as a rollout: autograd keeps no such tensor."""
    if x is None or torch.compiler.is_compiling() or not x.is_inference():
        return x
    return x.clone()


def has_tangent(x: Tensor | None) -> bool:
    return x is not None and in_forward_mode() and forward_ad.unpack_dual(x).tangent is not None


def has_derivative(x: Tensor) -> bool:
    """A derivative of some mode or transform would reach x."""
    if torch.compiler.is_compiling():
        return x.requires_grad
    while True:
        if x.requires_grad or has_tangent(x):
            return True
        if not _is_wrapped(x):
            return False
        x = _unwrapped(x)


def resolved(x: Tensor | None) -> Tensor | None:
    """x with its values in memory, which a list of tensors does not get from torch."""
    if x is None:
        return None
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x.resolve_neg()
