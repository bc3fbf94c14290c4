"""Whether x is a minimum, to second order."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import lineax as lx
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from .._linalg.eigenbasis import eigenbasis, negative_curvature
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_x
from .._tree import tree_struct


class Derivatives(NamedTuple):
    """Those of $F(x, y(x))$."""

    gradient: PyTree[Array]
    product: Callable[[PyTree[Array]], PyTree[Array]]
    """With the second derivative."""
    what: str = "the same to second order: d^2 F(x, y(x)) / dx^2 >= 0"


def derivatives(fn: Callable[[PyTree[Array]], Scalar], x: PyTree[Array]) -> Derivatives:
    """Those of a function at x."""
    return Derivatives(*jax.linearize(jax.grad(fn), x))


NOT_A_MINIMUM = "x is stationary: whether it is a minimum is not checked"


def outer_curvature(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    gradient: PyTree[Array],
    product: Callable[[PyTree[Array]], PyTree[Array]],
    what: str,
    scale: ScalarLike = 0.0,
) -> dict:
    """The entry on second derivatives in x, within the set of x. `scale` is the size of
    the terms that cancel in them."""
    hessian = lx.FunctionLinearOperator(product, tree_struct(x), lx.symmetric_tag)
    restricted = set_x(problem).stationarity(gradient, hessian, x).hessian
    return {"outer curvature": (negative_curvature(eigenbasis(restricted), scale), what)}
