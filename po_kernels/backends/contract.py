"""The table of ops, and what a backend offers for them.

A backend is a package `po_kernels.backends.<name>` with

- `unavailable() -> str | None`: why it cannot be used on this machine at all;
- `unserved(device_type, dtype) -> str | None`: why it cannot serve such tensors;
- `must_be_asked(op, device_type) -> str | None`: why it serves such a call only when asked for by name;
- `KERNELS`: a `Kernel` for each op that it has, and no entry for one that it lacks;
- `FIRST_ORDER_ONLY`, if its kernels take no tangents: why. The reference then serves second order.

A `Kernel` is one function of one `Request`. It returns [value, stats, *gradients], on rows flattened to one axis.
With f the value and g the `cotangent` of its shape (None: ones), the gradients are g ∇f. With `tangents`, each a
tensor or None for zero, it returns the derivatives of value and gradients along them and along `cotangent_tangent`:
∂f·v and g ∇²f v + ġ ∇f. A gradient that `needs` does not ask for is None. `stats` is (5, *loss.shape), rows averaged,
or None unless wanted; only losses have them, and only without tangents. A kernel that has a method `batch` takes
(request, problems) there, with one more axis ahead in every tensor, and returns the same with that axis; the others are
called problem by problem.

Dispatch knows op, device and dtype, and on a device the shapes for which `cuda` was measured to be faster than
`triton`. A limit of shapes, such as the shared memory of a GPU, is refused by the call itself, with a ValueError; but
for those shapes a backend with such limits has to be asked for by name.
"""

from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

# With the numbers that compiled kernels know them by.
ESTIMATORS = {"analytic": 0, "exact": 0, "reparam": 1, "dice": 2, "reinforce": 3}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}

# Sizes of axes, by the letter that stands for them in `Op.axes`.
SIZES = {
    "B": "rows", "D": "dim", "C": "classes", "G": "num_samples", "N": "count", "H": "hidden_size", "T": "steps",
    "U": "states",
}  # fmt: skip

NUM_STATS = 5
# Of a token: log-probability, entropy, log-sum-exp, in the order of the axis "S"; then three that have no derivative
# and are for the backward pass of the same backend, which reads no other: the largest logit, to which sums over the
# vocabulary are relative, Σ exp, and the mean.
NUM_TOKEN_STATS = 6
# The label of a row that is left out: its value and gradients are 0.
IGNORED = -(2**63)

HALF = (torch.bfloat16, torch.float16)

# How a step of an episode ended, in `dones` of gae: not at all, in a state without a value, or before one that has it.
GOES_ON, TERMINATED, TRUNCATED = 0, 1, 2


class OpConfig(NamedTuple):
    """The options of an op that are not tensors; each op has use for some of them.

    `overwrite` is between backends: the gradient of an op's only input may take its place.
    """

    estimator: str = ""
    num_samples: int = 0
    advantage: str = "none"
    rbf_gamma: float | None = None
    entropy_coef: float = 0.0
    reduction: str = "none"
    row_offset: int = 0
    temperature: float = 1.0
    softcap: float | None = None
    chunk_rows: int = 0
    overwrite: bool = False


class Request(NamedTuple):
    """What a kernel is asked for. Inputs, tangents and needs are named by `Op.Inputs`, constants by `Op.Constants`."""

    inputs: Any
    constants: Any
    tangents: Any | None
    cotangent: Tensor | None
    cotangent_tangent: Tensor | None
    needs: Any
    want_stats: bool
    config: OpConfig


Kernel = Callable[[Request], Sequence[Tensor | None]]
Definitions = dict[str, Callable[[Any, Any, OpConfig], Any]]  # of the reference: inputs, constants, options


