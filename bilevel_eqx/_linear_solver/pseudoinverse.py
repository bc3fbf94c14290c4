"""The pseudoinverse of the inner Hessian."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from .._arguments import as_count, check_count
from .._compat import lsmr
from .._derivatives.operators import (
    AugmentedHessian,
    curved_tag,
    CurvedHessian,
    LeastSquaresHessian,
    on_set_tag,
)
from .._linalg.decompositions import (
    check_precision,
    eigenvectors,
    eigenvectors_and_forms,
    eigvalsh,
    inv,
    qr,
    svd,
)
from .._linalg.eigenbasis import bidiagonal, block_lanczos, lanczos
from .._linalg.low_rank import eigenvectors_of_low_rank
from .._linalg.power_iteration import DENSE_SIZE
from .._linalg.precision import in_full_precision
from .._linalg.zero_curvature import clearance, ends, margin, uncertainty
from .._tree import (
    Layout,
    nonzero,
    tree_axpy,
    tree_dtype,
    tree_eps,
    tree_norm,
    tree_sub,
    tree_waves,
    where,
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
    dense_size: int = eqx.field(default=DENSE_SIZE, converter=as_count)
    max_steps: int | None = eqx.field(default=None, converter=as_count)

    judges_itself: ClassVar[bool] = True
    heeds_curved_tag: ClassVar[bool] = True
    splits_squares: ClassVar[bool] = True

    def __check_init__(self):
        if self.rcond is not None and not 0 <= self.rcond < 1:
            raise ValueError(
                f"`Pseudoinverse(rcond=...)` must be in [0, 1); it is {self.rcond}."
            )
        if self.max_steps is not None:
            check_count(self.max_steps, "max_steps", "Pseudoinverse")

    @in_full_precision
    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        if isinstance(operator, AugmentedHessian):
            return Augmented(self._factor_inverse(operator.hessian))
        if isinstance(operator, LeastSquaresHessian):
            return self._factor_inverse(operator)
        if self._is_small(operator):
            return _dense_inverse(operator, self.rcond)
        rcond = self.rcond
        if rcond is None and _is_curved(operator):
            rcond = tree_eps(operator.in_structure()) ** (2 / 3)
        return _MatrixFreeInverse(lx.linearise(operator), rcond, self.max_steps)

    def _factor_inverse(self, operator: LeastSquaresHessian):
        if self._is_small(operator.residual_jacobian):
            return _dense_factor_inverse(operator, self.rcond)
        return _FactorInverse(operator, self.max_steps)

    def _is_small(self, operator):
        return min(operator.in_size(), operator.out_size()) <= self.dense_size

    @in_full_precision
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
    machine precision times the larger dimension, which counts from 16 up to 1,024. If $H$
    depends on y, the responses and certificates of this package also count as zero what a
    step towards the minimum changes by half of itself: eigenvalues that are zero at an
    inner minimum are only small near it. In `stats`, `margin` is the factor by which the
    closest of these decisions was clear.
- `dense_size`: a matrix whose smaller dimension is at most this is decomposed. A larger
    one is only multiplied with.
- `max_steps`: the largest number of steps of a matrix-free solve, each of which is two
    products. Defaults to ten times the smaller dimension, and at most 2,000.
"""


#
# The forms of the inverse. Each is a map from b to (q, result, stats).
#


def _is_curved(operator) -> bool:
    has_tags = isinstance(operator, lx.FunctionLinearOperator | lx.MatrixLinearOperator)
    return has_tags and curved_tag in operator.tags


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
    reciprocal: Float[Array, " r"]
    left: Float[Array, "r m"]
    values: Float[Array, " r"]
    clearance: Float[Array, " r"]
    in_layout: Layout = eqx.field(static=True)
    out_layout: Layout = eqx.field(static=True)
    # Whether it is right on all vectors, and not within a Krylov space alone.
    everywhere: bool = eqx.field(static=True, default=True)

    knows_range: ClassVar[bool] = True

    @property
    def largest(self):
        return jnp.max(jnp.abs(ends(self.values)), initial=0)

    @property
    def smallest(self):
        """The smallest one that counts; infinite if none does."""
        return 1 / jnp.max(jnp.abs(self.reciprocal), initial=0)

    def __call__(self, vector):
        q = self.solution(self.coordinates(vector))
        return q, lx.RESULTS.successful, _counts(self.clearance)

    def coordinates(self, vector):
        return self.left @ self.out_layout.ravel(vector)

    def solution(self, coordinates):
        # Not `right.T @ ...`, which is several times slower on a CPU.
        return self.in_layout.unravel((self.reciprocal * coordinates) @ self.right)

    def transpose(self):
        return _DenseInverse(
            self.left,
            self.reciprocal,
            self.right,
            self.values,
            self.clearance,
            self.out_layout,
            self.in_layout,
            self.everywhere,
        )


