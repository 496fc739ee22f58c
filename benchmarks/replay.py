"""Replays recorded calls of the extension, each case between two calls of the marker; `count` runs it under callgrind.

It imports neither torch nor po_kernels, which would take minutes there: python -S replay.py EXTENSION CALLS
"""

import ctypes
import importlib.util
import os
import pickle
import sys
from typing import Any

# The function of libc that marks where a case begins and ends: nothing else calls it.
MARKER = "getppid"


def address(content: bytes | list[Any], keep: list[Any]) -> int:
    """Of a copy that begins with a cache line, as tensors do; of a list, where the addresses of its parts are."""
    if isinstance(content, list):
        content = b"".join((address(x, keep) if x else 0).to_bytes(8, "little") for x in content)
    memory = ctypes.create_string_buffer(len(content) + 64)
    keep.append(memory)
    found = ctypes.addressof(memory)
    found += -found % 64
    ctypes.memmove(found, content, len(content))
    return found


def main(extension: str, calls: str) -> None:
    spec = importlib.util.spec_from_file_location("po_kernels._native", extension)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with open(calls, "rb") as file:
        cases = pickle.load(file)
    for case in cases:
        keep: list[Any] = []
        prepared = [
            (
                getattr(module, name),
                {key: address(x, keep) if isinstance(x, (bytes, list)) else x for key, x in arguments.items()},
            )
            for name, arguments in case
        ]
        os.getppid()
        for function, arguments in prepared:
            function(**arguments)
        os.getppid()


if __name__ == "__main__":
    main(*sys.argv[1:])
