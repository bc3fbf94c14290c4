"""One step of an optax optimiser."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree, Scalar

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
        updates, state = optax.with_extra_args_support(optimiser).update(
            gradient, state, variables, value=value, grad=gradient, value_fn=value_fn
        )
        variables = optax.apply_updates(variables, updates)
    return project(variables), state


def first_order(value: Scalar, gradient: PyTree, x: PyTree, at: PyTree) -> Scalar:
    """`value` at `at`, as a function of x whose derivative there is `gradient`."""
    change = tree_dot(gradient, tree_sub(tree_cast(x, at), at))
    return value + change.astype(value.dtype)
