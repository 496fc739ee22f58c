"""One thread for problems too small for more."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch


class Shared:
    """A context of all threads: the first one that comes in begins it, the last one that leaves ends it.

    Args:
        begin: given a stack for what is to be undone.
    """

    def __init__(self, begin: Callable[[ExitStack], None]) -> None:
        self._begin, self._lock, self._inside, self._stack = begin, threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._begin(self._stack)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._stack.close()


def threads_for(
    multiplications: int, parallel: int = 10**7, most: int | None = None
) -> AbstractContextManager[None]:  # fmt: skip
    """One thread inside where a pass over the data has fewer than `parallel` multiplications, else as many as `most`.

    Those of a network's layers at that size take some fifty microseconds each.
    """
    if multiplications < parallel:
        return one_thread()
    return nullcontext() if most is None else threads(most)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch and BLAS have so many inside."""
    before = torch.get_num_threads()
    with _libraries().limit(limits=count, user_api="blas") if _libraries() is not None else nullcontext():
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@functools.cache
def _libraries() -> Any:
    """What limits the threads of BLAS, or None without scikit-learn, which brings it."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()  # looking for libraries takes as long as a small fit


def one_thread() -> AbstractContextManager[None]:
    """PyTorch and the BLAS of NumPy and SciPy have one thread inside, and again what they had once all have left.

    A second thread saves little on matrix products of microseconds, and where others use the processor each of them
    waits for it.
    """
    return _one_thread()


def _begin(stack: ExitStack) -> None:
    if _libraries() is not None:
        stack.enter_context(_libraries().limit(limits=1, user_api="blas"))
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)


_one_thread = Shared(_begin)
