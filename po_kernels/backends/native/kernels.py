"""The ops of the compiled extension on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import extension
from .. import compiled, contract
from ..compiled import Arguments

# Samples times dimensions of a row: beyond it no machine has the memory, and sizes in bytes would overflow.
_MOST_SCRATCH = 2**48


class _Kernel(compiled.Kernel):
    def call(self, arguments: Arguments, head: Tensor) -> None:
        _call(self.op, arguments, self.labels_name)


def categorical_sample(logits: Tensor, seed: Tensor, num_samples: int, row_offset: int) -> Tensor:
    rows, classes = logits.shape
    labels = logits.new_empty((num_samples, rows), dtype=torch.int64)
    keep: list[Tensor] = []
    arguments = {
        "is_double": logits.dtype == torch.float64,
        "dual": False,
        "rows": rows,
        "classes": classes,
        "num_samples": num_samples,
        "seed": seed,
        "row_offset": row_offset,
        "out": labels.data_ptr(),
    }
    compiled.pass_input(arguments, compiled.rows("logits"), logits, keep)
    _call("categorical_sample", arguments)
    return labels


def _call(op: str, arguments: Arguments, labels_name: str = "target") -> None:
    """Runs the extension's function; raises what it refuses."""
    arguments["threads"] = torch.get_num_threads()
    if "seed" in arguments:
        arguments["seed"] = int(arguments["seed"])
    samples = arguments.get("num_samples", 0)
    per_sample = max(arguments.get("dim", 1), arguments.get("classes", 1))
    try:
        if samples * per_sample > _MOST_SCRATCH:
            raise MemoryError
        code, row = getattr(extension.module, op)(**arguments)
    except MemoryError:
        raise MemoryError(
            f"{op}: num_samples: expected a group whose samples fit in memory, a few rows at a time, "
            f"got {samples} samples of {per_sample} numbers"
        ) from None
    if code:
        contract.refuse(op, code, row, labels_name)


_CATEGORICAL = {
    "categorical_policy_loss": _Kernel(
        "categorical_policy_loss",
        (compiled.rows("logits"), compiled.whole("reward_table")),
        compiled.loss_shape,
        lambda inputs, constants, config: {
            **compiled.loss(inputs, config),
            **compiled.random(constants, config),
            "classes": inputs[0].shape[1],
        },
        labels=("target",),
    ),
    "categorical_surrogate_loss": _Kernel(
        "categorical_surrogate_loss",
        (compiled.rows("logits"), compiled.whole("rewards")),
        compiled.loss_shape,
        lambda inputs, constants, config: {**compiled.loss(inputs, config), "classes": inputs[0].shape[1]},
        labels=("samples",),
        labels_name="samples",
    ),
    "categorical_log_prob": _Kernel(
        "categorical_log_prob",
        (compiled.rows("logits"),),
        lambda inputs, constants, config: constants[0].shape,
        lambda inputs, constants, config: {
            "rows": inputs[0].shape[0],
            "classes": inputs[0].shape[1],
            "count": constants[0].shape[0],
        },
        labels=("value",),
        labels_name="value",
    ),
}

_ADVANTAGE = {
    "group_advantage": _Kernel(
        "group_advantage",
        (compiled.whole("rewards"),),
        lambda inputs, constants, config: inputs[0].shape,
        lambda inputs, constants, config: {
            "rows": inputs[0].shape[1],
            "num_samples": inputs[0].shape[0],
            "advantage": compiled.ADVANTAGES[config.advantage],
            "rbf_gamma": config.rbf_gamma,
        },
    )
}

KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    op: {"first": kernel.first, "second": kernel.second}
    for op, kernel in (
        compiled.gaussian(_Kernel, "gaussian") | compiled.gaussian(_Kernel, "mvn") | _CATEGORICAL | _ADVANTAGE
    ).items()
}
KERNELS["categorical_sample"] = {"sample": categorical_sample}
