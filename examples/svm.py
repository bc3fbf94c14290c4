"""A support vector machine in its dual form: the box and the width of the kernel are
tuned by their hypergradients.

    python examples/svm.py
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _gallery import main
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx import plot


class SVM(blx.AbstractBilevelProblem):
    """The dual, with multipliers C y for y between zero and one. x has the logarithms of
    C and of the inverse squared width of the kernel."""

    train: tuple[Array, Array]
    validation: tuple[Array, Array]

    def inner(self, x, y):
        _, signs = self.train
        a = jnp.exp(x["C"]) * y * signs
        return (0.5 * a @ self.margins(x, y, *self.train) - a @ signs) / len(y)

    def margins(self, x, y, features, signs):
        points, labels = self.train
        squares = jnp.sum((features[:, None] - points) ** 2, axis=-1)
        kernel = jnp.exp(-jnp.exp(x["gamma"]) * squares) + 1.0  # with an intercept
        return kernel @ (jnp.exp(x["C"]) * y * labels)

    def outer(self, x, y):
        margins = self.margins(x, y, *self.validation)
        return jnp.mean(jax.nn.softplus(-2.0 * self.validation[1] * margins))

    def project_y(self, y):
        return jnp.clip(y, 0.0, 1.0)


def breast_cancer():
    """100 samples to train on, 200 to validate, and 269 to test."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import scale

    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    features, signs = scale(features)[order], 2.0 * labels[order] - 1
    sets = zip(np.split(features, (100, 300)), np.split(signs, (100, 300)))
    return [(jnp.asarray(u, "float32"), jnp.asarray(s, "float32")) for u, s in sets]


def run(quick):
    train, validation, test = breast_cancer()
    problem = SVM(train, validation)
    x0, y0 = {"C": jnp.array(0.0), "gamma": jnp.array(-3.0)}, jnp.zeros(100)
    solution = blx.solve(problem, blx.Stackelberg(), x0, y0, num_steps=5 if quick else 20)
    x, y = solution.x, solution.y
    return {
        "history": np.asarray(solution.history["value"]),
        "margins": np.asarray(train[1] * problem.margins(x, y, *train)),
        "y": np.asarray(y),
        "log C": x["C"],
        "log gamma": x["gamma"],
        "support vectors, of 100": jnp.sum(y > 0),
        "of which at the bound": jnp.sum(y == 1),
        "validation loss at the start": solution.history["value"][0],
        "validation loss": solution.value,
        "test accuracy": jnp.mean(test[1] * problem.margins(x, y, *test) > 0),
        "outer residual": solution.certificate.residuals["outer"],
    }


def check(results):
    assert results["validation loss"] < 0.8 * results["validation loss at the start"]
    assert results["test accuracy"] > 0.95
    # The conditions of a soft margin.
    y, margins = results["y"], results["margins"]
    assert np.all(margins[y == 0] > 0.98) and np.all(margins[y == 1] < 1.02)
    assert np.all(abs(margins[(0 < y) & (y < 1)] - 1) < 0.02)


def draw(results):
    picture, ax = plt.subplots(figsize=(4.2, 2.5), layout="constrained")
    ax.axvline(1.0, color="0.5", lw=0.8)
    ax.plot(results["margins"], results["y"], "o", color=plot.CLASS_COLOURS[2], ms=3)
    ax.set(xlabel="margin of a training sample", ylabel="multiplier, over $C$")
    return picture


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
