"""Policies that are networks, and their losses in plain torch on the reference."""

import itertools

import torch
from torch import nn
from torch.autograd import grad

import po_kernels as pk

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh")}
ESTIMATORS = {"closed form": {}, "dice": {"estimator": "dice", "num_samples": 3}, "reparam": {
    "estimator": "reparam", "num_samples": 2}}  # fmt: skip
SPREADS = ("shared", "bounded", "by row", "bounded by row")


def layers_of(*widths, activation):
    modules = []
    for i, o in itertools.pairwise(widths):
        modules += [nn.Linear(i, o), ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])


class Policy:
    """A network, its outputs in plain torch, and the loss of these on the reference."""

    def __init__(self, head, activation="tanh", widths=(3, 9, 6, 4), rows=21, observations=None, spread="shared",
                 precision=2, dtype=torch.float64, seed=0):  # fmt: skip
        torch.manual_seed(seed)
        dim, self.head, self.bounds = widths[-1], head, (-2.0, 1.5) if spread.startswith("bounded") else None
        self.net = layers_of(*widths, activation=activation).to(dtype)
        self.spread_net = layers_of(widths[0], 5, dim, activation=activation).to(dtype) if "row" in spread else None
        normal = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
        self.spread = []
        if head != "categorical" and self.spread_net is None:
            self.spread = [normal(dim).requires_grad_()]
            if head == "mvn":
                self.spread.append((0.3 * normal(dim, dim)).requires_grad_())
        self.inputs = normal(rows, widths[0])
        lead = (rows,) if observations is None else (observations, rows)
        if head == "categorical":
            self.target, self.reward = torch.randint(dim, lead), normal(dim, dim)
        else:
            factor = normal(dim, dim)
            matrix = factor @ factor.mT + torch.eye(dim, dtype=dtype)
            self.target = normal(*lead, dim)
            self.reward = (matrix[0, 0], matrix.diagonal(), matrix)[precision].clone()
        self.reward.requires_grad_()
        linear = lambda net: [] if net is None else [(m.weight, m.bias) for m in net if isinstance(m, nn.Linear)]  # noqa: E731
        self.network = pk.Network(head, activation, linear(self.net), self.spread, linear(self.spread_net), self.bounds)
        self.leaves = [p for p in self.network.parameters() if p is not None]

    def tensors(self):
        return self.network, self.inputs, self.target, self.reward

    def fused(self, **options):
        return pk.network_policy_loss(*self.tensors(), **options)

    def defined(self, *, l2=0.0, **options):
        penalty = 0.5 * l2 * sum((p * p).sum() for p in self.leaves)
        return self.loss_of_outputs(**options) + penalty

    def loss_of_outputs(self, **options):
        outputs = self.net(self.inputs)
        event = 0 if self.head == "categorical" else 1
        lead = self.target.shape[: self.target.ndim - event]
        outputs = outputs.expand(*lead, outputs.shape[-1])
        with pk.use_backend("reference"):
            if self.head == "categorical":
                if self.reward is None:
                    return -pk.categorical_log_prob(outputs, self.target).mean()
                return pk.categorical_policy_loss(outputs, self.target, self.reward, **options)
            if self.head == "mvn":
                log_diagonal, below = self.spread
                scale = torch.tril(below, -1) + torch.diag(log_diagonal.exp())
                if self.reward is None:
                    return -pk.mvn_log_prob(outputs, scale, self.target).mean()
                return pk.mvn_policy_loss(outputs, scale, self.target, self.reward, **options)
            log_std = self.spread_net(self.inputs) if self.spread_net is not None else self.spread[0]
            if self.bounds is not None:
                log_std = self.bounds[0] + (self.bounds[1] - self.bounds[0]) * torch.sigmoid(log_std)
            if log_std.ndim > 1:
                log_std = log_std.expand(*lead, -1)
            if self.reward is None:
                return -pk.gaussian_log_prob(outputs, log_std, self.target).mean()
            return pk.gaussian_policy_loss(outputs, log_std, self.target, self.reward, **options)

    def derivatives(self, loss, **options):
        """The loss, its gradients, and the product of its Hessian in all inputs with a direction."""
        inputs = self.leaves if self.reward is None else [*self.leaves, self.reward]
        value = loss(**options)
        gradients = grad(value, inputs, create_graph=True)
        generator = torch.Generator().manual_seed(1)
        along = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in inputs]
        return [value.detach()], [g.detach() for g in gradients], list(grad(gradients, inputs, along))
