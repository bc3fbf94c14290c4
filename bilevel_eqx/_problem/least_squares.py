"""Bilevel problems whose inner objective is a sum of squares."""

import abc
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, PyTree, Scalar

from .._custom_types import X, Y
from .._tree import tree_dot
from .base import AbstractBilevelProblem


class AbstractLeastSquaresProblem(AbstractBilevelProblem[X, Y]):
    r"""A bilevel problem whose inner objective is a sum of squares,

    $$f(x, y) = \tfrac12 \|r(x, y)\|^2.$$

    Pseudoinverses then work on the Jacobian of the residual $r$ and never on the inner
    Hessian, whose condition number is the square of the Jacobian's.
    """

    @abc.abstractmethod
    def inner_residual(self, x: X, y: Y) -> PyTree[Array]:
        """The residual $r(x, y)$.

        **Returns:**

        A pytree of floating-point arrays.
        """

    def inner(self, x: X, y: Y) -> Scalar:
        residual = self.inner_residual(x, y)
        return 0.5 * tree_dot(residual, residual)


class LeastSquaresProblem(AbstractLeastSquaresProblem[X, Y]):
    """A bilevel problem whose inner objective is a sum of squares, made from two
    functions."""

    outer_fn: Callable[[X, Y], Scalar]
    inner_residual_fn: Callable[[X, Y], PyTree[Array]]
    project_x: Callable[[X], X] | None
    project_y: Callable[[Y], Y] | None

    def __init__(
        self,
        outer: Callable[[Any, Any], Any],
        inner_residual: Callable[[Any, Any], Any],
        *,
        project_x: Callable[[Any], Any] | None = None,
        project_y: Callable[[Any], Any] | None = None,
    ):
        """**Arguments:**

        - `outer`: the outer objective, a function of `(x, y)` with a scalar value.
        - `inner_residual`: a function of `(x, y)` that returns a pytree of floating-point
            arrays. The inner objective is half the sum of their squares.
        - `project_x`, `project_y`: as for [`bilevel_eqx.BilevelProblem`][].
        """
        self.outer_fn = outer
        self.inner_residual_fn = inner_residual
        self.project_x = project_x
        self.project_y = project_y

    def outer(self, x, y):
        return self.outer_fn(x, y)

    def inner_residual(self, x, y):
        return self.inner_residual_fn(x, y)
