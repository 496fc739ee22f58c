"""Compiled functions as they were written."""

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

_lock = threading.Lock()
_inside = 0
_outermost = ExitStack()


def eagerly() -> AbstractContextManager[None]:
    """What is compiled runs as it was written inside: torch has no second derivative of compiled functions.

    In all threads, until the last of them has left; not where torch compiles the caller itself.
    """
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
        return nullcontext()
    return _eagerly()


@contextmanager
def _eagerly() -> Iterator[None]:
    global _inside
    with _lock:
        if _inside == 0:
            _outermost.enter_context(torch.compiler.set_stance("force_eager"))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _outermost.close()
