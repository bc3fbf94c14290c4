"""Checks and conversions of the arguments of public functions."""

from typing import Any, cast, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, ScalarLike

from ._compat import closure_to_pytree, is_traced


T = TypeVar("T")


def as_rate(value: ScalarLike) -> Any:
    """Makes a rate a NumPy array, so that a new value needs no new compilation.

    `eqx.filter_jit` takes Python floats as part of the program and arrays as data. It is
    a NumPy array, because a JAX array at import would start JAX's backend.
    """
    return value if eqx.is_array(value) else np.asarray(value, dtype=np.float64)


def as_pytree(optimiser: Any) -> Any:
    """Makes a pytree of an optax optimiser, which is a tuple of closures.

    A learning rate that is an array is then data: one can vmap over it, differentiate
    with respect to it, and change it without a new compilation.
    """
    try:
        return closure_to_pytree(optimiser)
    except (RecursionError, ValueError):
        # Some closures refer to themselves. They stay part of the program, which works.
        return optimiser


def check_positive(value: Any, name: str, owner: str, or_zero: bool = False) -> None:
    """Refuses a negative or zero rate. A traced rate passes."""
    if is_traced(value):
        return
    smallest_bad = np.min(np.asarray(value))
    if not (smallest_bad >= 0 if or_zero else smallest_bad > 0):
        wanted = "at least zero" if or_zero else "greater than zero"
        raise ValueError(f"`{owner}({name}=...)` must be {wanted}; it is {smallest_bad}.")


def check_count(value: Any, name: str, owner: str) -> None:
    """Refuses a count that is not a positive integer."""
    if is_traced(value):
        return
    is_integer = isinstance(value, int | np.integer) or (
        eqx.is_array_like(value) and np.issubdtype(np.asarray(value).dtype, np.integer)
    )
    if isinstance(value, bool) or not is_integer:
        raise ValueError(
            f"`{owner}({name}=...)` must be a positive integer; it is {value!r}."
        )
    smallest = np.min(np.asarray(value))
    if smallest < 1:
        raise ValueError(f"`{owner}({name}=...)` must be at least one; it is {smallest}.")


def as_count(value: T) -> T:
    """Makes a Python integer of an integer scalar of NumPy or JAX.

    `eqx.filter_jit` takes both of these as data, of which no shape can be made.
    """
    number: Any = value
    is_scalar = isinstance(number, jax.Array | np.ndarray | np.generic) and (
        number.ndim == 0 and jnp.issubdtype(number.dtype, jnp.integer)
    )
    return cast(T, int(number)) if is_scalar and not is_traced(number) else value


def check_key(key: Any, owner: str) -> None:
    """Refuses what is neither a random key nor `None`, such as a seed."""
    is_key = isinstance(key, jax.Array | np.ndarray) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if key is not None and not is_key:
        raise ValueError(
            f"`{owner}(key=...)` must be a random key, such as `jax.random.key(0)`; it "
            f"is {key!r}."
        )


def check_type(value: Any, kind: Any, name: str, owner: str) -> None:
    """Refuses a part of the wrong type where the user passes it, not where it is used."""
    if not isinstance(value, kind):
        raise ValueError(
            f"`{owner}({name}=...)` must be of type `{getattr(kind, '__name__', kind)}`; "
            f"it is {value!r}."
        )


def as_variables(tree: PyTree, name: str) -> PyTree[Array]:
    """Makes `tree` a pytree of floating-point arrays, or says which leaf is not one."""
    paths_and_leaves, treedef = jtu.tree_flatten_with_path(tree)
    if len(paths_and_leaves) == 0:
        raise ValueError(f"`{name}` contains no arrays: there is nothing to optimise.")
    leaves = []
    for path, leaf in paths_and_leaves:
        where = f"`{name}{jtu.keystr(path)}`"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise ValueError(
                f"Every leaf of `{name}` must be a floating-point array, but {where} is "
                f"{leaf!r}, of type `{type(leaf).__name__}`. Wrap a number in "
                "`jnp.asarray(...)`. Keep values that are not optimised in the problem, "
                "or split them off with `eqx.partition(..., eqx.is_inexact_array)`."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"Every leaf of `{name}` must be a floating-point array, but {where} "
                f"has type {leaf.dtype}: {_instead(leaf.dtype)}"
            )
        # A weak type changes when it meets data, but the carry of a loop may not change.
        leaves.append(jnp.asarray(leaf, dtype=jnp.asarray(leaf).dtype))
    return jtu.tree_unflatten(treedef, leaves)


def _instead(dtype: Any) -> str:
    """What to do with a leaf that is not of real numbers."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (
            "optimisation is over real numbers. Pass the real and the imaginary part as "
            "two leaves, and put them together in the objectives (`jax.lax.complex`)."
        )
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return "a random key cannot be optimised. Keep it in the problem."
    return (
        "there is no derivative with respect to it. Cast it with `.astype(float)` if it "
        "should be optimised; otherwise keep it in the problem."
    )


def says(part: Any, what: str, default: Any) -> Any:
    """The class attribute `what` of a part, or the default.

    Parts may come from other libraries, which do not have these attributes. A part that
    wraps another has the class attribute `speaks_for`, the name of its field for it, and
    says what that says, unless it says something itself.
    """
    field = getattr(type(part), "speaks_for", None)
    if field is not None and not hasattr(type(part), what):
        return says(getattr(part, field), what, default)
    return getattr(type(part), what, default)
