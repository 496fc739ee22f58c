"""Random calls of every op, and the backends that serve them: what a new kernel has to pass, by registering."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import po_kernels as pk
from po_kernels import dispatch
from po_kernels.backends.advantages import ADVANTAGES
from po_kernels.backends.contract import OPS
from po_kernels.backends.contract import REDUCTIONS as NUMBERED

REDUCTIONS = tuple(NUMBERED)
PRECISIONS = ("scalar", "diagonal", "full")

LOSSES = tuple(name for name, op in OPS.items() if op.is_loss)
POLICY_LOSSES = tuple(name for name in LOSSES if name.endswith("policy_loss"))
SURROGATE_LOSSES = tuple(name for name in LOSSES if name.endswith("surrogate_loss"))
GAUSSIAN_LOSSES = tuple(name for name in LOSSES if "precision" in OPS[name].axes)
LOG_PROBS = tuple(name for name in OPS if name.endswith("log_prob"))
TOKENS = tuple(name for name, op in OPS.items() if op.leaves_out)
SAMPLES = tuple(name for name in OPS if name.endswith("sample"))
# Of a policy: densities, samples, and what else is no loss and has derivatives.
VALUES = tuple(name for name, op in OPS.items() if op.differentiable and not (op.is_loss or "advantage" in op.options))
CATEGORICAL = tuple(name for name, op in OPS.items() if "logits" in op.axes)
DIFFERENTIABLE = tuple(name for name, op in OPS.items() if op.differentiable)
ESTIMATORS = {name: OPS[name].estimators for name in LOSSES}

LEADS = ((), (1,), (2,), (5,), (1, 1), (2, 3), (3, 1, 2))
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)
GROUPS = (1, 2, 3, 4, 5, 8, 13)


# Where the cases' tensors are: pytest's --device.
DEVICE = os.environ.get("PO_KERNELS_TEST_DEVICE", "cpu")
FAST = bool(os.environ.get("PO_KERNELS_TEST_FAST"))


def seeds(count: int) -> range:
    """Of random cases; fewer in a hurry, and on a GPU, where most of them have to compile kernels of their own."""
    return range(count // 8 if FAST or DEVICE != "cpu" else count)


def fused(op: str) -> list[str]:
    """The backends besides the reference that serve `op` on that device."""
    names = []
    for name in dispatch.BACKENDS:
        if name == "reference":
            continue
        if dispatch.refusal(op, name, DEVICE, torch.float32) is None:
            assert dispatch.refusal(op, name, DEVICE, torch.float64) is None
            names.append(name)
    return names


def serving(op: str) -> list[str]:
    return ["reference", *fused(op)]


def fused_pairs(ops: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(op, backend) for op in ops for backend in fused(op)]


def pairs(ops: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(op, backend) for op in ops for backend in serving(op)]


@dataclass(frozen=True)
class Case:
    """A call of an op.

    Attributes:
        tensors: the differentiable arguments.
        constants: the other tensors: labels, samples.
        options: the rest.
        terms: how many products are summed into one entry of a result, to an order of magnitude.
    """

    op: str
    tensors: dict[str, Tensor]
    constants: dict[str, Tensor]
    options: dict[str, Any]
    terms: int

    def __call__(self, *tensors: Tensor, backend: str | None = "reference", **changes: Any) -> Any:
        """The op with `tensors` in place of the first differentiable arguments."""
        named = {**self.tensors, **dict(zip(self.tensors, tensors, strict=False))}
        found = getattr(pk, self.op)(**named, **self.constants, **{**self.options, **changes}, backend=backend)
        if self.op in TOKENS:
            return torch.stack(found)
        return found[0] if self.op == "gae" else found

    @property
    def inputs(self) -> list[Tensor]:
        """Leaves that require a gradient."""
        return [x.detach().clone().requires_grad_() for x in self.tensors.values()]

    def to(self, dtype: torch.dtype) -> "Case":
        def cast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}

        return replace(self, tensors=cast(self.tensors), constants=cast(self.constants))

    def with_options(self, **changes: Any) -> "Case":
        return replace(self, options={**self.options, **changes})

    def __str__(self) -> str:
        shapes = {name: tuple(x.shape) for name, x in {**self.tensors, **self.constants}.items()}
        return f"{self.op} {shapes} {self.options}"


# Drawn on the CPU, so that a case is the same on every device.


def normal(rng: random.Random, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(rng.getrandbits(63))
    return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu").to(DEVICE)


def uniform(rng: random.Random, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(rng.getrandbits(63))
    return torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu").to(DEVICE)


def labels(rng: random.Random, classes: int, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(rng.getrandbits(63))
    return torch.randint(classes, shape, generator=generator, device="cpu").to(DEVICE)


def precision(rng: random.Random, kind: str, dim: int) -> Tensor:
    """Positive, about 1, so that rewards grow with `dim` alone."""
    if kind == "scalar":
        return 0.5 + uniform(rng)
    if kind == "diagonal":
        return 0.5 + uniform(rng, dim)
    root = normal(rng, dim, dim) / dim**0.5
    product = root @ root.mT
    return 0.5 * (product + product.mT) + 0.3 * torch.eye(dim, dtype=torch.float64, device=DEVICE)


def scale_tril(rng: random.Random, *shape: int) -> Tensor:
    """(*, D, D), well conditioned."""
    off = torch.tril(normal(rng, *shape), -1) * (0.3 / shape[-1] ** 0.5)
    return off + torch.diag_embed(0.5 + uniform(rng, *shape[:-1]))


def masked_logits(rng: random.Random, *shape: int) -> Tensor:
    logits = normal(rng, *shape)
    # The first class stays: a row has to have one.
    hidden = uniform(rng, *shape) < 0.3
    hidden[..., 0] = False
    return logits.masked_fill(hidden, float("-inf"))


def draw(
    op: str,
    seed: int,
    dtype: torch.dtype = torch.float64,
    *,
    lead: tuple[int, ...] | None = None,
    dim: int | None = None,
    group: int | None = None,
    precision_kind: str | None = None,
    shared_scale: bool | None = None,
    mask: bool | None = None,
    **options: Any,
) -> Case:
    """A random call of `op`, reproducible from its seed; keywords fix a part of it.

    Args:
        dim: D, or the number of classes C.
        group: G.
        shared_scale: log_std (D,), or scale_tril (D, D), in place of one a row.
        mask: some logits are -inf.
        options: of the op.
    """
    rng = random.Random(f"{op} {seed}")
    pick = rng.choice
    chosen_lead, chosen_dim, chosen_group = pick(LEADS), pick(SIZES), pick(GROUPS)
    chosen_kind, chosen_shared, chosen_mask = pick(PRECISIONS), rng.random() < 0.3, rng.random() < 0.3
    lead = chosen_lead if lead is None else lead
    dim = chosen_dim if dim is None else dim
    group = chosen_group if group is None else group
    kind = chosen_kind if precision_kind is None else precision_kind
    shared = chosen_shared if shared_scale is None else shared_scale
    mask = chosen_mask if mask is None else mask
    row, family = OPS[op], op.split("_")[0]

    tensors: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for name, letters in row.axes.items():
        if name in ("seed", "gamma", "lam", "known"):
            continue
        extra = pick(((), (1,), (3,), (2, 2))) if "N" in letters else ()
        sizes = {
            "B": lead, "D": (dim,), "C": (dim,), "G": (group,), "N": extra, "H": (group + 1,), "T": (group,),
            "U": (group + 1,),
        }  # fmt: skip
        shape = [size for letter in letters for size in sizes.get(letter, ())]
        own = [] if shared else lead
        if name == "scale" and family == "gaussian":
            tensors["log_std"] = 0.5 * normal(rng, *own, dim)
        elif name == "scale":
            tensors["scale_tril"] = scale_tril(rng, *own, dim, dim)
        elif name == "logits":
            tensors[name] = masked_logits(rng, *shape) if mask else normal(rng, *shape)
        elif name == "bias":
            tensors[name] = normal(rng, dim)
        elif name == "precision":
            tensors[name] = precision(rng, kind, dim)
        elif name == row.labels:
            constants[name] = labels(rng, 1 if mask and name != "target" else dim, *shape)
        elif name == "dones":
            constants[name] = uniform(rng, *shape) < 0.2
        elif name in row.Constants._fields:
            constants[name] = normal(rng, *shape)
        else:
            tensors[name] = normal(rng, *shape)

    arguments: dict[str, Any] = {}
    if op not in LOSSES:
        if "seed" in row.axes:
            arguments = {"num_samples": group, "seed": rng.getrandbits(64), "row_offset": pick((0, 5, 2**33 + 7))}
        elif op in TOKENS:
            arguments = {"temperature": pick((1.0, 0.7)), "softcap": pick((None, None, 2.5))}
            arguments |= {"entropy": True, "return_lse": True, "ignore_index": pick((None, 1))}
        elif op == "gae":
            arguments = {"gamma": pick((1.0, 0.9)), "lam": pick((1.0, 0.8, 0.0))}
        elif "advantage" in row.options:
            arguments = {"kind": _advantage(rng, group), "rbf_gamma": pick((None, None, 0.3))}
    else:
        estimator = options.get("estimator", pick(ESTIMATORS[op]))
        closed = estimator in ("analytic", "exact")
        # About the size of a reward, so that exp(γ r) stays within a few orders of magnitude of 1.
        gamma = pick((None, None, 0.5 / (dim + 1) if family != "categorical" else 0.4))
        arguments = {
            "estimator": estimator,
            "advantage": _advantage(rng, group),
            "rbf_gamma": None if estimator == "analytic" else gamma,
            "entropy_coef": pick((0.0, 0.3, 1.7)),
            "reduction": pick(REDUCTIONS),
        }
        if "seed" in row.axes and not closed:
            arguments["num_samples"] = group
            arguments["seed"] = rng.getrandbits(64) - 2**63
            arguments["row_offset"] = pick((0, 5, 2**33 + 7))
    case = Case(op, tensors, constants, {**arguments, **options}, group * dim + dim * dim)
    return case.to(dtype)


def _advantage(rng: random.Random, group: int) -> str:
    return rng.choice([kind for kind, advantage in ADVANTAGES.items() if group >= advantage.least])


def directions(case: Case, seed: int) -> list[Tensor]:
    """A tangent for each differentiable argument."""
    rng = random.Random(f"directions {seed}")
    return [normal(rng, *x.shape).to(x.dtype) for x in case.tensors.values()]


def cotangent_like(output: Tensor, seed: int) -> Tensor:
    rng = random.Random(f"cotangent {seed}")
    return normal(rng, *output.shape).to(output.dtype)


def derivatives(
    case: Case, backend: str, seed: int = 0, *, second: bool = True, move: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, list[Tensor]]:
    """Value, statistics, gradients, and the gradient of gradients·directions in all inputs and the cotangent.

    `move` changes cotangent and directions.
    """
    inputs = case.inputs
    if case.op in LOSSES:
        output, stats = case(*inputs, backend=backend, return_stats=True)
    else:
        output, stats = case(*inputs, backend=backend), ()
    result = {"value": [output.detach()]}
    if stats:
        assert not any(x.requires_grad for x in stats)
        result["statistics"] = list(stats)
    cotangent = move(cotangent_like(output, seed)).requires_grad_()
    gradients = torch.autograd.grad(output, inputs, cotangent, create_graph=second, materialize_grads=True)
    result["first"] = [x.detach() for x in gradients]
    if second:
        product = sum((g * move(v)).sum() for g, v in zip(gradients, directions(case, seed), strict=True))
        wanted = (*inputs, cotangent)
        result["second"] = list(torch.autograd.grad(product, wanted, materialize_grads=True))
    for name, order in result.items():
        for x in order:
            # A masked target has log-probability -inf, which is a statistic and nothing else.
            right = ~x.isnan() if name == "statistics" else x.isfinite()
            assert right.all(), f"{name} is not finite: {case}"
    return result


def largest(tensors: list[Tensor]) -> float:
    return max(
        (float(x.detach().nan_to_num(posinf=0, neginf=0).abs().max()) for x in tensors if x.numel()), default=0.0
    )


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, infinite if there is a nan; the shapes have to be equal."""
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        x, y = x.detach().double(), y.detach().double()
        if x.numel():
            apart = torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
            worst = max(worst, float(apart.max()))
    return worst


def repeats_second_order(case: Case) -> bool:
    return case.options.get("estimator") != "reinforce"
