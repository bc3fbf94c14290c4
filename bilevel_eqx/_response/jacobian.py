"""The response Jacobian as an operator."""

import equinox as eqx
import lineax as lx
from jaxtyping import PyTree, ScalarLike

from .._arguments import as_variables, check_positive
from .._custom_types import typechecked
from .._derivatives.operators import damped
from .._derivatives.public import cross_derivative, inner_hessian, is_nonzero
from .._derivatives.second import derivative_in_x, squares_condition
from .._linalg.precision import in_full_precision_if_small
from .._linear_solver.judged import throwing
from .._linear_solver.misc import augmented, check_symmetry
from .._mesh import check_mesh_of_operator
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_y
from .._problem.root import AbstractRootProblem


@in_full_precision_if_small("y")
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
    missing there. The inverse is that of `linear_solver`: a pseudoinverse, a truncated
    series, or a factorisation.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `y`: the inner variables, a pytree of floating-point arrays. The inner problem is
        not solved: J is evaluated at this y.
    - `linear_solver`: any lineax solver. H is tagged as positive semidefinite, as it
        is at a minimum, so that `lx.CG` and `lx.Cholesky` accept it. The Jacobian of a
        root has no tags.
    - `damping`: the $\epsilon$ above. Keyword only argument.

    **Returns:**

    A lineax operator from pytrees like `x` to pytrees like `y`.

    **Raises:** as [`bilevel_eqx.inner_hessian`][]; also a `ValueError` if `damping` is
    negative, or if the problem confines y to a set. A linear solve that fails raises
    when a product is taken: the answers of linear solvers of other libraries are
    checked, as [`bilevel_eqx.hypergradient`][] checks them. (A factorisation of a
    singular H may return finite numbers without a meaning.)

    ??? cite "Reference"

        Vicol, Lorraine, Duvenaud and Grosse, *Implicit Regularization in
        Overparameterized Bilevel Optimization*, 2021: Table 1 and Equation 4.
    """
    check_positive(damping, "damping", "response_jacobian", or_zero=True)
    if set_y(problem).confines:
        raise ValueError(
            "`response_jacobian` is for inner problems without constraints, but this "
            "problem has a `project_y`. Use `Implicit(None, linear_solver)(problem, x, "
            "y).jacobian`, which is the Jacobian in the set."
        )
    x, y = as_variables(x, "x"), as_variables(y, "y")
    check_mesh_of_operator((problem, x, y), "response_jacobian")
    check_symmetry(problem, linear_solver)
    is_root = isinstance(problem, AbstractRootProblem)
    tags = () if is_root else {lx.positive_semidefinite_tag}
    H = inner_hessian(problem, x, y, tags=tags)
    solver = throwing(linear_solver)
    if is_nonzero(damping):
        H = damped(H, damping)
    K = augmented(linear_solver, H)
    if K is None:
        return -(lx.invert(H, solver) @ cross_derivative(problem, x, y))
    condition = squares_condition(problem, x, y)
    B = derivative_in_x(lambda x: condition(problem, x), x)
    second = lx.FunctionLinearOperator(_Second(), K.in_structure())
    return -(second @ lx.invert(K, solver) @ B)


class _Second(eqx.Module):
    """One of two. A module, so that the operator may leave a program."""

    def __call__(self, both):
        return both[1]
