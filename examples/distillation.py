"""Ten learned images teach any new network what a digit is.

python examples/distillation.py --output outputs
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _gallery import digits, draw_images as draw, main

import bilevel_eqx as blx


def networks(key, number):  # their initial weights
    W, V = jr.normal(key, (2, number, 64, 64)) / 8
    return {"W": W, "V": V[:, :, :10]}


def logits(y, images):  # of each network, for each image
    return jnp.tanh((images - 0.3) @ y["W"]) @ y["V"]


def loss(y, images, targets):  # a sum over networks: each is trained by itself
    return jnp.sum(optax.softmax_cross_entropy(logits(y, images), targets).mean(axis=1))


def run(quick):
    (images, labels), (unseen, answers) = digits(0, 1200)
    problem = blx.BilevelProblem(
        outer=lambda x, y: loss(y, images, jax.nn.one_hot(labels, 10)),
        inner=lambda x, y: loss(y, x["images"], jax.nn.softmax(x["logits"])),
    )
    first = [list(labels).index(digit) for digit in range(10)]
    x0 = {"images": jnp.asarray(images[first]), "logits": 4 * jnp.eye(10)}
    pipeline = blx.GradientPipeline(blx.Unrolled(optax.sgd(0.5), 30), optax.adam(0.02))
    y0, num_steps = networks(jr.key(0), 4), 50 if quick else 400
    options = {"pipeline": pipeline, "num_steps": num_steps, "certify": False}
    x = blx.solve(problem, blx.ColdStart(), x0, y0, **options).x

    def accuracy(x, num_steps):  # of 20 new networks, on images that nothing has seen
        training = blx.Unrolled(optax.sgd(0.5), num_steps, mode="forward")
        y = blx.best_response(problem, x, networks(jr.key(1), 20), training)
        return jnp.mean(jnp.argmax(logits(y, unseen), axis=2) == answers, axis=1)

    results = {"before": x0["images"], "after": x["images"]}
    results["accuracy, ten real images"] = jnp.mean(accuracy(x0, 30))
    results["accuracy, ten learned images"] = jnp.mean(accuracy(x, 30))
    results["accuracy, the worst network"] = jnp.min(accuracy(x, 30))
    results["accuracy after 3,000 steps"] = jnp.mean(accuracy(x, 3000))
    return results


def check(results):
    real, learned, worst, longer = list(results.values())[2:]
    assert real + 0.2 < learned < min(worst + 0.05, longer + 0.03)


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
