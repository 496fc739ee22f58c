"""Gradients that the forward pass has found times the cotangent of a scalar, which mostly is one."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_TOGETHER = 4  # tensors, as the kernel takes them


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3"])
def rescale(x0, x1, x2, x3, n0: tl.int64, n1: tl.int64, n2: tl.int64, n3: tl.int64, factor, BLOCK: tl.constexpr):
    """Multiplies in place, and touches nothing where the factor is one."""
    f = tl.load(factor)
    if f != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x0 + at, tl.load(x0 + at, at < n0) * f, at < n0)
        tl.store(x1 + at, tl.load(x1 + at, at < n1) * f, at < n1)
        tl.store(x2 + at, tl.load(x2 + at, at < n2) * f, at < n2)
        tl.store(x3 + at, tl.load(x3 + at, at < n3) * f, at < n3)


def in_place(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """x ← factor x for contiguous tensors on a device, _TOGETHER in each launch; nothing waits for it."""
    for first in range(0, len(tensors), _TOGETHER):
        some = tensors[first : first + _TOGETHER]
        sizes = [x.numel() for x in some]
        absent = _TOGETHER - len(sizes)
        grid = (triton.cdiv(max(sizes), _BLOCK),)
        with torch.cuda.device_of(factor):
            rescale[grid](*some, *[some[0]] * absent, *sizes, *[0] * absent, factor, BLOCK=_BLOCK)
