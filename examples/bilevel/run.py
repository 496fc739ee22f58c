"""What the examples have in common: an inner solver, outer steps, and a peer's gradient and time beside ours."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Example(NamedTuple):
    """A bilevel problem."""

    phi: dict[str, torch.Tensor]  # where φ starts, tensors that require grad
    solved: Callable[[Any], Any]  # φ -> θ*, without derivatives
    outer: Callable[[Any, Any], torch.Tensor]  # (θ, φ) -> F
    gradient: Callable[[Any, Any], Any]  # (θ*, φ) -> dF/dφ, of the form of φ
    peers: dict[str, Callable[[Any, Any], list[Any]]]  # (θ*, φ) -> dF/dφ, or an ImportError where it is missing
    more: Any = None  # what its own `main` shows

    def value(self, phi: Any) -> float:
        """F(θ*(φ), φ)."""
        return float(self.outer(self.solved(phi), phi).detach())


def minimum(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """The minimum of a smooth strictly convex loss: L-BFGS, and steps of Newton's method to rounding."""
    theta = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        theta.grad = torch.func.grad(loss)(theta.detach())
        return loss(theta.detach())

    optimizer.step(closure)
    for _ in range(3):
        hessian = torch.func.hessian(loss)(theta.detach()).reshape(theta.numel(), theta.numel())
        closure()
        theta.data -= torch.linalg.solve(hessian, theta.grad.flatten()).view_as(theta)
    return theta.detach().requires_grad_()


def learn(example: Example, steps: int, learning_rate: float) -> list[float]:
    """F before each outer step of Adam, which moves `example.phi`, and after the last."""
    optimizer = torch.optim.Adam(example.phi.values(), lr=learning_rate)
    values = []
    for _ in range(steps):
        theta = example.solved(example.phi)
        values.append(float(example.outer(theta, example.phi).detach()))
        for key, slope in example.gradient(theta, example.phi).items():
            example.phi[key].grad = slope
        optimizer.step()
    values.append(example.value(example.phi))
    print(f"outer loss {values[0]:.4f} → {values[-1]:.4f} in {steps} steps")
    return values


def beside(example: Example, repeats: int = 20) -> dict[str, tuple[float, float]]:
    """Of each peer that is installed the largest difference from our gradient, and its time over ours."""
    theta, found = example.solved(example.phi), {}
    for name, peer in example.peers.items():
        try:
            theirs = peer(theta, example.phi)
        except ImportError as error:
            print(f"{name}: not installed ({error})")
            continue
        ours = example.gradient(theta, example.phi).values()
        pairs = zip(ours, (torch.tensor(t.tolist(), dtype=torch.float64) for t in theirs), strict=False)
        apart = max(float((a - b).abs().max()) for a, b in pairs)
        ratios = []
        for _ in range(repeats):
            clock = [time.perf_counter()]
            for function in (example.gradient, peer):
                function(theta, example.phi)
                clock.append(time.perf_counter())
            ratios.append((clock[2] - clock[1]) / (clock[1] - clock[0]))
        found[name] = apart, statistics.median(ratios)
        print(f"{name}: gradients differ by {apart:.1e}; its time is {found[name][1]:.2f} of ours")
    return found
