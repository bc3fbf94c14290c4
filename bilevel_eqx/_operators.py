r"""The linear operators of a bilevel problem: H, B and the response Jacobian.

All are lineax operators, over any pytrees of outer and inner variables, and each
linearises the gradient once however many products are taken with it.
"""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree, ScalarLike

from ._custom_types import typechecked
from ._misc import as_variables, check_positive, depends_on, is_traced, tree_struct
from ._problem import (
    AbstractBilevelProblem,
    AbstractLeastSquaresProblem,
    check_problem,
    inner_gradient,
)


class _CurvedTag:
    def __repr__(self):
        return "curved_tag"


curved_tag = _CurvedTag()
"""A tag of lineax operators: an inner Hessian that depends on y.

Its null space is the tangent space of $S(x)$ only at an exact minimum. Near one, what
should be zero is as large as the error of y, and a pseudoinverse must not invert it.
"""


class LeastSquaresHessian(lx.AbstractLinearOperator):
    r"""The inner Hessian of a sum of squares, which also knows the factor of its main
    part: $H = A^\top A + C$, where $A = \partial r / \partial y$.

    $C = \sum_i r_i \nabla^2 r_i$ vanishes where the residual is linear in y (`curved`
    is then `False`) and wherever the residual is zero.
    """

    hessian: lx.AbstractLinearOperator
    residual_jacobian: lx.AbstractLinearOperator
    curved: bool = eqx.field(static=True)

    def mv(self, vector):
        return self.hessian.mv(vector)

    def as_matrix(self):
        return self.hessian.as_matrix()

    def transpose(self):
        return self

    def in_structure(self):
        return self.hessian.in_structure()

    def out_structure(self):
        return self.hessian.out_structure()


for _query in (
    lx.is_symmetric,
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_positive_semidefinite,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
    lx.diagonal,
    lx.tridiagonal,
    lx.materialise,
):
    _query.register(LeastSquaresHessian)(
        lambda operator, query=_query: query(operator.hessian)  # pyright: ignore
    )
for _transform in (lx.linearise, lx.conj):
    _transform.register(LeastSquaresHessian)(  # pyright: ignore
        lambda operator, transform=_transform: LeastSquaresHessian(
            transform(operator.hessian),
            transform(operator.residual_jacobian),
            operator.curved,
        )
    )


class CrossDerivative(lx.AbstractLinearOperator):
    """B, of which nothing is presumed.

    lineax takes any map from one number to another to be diagonal, and a product of two
    such to be symmetric; it then refuses x and y of one number each in different shapes.
    """

    operator: lx.AbstractLinearOperator

    def mv(self, vector):
        return self.operator.mv(vector)

    def as_matrix(self):
        return self.operator.as_matrix()

    def transpose(self):
        return CrossDerivative(self.operator.transpose())

    def in_structure(self):
        return self.operator.in_structure()

    def out_structure(self):
        return self.operator.out_structure()


for _query in (
    lx.is_symmetric,
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_positive_semidefinite,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
):
    _query.register(CrossDerivative)(lambda operator: False)  # pyright: ignore
for _transform in (lx.linearise, lx.conj, lx.materialise):
    _transform.register(CrossDerivative)(  # pyright: ignore
        lambda operator, transform=_transform: CrossDerivative(
            transform(operator.operator)
        )
    )


def _linearised(fn, at: PyTree[Array], tags: Iterable[object] = ()):
    """`fn(at)`, and the Jacobian of `fn` there, from one linearisation."""
    value, tangent_map = jax.linearize(fn, at)
    return value, lx.FunctionLinearOperator(tangent_map, tree_struct(at), tags)


def gradient_and_hessian(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array], tags: Any = ()
) -> tuple[PyTree[Array], lx.AbstractLinearOperator]:
    """The inner gradient, which linearising it yields anyway, and the inner Hessian."""
    # `positive_semidefinite_tag` alone does not make an operator symmetric to lineax.
    tags = frozenset(tags) | {lx.symmetric_tag}
    gradient, hessian = _linearised(lambda y: inner_gradient(problem, x, y), y, tags)
    if isinstance(problem, AbstractLeastSquaresProblem):
        _, jacobian = _linearised(lambda y: problem.inner_residual(x, y), y)
        hessian = LeastSquaresHessian(
            hessian, jacobian, _is_curved_residual(problem, x, y)
        )
    return gradient, hessian


def gauss_newton_hessian(
    problem: AbstractLeastSquaresProblem, x: PyTree[Array], y: PyTree[Array]
) -> LeastSquaresHessian:
    r"""$A^\top A$: the inner Hessian without the curvature of the residual."""
    _, jacobian = _linearised(lambda y: problem.inner_residual(x, y), y)
    tags = {lx.symmetric_tag, lx.positive_semidefinite_tag}
    hessian = lx.TaggedLinearOperator(jacobian.T @ jacobian, tags)
    return LeastSquaresHessian(hessian, jacobian, curved=False)


