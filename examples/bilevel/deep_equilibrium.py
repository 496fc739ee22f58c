"""A deep equilibrium network (Bai et al. 2019): a layer that is applied until nothing changes.

φ are the weights, θ the equilibrium of each row, z = tanh(z W + x U + b). The layer is an operation of autograd like
any other: the loss, its gradient and the gradient's gradient go through it, and no iteration is stored.
"""

import torch
from po_bilevel import FixedPointProblem, solve
from run import Example, beside, learn
from torch.nn.functional import cross_entropy


def make(rows: int = 100, inputs: int = 6, width: int = 16, classes: int = 3) -> Example:
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    x = torch.randn(rows, inputs, **draw)
    labels = (x[:, 0] * x[:, 1]).sign().long() + 1

    def layer(z, phi):
        # A spectral norm below one: the layer contracts whatever is learned.
        weight = phi["inner"] / torch.linalg.matrix_norm(phi["inner"], 2).clamp_min(1.0)
        return torch.tanh(0.8 * z @ weight + x @ phi["inputs"] + phi["bias"])

    problem = FixedPointProblem(layer)

    def outer(z, phi):
        return cross_entropy(z @ phi["outputs"], labels) + 1e-3 * phi["outputs"].square().sum()

    def equilibrium(phi, start):
        used = {key: phi[key] for key in ("inner", "inputs", "bias")}
        return solve(problem, start, used, tolerance=1e-11)

    def solved(phi):
        with torch.no_grad():
            return equilibrium(phi, torch.zeros(rows, width, dtype=torch.float64))

    def gradient(z, phi):
        loss = outer(equilibrium(phi, z), phi)
        return dict(zip(phi, torch.autograd.grad(loss, tuple(phi.values())), strict=True))

    start = {
        "inner": torch.randn(width, width, **draw) / width**0.5,
        "inputs": torch.randn(inputs, width, **draw) / inputs**0.5,
        "bias": torch.zeros(width, dtype=torch.float64), "outputs": torch.zeros(width, classes, dtype=torch.float64),
    }  # fmt: skip
    return Example({key: p.requires_grad_() for key, p in start.items()}, solved, outer, gradient, {})


def main(steps: int = 100, **sizes: int) -> list[float]:
    example = make(**sizes)
    beside(example)
    return learn(example, steps, 0.02)


if __name__ == "__main__":
    main()
