r"""The worst inner minimum in a convex set that is known by its projection alone.

Nothing is known there of tangent spaces: a minimum may lie on the boundary of the set. So
the inner objective is a penalty, whose weight makes its error negligible:

$$\phi_\rho(x) = \max_{y \in Y} \bigl(F(x, y) - \rho f(x, y)\bigr) +
\rho \min_{z \in Y} f(x, z).$$
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from ._misc import (
    largest_curvature,
    nonzero,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_sub,
)
from ._problem import AbstractBilevelProblem


_MAX_STEPS = 200_000


def projected_minimum(
    fn: Callable[[PyTree[Array]], Scalar],
    start: PyTree[Array],
    projection: Callable[[PyTree[Array]], PyTree[Array]],
) -> PyTree[Array]:
    """The minimum of a convex function in a convex set, by accelerated projected
    gradient steps (Beck and Teboulle's, restarted where momentum leads uphill)."""
    dtype = tree_dtype(start)
    eps = float(jnp.finfo(dtype).eps)
    curvature = largest_curvature(fn, start)
    step_size = (0.9 / nonzero(curvature)).astype(dtype)
    slope = jax.grad(fn)

    def unfinished(carry):
        count, _, _, _, length, size = carry
        return (length > 10 * eps * size) & (count < _MAX_STEPS)

    def step(carry):
        count, y, ahead, momentum, _, _ = carry
        new_y = projection(tree_axpy(-step_size, slope(ahead), ahead))
        move = tree_sub(new_y, y)
        uphill = tree_dot(tree_sub(ahead, new_y), move) > 0
        grown = 0.5 * (1 + jnp.sqrt(1 + 4 * momentum**2))
        share = jnp.where(uphill, 0, (momentum - 1) / grown)
        new_ahead = tree_axpy(share, move, new_y)
        # How far a plain step would go from here: zero only at the minimum.
        length = tree_norm(tree_sub(new_y, ahead))
        momentum = jnp.where(uphill, 1, grown)
        return count + 1, new_y, new_ahead, momentum, length, tree_norm(new_y)

    one, largest = jnp.ones((), dtype), jnp.asarray(jnp.inf, dtype)
    start = projection(start)
    carry = jnp.array(0), start, start, one, largest, one
    return jax.lax.while_loop(unfinished, step, carry)[1]


class PenalisedWorst(eqx.Module):
    r"""$\phi_\rho(x)$, where it is attained, and its gradient by Danskin's theorem."""

    y: PyTree[Array]
    value: Scalar
    gradient: PyTree[Array]


def penalised_worst(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    projection: Callable[[PyTree[Array]], PyTree[Array]],
    weight: ScalarLike,
) -> PenalisedWorst:
    r"""$\phi_\rho$ at x, searched from y; `weight` is $\rho$ relative to the ratio of the
    curvatures of F and f in y."""
    inner = largest_curvature(lambda y: problem.inner(x, y), y)
    outer = largest_curvature(lambda y: problem.outer(x, y), y)
    rho = weight * outer / nonzero(inner)

    def penalised(y):
        # Divided by the weight, so that it is of the size of f.
        return problem.inner(x, y) - problem.outer(x, y) / rho

    z = projected_minimum(lambda z: problem.inner(x, z), y, projection)
    worst = projected_minimum(penalised, z, projection)

    def total(x):
        gap = problem.inner(x, worst) - problem.inner(x, z)
        return problem.outer(x, worst) - rho * gap

    value, gradient = jax.value_and_grad(total)(x)
    return PenalisedWorst(worst, value, gradient)
