"""The pseudoinverse of the inner Hessian."""

from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Float, Scalar

from .._arguments import check_count
from .._derivatives.operators import curved_tag, LeastSquaresHessian
from .._linalg.decompositions import eigh, inv, qr, svd
from .._linalg.power_iteration import DENSE_SIZE
from .._tree import tree_dtype, tree_norm, tree_sub, tree_zeros_like


class Pseudoinverse(lx.AbstractLinearSolver):
    r"""The Moore–Penrose pseudoinverse, $q = H^+ b$: the least-squares solution of
    least norm.

    This is the inverse to use where the inner problem is overparameterised: $H$ is then
    singular, and the $H^{-1}$ that the paper writes does not exist.

    - For a general inner objective it works on $H$: by an eigendecomposition where $H$
      is small, and matrix-free by `lineax.LSMR` where it is not.
    - For a least-squares problem ([`bilevel_eqx.AbstractLeastSquaresProblem`][]) it
      works on the Jacobian $A$ of the residual and never on $A^\top A$, whose condition
      number is the square of that of $A$: $H^+ = A^+ (A^+)^\top$. If the residual is
      nonlinear, the further term of $H = A^\top A + C$ is taken into account within
      the row space of $A$: $H^+ = A^+ (I + (A^+)^\top C A^+)^{-1} (A^+)^\top$. That is
      exact where $A$ has independent columns, and where the residual is zero.

    Its derivatives are those of the pseudoinverse, null-space terms included, so that
    derivatives of any order are right wherever the rank does not change.
    """

    rcond: float | None = None
    dense_size: int = DENSE_SIZE
    max_steps: int | None = None

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
            rcond = float(jnp.finfo(tree_dtype(operator.in_structure())).eps) ** (2 / 3)
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
    machine precision times the larger dimension; and in the responses and certificates
    of this package to the power 2/3 of machine precision, where $H$ depends on y: what
    is zero at an inner minimum is then only small near it.
- `dense_size`: a matrix whose smaller dimension is at most this is decomposed; a larger
    one is only ever multiplied with.
- `max_steps`: the largest number of steps of a matrix-free solve, each of which is two
    products. Defaults to ten times the smaller dimension, and at most 2,000.
