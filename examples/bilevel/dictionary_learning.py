"""Task-driven dictionary learning, as in jaxopt: a dictionary whose sparse codes tell the label (Mairal et al. 2012).

φ is the dictionary and a classifier of codes, θ the codes, which are no minimum of a smooth loss but the fixed point of
a step of the proximal gradient method with an elastic net, F the loss of the classifier.
"""

import torch
from po_bilevel import FixedPointProblem, NormalCG, solve
from run import Example, beside, learn
from torch.nn.functional import binary_cross_entropy_with_logits, softshrink


def make(rows: int = 40, inputs: int = 12, atoms: int = 8, l1: float = 0.1, l2: float = 0.1) -> Example:
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    x = torch.randn(rows, inputs, **draw)
    labels = (x[:, 0] * x[:, 1] + x[:, 2] > 0).double()
    step = 0.1

    def proximal(codes, phi):
        """Of ½‖x - codes D‖² + l1 ‖codes‖₁ + ½ l2 ‖codes‖², row by row."""
        dictionary = phi["dictionary"] / phi["dictionary"].norm(dim=1, keepdim=True)
        moved = codes - step * (codes @ dictionary - x) @ dictionary.mT
        return softshrink(moved, step * l1) / (1 + step * l2)

    problem = FixedPointProblem(proximal)

    def outer(codes, phi):
        penalty = 0.01 * phi["classifier"].square().sum()
        return binary_cross_entropy_with_logits(codes @ phi["classifier"], labels) + penalty

    def solved(phi):
        fixed = {key: p.detach() for key, p in phi.items()}
        return solve(problem, torch.zeros(rows, atoms).double(), fixed, tolerance=1e-12, max_iterations=5000)

    def gradient(codes, phi):
        used = {"dictionary": phi["dictionary"]}
        best = solve(problem, codes, used, solver=lambda codes, phi: codes, method=NormalCG(tolerance=1e-10))
        return dict(zip(phi, torch.autograd.grad(outer(best, phi), tuple(phi.values())), strict=True))

    def jaxopt(codes, phi, compiled={}):  # noqa: B006
        import jax
        import jax.numpy as jnp
        from jaxopt import implicit_diff, linear_solve

        if not compiled:
            jax.config.update("jax_enable_x64", True)
            data, y = jnp.asarray(x.numpy()), jnp.asarray(labels.numpy())

            def prox(codes, d):
                d = d / jnp.linalg.norm(d, axis=1, keepdims=True)
                moved = codes - step * (codes @ d - data) @ d.T
                return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - step * l1, 0) / (1 + step * l2)

            def normal_cg(matvec, b):
                return linear_solve.solve_normal_cg(matvec, b, tol=1e-12, maxiter=1000)

            given = implicit_diff.custom_fixed_point(prox, solve=normal_cg)(lambda codes, d: codes)

            def loss(phi, codes):
                z = given(codes, phi[0]) @ phi[1]
                return (jnp.logaddexp(0, z) - y * z).mean() + 0.01 * (phi[1] ** 2).sum()

            compiled["slope"] = jax.jit(jax.grad(loss))
        slopes = compiled["slope"](tuple(p.detach().numpy() for p in phi.values()), codes.numpy())
        return [s.block_until_ready() for s in slopes]

    start = {"dictionary": torch.randn(atoms, inputs, **draw), "classifier": torch.randn(atoms, **draw)}
    return Example({k: p.requires_grad_() for k, p in start.items()}, solved, outer, gradient, {"jaxopt": jaxopt})


def main(steps: int = 60, **sizes: int) -> list[float]:
    example = make(**sizes)
    beside(example)
    return learn(example, steps, 0.05)


if __name__ == "__main__":
    main()
