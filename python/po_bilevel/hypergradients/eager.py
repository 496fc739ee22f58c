"""Compiled functions as they were written."""

import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

from ..threads import Shared


def eagerly() -> AbstractContextManager[None]:
    """What is compiled runs as it was written inside: torch has no second derivative of compiled functions.

    In all threads, until the last of them has left; not where torch compiles the caller itself.
    """
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
        return nullcontext()
    return _eagerly()


def _begin(stack: ExitStack) -> None:
    stack.enter_context(torch.compiler.set_stance("force_eager"))


_eagerly = Shared(_begin)
