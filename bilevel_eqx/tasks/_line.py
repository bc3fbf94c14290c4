"""A datapoint that moves along a line: Figure 4 of the paper, with its closed forms."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .._custom_types import typechecked
from .._problem.least_squares import AbstractLeastSquaresProblem


class MovingDatapoint(AbstractLeastSquaresProblem[Array, Array]):
    r"""A linear regression on a single datapoint, which moves along a line.

    The outer variable $x$ is the position of the datapoint on the line, and the inner
    variables $w$ are the weights,

    $$(\varphi, t)(x) = \text{origin} + x \cdot \text{direction},$$

    $$F(x, w) = \tfrac{1}{2 v} \|\Phi_v w - t_v\|^2, \qquad
    f(x, w) = \tfrac12 (\varphi(x)^\top w - t(x))^2.$$

    One datapoint is one equation for all weights: $S(x)$ is a hyperplane with the normal
    $\varphi(x)$. The hyperplanes of all $x$ meet where $w$ fits the whole line.

    **Attributes:**

    - `origin`: the datapoint at $x = 0$, of shape `(n + 1,)`: its features, then its
        target.
    - `direction`: the direction of the line, of the same shape. If only its last entry is
        nonzero, only the target moves, and the hyperplanes are parallel.
    - `validation_features`: $\Phi_v$, of shape `(v, n)`.
    - `validation_targets`: $t_v$, of shape `(v,)`.
    """

    origin: Float[Array, " m"]
    direction: Float[Array, " m"]
    validation_features: Float[Array, "v n"]
    validation_targets: Float[Array, " v"]

    def datapoint(self, x: ScalarLike) -> tuple[Float[Array, " n"], Scalar]:
        """The features and the target at `x`."""
        point = self.origin + x * self.direction
        return point[:-1], point[-1]

    def inner_residual(self, x, y):
        features, target = self.datapoint(x)
        return features @ y - target

    def outer(self, x, y):
        error = self.validation_features @ y - self.validation_targets
        return 0.5 * jnp.mean(error**2)


@typechecked
def line(
    *,
    origin: Float[Array, " m"] | None = None,
    direction: Float[Array, " m"] | None = None,
    validation_features: Float[Array, "v n"] | None = None,
    validation_targets: Float[Array, " v"] | None = None,
) -> tuple[MovingDatapoint, Array, Array]:
    """The toy regression of the paper's Figure 4.

    The paper says that there are two weights, that both start at zero and that the
    datapoint moves along a line in data space. It does not give the line, the validation
    data or the model. The model here is $w_1 u + w_2$ for an input $u$ with the features
    $(u, 1)$.

    **Arguments:**

    - `origin`: features and target at $x = 0$. By default the input is 0 and the target
        .8.
    - `direction`: the direction of the line. By default the target rises by 1.2 if the
        input rises by one, so that the weights that fit the line are (1.2, .8).
    - `validation_features`: by default those of five inputs from -2 to 2.
    - `validation_targets`: by default close to another line, of slope -.3 through 1.5.

    **Returns:**

    A tuple of the problem, the initial outer variable and the initial weights, which are
    zero.
    """
    if origin is None:
        origin = jnp.array([0.0, 1.0, 0.8])
    if direction is None:
        direction = jnp.array([1.0, 0.0, 1.2])
    if validation_features is None:
        inputs = jnp.linspace(-2, 2, 5)
        validation_features = jnp.stack([inputs, jnp.ones_like(inputs)], axis=-1)
    if validation_targets is None:
        validation_targets = jnp.array([2.3, 1.6, 1.5, 1.4, 0.7])
    problem = MovingDatapoint(origin, direction, validation_features, validation_targets)
    return problem, jnp.zeros((), origin.dtype), jnp.zeros_like(origin[:-1])


#
# The closed forms.
#


@typechecked
def kaczmarz_step(
    problem: MovingDatapoint,
    x: ScalarLike,
    y: Float[Array, " n"],
    *,
    epsilon: ScalarLike = 0.0,
) -> Float[Array, " n"]:
    r"""One step of a full or of a partial warm start:

    $$w + \varphi\, \frac{t - \varphi^\top w}{\|\varphi\|^2 + \epsilon}.$$

    **Arguments:**

    - `problem`: the problem.
    - `x`: the outer variable.
    - `y`: the weights $w$ to start from. With the initial weights it is a cold start.
    - `epsilon`: 0, the default, projects on $S(x)$; a positive one is the proximal
        response.

    **Returns:**

    The weights after the step.
    """
    features, target = problem.datapoint(x)
    misfit = target - features @ y
    return y + features * misfit / (features @ features + epsilon)


@typechecked
def meeting_point(problem: MovingDatapoint, y: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""The point nearest to `y` in the intersection of all $S(x)$, to which cyclic
    projections on two or more of them converge.

    Two hyperplanes determine the intersection of all, since every datapoint on the line
    is a mixture of two. With two weights it is a single point for every `y`.

    **Arguments:**

    - `problem`: the problem. Its features must depend on x.
    - `y`: the weights to start from.

    **Returns:**

    The weights, which fit the datapoint for every $x$.
    """
    rows = jnp.stack([problem.origin, problem.direction])
    features, targets = rows[:, :-1], rows[:, -1]
    # The smallest change of y that fits both.
    return y + jnp.linalg.lstsq(features, targets - features @ y)[0]
