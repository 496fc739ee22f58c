"""Compiled kernels. Tensors are addresses (0 for none) and sizes, all by keyword; see csrc/calls.hpp.

The kernels of the CPU return (code, row): 0, or a refusal of `backends.contract` and the row it concerns. Those of CUDA
return (refused, failed): why such shapes are refused, and the error of a launch, each empty if there is none.
"""

from collections.abc import Callable
from typing import Any

def simd_level() -> str: ...
def enums() -> dict[str, dict[str, int]]: ...

# Only where CUDA was built.
def cuda_state() -> dict[str, Any]: ...

# A function for each kernel of csrc/calls.hpp, and with `cuda_` before its name one for each of CUDA.
def __getattr__(name: str) -> Callable[..., tuple[Any, Any]]: ...
