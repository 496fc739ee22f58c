"""Implicit logistic regression, as in TorchOpt: a penalty for each feature, of which most tell nothing.

φ are the logarithms of the penalties, θ the logistic regression, F its loss on other rows. The solution is an operation
of autograd, so that the outer loss is any torch code.
"""

import torch
from po_bilevel import ImplicitCG, solve
from run import Example, beside, learn, minimum
from torch.nn.functional import binary_cross_entropy_with_logits


def make(rows: int = 100, features: int = 30, informative: int = 5) -> Example:
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    truth = torch.cat([2.0 * torch.randn(informative, **draw), torch.zeros(features - informative).double()])

    def data():
        x = torch.randn(rows, features, **draw)
        return x, (torch.sigmoid(x @ truth) > torch.rand(rows, **draw)).double()

    (train, labels), (other, other_labels) = data(), data()

    def inner(theta, phi):
        penalty = 0.5 * (phi["log_penalty"].exp() * theta.square()).sum()
        return binary_cross_entropy_with_logits(train @ theta, labels) + penalty

    def outer(theta, phi):
        return binary_cross_entropy_with_logits(other @ theta, other_labels)

    def solved(phi):
        fixed = {"log_penalty": phi["log_penalty"].detach()}
        return minimum(lambda theta: inner(theta, fixed), torch.zeros(features, dtype=torch.float64))

    def gradient(theta, phi):
        best = solve(inner, theta, phi, method=ImplicitCG(tolerance=1e-10))
        return {"log_penalty": torch.autograd.grad(outer(best, phi), phi["log_penalty"])[0]}

    def torchopt(theta, phi):
        from torchopt.diff.implicit import custom_root
        from torchopt.linear_solve import solve_cg

        slope = torch.func.grad(lambda theta, log_penalty: inner(theta, {"log_penalty": log_penalty}), argnums=0)

        @custom_root(slope, argnums=1, solve=solve_cg(rtol=1e-10, atol=0.0))
        def given(theta, log_penalty):
            return theta

        best = given(theta.detach(), phi["log_penalty"])
        return list(torch.autograd.grad(outer(best, phi), phi["log_penalty"]))

    start = {"log_penalty": torch.full((features,), -2.0, dtype=torch.float64, requires_grad=True)}
    return Example(start, solved, outer, gradient, {"torchopt": torchopt}, {"informative": informative})


def main(steps: int = 40, **sizes: int) -> list[float]:
    example = make(**sizes)
    beside(example)
    values = learn(example, steps, 0.2)
    learned, k = example.phi["log_penalty"].detach(), example.more["informative"]
    print(f"mean log penalty of informative features {learned[:k].mean():.1f}, of the others {learned[k:].mean():.1f}")
    return values


if __name__ == "__main__":
    main()
