"""First derivatives of the objectives."""

import jax
from jaxtyping import Array, PyTree, Scalar

from .._problem.base import AbstractBilevelProblem


def outer_gradients(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> tuple[Scalar, PyTree[Array], PyTree[Array]]:
    """The outer objective and its partial gradients: F, F_x, F_y."""
    value, (outer_x, outer_y) = jax.value_and_grad(problem.outer, argnums=(0, 1))(x, y)
    return value, outer_x, outer_y


def inner_gradient(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> PyTree[Array]:
    """The gradient of the inner objective in the inner variables, f_y."""
    return jax.grad(problem.inner, argnums=1)(x, y)
