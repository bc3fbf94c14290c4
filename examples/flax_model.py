"""A Flax NNX network with batch normalisation and dropout, whose weight decay is learned.

python examples/flax_model.py --output outputs    # needs the extra `flax`
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _gallery import main
from flax import nnx  # pyright: ignore[reportMissingImports]
from sklearn.datasets import load_digits

import bilevel_eqx as blx
from bilevel_eqx import plot


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.0, rngs=rngs)  # set by a single pass
        self.dropout = nnx.Dropout(0.2)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images, rngs=None):
        hidden = nnx.relu(self.norm(self.first(images)))
        return self.last(self.dropout(hidden, rngs=rngs))


class WeightDecay(blx.AbstractFiniteSumProblem):
    """x is the logarithm of the weight decay, y the parameters, `rest` all else."""

    inner_data: tuple[jax.Array, jax.Array]
    outer_data: tuple[jax.Array, jax.Array]
    graph: nnx.GraphDef
    rest: nnx.State

    def inner_losses(self, x, y, batch, key):
        images, labels = batch
        net = nnx.merge(self.graph, y, self.rest)
        net.dropout.deterministic = key is None
        outputs = net(images, rngs=None if key is None else nnx.Rngs(dropout=key))
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)

    def outer_losses(self, x, y, batch, key):
        return self.inner_losses(x, y, batch, None)  # judged without dropout

    def inner_penalty(self, x, y):
        return 0.5 * jnp.exp(x) * optax.tree.norm(y, squared=True)


def refreshed(graph, y, rest, images):  # the statistics of these images
    net = nnx.merge(graph, y, rest)
    net.train()
    net(images, rngs=nnx.Rngs(0))
    net.eval()
    graph, _, rest = nnx.split(net, nnx.Param, ...)
    return graph, rest


def run(quick):
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (
        jnp.asarray(images[order] / 16, "float32"),
        jnp.asarray(labels[order]),
    )
    train, held_out, unseen = (
        (images[a:b], labels[a:b]) for a, b in ((0, 300), (300, 1200), (1200, 1797))
    )
    graph, y, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    x, state, decays, losses = jnp.array(-6.0), None, [], []
    ten_steps = blx.Unrolled(optax.sgd(0.2), 10, batch_size=50)
    pipeline = blx.GradientPipeline(ten_steps, optax.adam(0.1))
    for _ in range(2 if quick else 10):
        graph, rest = refreshed(graph, y, rest, train[0])
        problem = WeightDecay(train, held_out, graph, rest)
        solution = blx.solve(
            problem,
            blx.WarmStart(),
            x,
            y,
            pipeline=pipeline,
            num_steps=20,
            state=state,
            certify=False,
        )
        x, y, state = solution.x, solution.y, solution.state
        decays.append(jnp.exp(x))
        losses.append(solution.history["value"])

    graph, rest = refreshed(graph, y, rest, train[0])
    outputs = nnx.merge(graph, y, rest)(unseen[0])
    return {
        "weight decay": jnp.exp(x),
        "loss, held out": WeightDecay(train, held_out, graph, rest).outer(x, y),
        "accuracy, unseen": jnp.mean(jnp.argmax(outputs, axis=-1) == unseen[1]),
        "decays": jnp.stack(decays),
        "losses": jnp.concatenate(losses),
    }


def check(results):
    assert results["accuracy, unseen"] > 0.85
    assert results["losses"][-1] < 0.5 * results["losses"][0]


def draw(results):
    figure, axes = plt.subplots(1, 2, figsize=(6, 2.2), layout="constrained")
    axes[0].plot(results["losses"], color=plot.CLASS_COLOURS[1])
    axes[0].set(xlabel="outer step", ylabel="held-out loss", yscale="log")
    axes[1].plot(results["decays"], "o-", color=plot.CLASS_COLOURS[2])
    axes[1].set(xlabel="call of solve", ylabel="weight decay", yscale="log")
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
