"""The Stackelberg equilibrium."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._arguments import is_traced
from .._derivatives.first import outer_gradients
from .._derivatives.second import cross_derivative_operator, gradient_and_hessian
from .._linalg.eigenbasis import eigenbasis
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._solution_set.tangent import SolutionSet
from .._tree import nonzero, tree_size, tree_sub
from .base import AbstractEquilibrium, Certificate, inner_residual, outer_residual


class Stackelberg(AbstractEquilibrium):
    r"""The Stackelberg equilibrium of a problem whose inner minimum is unique:

    $$\nabla_y f = 0, \qquad H \succ 0, \qquad F_x - B^\top H^{-1} F_y = 0.$$

    To ask for it is to claim that there is nothing to select. The certificate checks
    the curvature that makes it so; where H is singular the problem is refused, since
    then [`bilevel_eqx.Optimistic`][], [`bilevel_eqx.ColdStart`][] and the others differ.

    ??? cite "Reference"

        von Stackelberg, *Marktform und Gleichgewicht*, 1934.
    """

    warm: ClassVar[bool] = True
    admits_constraints: ClassVar[bool] = True

    def check(self, problem, x, y):
        if problem.project_y is not None:
            # What is flat without the constraints need not be so where they are active.
            return
        count = _too_few_squares(problem, x, y)
        if count is not None:
            why = f"its inner objective is a sum of {count[0]} squares of {count[1]}"
            raise _singular(f"{why} variables")
        lowest, largest = _extreme_eigenvalues(problem, x, y)
        if is_traced(lowest):
            return
        # If some are negative y is not a minimum yet, and only the answer can tell.
        if abs(lowest) <= _threshold(largest):
            raise _singular(
                "the eigenvalues of the inner Hessian at (x0, y0) lie between "
                f"{float(lowest):.2g} and {float(largest):.2g}"
            )

    def certify(self, problem, x, y, y0):
        S = SolutionSet(problem, x, y)
        value, outer_x, outer_y = outer_gradients(problem, x, y)
        B = cross_derivative_operator(problem, x, y)
        outer_y = S.at.along(outer_y)
        hypergradient = tree_sub(outer_x, S.at.cross(B).T.mv(S.pinv(outer_y)))
        values = eigenbasis(S.at.stiffened()).values
        lowest, largest = jnp.min(values), jnp.max(jnp.abs(values))
        threshold = _threshold(largest)
        share = lowest / nonzero(threshold)
        return Certificate(
            "a Stackelberg equilibrium",
            {
                **inner_residual(problem, x, y),
                "uniqueness": (
                    1 - jnp.clip(share, 0, 1),
                    "there is no other inner minimum nearby: H is positive definite",
                ),
                **outer_residual(
                    problem,
                    x,
                    hypergradient,
                    value,
                    "x is stationary: F_x - B^T H^-1 F_y = 0",
                ),
            },
            accuracy=S.accuracy(outer_y),
        )


def _threshold(largest):
    """Below this an eigenvalue cannot be told from zero."""
    return 100 * jnp.finfo(largest.dtype).eps * largest


def _too_few_squares(problem, x, y) -> tuple[int, int] | None:
    """The numbers of squares and of variables, if there are fewer squares."""
    if not isinstance(problem, AbstractLeastSquaresProblem):
        return None
    residual = jax.eval_shape(problem.inner_residual, x, y)
    count = tree_size(residual), tree_size(y)
    return count if count[0] < count[1] else None


@eqx.filter_jit
def _extreme_eigenvalues(problem, x, y):
    _, H = gradient_and_hessian(problem, x, y)
    values = eigenbasis(H).values
    return jnp.min(values), jnp.max(jnp.abs(values))


def _singular(why: str) -> ValueError:
    return ValueError(
        "A `Stackelberg` equilibrium needs a unique inner minimum, but the inner Hessian "
        f"of this problem is singular: {why}. Say which of many inner minima is meant "
        "(`Optimistic()`, `Pessimistic(radius)`, `ColdStart()`, `WarmStart()`), or make "
        "it unique with a penalty on y."
    )
