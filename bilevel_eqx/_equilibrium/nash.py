"""The Nash equilibrium."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._depends_on import depends_on
from .._linalg.trust_region import possible_decrease
from .._problem.constraints import AbstractSet, set_x, set_y, Unconstrained
from .._tree import tree_norm, tree_struct
from .base import AbstractEquilibrium, Certificate, inner_residual, outer_residual


class Nash(AbstractEquilibrium):
    r"""The Nash equilibrium: no player gains by moving alone,

    $$x \in \operatorname{argmin}_{x'} F(x', y), \qquad
    y \in \operatorname{argmin}_{y'} f(x, y').$$

    The outer player treats y as constant, so that the response of y to x does not matter.
    If F does not contain x, the condition on x is empty.

    ??? cite "Reference"

        Nash, *Non-cooperative games*, 1951.
    """

    warm: ClassVar[bool] = True
    admits_constraints: ClassVar[bool] = True

    def certify(self, problem, x, y, y0):
        value, outer_x = jax.value_and_grad(problem.outer)(x, y)
        inner, inner_y = jax.value_and_grad(problem.inner, argnums=1)(x, y)
        silent = not depends_on(lambda x: problem.outer(x, y), x)
        return Certificate(
            "a Nash equilibrium",
            {
                **inner_residual(problem, x, y, inner, inner_y),
                "inner gap": (
                    gap(lambda y: problem.inner(x, y), y, set_y(problem)),
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
                    gap(lambda x: problem.outer(x, y), x, set_x(problem)),
                    "x gains nothing by moving, to second order",
                ),
            },
            notes=("F does not contain x: every x is equally good",) if silent else (),
        )


def gap(
    objective: Callable[[PyTree], Scalar],
    variables: PyTree[Array],
    within: AbstractSet = Unconstrained(),
    hessian: lx.AbstractLinearOperator | None = None,
) -> Scalar:
    r"""What a player could gain by moving alone: the decrease of the quadratic model of
    its objective within $\|s\| \le \max(1, \|v\|)$, relative to the objective.

    It is zero iff the gradient vanishes and no curvature is negative. If the player is
    confined to a set, these are the gradient and the curvature restricted to that set.
    """
    value, gradient = jax.value_and_grad(objective)(variables)
    if hessian is None:
        _, product = jax.linearize(jax.grad(objective), variables)
        structure = tree_struct(variables)
        hessian = lx.FunctionLinearOperator(product, structure, lx.symmetric_tag)
    at = within.stationarity(gradient, hessian, variables)
    radius = jnp.maximum(1, tree_norm(variables))
    gain = possible_decrease(at.hessian, at.residual, radius)
    return jnp.maximum(0, gain) / jnp.maximum(1, jnp.abs(value))
