"""Second derivatives of the inner objective, as lineax operators."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar

from .._arguments import says
from .._depends_on import depends_on, last_argument_matters
from .._linalg.power_iteration import DENSE_SIZE
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_y
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._problem.root import AbstractRootProblem
from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_eps,
    tree_size,
    tree_struct,
    tree_sub,
    tree_zeros_like,
    vector_dots,
    where,
)
from .first import inner_gradient
from .operators import (
    AugmentedHessian,
    CrossDerivative,
    curved_tag,
    CurvedHessian,
    LeastSquaresHessian,
)


def _linearised(fn, at: PyTree[Array], tags: Iterable[object] = ()):
    """`fn(at)`, and the Jacobian of `fn` there, from one linearisation."""
    value, tangent_map = jax.linearize(fn, at)
    return value, lx.FunctionLinearOperator(tangent_map, tree_struct(at), tags)


class _Component(eqx.Module):
    """One of the values of a function. A module, so that it may leave a program."""

    fn: Callable
    index: int

    def __call__(self, argument):
        return self.fn(argument)[self.index]


def value_gradient_and_product(
    fn: Callable[[PyTree[Array]], Scalar], at: PyTree[Array]
) -> tuple[Scalar, PyTree[Array], Callable[[PyTree[Array]], PyTree[Array]]]:
    """A function's value, its gradient, and the products with its Hessian, from one
    linearisation."""

    def gradient_and_value(at):
        value, gradient = jax.value_and_grad(fn)(at)
        return gradient, value

    # The value is not linearised: JAX cannot where a function has a rule for reverse mode
    # alone (`jax.custom_vjp`), and nobody asks for it.
    gradient, product, value = jax.linearize(gradient_and_value, at, has_aux=True)
    return value, gradient, product


def gradient_and_hessian(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array], tags: Any = ()
) -> tuple[PyTree[Array], lx.AbstractLinearOperator]:
    """The inner gradient, which linearising it yields anyway, and the inner Hessian."""
    gradient, hessian, _ = expansion(problem, x, y, tags)
    return gradient, hessian


def expansion(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    tags: Any = (),
    linear_solver: lx.AbstractLinearSolver | None = None,
) -> tuple[PyTree[Array], lx.AbstractLinearOperator, Callable[..., PyTree]]:
    r"""f_y, H and the map $q \mapsto B^\top q$, from one linearisation in y.

    For a sum of squares that map takes $A q$ too, if it is known better than q; and if a
    linear solver is given, H and B are those of the minimum that y should be: see
    `stationary_residual`. For a root they are r, dr/dy and
    $q \mapsto (\partial r / \partial x)^\top q$.
    """
    if isinstance(problem, AbstractRootProblem):
        residual, jacobian = _linearised(lambda y: problem.root(x, y), y, tags)
        _, pull = jax.vjp(lambda x: problem.root(x, y), x)
        return residual, jacobian, _Component(pull, 0)
    # `positive_semidefinite_tag` alone does not make an operator symmetric to lineax.
    tags = frozenset(tags) | {lx.symmetric_tag}
    if isinstance(problem, AbstractLeastSquaresProblem):
        return _expansion_of_squares(problem, x, y, tags, linear_solver)

    def gradients(y):
        return jax.grad(problem.inner, argnums=(1, 0))(x, y)

    if not tells_change(problem, y, tags):
        (gradient, _), push = jax.linearize(gradients, y)
        hessian = lx.FunctionLinearOperator(_Component(push, 0), tree_struct(y), tags)
        return gradient, hessian, _Component(push, 1)
    _, gradient, hessian, cross_transposed = curved_hessian(problem, x, y, tags)
    if cross_transposed is None:
        cross_transposed = _Component(jax.linearize(gradients, y)[1], 1)
    return gradient, hessian, cross_transposed


def tells_change(problem: AbstractBilevelProblem, y: PyTree, tags: Any) -> bool:
    """Whether the Hessian for these tags is a `CurvedHessian`: it depends on y, its
    linear solver wants to know how, and it is a small matrix."""
    is_vector = eqx.is_array(y) and y.ndim == 1 and y.size <= DENSE_SIZE
    plain = not isinstance(problem, AbstractLeastSquaresProblem)
    return curved_tag in tags and is_vector and plain and not set_y(problem).confines


def _expansion_of_squares(problem, x, y, tags, linear_solver):
    r"""The same, with the residual $w = r$ as a variable of its own:
    $f_y = A^\top w$ and $f_x = r_x^\top w$."""
    r, jacobian = _linearised(lambda y: problem.inner_residual(x, y), y)
    if _range_matters(problem, x, y, linear_solver):
        # Used three times: once as a matrix, it makes a shorter program.
        jacobian = _as_matrix_if_small(jacobian, y, r)
        w = _without_range(y, r, jacobian, linear_solver)
    else:
        w = r

    def gradients(w, y):
        _, pull = jax.vjp(problem.inner_residual, x, y)
        return pull(w)[::-1]

    (gradient, _), push = jax.linearize(gradients, w, y)
    if w is not r:
        gradient = jacobian.transpose().mv(r)
    C = None
    if _is_curved_residual(problem, x, y):
        curvature = _CurvatureOfSquares(push, w)
        C = lx.FunctionLinearOperator(curvature, tree_struct(y), lx.symmetric_tag)
    hessian = LeastSquaresHessian(jacobian, C, tags)
    return gradient, hessian, _CrossTransposedOfSquares(push, jacobian)


class _CurvatureOfSquares(eqx.Module):
    r"""$v \mapsto \sum_i w_i \nabla^2 r_i v$."""

    push: Callable
    w: PyTree[Array]

    def __call__(self, vector):
        return self.push(tree_zeros_like(self.w), vector)[0]


class _CrossTransposedOfSquares(eqx.Module):
    r"""$q \mapsto r_x^\top A q + \partial_x \langle w, A q \rangle$, with $A q$ apart."""

    push: Callable
    jacobian: lx.AbstractLinearOperator

    def __call__(self, q, image=None):
        return self.push(self.jacobian.mv(q) if image is None else image, q)[1]


def stationary_residual(
    problem: Any,
    x: PyTree[Array],
    y: PyTree[Array],
    linear_solver: lx.AbstractLinearSolver | None,
) -> PyTree[Array]:
    r"""The residual that a sum of squares has at the minimum next to y:
    $(I - A A^+) r$, as far as it matters.

    At a minimum $A^\top r = 0$, so r has no part in the range of A. What a computed r has
    there is rounding, or the error of y. Where A depends on x or y, $A^{+\top}$ and
    $A^+$ multiply that part by the square of the condition number:
    $q^\top \mathrm d A^\top r$ with $q = H^+ F_y$. Without it the error is that of r
    itself. The part that is left out is no function of x, because it is zero along the
    minima.
    """
    if not _range_matters(problem, x, y, linear_solver):
        return problem.inner_residual(x, y)
    r, jacobian = _linearised(lambda y: problem.inner_residual(x, y), y)
    jacobian = _as_matrix_if_small(jacobian, y, r)
    return _without_range(y, r, jacobian, linear_solver)


def _range_matters(problem, x, y, linear_solver) -> bool:
    """Whether to take out of r what lies in the range of A: if A moves, and the solver
    works on A."""
    splits = says(linear_solver, "splits_squares", False)
    # In a set, A^T r need not be zero at a minimum.
    return splits and not set_y(problem).confines and _jacobian_varies(problem, x, y)


def _as_matrix_if_small(jacobian, y, r):
    vectors = all(eqx.is_array(u) and u.ndim == 1 for u in (y, r))
    if not vectors or y.dtype != r.dtype or min(y.size, r.size) > DENSE_SIZE:
        return jacobian
    # As many products as the smaller side has entries.
    if r.size < y.size:
        rows = jax.vmap(jacobian.transpose().mv)(jnp.eye(r.size, dtype=r.dtype))
        return lx.MatrixLinearOperator(rows)
    columns = jax.vmap(jacobian.mv)(jnp.eye(y.size, dtype=y.dtype))
    return lx.MatrixLinearOperator(columns.T)


def _without_range(y, r, jacobian, linear_solver):
    """r without its part in the range of A, if that is small."""
    dynamic, static = eqx.partition((jacobian, r), eqx.is_array)
    A, fixed = eqx.combine(jax.lax.stop_gradient(dynamic), static)
    K = AugmentedHessian(LeastSquaresHessian(A, None, frozenset()))
    state = linear_solver.init(K, options={})
    right = fixed, tree_zeros_like(y)
    # The solution is p = A A^+ r - r.
    (p, _), _, _ = linear_solver.compute(state, right, {})
    return less_range(r, tree_axpy(1.0, p, fixed), A.mv(jax.lax.stop_gradient(y)))


def less_range(
    r: PyTree[Array], part: PyTree[Array], terms: PyTree[Array]
) -> PyTree[Array]:
    """r less its part in the range of A, if that is small beside r and A y: rounding, or
    what is left of an inner solve. Further away the derivatives are those at y itself."""
    r_fixed, part, terms = jax.lax.stop_gradient((r, part, terms))
    root = tree_eps(r) ** 0.5
    size = jnp.sqrt(tree_dot(terms, terms)) + jnp.sqrt(tree_dot(r_fixed, r_fixed))
    is_small = jnp.sqrt(tree_dot(part, part)) <= root * size
    return tree_sub(r, jax.tree.map(lambda u: jnp.where(is_small, u, 0), part))


def squares_condition(
    problem: Any, x: PyTree[Array], y: PyTree[Array], w: PyTree[Array] | None = None
) -> Callable[[Any, PyTree], tuple[PyTree, PyTree]]:
    r"""$(r - w, A^\top w)$ at this y for $w = r$, as a function of a sum of squares and
    of x. Its derivative in $(w, y)$ is `AugmentedHessian`. w may be the
    `stationary_residual` instead."""
    if w is None:
        w = problem.inner_residual(x, y)

    def condition(problem, x):
        residual, pull = jax.vjp(lambda y: problem.inner_residual(x, y), y)
        return tree_sub(residual, w), pull(w)[0]

    return condition


class TransposedRows(eqx.Module):
    r"""$q \mapsto B^\top q$, for the rows of B in a pytree like x."""

    rows: PyTree[Array]

    def __call__(self, q: Float[Array, " n"]) -> PyTree[Array]:
        def product(rows):
            highest = jax.lax.Precision.HIGHEST
            return jnp.tensordot(q.astype(rows.dtype), rows, 1, precision=highest)

        return jax.tree.map(product, self.rows)


def curved_hessian(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: Float[Array, " n"], tags: Any
) -> tuple[Scalar, Float[Array, " n"], CurvedHessian, TransposedRows | None]:
    r"""f, f_y and the matrix of H, with the one a step of steepest descent further; and
    the map $q \mapsto B^\top q$, if x is small enough for a matrix."""
    unit = jnp.eye(y.size, dtype=y.dtype)
    # The rows of B come with those of H, and need no program of their own.
    argnums = (1, 0) if tree_size(x) <= DENSE_SIZE else (1,)

    def next_and_this(_, carry):
        this, _ = carry

        def slopes_and_value(y):
            value, slopes = jax.value_and_grad(problem.inner, argnums)(x, y)
            return slopes, value.astype(y.dtype)

        slopes, push, value = jax.linearize(slopes_and_value, this[0], has_aux=True)
        rows = jax.vmap(push)(unit)
        g, H = jax.lax.stop_gradient((slopes[0], rows[0]))
        square, curvature = jnp.abs(vector_dots(g, g, g @ H))
        length = where(curvature == 0, 0, square / nonzero(curvature))
        further = jax.lax.stop_gradient(this[0]) - length * g
        return (further, value, slopes[0], rows), this

    def empty(u):
        return jnp.zeros((y.size, *u.shape), u.dtype)

    # Twice the same, in one loop: that is half as long a program.
    rows = tuple(jax.tree.map(empty, (y, x)[: len(argnums)]))
    start = y, jnp.zeros((), y.dtype), jnp.zeros_like(y), rows
    further, here = jax.lax.fori_loop(0, 2, next_and_this, (start, start))
    _, value, gradient, (matrix, *cross) = here
    hessian = lx.MatrixLinearOperator(matrix, frozenset(tags) | {lx.symmetric_tag})
    curved = CurvedHessian(hessian, jax.lax.stop_gradient(further[-1][0]))
    return value, gradient, curved, TransposedRows(*cross) if cross else None


def gauss_newton_hessian(
    problem: AbstractLeastSquaresProblem, x: PyTree[Array], y: PyTree[Array]
) -> LeastSquaresHessian:
    r"""$A^\top A$: the inner Hessian without the curvature of the residual."""
    _, jacobian = _linearised(lambda y: problem.inner_residual(x, y), y)
    tags = frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag})
    return LeastSquaresHessian(jacobian, None, tags)


def hessian_depends_on_y(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> bool:
    """Whether the inner Hessian depends on y, so that S(x) need not be a plane."""
    return last_argument_matters(_hessian_times_ones, problem, x, y)


def hessian_depends_on_x(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> bool:
    """Whether the inner Hessian depends on x, so that its null space may too."""
    return depends_on(lambda x: _hessian_times_ones(problem, x, y), x)


def _hessian_times_ones(problem, x, y):
    ones = jax.tree.map(jnp.ones_like, y)
    # Not `jax.jvp`: JAX cannot take its second derivative if an objective has a
    # `jax.custom_vjp`.
    return jax.linearize(lambda y: inner_gradient(problem, x, y), y)[1](ones)


class HessianAt(eqx.Module):
    """y -> the Hessian for a Newton step; for a sum of squares, that of Gauss-Newton."""

    problem: AbstractBilevelProblem
    x: PyTree[Array]

    def __call__(self, y: PyTree[Array]) -> lx.AbstractLinearOperator:
        if isinstance(self.problem, AbstractLeastSquaresProblem):
            return gauss_newton_hessian(self.problem, self.x, y)
        return gradient_and_hessian(self.problem, self.x, y)[1]


def _is_curved_residual(problem, x, y):
    return last_argument_matters(_jacobian_times_ones, problem, x, y)


def _jacobian_varies(problem, x, y):
    """Whether the Jacobian of the residual depends on x or y."""
    return _is_curved_residual(problem, x, y) or depends_on(
        lambda x: _jacobian_times_ones(problem, x, y), x
    )


def _jacobian_times_ones(problem, x, y):
    ones = jax.tree.map(jnp.ones_like, y)
    return jax.jvp(lambda y: problem.inner_residual(x, y), (y,), (ones,))[1]


def cross_derivative_operator(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> lx.AbstractLinearOperator:
    """B, without the checks of the public function."""
    return derivative_in_x(lambda x: inner_gradient(problem, x, y), x)


def derivative_in_x(
    gradient: Callable[[PyTree], PyTree], x: PyTree[Array]
) -> lx.AbstractLinearOperator:
    """The derivative of a gradient in x."""
    return CrossDerivative(_linearised(gradient, x)[1])
