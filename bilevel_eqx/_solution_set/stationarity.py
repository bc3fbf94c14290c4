"""What an inner minimum is to first order, and how it moves: with constraints or not."""

from typing import Any

from jaxtyping import Array, PyTree

from .._derivatives.second import gradient_and_hessian
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_y, Stationarity


def stationarity(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array], tags: Any = ()
) -> Stationarity:
    """The first-order condition of the inner problem at (x, y)."""
    gradient, H = gradient_and_hessian(problem, x, y, tags)
    return set_y(problem).stationarity(gradient, H, y, tags)
