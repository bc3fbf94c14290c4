"""The weight of a lasso, tuned by its hypergradient: the kinks of the L1 norm are stated
as constraints.

    python examples/lasso.py
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _gallery import main
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx import plot


class Lasso(blx.AbstractBilevelProblem):
    """w = u - v with u, v >= 0, whose L1 norm is the sum of u and v. x is the logarithm
    of its weight."""

    train: tuple[Array, Array]
    validation: tuple[Array, Array]

    def inner(self, x, y):
        u, v = y
        return squared(u - v, *self.train) + jnp.exp(x) * jnp.sum(u + v)

    def outer(self, x, y):
        u, v = y
        return squared(u - v, *self.validation)

    def project_y(self, y):
        return jax.tree.map(lambda u: jnp.maximum(u, 0.0), y)


def squared(w, features, targets):
    return jnp.mean((features @ w - targets) ** 2)


def diabetes(seed=0):
    """150, 150 and 142 patients: ten features, their squares and products."""
    from sklearn.datasets import load_diabetes
    from sklearn.preprocessing import PolynomialFeatures, scale

    features, targets = load_diabetes(return_X_y=True)
    features = scale(
        PolynomialFeatures(2, include_bias=False).fit_transform(scale(features))
    )
    order = np.random.default_rng(seed).permutation(len(targets))
    features, targets = features[order], scale(targets)[order]
    sets = zip(np.split(features, (150, 300)), np.split(targets, (150, 300)))
    return [(jnp.asarray(u, "float32"), jnp.asarray(t, "float32")) for u, t in sets]


def scikit_learn(x, features, targets):
    from sklearn.linear_model import Lasso

    model = Lasso(0.5 * np.exp(float(x)), fit_intercept=False, max_iter=100_000)
    w = jnp.asarray(model.fit(features, targets).coef_)
    return jnp.maximum(w, 0.0), jnp.maximum(-w, 0.0)


def run(quick):
    train, validation, test = diabetes()
    problem = Lasso(train, validation)
    x0, y0 = jnp.array(-3.0), (jnp.zeros(65), jnp.zeros(65))
    solution = blx.solve(problem, blx.Stackelberg(), x0, y0, num_steps=5 if quick else 20)
    x, (u, v) = solution.x, solution.y
    theirs = scikit_learn(x, *train)
    grid = np.linspace(-6.0, 1.0, 71)
    losses = [problem.outer(x, scikit_learn(x, *train)) for x in grid]
    return {
        "w": np.asarray(u - v),
        "grid": grid,
        "losses": np.array(losses),
        "log of the weight": x,
        "features with a coefficient, of 65": jnp.sum(u != v),
        "inner objective": problem.inner(x, (u, v)),
        "inner objective of scikit-learn": problem.inner(x, theirs),
        "validation loss": solution.value,
        "validation loss, least on a grid of 71": np.min(losses),
        "test loss": squared(u - v, *test),
        "outer residual": solution.certificate.residuals["outer"],
    }


def check(results):
    ours, theirs = results["inner objective"], results["inner objective of scikit-learn"]
    assert abs(ours - theirs) < 1e-4 * theirs
    least = results["validation loss, least on a grid of 71"]
    assert results["validation loss"] < 1.002 * least
    assert 0 < results["features with a coefficient, of 65"] < 40


def draw(results):
    picture, ax = plt.subplots(figsize=(4.2, 2.5), layout="constrained")
    ax.plot(results["grid"], results["losses"], color="0.5", label="scikit-learn, a grid")
    x, value = results["log of the weight"], results["validation loss"]
    ax.plot(x, value, "o", color=plot.CLASS_COLOURS[0], label="hypergradients")
    ax.set(xlabel="log of the weight of the L1 norm", ylabel="validation loss")
    ax.legend()
    return picture


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
