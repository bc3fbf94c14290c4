"""What a response is: how the inner variables answer the outer ones."""

import abc
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import lineax as lx
from jaxtyping import PyTree

from .._custom_types import X, Y
from .._failure.results import RESULTS
from .._problem.base import AbstractBilevelProblem


class Response(eqx.Module, Generic[X, Y]):
    r"""What a response returns.

    **Attributes:**

    - `y`: the inner variables that answer x.
    - `jacobian`: the response Jacobian $J = \partial y / \partial x$, a lineax operator
        from pytrees like `x` to pytrees like `y`. A linear solve in it that fails
        raises.
    - `result`: whether the inner solve succeeded, one of `bilevel_eqx.RESULTS`.
    - `stats`: figures of the inner solve. `stats["inner_residual"]` is the norm of
        what the response presumes to be zero: $\nabla_y f$ if implicit, that of the
        proximal objective if proximal, nothing at all if unrolled.
    - `pullback`: the map from cotangents $u$ to $(J^\top u, \text{result},
        \text{stats})$, which reports the linear solve instead of raising.
    - `state`: what the response carries from one call to the next (the optimiser state
        of an unrolled one), or `None`.
    """

    y: Y
    jacobian: lx.AbstractLinearOperator
    result: RESULTS
    stats: dict[str, Any]
    pullback: Callable[[Y], tuple[X, RESULTS, dict[str, Any]]]
    state: Any = None


class TransposedJacobian(eqx.Module):
    """The pullback of a Jacobian that needs no linear solve."""

    transpose: Callable

    def __call__(self, cotangent):
        return self.transpose(cotangent), RESULTS.successful, {}


class AbstractResponse(eqx.Module):
    r"""A response: a map from the outer variables $x$ and an **anchor** (the point that
    the inner variables start from) to inner variables $y$ and the Jacobian
    $\partial y / \partial x$ at a fixed anchor.

    Call it as `response(problem, x, anchor)`. The methods of the field differ in
    nothing but this.
    """

    @abc.abstractmethod
    def init(self, problem: AbstractBilevelProblem, x: PyTree, anchor: PyTree) -> Any:
        """What is carried from one call to the next, before the first; or `None`."""

    @abc.abstractmethod
    def __call__(
        self,
        problem: AbstractBilevelProblem,
        x: PyTree,
        anchor: PyTree,
        state: Any = None,
    ) -> Response:
        """Answers x from the anchor.

        **Arguments:**

        - `problem`: the bilevel problem.
        - `x`: the outer variables, a pytree of floating-point arrays.
        - `anchor`: the inner variables to start from, a pytree of the same kind.
        - `state`: the `state` of the last [`bilevel_eqx.Response`][], to go on from it.

        **Returns:**

        A [`bilevel_eqx.Response`][].
        """

    @abc.abstractmethod
    def best_response(
        self, problem: AbstractBilevelProblem, x: PyTree, anchor: PyTree
    ) -> tuple[PyTree, RESULTS]:
        """Only `y`, differentiable in all that it depends on, and the result."""

    @abc.abstractmethod
    def reaches(self, problem: AbstractBilevelProblem, x: PyTree, anchor: PyTree) -> bool:
        """Whether y can depend on x at all."""
