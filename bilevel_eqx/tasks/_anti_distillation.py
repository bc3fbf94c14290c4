"""Anti-distillation: Figures 3 and 7 of the paper, with the closed form of their
fixed points, and Figure 8, with a network."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from .._custom_types import typechecked
from .._problem.least_squares import AbstractLeastSquaresProblem


class AntiDistillation(AbstractLeastSquaresProblem[Array, Array]):
    r"""Learns more targets than there are validation points.

    The outer variables $\lambda$ are the targets of $p$ synthetic points; the inner
    variables $w$ are the weights of a linear regression on fixed features,

    $$F(\lambda, w) = \tfrac12 \|\Phi_v w - t\|^2, \qquad
    f(\lambda, w) = \tfrac12 \|\Phi w - \lambda\|^2.$$

    Both levels are overparameterised: many $w$ fit the targets, and many targets lead
    to a $w$ that fits the validation points. Only the approximation of the hypergradient
    determines which of them is found.

    **Attributes:**

    - `features`: $\Phi$, of shape `(p, n)`.
    - `validation_features`: $\Phi_v$, of shape `(v, n)`.
    - `validation_targets`: $t$, of shape `(v,)`.
    """

    features: Float[Array, "p n"]
    validation_features: Float[Array, "v n"]
    validation_targets: Float[Array, " v"]

    def inner_residual(self, x, y):
        return self.features @ y - x

    def outer(self, x, y):
        error = self.validation_features @ y - self.validation_targets
        return 0.5 * jnp.sum(error**2)


Basis = Literal["exponential", "reciprocal"]


@typechecked
def fourier_features(
    inputs: Float[Array, " p"],
    *,
    num_frequencies: int = 10,
    basis: Basis = "exponential",
) -> Float[Array, "p n"]:
    r"""$\phi(u) = (1, a_1 \cos u, \ldots, a_N \cos N u, a_1 \sin u, \ldots)$.

    **Arguments:**

    - `inputs`: of shape `(p,)`.
    - `num_frequencies`: $N$.
    - `basis`: the amplitudes: $a_n = 2^{N - n}$ (`"exponential"`, Figure 3) or
        $a_n = 1 / n$ (`"reciprocal"`, Figure 7).

    **Returns:**

    The features, of shape `(p, 2 N + 1)`.
    """
    frequencies = jnp.arange(1, num_frequencies + 1, dtype=inputs.dtype)
    if basis == "exponential":
        amplitudes = 2 ** (num_frequencies - frequencies)
    else:
        amplitudes = 1 / frequencies
    angles = inputs[:, None] * frequencies[None, :]
    return jnp.concatenate(
        [
            jnp.ones_like(inputs)[:, None],
            amplitudes[None, :] * jnp.cos(angles),
            amplitudes[None, :] * jnp.sin(angles),
        ],
        axis=1,
    )


@typechecked
def anti_distillation(
    *,
    basis: Basis = "exponential",
    num_points: int = 13,
    num_frequencies: int = 10,
    interval: tuple[float, float] = (-3.0, 3.0),
    validation_inputs: Float[Array, " v"] | None = None,
    validation_targets: Float[Array, " v"] | None = None,
) -> tuple[AntiDistillation, Array, Array]:
    r"""The anti-distillation task of the paper, with any number of validation points.

    The paper does not give the interval of the inputs, which matters: on
    $[-\pi, \pi]$ the two ends have the same features, and on $[-1, 1]$ the
    condition number of $\Phi^\top \Phi$ is about $10^{11}$. Use float64.

    **Arguments:**

    - `basis`: `"exponential"` (Figure 3) or `"reciprocal"` (Figure 7).
    - `num_points`: the number $p$ of learned targets.
    - `num_frequencies`: $N$; there are $n = 2 N + 1$ weights.
    - `interval`: the interval of the inputs of the learned targets, which are equally
        spaced.
    - `validation_inputs`: of shape `(v,)`; by default the single one at 0.
    - `validation_targets`: of shape `(v,)`; by default 2.

    **Returns:**

    A tuple of the problem, the initial targets and the initial weights, which are zero.
    """
    inputs = jnp.linspace(*interval, num_points)
    if validation_inputs is None:
        validation_inputs = jnp.zeros(1, inputs.dtype)
    if validation_targets is None:
        validation_targets = jnp.full(validation_inputs.shape, 2.0, inputs.dtype)
    features, validation_features = (
        fourier_features(u, num_frequencies=num_frequencies, basis=basis)
        for u in (inputs, validation_inputs)
    )
    problem = AntiDistillation(features, validation_features, validation_targets)
    x0 = jnp.zeros(num_points, inputs.dtype)
    return problem, x0, jnp.zeros(features.shape[1], inputs.dtype)


Network = dict[str, Array]


class AntiDistillationNetwork(AbstractLeastSquaresProblem[Array, Network]):
    r"""The same task with a network of one hidden layer of ReLUs:

    $$F(\lambda, w) = \tfrac12 \|n_w(u_v) - t\|^2, \qquad
    f(\lambda, w) = \tfrac12 \|n_w(u) - \lambda\|^2.$$

    There is no closed form.

    **Attributes:**

    - `inputs`: $u$, of shape `(p,)`.
    - `validation_inputs`: $u_v$, of shape `(v,)`.
    - `validation_targets`: $t$, of shape `(v,)`.
    """

    inputs: Float[Array, " p"]
    validation_inputs: Float[Array, " v"]
    validation_targets: Float[Array, " v"]

    def predict(self, y: Network, inputs: Float[Array, " m"]) -> Float[Array, " m"]:
        """The outputs of the network at some inputs."""
        hidden = inputs[:, None] * y["hidden_weights"][None, :]
        hidden = hidden + y["hidden_biases"][None, :]
        return jax.nn.relu(hidden) @ y["weights"] + y["bias"]

    def inner_residual(self, x, y):
        return self.predict(y, self.inputs) - x

    def outer(self, x, y):
        error = self.predict(y, self.validation_inputs) - self.validation_targets
        return 0.5 * jnp.sum(error**2)


@typechecked
def anti_distillation_network(
    key: PRNGKeyArray,
    *,
    width: int = 10,
    num_points: int = 13,
    interval: tuple[float, float] = (-2.0, 2.0),
    validation_inputs: Float[Array, " v"] | None = None,
    validation_targets: Float[Array, " v"] | None = None,
) -> tuple[AntiDistillationNetwork, Array, Network]:
    r"""Anti-distillation by a network.

    The paper gives neither the interval of the inputs nor the initial weights. The
    weights here are LeCun-normal, with zero biases. At the paper's rate of 1e-2, gradient
    descent is stable on the default interval, and close to its limit on $[-3, 3]$.

    **Arguments:**

    - `key`: a key for the initial weights.
    - `width`: the number of hidden units.
    - `num_points`, `interval`, `validation_inputs`, `validation_targets`: as for
        [`bilevel_eqx.tasks.anti_distillation`][].

    **Returns:**

    A tuple of the problem, the initial targets, which are zero, and the initial weights.
    """
    inputs = jnp.linspace(*interval, num_points)
    if validation_inputs is None:
        validation_inputs = jnp.zeros(1, inputs.dtype)
    if validation_targets is None:
        validation_targets = jnp.full(validation_inputs.shape, 2.0, inputs.dtype)
    problem = AntiDistillationNetwork(inputs, validation_inputs, validation_targets)
    hidden_key, key = jr.split(key)
    y0 = {
        "hidden_weights": jr.normal(hidden_key, (width,)),
        "hidden_biases": jnp.zeros(width),
        "weights": jr.normal(key, (width,)) / jnp.sqrt(jnp.asarray(width, inputs.dtype)),
        "bias": jnp.zeros(()),
    }
    return problem, jnp.zeros(num_points, inputs.dtype), y0


#
# The closed form. An approximation of the inverse Hessian is a filter m of its
# eigenvalues s, and the response Jacobian is J = m(H) Phi^T.
#

Filter = Callable[[Float[Array, " r"]], Float[Array, " r"]]


def neumann_filter(num_terms: ScalarLike, step_size: ScalarLike) -> Filter:
    r"""The filter of K Neumann terms or K unrolled steps,
    $m_K(s) = (1 - (1 - \alpha s)^K) / s$.

    **Arguments:**

    - `num_terms`: $K$.
    - `step_size`: $\alpha$, with $0 < \alpha s < 1$ for every eigenvalue $s$.

    **Returns:**

    A function of the eigenvalues.
    """

    def filter(s):
        # Without cancellation if alpha s is small.
        return -jnp.expm1(num_terms * jnp.log1p(-jnp.asarray(step_size) * s)) / s

    return filter


def proximal_filter(epsilon: ScalarLike) -> Filter:
    r"""The filter of the proximal response, $m_\epsilon(s) = 1 / (s + \epsilon)$.

    **Arguments:**

    - `epsilon`: $\epsilon$.

    **Returns:**

    A function of the eigenvalues.
    """
    return lambda s: 1 / (s + epsilon)


def pseudoinverse_filter() -> Filter:
    r"""The filter of the pseudoinverse, $m(s) = 1 / s$: the limit of the other two."""
    return lambda s: 1 / s


@typechecked
def fixed_point(
    problem: AntiDistillation, filter: Filter
) -> tuple[Float[Array, " p"], Float[Array, " n"]]:
    r"""The limit of gradient descent on the targets, from zero:

    $$\lambda^* = G (\Phi_v \Phi^+ G)^{-1} t, \qquad w^* = \Phi^+ \lambda^*, \qquad
    G = J^\top \Phi_v^\top, \quad J = m(\Phi^\top \Phi) \Phi^\top.$$

    With any optimiser that moves along the gradients, the targets stay in the range of G.
    The inner solution is the one of least norm.

    **Arguments:**

    - `problem`: the anti-distillation problem.
    - `filter`: $m$, a function of the nonzero eigenvalues of $\Phi^\top \Phi$.

    **Returns:**

    The targets $\lambda^*$ and the weights $w^*$.
    """
    left, values, right = jnp.linalg.svd(problem.features, full_matrices=False)
    eps = jnp.finfo(values.dtype).eps
    rank_mask = values > eps * max(problem.features.shape) * values[0]
    safe = jnp.where(rank_mask, values, 1)

    # In the basis of the singular vectors: J^T = left (m s) right^T.
    jacobian_t = jnp.where(rank_mask, filter(safe**2) * safe, 0)
    inverse = jnp.where(rank_mask, 1 / safe, 0)
    validation = right @ problem.validation_features.T
    G = jacobian_t[:, None] * validation
    response = (validation * inverse[:, None]).T @ G
    coordinates = G @ jnp.linalg.solve(response, problem.validation_targets)
    return left @ coordinates, right.T @ (inverse * coordinates)
