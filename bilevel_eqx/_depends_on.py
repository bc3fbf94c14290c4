"""Does one thing depend on another?"""

from collections.abc import Callable

import jax
import jax.core
import jax.extend as jex
from jaxtyping import Array, PyTree


def depends_on(fn: Callable[[PyTree], PyTree], at: PyTree[Array]) -> bool:
    """Whether the derivative of `fn` at `at` can be anything but zero.

    This reads the program of the Jacobian-vector product and asks whether its output
    is reached from its input. It runs nothing, so it can be asked while tracing; it
    sees through `stop_gradient`, casts to integers and unused arguments.
    """

    def tangent_map(tangent):
        return jax.jvp(fn, (at,), (tangent,))[1]

    jaxpr = jax.make_jaxpr(tangent_map)(at).jaxpr
    reached = set(jaxpr.invars)

    def is_reached(variable):
        # Literals are constants, and not hashable.
        return not isinstance(variable, jex.core.Literal) and variable in reached

    for equation in jaxpr.eqns:
        if any(is_reached(v) for v in equation.invars):
            reached.update(equation.outvars)
    return any(is_reached(v) for v in jaxpr.outvars)
