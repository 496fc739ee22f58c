"""Processes of this machine, each of which takes one task at a time."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_processes(
    call: Callable[[T], R], tasks: Sequence[T], workers: int | None
) -> Iterator[tuple[T, R | None, BaseException | None]]:
    """Calls a function of a module with each task; gives each as it ends, with what came of it or what went wrong.

    A process that is killed or interrupted takes its pool along, and all that ran in it. Whose fault it was shows when
    each of these has a pool to itself.

    Args:
        call: the function.
        tasks: what it is called with.
        workers: the most processes at a time; None for one for each processor.
    """
    waiting, suspects = list(reversed(tasks)), list[T]()
    while waiting or suspects:
        count = (workers or os.cpu_count() or 1) if waiting else 1
        left = waiting or [suspects.pop()]
        # A fork of a process that has run torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(count, len(left)), context, _begin, (os.getpid(),)) as pool:
            running: dict[Future[R], T] = {}
            try:
                while left or running:
                    while left and len(running) < count:
                        running[pool.submit(call, left[-1])] = left[-1]
                        left.pop()
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        task, error = running.pop(done), done.exception()
                        if isinstance(error, BrokenProcessPool) and count > 1:
                            suspects.append(task)
                        else:
                            yield task, None if error else done.result(), error
            except BrokenProcessPool:
                suspects.extend(running.values())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _begin(parent: int) -> None:
    """In a worker: ends it when the process that started it has gone, as a killed one cannot say goodbye.

    And without a word where it is interrupted: if all are, the one that started them says so.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    threading.Thread(target=watch, daemon=True).start()
