"""MAML and iMAML on sinusoids, with tasks that were held out. MAML takes five steps from
the weights x on each task; iMAML fits the last layer, with a pull to that of x.

    python examples/meta_learning.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optax
from _gallery import main
from jaxtyping import Array

import bilevel_eqx as blx


class Task(blx.AbstractBilevelProblem):
    """One sinusoid. y is the change of the last layers, from zero and pulled to it."""

    shown: tuple[Array, Array]
    asked: tuple[Array, Array]
    pull: Array

    def inner(self, x, y):
        squares = optax.tree.norm(y, squared=True)
        return error(moved(x, y), *self.shown) + 0.5 * self.pull * squares

    def outer(self, x, y):
        return error(moved(x, y), *self.asked)


def moved(x, y):
    return x[: -len(y)] + jax.tree.map(jnp.add, x[-len(y) :], y)


def network(key):
    W, V, U = jr.normal(key, (3, 40, 40)) / 40**0.5
    return (6 * W[:1], jnp.zeros(40)), (V, jnp.zeros(40)), (U[0], jnp.zeros(()))


def error(weights, u, v):
    (W, b), (V, c), (U, d) = weights
    predicted = jnp.tanh(jnp.tanh(u[:, None] @ W + b) @ V + c) @ U + d
    return jnp.mean((predicted - v) ** 2)


def draw_task(key, pull):
    """Five points are shown, of a sinusoid of any amplitude and phase; 50 are asked."""
    a, b, c = jr.split(key, 3)
    amplitude, phase = jr.uniform(a, (2, 1)) * jnp.array([[4.9], [jnp.pi]])
    u = jr.uniform(b, (5,), minval=-5.0, maxval=5.0), jnp.linspace(-5.0, 5.0, 50)
    shown, asked = ((v, (0.1 + amplitude) * jnp.sin(v - phase)) for v in u)
    return Task(shown, asked, jnp.asarray(pull))


def mean_error(x, key, method, num_tasks):
    response, num_layers, pull = method
    y0 = jax.tree.map(jnp.zeros_like, x[-num_layers:])

    def adapted(task):
        return task.outer(x, blx.best_response(task, x, y0, response))

    tasks = jax.vmap(draw_task, (0, None))(jr.split(key, num_tasks), pull)
    return jnp.mean(jax.vmap(adapted)(tasks))


@eqx.filter_jit
def meta_learn(x, method, keys):
    optimiser = optax.adam(1e-3)

    def step(carry, key):
        x, state = carry
        value, gradient = jax.value_and_grad(mean_error)(x, key, method, 25)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(x, updates), state), value

    (x, _), values = jax.lax.scan(step, (x, optimiser.init(x)), keys)
    return x, values


# The response, how many layers it moves, and the pull.
METHODS = {
    "MAML": (blx.Unrolled(optax.sgd(0.01), 5), 3, 0.0),
    "iMAML": (blx.Implicit(blx.Projection(), lx.Cholesky()), 1, 0.1),
}


def run(quick):
    x0, results, unseen_error = network(jr.key(0)), {}, eqx.filter_jit(mean_error)
    for name, method in METHODS.items():
        x, values = meta_learn(x0, method, jr.split(jr.key(1), 100 if quick else 3000))
        held_out = [unseen_error(w, jr.key(2), method, 200) for w in (x0, x)]
        results[f"{name}, errors"] = np.asarray(values)
        results[f"{name}, held out, at the start"] = held_out[0]
        results[f"{name}, held out, at the end"] = held_out[1]
    return results


def check(results):
    for name in METHODS:
        start = results[f"{name}, held out, at the start"]
        assert results[f"{name}, held out, at the end"] < 0.85 * start


def draw(results):
    picture, ax = plt.subplots(figsize=(4.2, 2.5), layout="constrained")
    for name in METHODS:
        means = [u.mean() for u in np.array_split(results[f"{name}, errors"], 50)]
        ax.plot(np.linspace(0, 1, 50), means, label=name)
    ax.set(xlabel="share of the run", ylabel="error after adaptation", yscale="log")
    ax.legend()
    return picture


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
