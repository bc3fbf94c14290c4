"""The eigenvectors of a symmetric matrix of low rank."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._tree import where
from .decompositions import eigenvectors_and_forms, eigh, quadratic_forms
from .power_iteration import largest_magnitude
from .zero_curvature import rounding_of


# OpenBLAS decomposes a larger matrix in several threads, which go on waiting for the next
# call for some 25 ms: that is more processor time than all the rest.
_MOST = 64


# Once in a program that calls it more than once.
@jax.jit
def eigenvectors_of_low_rank(
    matrix: Float[Array, "n n"], other: Float[Array, "n n"]
) -> tuple[Float[Array, " n"], Float[Array, "n n"], Float[Array, " n"]]:
    r"""The eigenvalues, in ascending order; the eigenvectors, as rows; and $q^\top M q$
    for each of them and another matrix M. Where the matrix has low rank, those of
    eigenvalues that count as zero are left out: all three are zero there.

    At a minimum of an overparameterised problem H has a nonzero eigenvalue for each
    residual, and far more variables. Up to a rank r of a quarter of n, and at most 64, a
    Cholesky decomposition with pivots finds $H = L L^\top$ in $n r^2$ operations. If q is
    an eigenvector of $L^\top L$, then L q is one of H. What is left of H is looked at:
    where it is more than rounding (H has more rank, or negative eigenvalues), H is
    decomposed whole.
    """
    n = matrix.shape[0]
    if n <= _MOST:
        return eigenvectors_and_forms(matrix, other)
    factor = _cholesky(matrix, min(n // 4, _MOST))
    # Not a decomposition of L itself, which OpenBLAS would do in several threads.
    values, rotation = eigh(jnp.inner(factor, factor))
    # Half of what counts as zero, so that no eigenvalue that counts is lost.
    rounding = 0.5 * rounding_of(values[-1], n)
    kept = values > rounding
    values = where(kept, values, 0)
    vectors = rotation.T @ factor / jnp.sqrt(where(kept, values, jnp.inf))[:, None]
    # The squares above have cost half of the digits of small ones. Each of these steps
    # squares how far the vectors are from orthonormal.
    for _ in range(2):
        vectors = 1.5 * vectors - 0.5 * jnp.inner(vectors, vectors) @ vectors

    def rest(v):
        return matrix @ v - (factor @ v) @ factor

    is_all = largest_magnitude(rest, matrix[0]) <= rounding

    def few():
        before, none = (n - values.size, 0, 0), jnp.zeros((), values.dtype)
        forms = quadratic_forms(vectors, other)
        return (
            jax.lax.pad(values, none, [before]),
            jax.lax.pad(vectors, none, [before, (0, 0, 0)]),
            jax.lax.pad(forms, none, [before]),
        )

    return jax.lax.cond(is_all, few, lambda: eigenvectors_and_forms(matrix, other))


def _cholesky(matrix: Float[Array, "n n"], most: int) -> Float[Array, "most n"]:
    """Rows L^T with H = L L^T, at most so many: each takes the largest entry from the
    diagonal."""
    n = matrix.shape[0]
    diagonal = jnp.sum(matrix * jnp.eye(n, dtype=matrix.dtype), axis=0)
    # The sum of the eigenvalues, which all roundings are relative to.
    rounding = 4 * jnp.finfo(matrix.dtype).eps * jnp.sum(diagonal)

    def unfinished(carry):
        count, _, diagonal = carry
        return (count < most) & (jnp.max(diagonal) > rounding)

    def body(carry):
        count, rows, diagonal = carry
        # Not signed: a program need not ask whether it counts from the end.
        i = jax.lax.argmax(diagonal, 0, jnp.uint32)
        before = jax.lax.dynamic_index_in_dim(rows, i, 1, keepdims=False)
        row = jax.lax.dynamic_index_in_dim(matrix, i, keepdims=False) - before @ rows
        row = row / jnp.sqrt(jnp.max(diagonal))
        rows = jax.lax.dynamic_update_index_in_dim(rows, row, count, 0)
        return count + 1, rows, diagonal - row**2

    start = jnp.array(0, jnp.uint32), jnp.zeros((most, n), matrix.dtype), diagonal
    return jax.lax.while_loop(unfinished, body, start)[1]
