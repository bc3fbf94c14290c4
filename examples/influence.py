"""Influence functions against leaving samples out.

    python examples/influence.py

How much would the loss on new data change without sample i? A weight on each sample makes
that a derivative of the best response; retraining without the sample is the truth.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _gallery import main
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx import plot


class Weighted(blx.AbstractBilevelProblem):
    train: tuple[Array, Array]
    test: tuple[Array, Array]

    def inner(self, x, y):
        return jnp.mean(x * losses(y, *self.train)) + 0.005 * jnp.sum(y**2)

    def outer(self, x, y):
        return jnp.mean(losses(y, *self.test))


def losses(y, features, signs):
    return jax.nn.softplus(-signs * (features @ y))


def breast_cancer(num_wrong):
    """200 samples, of which the first few have a wrong label, and 369 to test on."""
    from sklearn.datasets import load_breast_cancer

    features, labels = map(np.asarray, load_breast_cancer(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(labels))
    features, signs = features[order], 2.0 * labels[order] - 1
    signs[:num_wrong] *= -1
    features = (features - features[:200].mean(axis=0)) / features[:200].std(axis=0)
    features = np.column_stack([features, np.ones(len(signs))])
    sets = zip(np.split(features, (200,)), np.split(signs, (200,)))
    return [(jnp.asarray(u, "float32"), jnp.asarray(s, "float32")) for u, s in sets]


def run(quick):
    num_wrong = 10
    problem = Weighted(*breast_cancer(num_wrong))
    everyone, y0 = jnp.ones(200), jnp.zeros(31)
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    out = blx.hypergradient(problem, everyone, y0, response)
    # To first order, the change of the loss if a weight goes from one to zero.
    influence = -out.gradient

    def without(i):
        x = everyone.at[i].set(0.0)
        return problem.outer(x, blx.best_response(problem, x, out.y, response))

    left_out = jnp.arange(0, 200, 5 if quick else 1)
    truth = jax.lax.map(without, left_out) - out.value
    predicted = influence[left_out]
    error = jnp.linalg.norm(predicted - truth) / jnp.linalg.norm(truth)
    worst = jnp.argsort(influence)[:num_wrong]
    return {
        "predicted": np.asarray(predicted),
        "truth": np.asarray(truth),
        "wrong": np.asarray(left_out < num_wrong),
        "test loss": out.value,
        "correlation with the truth": jnp.corrcoef(predicted, truth)[0, 1],
        "slope of the truth": jnp.vdot(predicted, truth) / jnp.vdot(predicted, predicted),
        "relative error": error,
        "wrong labels among the ten most harmful": jnp.sum(worst < num_wrong),
    }


def check(results):
    assert results["correlation with the truth"] > 0.9
    assert results["relative error"] < 0.5
    assert results["wrong labels among the ten most harmful"] >= 7


def draw(results):
    picture, ax = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
    predicted, truth, wrong = (results[name] for name in ("predicted", "truth", "wrong"))
    for which, name, i in ((~wrong, "right label", 2), (wrong, "wrong label", 0)):
        colour = plot.CLASS_COLOURS[i]
        ax.plot(predicted[which], truth[which], "o", color=colour, ms=3, label=name)
    ends = np.array([predicted.min(), predicted.max()])
    ax.plot(ends, ends, color="0.5", lw=0.8, zorder=0)
    ax.set(xlabel="influence function", ylabel="change of the test loss")
    ax.locator_params(axis="x", nbins=5)
    ax.legend()
    return picture


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
