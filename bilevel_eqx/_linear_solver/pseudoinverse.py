"""The pseudoinverse of the inner Hessian."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Scalar

from .._arguments import check_count
from .._compat import lsmr
from .._derivatives.operators import curved_tag, LeastSquaresHessian
from .._linalg.decompositions import check_precision, eigh, inv, qr, svd
from .._linalg.eigenbasis import lanczos
from .._linalg.power_iteration import DENSE_SIZE
from .._tree import (
    Layout,
    nonzero,
    tree_dtype,
    tree_eps,
    tree_norm,
    tree_sub,
    tree_waves,
    vector_norm,
)


class Pseudoinverse(lx.AbstractLinearSolver):
    r"""The Moore–Penrose pseudoinverse, $q = H^+ b$: the least-squares solution of
    least norm.

    Use this inverse if the inner problem is overparameterised: $H$ is then singular, and
    the $H^{-1}$ that the paper writes does not exist.

    - For a general inner objective it works on $H$: by an eigendecomposition if $H$ is
      small, and otherwise matrix-free by `lineax.LSMR`.
    - For a least-squares problem ([`bilevel_eqx.AbstractLeastSquaresProblem`][]) it
      works on the Jacobian $A$ of the residual and never on $A^\top A$, whose condition
      number is the square of that of $A$: $H^+ = A^+ (A^+)^\top$. If the residual is
      nonlinear, $H = A^\top A + C$, and $C$ counts within the row space of $A$:
      $H^+ = A^+ (I + (A^+)^\top C A^+)^{-1} (A^+)^\top$. That is exact where $A$ has
      independent columns, and where the residual is zero.

    Its derivatives are those of the pseudoinverse, including the null-space terms.
    Derivatives of any order are right wherever the rank does not change.
    """

    rcond: float | None = None
    dense_size: int = DENSE_SIZE
    max_steps: int | None = None

    judges_itself: ClassVar[bool] = True
    heeds_curved_tag: ClassVar[bool] = True

    def __check_init__(self):
        if self.rcond is not None and not 0 <= self.rcond < 1:
            raise ValueError(
                f"`Pseudoinverse(rcond=...)` must be in [0, 1); it is {self.rcond}."
            )
        if self.max_steps is not None:
            check_count(self.max_steps, "max_steps", "Pseudoinverse")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        if isinstance(operator, LeastSquaresHessian):
            jacobian = operator.residual_jacobian
            if self._is_small(jacobian):
                return _dense_factor_inverse(operator, self.rcond)
            return _FactorInverse(operator, self.max_steps)
        rcond = self.rcond
        if rcond is None and _is_curved(operator):
            rcond = tree_eps(operator.in_structure()) ** (2 / 3)
        if self._is_small(operator):
            return _dense_inverse(operator, rcond)
        return _MatrixFreeInverse(lx.linearise(operator), rcond, self.max_steps)

    def _is_small(self, operator):
        return min(operator.in_size(), operator.out_size()) <= self.dense_size

    def compute(self, state, vector, options):
        del options
        return state(vector)

    def transpose(self, state, options):
        return state.transpose(), options

    def conj(self, state, options):
        # Everything here is real: gradients of real objectives.
        return state, options

    def assume_full_rank(self):
        return False


Pseudoinverse.__init__.__doc__ = """**Arguments:**

- `rcond`: singular values below `rcond` times the largest count as zero. Defaults to
    machine precision times the larger dimension. If $H$ depends on y, the responses and
    certificates of this package use machine precision to the power 2/3: eigenvalues that
    are zero at an inner minimum are then only small near it.
- `dense_size`: a matrix whose smaller dimension is at most this is decomposed. A larger
    one is only multiplied with.
- `max_steps`: the largest number of steps of a matrix-free solve, each of which is two
    products. Defaults to ten times the smaller dimension, and at most 2,000.
