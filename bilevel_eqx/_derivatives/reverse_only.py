"""A problem whose second derivatives take only reverse mode."""

from collections.abc import Callable

import jax
from jaxtyping import PyTree

from .._problem.base import AbstractBilevelProblem, BilevelProblem
from .._tree import tree_dot


def reverse_only(problem: AbstractBilevelProblem) -> AbstractBilevelProblem:
    """The same problem. Its first and second derivatives can be taken in both modes, also
    where a function in it has a rule for reverse mode alone (`jax.custom_vjp`)."""
    return BilevelProblem(
        _reverse_only(problem.outer),
        _reverse_only(problem.inner),
        project_x=problem.project_x,
        project_y=problem.project_y,
    )


def _reverse_only(fn: Callable) -> Callable:
    plain_gradient = jax.grad(fn, argnums=(0, 1))

    @jax.custom_jvp
    def objective(x, y):
        return fn(x, y)

    @jax.custom_jvp
    def gradient(x, y):
        return plain_gradient(x, y)

    @objective.defjvp
    def _(primals: PyTree, tangents: PyTree):
        return fn(*primals), tree_dot(gradient(*primals), tangents)

    @gradient.defjvp
    def _(primals: PyTree, tangents: PyTree):
        # The Hessian is symmetric: its transpose, which is reverse mode, is itself.
        value, product = jax.vjp(plain_gradient, *primals)
        return value, product(tangents)

    return objective
