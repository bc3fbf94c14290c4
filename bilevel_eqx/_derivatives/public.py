"""The public operators of a bilevel problem: H and B."""

from collections.abc import Iterable

import lineax as lx
from jaxtyping import PyTree, ScalarLike

from .._arguments import as_variables
from .._compat import is_traced
from .._custom_types import typechecked
from .._linalg.precision import in_full_precision_if_small
from .._mesh import check_mesh_of_operator
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .second import cross_derivative_operator, gradient_and_hessian


@in_full_precision_if_small("y")
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
    - `tags`: further properties of H, which is tagged as symmetric; for instance
        `{lx.positive_semidefinite_tag}` at a minimum, which `lx.CG` and `lx.Cholesky`
        need. Tags are not checked. Keyword only argument.

    **Returns:**

    A symmetric lineax operator from pytrees like `y` to pytrees like `y`. Each product
    with it is one Hessian-vector product. The gradient is linearised once, in this call.
    For an [`bilevel_eqx.AbstractRootProblem`][] it is $\partial r / \partial y$, which
    is not symmetric in general.

    **Raises:**

    A `ValueError` if an objective is not a scalar, if the inner one does not depend on
    y, or if a leaf of `x` or `y` is not a floating-point array; or if an array is on a
    mesh with Explicit axes, which lineax does not work with.
    """
    x, y = as_variables(x, "x"), as_variables(y, "y")
    check_mesh_of_operator((problem, x, y), "inner_hessian")
    check_problem(problem, x, y)
    return gradient_and_hessian(problem, x, y, tags)[1]


@in_full_precision_if_small("y")
@typechecked
def cross_derivative(
    problem: AbstractBilevelProblem, x: PyTree, y: PyTree
) -> lx.AbstractLinearOperator:
    r"""The mixed second derivative of the inner objective,
    $B = \partial^2 f / \partial x \partial y$, from tangents of $x$ to cotangents
    of $y$.

    (In the paper's anti-distillation task it is $-\Phi^\top$; that sign is missing in the
    paper's text.)

    **Arguments:** as for [`bilevel_eqx.inner_hessian`][].

    **Returns:**

    A lineax operator from pytrees like `x` to pytrees like `y`. For an
    [`bilevel_eqx.AbstractRootProblem`][] it is $\partial r / \partial x$.

    **Raises:** as [`bilevel_eqx.inner_hessian`][].
    """
    x, y = as_variables(x, "x"), as_variables(y, "y")
    check_mesh_of_operator((problem, x, y), "cross_derivative")
    check_problem(problem, x, y)
    return cross_derivative_operator(problem, x, y)


def is_nonzero(damping: ScalarLike) -> bool:
    """Whether a damping is nonzero. A traced damping counts as nonzero."""
    return is_traced(damping) or bool(damping != 0)