"""


#
# The four forms of the inverse. Each is a map from b to (q, result, stats).
#


def _is_curved(operator) -> bool:
    has_tags = isinstance(operator, lx.FunctionLinearOperator | lx.MatrixLinearOperator)
    return has_tags and curved_tag in operator.tags


def _significant(values: Float[Array, " r"], shape, rcond) -> Bool[Array, " r"]:
    if rcond is None:
        rcond = jnp.finfo(values.dtype).eps * max(shape)
    # Not >=, because then a matrix of zeros would have full rank.
    magnitude = jnp.abs(values)
    return magnitude > rcond * jnp.max(magnitude, initial=0)


def _reciprocal(values: Float[Array, " r"]):
    return jnp.where(values == 0, 0, 1 / nonzero(values))


def _as_matrix(operator: lx.AbstractLinearOperator) -> Float[Array, "m n"]:
    # One product for each row or for each column, whichever are fewer.
    if operator.out_size() < operator.in_size():
        return operator.transpose().as_matrix().T
    in_layout, out_layout = (
        Layout(operator.in_structure()),
        Layout(operator.out_structure()),
    )
    if len({leaf.dtype for leaf in in_layout.leaves}) == 1:
        return operator.as_matrix()
    for leaf in in_layout.leaves:
        check_precision(leaf.dtype, "`Pseudoinverse`")

    # lineax makes a matrix of leaves of one type only.
    def column(entries):
        return out_layout.ravel(operator.mv(in_layout.unravel(entries)))

    return jax.vmap(column, out_axes=1)(jnp.eye(in_layout.size, dtype=in_layout.dtype))


def _svd(matrix: Float[Array, "m n"]):
    """A thin singular value decomposition, after QR where that is much cheaper."""
    m, n = matrix.shape
    if n > 2 * m:
        orthogonal, triangular = qr(matrix.T)
        left, values, right = svd(triangular.T)
        return left, values, right @ orthogonal.T
    return svd(matrix)


class _DenseInverse(eqx.Module):
    r"""$V S^{-1} U^\top$, without the singular vectors whose values count as zero."""

    right: Float[Array, "r n"]
    values: Float[Array, " r"]
    left: Float[Array, "r m"]
    rank: Scalar
    in_layout: Layout = eqx.field(static=True)
    out_layout: Layout = eqx.field(static=True)

    knows_range: ClassVar[bool] = True

    def __call__(self, vector):
        coordinates = self.left @ self.out_layout.ravel(vector)
        # Not `right.T @ ...`, which is several times slower on a CPU.
        q = (_reciprocal(self.values) * coordinates) @ self.right
        stats = {"rank": self.rank}
        return self.in_layout.unravel(q), lx.RESULTS.successful, stats

    def transpose(self):
        return _DenseInverse(
            self.left,
            self.values,
            self.right,
            self.rank,
            self.out_layout,
            self.in_layout,
        )


def _dense_inverse(operator: lx.AbstractLinearOperator, rcond) -> _DenseInverse:
    matrix = _as_matrix(operator)
    if lx.is_symmetric(operator):
        values, vectors = eigh(matrix)
        left = right = vectors.T
    else:
        left, values, right = _svd(matrix)
        left = left.T
    if rcond is None:
        rcond = tree_eps(operator.in_structure()) * max(matrix.shape)
    keep = _significant(values, matrix.shape, rcond)
    return _DenseInverse(
        jnp.where(keep[:, None], right, 0),
        jnp.where(keep, values, 0),
        jnp.where(keep[:, None], left, 0),
        jnp.sum(keep),
        Layout(operator.in_structure()),
        Layout(operator.out_structure()),
    )


class _DenseFactorInverse(eqx.Module):
    r"""$V \Sigma^{-1} (I + E)^{-1} \Sigma^{-1} V^\top$, with $A = U \Sigma V^\top$ and
    $E = \Sigma^{-1} V^\top C V \Sigma^{-1}$ the curvature of the residual."""

    right: Float[Array, "r n"]
    values: Float[Array, " r"]
    # (I + E)^-1, computed once: a solve in each product would take longer to compile and
    # to run.
    uncurving: Float[Array, "r r"] | None
    rank: Scalar
    in_layout: Layout = eqx.field(static=True)

    knows_range: ClassVar[bool] = True

    def __call__(self, vector):
        reciprocal = _reciprocal(self.values)
        q = reciprocal * (self.right @ self.in_layout.ravel(vector))
        if self.uncurving is not None:
            q = self.uncurving @ q
        q = (reciprocal * q) @ self.right
        return self.in_layout.unravel(q), lx.RESULTS.successful, {"rank": self.rank}

    def transpose(self):
        return self


def _dense_factor_inverse(operator: LeastSquaresHessian, rcond) -> _DenseFactorInverse:
    matrix = _as_matrix(operator.residual_jacobian)
    layout = Layout(operator.in_structure())
    _, values, right = _svd(matrix)
    keep = _significant(values, matrix.shape, rcond)
    right, values = jnp.where(keep[:, None], right, 0), jnp.where(keep, values, 0)
    if operator.curved:
        hessian = lx.linearise(operator.hessian)

        def product(row):
            return layout.ravel(hessian.mv(layout.unravel(row)))

        reciprocal = _reciprocal(values)
        reduced = right @ jax.vmap(product)(right).T - jnp.diag(values**2)
        curvature = reciprocal[:, None] * reduced * reciprocal[None, :]
        uncurving = inv(jnp.eye(values.size, dtype=values.dtype) + curvature)
    else:
        uncurving = None
    return _DenseFactorInverse(right, values, uncurving, jnp.sum(keep), layout)


def krylov_inverse(
    operator: lx.AbstractLinearOperator,
    start: Float[Array, " n"],
    num_products: int,
    is_curved: bool,
) -> tuple[_DenseInverse, Float[Array, " k"]]:
    """The pseudoinverse of a symmetric operator on vectors within a Krylov space.

    It takes `num_products` products, whatever it is applied to later. On `start` it is as
    good as so many steps of conjugate gradients, and it is safe on an indefinite or a
    singular operator. A Ritz value counts as zero if zero is within its error bound. Also
    returns all Ritz values.
    """
    num_products = min(num_products, start.size)
    size = vector_norm(start)
    first = jnp.where(size == 0, tree_waves(start), start)
    basis, values, rotation, last = lanczos(operator, first, num_products)
    eps = float(jnp.finfo(values.dtype).eps)
    rcond = eps ** (2 / 3) if is_curved else eps * num_products
    threshold = rcond * jnp.max(jnp.abs(values))
    keep = jnp.abs(values) > jnp.maximum(threshold, jnp.abs(last * rotation[-1]))
    rows = jnp.where(keep[:, None], rotation.T @ basis, 0)
    layout = Layout(start)
    rank = jnp.sum(keep)
    kept = jnp.where(keep, values, 0)
    return _DenseInverse(rows, kept, rows, rank, layout, layout), values


class _MatrixFreeInverse(eqx.Module):
    operator: lx.AbstractLinearOperator
    rcond: float | None = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)

    knows_range: ClassVar[bool] = False

    def __call__(self, vector):
        return _lsmr(self.operator, vector, self.max_steps, self.rcond)

    def transpose(self):
        transposed = self.operator.transpose()
        return _MatrixFreeInverse(transposed, self.rcond, self.max_steps)


class _FactorInverse(eqx.Module):
    """The same as `_DenseFactorInverse`, with LSMR solves for the pseudoinverses of A."""

    operator: LeastSquaresHessian
    max_steps: int | None = eqx.field(static=True)

    knows_range: ClassVar[bool] = False

    def __call__(self, vector):
        A = self.operator.residual_jacobian

        def pinv(v):
            return _lsmr(A, v, self.max_steps)

        def pinv_transposed(v):
            return _lsmr(A.transpose(), v, self.max_steps)

        u, result1, stats1 = pinv_transposed(vector)
        q, result2, stats2 = pinv(u)
        result = _worse(result1, result2)
        num_steps = stats1["num_steps"] + stats2["num_steps"]
        residual = jnp.maximum(stats1["residual"], stats2["residual"])
        if self.operator.curved:
            # w + E w = u by iterative refinement. If the residual is zero then E is zero,
            # and the first pass shows it with one product with H.
            eps = jnp.finfo(tree_dtype(vector)).eps
            scale = tree_norm(A.mv(q))

            def curvature(q):
                product = self.operator.hessian.mv(q)
                return tree_sub(product, A.transpose().mv(A.mv(q)))

            def unfinished(carry):
                count, _, Cq, change, before, _, _ = carry
                relevant = tree_norm(Cq) > 10 * eps * tree_norm(vector)
                return (change > 10 * eps * scale) & relevant & (count < _REFINEMENTS)

            def refine(carry):
                count, w, Cq, before, _, result, num_steps = carry
                Ew, result1, stats1 = pinv_transposed(Cq)
                new_w = tree_sub(u, Ew)
                q, result2, stats2 = pinv(new_w)
                change = tree_norm(tree_sub(new_w, w))
                result = _worse(result, _worse(result1, result2))
                num_steps = num_steps + stats1["num_steps"] + stats2["num_steps"]
                return count + 1, new_w, curvature(q), change, before, result, num_steps

            infinite = jnp.asarray(jnp.inf, scale.dtype)
            carry = 0, u, curvature(q), infinite, infinite, result, num_steps
            out = jax.lax.while_loop(unfinished, refine, carry)
            _, w, _, change, _, result, num_steps = out
            q, _, _ = pinv(w)
            settled = jnp.isinf(change) | (change <= jnp.sqrt(eps) * scale)

            def by_hessian():
                # The refinement did not converge: use H, whose condition is worse.
                H = self.operator.hessian
                q, result, stats = _lsmr(H, vector, self.max_steps)
                count = jnp.asarray(stats["num_steps"], num_steps.dtype)
                return q, result, count, stats["residual"]

            q, result, num_steps, residual = jax.lax.cond(
                settled,
                lambda: (q, result, num_steps, residual),
                by_hessian,
            )
        return q, result, {"num_steps": num_steps, "residual": residual}

    def transpose(self):
        return self


_REFINEMENTS = 50


def _lsmr(operator, vector, max_steps, rcond=None):
    """A^+ b by `lineax.LSMR`, judged by its last residual."""
    dtype = tree_dtype(vector)
    eps = float(jnp.finfo(dtype).eps)
    if max_steps is None:
        max_steps = min(10 * min(operator.in_size(), operator.out_size()), 2000)
    # In the null space the condition number estimate reaches `conlim`.
    conlim = 0.1 / eps if rcond is None else 1 / max(rcond, 10 * eps)
    q, stats = lsmr(operator, vector, rtol=10 * eps, conlim=conlim, max_steps=max_steps)
    norm_A, norm_r = stats["norm_A"], stats["norm_r"]
    consistent = norm_r / (norm_A * stats["norm_x"] + tree_norm(vector))
    least_squares = stats["norm_Ar"] / (norm_A * norm_r)
    residual = jnp.fmin(consistent, least_squares)
    # Zero over zero above: for the zero operator or the zero vector, q is exact.
    exact = (norm_A == 0) | (norm_r == 0)
    residual = jnp.where(exact, 0, residual).astype(dtype)
    result = lx.RESULTS.where(
        residual <= eps**0.5,
        lx.RESULTS.successful,
        lx.RESULTS.max_steps_reached,
    )
    return q, result, {"num_steps": stats["num_steps"], "residual": residual}


def _worse(a, b):
    return lx.RESULTS.where(a == lx.RESULTS.successful, b, a)
