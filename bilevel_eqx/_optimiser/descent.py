"""What moves the outer variables: an optax optimiser, or a search for a better point."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree, Scalar

from .._arguments import as_pytree
from .step import optimiser_step


class Point(eqx.Module):
    """An evaluated point."""

    x: PyTree[Array]
    value: Scalar
    gradient: PyTree[Array]
    failed: Bool[Array, ""]
    """Whether the evaluation failed, so that the value means nothing."""
    answer: Any
    """What else the evaluation found."""


Evaluate = Callable[[PyTree[Array]], Point]


class AbstractDescent(eqx.Module):
    """Proposes points and judges them once they are evaluated.

    An evaluation is as costly as an inner solve, and as long a program. So it stands in
    one place, the loop of `advance`, and the point accepted is not evaluated again.
    """

    searches: eqx.AbstractClassVar[bool]
    """Whether a proposal may be rejected."""

    @abc.abstractmethod
    def init(self, x: PyTree[Array]) -> Any:
        """The state before the first point is evaluated."""

    @abc.abstractmethod
    def propose(
        self,
        state: Any,
        base: Point,
        project: Callable[[PyTree], PyTree],
        value_fn: Callable[[PyTree[Array]], Scalar],
    ) -> tuple[PyTree[Array], Any]:
        """The next point to evaluate, after the last accepted one, `base`."""

    def asks_for_values(self, x: PyTree[Array]) -> bool:
        """Whether `propose` calls `value_fn`."""
        del x
        return False

    @abc.abstractmethod
    def judge(
        self, state: Any, base: Point, trial: Point
    ) -> tuple[Any, Bool[Array, ""], Bool[Array, ""]]:
        """Whether the evaluated proposal becomes the next base, and whether the search
        ends at the last one."""


class OptaxDescent(AbstractDescent):
    """The steps of an optax optimiser, each of which is accepted."""

    optimiser: optax.GradientTransformation

    searches: ClassVar[bool] = False

    def init(self, x):
        return self.optimiser.init(x)

    def propose(self, state, base, project, value_fn):
        return optimiser_step(
            self.optimiser,
            base.x,
            state,
            value=base.value,
            gradient=base.gradient,
            value_fn=value_fn,
            project=project,
        )

    def asks_for_values(self, x):
        asked = False

        def value_fn(x):
            nonlocal asked
            asked = True
            return jnp.zeros(())

        def step(x):
            value = jnp.zeros(())
            state = self.init(x)
            return optimiser_step(
                self.optimiser,
                x,
                state,
                value=value,
                gradient=x,
                value_fn=value_fn,
                project=lambda x: x,
            )

        eqx.filter_eval_shape(step, x)
        return asked

    def judge(self, state, base, trial):
        return state, jnp.array(True), jnp.array(False)


def as_optimiser(optimiser: Any) -> Any:
    """What a pipeline keeps of its optimiser: one of optax as a pytree."""
    is_optax = isinstance(optimiser, optax.GradientTransformation)
    return as_pytree(optimiser) if is_optax else optimiser


def as_descent(optimiser: Any) -> AbstractDescent:
    """An optax optimiser as a descent; a descent as it is."""
    is_optax = isinstance(optimiser, optax.GradientTransformation)
    return OptaxDescent(optimiser) if is_optax else optimiser


def advance(
    descent: AbstractDescent,
    state: Any,
    base: Point,
    evaluate: Evaluate,
    project: Callable[[PyTree], PyTree],
    value_fn: Callable[[PyTree[Array]], Scalar],
    started: Bool[Array, ""],
) -> tuple[Any, Point]:
    """Moves to the next accepted point; if not `started`, evaluates the first one."""
    rest = eqx.filter(state, eqx.is_array, inverse=True)

    def attempt(state):
        def propose():
            x, new = descent.propose(state, base, project, value_fn)
            return x, eqx.filter(new, eqx.is_array)

        def begin():
            # Outside of the set no search could compare: the value may be lower there.
            first = project(base.x) if descent.searches else base.x
            return first, eqx.filter(state, eqx.is_array)

        x, moved = jax.lax.cond(started, propose, begin)
        trial = evaluate(x)
        new, moves, stays = descent.judge(eqx.combine(moved, rest), base, trial)
        return new, trial, moves, stays

    if not descent.searches:
        state, trial, *_ = attempt(state)
        return state, trial

    structure = eqx.filter(base, eqx.is_array, inverse=True)

    def body(carry):
        state, trial, *end = attempt(eqx.combine(carry[0], rest))
        return eqx.filter(state, eqx.is_array), eqx.filter(trial, eqx.is_array), *end

    last, no = eqx.filter(base, eqx.is_array), jnp.array(False)
    carry = eqx.filter(state, eqx.is_array), last, no, no
    arrays, trial, _, stays = jax.lax.while_loop(
        lambda carry: ~(carry[2] | carry[3]), body, carry
    )
    point = jax.lax.cond(stays, lambda: last, lambda: trial)
    return eqx.combine(arrays, rest), eqx.combine(point, structure)
