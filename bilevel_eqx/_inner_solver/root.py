"""The inner root, by any solver of optimistix."""

from typing import Any

import equinox as eqx
import optimistix as optx
from jaxtyping import Array, PyTree

from .._failure.results import finite_or_not, RESULTS
from .._problem.least_squares import LeastSquaresProblem
from .._problem.root import AbstractRootProblem, fixed_point_map
from .._tree import Layout, tree_norm
from .minimum import minimise_inner


def _root(y, args):
    problem, x = args
    return problem.root(x, y)


def _fixed_point(y, args):
    problem, x = args
    return fixed_point_map(problem, x, y)


class _InOneVector(eqx.Module):
    """The residual as one vector, of which a Jacobian can be made a matrix even if its
    leaves have several types."""

    problem: AbstractRootProblem

    def __call__(self, x, y):
        residual = self.problem.root(x, y)
        return Layout(residual).ravel(residual)


def find_root(
    problem: AbstractRootProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    solver: Any,
    max_steps: int | None = None,
) -> optx.Solution:
    r"""Runs a solver on r(x, y) = 0, from y. It does not throw.

    A minimiser gets $\tfrac12 \|r\|^2$ and what belongs to a sum of squares: the steps of
    `Projection` are then $-(\partial r / \partial y)^+ r$, those of Newton.
    """
    if isinstance(solver, optx.AbstractMinimiser):
        squares = LeastSquaresProblem(problem.outer, _InOneVector(problem))
        return minimise_inner(squares, x, y, solver, max_steps)
    if isinstance(solver, optx.Bisection):
        raise ValueError(
            "`optx.Bisection` needs bounds of the root, which a response has no place "
            "for. Use `optx.Newton(rtol, atol)` or `Projection()`."
        )
    arguments: dict = dict(args=(problem, x), max_steps=max_steps, throw=False)
    if isinstance(solver, optx.AbstractFixedPointSolver):
        return optx.fixed_point(_fixed_point, solver, y, **arguments)
    return optx.root_find(_root, solver, y, **arguments)


def why_no_root(
    problem: AbstractRootProblem,
    x: PyTree[Array],
    anchor: PyTree[Array],
    residual: PyTree[Array],
) -> RESULTS:
    """The name of the failure, if this residual is not small enough."""
    start = problem.root(x, anchor)
    # Negated, so that NaN has grown too.
    grown = ~(tree_norm(residual) <= tree_norm(start))
    failure = RESULTS.where(grown, RESULTS.root_diverged, RESULTS.root_not_converged)
    at_start = finite_or_not(start)
    return RESULTS.where(at_start == RESULTS.successful, failure, at_start)
