"""Files that are there in full or not at all, and folders that one process writes to."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # No such locks on Windows, where nothing is held and nothing swept.
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, which becomes `path` when the block ends well and is removed if not.

    What processes that were killed in such a block have left of it is removed first.
    """
    for left in path.parent.glob(f".{glob.escape(path.stem)}-*{glob.escape(path.suffix)}"):
        with contextlib.suppress(OSError), alone(left):
            left.unlink()
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    temporary = Path(name)
    try:
        # Held until it has its name, so that no other process takes it for left over.
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files that only their owner can read; the umask is only readable by setting it.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """A file or folder that is there is held by this process, until the block or the process ends, however it does.

    Nothing is held on a system or a file system that has no such locks.

    Raises:
        BlockingIOError: it is held already.
    """
    if fcntl is None:
        yield
        return
    held = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(held)
