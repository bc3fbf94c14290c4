"""The inner minimum, by any minimiser. A minimiser may use more than the objective.

A minimiser describes itself by class attributes:

- `projects` (False): it uses `options["projection"]`, and so stays in a set.
- `counts_its_steps` (False): it has its own largest number of steps.
- `is_default` (False): it is `Projection` as by default, or with more steps. A search for
    the nearest minimum may then begin elsewhere; see `proximal_path.py`.
"""

from typing import Any

import equinox as eqx
import optimistix as optx
from jaxtyping import Array, PyTree

from .._arguments import says
from .._derivatives.second import HessianAt
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_y
from .._problem.least_squares import AbstractLeastSquaresProblem


InnerSolver = optx.AbstractIterativeSolver | None
"""The type of an inner solver. With `None` the anchor must be a solution."""


def _options(problem, x, curved: bool | None) -> dict[str, Any]:
    """The `options` of `optimistix.minimise` for the inner problem at x."""
    options = {"hessian": HessianAt(problem, x), "projection": None, "residual": None}
    options["curved"] = curved
    if set_y(problem).confines:
        options["projection"] = set_y(problem).project
    if isinstance(problem, AbstractLeastSquaresProblem):
        options["residual"] = eqx.Partial(problem.inner_residual, x)
    return options


def _objective(y, args):
    problem, x = args
    return problem.inner(x, y)


def _residual(y, args):
    problem, x = args
    return problem.inner_residual(x, y)


def minimise_inner(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    solver: optx.AbstractMinimiser | optx.AbstractLeastSquaresSolver,
    max_steps: int | None = None,
    curved: bool | None = None,
) -> optx.Solution:
    """Runs a minimiser on the inner problem at x, from y. It does not throw.

    `curved` says whether H depends on y, if that is known already: a minimiser may ask.
    """
    # Some minimisers have their own largest number of steps.
    counts = says(solver, "counts_its_steps", False)
    args, max_steps = (problem, x), None if counts else max_steps
    if isinstance(solver, optx.AbstractLeastSquaresSolver):
        if not isinstance(problem, AbstractLeastSquaresProblem):
            raise ValueError(
                f"`{type(solver).__name__}` needs the residual of a sum of squares. "
                "State the problem as a `LeastSquaresProblem`, or use a minimiser."
            )
        return optx.least_squares(
            _residual, solver, y, args, max_steps=max_steps, throw=False
        )
    options = _options(problem, x, curved)
    return optx.minimise(
        _objective, solver, y, args, options, max_steps=max_steps, throw=False
    )
