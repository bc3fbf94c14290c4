"""Arithmetic on pytrees."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Scalar, ScalarLike


#
# Arithmetic. Every scalar is cast to the type of its leaf, so that no result depends on
# whether 64-bit types are enabled.
#


def where(pred: Bool[Array, " *shape"], a: Any, b: Any) -> Array:
    """`jnp.where`, in one operation. That of JAX is a function of the program each time.

    `a`, `b` and `pred` are broadcast.
    """
    if not (isinstance(a, jax.Array) or isinstance(b, jax.Array)):
        # Of two numbers JAX makes one of a weak type.
        return jnp.where(pred, a, b)
    dtype = jnp.result_type(a, b)
    shape = jnp.broadcast_shapes(*(jnp.shape(u) for u in (pred, a, b)))
    if jnp.shape(pred) not in ((), shape):
        pred = jnp.broadcast_to(pred, shape)
    a, b = (jnp.broadcast_to(jnp.asarray(u, dtype), shape) for u in (a, b))
    return jax.lax.select(pred, a, b)


def tree_dot(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    """The inner product of two pytrees of the same structure."""
    dtype = tree_dtype(a)
    products = jtu.tree_map(lambda u, v: jnp.sum(u * v).astype(dtype), a, b)
    # Not `sum`: it starts from zero, which is one more operation to compile.
    return ft.reduce(jnp.add, jtu.tree_leaves(products) or [jnp.zeros((), dtype)])


def tree_norm(a: PyTree[Array]) -> Scalar:
    """The two-norm of a pytree. Its derivative at zero is zero, not NaN."""
    square = tree_dot(a, a)
    is_zero = square == 0
    return where(is_zero, 0, jnp.sqrt(where(is_zero, 1, square)))


def vector_norm(a: Float[Array, " n"]) -> Scalar:
    """The two-norm of a vector, in three operations. `jnp.linalg.norm` takes thirteen."""
    return jnp.sqrt(jnp.vdot(a, a))


def vector_norms(*vectors: Float[Array, " n"]) -> Float[Array, " k"]:
    """The two-norms of several vectors of one size, in the operations of one."""
    return jnp.sqrt(jnp.sum(jnp.square(jnp.stack(vectors)), axis=1))


def vector_dots(a: Float[Array, " n"], *others: Float[Array, " n"]) -> Float[Array, " k"]:
    """The inner products of a vector with several others.

    One product with a matrix compiles in less time than two inner products. But it sums
    in one go, and is less accurate than they are for long vectors.
    """
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(jnp.stack(others), a, precision=highest)


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


def project_on_ball(
    a: PyTree[Array], center: PyTree[Array], radius: ScalarLike
) -> PyTree[Array]:
    """The point of a ball nearest to `a`."""
    displacement = tree_sub(a, center)
    length = tree_norm(displacement)
    radius = jnp.asarray(radius, length.dtype)
    share = where(length > radius, radius / nonzero(length), 1)
    return tree_axpy(share, displacement, center)


def tree_cast(a: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    """`a`, in the types of `like`."""
    return jtu.tree_map(lambda u, v: u.astype(v.dtype), a, like)


def tree_sub(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """`a - b`."""
    return jtu.tree_map(jnp.subtract, a, b)


def tree_where(pred: Bool[Array, ""], a: Any, b: Any) -> Any:
    """`a` where `pred` holds and `b` elsewhere. Leaves other than arrays are from `a`."""
    dynamic_a, static = eqx.partition(a, eqx.is_array)
    dynamic_b, _ = eqx.partition(b, eqx.is_array)
    chosen = jtu.tree_map(lambda u, v: where(pred, u, v), dynamic_a, dynamic_b)
    return eqx.combine(chosen, static)


def nonzero(divisor: Array) -> Array:
    """The divisor, or one where it is zero. It is for quotients that are zero there."""
    return where(divisor == 0, 1, divisor)


def tree_zeros_like(a: PyTree) -> PyTree[Array]:
    """Zeros with the structure of `a`, whose leaves are arrays or their shapes."""
    return jtu.tree_map(lambda u: jnp.zeros(u.shape, u.dtype), a)


def tree_materialised(tangent: Any, like: Any) -> PyTree[Array]:
    """A tangent with zeros where Equinox has `None`."""
    return jtu.tree_map(
        lambda v, t: jnp.zeros(v.shape, v.dtype) if t is None else t, like, tangent
    )


def tree_waves(a: PyTree[Array]) -> PyTree[Array]:
    """A start vector for power iteration: generic, but without a random key."""
    return jtu.tree_map(
        lambda u: jnp.cos(1 + jnp.arange(u.size, dtype=u.dtype)).reshape(u.shape), a
    )


def tree_size(a: PyTree) -> int:
    """The number of scalars in `a`, whose leaves are arrays or their shapes."""
    return sum(int(np.prod(u.shape)) for u in jtu.tree_leaves(a))


def tree_bytes(a: PyTree) -> int:
    """The bytes of `a`, whose leaves are arrays or their shapes."""
    return sum(int(np.prod(u.shape)) * u.dtype.itemsize for u in jtu.tree_leaves(a))


def tree_dtype(a: PyTree) -> Any:
    """The widest type among the leaves of `a`, which is the type of its scalars."""
    # Not `jnp.result_type` of all leaves at once: strict promotion forbids mixtures.
    dtypes = [u.dtype for u in jtu.tree_leaves(a)]
    return max(dtypes, key=lambda d: jnp.finfo(d).nmant) if dtypes else jnp.float32


def tree_eps(a: PyTree) -> float:
    """The machine precision of the narrowest type among the leaves of `a`: numbers that
    are computed from all of them are no better."""
    return max(float(jnp.finfo(u.dtype).eps) for u in jtu.tree_leaves(a))


def widened(a: PyTree) -> PyTree:
    """`a` with its arrays of half precision in float32."""

    def widen(u):
        is_half = eqx.is_inexact_array(u) and jnp.finfo(u.dtype).bits < 32
        return u.astype(jnp.float32) if is_half else u

    return jtu.tree_map(widen, a)


def tree_struct(a: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes and types of a pytree of arrays."""
    return jtu.tree_map(lambda u: jax.ShapeDtypeStruct(u.shape, u.dtype), a)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every floating-point array in `tree` is free of NaN and infinity."""
    leaves = [u for u in jtu.tree_leaves(tree) if eqx.is_inexact_array(u)]
    if not leaves:
        return jnp.asarray(True)
    return ft.reduce(jnp.logical_and, map(_is_finite, leaves))


_LARGE = 2**14


def _is_finite(leaf: Array) -> Bool[Array, ""]:
    if leaf.ndim < 2 or leaf.size < _LARGE:
        return _entries_are_finite(leaf)
    # Sums of columns are a matrix product, which on a CPU is several times as fast. They
    # are finite only if all entries are; and if they are not, they may have overflown.
    sums = jnp.tensordot(jnp.ones(leaf.shape[0], leaf.dtype), leaf, 1)
    return jax.lax.cond(
        _entries_are_finite(sums),
        lambda: jnp.array(True),
        lambda: _entries_are_finite(leaf),
    )


def _entries_are_finite(leaf: Array) -> Bool[Array, ""]:
    # In the operations of lineax, which asks the same of what it is given: the compiler
    # then keeps one of the two.
    return jnp.invert(jnp.any(jnp.invert(jnp.isfinite(leaf))))


class Rest:
    """All of a pytree but its arrays: what a program of these arrays is fixed by.

    It is hashed once, and then compared by identity: to hash an optax optimiser, whose
    closures are compared by their source, takes milliseconds.
    """

    def __init__(self, treedef: Any, leaves: tuple, types: tuple[type, ...]):
        self.treedef = treedef
        self.leaves = leaves
        # Part of what tells one from another, since 1 == 1.0 == True.
        self.types = types


# The same object for what is equal.
_interned = ft.lru_cache(maxsize=128)(Rest)


def tree_rest(tree: PyTree) -> Rest:
    """All of `tree` but its arrays."""
    leaves, treedef = jtu.tree_flatten(tree)
    others = tuple(None if eqx.is_array(u) else u for u in leaves)
    parts = treedef, others, tuple(map(type, others))
    try:
        return _interned(*parts)
    except TypeError:  # something in it has no hash
        return Rest(*parts)


def tree_arrays(tree: PyTree) -> list:
    """The leaves of `tree`, with `None` in place of those that are no arrays."""
    return [u if eqx.is_array(u) else None for u in jtu.tree_leaves(tree)]


def tree_joined(arrays: list, rest: Rest) -> Any:
    """The tree with these `tree_arrays` and this `tree_rest`."""
    leaves = [u if v is None else v for u, v in zip(arrays, rest.leaves)]
    return jtu.tree_unflatten(rest.treedef, leaves)


class Layout:
    """How a pytree of arrays is laid out in one vector. It hashes by shapes and types.

    The vector has the widest type among the leaves. `jax.flatten_util.ravel_pytree`
    refuses leaves of several types where promotion is strict.
    """

    def __init__(self, tree: PyTree):
        self.leaves, self.treedef = jtu.tree_flatten(tree_struct(tree))
        self.dtype = tree_dtype(tree)
        self.size = tree_size(tree)

    def __hash__(self):
        return hash((tuple(self.leaves), self.treedef))

    def __eq__(self, other):
        return (self.leaves, self.treedef) == (other.leaves, other.treedef)

    def ravel(self, tree: PyTree[Array]) -> Float[Array, " n"]:
        """The entries of a pytree of this layout in one vector."""
        parts = [u.reshape(-1).astype(self.dtype) for u in jtu.tree_leaves(tree)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def unravel(self, flat: Float[Array, " n"]) -> PyTree[Array]:
        """The pytree of this layout whose entries are those of `flat`."""
        # Not slices: the transpose of each would be a whole vector of zeros around it.
        parts = jax.lax.split(flat, [leaf.size for leaf in self.leaves])
        leaves = [
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, self.leaves)
        ]
        return jtu.tree_unflatten(self.treedef, leaves)
