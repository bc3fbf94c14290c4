"""A deep equilibrium layer reads digits: its state is a fixed point, for each image.

python examples/deep_equilibrium.py --output outputs
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
from _gallery import main
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import bilevel_eqx as blx
from bilevel_eqx import plot


WIDTH = 32


class Equilibrium(blx.AbstractRootProblem):
    """z = tanh(W z + U u + b) for the state z of each image u, and V z classifies it."""

    images: jax.Array
    labels: jax.Array

    def outer(self, x, z):
        outputs = z @ x["V"].T
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, self.labels)
        decay = sum(jnp.sum(w**2) for w in jax.tree.leaves(x))
        return jnp.mean(losses) + 1e-4 * decay

    def root(self, x, z):
        # A norm of W below one: then there is one fixed point, and iteration finds it.
        W = x["W"] * jnp.minimum(1.0, 0.9 / jnp.linalg.norm(x["W"], 2))
        return z - jnp.tanh(z @ W.T + self.images @ x["U"].T + x["b"])


def initial_weights(key):
    keys = jr.split(key, 3)
    return {
        "W": 0.5 * jr.normal(keys[0], (WIDTH, WIDTH)) / np.sqrt(WIDTH),
        "U": jr.normal(keys[1], (WIDTH, 64)) / 8,
        "b": jnp.zeros(WIDTH),
        "V": jr.normal(keys[2], (10, WIDTH)) / np.sqrt(WIDTH),
    }


def run(quick):
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = jnp.asarray(images[order] / 16 - 0.3, "float32"), labels[order]
    size, num_steps = (300, 60) if quick else (1200, 200)
    problem = Equilibrium(images[:size], jnp.asarray(labels[:size]))
    unseen = Equilibrium(images[1200:], jnp.asarray(labels[1200:]))

    iteration = optx.FixedPointIteration(rtol=1e-4, atol=1e-4)
    layer = blx.Implicit(iteration, blx.Neumann(30, 1.0))
    x0, z0 = initial_weights(jr.key(0)), jnp.zeros((size, WIDTH))
    solution = blx.solve(
        problem,
        blx.Stackelberg(),
        x0,
        z0,
        pipeline=blx.GradientPipeline(layer, optax.adam(1e-2)),
        num_steps=num_steps,
        certify=False,
    )
    z = blx.best_response(unseen, solution.x, jnp.zeros((597, WIDTH)), layer)
    predicted = jnp.argmax(z @ solution.x["V"].T, axis=-1)

    # On fifty images: the same gradient through the fixed point, and through its steps.
    few = Equilibrium(problem.images[:50], problem.labels[:50])

    def gradient(response):
        def function(x):
            start = jnp.zeros((50, WIDTH))
            return blx.hypergradient(few, x, start, response, throw=False).gradient

        program = jax.jit(function).lower(x0).compile()
        memory = getattr(program.memory_analysis(), "temp_size_in_bytes", jnp.nan)
        return ravel_pytree(program(solution.x))[0], memory / 1e6

    exactly = optx.FixedPointIteration(rtol=1e-7, atol=1e-7)
    counts = (1, 20) if quick else (1, 2, 5, 10, 15, 20, 25, 30)
    terms = [gradient(blx.Implicit(exactly, blx.Neumann(k, 1.0))) for k in counts]
    steps, memory_of_steps = gradient(blx.Unrolled(optax.sgd(1.0), 100, mode="reverse"))
    size = jnp.linalg.norm(steps)
    errors = [jnp.linalg.norm(g - steps) / size for g, _ in terms]
    return {
        "loss": solution.value,
        "accuracy, unseen": jnp.mean(predicted == unseen.labels),
        "megabytes, fixed point": terms[-1][1],
        "megabytes, 100 steps": memory_of_steps,
        "error of the gradient, most terms": errors[-1],
        "errors": (counts, errors),
        "losses": solution.history["value"],
    }


def check(results):
    assert results["accuracy, unseen"] > 0.85
    assert results["error of the gradient, most terms"] < 1e-3
    assert results["megabytes, fixed point"] < 0.2 * results["megabytes, 100 steps"]


def draw(results):
    figure, axes = plt.subplots(1, 2, figsize=(6, 2.2), layout="constrained")
    axes[0].plot(results["losses"], color=plot.CLASS_COLOURS[1])
    axes[0].set(xlabel="outer step", ylabel="loss", yscale="log")
    axes[1].plot(*results["errors"], "o-", color=plot.CLASS_COLOURS[2])
    axes[1].set(xlabel="terms", ylabel="error of the gradient", yscale="log")
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
