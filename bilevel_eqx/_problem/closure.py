"""The inner problem with all that its functions close over as leaves."""

import equinox as eqx
from jaxtyping import Array, PyTree

from .base import AbstractBilevelProblem, BilevelProblem
from .constraints import projection_y
from .least_squares import AbstractLeastSquaresProblem, LeastSquaresProblem


def _no_outer(x, y):
    raise RuntimeError("The inner problem alone was kept; it has no outer objective.")


def closure_converted(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> AbstractBilevelProblem:
    """The inner problem of `problem`, with all that its functions close over as leaves.

    A derivative rule sees only its arguments. Without this, a value that the inner
    objective closes over would have a derivative of zero, without a word.
    """
    project_y = projection_y(problem)
    if project_y is not None:
        project_y = eqx.filter_closure_convert(project_y, y)
    if isinstance(problem, AbstractLeastSquaresProblem):
        residual = eqx.filter_closure_convert(problem.inner_residual, x, y)
        return LeastSquaresProblem(_no_outer, residual, project_y=project_y)
    inner = eqx.filter_closure_convert(problem.inner, x, y)
    return BilevelProblem(_no_outer, inner, project_y=project_y)
