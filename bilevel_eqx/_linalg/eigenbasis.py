"""Eigenvalues and eigenvectors of symmetric operators.

A small operator is decomposed. For a large one these are Ritz values and vectors by
Lanczos' method, which describe the operator only within a Krylov space.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar, ScalarLike

from .._tree import (
    Layout,
    nonzero,
    tree_axpy,
    tree_dtype,
    tree_struct,
    tree_sub,
    tree_zeros_like,
    vector_norm,
    where,
)
from .decompositions import eigh, svd
from .power_iteration import DENSE_SIZE, largest_magnitude, NUM_STEPS
from .precision import in_full_precision


_LANCZOS_STEPS = 64


class Eigenbasis(eqx.Module):
    """Orthonormal vectors in which an operator is diagonal: all of them, or some."""

    values: Float[Array, " k"]
    vectors: Float[Array, "n k"]

    def coordinates(self, vector: PyTree[Array]) -> Float[Array, " k"]:
        flat, _ = jax.flatten_util.ravel_pytree(vector)
        return self.vectors.T @ flat

    def combine(self, coordinates: Float[Array, " k"], like: PyTree) -> PyTree[Array]:
        _, unravel = jax.flatten_util.ravel_pytree(tree_zeros_like(like))
        return unravel(self.vectors @ coordinates)


@in_full_precision
def eigenbasis(
    operator: lx.AbstractLinearOperator,
    start: PyTree[Array] | None = None,
    num_steps: int = _LANCZOS_STEPS,
) -> Eigenbasis:
    """The eigenvectors of a symmetric operator, or Ritz vectors of its Krylov space.

    That space starts from `start`, or from a random vector.
    """
    n = operator.in_size()
    if n <= DENSE_SIZE:
        values, vectors = eigh(operator.as_matrix())
        return Eigenbasis(values, vectors)
    dtype = tree_dtype(operator.in_structure())
    # Not `start` alone: eigenvectors orthogonal to it would be missed.
    first = jr.normal(jr.PRNGKey(0), (n,), dtype)
    if start is not None:
        flat, _ = jax.flatten_util.ravel_pytree(start)
        size = jnp.linalg.norm(flat)
        mix = jnp.sqrt(jnp.finfo(dtype).eps) / jnp.sqrt(jnp.asarray(n, dtype))
        first = where(size == 0, first, flat / size + mix * first)
    basis, values, rotation, _ = lanczos(operator, first, num_steps)
    return Eigenbasis(values, basis.T @ rotation)


def singular_values(
    operator: lx.AbstractLinearOperator, num_steps: int = _LANCZOS_STEPS
) -> Float[Array, " k"]:
    """The singular values of an operator, or Ritz values of them.

    The latter are roots of those of the square. So they count as zero below the root of
    machine precision, relative to the largest.
    """
    if operator.in_size() <= DENSE_SIZE:
        return svd(operator.as_matrix())[1]
    square = operator.T @ operator
    tagged = lx.TaggedLinearOperator(square, lx.symmetric_tag)
    values = eigenbasis(tagged, num_steps=num_steps).values
    floor = jnp.finfo(values.dtype).eps * jnp.max(values)
    return jnp.sqrt(where(values > floor, values, 0))


def lanczos(
    operator: lx.AbstractLinearOperator, first: Float[Array, " n"], num_steps: int
) -> tuple[Float[Array, "k n"], Float[Array, " k"], Float[Array, "k k"], Scalar]:
    """Ritz values of a symmetric operator in the Krylov space of a vector.

    Returns an orthonormal basis of that space in rows, whose first row is the vector; the
    Ritz values in ascending order; the Ritz vectors in that basis, in columns; and the
    length of the next basis vector, which bounds the error of the Ritz values.
    """
    zeros = tree_zeros_like(operator.in_structure())
    _, unravel = jax.flatten_util.ravel_pytree(zeros)

    def product(flat):
        return jax.flatten_util.ravel_pytree(operator.mv(unravel(flat)))[0]

    eps = jnp.finfo(first.dtype).eps

    def cleared(basis, image, shares):
        """The image without its shares of the basis, and those that it has then."""
        # Not `basis.T @ shares`, which is several times slower on a CPU.
        image = image - shares @ basis
        return image, basis @ image

    def step(carry, k):
        basis, vector, last, beta, scale = carry
        basis = basis.at[k].set(vector)
        image = product(vector)
        alpha = vector @ image
        scale = jnp.maximum(scale, jnp.linalg.norm(image))
        image = image - alpha * vector - beta * last
        # In exact arithmetic that is all. Rounding brings some of the earlier ones back.
        # To look for them takes half of the time that it takes to remove them.
        shares = basis @ image
        for _ in range(2):
            image, shares = jax.lax.cond(
                jnp.max(jnp.abs(shares)) > eps**0.75 * jnp.linalg.norm(image),
                cleared,
                lambda basis, image, shares: (image, shares),
                *(basis, image, shares),
            )
        beta = jnp.linalg.norm(image)
        ended = beta <= 10 * eps * scale
        beta = where(ended, 0, beta)
        following = where(ended, 0, image / where(ended, 1, beta))
        return (basis, following, vector, beta, scale), (alpha, beta)

    vector = first / jnp.linalg.norm(first)
    basis = jnp.zeros((num_steps, first.size), first.dtype)
    zero = jnp.zeros((), first.dtype)
    carry = basis, vector, jnp.zeros_like(vector), zero, zero
    (basis, *_), (alphas, betas) = jax.lax.scan(step, carry, jnp.arange(num_steps))
    # Once the Krylov space is exhausted, a value from inside the spectrum.
    exhausted = jnp.sum(basis**2, axis=1) == 0
    diagonal, off = where(exhausted, alphas[0], alphas), betas[:-1]
    tridiagonal = jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)
    values, rotation = eigh(tridiagonal)
    return basis, values, rotation, betas[-1]


def block_lanczos(
    operator: lx.AbstractLinearOperator, starts: Float[Array, "p n"], num_steps: int
) -> tuple[
    Float[Array, "k n"], Float[Array, " k"], Float[Array, "k k"], Float[Array, " k"]
]:
    """Ritz values of a symmetric operator in the Krylov space of several vectors.

    It takes `num_steps` products. The space contains that of each vector with
    `num_steps / p` of them; a vector that is zero, or that the space has already, takes
    none. Returns an orthonormal basis in rows; the Ritz values in ascending order; the
    Ritz vectors in that basis, in columns; and the error bound of each Ritz value.

    It is a band form of Lanczos' method (Ruhe, *Implementation aspects of band Lanczos
    algorithms for computation of eigenvalues of large sparse symmetric matrices*, 1979).
    """
    num_starts, size = starts.shape

    def step(carry, k):
        basis, count, scale = carry
        image = operator.mv(basis[k])
        scale = jnp.maximum(scale, vector_norm(image))
        basis, count, shares = _extended(basis, count, image, scale)
        return (basis, count, scale), shares

    basis, count = _basis_of(starts, num_steps + num_starts)
    carry = basis, count, jnp.zeros((), starts.dtype)
    (basis, *_), rows = jax.lax.scan(step, carry, jnp.arange(num_steps))
    basis, inside, outside = basis[:num_steps], rows[:, :num_steps], rows[:, num_steps:]
    # Once the Krylov space is exhausted, a value from inside the spectrum.
    exhausted = jnp.sum(basis**2, axis=1) == 0
    inside = 0.5 * (inside + inside.T) + jnp.diag(where(exhausted, inside[0, 0], 0))
    values, rotation = eigh(inside)
    errors = jnp.sqrt(jnp.sum((outside.T @ rotation) ** 2, axis=0))
    return basis, values, rotation, errors


class Bidiagonal(NamedTuple):
    """An operator A, and perhaps a symmetric C, within a Krylov space of A^T A + C."""

    right: Float[Array, "k n"]
    """An orthonormal basis of that space, in rows."""
    left: Float[Array, "k m"]
    """An orthonormal basis of its image under A, in rows."""
    image: Float[Array, "k k"]
    """A in these bases. It is upper triangular, and all of A on that space."""
    curvature: Float[Array, "k k"] | None
    """C in the basis of that space."""
    beyond: Float[Array, "p k"]
    """What A^T A + C has, on that basis, outside of the space."""


def bidiagonal(
    A: lx.AbstractLinearOperator,
    C: lx.AbstractLinearOperator | None,
    starts: Float[Array, "p n"],
    num_steps: int,
) -> Bidiagonal:
    r"""A within the Krylov space of $A^\top A + C$ from several vectors.

    Each step is a product with A, one with its transpose, and one with C. A maps vectors
    like the starts, or from them, to pytrees. As in `block_lanczos`, a vector that the
    space has already takes no step.

    Without C, and with one vector, it is the bidiagonalisation of Golub and Kahan
    (*Calculating the singular values and pseudo-inverse of a matrix*, 1965). The
    condition number is that of A and not its square.
    """
    num_starts, _ = starts.shape
    layout, A_T = Layout(A.out_structure()), A.transpose()

    def step(carry, k):
        right, count, left, left_count, scale, scale_left = carry
        start = right[k]
        image = layout.ravel(A.mv(start))
        scale_left = jnp.maximum(scale_left, vector_norm(image))
        left, next_count, shares = _extended(left, left_count, image, scale_left)
        if C is None:
            # Only the new direction: the images of the others have been looked at.
            newest = where(next_count > left_count, left[left_count], 0)
            back, curvature = A_T.mv(layout.unravel(newest)), None
        else:
            bent = C.mv(start)
            back, curvature = A_T.mv(layout.unravel(image)) + bent, right @ bent
        scale = jnp.maximum(scale, vector_norm(back))
        right, count, back = _extended(right, count, back, scale)
        carry = right, count, left, next_count, scale, scale_left
        return carry, (shares, curvature, back, left_count)

    zero = jnp.zeros((), starts.dtype)
    right, count = _basis_of(starts, num_steps + num_starts)
    left = jnp.zeros((num_steps, layout.size), starts.dtype)
    carry = right, count, left, jnp.array(0), zero, zero
    (right, _, left, *_), rows = jax.lax.scan(step, carry, jnp.arange(num_steps))
    shares, curvature, back, position = rows
    beyond = back[:, num_steps:]
    if curvature is None:
        # That of A^T on the basis of the image, which A reaches.
        beyond = shares @ jnp.zeros_like(beyond).at[position].add(beyond)
    else:
        # Row k has what was known after k steps.
        lower = jnp.tril(curvature[:, :num_steps])
        curvature = lower + jnp.tril(lower, -1).T
    return Bidiagonal(right[:num_steps], left, shares.T, curvature, beyond.T)


def _basis_of(starts, num_rows):
    """An orthonormal basis of some vectors in the first rows, and how many these are."""
    basis = jnp.zeros((num_rows, starts.shape[1]), starts.dtype)
    count = jnp.array(0)
    for start in starts:
        basis, count, _ = _extended(basis, count, start, vector_norm(start))
    return basis, count


def _extended(basis, count, vector, scale):
    """The basis with the direction of a vector that is not in its span, to which the
    rounding of a scale does not count; and the coordinates of the vector."""
    shares = basis @ vector
    rest = vector - shares @ basis
    # Twice, for rounding. Not with the last vectors of the basis alone: what comes back
    # of the others would look like curvature where there is none.
    rest = rest - (basis @ rest) @ basis
    length = vector_norm(rest)
    # Not >: NaN is not to be dropped in silence.
    is_new = ~(length <= 10 * jnp.finfo(vector.dtype).eps * scale)
    length = where(is_new, length, 0)
    row = where(is_new, rest / where(is_new, length, 1), 0)
    basis, shares = basis.at[count].set(row), shares.at[count].set(length)
    return basis, where(is_new, count + 1, count), shares


def extreme_eigenvalues(
    operator: lx.AbstractLinearOperator, num_products: int
) -> tuple[Scalar, Scalar, float]:
    r"""Ritz values for the smallest and the largest eigenvalue of a large symmetric
    operator, and how far the true ones may be beyond them, relative to their distance.

    From a random vector the relative error after k steps of Lanczos' method exceeds
    $\epsilon$ with a probability of at most
    $1.648 \sqrt n\, e^{-\sqrt\epsilon (2 k - 1)}$ (Kuczyński and Woźniakowski, 1992).
    Here that is a millionth.
    """
    n = operator.in_size()
    num_products = min(n, num_products)
    first = jr.normal(jr.PRNGKey(1), (n,), tree_dtype(operator.in_structure()))
    values = lanczos(operator, first, num_products)[1]
    # After n steps Lanczos' method is exact.
    root = math.log(1.648 * math.sqrt(n) / _FAILURE) / (2 * num_products - 1)
    error = 0.0 if num_products == n else min(root**2, 0.9)
    return values[0], values[-1], error


_FAILURE = 1e-6


def eigenbasis_within(
    project: Callable[[PyTree], PyTree],
    operator: lx.AbstractLinearOperator,
    start: PyTree[Array],
    num_steps: int = _LANCZOS_STEPS + NUM_STEPS,
    size: Scalar | None = None,
) -> Eigenbasis:
    """The eigenvectors of an operator W within a subspace: of P W P, in the range of P.

    If W is not a matrix, it takes `num_steps` products with it, two at least. Some of
    them are for the size of W, unless that is given.

    Eigenvalues and eigenvectors orthogonal to the subspace are exactly zero. Otherwise
    their rounding errors would look like curvature if the subspace is small or empty.
    """
    if size is not None:
        size = nonzero(size)
    elif isinstance(operator, lx.MatrixLinearOperator):
        size = nonzero(jnp.sqrt(jnp.sum(operator.as_matrix() ** 2)))
    else:
        num_power_steps = max(1, min(NUM_STEPS, num_steps // 3))
        num_steps = max(1, num_steps - num_power_steps)
        size = nonzero(largest_magnitude(operator.mv, start, num_power_steps))

    def moved_away(vector):
        # Vectors orthogonal to the subspace get an eigenvalue that none within it has.
        along = project(vector)
        across = tree_sub(vector, along)
        return tree_axpy(-4 * size, across, project(operator.mv(along)))

    T = lx.FunctionLinearOperator(moved_away, tree_struct(start), lx.symmetric_tag)
    basis = eigenbasis(T, start, num_steps)
    is_within = basis.values > -2 * size
    eps = jnp.finfo(basis.values.dtype).eps
    is_zero = jnp.abs(basis.values) <= 100 * eps * size
    values = where(is_within & ~is_zero, basis.values, 0)
    return Eigenbasis(values, where(is_within[None, :], basis.vectors, 0))


def negative_curvature(basis: Eigenbasis, scale: ScalarLike = 0.0) -> Scalar:
    """How negative the most negative eigenvalue is, relative to the largest, or to a
    scale that is larger."""
    return negative_share(basis.values, scale)


def negative_share(values: Float[Array, " k"], scale: ScalarLike = 0.0) -> Scalar:
    """The same for eigenvalues alone, in ascending order but for zeros."""
    lowest = jnp.min(values)
    largest = jnp.maximum(jnp.maximum(-lowest, values[-1]), scale)
    return jnp.maximum(0, -lowest) / nonzero(largest)
