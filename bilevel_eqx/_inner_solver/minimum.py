"""The inner minimum, by any minimiser. A minimiser may use more than the objective.

A minimiser describes itself by class attributes:

- `projects` (False): it uses `options["projection"]`, and so stays in a set.
- `counts_its_steps` (False): it has its own largest number of steps.
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


def _options(problem: AbstractBilevelProblem, x: PyTree[Array]) -> dict[str, Any]:
    """The `options` of `optimistix.minimise` for the inner problem at x."""
    options = {"hessian": HessianAt(problem, x), "projection": None, "residual": None}
    if set_y(problem).confines:
        options["projection"] = set_y(problem).project
    if isinstance(problem, AbstractLeastSquaresProblem):
        options["residual"] = eqx.Partial(problem.inner_residual, x)
    return options


def _objective(y, args):
    problem, x = args
    return problem.inner(x, y)


def minimise_inner(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    solver: optx.AbstractMinimiser,
    max_steps: int | None = None,
) -> optx.Solution:
    """Runs a minimiser on the inner problem at x, from y. It does not throw."""
    # Some minimisers have their own largest number of steps.
    counts = says(solver, "counts_its_steps", False)
    return optx.minimise(
        _objective,
        solver,
        y,
        args=(problem, x),
        options=_options(problem, x),
        max_steps=None if counts else max_steps,
        throw=False,
    )
