"""How strongly to augment images of digits: learned while a network trains on them.

python examples/learned_augmentation.py
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from _gallery import digits, main
from jaxtyping import Array

import bilevel_eqx as blx


class Augmentation(blx.AbstractFiniteSumProblem):
    inner_data: tuple[Array, ...]  # images, labels, directions of each image
    outer_data: tuple[Array, ...]

    def inner_losses(self, x, y, batch, key):
        images, labels, directions = batch
        if key is not None:
            far, noise = jr.split(key)
            amounts = jnp.exp(x[:-1]) * jr.normal(far, (len(labels), len(x) - 1))
            images = images + jnp.einsum("bk,bkp->bp", amounts, directions)
            images = images + jnp.exp(x[-1]) * jr.normal(noise, images.shape)
        return losses(y, images, labels)

    def outer_losses(self, x, y, batch, key):
        return losses(y, *batch)


def logits(y, images):
    (W, b), (V, c) = y
    return jnp.tanh(images @ W + b) @ V + c


def losses(y, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits(y, images), labels)


def accuracy(y, images, labels):
    return jnp.mean(jnp.argmax(logits(y, images), axis=1) == labels)


def network(key):
    W, V = jr.normal(key, (2, 64, 64)) / 8
    return (W, jnp.zeros(64)), (V[:, :10], jnp.zeros(10))


def directions(images):
    """Derivatives of 8 x 8 images along five kinds of transformations."""
    grids = images.reshape(-1, 8, 8)
    down, across = np.gradient(grids, axis=(1, 2))
    v, u = np.mgrid[:8, :8] - np.float32(3.5)
    moved = (across, down, u * down - v * across, u * across + v * down, grids)
    return np.stack([m.reshape(-1, 64) for m in moved], axis=1)


def task(seed):
    """100 images to train on, 400 to validate, and 1,297 to test."""
    (images, labels), *others = digits(seed, 100, 500)
    data = (images, labels, directions(images)), *others
    train, validation, test = (tuple(map(jnp.asarray, part)) for part in data)
    return Augmentation(train, validation), test


def training(num_steps):
    return blx.Unrolled(optax.sgd(0.1, momentum=0.9), num_steps, batch_size=50)


def run(quick):
    problem, test = task(seed=0)
    x0, num_steps = jnp.full(6, -3.0), 10 if quick else 500
    pipeline = blx.GradientPipeline(training(20), optax.adam(0.02), outer_batch=100)
    solution = blx.solve(
        *(problem, blx.WarmStart(), x0, network(jr.key(0))),
        pipeline=pipeline,
        num_steps=num_steps,
        certify=False,
        record=lambda x, y, metrics: jnp.exp(x),
    )
    starts = jax.vmap(network)(jr.split(jr.key(1), 3))
    results: dict[str, Any] = {"path": np.asarray(solution.history)}
    for name, x in (("learned", solution.x), ("none", x0 - 9), ("more", x0 + 1)):
        at = dataclasses.replace(solution, x=x)
        gap = blx.retrain_gap(problem, at, starts, response=training(20 * num_steps))
        tested = jax.vmap(lambda y: accuracy(y, *test))(gap.y)
        results[f"{name}: validation loss, re-trained"] = jnp.mean(gap.retrained)
        results[f"{name}: test accuracy, re-trained"] = jnp.mean(tested)
        if name == "learned":
            results["learned: validation loss, warm start"] = gap.value
            results["learned: gap"] = gap.gap
    return results


def check(results):
    none = results["none: validation loss, re-trained"]
    assert results["learned: validation loss, re-trained"] < none
    # Part of what the warm start had gained was in the weights alone.
    assert results["learned: gap"] > 0


def draw(results):
    kinds = ("shift across", "shift down", "turn", "stretch", "contrast", "noise")
    picture, ax = plt.subplots(figsize=(4.2, 2.5), layout="constrained")
    for path, kind in zip(results["path"].T, kinds):
        ax.plot(np.linspace(0, 1, len(path)), path, label=kind)
    ax.set(xlabel="share of the run", ylabel="strength", ylim=(0, None))
    picture.legend(ncols=3, loc="outside upper center")
    return picture


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
