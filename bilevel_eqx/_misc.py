"""Arithmetic on pytrees, and the checks that public functions make of their inputs."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.core
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree, Scalar, ScalarLike


#
# Arithmetic. Every scalar is cast to the type of the leaf that it meets, so that no
# result depends on whether 64-bit types are enabled.
#


def tree_dot(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    """The inner product of two pytrees of the same structure."""
    dtype = tree_dtype(a)
    products = jtu.tree_map(lambda u, v: jnp.sum(u * v).astype(dtype), a, b)
    return sum(jtu.tree_leaves(products), start=jnp.zeros((), dtype))


def tree_norm(a: PyTree[Array]) -> Scalar:
    """The two-norm of a pytree. Its derivative at zero is zero, not NaN."""
    square = tree_dot(a, a)
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def tree_max(a: PyTree[Array]) -> Scalar:
    """The largest absolute value in a pytree."""
    largest = jnp.zeros((), tree_dtype(a))
    for leaf in jtu.tree_leaves(a):
        if leaf.size > 0:
            largest = jnp.maximum(largest, jnp.max(jnp.abs(leaf)).astype(largest.dtype))
    return largest


def tree_scale(scale: ScalarLike, a: PyTree[Array]) -> PyTree[Array]:
    """`scale * a`, in the types of `a`."""
    return jtu.tree_map(lambda u: jnp.asarray(scale, u.dtype) * u, a)


def tree_axpy(scale: ScalarLike, a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """`scale * a + b`, in the types of `b`."""
    return jtu.tree_map(
        lambda u, v: jnp.asarray(scale, v.dtype) * u.astype(v.dtype) + v, a, b
    )


def tree_draw_in(
    a: PyTree[Array], center: PyTree[Array], radius: ScalarLike
) -> PyTree[Array]:
    """The point of a ball next to `a`."""
    way = tree_sub(a, center)
    length = tree_norm(way)
    radius = jnp.asarray(radius, length.dtype)
    share = jnp.where(length > radius, radius / nonzero(length), 1)
    return tree_axpy(share, way, center)


def tree_cast(a: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    """`a`, in the types of `like`."""
    return jtu.tree_map(lambda u, v: u.astype(v.dtype), a, like)


def tree_sub(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """`a - b`."""
    return jtu.tree_map(jnp.subtract, a, b)


def tree_where(pred: Bool[Array, ""], a: Any, b: Any) -> Any:
    """`a` where `pred` holds and `b` elsewhere; whatever is not an array is `a`'s."""
    dynamic_a, static = eqx.partition(a, eqx.is_array)
    dynamic_b, _ = eqx.partition(b, eqx.is_array)
    chosen = jtu.tree_map(lambda u, v: jnp.where(pred, u, v), dynamic_a, dynamic_b)
    return eqx.combine(chosen, static)


def nonzero(divisor: Array) -> Array:
    """The divisor, or one where it is zero: for quotients that are then zero too."""
    return jnp.where(divisor == 0, 1, divisor)


def tree_zeros_like(a: PyTree) -> PyTree[Array]:
    """Zeros of the structure of `a`, which may be of arrays or of their shapes."""
    return jtu.tree_map(lambda u: jnp.zeros(u.shape, u.dtype), a)


def tree_waves(a: PyTree[Array]) -> PyTree[Array]:
    """A vector that is orthogonal to nothing in particular, without a random key."""
    return jtu.tree_map(
        lambda u: jnp.cos(1 + jnp.arange(u.size, dtype=u.dtype)).reshape(u.shape), a
    )


def tree_size(a: PyTree) -> int:
    """The number of scalars in `a`, which may be of arrays or of their shapes."""
    return sum(int(np.prod(u.shape)) for u in jtu.tree_leaves(a))


def tree_dtype(a: PyTree) -> Any:
    """The widest type among the leaves of `a`: the one that its scalars have."""
    # Not `jnp.result_type` of all leaves at once: strict promotion forbids mixtures.
    dtypes = [u.dtype for u in jtu.tree_leaves(a)]
    return max(dtypes, key=lambda d: jnp.finfo(d).nmant) if dtypes else jnp.float32


