"""The multilayer perceptrons of the tasks."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar


Weights: TypeAlias = list[tuple[Array, Array]]


"""The inner variables: a matrix and a bias for each layer of the network."""


def initial_weights(key: PRNGKeyArray, sizes: Sequence[int], dtype: Any) -> Weights:
    """LeCun-normal matrices, of standard deviation 1 / sqrt(inputs), and zero biases."""
    return [
        (
            jr.normal(k, (m, n), dtype) / jnp.sqrt(jnp.asarray(m, dtype)),
            jnp.zeros(n, dtype),
        )
        for k, m, n in zip(jr.split(key, len(sizes) - 1), sizes, sizes[1:])
    ]


def evaluate(
    y: Weights, inputs: Float[Array, "m n"], activation: Callable[[Array], Array]
) -> Float[Array, "m c"]:
    """The outputs of the network, without an activation after the last layer."""
    *hidden, (last_weight, last_bias) = y
    activations = inputs
    for weight, bias in hidden:
        activations = activation(activations @ weight + bias[None, :])
    return activations @ last_weight + last_bias[None, :]


def accuracy(logits: Float[Array, "m c"], labels: Int[Array, " m"]) -> Scalar:
    """The share of rows whose largest entry is that of the label."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def cross_entropy(logits: Float[Array, "m c"], targets: Float[Array, "m c"]) -> Scalar:
    """The mean cross-entropy of the rows."""
    return jnp.mean(cross_entropies(logits, targets))


def cross_entropies(
    logits: Float[Array, "m c"], targets: Float[Array, "m c"]
) -> Float[Array, " m"]:
    """The cross-entropy of each row."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
