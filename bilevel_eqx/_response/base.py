"""Responses: how the inner variables depend on the outer ones."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple

import equinox as eqx
import lineax as lx
from jaxtyping import PyTree, Scalar

from .._custom_types import X, Y
from .._failure.results import RESULTS
from .._problem.base import AbstractBilevelProblem
from .._tree import tree_struct


class Pulled(NamedTuple):
    r"""What a `pullback` returns.

    - `cotangent`: $J^\top u$, a pytree like `x`.
    - `result`: whether its linear solve succeeded.
    - `stats`: statistics of the linear solve, as `linear_...`.
    - `adjoint`: the solution $q \approx H^{-1} u$ of that solve, a pytree like `y`; or
        `None` if there is no linear solve.
    - `state`: what the response carries of that solve to the next call, in place of its
        own `state`; or `None`.
    """

    cotangent: PyTree
    result: RESULTS
    stats: dict[str, Any]
    adjoint: PyTree | None = None
    state: Any = None


class Response(eqx.Module, Generic[X, Y]):
    r"""What a response returns.

    **Attributes:**

    - `y`: the response, that is, the inner variables for this x.
    - `jacobian`: the response Jacobian $J = \partial y / \partial x$, a lineax operator
        from pytrees like `x` to pytrees like `y`. It raises if its linear solve fails.
    - `result`: whether the inner solve succeeded, one of `bilevel_eqx.RESULTS`.
    - `stats`: statistics of the inner solve. `stats["inner_residual"]` is the norm of the
        gradient that the response assumes to be zero: $\nabla_y f$ for an implicit one
        (or r, if y is a root), that of the proximal objective for a proximal one. An
        unrolled one has none.
    - `pullback`: the map from cotangents $u$ to a tuple of $J^\top u$, `result`, `stats`
        and `adjoint`. It does not raise.
    - `state`: what the response carries from one call to the next (the optimiser state
        of an unrolled one), or `None`.
    - `presumes`: a map from the bilevel problem to the problem whose inner minimum `y` is
        assumed to be; or `None` if the response does not assume a minimum.
    - `slope`: the norm of $\nabla_y f$, less what a set takes from it, where the last
        inner step began; or `None` if that is not at hand.
    """

    y: Y
    jacobian: lx.AbstractLinearOperator
    result: RESULTS
    stats: dict[str, Any]
    pullback: Callable[[Y], Pulled]
    state: Any = None
    # A map and not the problem, because a returned or batched response should not contain
    # a copy of the problem's data.
    presumes: Callable[[AbstractBilevelProblem], AbstractBilevelProblem] | None = None
    slope: Scalar | None = None


class TransposedJacobian(eqx.Module):
    """The pullback of a Jacobian that needs no linear solve."""

    transpose: Callable

    def __call__(self, cotangent):
        return Pulled(self.transpose(cotangent), RESULTS.successful, {})


class AbstractResponse(eqx.Module):
    r"""A response: a map from the outer variables $x$ and an **anchor** (the point that
    the inner variables start from) to inner variables $y$ and the Jacobian
    $\partial y / \partial x$ at a fixed anchor.

    Call it as `response(problem, x, anchor)`. The methods of the field differ only in
    their response.
    """

    solves: ClassVar[bool] = False
    """Whether y is an inner minimum, so that the inner gradient should vanish there."""
    answers_itself: ClassVar[bool] = False
    """Whether the response from y, at the same x, is y again."""

    state_is_guess: ClassVar[bool] = False
    """Whether its `state` is only the start of a search. A cold start may then carry it
    too."""

    @property
    def inner_optimiser(self) -> Any:
        """The optimiser whose state is carried from one call to the next, if any."""
        return None

    @abc.abstractmethod
    def init(self, problem: AbstractBilevelProblem, x: PyTree, anchor: PyTree) -> Any:
        """The `state` before the first call, or `None`."""

    @abc.abstractmethod
    def __call__(
        self,
        problem: AbstractBilevelProblem,
        x: PyTree,
        anchor: PyTree,
        state: Any = None,
    ) -> Response:
        """The response to x from the anchor.

        **Arguments:**

        - `problem`: the bilevel problem.
        - `x`: the outer variables, a pytree of floating-point arrays.
        - `anchor`: the inner variables to start from, a pytree of the same kind.
        - `state`: the `state` of the last [`bilevel_eqx.Response`][], to continue it.

        **Returns:**

        A [`bilevel_eqx.Response`][].
        """

    def answer(self, problem, x, anchor, state=None) -> Response:
        """The response where nobody asks for its `jacobian`, which may then be `None`."""
        return self(problem, x, anchor, state)

    def trail(
        self,
        problem: AbstractBilevelProblem,
        x: PyTree,
        y: PyTree,
        state: Any,
        *,
        least: int = 0,
    ) -> PyTree | None:
        """The points where its next few inner steps from y would lead, with a leading
        axis; or `None`, if it takes fewer than `least` steps itself, or if it makes sure
        in another way that y is where it should be."""
        del problem, x, y, state, least
        return None

    def may_run_off(self, result: RESULTS, least: int) -> bool:
        """Whether its next steps have to be looked at where y has grown: those of a
        response with this result, if it takes fewer than `least` steps or has failed."""
        del result, least
        return False

    @abc.abstractmethod
    def best_response(
        self, problem: AbstractBilevelProblem, x: PyTree, anchor: PyTree
    ) -> tuple[PyTree, RESULTS]:
        """`y`, differentiable in everything that it depends on, and the result."""

    @abc.abstractmethod
    def reaches(self, problem: AbstractBilevelProblem, x: PyTree, anchor: PyTree) -> bool:
        """Whether y can depend on x at all."""


class AbstractSolvedResponse(AbstractResponse):
    """A response whose Jacobian takes a linear solve. To trace that is a sixth of what a
    hypergradient takes before its first answer, and only a user asks for it."""

    @abc.abstractmethod
    def _answer(self, problem, x, anchor, state) -> tuple[Response, Callable]:
        """The response without its Jacobian, and the function of a tangent of x that is
        the Jacobian."""

    def answer(self, problem, x, anchor, state=None):
        if type(self).__call__ is not AbstractSolvedResponse.__call__:
            # That of a subclass, which may change what is returned.
            return self(problem, x, anchor, state)
        return self._answer(problem, x, anchor, state)[0]

    def __call__(self, problem, x, anchor, state=None):
        response, push = self._answer(problem, x, anchor, state)
        jacobian = lx.FunctionLinearOperator(push, tree_struct(x))
        return dataclasses.replace(response, jacobian=jacobian)


NOT_ASKED_FOR: Any = None
"""Stands for the Jacobian that nobody asks for."""
