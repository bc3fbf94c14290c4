"""Does one thing depend on another?"""

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree

from ._compat import is_literal


def depends_on(fn: Callable[[PyTree], PyTree], at: PyTree[Array]) -> bool:
    """Whether the derivative of `fn` at `at` can be nonzero.

    This reads the program of the Jacobian-vector product, and looks for a path from its
    input to its output. It runs nothing, so it works while tracing. It notices
    `stop_gradient`, casts to integers and unused arguments.
    """

    def tangent_map(tangent):
        return jax.jvp(fn, (at,), (tangent,))[1]

    jaxpr = jax.make_jaxpr(tangent_map)(at).jaxpr
    reached = set(jaxpr.invars)

    def is_reached(variable):
        # Literals are constants and not hashable.
        return not is_literal(variable) and variable in reached

    for equation in jaxpr.eqns:
        if any(is_reached(v) for v in equation.invars):
            reached.update(equation.outvars)
    return any(is_reached(v) for v in jaxpr.outvars)
