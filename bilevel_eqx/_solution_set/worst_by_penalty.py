r"""The worst inner minimum in a convex set that is known by its projection alone.

Nothing is known there of tangent spaces: a minimum may lie on the boundary of the set. So
the inner objective is a penalty, whose weight makes its error negligible:

$$\phi_\rho(x) = \max_{y \in Y} \bigl(F(x, y) - \rho f(x, y)\bigr) +
\rho \min_{z \in Y} f(x, z).$$
"""

from collections.abc import Callable

import equinox as eqx
import jax
import optimistix as optx
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from .._inner_solver.projected_gradient import ProjectedGradient
from .._linalg.power_iteration import largest_curvature
from .._problem.base import AbstractBilevelProblem
from .._tree import nonzero


def _minimum(fn, start: PyTree[Array], projection: Callable) -> PyTree[Array]:
    return optx.minimise(
        lambda y, args: fn(y),
        ProjectedGradient(_MAX_STEPS),
        start,
        options={"projection": projection},
        max_steps=None,
        throw=False,
    ).value


_MAX_STEPS = 200_000


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

    z = _minimum(lambda z: problem.inner(x, z), y, projection)
    worst = _minimum(penalised, z, projection)

    def total(x):
        gap = problem.inner(x, worst) - problem.inner(x, z)
        return problem.outer(x, worst) - rho * gap

    value, gradient = jax.value_and_grad(total)(x)
    return PenalisedWorst(worst, value, gradient)
