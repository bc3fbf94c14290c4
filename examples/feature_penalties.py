"""A penalty for each feature of a logistic regression, tuned on held-out data: on
scikit-learn's breast cancer data, beside one penalty that is found on a grid.

    python examples/feature_penalties.py
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _gallery import main
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx import plot


class Penalties(blx.AbstractBilevelProblem):
    train: tuple[Array, Array]
    validation: tuple[Array, Array]

    def inner(self, x, y):
        return loss(y, *self.train) + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    def outer(self, x, y):
        return loss(y, *self.validation)

    def project_x(self, x):
        return jnp.clip(x, -7.0, 2.0)


def loss(y, features, signs):
    return jnp.mean(jax.nn.softplus(-signs * (features @ y)))


def breast_cancer(seed):
    """Three sets of about 190 samples, with 30 features and a column of ones."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    features, signs = features[order], 2.0 * labels[order] - 1
    features = (features - features[:190].mean(axis=0)) / features[:190].std(axis=0)
    features = np.concatenate([features, np.ones((len(signs), 1))], axis=1)
    sets = zip(np.split(features, (190, 380)), np.split(signs, (190, 380)))
    return [(jnp.asarray(u, "float32"), jnp.asarray(s, "float32")) for u, s in sets]


def tuned(seed, num_steps):
    train, validation, test = breast_cancer(seed)
    problem = Penalties(train, validation)
    x0, y0 = jnp.full(31, -3.0), jnp.zeros(31)
    solution = blx.solve(problem, blx.Stackelberg(), x0, y0, num_steps=num_steps)

    # One penalty for all, by a grid.
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    grid = jnp.full((19, 31), jnp.linspace(-7.0, 2.0, 19)[:, None])
    ys = jax.vmap(lambda x: blx.best_response(problem, x, y0, response))(grid)
    best = ys[jnp.argmin(jax.vmap(problem.outer)(grid, ys))]
    losses = [[loss(y, *data) for data in (validation, test)] for y in (best, solution.y)]
    return np.array(losses), solution.certificate.residuals["outer"], solution.x


def run(quick):
    num_splits, num_steps = (2, 30) if quick else (20, 200)
    tables, residuals, x = zip(*(tuned(seed, num_steps) for seed in range(num_splits)))
    tables = np.array(tables)
    grid, each = tables.mean(axis=0)
    difference = tables[:, 1, 1] - tables[:, 0, 1]
    return {
        "tables": tables,
        "x": np.array(x),
        "validation loss, one penalty": grid[0],
        "validation loss, one for each feature": each[0],
        "test loss, one penalty": grid[1],
        "test loss, one for each feature": each[1],
        "the difference, and": difference.mean(),
        "its standard error": difference.std(ddof=1) / np.sqrt(num_splits),
        "outer residual, median": np.median(residuals),
    }


def check(results):
    grid = results["validation loss, one penalty"]
    assert results["validation loss, one for each feature"] < 0.75 * grid
    assert results["outer residual, median"] < 0.02
    # No better on new data: 31 penalties fit 190 validation samples.
    assert results["the difference, and"] > -0.02


def draw(results):
    picture, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    blue, red = plot.CLASS_COLOURS[2], plot.CLASS_COLOURS[0]
    for column, name, colour in ((0, "validation", blue), (1, "test", red)):
        losses = results["tables"][:, :, column]
        left.plot([0, 1], losses.T, "o-", color=colour, alpha=0.25, ms=3, lw=0.7)
        left.plot([0, 1], losses.mean(axis=0), "o-", color=colour, lw=2, label=name)
    left.set(xticks=[0, 1], xticklabels=["one penalty", "one for each feature"])
    left.set(xlim=(-0.3, 1.3), ylim=(0, None), ylabel="loss")
    left.legend()
    order = np.argsort(results["x"].mean(axis=0))
    right.plot(results["x"][:, order].T, ".", color=blue, alpha=0.25, mew=0)
    right.plot(results["x"].mean(axis=0)[order], "-", color=blue)
    right.set(xlabel="features, in the order of the mean", ylabel="log of the penalty")
    return picture


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
