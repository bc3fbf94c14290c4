"""Dataset distillation of concentric rings: Figures 2, 5 and 6 of the paper."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from .._custom_types import typechecked
from .._problem.base import AbstractBilevelProblem
from .._problem.least_squares import AbstractLeastSquaresProblem
from ._network import accuracy, cross_entropy, evaluate, initial_weights, Weights


Distilled: TypeAlias = dict[str, Array]


"""The outer variables: `"points"`, of shape `(k, 2)`, and `"logits"`, of shape `(k, c)`,
if the labels are learned."""


class _Rings(eqx.Module):
    """The data set, and the network that is trained on the learned points."""

    points: eqx.AbstractVar[Float[Array, "n 2"]]
    labels: eqx.AbstractVar[Int[Array, " n"]]
    distilled_labels: eqx.AbstractVar[Int[Array, " k"] | None]
    activation: eqx.AbstractVar[Callable[[Array], Array]]

    def predict(self, y: Weights, points: Float[Array, "m 2"]) -> Float[Array, "m c"]:
        """The outputs of the network with weights `y`, at `points`."""
        return evaluate(y, points, self.activation)

    def accuracy(self, y: Weights) -> Scalar:
        """The share of the data set that the weights `y` classify correctly."""
        return accuracy(self.predict(y, self.points), self.labels)

    def distilled_targets(self, x: Distilled, y: Weights) -> Float[Array, "k c"]:
        """The labels of the learned points, fixed or learned."""
        if self.distilled_labels is None:
            return jax.nn.softmax(x["logits"])
        return _one_hot(self.distilled_labels, y)


class ConcentricRings(AbstractBilevelProblem[Distilled, Weights], _Rings):
    r"""Distils a data set of concentric rings into a few points.

    The outer variables are the learned points. The inner variables are the weights of a
    network. Both objectives are mean cross-entropies,

    $$F(x, y) = \text{loss of } y \text{ on the rings}, \qquad
    f(x, y) = \text{loss of } y \text{ on the points } x.$$

    F depends on x only through the weights. With a few points and tens of thousands of
    weights, S(x) has a very high dimension. With fixed labels its points lie at infinity:
    the loss falls as long as training continues.

    **Attributes:**

    - `points`: the data set, of shape `(n, 2)`.
    - `labels`: its classes, integers of shape `(n,)`.
    - `distilled_labels`: the classes of the learned points, integers of shape `(k,)`; or
        `None` if they are learned, as logits.
    - `activation`: of the hidden units.
    """

    points: Float[Array, "n 2"]
    labels: Int[Array, " n"]
    distilled_labels: Int[Array, " k"] | None
    activation: Callable[[Array], Array] = eqx.field(static=True, default=jax.nn.relu)

    def outer(self, x: Distilled, y: Weights) -> Scalar:
        targets = _one_hot(self.labels, y)
        return cross_entropy(self.predict(y, self.points), targets)

    def inner(self, x: Distilled, y: Weights) -> Scalar:
        targets = self.distilled_targets(x, y)
        return cross_entropy(self.predict(y, x["points"]), targets)


class SquaredRings(AbstractLeastSquaresProblem[Distilled, Weights], _Rings):
    r"""The same with half the mean square of output minus label as its loss.

    S(x) is then the set of weights that fit the learned points exactly. It lies at finite
    weights, and its dimension is the number of weights minus the number of outputs.

    **Attributes:** as for [`bilevel_eqx.tasks.ConcentricRings`][].
    """

    points: Float[Array, "n 2"]
    labels: Int[Array, " n"]
    distilled_labels: Int[Array, " k"] | None
    activation: Callable[[Array], Array] = eqx.field(static=True, default=jax.nn.relu)

    def outer(self, x: Distilled, y: Weights) -> Scalar:
        misfit = self.predict(y, self.points) - _one_hot(self.labels, y)
        return 0.5 * jnp.mean(jnp.sum(misfit**2, axis=-1))

    def inner_residual(self, x: Distilled, y: Weights) -> Float[Array, "k c"]:
        misfit = self.predict(y, x["points"]) - self.distilled_targets(x, y)
        return misfit / jnp.sqrt(jnp.asarray(misfit.shape[0], misfit.dtype))


def _one_hot(labels, y):
    bias = y[-1][1]
    return jax.nn.one_hot(labels, bias.shape[0], dtype=bias.dtype)


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
    loss: Literal["cross-entropy", "squared"] = "cross-entropy",
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> tuple[ConcentricRings | SquaredRings, Distilled, Weights]:
    """Concentric rings, one for each class, that are distilled into a few points.

    The paper gives the number of points, the network and the learning rates. It does not
    give the radii and the noise (the result depends on their scale) or the initial
    weights, which are here LeCun-normal with zero biases.

    **Arguments:**

    - `key`: a key for the data and the initial values.
    - `num_classes`: the number $c$ of rings.
    - `points_per_class`: the number of points on each ring.
    - `radii`: the radius of each ring. By default .25, .5, .75, ...
    - `noise`: the standard deviation of the noise on each coordinate.
    - `num_distilled`: the number $k$ of learned points, one for each class by default.
    - `learn_labels`: whether each learned point has a learned soft label, as logits
        that start near zero. Otherwise the points have the classes in turn.
    - `width`: the number of units in each hidden layer.
    - `num_hidden`: the number of hidden layers.
    - `spread`: the initial standard deviation of the learned points.
    - `loss`: `"cross-entropy"`, as in the paper, whose inner minima lie at infinity if
        the labels are fixed; or `"squared"`, whose inner minima are finite.
    - `activation`: of the hidden units. With ReLUs S(x) has kinks; with a smooth
        activation (`jnp.tanh`) it has none.

    **Returns:**

    A tuple of the problem, the initial outer and the initial inner variables.

    **Raises:**

    A `ValueError` if there is not one radius for each class, or if the loss is unknown.
    """
    kinds = {"cross-entropy": ConcentricRings, "squared": SquaredRings}
    if loss not in kinds:
        raise ValueError(f"`rings(loss=...)` must be one of {list(kinds)}, not {loss!r}.")
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
    y0 = initial_weights(y_key, sizes, points.dtype)
    return kinds[loss](points, labels, distilled_labels, activation), x0, y0
