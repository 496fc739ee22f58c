"""Learning to reweight, as in Betty: a network that gives each row a weight from its loss (Shu et al. 2019).

φ is the network, θ a linear classifier of rows of which one class is rare, F its loss on balanced rows. The inner steps
follow Σ w(ℓ_i) ∇ℓ_i, with the weight a number, which is no gradient of a loss: θ* is the root of an equation. Betty
differentiates Σ w(ℓ_i.detach()) ℓ_i, whose second derivative lacks what the weights change by with θ, and so differs.
"""

import types

import torch
from po_bilevel import ImplicitCG, RootProblem
from run import Example, beside, learn
from torch.func import functional_call, jacrev
from torch.nn.functional import binary_cross_entropy_with_logits


def make(rows: int = 300, features: int = 8, rare: int = 20, hidden: int = 16) -> Example:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(1, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)).double()

    def data(positive, negative):
        labels = torch.cat([torch.ones(positive), torch.zeros(negative)]).double()
        x = torch.randn(len(labels), features).double() + 0.7 * (2 * labels[:, None] - 1) / features**0.5
        return torch.cat([x, torch.ones(len(labels), 1).double()], dim=1), labels

    (inputs, labels), (other, other_labels) = data(rare, rows - rare), data(100, 100)

    def losses(theta):
        return binary_cross_entropy_with_logits(inputs @ theta, labels, reduction="none")

    def weights(each, phi):
        return torch.sigmoid(functional_call(network, phi, (each[:, None],)))[:, 0]

    def equation(theta, phi):
        slopes = (torch.sigmoid(inputs @ theta) - labels)[:, None] * inputs
        return (weights(losses(theta), phi)[:, None] * slopes).mean(0) + 0.02 * theta

    def outer(theta, phi):
        return binary_cross_entropy_with_logits(other @ theta, other_labels)

    def solved(phi):
        theta, fixed = torch.zeros(features + 1).double(), {key: p.detach() for key, p in phi.items()}
        for _ in range(20):
            theta = theta - torch.linalg.solve(jacrev(equation)(theta, fixed), equation(theta, fixed))
        return theta.requires_grad_()

    def gradient(theta, phi):
        return ImplicitCG(tolerance=1e-10)(RootProblem(equation, symmetric=True), outer, theta, phi).gradient

    def betty(theta, phi):
        from betty.hypergradient.cg import cg

        def step(batch):
            each = losses(theta)
            return (weights(each.detach(), phi) * each).mean() + 0.01 * theta.square().sum()

        config = types.SimpleNamespace(cg_iterations=features + 1, cg_alpha=1.0)
        level = {"paths": (), "config": config, "training_step_exec": step, "cur_batch": None}
        parameters = {"trainable_parameters": lambda: [theta], "parameters": lambda: [theta]}
        lower = types.SimpleNamespace(**level, **parameters)
        upper = types.SimpleNamespace(trainable_parameters=lambda: list(phi.values()))
        return cg(torch.autograd.grad(outer(theta, phi), theta), lower, upper)

    start = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    return Example(start, solved, outer, gradient, {"betty": betty})


def main(steps: int = 50, **sizes: int) -> list[float]:
    example = make(**sizes)
    beside(example)
    return learn(example, steps, 0.05)


if __name__ == "__main__":
    main()