"""


#
# The four ways to apply it. Each is a map from b to (q, result, stats).
#


def _is_curved(operator) -> bool:
    return isinstance(operator, lx.FunctionLinearOperator) and curved_tag in operator.tags


def _significant(values: Float[Array, " r"], shape, rcond) -> Bool[Array, " r"]:
    if rcond is None:
        rcond = jnp.finfo(values.dtype).eps * max(shape)
    # Not >=, or a matrix of all zeros would have full rank.
    magnitude = jnp.abs(values)
    return magnitude > rcond * jnp.max(magnitude, initial=0)


def _reciprocal(values: Float[Array, " r"], keep: Bool[Array, " r"]):
    return jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)


def _as_matrix(operator: lx.AbstractLinearOperator) -> Float[Array, "m n"]:
    # A product for each row or for each column, whichever are fewer.
    if operator.out_size() < operator.in_size():
        return operator.transpose().as_matrix().T
    return operator.as_matrix()


def _svd(matrix: Float[Array, "m n"]):
    """A thin singular value decomposition, by way of QR where that is much cheaper."""
    m, n = matrix.shape
    if n > 2 * m:
        orthogonal, triangular = qr(matrix.T)
        left, values, right = svd(triangular.T)
        return left, values, right @ orthogonal.T
    return svd(matrix)


class _Structure:
    """A pytree of shapes and types, made hashable so that it can be a static field."""

    def __init__(self, structure):
        self.leaves, self.treedef = jtu.tree_flatten(structure)

    def __hash__(self):
        return hash((tuple(self.leaves), self.treedef))

    def __eq__(self, other):
        return (self.leaves, self.treedef) == (other.leaves, other.treedef)

    def unravel(self, flat: Float[Array, " n"]):
        """The pytree of this structure whose entries are those of `flat`."""
        leaves, start = [], 0
        for leaf in self.leaves:
            entries = flat[start : start + leaf.size]
            leaves.append(entries.reshape(leaf.shape).astype(leaf.dtype))
            start += leaf.size
        return jtu.tree_unflatten(self.treedef, leaves)


class _DenseInverse(eqx.Module):
    inverse: Float[Array, "n m"]
    rank: Scalar
    in_structure: "_Structure" = eqx.field(static=True)
    out_structure: "_Structure" = eqx.field(static=True)

    def __call__(self, vector):
        b, _ = jax.flatten_util.ravel_pytree(vector)
        q = self.in_structure.unravel(self.inverse @ b)
        return q, lx.RESULTS.successful, {"rank": self.rank}

    def transpose(self):
        return _DenseInverse(
            self.inverse.T, self.rank, self.out_structure, self.in_structure
        )


def _dense_inverse(operator: lx.AbstractLinearOperator, rcond) -> _DenseInverse:
    matrix = _as_matrix(operator)
    if lx.is_symmetric(operator):
        values, vectors = eigh(matrix)
        left, right = vectors, vectors.T
    else:
        left, values, right = _svd(matrix)
    keep = _significant(values, matrix.shape, rcond)
    inverse = (right.T * _reciprocal(values, keep)[None, :]) @ left.T
    return _DenseInverse(
        inverse,
        jnp.sum(keep),
        _Structure(operator.in_structure()),
        _Structure(operator.out_structure()),
    )


class _DenseFactorInverse(eqx.Module):
    r"""$V \Sigma^{-1} (I + E)^{-1} \Sigma^{-1} V^\top$, with $A = U \Sigma V^\top$ and
    $E = \Sigma^{-1} V^\top C V \Sigma^{-1}$ the curvature of the residual."""

    right: Float[Array, "r n"]
    reciprocal: Float[Array, " r"]
    # (I + E)^-1, once for all: solving with I + E in each of many products would be
    # more to compile, and to run.
    uncurving: Float[Array, "r r"] | None
    rank: Scalar

    def __call__(self, vector):
        b, unravel = jax.flatten_util.ravel_pytree(vector)
        q = self.reciprocal * (self.right @ b)
        if self.uncurving is not None:
            q = self.uncurving @ q
        q = self.right.T @ (self.reciprocal * q)
        return unravel(q), lx.RESULTS.successful, {"rank": self.rank}

    def transpose(self):
        return self


def _dense_factor_inverse(operator: LeastSquaresHessian, rcond) -> _DenseFactorInverse:
    matrix = _as_matrix(operator.residual_jacobian)
    _, values, right = _svd(matrix)
    keep = _significant(values, matrix.shape, rcond)
    reciprocal = _reciprocal(values, keep)
    if operator.curved:
        hessian = lx.linearise(operator.hessian)
        zeros = tree_zeros_like(operator.in_structure())
        _, unravel = jax.flatten_util.ravel_pytree(zeros)

        def product(row):
            return jax.flatten_util.ravel_pytree(hessian.mv(unravel(row)))[0]

        reduced = right @ jax.vmap(product)(right).T - jnp.diag(values**2)
        curvature = reciprocal[:, None] * reduced * reciprocal[None, :]
        uncurving = inv(jnp.eye(values.size, dtype=values.dtype) + curvature)
    else:
        uncurving = None
    return _DenseFactorInverse(right, reciprocal, uncurving, jnp.sum(keep))


class _MatrixFreeInverse(eqx.Module):
    operator: lx.AbstractLinearOperator
    rcond: float | None = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)

    def __call__(self, vector):
        return _lsmr(self.operator, vector, self.max_steps, self.rcond)

    def transpose(self):
        transposed = self.operator.transpose()
        return _MatrixFreeInverse(transposed, self.rcond, self.max_steps)


class _FactorInverse(eqx.Module):
    """The same as `_DenseFactorInverse`, each pseudoinverse of A being an LSMR solve."""

    operator: LeastSquaresHessian
    max_steps: int | None = eqx.field(static=True)

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
            # w + E w = u by iterative refinement. Where the residual is zero so is E,
            # and the first pass, at the cost of one product with H, sees that.
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

            def as_it_is():
                # Too curved for the factor to be of help: H itself, with its condition.
                H = self.operator.hessian
                q, result, stats = _lsmr(H, vector, self.max_steps)
                count = jnp.asarray(stats["num_steps"], num_steps.dtype)
                return q, result, count, stats["residual"]

            q, result, num_steps, residual = jax.lax.cond(
                settled,
                lambda: (q, result, num_steps, residual),
                as_it_is,
            )
        return q, result, {"num_steps": num_steps, "residual": residual}

    def transpose(self):
        return self


_REFINEMENTS = 50


def _lsmr(operator, vector, max_steps, rcond=None):
    """A^+ b by `lineax.LSMR`, judged by the residual that it ends with."""
    dtype = tree_dtype(vector)
    eps = float(jnp.finfo(dtype).eps)
    if max_steps is None:
        max_steps = min(10 * min(operator.in_size(), operator.out_size()), 2000)
    # A condition number that reaches `conlim` is how the null space announces itself.
    conlim = 0.1 / eps if rcond is None else 1 / max(rcond, 10 * eps)
    solver = lx.LSMR(rtol=10 * eps, atol=0.0, max_steps=max_steps, conlim=conlim)
    # `lineax.LSMR` mixes Python floats into its carry, which are float64 where 64-bit
    # types are enabled, and then it refuses data in float32.
    with jax.enable_x64(dtype == jnp.float64):
        q, _, stats = solver.compute(operator, vector, {})
    norm_A, norm_r = stats["norm_A"], stats["norm_r"]
    consistent = norm_r / (norm_A * stats["norm_x"] + tree_norm(vector))
    least_squares = stats["norm_Ar"] / (norm_A * norm_r)
    residual = jnp.fmin(consistent, least_squares)
    # Zero over zero, above: for the zero operator, or the zero vector, q is exact.
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
