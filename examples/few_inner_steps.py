"""The setting of hypertorch's notebook on logistic regression, where a validation loss
goes from .5744 to .2805: what 100 inner steps from scratch have to do with it.

    python examples/few_inner_steps.py
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _gallery import main
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx import plot


class Penalties(blx.AbstractBilevelProblem):
    train: tuple[Array, Array]
    validation: tuple[Array, Array]

    def inner(self, x, y):
        return loss(y, *self.train) + 0.5 * jnp.sum(x * y**2)

    def outer(self, x, y):
        return loss(y, *self.validation)

    def project_x(self, x):
        return jnp.maximum(x, 1e-8)


def loss(y, features, signs):
    return jnp.mean(jax.nn.softplus(-signs * (features @ y)))


def two_halves():
    """1,000 samples of 20 features, from the notebook's seed."""
    rng = np.random.RandomState(1)
    weights, features = rng.randn(20), rng.randn(1000, 20)
    signs = np.sign(features @ weights + 0.1 * rng.randn(1000))
    order = rng.permutation(1000)
    validation, train = (
        (jnp.asarray(features[i], "float32"), jnp.asarray(signs[i], "float32"))
        for i in (order[:500], order[500:])
    )
    return Penalties(train, validation)


def tuned(problem, inner_steps, outer_steps):
    training = blx.Unrolled(optax.sgd(0.1), inner_steps)
    return blx.solve(
        problem,
        blx.ColdStart(),
        jnp.ones(20),
        jnp.zeros(20),
        pipeline=blx.GradientPipeline(training, optax.sgd(1.0, momentum=0.9)),
        num_steps=outer_steps,
        certify=False,
    )


def run(quick):
    problem = two_halves()
    results = {}
    for inner_steps in (100, 300) if quick else (100, 300, 1000):
        solution = tuned(problem, inner_steps, 100 if quick else 1000)
        name = f"{inner_steps} steps"
        results[f"{name}, history"] = np.asarray(solution.history["value"])
        results[f"{name}, at the start"] = solution.history["value"][0]
        results[f"{name}, at the end"] = solution.value
        # At the same penalties.
        gap = blx.retrain_gap(problem, solution)
        results[f"{name}, trained to convergence"] = gap.retrained[0]
    return results


def check(results):
    assert abs(results["100 steps, at the start"] - 0.5744) < 0.002
    assert abs(results["100 steps, at the end"] - 0.2805) < 0.002
    for name in ("100 steps", "300 steps"):
        end = results[f"{name}, at the end"]
        assert results[f"{name}, trained to convergence"] < 0.5 * end
    assert results["300 steps, at the end"] < 0.7 * results["100 steps, at the end"]


def draw(results):
    picture, ax = plt.subplots(figsize=(4.2, 2.6), layout="constrained")
    for name, colour in zip(("100", "300", "1000"), plot.CLASS_COLOURS):
        name = f"{name} steps"
        if f"{name}, history" not in results:
            continue
        ax.plot(results[f"{name}, history"], color=colour, label=name)
        converged = results[f"{name}, trained to convergence"]
        ax.plot(
            len(results[f"{name}, history"]),
            converged,
            "o",
            color=colour,
            ms=4,
            clip_on=False,
        )
    for value in (0.5744, 0.2805):
        ax.axhline(value, color="0.5", lw=0.8, ls="--")
    ax.set(xscale="symlog", xlim=(0, None), ylim=(0, None))
    ax.set(xlabel="outer step", ylabel="validation loss")
    ax.legend(title="inner training")
    return picture


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
