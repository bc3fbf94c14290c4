"""Ten learned images teach any new network what a digit is.

python examples/distillation.py --output outputs
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax
from _gallery import main
from sklearn.datasets import load_digits

import bilevel_eqx as blx


def network(y, images):
    return jnp.tanh(images @ y["W"] + y["b"]) @ y["V"]


def initial_weights(key):
    keys = jr.split(key)
    W, V = jr.normal(keys[0], (64, 64)) / 8, jr.normal(keys[1], (64, 10)) / 8
    return {"W": W, "b": jnp.zeros(64), "V": V}


class Distillation(blx.AbstractBilevelProblem):
    images: jax.Array
    labels: jax.Array

    def outer(self, x, y):  # y are the weights of several networks
        outputs = jax.vmap(network, (0, None))(y, self.images)
        labels = jnp.broadcast_to(self.labels, outputs.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return jnp.mean(losses)

    def inner(self, x, y):
        outputs = jax.vmap(network, (0, None))(y, x["images"])
        targets = jax.nn.softmax(x["logits"])
        losses = optax.softmax_cross_entropy(outputs, targets[None])
        return jnp.sum(jnp.mean(losses, axis=1))  # each network trains by itself


def run(quick):
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16 - 0.3, "float32"), jnp.asarray(labels)
    data = Distillation(images[:1200], labels[:1200])
    unseen = Distillation(images[1200:], labels[1200:])
    num_steps = 25 if quick else 400

    y0 = jax.vmap(initial_weights)(jr.split(jr.key(0), 4))
    first = jnp.array([jnp.argmax(labels == digit) for digit in range(10)])
    x0 = {"images": images[first], "logits": 4 * jnp.eye(10)}
    training = blx.Unrolled(optax.sgd(0.5), 30)
    adam = optax.adam(optax.cosine_decay_schedule(0.05, num_steps))
    solution = blx.solve(
        data,
        blx.ColdStart(),
        x0,
        y0,
        pipeline=blx.GradientPipeline(training, adam),
        num_steps=num_steps,
        certify=False,
    )

    fresh = jax.vmap(initial_weights)(jr.split(jr.key(1), 5 if quick else 20))

    @jax.jit
    def accuracies(x, num_steps):  # of new networks, on images that nothing has seen
        longer = blx.Unrolled(optax.sgd(0.5), num_steps, mode="forward")
        y = blx.best_response(unseen, x, fresh, longer)
        outputs = jax.vmap(network, (0, None))(y, unseen.images)
        return jnp.mean(jnp.argmax(outputs, axis=-1) == unseen.labels, axis=1)

    return {
        "accuracy, ten real images": jnp.mean(accuracies(x0, 30)),
        "accuracy, ten learned images": jnp.mean(accuracies(solution.x, 30)),
        "accuracy, the worst network": jnp.min(accuracies(solution.x, 30)),
        "accuracy after far more steps": jnp.mean(
            accuracies(solution.x, 300 if quick else 3000)
        ),
        "images": jnp.stack([x0["images"], solution.x["images"]]),
    }


def check(results):
    learned = results["accuracy, ten learned images"]
    assert learned > results["accuracy, ten real images"] + 0.2
    assert results["accuracy, the worst network"] > learned - 0.05
    assert results["accuracy after far more steps"] > learned - 0.02


def draw(results):
    figure, axes = plt.subplots(2, 10, figsize=(6, 1.4), layout="constrained")
    for row, name, images in zip(axes, ("before", "after"), results["images"]):
        row[0].set_ylabel(name)
        for ax, image in zip(row, images):
            ax.imshow(image.reshape(8, 8), cmap="gray_r")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