def _counts(clear: Float[Array, " r"]) -> dict[str, Array]:
    return {"rank": jnp.sum(jnp.abs(clear) > 1), "margin": margin(clear)}


def _truncated(values, vectors, uncertain):
    """Reciprocals and vectors without those that count as zero, and the clearance."""
    clear = clearance(values, uncertain)
    # Not >: what is NaN counts.
    keep = ~(jnp.abs(clear) <= 1)
    reciprocal = where(keep, 1 / where(keep, values, 1), 0)
    return reciprocal, [where(keep[:, None], rows, 0) for rows in vectors], clear


def _dense_inverse(operator: lx.AbstractLinearOperator, rcond) -> _DenseInverse:
    matrix = _as_matrix(operator)
    change = None
    if isinstance(operator, CurvedHessian):
        on_set = on_set_tag in operator.hessian.tags
        decomposed = eigenvectors_of_low_rank if on_set else eigenvectors_and_forms
        values, vectors, further = decomposed(matrix, operator.further)
        rows, change = [vectors], further - values
    elif lx.is_symmetric(operator):
        values, vectors = eigenvectors(matrix)
        rows = [vectors]
    else:
        left, values, right = _svd(matrix)
        rows = [right, left.T]
    if rcond is not None:
        largest = jnp.max(jnp.abs(ends(values)), initial=0)
        uncertain = jnp.full_like(values, rcond * largest)
    else:
        size, curved = max(matrix.shape), _is_curved(operator)
        uncertain = uncertainty(values, size, change=change, curved=curved)
    reciprocal, rows, clear = _truncated(values, rows, uncertain)
    return _DenseInverse(
        rows[0],
        reciprocal,
        rows[-1],
        values,
        clear,
        Layout(operator.in_structure()),
        Layout(operator.out_structure()),
    )


class Augmented(eqx.Module):
    """The inverse of a sum of squares, as one of its augmented Hessian."""

    inverse: Any

    @property
    def knows_range(self):
        return self.inverse.knows_range

    @property
    def everywhere(self):
        return self.inverse.everywhere

    @property
    def right(self):
        return self.inverse.right

    @property
    def clearance(self):
        return self.inverse.clearance

    @property
    def largest(self):
        return self.inverse.largest

    @property
    def smallest(self):
        return self.inverse.smallest

    def __call__(self, vector):
        return self.inverse.augmented(*vector)

    def across(self, a):
        """a without its part in the range of A; `None` if that would take a solve."""
        return self.inverse.across(a) if self.knows_range else None

    def transpose(self):
        return self


class _DenseFactorInverse(eqx.Module):
    r"""With $A = U \Sigma V^\top$ and the curvature of the residual
    $E = \Sigma^{-1} V^\top C V \Sigma^{-1}$: $q = V \Sigma^{-1} z$ and $p = U z - a$ for
    $z = (I + E)^{-1} (\Sigma^{-1} V^\top u + U^\top a)$."""

    right: Float[Array, "r n"]
    reciprocal: Float[Array, " r"]
    left: Float[Array, "r m"]
    # I + E, and its inverse. That is computed once: a solve in each product would take
    # longer to compile and to run.
    curving: Float[Array, "r r"] | None
    uncurving: Float[Array, "r r"] | None
    factor_clearance: Float[Array, " r"]
    in_layout: Layout = eqx.field(static=True)
    out_layout: Layout = eqx.field(static=True)
    everywhere: bool = eqx.field(static=True, default=True)

    knows_range: ClassVar[bool] = True

    @property
    def clearance(self):
        missing = self.in_layout.size - self.factor_clearance.size
        clear = jnp.pad(self.factor_clearance, (0, missing))
        if self.curving is None:
            return clear
        # H has a negative eigenvalue iff I + E has one.
        lowest = jnp.min(eigvalsh(0.5 * (self.curving + self.curving.T)), initial=1)
        return where(lowest < 0, -clear, clear)

    @property
    def largest(self):
        """That of A^T A."""
        lowest = where(self.reciprocal > 0, self.reciprocal, jnp.inf)
        return jnp.max(1 / lowest, initial=0) ** 2

    @property
    def smallest(self):
        return 1 / jnp.max(self.reciprocal, initial=0) ** 2

    def _coordinates(self, vector):
        return self.reciprocal * (self.right @ self.in_layout.ravel(vector))

    def _solved(self, coordinates):
        z = coordinates if self.uncurving is None else self.uncurving @ coordinates
        return z, self.in_layout.unravel((self.reciprocal * z) @ self.right)

    def __call__(self, vector):
        _, q = self._solved(self._coordinates(vector))
        return q, lx.RESULTS.successful, _counts(self.factor_clearance)

    def across(self, a):
        flat = self.out_layout.ravel(a)
        return self.out_layout.unravel(flat - (self.left @ flat) @ self.left)

    def augmented(self, a, u):
        flat = self.out_layout.ravel(a)
        z, q = self._solved(self._coordinates(u) + self.left @ flat)
        p = self.out_layout.unravel(z @ self.left - flat)
        return (p, q), lx.RESULTS.successful, _counts(self.factor_clearance)

    def transpose(self):
        return self


