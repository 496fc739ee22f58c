"""Ridge regression, as in jaxopt: its penalty by the loss on other rows.

φ is the logarithm of the penalty, θ the regression by a closed form, or any solver, which no derivative goes through.
"""

import torch
from po_bilevel import ImplicitCG, solve
from run import Example, beside, learn


def make(rows: int = 60, features: int = 30) -> Example:
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    truth = torch.randn(features, **draw)

    def data():
        x = torch.randn(rows, features, **draw)
        return x, x @ truth + 5.0 * torch.randn(rows, **draw)

    (train, target), (other, other_target) = data(), data()

    def inner(theta, phi):
        return 0.5 * (train @ theta - target).square().mean() + 0.5 * phi["log_penalty"].exp() * theta.square().sum()

    def outer(theta, phi):
        return (other @ theta - other_target).square().mean()

    def solved(phi):
        ridge = rows * phi["log_penalty"].detach().exp() * torch.eye(features, dtype=torch.float64)
        return torch.linalg.solve(train.mT @ train + ridge, train.mT @ target)

    def gradient(theta, phi):
        best = solve(inner, theta, phi, method=ImplicitCG(tolerance=1e-10))
        return {"log_penalty": torch.autograd.grad(outer(best, phi), phi["log_penalty"])[0]}

    def jaxopt(theta, phi, compiled={}):  # noqa: B006
        import jax
        import jax.numpy as jnp
        from jaxopt import implicit_diff, linear_solve

        if not compiled:
            jax.config.update("jax_enable_x64", True)
            x, y, other_x, other_y = (jnp.asarray(t.numpy()) for t in (train, target, other, other_target))

            def loss(w, log_penalty):
                return 0.5 * ((x @ w - y) ** 2).mean() + 0.5 * jnp.exp(log_penalty) * (w**2).sum()

            def cg(matvec, b):
                return linear_solve.solve_cg(matvec, b, tol=1e-10)

            given = implicit_diff.custom_root(jax.grad(loss), solve=cg)(lambda w, log_penalty: w)
            compiled["slope"] = jax.jit(jax.grad(lambda a, w: ((other_x @ given(w, a) - other_y) ** 2).mean()))
        return [compiled["slope"](phi["log_penalty"].item(), theta.numpy()).block_until_ready()]

    return Example(
        {"log_penalty": torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)}, solved, outer, gradient,
        {"jaxopt": jaxopt},
    )  # fmt: skip


def main(steps: int = 40, **sizes: int) -> list[float]:
    example = make(**sizes)
    beside(example)
    return learn(example, steps, 0.1)


if __name__ == "__main__":
    main()
