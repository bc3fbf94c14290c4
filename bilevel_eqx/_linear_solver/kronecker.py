"""Kronecker products for the Hessian of each layer, as a preconditioner."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree, ScalarLike

from .._arguments import as_count, as_rate, check_count, check_positive
from .._linalg.precision import in_full_precision
from .._tree import nonzero, where
from .misc import check_factorisable, check_square
from .preconditioner import AbstractPreconditioner, probed


# Of alternating least squares. They converge at once where H is such a product.
_NUM_SWEEPS = 10


class Factor(eqx.Module):
    r"""$U \operatorname{diag}(\lambda) U^\top$; without U a diagonal matrix."""

    eigenvalues: Float[Array, " n"]
    vectors: Float[Array, "n n"] | None


class Block(eqx.Module):
    """The two factors of the Hessian of one leaf, as an m × n matrix."""

    left: Factor
    right: Factor


class Kronecker(AbstractPreconditioner):
    r"""For each leaf of y by itself, as a matrix $W \in \mathbb R^{m \times n}$, the
    product of two symmetric factors that is nearest to $H$ on random signs $Z_k$:

    $$\min_{G, A} \sum_{k=1}^p \lVert (H Z)_k - G Z_k A \rVert^2, \qquad
    P^{-1} = (A \otimes G + \rho I)^{-1}.$$

    The expectation of that sum is $p \lVert H - A \otimes G \rVert^2$ in the Frobenius
    norm. It is minimised by alternating least squares. Negative eigenvalues of a factor
    count as zero, so that P is positive definite.

    The weights of a dense layer have such a Hessian if its inputs are independent of the
    curvature at its outputs. This takes no knowledge of the model: a leaf with more than
    two axes is a matrix with its first axis as rows (a convolution of Equinox: output
    channels), and one with one axis is a column. A factor is a full matrix if the
    probes determine it, $p n \ge 2 m$ for the rows, and otherwise diagonal. What
    H has between the leaves is noise in the estimate: take more probes.

    ??? cite "References"

        Van Loan and Pitsianis, *Approximation with Kronecker products*, 1993. Martens and
        Grosse, *Optimizing neural networks with Kronecker-factored approximate
        curvature*, ICML 2015.
    """

    num_probes: int = eqx.field(converter=as_count)
    damping: ScalarLike = eqx.field(converter=as_rate)

    keeps_shapes: ClassVar[bool] = True

    def __check_init__(self):
        check_count(self.num_probes, "num_probes", "Kronecker")
        check_positive(self.damping, "damping", "Kronecker")

    def prepare(self, operator: lx.AbstractLinearOperator) -> PyTree[Block]:
        """The factors of each leaf."""
        check_square(operator, "Kronecker")
        check_factorisable(operator, "Kronecker")
        z, image = probed(operator, self.num_probes)
        return jtu.tree_map(_fit, z, image)

    def precondition(self, prepared: PyTree[Block], r: PyTree[Array]) -> PyTree[Array]:
        r"""$P^{-1} r$."""

        def solve(block: Block, r: Array) -> Array:
            return _solve(block, r, self.damping)

        return jtu.tree_map(solve, prepared, r, is_leaf=lambda u: isinstance(u, Block))


Kronecker.__init__.__doc__ = r"""**Arguments:**

- `num_probes`: p, the number of products with $H$.
- `damping`: $\rho$, positive, in units of the curvature.
"""


def _as_matrices(leaf: Array, num_axes: int) -> Float[Array, "... m n"]:
    """The leaf with its last `num_axes` axes as a matrix."""
    lead, shape = leaf.shape[: leaf.ndim - num_axes], leaf.shape[leaf.ndim - num_axes :]
    return leaf.reshape(*lead, *shape[:1], *(1,) * (not shape), math.prod(shape[1:]))


@in_full_precision
def _fit(z: Float[Array, "p ..."], image: Float[Array, "p ..."]) -> Block:
    Z, W = (_as_matrices(u, u.ndim - 1) for u in (z, image))
    p, m, n = Z.shape
    ZT, WT = jnp.swapaxes(Z, 1, 2), jnp.swapaxes(W, 1, 2)
    rows = _Side(Z, W, 0 < 2 * m <= p * n)
    columns = _Side(ZT, WT, 0 < 2 * n <= p * m)

    def sweep(_, A):
        A = columns.given(rows.given(A))
        # Only the product of the two is determined.
        return A * (n / nonzero(_trace(A)))

    A = jnp.eye(n, dtype=z.dtype) if columns.full else jnp.ones(n, z.dtype)
    A = jax.lax.fori_loop(0, _NUM_SWEEPS, sweep, A)
    return Block(_factor(rows.given(A)), _factor(A))


class _Side:
    r"""The factor on one side of Z, by least squares for a given one on the other."""

    def __init__(self, Z: Float[Array, "p m n"], W: Float[Array, "p m n"], full: bool):
        self.Z, self.W, self.full = Z, W, full

    def given(self, other: Array) -> Array:
        r"""The symmetric G with the least $\sum_k \lVert W_k - G V_k \rVert^2$, where
        $V_k = Z_k A$: with $M = \sum_k V_k V_k^\top$ and $C = \sum_k W_k V_k^\top$ it
        solves $G M + M G = C + C^\top$."""
        V = self.Z * other[None, None] if other.ndim == 1 else self.Z @ other
        if not self.full:
            M, C = (jnp.einsum("kij,kij->i", u, V) for u in (V, self.W))
            return C / nonzero(M)
        M, C = (jnp.einsum("kij,klj->il", u, V) for u in (V, self.W))
        s, U = jnp.linalg.eigh(M)
        sums = s[:, None] + s[None]
        # What the probes do not tell, to rounding, is zero.
        floor = 2 * s.size * jnp.finfo(s.dtype).eps * s[-1]
        inside = U.T @ (C + C.T) @ U
        return U @ jnp.where(sums > floor, inside / nonzero(sums), 0) @ U.T


def _trace(factor: Array) -> Array:
    return jnp.sum(factor) if factor.ndim == 1 else jnp.trace(factor)


def _factor(matrix: Array) -> Factor:
    if matrix.ndim == 1:
        return Factor(jnp.maximum(matrix, 0), None)
    eigenvalues, vectors = jnp.linalg.eigh(matrix)
    return Factor(jnp.maximum(eigenvalues, 0), vectors)


@in_full_precision
def _solve(block: Block, r: Array, damping: ScalarLike) -> Array:
    R = _as_matrices(r, r.ndim)
    left, right = block.left, block.right
    inside = R if left.vectors is None else left.vectors.T @ R
    inside = inside if right.vectors is None else inside @ right.vectors
    eigenvalues = left.eigenvalues[:, None] * right.eigenvalues[None]
    inside = inside / (eigenvalues + jnp.asarray(damping, r.dtype))
    out = inside if left.vectors is None else left.vectors @ inside
    out = out if right.vectors is None else out @ right.vectors.T
    # Without an approximation it is the identity.
    sound = jnp.all(jnp.isfinite(eigenvalues))
    return where(sound, out, R).reshape(r.shape)