def is_curved(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> bool:
    """Whether the inner Hessian depends on y, so that S(x) need not be a plane."""
    return depends_on(lambda y: _hessian_times_ones(problem, x, y), y)


def is_turning(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> bool:
    """Whether the inner Hessian depends on x, so that S(x) may turn where x moves."""
    return depends_on(lambda x: _hessian_times_ones(problem, x, y), x)


def _hessian_times_ones(problem, x, y):
    ones = jax.tree.map(jnp.ones_like, y)
    return jax.jvp(lambda y: inner_gradient(problem, x, y), (y,), (ones,))[1]


class HessianAt(eqx.Module):
    """y -> the Hessian for a Newton step: Gauss and Newton's, for a sum of squares."""

    problem: AbstractBilevelProblem
    x: PyTree[Array]

    def __call__(self, y: PyTree[Array]) -> lx.AbstractLinearOperator:
        if isinstance(self.problem, AbstractLeastSquaresProblem):
            return gauss_newton_hessian(self.problem, self.x, y)
        return gradient_and_hessian(self.problem, self.x, y)[1]


def _is_curved_residual(problem, x, y):
    def jacobian_times_ones(y):
        ones = jax.tree.map(jnp.ones_like, y)
        return jax.jvp(lambda y: problem.inner_residual(x, y), (y,), (ones,))[1]

    return depends_on(jacobian_times_ones, y)


def cross_derivative_operator(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> lx.AbstractLinearOperator:
    """B, without the checks of the public function."""
    return CrossDerivative(_linearised(lambda x: inner_gradient(problem, x, y), x)[1])


def damped(
    operator: lx.AbstractLinearOperator, damping: ScalarLike
) -> lx.AbstractLinearOperator:
    """H + damping I, with the tags of H: lineax drops them from a sum."""
    tags = {lx.symmetric_tag}
    if lx.is_positive_semidefinite(operator):
        tags.add(lx.positive_semidefinite_tag)

    def mv(vector):
        return jax.tree.map(
            lambda hv, v: hv + jnp.asarray(damping, v.dtype) * v,
            operator.mv(vector),
            vector,
        )

    # Not `H + damping * lx.IdentityLinearOperator(...)`, which promotes float32 to
    # float64 where 64-bit types are enabled.
    return lx.FunctionLinearOperator(mv, operator.in_structure(), tags)


@typechecked
def inner_hessian(
    problem: AbstractBilevelProblem,
    x: PyTree,
    y: PyTree,
    *,
    tags: Iterable[object] = (),
) -> lx.AbstractLinearOperator:
    r"""The Hessian of the inner objective in the inner variables,
    $H = \partial^2 f / \partial y \partial y$.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `y`: the inner variables, a pytree of floating-point arrays.
    - `tags`: what is known of H beyond its symmetry, for instance
        `{lx.positive_semidefinite_tag}` at a minimum. `lx.CG` and `lx.Cholesky` ask for
        that one. Tags are not checked. Keyword only argument.

    **Returns:**

    A symmetric lineax operator from pytrees like `y` to pytrees like `y`. Each product
    with it is one Hessian-vector product; the gradient was linearised once, here.

    **Raises:**

    A `ValueError` if an objective is not a scalar, if the inner one does not depend on
    y, or if a leaf of `x` or `y` is not a floating-point array.
    """
    x, y = as_variables(x, "x"), as_variables(y, "y")
    check_problem(problem, x, y)
    return gradient_and_hessian(problem, x, y, tags)[1]


@typechecked
def cross_derivative(
    problem: AbstractBilevelProblem, x: PyTree, y: PyTree
) -> lx.AbstractLinearOperator:
    r"""The mixed second derivative of the inner objective,
    $B = \partial^2 f / \partial x \partial y$, from tangents of $x$ to cotangents
    of $y$.

    (In the paper's anti-distillation task it is $-\Phi^\top$; the paper's text has lost
    that sign.)

    **Arguments:** as for [`bilevel_eqx.inner_hessian`][].

    **Returns:**

    A lineax operator from pytrees like `x` to pytrees like `y`.

    **Raises:** as [`bilevel_eqx.inner_hessian`][].
    """
    x, y = as_variables(x, "x"), as_variables(y, "y")
    check_problem(problem, x, y)
    return cross_derivative_operator(problem, x, y)


@typechecked
def response_jacobian(
    problem: AbstractBilevelProblem,
    x: PyTree,
    y: PyTree,
    linear_solver: lx.AbstractLinearSolver,
    *,
    damping: ScalarLike = 0.0,
) -> lx.AbstractLinearOperator:
    r"""The response Jacobian of the implicit function theorem,

    $$\frac{\partial y^*}{\partial x} = -(H + \epsilon I)^{-1} B,$$

    which is the row "response Jacobian" of Table 1 of the paper, with the sign that is
    missing there. The inverse is whatever `linear_solver` makes of it: a pseudoinverse,
    a truncated series, a factorisation.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `y`: the inner variables, a pytree of floating-point arrays. They are taken as
        they are: no inner problem is solved.
    - `linear_solver`: any lineax solver. H is tagged as positive semidefinite, as it
        is at a minimum; `lx.CG` and `lx.Cholesky` therefore accept it.
    - `damping`: the $\epsilon$ above. Keyword only argument.

    **Returns:**

    A lineax operator from pytrees like `x` to pytrees like `y`.

    **Raises:** as [`bilevel_eqx.inner_hessian`][]; also a `ValueError` if `damping` is
    negative, or if the problem confines y to a set. A linear solve that fails raises
    when a product is taken.

    ??? cite "Reference"

        Vicol, Lorraine, Duvenaud and Grosse, *Implicit Regularization in
        Overparameterized Bilevel Optimization*, 2021: Table 1 and Equation 4.
    """
    check_positive(damping, "damping", "response_jacobian", or_zero=True)
    if problem.project_y is not None:
        raise ValueError(
            "`response_jacobian` is that of an inner minimum without constraints, and "
            "this problem has a `project_y`. `Implicit(None, linear_solver)(problem, x, "
            "y).jacobian` is the one in the set."
        )
    H = inner_hessian(problem, x, y, tags={lx.positive_semidefinite_tag})
    B = cross_derivative(problem, x, y)
    if is_nonzero(damping):
        H = damped(H, damping)
    return -(lx.invert(H, linear_solver) @ B)


def is_nonzero(damping: ScalarLike) -> bool:
    """Whether a damping is there at all; one known only at run time is."""
    return is_traced(damping) or bool(damping != 0)