def _dense_factor_inverse(operator: LeastSquaresHessian, rcond) -> _DenseFactorInverse:
    A = operator.residual_jacobian
    matrix = _as_matrix(A)
    layout = Layout(operator.in_structure())
    left, values, right = _svd(matrix)
    if rcond is None:
        uncertain = uncertainty(values, max(matrix.shape))
    else:
        uncertain = jnp.full_like(values, rcond * jnp.max(values, initial=0))
    reciprocal, (right, left), clear = _truncated(values, [right, left.T], uncertain)
    curving = uncurving = None
    if operator.curvature is not None:
        C = lx.linearise(operator.curvature)

        def product(row):
            return layout.ravel(C.mv(layout.unravel(row)))

        E = right @ jax.vmap(product)(right).T
        E = reciprocal[:, None] * E * reciprocal[None, :]
        curving = jnp.eye(values.size, dtype=values.dtype) + E
        uncurving = inv(curving)
    out_layout = Layout(A.out_structure())
    return _DenseFactorInverse(
        right, reciprocal, left, curving, uncurving, clear, layout, out_layout
    )


@in_full_precision
def krylov_inverse(
    operator: lx.AbstractLinearOperator,
    starts: Float[Array, "p n"],
    num_products: int,
    is_curved: bool,
) -> "_DenseInverse | _DenseFactorInverse":
    """The pseudoinverse of an operator on vectors within the Krylov space of some
    vectors. It is that of a Hessian, or the transposed one of the Jacobian of a root.

    It takes `num_products` products, whatever it is applied to later. On each start it is
    as good as its share of them in steps of conjugate gradients, or of least squares for
    a sum of squares and for a root; and it is safe on an indefinite or a singular
    operator. A Ritz value counts as zero if zero is within its error bound. On a vector
    that does not depend on the starts it is not good.
    """
    squares = isinstance(operator, LeastSquaresHessian)
    if squares:
        # All of A if its rows take no more: a product with H is two with A and one with
        # C, and C is applied to each singular vector.
        rank = operator.residual_jacobian.out_size()
        if rank <= (2 if operator.curvature is None else 0.5) * num_products:
            return _dense_factor_inverse(operator, None)
    size = starts.shape[1]
    sizes = jnp.sqrt(jnp.sum(starts**2, axis=1, keepdims=True))
    first = where(jnp.all(sizes == 0), tree_waves(starts), starts / nonzero(sizes))
    layout = Layout(starts[0])
    if squares:
        A, C = operator.residual_jacobian, operator.curvature
        right, values, left, uncertain, E = _krylov_factors(A, C, first, num_products)
        reciprocal, (right, left), clear = _truncated(values, [right, left], uncertain)
        curving = uncurving = None
        if E is not None:
            E = reciprocal[:, None] * E * reciprocal[None, :]
            curving = jnp.eye(values.size, dtype=values.dtype) + E
            uncurving = inv(curving)
        return _DenseFactorInverse(
            right,
            reciprocal,
            left,
            curving,
            uncurving,
            clear,
            layout,
            Layout(A.out_structure()),
            everywhere=False,
        )
    if not lx.is_symmetric(operator):
        right, values, left, uncertain, _ = _krylov_factors(
            operator, None, first, max(1, num_products // 2)
        )
        rows = [right, left]
    else:
        num_products = min(num_products, size)
        if len(starts) == 1:
            basis, values, rotation, last = lanczos(operator, first[0], num_products)
            error = jnp.abs(last * rotation[-1])
        else:
            basis, values, rotation, error = block_lanczos(operator, first, num_products)
        uncertain = jnp.maximum(uncertainty(values, size, curved=is_curved), error)
        rows = [rotation.T @ basis]
    reciprocal, rows, clear = _truncated(values, rows, uncertain)
    right, left = rows[0], rows[-1]
    return _DenseInverse(right, reciprocal, left, values, clear, layout, layout, False)


def _krylov_factors(A, C, starts, num_steps):
    """Singular triplets of A in the Krylov space of some vectors, how far the values may
    be from those of A, and C in the basis of the right vectors."""
    known = bidiagonal(A, C, starts, min(num_steps, starts.shape[1]))
    left, values, right = svd(known.image)
    errors = jnp.sqrt(jnp.sum((known.beyond @ right.T) ** 2, axis=0))
    # These are errors of the squares.
    uncertain = uncertainty(values, max(A.in_size(), A.out_size()))
    uncertain = jnp.maximum(uncertain, where(values**2 <= errors, values, 0))
    bent = known.curvature
    E = None if bent is None else right @ bent @ right.T
    return right @ known.right, values, left.T @ known.left, uncertain, E


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
        (_, q), result, stats = self._solved(vector, None)
        return q, result, stats

    def augmented(self, a, u):
        (w, q), result, stats = self._solved(u, a)
        return (tree_sub(w, a), q), result, stats

    def _solved(self, vector, a):
        """(A q, q) for H q = vector + A^T a."""
        A, C = self.operator.residual_jacobian, self.operator.curvature

        def pinv(v):
            return _lsmr(A, v, self.max_steps)

        def pinv_transposed(v):
            return _lsmr(A.transpose(), v, self.max_steps)

        u, result, stats = pinv_transposed(vector)
        num_steps, residual = stats["num_steps"], stats["residual"]
        if a is not None:
            within, result_a, stats = pinv(a)
            u = tree_axpy(1.0, A.mv(within), u)
            result = _worse(result, result_a)
            num_steps = num_steps + stats["num_steps"]
            residual = jnp.maximum(residual, stats["residual"])
        q, result2, stats = pinv(u)
        result, w = _worse(result, result2), u
        num_steps = num_steps + stats["num_steps"]
        residual = jnp.maximum(residual, stats["residual"])
        if C is not None:
            # w + E w = u by iterative refinement. If the residual is zero then E is zero,
            # and the first pass shows it with one product with C.
            eps = jnp.finfo(tree_dtype(vector)).eps
            scale = tree_norm(w)
            pulled = tree_norm(A.transpose().mv(w))

            def unfinished(carry):
                count, _, Cq, change, before, _, _ = carry
                # Not >: what is NaN counts.
                relevant = ~(tree_norm(Cq) <= 10 * eps * pulled)
                return (change > 10 * eps * scale) & relevant & (count < _REFINEMENTS)

            def refine(carry):
                count, w, Cq, before, _, result, num_steps = carry
                Ew, result1, stats1 = pinv_transposed(Cq)
                new_w = tree_sub(u, Ew)
                q, result2, stats2 = pinv(new_w)
                change = tree_norm(tree_sub(new_w, w))
                result = _worse(result, _worse(result1, result2))
                num_steps = num_steps + stats1["num_steps"] + stats2["num_steps"]
                return count + 1, new_w, C.mv(q), change, before, result, num_steps

            infinite = jnp.asarray(jnp.inf, scale.dtype)
            carry = 0, u, C.mv(q), infinite, infinite, result, num_steps
            out = jax.lax.while_loop(unfinished, refine, carry)
            _, w, _, change, _, result, num_steps = out
            q, _, _ = pinv(w)
            settled = jnp.isinf(change) | (change <= jnp.sqrt(eps) * scale)

            def by_hessian():
                # The refinement did not converge: use H, whose condition is worse.
                b = vector if a is None else tree_axpy(1.0, A.transpose().mv(a), vector)
                q, result, stats = _lsmr(self.operator, b, self.max_steps)
                count = jnp.asarray(stats["num_steps"], num_steps.dtype)
                return A.mv(q), q, result, count, stats["residual"]

            w, q, result, num_steps, residual = jax.lax.cond(
                settled,
                lambda: (w, q, result, num_steps, residual),
                by_hessian,
            )
        return (w, q), result, {"num_steps": num_steps, "residual": residual}

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
    residual = where(exact, 0, residual).astype(dtype)
    result = lx.RESULTS.where(
        residual <= eps**0.5,
        lx.RESULTS.successful,
        lx.RESULTS.max_steps_reached,
    )
    return q, result, {"num_steps": stats["num_steps"], "residual": residual}


def _worse(a, b):
    return lx.RESULTS.where(a == lx.RESULTS.successful, b, a)
