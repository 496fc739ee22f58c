"""One native call on a network as a differentiable loss, with its own second derivative."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import dispatch
from ..backends import contract
from . import _check, _loss, _modes

OP = "network_policy_loss"


class Problem:
    """What all calls on a network have in common."""

    def __init__(
        self, network: Any, inputs: Tensor, target: Tensor, reward: Tensor | None, l2: float, estimator: str | None,
        num_samples: int | None, advantage: str, rbf_gamma: float | None, entropy_coef: float,
    ) -> None:  # fmt: skip
        native = dispatch.module("native").network
        op = f"{network.head}_policy_loss"
        if not 0 <= _check.real(OP, "l2", l2) < math.inf:
            raise ValueError(f"{OP}: l2: expected a finite number of at least 0, got {l2}")
        if network.bounds is not None and not -math.inf < network.bounds[0] < network.bounds[1] < math.inf:
            raise ValueError(f"{OP}: bounds: expected two finite numbers in their order, got {network.bounds}")
        for name, value, default in (
            ("entropy_coef", entropy_coef, 0.0), ("estimator", estimator, None), ("num_samples", num_samples, None),
            ("advantage", advantage, "loo"), ("rbf_gamma", rbf_gamma, None),
        ):  # fmt: skip
            if reward is None and value != default:
                raise ValueError(f"{OP}: {name}: expected {default!r} without a reward, got {value!r}")
        if estimator is None:
            estimator = "exact" if network.head == "categorical" else "analytic"
        coefficient = _check.real(op, "entropy_coef", entropy_coef)
        self.config = _loss.options(
            op, coefficient, estimator, num_samples, advantage, rbf_gamma, "mean", 0, False, None
        ).config
        spread = "triangular" if network.head == "mvn" else "log_std" if network.bounds is None else "bounded"
        self.shape = native.Shape(
            network.head, network.activation, spread, _widths(network.layers), _widths(network.spread_layers),
            network.bounds or (0.0, 0.0),
        )  # fmt: skip
        self.inputs, self.target, self.l2 = inputs, target, l2

    def prepared(self, reward: Tensor | None, batches: Any, **tensors: Any) -> Any:
        return dispatch.module("native").network.prepared(
            self.shape, self.inputs, self.target, reward, self.config, self.l2, batches, **tensors
        )

    def run(self, reward: Tensor | None, seed: int, **tensors: Any) -> float:
        """The loss of all rows."""
        native = dispatch.module("native").network
        batches = native.Batches((len(self.inputs),), None, (seed,))
        losses = native.run([self.prepared(reward, batches, **tensors)])[0].losses
        if not losses:
            self._refuse(reward)
        return losses[0]

    def _refuse(self, reward: Tensor | None) -> NoReturn:
        """Raises what the op of the outputs would."""
        op = f"{self.shape.head}_{'log_prob' if reward is None else 'policy_loss'}"
        if self.shape.head == "categorical":
            classes = self.shape.widths[-1]
            labels = self.target.reshape(-1)
            bad = ((labels < 0) | (labels >= classes)).nonzero()
            if len(bad):
                row = int(bad[0])
                contract.refuse(op, "label_out_of_range", row, got=int(labels[row]), last=classes - 1)
        elif reward is not None:
            dispatch.refuse_precision(op, reward)
        raise ValueError(f"{op}: expected finite outputs of the network, got others")


def _widths(layers: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[int, ...]:
    return (layers[0][0].shape[1], *(len(weight) for weight, _ in layers)) if layers else ()


class Loss(torch.autograd.Function):
    """The loss, and with it the gradients of all that needs one."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, seed: int, recorded: bool, reward: Tensor | None, *parameters: Tensor | None
    ) -> Tensor | None:  # fmt: skip
        reward_wanted, *wanted = (recorded and needed for needed in ctx.needs_input_grad[3:])
        gradients = room(parameters, wanted)
        by_reward = torch.empty_like(reward) if reward is not None and reward_wanted else None
        loss = problem.run(reward, seed, values=parameters, gradients=gradients, reward_gradient=by_reward)
        ctx.problem, ctx.seed, ctx.gradients = problem, seed, [by_reward, *gradients]
        # Inputs and targets, for autograd to refuse to go on once they have changed.
        ctx.save_for_backward(problem.inputs, problem.target, reward, *parameters)
        return problem.inputs.new_tensor(loss)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        # Linear in the cotangent, of which there may be a batch.
        if not torch.is_grad_enabled() and not _modes.in_forward_mode():
            return None, None, None, *_scaled(ctx.gradients, cotangent)
        _, _, *tensors = ctx.saved_tensors
        return None, None, None, *_Gradient.apply(ctx.problem, ctx.seed, ctx.gradients, cotangent, *tensors)


class _Gradient(torch.autograd.Function):
    """The gradients of a loss, whose derivative is a product with its Hessian."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, seed: int, gradients: list[Tensor | None], cotangent: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.problem, ctx.seed, ctx.gradients = problem, seed, gradients
        ctx.save_for_backward(problem.inputs, problem.target, cotangent, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(_scaled(gradients, cotangent))

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        if _modes.is_differentiated() or any(v is not None and _modes.is_legacy_batch(v) for v in vectors):
            raise RuntimeError(
                f"{OP}: a third derivative, or a batch of second ones, was asked for; take the loss within "
                "po_kernels.use_backend('reference')"
            )
        if ctx.problem.config.estimator == "reinforce":
            raise RuntimeError(
                f"{OP}: estimator='reinforce' has no second derivative: that of its surrogate is wrong; use 'dice'"
            )
        _, _, cotangent, reward, *parameters = ctx.saved_tensors
        vectors = tuple(None if (x := _modes.resolved(v)) is None else x.contiguous() for v in vectors)
        wanted = ctx.needs_input_grad[4:]
        products = room((reward, *parameters), wanted)
        ctx.problem.run(
            reward, ctx.seed, values=parameters, gradients=products[1:], tangents=vectors[1:],
            reward_gradient=products[0], reward_tangent=vectors[0],
        )  # fmt: skip
        along = None
        if ctx.needs_input_grad[3]:
            pairs = [(g, v) for g, v in zip(ctx.gradients, vectors, strict=True) if g is not None and v is not None]
            along = sum(((g * v).sum() for g, v in pairs), start=torch.zeros_like(cotangent))
        return None, None, None, along, *_scaled(products, cotangent)


def room(tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """A tensor like each that is wanted."""
    return [torch.empty_like(x) if x is not None and w else None for x, w in zip(tensors, wanted, strict=True)]


def _scaled(gradients: Sequence[Tensor | None], by: Tensor) -> list[Tensor | None]:
    """New tensors, which whoever gets them may change, and to which autograd may give a history."""
    return [None if g is None else g * by for g in gradients]
