"""What a backend offers, and the options that reach it.

A backend is a package `po_kernels.backends.<name>` with

- `unavailable() -> str | None`: why it cannot be used on this machine at all;
- `refuses(op, device_type, dtype) -> str | None`: why it cannot serve such a call;
- `must_be_asked(device_type) -> str | None`: why it serves such tensors only when asked for by name;
- `KERNELS`: for each op that it has, a dictionary of functions.

A differentiable op has two, on rows flattened to one axis:

    first(inputs, constants, cotangent, needs, want_stats, config) -> [value, stats, *gradients]
    second(inputs, constants, tangents, cotangent, cotangent_tangent, needs, config)
        -> [value_tangent, *gradient_tangents]

`inputs` are the differentiable tensors and `constants` the others (labels, samples, seed). With f the
value and g the `cotangent` of its shape (None: ones), the gradients are g ∇f; `second` is the derivative
of both along `tangents` and `cotangent_tangent` (None: zero): ∂f·v and g ∇²f v + ġ ∇f. A gradient that
`needs` does not ask for is an empty tensor. `stats` is (5, *loss.shape), rows averaged, or empty unless
wanted; only losses have them.

| op | inputs | constants | value |
| --- | --- | --- | --- |
| gaussian_policy_loss, mvn_policy_loss | mean, log_std or scale_tril, target, precision | [seed] | () or (B,) |
| gaussian_surrogate_loss, mvn_surrogate_loss | mean, log_std or scale_tril, rewards | samples | () or (B,) |
| categorical_policy_loss | logits, reward_table | target, [seed] | () or (B,) |
| categorical_surrogate_loss | logits, rewards | samples | () or (B,) |
| gaussian_log_prob, mvn_log_prob | mean, log_std or scale_tril, value | | (N, B) |
| categorical_log_prob | logits | value | (N, B) |
| gaussian_sample, mvn_sample | mean, log_std or scale_tril | seed | (G, B, D) |
| group_advantage | rewards | | (G, B) |

mean, log_std and target are (B, D), scale_tril (B, D, D), logits (B, C), rewards (G, B), samples (G, B, D)
or (G, B), value (N, B, D) or (N, B). `categorical_sample` is not differentiable and has one function,
sample(logits, seed, num_samples, row_offset) -> (G, B).

Dispatch knows op, device and dtype. A limit of shapes, such as the shared memory of a GPU, is refused by the call
itself, with a ValueError; a backend with such limits has to be asked for by name.

`reference` is plain torch and differentiated by autograd: in place of these two it has "plain", which takes
(inputs, constants, config) and returns the value, or the row losses and statistics of a loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from torch import Tensor


class OpConfig(NamedTuple):
    """The options of an op that are not tensors; each op has use for some of them."""

    estimator: str = ""
    num_samples: int = 0
    advantage: str = "none"
    rbf_gamma: float | None = None
    entropy_coef: float = 0.0
    reduction: str = "none"
    row_offset: int = 0


class Request(NamedTuple):
    """What `first` and `second` are asked for; of a first derivative the tangents are None."""

    inputs: Sequence[Tensor]
    constants: Sequence[Tensor]
    tangents: Sequence[Tensor | None] | None
    cotangent: Tensor | None
    cotangent_tangent: Tensor | None
    needs: Sequence[bool]
    want_stats: bool
    config: OpConfig


class BothOrders(ABC):
    """`first` and `second` of an op from one function, `run`."""

    def first(
        self,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        cotangent: Tensor | None,
        needs: Sequence[bool],
        want_stats: bool,
        config: OpConfig,
    ) -> list[Tensor]:
        return self.run(Request(inputs, constants, None, cotangent, None, needs, want_stats, config))

    def second(
        self,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        tangents: Sequence[Tensor | None],
        cotangent: Tensor,
        cotangent_tangent: Tensor | None,
        needs: Sequence[bool],
        config: OpConfig,
    ) -> list[Tensor]:
        value, _, *gradients = self.run(
            Request(inputs, constants, tangents, cotangent, cotangent_tangent, needs, False, config)
        )
        return [value, *gradients]

    @abstractmethod
    def run(self, request: Request) -> list[Tensor]:
        """[value, stats, *gradients], or their derivatives along the tangents."""


# Refusals of values, by the code that a compiled kernel returns. A kernel reports the first row concerned.
PRECISION_NOT_POSITIVE = 1
PRECISION_NOT_SYMMETRIC = 2
LABEL_OUT_OF_RANGE = 3
ALL_MASKED = 4
NOT_TRIANGULAR = 5
SINGULAR = 6
LABEL_MASKED = 7
LOGITS_NOT_FINITE = 8

# Entries that should be equal, or zero, may differ by this much of the largest: room for rounding and
# for the finite differences of a gradient check, not for a wrong matrix.
MATRIX_TOLERANCE = 1e-4

_REFUSALS = {
    PRECISION_NOT_POSITIVE: "precision: expected positive values (as a matrix: positive definite), got others",
    PRECISION_NOT_SYMMETRIC: "precision: expected a symmetric matrix, got one that is not",
    LABEL_OUT_OF_RANGE: "{name}: expected labels from 0 to the number of classes less one, got another in row {row}",
    ALL_MASKED: "logits: expected a logit above -inf in each row, got none in row {row}",
    NOT_TRIANGULAR: "scale_tril: expected a lower triangular matrix, got an entry above the diagonal in row {row}",
    LABEL_MASKED: "{name}: expected labels that the logits do not mask, got one of probability zero in row {row}",
    LOGITS_NOT_FINITE: "logits: expected numbers or -inf to draw samples from, got nan or inf in row {row}",
    SINGULAR: "scale_tril: expected a positive diagonal, got another in row {row}",
}


def refuse(op: str, code: int, row: int, name: str = "target") -> NoReturn:
    """Raises the ValueError for a refused value."""
    raise ValueError(f"{op}: " + _REFUSALS[code].format(row=row, name=name))
