"""The Nash equilibrium."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import lineax as lx

from .._depends_on import depends_on
from .._linalg.trust_region import possible_decrease
from .._problem.constraints import projection_x, projection_y
from .._solution_set.stationarity import confined
from .._tree import tree_norm, tree_struct
from .base import AbstractEquilibrium, Certificate, inner_residual, outer_residual


class Nash(AbstractEquilibrium):
    r"""The Nash equilibrium: neither player gains by moving alone,

    $$x \in \operatorname{argmin}_{x'} F(x', y), \qquad
    y \in \operatorname{argmin}_{y'} f(x, y').$$

    The outer player takes y as given, so that the response of y to x plays no part.
    Where F does not contain x its condition is empty.

    ??? cite "Reference"

        Nash, *Non-cooperative games*, 1951.
    """

    warm: ClassVar[bool] = True
    admits_constraints: ClassVar[bool] = True

    def certify(self, problem, x, y, y0):
        value, outer_x = jax.value_and_grad(problem.outer)(x, y)
        silent = not depends_on(lambda x: problem.outer(x, y), x)
        return Certificate(
            "a Nash equilibrium",
            {
                **inner_residual(problem, x, y),
                "inner gap": (
                    gap(lambda y: problem.inner(x, y), y, projection_y(problem)),
                    "y gains nothing by moving, to second order",
                ),
                **outer_residual(
                    problem,
                    x,
                    outer_x,
                    value,
                    "x is stationary at this y: F_x = 0",
                ),
                "outer gap": (
                    gap(lambda x: problem.outer(x, y), x, projection_x(problem)),
                    "x gains nothing by moving, to second order",
                ),
            },
            notes=("F does not contain x: every x is as good",) if silent else (),
        )


def gap(objective, variables, project=None, hessian=None):
    r"""What a player could gain by moving alone: the decrease of the quadratic model of
    its objective within $\|s\| \le \max(1, \|v\|)$, relative to the objective.

    Zero iff the gradient vanishes and no curvature is negative. Where the player is
    confined to a set: the gradient and the curvature that are left to it there.
    """
    value, gradient = jax.value_and_grad(objective)(variables)
    if hessian is None:
        _, product = jax.linearize(jax.grad(objective), variables)
        structure = tree_struct(variables)
        hessian = lx.FunctionLinearOperator(product, structure, lx.symmetric_tag)
    if project is not None:
        gradient, hessian, *_ = confined(gradient, hessian, variables, project)
    radius = jnp.maximum(1, tree_norm(variables))
    gain = possible_decrease(hessian, gradient, radius)
    return jnp.maximum(0, gain) / jnp.maximum(1, jnp.abs(value))
