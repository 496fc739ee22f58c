"""The ops by name, and what is refused of their values."""

from collections.abc import Callable

from torch import Tensor

from .. import checks
from ..contract import OPS, Kernel, Request
from . import advantage, categorical, gaussian


def _kernel(op: str, serve: Callable[[Request], tuple[bool, list[Tensor | None]]]) -> Kernel:
    """`serve` says beside its results whether a row may have to be refused: only then all values are looked at."""
    row = OPS[op]

    def kernel(request: Request) -> list[Tensor | None]:
        if "precision" in row.axes:
            checks.precision(op, request.inputs.precision)
        suspicious, results = serve(request)
        if suspicious:
            checks.values(row, request.inputs, request.constants)
        return results

    return kernel


KERNELS: dict[str, Kernel] = {
    op: _kernel(op, serve)
    for op, serve in {**gaussian.SERVED, **categorical.SERVED, **advantage.SERVED}.items()
}
