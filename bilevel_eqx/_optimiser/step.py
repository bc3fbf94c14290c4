"""One step of an optax optimiser."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import optax
from jaxtyping import Array, PyTree, Scalar

from .._compat import primitives
from .._tree import tree_cast, tree_dot, tree_sub


def optimiser_step(
    optimiser: Any,
    variables: PyTree[Array],
    state: Any,
    *,
    value: Scalar,
    gradient: PyTree[Array],
    value_fn: Callable[[PyTree[Array]], Scalar],
    project: Callable[[PyTree[Array]], PyTree[Array]],
) -> tuple[PyTree[Array], Any]:
    """One step of an optax optimiser, which is given all that any of them asks for; and
    the projection on the set that the variables live in."""
    # Optax relies on promotion, which the user's own code may have forbidden.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        update = optax.with_extra_args_support(optimiser).update
        given = {"value": value, "grad": gradient, "value_fn": value_fn}
        try:
            updates, state = update(gradient, state, variables, **given)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            # `optax.contrib.sam` refuses all but this one, which others refuse.
            given = {"grad_fn": lambda at, _: jax.grad(value_fn)(at)}
            updates, state = update(gradient, state, variables, **given)
        variables = optax.apply_updates(variables, updates)
    return project(variables), state


def descend(
    optimiser: Any,
    fn: Callable[[PyTree[Array]], Scalar],
    at: tuple[PyTree[Array], Any],
    project: Callable[[PyTree[Array]], PyTree[Array]],
) -> tuple[tuple[PyTree[Array], Any], Scalar, PyTree[Array]]:
    """A step on a function, from variables and a state of the optimiser to others, which
    a loop can carry; and the value and the gradient before the step."""
    variables, state = at
    value, gradient = jax.value_and_grad(fn)(variables)
    variables, new = optimiser_step(
        optimiser,
        variables,
        state,
        value=value,
        gradient=gradient,
        value_fn=fn,
        project=project,
    )
    state = jtu.tree_map(
        lambda u, v: u.astype(v.dtype) if eqx.is_array(v) else u, new, state
    )
    return (variables, state), value, gradient


def searches(optimiser: Any, variables: PyTree[Array], state: Any) -> bool:
    """Whether a step of an optax optimiser has a loop of unknown length, as a line search
    has."""
    dynamic, static = eqx.partition(state, eqx.is_array)

    def step(variables, dynamic):
        new, _ = optimiser_step(
            optimiser,
            variables,
            eqx.combine(dynamic, static),
            value=tree_dot(variables, variables),
            gradient=variables,
            # Not the user's objective, in which there may be a loop too.
            value_fn=lambda v: tree_dot(v, v),
            project=lambda v: v,
        )
        return new

    return "while" in primitives(jax.make_jaxpr(step)(variables, dynamic).jaxpr)


def first_order(value: Scalar, gradient: PyTree, x: PyTree, at: PyTree) -> Scalar:
    """`value` at `at`, as a function of x whose derivative there is `gradient`."""
    change = tree_dot(gradient, tree_sub(tree_cast(x, at), at))
    return value + change.astype(value.dtype)
