"""The problems and methods that several files of tests use."""

import contextlib

import torch
from po_bilevel import (
    BOME,
    Batch,
    BilevelTrainer,
    Dense,
    EvolutionStrategies,
    FiniteDifference,
    FixedPoint,
    Identity,
    ImplicitCG,
    LinearCategorical,
    Neumann,
    NormalCG,
    OneHotMahalanobisReward,
    Penalty,
    PolicyGradient,
    Recompute,
    SingleLoop,
    Truncated,
    Unrolled,
)
from torch import Tensor, nn

import po_kernels as pk

ROWS = 300
NOISE = torch.tensor([0.5, 1.5], dtype=torch.float64)


def lbfgs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        parameters,
        max_iter=50,
        max_eval=500,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )


def seeded(make, *arguments, **options):
    torch.manual_seed(0)
    return make(*arguments, **options).double()


def least_squares(data: Batch) -> torch.Tensor:
    """Residuals of the regression with an intercept, (N, D)."""
    design = torch.cat([data.inputs, torch.ones(len(data.inputs), 1, dtype=torch.float64)], dim=1)
    return data.target - design @ torch.linalg.lstsq(design, data.target).solution


def bilevel(
    data: Batch, *, policy: nn.Module | None = None, reward: nn.Module | None = None, **options
) -> BilevelTrainer:  # fmt: skip
    policy = seeded(LinearCategorical, 2, 3) if policy is None else policy
    reward = OneHotMahalanobisReward(3).double() if reward is None else reward
    arguments = {
        "inner_data": Batch(data.inputs[:60], data.target[:60]),
        "outer_data": Batch(data.inputs[60:], data.target[60:]),
        "inner_optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        "outer_optimizer": torch.optim.Adam(reward.parameters(), lr=0.1),
        "inner_steps": 30,
        "inner_loss": PolicyGradient(l2=0.05),
        "progress": False,
    }
    return BilevelTrainer(policy, reward, **(arguments | options))


def double(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(size: int, seed: int) -> Tensor:
    root = double(size, size, seed=seed)
    return root @ root.mT / size + 0.5 * torch.eye(size, dtype=torch.float64)


class Quadratic:
    """L = ½ θᵀAθ - θᵀ(Bφ), F = ½ ‖θ - t‖² + φᵀc, θ of shapes (2, 3) and (4,), φ of shapes (3,) and ()."""

    def __init__(self, hessian: Tensor) -> None:
        self.hessian = hessian
        self.coupling = double(10, 4, seed=1)
        self.target = double(10, seed=2)
        self.direct = double(4, seed=3)
        self.phi = (double(3, seed=4).requires_grad_(), double(1, seed=5).squeeze().requires_grad_())

    @staticmethod
    def flat(tensors):
        return torch.cat([t.reshape(-1) for t in tensors])

    def theta(self, vector: Tensor):
        return vector[:6].reshape(2, 3).clone().requires_grad_(), vector[6:].clone().requires_grad_()

    def theta_like(self, theta, mask: Tensor):
        """θ under a mask (10,)."""
        return tuple(t * m for t, m in zip(theta, self.theta(mask), strict=True))

    def inner(self, theta, phi):
        t = self.flat(theta)
        return 0.5 * t @ self.hessian @ t - t @ (self.coupling @ self.flat(phi))

    def outer(self, theta, phi):
        return 0.5 * (self.flat(theta) - self.target).square().sum() + self.flat(phi) @ self.direct

    def dense(self, theta, damping: float) -> Tensor:
        regular = self.hessian + damping * torch.eye(10, dtype=torch.float64)
        solution = torch.linalg.solve(regular, self.flat(theta).detach() - self.target)
        return self.direct + self.coupling.mT @ solution

    def solution(self):
        return self.theta(torch.linalg.solve(self.hessian, self.coupling @ self.flat(self.phi).detach()))


def categorical_problem(estimator: str, num_samples: int | None = None, rows: int = 60):
    """A linear softmax policy at its inner optimum under a learned table."""
    inputs, target = double(rows, 2, seed=15), torch.arange(rows) % 3
    inputs[:, 0] += target
    weight = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    table = (-2.0 * (1 - torch.eye(3, dtype=torch.float64))).requires_grad_()

    def inner(theta, phi, estimator=estimator, num_samples=num_samples):
        loss = pk.categorical_policy_loss(
            inputs @ theta[0].mT, target, phi[0], entropy_coef=1.0, estimator=estimator, num_samples=num_samples, seed=3
        )
        return loss + 0.05 * theta[0].square().sum()

    def outer(theta, phi):
        return -pk.categorical_log_prob(inputs @ theta[0].mT, target).mean()

    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = inner((weight,), (table.detach(),), "exact", None)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return inner, outer, (weight,), (table,)


EXACT = ImplicitCG(tolerance=1e-10)


# Eigenvalues of `positive(10, 6)` are between 0.5 and 2.7: 0.6 · 2.7 < 2, and (1 - 0.6 · 0.5)^STEPS is rounding.
RATE, STEPS = 0.6, 100
SOLVERS = [
    ImplicitCG(tolerance=1e-12),
    NormalCG(tolerance=1e-12),
    Neumann(STEPS, RATE),
    Neumann(200),
    FixedPoint(RATE, tolerance=1e-12),
    FixedPoint(tolerance=1e-12),
    Dense(),
]


def name(method) -> str:
    return type(method).__name__


def every_method():
    return [
        *SOLVERS, Identity(), SingleLoop(0.1), Unrolled(2, 0.1), Recompute(2, 0.1), Truncated(2, 1, 0.1),
        FiniteDifference(), Penalty(10.0, 2, 0.1, tolerance=10.0), BOME(2, 0.1, 0.1),
        EvolutionStrategies(2, 0.1, 2, 0.1),
    ]  # fmt: skip


@contextlib.contextmanager
def graphs_held():
    """Counts the bytes that autograd graphs hold: now, and at most."""
    held = [0, 0]

    class Held:
        def __init__(self, tensor):
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            held[0] += self.size
            held[1] = max(held)

        def __del__(self):
            held[0] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda each: each.tensor):
        yield held
