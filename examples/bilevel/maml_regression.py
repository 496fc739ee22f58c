"""MAML on sinusoids, as in TorchOpt: an initial network from which one task is a few steps away (Finn et al. 2017).

φ is θ_0 and the logarithm of the inner learning rate, θ_T is θ_0 after some steps of SGD on a few points of each of
several tasks, F the loss on other points. The networks of the tasks are one stack, so that a step is one call.
"""

import math

import torch
from po_bilevel import Unrolled
from run import Example, beside, learn


def make(tasks: int = 5, points: int = 10, hidden: int = 20, steps: int = 5) -> Example:
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1, **draw), math.pi * torch.rand(tasks, 1, 1, **draw)

    def data():
        x = 10.0 * torch.rand(tasks, points, 1, **draw) - 5.0
        return x, amplitude * torch.sin(x + phase)

    train, other = data(), data()

    def errors(theta, data):
        x, y = data
        for layer in range(3):
            x = x @ theta[f"w{layer}"] + theta[f"b{layer}"]
            x = torch.tanh(x) if layer < 2 else x
        return (x - y).square().mean(dim=(1, 2))

    def inner(theta, phi):
        # The sum: each task has a network and a gradient of its own.
        return errors(theta, train).sum()

    def outer(theta, phi):
        return errors(theta, other).mean()

    def initial(phi):
        return {key: p.expand(tasks, *p.shape[1:]) for key, p in phi.items() if key != "log_rate"}

    def optimizer(parameters, phi):
        return torch.optim.SGD(parameters, lr=phi["log_rate"].exp())

    method = Unrolled(steps, optimizer=optimizer, initial=initial)

    def solved(phi):
        start = {key: t.detach().requires_grad_() for key, t in initial(phi).items()}
        return method(inner, outer, start, phi).theta

    def gradient(theta, phi):
        return method(inner, outer, {key: t.detach().requires_grad_() for key, t in theta.items()}, phi).gradient

    def torchopt(theta, phi):
        import torchopt

        moved, sgd = initial(phi), torchopt.sgd(lr=phi["log_rate"].exp())
        state = sgd.init(moved)
        for _ in range(steps):
            slopes = torch.autograd.grad(inner(moved, phi), tuple(moved.values()), create_graph=True)
            updates, state = sgd.update(dict(zip(moved, slopes, strict=True)), state, inplace=False)
            moved = torchopt.apply_updates(moved, updates, inplace=False)
        return list(torch.autograd.grad(outer(moved, phi), tuple(phi.values())))

    start = {"log_rate": torch.tensor(-3.0, dtype=torch.float64)}
    for layer, (before, after) in enumerate(((1, hidden), (hidden, hidden), (hidden, 1))):
        start[f"w{layer}"] = torch.randn(1, before, after, **draw) / before**0.5
        start[f"b{layer}"] = torch.zeros(1, 1, after, dtype=torch.float64)
    return Example({k: p.requires_grad_() for k, p in start.items()}, solved, outer, gradient, {"torchopt": torchopt})


def main(steps: int = 100, **sizes: int) -> list[float]:
    example = make(**sizes)
    beside(example)
    return learn(example, steps, 0.01)


if __name__ == "__main__":
    main()
