"""Does one thing depend on another?"""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from ._compat import is_literal, traced_once
from ._tree import Rest, tree_arrays, tree_joined, tree_rest


def depends_on(fn: Callable[[PyTree], PyTree], at: PyTree[Array]) -> bool:
    """Whether the derivative of `fn` at `at` can be nonzero.

    This reads the program of the Jacobian-vector product, and looks for a path from its
    input to its output. It runs nothing, so it works while tracing. It notices
    `stop_gradient`, casts to integers and unused arguments.
    """

    def tangent_map(tangent):
        return jax.jvp(fn, (at,), (tangent,))[1]

    return _leads_through(jax.make_jaxpr(tangent_map)(at).jaxpr, at)


def last_argument_matters(fn: Callable, *arguments: Any) -> bool:
    """Whether `fn(*arguments)` depends on the last one, in the sense of `depends_on`.

    For a function of a module, which is asked again and again in one program: JAX keeps
    what it has traced.
    """
    arrays, rest = tree_arrays(arguments), tree_rest(arguments)
    program, _ = traced_once(_tangents, (fn, rest), arrays, arguments[-1])
    return _leads_through(program.jaxpr, arguments[-1])


@ft.partial(jax.jit, static_argnums=0)
def _tangents(known: tuple[Callable, Rest], arrays: list, tangent: PyTree[Array]):
    fn, rest = known
    *others, at = tree_joined(arrays, rest)
    return jax.jvp(ft.partial(fn, *others), (at,), (tangent,))[1]


def _leads_through(jaxpr: Any, last: PyTree[Array]) -> bool:
    """Whether a path leads from the last input, which is like `last`, to an output."""
    num_inputs = len(jax.tree.leaves(last))
    reached = set(jaxpr.invars[len(jaxpr.invars) - num_inputs :])

    def is_reached(variable):
        # Literals are constants and not hashable.
        return not is_literal(variable) and variable in reached

    for equation in jaxpr.eqns:
        if any(is_reached(v) for v in equation.invars):
            reached.update(equation.outvars)
    return any(is_reached(v) for v in jaxpr.outvars)
