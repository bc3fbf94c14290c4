"""The operators of a bilevel problem for its users: H, B and the response Jacobian."""

from collections.abc import Iterable

import lineax as lx
from jaxtyping import PyTree, ScalarLike

from .._arguments import as_variables, check_positive, is_traced
from .._custom_types import typechecked
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .operators import damped
from .second import cross_derivative_operator, gradient_and_hessian


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
