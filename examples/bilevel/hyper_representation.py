"""Hyper-representation, as in hypertorch: features that several regressions share.

φ is a layer of features, θ the ridge regression on them of each task, F the loss on other rows of the tasks.
"""

import torch
from po_bilevel import ImplicitCG
from run import Example, beside, learn


def make(tasks: int = 8, rows: int = 20, inputs: int = 10, features: int = 6, penalty: float = 0.1) -> Example:
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    truth, heads = torch.randn(inputs, features, **draw), torch.randn(tasks, features, **draw)

    def data():
        x = torch.randn(tasks, rows, inputs, **draw)
        y = torch.einsum("trf,tf->tr", torch.tanh(x @ truth / inputs**0.5), heads)
        return x, y + 0.1 * torch.randn(tasks, rows, **draw)

    (train, train_y), (other, other_y) = data(), data()

    def represented(x, phi):
        return torch.tanh(x @ phi["layer"] + phi["bias"])

    def error(theta, phi, x, y):
        return (torch.einsum("trf,tf->tr", represented(x, phi), theta) - y).square().mean()

    def inner(theta, phi):
        return error(theta, phi, train, train_y) + penalty * theta.square().mean()

    def outer(theta, phi):
        return error(theta, phi, other, other_y)

    def solved(phi):
        f = represented(train, phi).detach()
        ridge = penalty * rows / features * torch.eye(features, dtype=torch.float64)
        head = torch.linalg.solve(f.mT @ f + ridge, (f.mT @ train_y[..., None])[..., 0])
        return head.requires_grad_()

    def gradient(theta, phi):
        return ImplicitCG(tolerance=1e-10)(inner, outer, theta, phi).gradient

    def hypertorch(theta, phi):
        from hypergrad import CG

        def step(params, hparams):
            loss = inner(params[0], dict(zip(phi, hparams, strict=True)))
            return [params[0] - torch.autograd.grad(loss, params[0], create_graph=True)[0]]

        def loss(params, hparams):
            return outer(params[0], dict(zip(phi, hparams, strict=True)))

        return CG([theta], list(phi.values()), 200, step, loss, tol=1e-11, set_grad=False)

    layer = torch.randn(inputs, features, **draw) / inputs**0.5
    start = {"layer": layer.requires_grad_(), "bias": torch.zeros(features, dtype=torch.float64, requires_grad=True)}
    return Example(start, solved, outer, gradient, {"hypertorch": hypertorch})


def main(steps: int = 100, **sizes: int) -> list[float]:
    example = make(**sizes)
    beside(example)
    return learn(example, steps, 0.05)


if __name__ == "__main__":
    main()
