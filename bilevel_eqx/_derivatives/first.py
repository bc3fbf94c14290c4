"""First derivatives of the objectives."""

import jax
from jaxtyping import Array, PyTree, Scalar

from .._problem.base import AbstractBilevelProblem
from .._problem.root import AbstractRootProblem


def outer_gradients(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> tuple[Scalar, PyTree[Array], PyTree[Array]]:
    """The outer objective and its partial gradients: F, F_x, F_y."""
    value, (outer_x, outer_y) = jax.value_and_grad(problem.outer, argnums=(0, 1))(x, y)
    return value, outer_x, outer_y


def inner_gradient(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> PyTree[Array]:
    """What is zero at an inner solution: the gradient f_y; or r, if that is a root."""
    if isinstance(problem, AbstractRootProblem):
        return problem.root(x, y)
    return jax.grad(problem.inner, argnums=1)(x, y)
