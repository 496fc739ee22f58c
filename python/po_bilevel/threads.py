"""One thread for problems too small for more."""

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_inside = 0
_outermost = ExitStack()


@functools.cache
def _libraries() -> ThreadpoolController:
    # Looking for them takes as long as a small fit.
    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch and the BLAS of NumPy and SciPy have one thread inside, and again what they had once all have left.

    A second thread saves little on matrix products of microseconds, and where others use the processor each of them
    waits for it.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _outermost.enter_context(_libraries().limit(limits=1, user_api="blas"))
            _outermost.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _outermost.close()
