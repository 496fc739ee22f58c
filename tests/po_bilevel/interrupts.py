"""What a process is asked to do in a test; apart from the tests, which take seconds to import."""

import os
import signal


def interrupt_itself(task):
    """Of (number, file): the first attempt at the second is interrupted, as by `kill -INT`."""
    number, path = task
    if number == 1 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    return number
