"""Hyper-cleaning: half of the labels are wrong, and each sample gets a weight, by
mini-batches.

    python examples/hyper_cleaning.py
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _gallery import digits, main
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx import plot
from bilevel_eqx.pipelines import SAGA, SingleLoop


class Cleaning(blx.AbstractFiniteSumProblem):
    inner_data: tuple[Array, ...]  # images, labels, and the number of each
    outer_data: tuple[Array, ...]

    def inner_losses(self, x, y, batch, key):
        images, labels, number = batch
        return jax.nn.sigmoid(x[number]) * losses(y, images, labels)

    def outer_losses(self, x, y, batch, key):
        return losses(y, *batch)

    def inner_penalty(self, x, y):
        return 0.001 * jnp.sum(y**2)

    def project_x(self, x):
        return jnp.clip(x, -5.0, 5.0)  # weights from .007 to .993


def losses(y, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(images @ y, labels)


def accuracy(y, images, labels):
    return jnp.mean(jnp.argmax(images @ y, axis=1) == labels)


def half_wrong(seed):
    """1,000 images of which half get another label, 100 clean ones, and 697 to test."""
    (images, labels), clean, test = digits(seed, 1000, 1100)
    wrong = np.arange(1000) % 2 == 0
    labels = (labels + wrong * np.random.default_rng(seed).integers(1, 10, 1000)) % 10
    return [tuple(map(jnp.asarray, d)) for d in ((images, labels), clean, test)], wrong


def cleaned(problem, num_steps):
    loop = SingleLoop(
        optax.sgd(0.3),  # of y
        optax.sgd(0.3),  # of the adjoint
        optax.sgd(30.0),  # of x, of which each entry is in one loss of 1,000
        inner_batch=100,
        outer_batch=100,
        estimator=SAGA(),
    )
    x0, y0 = jnp.zeros(1000), jnp.zeros((64, 10))
    return blx.solve(
        problem, blx.Stackelberg(), x0, y0, pipeline=loop, num_steps=num_steps
    )


def trained(problem, x):
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    return blx.best_response(problem, x, jnp.zeros((64, 10)), response)


def run(quick):
    (train, clean, test), wrong = half_wrong(seed=0)
    problem = Cleaning((*train, jnp.arange(1000)), clean)
    solution = cleaned(problem, 1000 if quick else 20_000)
    x = np.asarray(solution.x)
    results = {
        "weights": np.asarray(jax.nn.sigmoid(x)),
        "wrong": wrong,
        "wrong labels with a weight below 1/2": np.mean(x[wrong] < 0),
        "right labels with a weight above 1/2": np.mean(x[~wrong] > 0),
        "test accuracy, learned weights": accuracy(solution.y, *test),
    }
    # The same model with weights that are given.
    few = Cleaning((*clean, jnp.arange(100)), clean)
    for name, case, x in (
        ("equal weights", problem, jnp.full(1000, 5.0)),
        ("the right labels alone", problem, jnp.where(wrong, -5.0, 5.0)),
        ("the clean images alone", few, jnp.full(100, 5.0)),
    ):
        if name == "equal weights" or not quick:
            results[f"test accuracy, {name}"] = accuracy(trained(case, x), *test)
    residuals = solution.certificate.residuals
    return results | {f"residual, {name}": residuals[name] for name in residuals}


def check(results):
    assert results["wrong labels with a weight below 1/2"] > 0.85
    assert results["right labels with a weight above 1/2"] > 0.85
    equal = results["test accuracy, equal weights"]
    assert results["test accuracy, learned weights"] > equal + 0.04


def draw(results):
    picture, ax = plt.subplots(figsize=(4.2, 2.5), layout="constrained")
    bins, wrong = list(np.linspace(0, 1, 21)), results["wrong"]
    for which, name, i in ((wrong, "wrong label", 0), (~wrong, "right label", 1)):
        colour = plot.CLASS_COLOURS[i]
        ax.hist(results["weights"][which], bins, color=colour, alpha=0.6, label=name)
    ax.set(xlabel="learned weight", ylabel="images")
    ax.legend(loc="upper center")
    return picture


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
