"""The inner problem, with everything that its functions close over as leaves."""

import equinox as eqx
from jaxtyping import Array, PyTree

from .base import AbstractBilevelProblem, BilevelProblem
from .constraints import set_y
from .least_squares import AbstractLeastSquaresProblem, LeastSquaresProblem
from .root import AbstractRootProblem, RootProblem


def _no_outer(x, y):
    raise RuntimeError("This is only the inner problem; it has no outer objective.")


def closure_converted(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> AbstractBilevelProblem:
    """The inner problem of `problem`, with everything that its functions close over as
    leaves.

    A derivative rule sees only its arguments. Without this, the derivative with respect
    to a value that the inner objective closes over would silently be zero.
    """
    if isinstance(problem, AbstractRootProblem):
        root = eqx.filter_closure_convert(problem.root, x, y)
        return RootProblem(_no_outer, root)
    project_y = None
    if set_y(problem).confines:
        project_y = eqx.filter_closure_convert(set_y(problem).project, y)
    if isinstance(problem, AbstractLeastSquaresProblem):
        residual = eqx.filter_closure_convert(problem.inner_residual, x, y)
        return LeastSquaresProblem(_no_outer, residual, project_y=project_y)
    inner = eqx.filter_closure_convert(problem.inner, x, y)
    return BilevelProblem(_no_outer, inner, project_y=project_y)