def tree_struct(a: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes and types of a pytree of arrays."""
    return jtu.tree_map(lambda u: jax.ShapeDtypeStruct(u.shape, u.dtype), a)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every floating-point array in `tree` is free of NaN and infinity."""
    leaves = [u for u in jtu.tree_leaves(tree) if eqx.is_inexact_array(u)]
    finite = jnp.asarray(True)
    for leaf in leaves:
        finite = finite & jnp.all(jnp.isfinite(leaf))
    return finite


def largest_curvature(fn: Callable[[PyTree], Scalar], at: PyTree[Array]) -> Scalar:
    """An estimate from below of the largest curvature of `fn`, by power iteration.

    For choosing a step size that will not diverge. It has no derivative.
    """
    at = jax.lax.stop_gradient(at)
    return largest_magnitude(jax.linearize(jax.grad(fn), at)[1], at)


def largest_magnitude(product: Callable[[PyTree], PyTree], like: PyTree[Array]) -> Scalar:
    """An estimate from below of the largest absolute eigenvalue of a symmetric map."""

    def multiply(vector, _):
        image = product(vector)
        size = tree_norm(image)
        return tree_scale(1 / nonzero(size), image), size

    start = tree_waves(like)
    start = tree_scale(1 / tree_norm(start), start)
    return jax.lax.scan(multiply, start, None, length=20)[1][-1]


DENSE_SIZE = 1024
"""Up to this size a matrix is decomposed; a larger one is only multiplied with."""


#
# Does one thing depend on another?
#


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


#
# Text
#


def aligned(rows: list[list[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        )
        for row in rows
    ]


#
# Checks of arguments
#


def is_traced(value: Any) -> bool:
    """Whether `value` is known only when the program runs."""
    return isinstance(value, jax.core.Tracer)


def as_rate(value: ScalarLike) -> Any:
    """Makes a rate a NumPy array, so that a new value does not compile anew.

    `eqx.filter_jit` takes Python floats as part of the program and arrays as data.
    NumPy's, because a JAX array at import would start JAX's backend.
    """
    return value if eqx.is_array(value) else np.asarray(value, dtype=np.float64)


def as_pytree(optimiser: Any) -> Any:
    """Makes an optax optimiser, which is a tuple of closures, a pytree.

    A learning rate that is an array is then data: it can be vmapped over, differentiated
    with respect to, and changed without compiling anew.
    """
    try:
        return eqxi.closure_to_pytree(optimiser)
    except (RecursionError, ValueError):
        # Some closures refer to themselves. They work as well, as part of the program.
        return optimiser


def optimiser_step(
    optimiser: Any,
    variables: PyTree[Array],
    state: Any,
    *,
    value: Scalar,
    gradient: PyTree[Array],
    value_fn: Callable[[PyTree[Array]], Scalar],
    project: Callable[[PyTree[Array]], PyTree[Array]] | None = None,
) -> tuple[PyTree[Array], Any]:
    """One step of an optax optimiser, which is given all that any of them asks for; and
    the projection on the set that the variables are confined to, if they are."""
    # Optax relies on promotion, which the user's own code may have forbidden.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state = optax.with_extra_args_support(optimiser).update(
            gradient, state, variables, value=value, grad=gradient, value_fn=value_fn
        )
        variables = optax.apply_updates(variables, updates)
    return variables if project is None else project(variables), state


def first_order(value: Scalar, gradient: PyTree, x: PyTree, at: PyTree) -> Scalar:
    """`value` at `at`, as a function of x whose derivative there is `gradient`."""
    change = tree_dot(gradient, tree_sub(tree_cast(x, at), at))
    return value + change.astype(value.dtype)


def check_positive(value: Any, name: str, owner: str, or_zero: bool = False) -> None:
    """Refuses a negative (or zero) rate, unless it is known only at run time."""
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


def check_type(value: Any, kind: Any, name: str, owner: str) -> None:
    """Refuses a part of the wrong kind where it is put in, and not where it is used."""
    if not isinstance(value, kind):
        raise ValueError(
            f"`{owner}({name}=...)` must be of type `{getattr(kind, '__name__', kind)}`; "
            f"it is {value!r}."
        )


def as_variables(tree: PyTree, name: str) -> PyTree[Array]:
    """Makes `tree` a pytree of floating-point arrays, or says which leaf is not one."""
    paths_and_leaves, treedef = jtu.tree_flatten_with_path(tree)
    if len(paths_and_leaves) == 0:
        raise ValueError(f"`{name}` has no arrays in it: there is nothing to optimise.")
    leaves = []
    for path, leaf in paths_and_leaves:
        where = f"`{name}{jtu.keystr(path)}`"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise ValueError(
                f"Every leaf of `{name}` must be a floating-point array, but {where} is "
                f"{leaf!r}, of type `{type(leaf).__name__}`. Wrap a number in "
                "`jnp.asarray(...)`; keep what is not optimised in the problem, or "
                "split it off with `eqx.partition(..., eqx.is_inexact_array)`."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"Every leaf of `{name}` must be a floating-point array, but {where} "
                f"has type {leaf.dtype}: there is no derivative with respect to it. "
                "Cast it with `.astype(float)` if it is to be optimised; otherwise keep "
                "it in the problem."
            )
        # A weak type would change once it has met data, and a loop's carry may not.
        leaves.append(jnp.asarray(leaf, dtype=jnp.asarray(leaf).dtype))
    return jtu.tree_unflatten(treedef, leaves)
