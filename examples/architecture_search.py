"""Which operation at each layer? Mixed operations, whose weights are learned (DARTS).

python examples/architecture_search.py --output outputs
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from _gallery import main
from sklearn.datasets import load_digits

import bilevel_eqx as blx


OPERATIONS = "identity", "average", "conv 1x1", "conv 3x3"
CHANNELS, LAYERS = 8, 3
SIZES = np.array([0, 0, CHANNELS**2, 9 * CHANNELS**2])  # the weights of an operation


def patches(u):  # of 3 x 3 pixels
    n, u = u.shape[1], jnp.pad(u, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [u[:, i : i + n, j : j + n] for i in range(3) for j in range(3)]
    return jnp.stack(shifts, axis=-2)


def layer(u, weights):
    (mix, narrow, wide), around = weights, patches(u)
    convolved = jnp.tanh(around.reshape(*u.shape[:3], -1) @ wide)
    average, pointwise = jnp.mean(around, axis=-2), jnp.tanh(u @ narrow)
    return mix[0] * u + mix[1] * average + mix[2] * pointwise + mix[3] * convolved, None


def network(mix, y, images):
    u = jnp.tanh(patches(images)[:, ::2, ::2, :, 0] @ y["stem"])
    u, _ = jax.lax.scan(layer, u, (mix, y["narrow"], y["wide"]))
    return jnp.mean(u, axis=(1, 2)) @ y["head"] + y["bias"]


def initial_weights(key):
    stem, head = (9, CHANNELS), (CHANNELS, 10)
    narrow, wide = (LAYERS, CHANNELS, CHANNELS), (LAYERS, 9 * CHANNELS, CHANNELS)
    shapes = {"stem": stem, "narrow": narrow, "wide": wide, "head": head}
    named = zip(jr.split(key, 4), shapes.items())
    y = {name: jr.normal(k, shape) / np.sqrt(shape[-2]) for k, (name, shape) in named}
    return y | {"bias": jnp.zeros(10)}


class Search(blx.AbstractFiniteSumProblem):
    inner_data: tuple[jax.Array, jax.Array]
    outer_data: tuple[jax.Array, jax.Array]
    price: jax.Array

    def inner_losses(self, x, y, batch, key):
        images, labels = batch
        outputs = network(jax.nn.softmax(x), y, images)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)

    outer_losses = inner_losses

    def outer_penalty(self, x, y):  # for each weight that the mixture has
        return self.price * jnp.sum(jax.nn.softmax(x) @ SIZES)


def run(quick):
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images[order].reshape(-1, 8, 8, 1) / 16 - 0.3, "float32")
    train, held_out, unseen = (
        (images[a:b], jnp.asarray(labels[order[a:b]]))
        for a, b in ((0, 600), (600, 1200), (1200, 1797))
    )
    step = blx.Unrolled(optax.adam(0.02), 1)
    batches = {"inner_batch": 64, "outer_batch": 64}
    pipeline = blx.GradientPipeline(step, optax.adam(0.03), inner_update=step, **batches)
    searching, retrain = (60, 60) if quick else (600, 300)  # the numbers of steps

    def search(price):
        problem = Search(train, held_out, jnp.array(price))
        x0, y0 = jnp.zeros((LAYERS, len(OPERATIONS))), initial_weights(jr.key(0))
        how = {"pipeline": pipeline, "num_steps": searching, "certify": False}
        return np.argmax(blx.solve(problem, blx.WarmStart(), x0, y0, **how).x, axis=1)

    @jax.jit
    def accuracy(mix):  # trained from scratch, with one operation at each layer
        adam = optax.adam(optax.cosine_decay_schedule(0.03, retrain))
        training = blx.Unrolled(adam, retrain, batch_size=64)
        free = Search(train, unseen, jnp.array(0.0))
        y = blx.best_response(free, 50.0 * mix, initial_weights(jr.key(1)), training)
        predicted = jnp.argmax(network(mix, y, unseen[0]), axis=1)
        return jnp.mean(predicted == unseen[1])

    def tried(operations):
        size, share = SIZES[operations].sum(), accuracy(jnp.eye(4)[operations])
        print(*(OPERATIONS[i] for i in operations), size, share, sep=", ")
        return size, share

    prices = [1e-4] if quick else [0.0, 5e-5, 2e-4, 5e-4]
    others = np.random.default_rng(1).integers(0, 4, (2 if quick else 12, LAYERS))
    found = np.array([tried(search(price)) for price in prices])
    return {"found": found.T, "others": np.array([tried(ops) for ops in others]).T}


def check(results):
    assert results["found"][1].max() > np.median(results["others"][1]) + 0.02


def draw(results):
    figure, ax = plt.subplots(figsize=(4, 2.4), layout="constrained")
    ax.plot(*results["others"], "o", color="0.5", label="at random")
    ax.plot(*results["found"], "D", color="#c2185b", label="found")
    ax.set(xlabel="weights in the layers", ylabel="accuracy, unseen")
    ax.legend()
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
