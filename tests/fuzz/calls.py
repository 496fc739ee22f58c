"""One call of an op, as it is drawn, held against the reference in float64, and printed where it is wrong."""

import contextlib
import math
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

# Read when the kernels' scratch memory is first allocated: what is read before it is written is then NaN.
os.environ["PO_KERNELS_POISON"] = "1"

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from po_kernels.backends.advantages import ADVANTAGES
from po_kernels.backends.contract import OPS
from tests.ops import bounds
from tests.ops.cases import (
    ESTIMATORS,
    LOG_PROBS,
    LOSSES,
    PRECISIONS,
    REDUCTIONS,
    Case,
    draw,
    largest,
    repeats_second_order,
    serving,
)

from .memory import LAYOUTS, place, unaliased
from .transforms import TRANSFORMS, WITHOUT_DERIVATIVES, Found

HALF = (torch.bfloat16, torch.float16)


# Of what `bounds` has an eps stand for. Its own 4 has room for a draw of three that shows little of how errors are
# magnified, as the largest of 200 cases needs it; of millions, among them single entries and rewards that are large
# beside their deviations, the least lucky needs some times more.
FACTOR = 16


class FaultError(AssertionError):
    """An op is wrong: how, and the code that shows it."""


@dataclass(frozen=True)
class Call:
    """A call of `op` on `backend` under a transform.

    Attributes:
        drawn: keywords of `cases.draw`.
        exponent: numbers are multiplied by a power of two: rewards of this exponent, what is subtracted and squared
            of half of it, logits of a sixteenth; all of the whole of it where it is negative.
        log_scale: added to log σ; the precision falls with σ squared.
        equal: all rewards of a group are, and all logits of a row that are not masked.
    """

    op: str
    seed: int
    backend: str
    transform: str = "value"
    dtype: torch.dtype = torch.float32
    memory: str = "contiguous"
    exponent: int = 0
    log_scale: float = 0.0
    equal: bool = False
    drawn: dict[str, Any] = field(default_factory=dict)

    def reproduction(self) -> str:
        """At most ten lines of code, from the root of the repository."""
        rest = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name != "drawn" and getattr(self, each.name) != each.default
        }
        arguments = ", ".join(f"{name}={value!r}" for name, value in rest.items())
        drawn = ", ".join(f"{name}={value!r}" for name, value in self.drawn.items())
        body = textwrap.wrap(f"Call({arguments}, drawn=dict({drawn})).check()", 110, break_long_words=False)
        return "\n".join(["import torch", "from tests.fuzz.calls import Call", *body])

    def case(self) -> Case:
        """What is called, in `dtype`, with the values that its place in memory gives it."""
        case = self._scaled(draw(self.op, self.seed, self.dtype, **self.drawn))
        if self.equal:
            case = _with_equal_numbers(case)
        return unaliased(place(case, self.memory, len(self.drawn["lead"])))

    def _scaled(self, case: Case) -> Case:
        def scaled(name: str, x: Tensor) -> Tensor:
            if name == "log_std":
                return x + self.log_scale
            if name == "scale_tril":
                return x * math.exp(self.log_scale)
            if name == "precision":
                return x * math.exp(-2 * self.log_scale)
            if name == "logits":
                return x * 2.0 ** min(self.exponent, self.exponent // 16)
            if name in ("rewards", "reward_table"):
                return x * 2.0**self.exponent
            if name in ("mean", "target", "value", "samples") and x.is_floating_point():
                # Beside the mean of a sample that is drawn the reference, in float64, has to see σ.
                most = 32 if "seed" in OPS[self.op].Constants._fields else self.exponent
                return x * 2.0 ** min(self.exponent, self.exponent // 2, most)
            return x

        return replace(
            case,
            tensors={name: scaled(name, x) for name, x in case.tensors.items()},
            constants={name: scaled(name, x) for name, x in case.constants.items()},
        )

    def check(self) -> None:
        """Raises a `FaultError`, with what is wrong and the code that shows it."""
        case, transform = self.case(), TRANSFORMS[self.transform]
        cases = transform.cases(case)
        expected = [self._expected(each, transform.order) for each in cases]
        placed = place(case, self.memory, len(self.drawn["lead"]))
        before = [x.clone() for x in (*placed.tensors.values(), *placed.constants.values())]
        try:
            with poisoned_memory():
                found = transform.run(placed, self.backend, self.seed, LAYOUTS[self.memory])
        except Exception as error:
            raise FaultError(f"{type(error).__name__}: {error}\n\n{self.reproduction()}") from error
        after = (*placed.tensors.values(), *placed.constants.values())
        lines = [] if all(map(torch.equal, before, after)) else ["an input is changed"]
        for index, each in enumerate(found):
            lines += complaints(each, expected[index % len(expected)])
        if lines:
            raise FaultError("\n".join([*lines[:6], "", self.reproduction()]))

    def _expected(self, case: Case, order: int) -> bounds.Expected:
        """Where exact results leave what float32 can hold, nothing is expected: hypothesis draws another call."""
        if not OPS[self.op].differentiable:
            # Drawn from the same thresholds, which are computed in float64: equal to the last label.
            return bounds.Expected(case, self.seed, False, {"value": [case()]}, {"value": [0.0]})
        drawn = self._scaled(draw(self.op, self.seed, self.dtype, **self.drawn))
        if not repeats_second_order(case):  # of the same first derivative, which forward mode takes too
            case, drawn = (each.with_options(estimator="dice") for each in (case, drawn))
        second = order == 2
        try:
            # Moved rewards would not be equal. The units are those of rewards that are not: when all deviations are
            # zero there is less to add up.
            units = bounds.expected(drawn, self.seed, second=second) if self.equal else None
            right = bounds.expected(case, self.seed, second=second, units_of=units)
        except AssertionError as error:
            if self.exponent > 0 or self.log_scale:
                assume("is not finite" not in str(error))
            raise FaultError(f"the reference: {error}\n\n{self.reproduction()}") from error
        if self.dtype == torch.float16:
            assume(max(map(largest, right.exact.values())) < torch.finfo(self.dtype).max / 2)
        torchs: list[dict[str, list[float]]] = []
        if self.backend == "reference" and self.transform in ("jvp", "forward_over_reverse", "vmap"):
            # Plain torch has other formulas there, and a backend may be as far off as plain torch is.
            there = case.to(torch.float32)
            run = partial(TRANSFORMS[self.transform].run, backend="reference", seed=self.seed, move=lambda x: x)
            exact = run(there.to(torch.float64))
            torchs = [distances(found, right) for found, right in zip(run(there), exact, strict=True)]
        eps = torch.finfo(torch.float32).eps

        def unit(name: str, index: int, x: Tensor) -> float:
            errors = [each[name][index] for each in torchs if name in each]
            return max(right.units[name][index], largest([x])) + 2 * max(errors, default=0.0) / eps

        units = {name: [unit(name, i, x) for i, x in enumerate(xs)] for name, xs in right.exact.items()}
        return replace(right, units=units)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN, or the largest integer."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _with_equal_numbers(case: Case) -> Case:
    tensors = dict(case.tensors)
    if "rewards" in tensors:
        tensors["rewards"] = tensors["rewards"][:1].expand_as(tensors["rewards"]).clone()
    if "reward_table" in tensors:
        tensors["reward_table"] = torch.full_like(tensors["reward_table"], float(tensors["reward_table"][0, 0]))
    if "logits" in tensors:  # the first is never masked
        tensors["logits"] = tensors["logits"].where(tensors["logits"].isneginf(), tensors["logits"][..., :1])
    return replace(case, tensors=tensors)


def complaints(found: Found, right: bounds.Expected) -> list[str]:
    """A line for each tensor that is further from the exact one than it may be.

    What `bounds` says of a tensor, in eps of the dtype that is computed with, and beyond it
    - of a result that is rounded to half precision, that rounding;
    - of a derivative, that of directions and cotangents in half precision, which `bounds` moves as it does inputs;
    - of results that are subnormal, half the least number there is for each of the terms, magnified by the largest
      derivative as other roundings of the inputs are.
    """
    lines = []
    dtype = right.dtype
    computed = torch.float32 if dtype in HALF else dtype
    least, eps = torch.finfo(computed).smallest_normal, dict.fromkeys(right.exact, torch.finfo(computed).eps)
    eps["second"] = torch.finfo(dtype).eps
    halves = [x.dtype for tensors in found.values() for x in tensors if x is not None and x.dtype in HALF]
    if halves and right.case.op not in (*LOSSES, *LOG_PROBS):  # the value is of that dtype, and so the cotangent
        eps["first"] = torch.finfo(halves[0]).eps
    magnified = max((largest(tensors) for tensors in right.exact.values()), default=0.0)
    underflow = FACTOR * right.case.terms * (1 + magnified) * least * torch.finfo(computed).eps
    for order, tensors in found.items():
        for index, x in enumerate(tensors):
            if x is None:
                continue
            exact = right.exact[order][index]
            name = f"{order} {index}"
            if x.shape != exact.shape:
                lines.append(f"{name} has shape {tuple(x.shape)}, not {tuple(exact.shape)}")
                continue
            bound = FACTOR * eps[order] * right.units[order][index] + underflow
            if x.dtype in HALF:
                bound += torch.finfo(x.dtype).eps * largest([exact]) + torch.finfo(x.dtype).smallest_normal
            error = bounds.distance([x], [exact])
            if not error <= bound:
                lines.append(f"{name} is off by {error:.3g}, more than {bound:.3g}: {_shown(x)} for {_shown(exact)}")
    return lines


def distances(found: Found, exact: Found) -> dict[str, list[float]]:
    """Of each tensor; 0 where there is none."""
    return {
        order: [0.0 if x is None else bounds.distance([x], [y]) for x, y in zip(xs, exact[order], strict=True)]
        for order, xs in found.items()
    }


def _shown(x: Tensor) -> str:
    values = [f"{float(v):.7g}" for v in x.detach().flatten()[:4]]
    return f"[{', '.join(values)}{', ...' if x.numel() > 4 else ''}]"


def left_out(call: Call) -> bool:
    """Faults that are known: each line goes when what it names is mended."""
    transform = call.transform
    # Torch refuses tangents of expanded tensors.
    return call.memory == "expanded" and transform in ("jvp", "forward_over_reverse")


LEADS = ((), (1,), (2,), (0,), (3, 2), (5,), (2, 0))
# Of leading dimensions, D or C, and G: many rows, many dimensions, many samples.
LARGE = (((257,), 3, 4), ((1030,), 5, 2), ((2,), 130, 3), ((3,), 4, 129), ((3,), 1029, 3))
# Whose sums have to be better than float32 in sequence; in float64 they may be that.
LONG = (((), 20000, 2), ((2,), 2, 20000))
EXPONENTS = (0, 0, 0, -70, -30, -130, -145, 30, 60, 100, 120)
WEIGHTED = [name for name, transform in TRANSFORMS.items() for _ in range(transform.weight)]


@st.composite
def calls(pick: Any, op: str | None = None, backend: str | None = None, transform: str | None = None) -> Call:
    """Calls, of the smallest first; what is given is fixed."""
    op = pick(st.sampled_from(tuple(OPS))) if op is None else op
    row = OPS[op]
    backend = pick(st.sampled_from(serving(op))) if backend is None else backend
    names = [name for name in WEIGHTED if row.differentiable or name in WITHOUT_DERIVATIVES]
    if len(row.Inputs._fields) == 1:
        names = [name for name in names if name != "mixed"]
    transform = pick(st.sampled_from(names)) if transform is None else transform
    dtype = pick(st.sampled_from((torch.float32, torch.float64, torch.float32, torch.float64, *HALF)))
    if transform == "mixed" or (dtype in HALF and op.startswith("linear")):  # whose products are in half precision
        dtype = torch.float32
    lead, dim, group = pick(st.sampled_from(LEADS)), pick(st.integers(1, 19)), pick(st.integers(1, 9))
    if pick(st.integers(0, 9)) == 9:
        lead, dim, group = pick(st.sampled_from(LARGE if dtype == torch.float64 else (*LARGE, *LONG)))
        if op.startswith("mvn") or "precision" in row.axes or "reward_table" in row.axes:
            dim = min(dim, 24 if op.startswith("mvn") else 130)  # of which there is a matrix
    drawn: dict[str, Any] = {"lead": lead, "dim": dim, "group": group, "shared_scale": pick(st.booleans())}
    kinds = tuple(kind for kind, advantage in ADVANTAGES.items() if group >= advantage.least)
    if op in LOSSES:
        estimators = ESTIMATORS[op]
        if TRANSFORMS[transform].order == 2 and transform != "jvp":
            estimators = tuple(each for each in estimators if each != "reinforce")
        drawn["estimator"] = pick(st.sampled_from(estimators))
        drawn["advantage"] = pick(st.sampled_from(kinds))
        drawn["reduction"] = pick(st.sampled_from(REDUCTIONS))
        drawn["entropy_coef"] = pick(st.sampled_from((0.0, 0.3)))
    if "precision" in row.axes:
        drawn["precision_kind"] = pick(st.sampled_from(PRECISIONS))
    if "logits" in row.axes:
        drawn["mask"] = pick(st.booleans())
    if op == "group_advantage":
        drawn["kind"] = pick(st.sampled_from(kinds))
    if "rbf_gamma" in row.options:
        # About the size of a reward of `dim` terms, so that exp(γ r) stays within a few orders of magnitude of 1.
        gamma = None if drawn.get("estimator") == "analytic" else pick(st.sampled_from((None, None, 0.5 / (dim + 1))))
        drawn["rbf_gamma"] = gamma
    exponent = pick(st.sampled_from(EXPONENTS)) if dtype not in HALF else 0
    if dtype == torch.float64:
        # The exact result is of that dtype too, and what is magnified has to show in float32: samples beside their
        # mean, exp(γ r) beside 1, logits beside the entropy.
        linear = drawn.get("rbf_gamma") is None and "logits" not in row.axes
        exponent = max(min(exponent, 10), -145 if linear else -10)
    log_scale = pick(st.sampled_from((0.0, 0.0, 0.0, -8.0, 5.0))) if "scale" in row.axes else 0.0
    call = Call(
        op,
        pick(st.integers(0, 2**16)),
        backend,
        transform,
        dtype,
        pick(st.sampled_from(tuple(LAYOUTS))),
        exponent=exponent,
        log_scale=log_scale if dtype != torch.float16 else 0.0,
        equal=bool({"rewards", "reward_table", "logits"} & row.axes.keys()) and pick(st.integers(0, 4)) == 4,
        drawn=drawn,
    )
    assume(not left_out(call))
    return call
