"""Dataset distillation of concentric rings: Figures 2, 5 and 6 of the paper."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from .._custom_types import typechecked
from .._problem import AbstractBilevelProblem


Distilled: TypeAlias = dict[str, Array]
"""The outer variables: `"points"`, of shape `(k, 2)`, and `"logits"`, of shape `(k, c)`,
if the labels are learned."""

Weights: TypeAlias = list[tuple[Array, Array]]
"""The inner variables: a matrix and a bias for each layer of the network."""


class ConcentricRings(AbstractBilevelProblem[Distilled, Weights]):
    r"""Distils a data set of concentric rings into a few points.

    The outer variables are the learned points; the inner variables are the weights of
    a ReLU network; both objectives are mean cross-entropies,

    $$F(x, y) = \text{loss of } y \text{ on the rings}, \qquad
    f(x, y) = \text{loss of } y \text{ on the points } x.$$

    x reaches F through the weights alone. With a handful of points and tens of
    thousands of weights, S(x) is enormous.

    **Attributes:**

    - `points`: the data set, of shape `(n, 2)`.
    - `labels`: its classes, integers of shape `(n,)`.
    - `distilled_labels`: the classes of the learned points, integers of shape `(k,)`; or
        `None` if they are learned, as logits.
    """

    points: Float[Array, "n 2"]
    labels: Int[Array, " n"]
    distilled_labels: Int[Array, " k"] | None

    def predict(self, y: Weights, points: Float[Array, "m 2"]) -> Float[Array, "m c"]:
        """The logits of the network with weights `y`, at `points`."""
        *hidden, (last_weight, last_bias) = y
        activations = points
        for weight, bias in hidden:
            activations = jax.nn.relu(activations @ weight + bias[None, :])
        return activations @ last_weight + last_bias[None, :]

    def outer(self, x: Distilled, y: Weights) -> Scalar:
        targets = _one_hot(self.labels, y)
        return _cross_entropy(self.predict(y, self.points), targets)

    def inner(self, x: Distilled, y: Weights) -> Scalar:
        if self.distilled_labels is None:
            targets = jax.nn.softmax(x["logits"])
        else:
            targets = _one_hot(self.distilled_labels, y)
        return _cross_entropy(self.predict(y, x["points"]), targets)

    def accuracy(self, y: Weights) -> Scalar:
        """The share of the data set that the weights `y` classify correctly."""
        predicted = jnp.argmax(self.predict(y, self.points), axis=-1)
        return jnp.mean(predicted == self.labels)


def _one_hot(labels, y):
    bias = y[-1][1]
    return jax.nn.one_hot(labels, bias.shape[0], dtype=bias.dtype)


def _cross_entropy(logits, targets):
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))


@typechecked
def rings(
    key: PRNGKeyArray,
    *,
    num_classes: int = 2,
    points_per_class: int = 100,
    radii: Sequence[float] | None = None,
    noise: float = 0.025,
    num_distilled: int | None = None,
    learn_labels: bool = False,
    width: int = 200,
    num_hidden: int = 3,
    spread: float = 0.1,
) -> tuple[ConcentricRings, Distilled, Weights]:
    """Concentric rings, a class each, to be distilled into a few points.

    The paper gives the number of points, the network and the learning rates. What it
    does not give is chosen here: the radii and the noise (the outcome depends on their
    scale), and the initial weights, which are LeCun-normal with zero biases.

    **Arguments:**

    - `key`: a key for the data and the initial values.
    - `num_classes`: the number $c$ of rings.
    - `points_per_class`: how many points lie on each.
    - `radii`: the radius of each ring. By default .25, .5, .75, ...
    - `noise`: the standard deviation of the noise on each coordinate.
    - `num_distilled`: the number $k$ of learned points, one for each class by default.
    - `learn_labels`: whether each learned point has a learned soft label, as logits
        that start near zero; otherwise the classes are dealt out in turn.
    - `width`: the number of units in each hidden layer.
    - `num_hidden`: the number of hidden layers.
    - `spread`: the standard deviation of the learned points before training.

    **Returns:**

    A tuple of the problem, the initial outer and the initial inner variables.

    **Raises:**

    A `ValueError` if there is not one radius for each class.
    """
    if radii is None:
        radii = [0.25 * (i + 1) for i in range(num_classes)]
    if len(radii) != num_classes:
        raise ValueError(
            f"`rings(radii=...)` takes one radius for each class: there are "
            f"{num_classes} classes and {len(radii)} radii."
        )
    num_distilled = num_classes if num_distilled is None else num_distilled
    data_key, angle_key, x_key, y_key = jr.split(key, 4)

    labels = jnp.repeat(jnp.arange(num_classes), points_per_class)
    angles = jr.uniform(angle_key, labels.shape, maxval=2 * jnp.pi)
    circle = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    points = jnp.asarray(radii, circle.dtype)[labels][:, None] * circle
    points = points + noise * jr.normal(data_key, points.shape)

    point_key, logit_key = jr.split(x_key)
    x0 = {"points": spread * jr.normal(point_key, (num_distilled, 2))}
    distilled_labels = jnp.arange(num_distilled) % num_classes
    if learn_labels:
        x0["logits"] = spread * jr.normal(logit_key, (num_distilled, num_classes))
        distilled_labels = None

    sizes = [2, *[width] * num_hidden, num_classes]
    y0 = [
        (jr.normal(k, (m, n)) / jnp.sqrt(jnp.asarray(m, points.dtype)), jnp.zeros(n))
        for k, m, n in zip(jr.split(y_key, len(sizes) - 1), sizes, sizes[1:])
    ]
    return ConcentricRings(points, labels, distilled_labels), x0, y0
