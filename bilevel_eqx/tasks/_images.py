"""Dataset distillation of images: the task of Table 3 of the paper's long version."""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from .._custom_types import typechecked
from .._problem.finite_sum import AbstractFiniteSumProblem
from ._network import accuracy, cross_entropies, evaluate, initial_weights, Weights


DistilledImages: TypeAlias = dict[str, Array]


"""The outer variables: `"images"`, of shape `(k, ...)`, and the `"logits"` of their soft
labels, of shape `(k, c)`."""


class ImageDistillation(AbstractFiniteSumProblem[DistilledImages, Weights]):
    r"""Distils a set of images into a few learned ones, with learned soft labels.

    The outer variables are the learned images and their labels. The inner variables are
    the weights of a network, which takes an image as a row of pixels. Both objectives are
    mean cross-entropies,

    $$F(x, y) = \text{loss of } y \text{ on the data set}, \qquad
    f(x, y) = \text{loss of } y \text{ on the learned images } x.$$

    F depends on x only through the weights. The labels are soft, so that f has finite
    minima: its least value is the entropy of the labels.

    The outer losses have a sample for each image of the data set, and the inner ones for
    each learned image, so that an algorithm can draw mini-batches of both.

    **Attributes:**

    - `inner_data`: the numbers of the learned images, 0 to k - 1.
    - `outer_data`: the images of the data set, of shape `(n, ...)`, and their classes,
        integers of shape `(n,)`.
    - `activation`: of the hidden units.
    """

    inner_data: Int[Array, " k"]
    outer_data: tuple[Float[Array, "n ..."], Int[Array, " n"]]
    activation: Callable[[Array], Array] = eqx.field(static=True, default=jnp.tanh)

    def outer_losses(self, x, y, batch, key):
        images, labels = batch
        logits = self.predict(y, images)
        targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        return cross_entropies(logits, targets)

    def inner_losses(self, x, y, batch, key):
        learned = self.predict(y, x["images"][batch])
        return cross_entropies(learned, jax.nn.softmax(x["logits"][batch]))

    def predict(self, y: Weights, images: Float[Array, "m ..."]) -> Array:
        """The outputs of the network with weights `y`, of shape `(m, c)`."""
        return evaluate(y, images.reshape(images.shape[0], -1), self.activation)

    def accuracy(self, y: Weights) -> Scalar:
        """The share of the data set that the weights `y` classify correctly. For other
        images, use a problem whose data set they are."""
        images, labels = self.outer_data
        return accuracy(self.predict(y, images), labels)


@typechecked
def image_distillation(
    key: PRNGKeyArray,
    images: Any,
    labels: Any,
    *,
    num_distilled: int = 10,
    num_classes: int = 10,
    width: int = 200,
    num_hidden: int = 2,
    spread: float = 0.1,
    activation: Callable[[Array], Array] = jnp.tanh,
) -> tuple[ImageDistillation, DistilledImages, Weights]:
    """A set of images that is distilled into a few learned ones.

    The pixels should have a mean of about zero and a standard deviation of about one. The
    initial weights are LeCun-normal, with zero biases.

    **Arguments:**

    - `key`: a key for the initial values.
    - `images`: the data set, of shape `(n, ...)`.
    - `labels`: its classes, integers of shape `(n,)`.
    - `num_distilled`: the number $k$ of learned images.
    - `num_classes`: the number $c$ of classes.
    - `width`: the number of units in each hidden layer.
    - `num_hidden`: the number of hidden layers.
    - `spread`: the initial standard deviation of the learned pixels, and of the logits of
        the learned labels.
    - `activation`: of the hidden units.

    **Returns:**

    A tuple of the problem, the initial outer and the initial inner variables.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    shape, dtype = images.shape[1:], images.dtype
    image_key, logit_key, y_key = jr.split(key, 3)
    x0 = {
        "images": spread * jr.normal(image_key, (num_distilled, *shape), dtype),
        "logits": spread * jr.normal(logit_key, (num_distilled, num_classes), dtype),
    }
    sizes = [images[0].size, *[width] * num_hidden, num_classes]
    y0 = initial_weights(y_key, sizes, dtype)
    numbers, data = jnp.arange(num_distilled), (images, labels)
    return ImageDistillation(numbers, data, activation=activation), x0, y0