class Op:
    """A row of the table.

    Attributes:
        name: of the op.
        count: how many inputs it has.
        axes: by name of tensor the letters of its axes, "*" where its shape is one of several.
        Inputs: the differentiable tensors, a named tuple.
        Constants: the others, a named tuple: labels, samples, and the seed, which is None where nothing is drawn.
        value: the letters of the value's axes; empty for a loss, which is () or (B,) by its reduction.
        estimators: of a loss.
        closed_form: the one of them that draws no samples.
        row_axis: for each input of a loss the axis along which a row's value depends on it alone, None if a
            cotangent with an axis has to be known before its gradient can be.
        options: the fields of `OpConfig` that it has a use for.
        labels: the constant that holds classes of a categorical, None if it has none.
        leaves_out: labels may be IGNORED.
        knows: its last constant, `known`, is the value: None in the forward pass, and what that has found in a backward
            pass, which need not find it again.
        differentiable: False for labels that are drawn.
        reads_half: kernels are given tensors in half precision as they are; they compute in float32.
    """

    def __init__(
        self,
        name: str,
        inputs: dict[str, str],
        constants: dict[str, str],
        value: str = "",
        estimators: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
        labels: str | None = None,
        leaves_out: bool = False,
        differentiable: bool = True,
        reads_half: bool = False,
    ) -> None:
        self.name = name
        self.count: int = len(inputs)
        self.axes: dict[str, str] = {**inputs, **constants}
        self.Inputs: Any = namedtuple("Inputs", tuple(inputs))  # type: ignore[misc]
        self.Constants: Any = namedtuple("Constants", tuple(constants))  # type: ignore[misc]
        self.value = value
        self.is_loss: bool = not value
        self.estimators = estimators
        self.closed_form: str | None = next((each for each in estimators if ESTIMATORS[each] == 0), None)
        axes = [letters.find("B") if self.is_loss else -1 for letters in inputs.values()]
        self.row_axis: tuple[int | None, ...] = tuple(None if axis < 0 else axis for axis in axes)
        self.options: tuple[str, ...] = options
        if self.is_loss:
            self.options += ("estimator", "advantage", "rbf_gamma", "entropy_coef", "reduction", "num_samples")
        if "seed" in constants:
            self.options += ("num_samples", "row_offset")
        self.labels = labels
        self.leaves_out = leaves_out
        self.knows: bool = "known" in constants
        self.differentiable = differentiable
        self.reads_half = reads_half
        # Where each size is read: an axis of a tensor, or the configuration.
        self.places: dict[str, tuple[str, int]] = {}
        for tensor, letters in self.axes.items():
            for axis, letter in enumerate(letters):
                if letter not in ("*", "G", "S"):
                    self.places.setdefault(letter, (tensor, axis))

    def request(
        self,
        inputs: Iterable[Tensor],
        constants: Iterable[Tensor | None],
        tangents: Iterable[Tensor | None] | None,
        cotangent: Tensor | None,
        cotangent_tangent: Tensor | None,
        needs: Iterable[bool],
        want_stats: bool,
        config: OpConfig,
    ) -> Request:
        """A `Request` of tensors in the order of the table, all of them."""
        Inputs, new = self.Inputs, tuple.__new__  # a named tuple's own constructor takes twice the time
        return Request(
            new(Inputs, inputs), new(self.Constants, constants), None if tangents is None else new(Inputs, tangents),
            cotangent, cotangent_tangent, new(Inputs, needs), want_stats, config,
        )  # fmt: skip

    def knowing(self, constants: Sequence[Tensor | None], value: Tensor) -> list[Tensor | None]:
        """The constants of a backward pass."""
        return [*constants[:-1], value] if self.knows else [*constants]

    def problem(self, request: Request, index: int) -> Request:
        """One of a batch of problems, which the first axis of every tensor counts."""

        def of(tensors: Iterable[Tensor | None] | None) -> Any:
            return None if tensors is None else [None if x is None else x[index] for x in tensors]

        inputs, constants, tangents, cotangent, cotangent_tangent, *rest = request
        return self.request(of(inputs), of(constants), of(tangents), *of((cotangent, cotangent_tangent)), *rest)

    def size(self, letter: str, inputs: Any, constants: Any, config: OpConfig) -> int:
        if letter == "G":
            return config.num_samples
        if letter == "S":
            return NUM_TOKEN_STATS
        tensor, axis = self.places[letter]
        return getattr(inputs if tensor in inputs._fields else constants, tensor).shape[axis]

    def value_shape(self, inputs: Any, constants: Any, config: OpConfig) -> tuple[int, ...]:
        letters = self.value
        if self.is_loss:
            if config.reduction != "none":
                return ()
            letters = "B"
        return tuple([self.size(letter, inputs, constants, config) for letter in letters])

    def classes(self, inputs: Any) -> int:
        """How many there are, of an op with labels."""
        return self.size("C", inputs, None, OpConfig())

    def value_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of inputs of this dtype."""
        return computed(dtype) if self.differentiable else torch.int64


def computed(dtype: torch.dtype) -> torch.dtype:
    """What numbers of this dtype are computed in."""
    return torch.float32 if dtype in HALF else dtype


_SAMPLED = ("reparam", "dice", "reinforce")
_SEED = {"seed": ""}


def _gaussian(family: str, scale: str) -> list[Op]:
    policy = {"mean": "BD", "scale": scale}
    return [
        Op(
            f"{family}_policy_loss",
            {**policy, "target": "BD", "precision": "*"},
            _SEED,
            estimators=("analytic", *_SAMPLED),
        ),
        Op(f"{family}_surrogate_loss", {**policy, "rewards": "GB"}, {"samples": "GBD"}, estimators=_SAMPLED),
        Op(f"{family}_log_prob", {**policy, "value": "NBD"}, {}, "NB"),
        Op(f"{family}_sample", policy, _SEED, "GBD"),
    ]


_LOGITS = {"logits": "BC"}


def _token_op(name: str, inputs: dict[str, str]) -> Op:
    options = ("temperature", "softcap") if "logits" in inputs else ("temperature", "softcap", "chunk_rows")
    constants = {"token_ids": "B", "known": "SB"}
    return Op(name, inputs, constants, "SB", options=options, labels="token_ids", leaves_out=True, reads_half=True)


OPS = {
    op.name: op
    for op in (
        *_gaussian("gaussian", "BD"),  # the scale is log σ
        *_gaussian("mvn", "BDD"),  # the scale is L, lower triangular
        Op(
            "categorical_policy_loss",
            {**_LOGITS, "reward_table": "CC"},
            {"target": "B", **_SEED},
            estimators=("exact", "dice", "reinforce"),
            labels="target",
        ),
        Op(
            "categorical_surrogate_loss",
            {**_LOGITS, "rewards": "GB"},
            {"samples": "GB"},
            estimators=_SAMPLED[1:],
            labels="samples",
        ),
        Op("categorical_log_prob", _LOGITS, {"value": "NB"}, "NB", labels="value"),
        Op("categorical_sample", _LOGITS, _SEED, "GB", differentiable=False),
        _token_op("token_log_prob", _LOGITS),
        _token_op("linear_token_log_prob", {"hidden": "BH", "weight": "CH", "bias": "*"}),
        Op("gae", {"rewards": "TB", "values": "UB"}, {"dones": "TB", "gamma": "", "lam": ""}, "TB"),
        Op("group_advantage", {"rewards": "GB"}, {}, "GB", options=("advantage", "rbf_gamma", "num_samples")),
    )
}


class Refusal(NamedTuple):
    """Why a value is refused. A compiled kernel returns the number, and the first row concerned."""

    number: int
    message: str


REFUSALS = {
    "precision_not_positive": Refusal(
        1, "precision: expected positive values (as a matrix: positive definite), got others"
    ),
    "precision_not_symmetric": Refusal(2, "precision: expected a symmetric matrix, got one that is not"),
    "label_out_of_range": Refusal(3, "{labels}: expected labels from 0 to {last}, got {got} in row {row}"),
    "all_masked": Refusal(4, "{logits}: expected a logit above -inf in each row, got none in row {row}"),
    "not_triangular": Refusal(
        5, "scale_tril: expected a lower triangular matrix, got an entry above the diagonal in row {row}"
    ),
    "singular": Refusal(6, "scale_tril: expected a positive diagonal, got another in row {row}"),
    "label_masked": Refusal(
        7, "{labels}: expected labels that the logits do not mask, got one of probability zero in row {row}"
    ),
    "logits_not_finite": Refusal(
        8, "logits: expected numbers or -inf to draw samples from, got nan or inf in row {row}"
    ),
    "scale_not_finite": Refusal(9, "scale_tril: expected finite numbers, got nan or inf in row {row}"),
}

# Entries that should be equal, or zero, may differ by this much of the largest: room for rounding and
# for the finite differences of a gradient check, not for a wrong matrix.
MATRIX_TOLERANCE = 1e-4


class RefusedError(ValueError):
    """A value is refused, of that row."""

    def __init__(self, message: str, refusal: str, row: int) -> None:
        super().__init__(message)
        self.refusal: str = refusal
        self.row: int = row


def refuse(op: str, refusal: str, row: int, **named: Any) -> NoReturn:
    """Raises the error of a value refused; `named` are what else its message names."""
    known = {"labels": OPS[op].labels, "logits": "logits", "row": row, **named}
    raise RefusedError(f"{op}: " + REFUSALS[refusal].message.format(**known), refusal, row)
