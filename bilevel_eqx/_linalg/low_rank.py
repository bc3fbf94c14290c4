"""The eigenvectors of a symmetric matrix of low rank."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .decompositions import eigenvectors, svd
from .power_iteration import largest_magnitude
from .zero_curvature import rounding_of


# A smaller matrix is decomposed in less time than it takes to find its rank.
_FEWEST = 128


# Once in a program that calls it more than once.
@jax.jit
def eigenvectors_of_low_rank(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    r"""The eigenvalues, in ascending order, and the eigenvectors, as rows. Where the
    matrix has low rank, those of eigenvalues that count as zero are left out: both are
    zero there.

    At a minimum of an overparameterised problem H has a nonzero eigenvalue for each
    residual, and far more variables. Up to a rank r of an eighth of n, a Cholesky
    decomposition with pivots finds $H = L L^\top$ in $n r^2$ operations. The singular
    vectors of L are the eigenvectors of H. What is left of H is looked at: where it is
    more than rounding (H has more rank, or negative eigenvalues), H is decomposed whole.
    """
    n = matrix.shape[0]
    if n < _FEWEST:
        return eigenvectors(matrix)
    factor = _cholesky(matrix, n // 8)
    _, roots, vectors = svd(factor)
    # In descending order.
    missing = n - roots.size
    values = jnp.pad(roots[::-1] ** 2, (missing, 0))
    vectors = jnp.pad(vectors[::-1], ((missing, 0), (0, 0)))
    rest = matrix - factor.T @ factor
    left = largest_magnitude(lambda v: rest @ v, matrix[0])
    # Half of what counts as zero, so that no eigenvalue that counts is lost.
    is_all = left <= 0.5 * rounding_of(values[-1], n)
    return jax.lax.cond(is_all, lambda: (values, vectors), lambda: eigenvectors(matrix))


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
        pivot = jax.lax.dynamic_index_in_dim(diagonal, i, keepdims=False)
        before = jax.lax.dynamic_index_in_dim(rows, i, 1, keepdims=False)
        row = jax.lax.dynamic_index_in_dim(matrix, i, keepdims=False) - before @ rows
        row = row / jnp.sqrt(pivot)
        rows = jax.lax.dynamic_update_index_in_dim(rows, row, count, 0)
        return count + 1, rows, diagonal - row**2

    start = jnp.array(0, jnp.uint32), jnp.zeros((most, n), matrix.dtype), diagonal
    return jax.lax.while_loop(unfinished, body, start)[1]
