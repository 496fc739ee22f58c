"""What is built, what can be used on this machine, and why the rest cannot."""

import platform
from typing import Any

import torch

from . import dispatch, extension
from .version import __version__


def status() -> dict[str, Any]:
    """State of this installation.

    Returns:
        a dictionary with
        "version", "python", "torch": versions;
        "build": what the installer built: compiler, SIMD levels, CUDA, and the reason for what it left out;
        "simd": the instruction-set level that the native kernels run at here, None without them;
        "backends": for each backend its reason for being unavailable here, or None;
        "second_order": for each backend that leaves second derivatives to the reference, why;
        "decisions": for each (op, device, dtype) called so far without a backend asked for by name, the one
            chosen and why those before it were not.
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": dict(extension.build),
        "simd": extension.module.simd_level() if extension.module else None,
        "backends": {name: dispatch.module(name).unavailable() for name in dispatch.BACKENDS},
        "second_order": dispatch.first_order_only(),
        "decisions": {
            f"{op} on {device} in {str(dtype).removeprefix('torch.')}": decision._asdict()
            for (op, device, dtype), decision in dispatch.decisions().items()
        },
    }


def render(state: dict[str, Any]) -> str:
    """`status()` as lines for a terminal."""
    lines = [f"po-kernels {state['version']}, Python {state['python']}, torch {state['torch']}"]
    build = state["build"]
    if build.get("native"):
        lines.append(f"extension: {build['compiler']}, SIMD levels {', '.join(build['simd'])}; runs at {state['simd']}")
        lines.append("CUDA:      " + (f"built for {build['cuda']}" if build["cuda"] else build["cuda_reason"]))
    else:
        lines.append(f"extension: {extension.missing}")
    lines.append("backends:")
    width = max(map(len, state["backends"]))
    for name, reason in state["backends"].items():
        limit = state["second_order"].get(name)
        usable = "usable" if limit is None else f"usable; second order by the reference: {limit}"
        lines.append(f"  {name:<{width}}  " + (usable if reason is None else f"not usable: {reason}"))
    return "\n".join(lines)
