"""What a pipeline is: an algorithm that aims at an equilibrium."""

import abc
from typing import Any, ClassVar, Generic, TypeVar

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._equilibrium.base import AbstractEquilibrium
from .._problem.base import AbstractBilevelProblem


State = TypeVar("State")


class AbstractPipeline(eqx.Module, Generic[State]):
    """An algorithm, as an initial state and a step. [`bilevel_eqx.solve`][] runs it.

    The state is a pytree with everything that the algorithm carries; it has at least
    the attributes `x` and `y`, the current outer and inner variables.

    It may have an attribute `started`, a boolean array. Where that is `False` a step only
    evaluates the initial point, and `solve` does not count it. What is evaluated in one
    place, the step, is compiled once.

    One that can aim only at some equilibria says so by the class variable `aims_at`, a
    tuple of their types; `solve` then refuses it for others.
    """

    aims_at: ClassVar[tuple[type[AbstractEquilibrium], ...] | None] = None
    """The types of equilibria that it can aim at; `None` if it is up to its parts."""

    admits_batches: ClassVar[bool] = False
    """Whether the problem may be on other mini-batches in each step: whether nothing is
    compared across steps, so that `solve(batches=...)` can give them."""

    def trail(
        self,
        problem: AbstractBilevelProblem,
        equilibrium: AbstractEquilibrium,
        state: State,
    ) -> PyTree | None:
        """The points where the next few inner steps that it differentiates would lead,
        with a leading axis; or `None`. At its end `solve` looks there for a kink, and
        whether they run off."""
        del problem, equilibrium, state

    @abc.abstractmethod
    def init(
        self,
        problem: AbstractBilevelProblem,
        equilibrium: AbstractEquilibrium,
        x: PyTree[Array],
        y: PyTree[Array],
        key: PRNGKeyArray,
    ) -> State:
        """The state before the first step.

        **Arguments:**

        - `problem`, `equilibrium`: what is to be solved.
        - `x`, `y`: the initial outer and inner variables.
        - `key`: for algorithms that draw random numbers.
        """

    @abc.abstractmethod
    def step(
        self,
        problem: AbstractBilevelProblem,
        equilibrium: AbstractEquilibrium,
        state: State,
    ) -> tuple[State, dict[str, Any]]:
        """One outer step.

        **Returns:**

        The new state, and a dictionary of metrics of it. `solve` makes use of those
        named `"outer_residual"` and `"inner_residual"` (scalars that are zero where the
        algorithm stands still; needed if a tolerance is given) and `"result"` (one of
        `bilevel_eqx.RESULTS`: a failure ends the run at the step before). All
        others are for the history.
        """
