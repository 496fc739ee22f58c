"""The Figure 3 run as a user of JAX writes it: an outer step is one compiled function, the inner ones a `lax.scan`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg

from benchmarks.peers import HALF_LOG_2PI

Theta = tuple[list[tuple[jax.Array, jax.Array]], jax.Array]


def figure_3(
    layers: Sequence[tuple[Any, Any]],
    log_std: Any,
    inner: tuple[Any, Any],
    outer: tuple[Any, Any],
    *,
    group: int,
    entropy_coef: float,
    inner_steps: int,
    learning_rate: float,
    outer_learning_rate: float,
    decay: float,
    damping: float,
) -> tuple[Callable[[], None], Callable[[], float]]:
    """Figure 3 from u = 1.

    Args:
        layers: weight (out, in) and bias (out,) of each layer of the tanh network, as arrays of numpy.
        log_std: (D,).
        inner, outer: inputs (B, D) and targets (R, B, D) of each loss.
        group: G, samples of a row for the score function; 0 for the expectation in closed form.
        decay: Adam's weight decay, which is added to the gradient.
        damping: added to the Hessian in the linear solve, besides decay.

    Returns:
        one outer step, whose first call compiles; and u.
    """
    start: Theta = ([(jnp.asarray(w), jnp.asarray(b)) for w, b in layers], jnp.asarray(log_std))
    (inner_inputs, inner_target), (outer_inputs, outer_target) = (
        (jnp.asarray(inputs), jnp.asarray(target)) for inputs, target in (inner, outer)
    )
    tree = jax.tree_util.tree_map

    def mean(theta: Theta, x: jax.Array) -> jax.Array:
        *hidden, (weight, bias) = theta[0]
        for w, b in hidden:
            x = jnp.tanh(x @ w.T + b)
        return x @ weight.T + bias

    def objective(theta: Theta, raw: jax.Array, key: jax.Array) -> jax.Array:
        u, mu, log_std = jax.nn.softplus(raw), mean(theta, inner_inputs), theta[1]
        entropy = jnp.sum(log_std + HALF_LOG_2PI + 0.5)
        if not group:
            distance = jnp.square(mu - inner_target).sum(-1) + jnp.exp(2.0 * log_std).sum()
            return (u * distance).mean() - entropy_coef * entropy
        noise = jax.random.normal(key, (group, *inner_target.shape))
        samples = lax.stop_gradient(mu + jnp.exp(log_std) * noise)
        rewards = -u * jnp.square(samples - inner_target).sum(-1)
        log_prob = (-0.5 * jnp.square((samples - mu) * jnp.exp(-log_std)) - log_std - HALF_LOG_2PI).sum(-1)
        advantages = (rewards - rewards.mean(0)) * (group / (group - 1))
        weights = jnp.exp(log_prob - lax.stop_gradient(log_prob))
        return -(rewards + (weights - 1) * advantages).mean() - entropy_coef * entropy

    def likelihood(theta: Theta) -> jax.Array:
        log_std = theta[1]
        z = (outer_target - mean(theta, outer_inputs)) * jnp.exp(-log_std)
        return (0.5 * jnp.square(z) + log_std + HALF_LOG_2PI).sum(-1).mean()

    def adam(gradient: Any, state: Any, rate: jax.Array | float, betas: tuple[float, float]) -> tuple[Any, Any]:
        first, second, count = state
        count = count + 1
        first = tree(lambda m, g: betas[0] * m + (1 - betas[0]) * g, first, gradient)
        second = tree(lambda v, g: betas[1] * v + (1 - betas[1]) * g * g, second, gradient)
        corrections = [1 - beta**count for beta in betas]
        update = tree(lambda m, v: -rate * m / corrections[0] / (jnp.sqrt(v / corrections[1]) + 1e-8), first, second)
        return update, (first, second, count)

    def fresh(parameters: Any) -> Any:
        zeros = tree(jnp.zeros_like, parameters)
        return zeros, zeros, jnp.zeros(())

    def inner_step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        theta, state, raw, key = carry
        key, draw = jax.random.split(key)
        gradient = tree(lambda g, t: g + decay * t, jax.grad(objective)(theta, raw, draw), theta)
        update, state = adam(gradient, state, learning_rate * (1.0 - 0.9 * index / inner_steps), (0.9, 0.999))
        return (tree(jnp.add, theta, update), state, raw, key), None

    def hypergradient(theta: Theta, raw: jax.Array, key: jax.Array) -> jax.Array:
        inner_gradient = jax.grad(objective)

        def product(v: Theta) -> Theta:
            _, along = jax.jvp(lambda t: inner_gradient(t, raw, key), (theta,), (v,))
            return tree(lambda h, x: h + (decay + damping) * x, along, v)

        solved, _ = cg(product, jax.grad(likelihood)(theta), tol=1e-2, maxiter=20)
        _, pull = jax.vjp(lambda r: inner_gradient(theta, r, key), raw)
        return -pull(solved)[0]

    @jax.jit
    def outer_step(theta: Theta, state: Any, raw: jax.Array, outer_state: Any, key: jax.Array) -> Any:
        (theta, state, _, key), _ = lax.scan(inner_step, (theta, state, raw, key), jnp.arange(inner_steps))
        key, draw = jax.random.split(key)
        gradient = hypergradient(theta, raw, draw)
        gradient = gradient * jnp.minimum(1.0, 1.0 / (jnp.abs(gradient) + 1e-6))
        update, outer_state = adam(gradient, outer_state, outer_learning_rate, (0.5, 0.9))
        return theta, state, raw + update, outer_state, key

    raw = jnp.log(jnp.expm1(jnp.ones(())))
    held = [(start, fresh(start), raw, fresh(raw), jax.random.key(0))]

    def step() -> None:
        held[0] = jax.block_until_ready(outer_step(*held[0]))

    return step, lambda: float(jax.nn.softplus(held[0][2]))
