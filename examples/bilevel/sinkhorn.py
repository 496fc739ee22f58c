"""Entropic optimal transport: a cost that is learned from a transport plan, through Sinkhorn's iteration.

φ is the cost, θ the potential of the rows, the fixed point of a sweep of the iteration, F how far the plan is from one
that has been seen.
"""

import torch
from po_bilevel import FixedPointProblem, solve
from run import Example, beside, learn


def make(rows: int = 8, columns: int = 10) -> Example:
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    row, column = (torch.log_softmax(torch.randn(n, **draw), 0) for n in (rows, columns))

    def other(potential, phi):
        return column - torch.logsumexp(potential[:, None] - phi["cost"], 0)

    def sweep(potential, phi):
        moved = row - torch.logsumexp(other(potential, phi) - phi["cost"], 1)
        # Potentials are known up to a constant, without which the map would not contract.
        return moved - moved.mean()

    def plan(potential, phi):
        return torch.exp(potential[:, None] + other(potential, phi) - phi["cost"])

    problem = FixedPointProblem(sweep)

    def solved(phi):
        with torch.no_grad():
            return solve(problem, torch.zeros(rows, dtype=torch.float64), phi, tolerance=1e-12)

    truth = {"cost": torch.rand(rows, columns, **draw)}
    seen = plan(solved(truth), truth)

    def outer(potential, phi):
        return 100.0 * (plan(potential, phi) - seen).square().sum()

    def gradient(potential, phi):
        best = solve(problem, potential, phi, tolerance=1e-11)
        return {"cost": torch.autograd.grad(outer(best, phi), phi["cost"])[0]}

    start = {"cost": torch.full((rows, columns), 0.5, dtype=torch.float64, requires_grad=True)}
    return Example(start, solved, outer, gradient, {})


def main(steps: int = 100, **sizes: int) -> list[float]:
    example = make(**sizes)
    beside(example)
    return learn(example, steps, 0.02)


if __name__ == "__main__":
    main()
