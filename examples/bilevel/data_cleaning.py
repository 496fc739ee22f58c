"""Data cleaning, as in hypertorch: a weight for each training row, some of whose labels are wrong.

φ has a number for each row, θ is a linear classifier under the weights σ(φ), F its loss on clean rows.
"""

import torch
from po_bilevel import ImplicitCG
from run import Example, beside, learn, minimum
from torch.nn.functional import cross_entropy


def make(rows: int = 200, features: int = 20, classes: int = 4, wrong: float = 0.4) -> Example:
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    truth = 3.0 * torch.randn(features, classes, **draw)
    inputs, clean = torch.randn(rows, features, **draw), torch.randn(rows, features, **draw)
    labels, clean_labels = ((x @ truth).argmax(1) for x in (inputs, clean))
    spoilt = torch.rand(rows, generator=generator) < wrong
    labels = torch.where(spoilt, torch.randint(classes, (rows,), generator=generator), labels)

    def inner(theta, phi):
        each = cross_entropy(inputs @ theta, labels, reduction="none")
        return (torch.sigmoid(phi["weights"]) * each).mean() + 0.01 * theta.square().sum()

    def outer(theta, phi):
        return cross_entropy(clean @ theta, clean_labels)

    def solved(phi):
        fixed = {"weights": phi["weights"].detach()}
        return minimum(lambda theta: inner(theta, fixed), torch.zeros(features, classes, dtype=torch.float64))

    def gradient(theta, phi):
        return ImplicitCG(tolerance=1e-10)(inner, outer, theta, phi).gradient

    def hypertorch(theta, phi):
        from hypergrad import CG

        def step(params, hparams):
            loss = inner(params[0], {"weights": hparams[0]})
            return [params[0] - torch.autograd.grad(loss, params[0], create_graph=True)[0]]

        def loss(params, hparams):
            return outer(params[0], None) + 0.0 * hparams[0].sum()

        return CG([theta], [phi["weights"]], 200, step, loss, tol=1e-11, set_grad=False)

    start = {"weights": torch.zeros(rows, dtype=torch.float64, requires_grad=True)}
    return Example(start, solved, outer, gradient, {"hypertorch": hypertorch}, {"spoilt": spoilt})


def main(steps: int = 30, **sizes: int) -> list[float]:
    example = make(**sizes)
    beside(example)
    values = learn(example, steps, 0.3)
    weights, spoilt = torch.sigmoid(example.phi["weights"].detach()), example.more["spoilt"]
    print(f"mean weight of right rows {weights[~spoilt].mean():.2f}, of spoilt ones {weights[spoilt].mean():.2f}")
    return values


if __name__ == "__main__":
    main()
