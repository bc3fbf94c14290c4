"""A search along a direction that stays in a convex set."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._tree import Layout, tree_where, where
from .backtracking import ARMIJO, shortened
from .descent import AbstractDescent


Move = Callable[[Float[Array, " n"]], Float[Array, " n"]]


class _SearchState(eqx.Module):
    # What the directions are made from.
    model: PyTree[Array]
    # The last values: a step may rise above the last one, and not above all of them.
    values: Float[Array, " k"]
    # Of the line search: the direction, the slope at its start, and the share of the
    # direction on trial.
    direction: Float[Array, " n"]
    slope: Scalar
    share: Scalar
    num_trials: Int[Array, ""]
    max_trials: Int[Array, ""]
    started: Bool[Array, ""]


class AbstractProjectedSearch(AbstractDescent):
    """Steps towards another point of a convex set; the whole way, or less if the value
    would otherwise be too large. How to find that point is what the kinds differ in."""

    max_trials: eqx.AbstractVar[int]

    searches: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def _num_values(self) -> int:
        """How many of the last values there are to compare with."""

    @abc.abstractmethod
    def _blank(self, layout: Layout) -> PyTree[Array]:
        """The model before anything is known."""

    @abc.abstractmethod
    def _direction(
        self, model: Any, x: Float[Array, " n"], gradient: Float[Array, " n"], move: Move
    ) -> Float[Array, " n"]:
        """From x to a point of the set, which `move` finds the nearest point of."""

    @abc.abstractmethod
    def _learnt(
        self, model: Any, step: Float[Array, " n"], change: Float[Array, " n"]
    ) -> PyTree[Array]:
        """The model after a step, by which the gradient has changed so much."""

    def init(self, x):
        layout = Layout(x)
        values = jnp.full((self._num_values,), -jnp.inf, layout.dtype)
        zero, one = jnp.zeros((), layout.dtype), jnp.ones((), layout.dtype)
        return _SearchState(
            model=self._blank(layout),
            values=values,
            direction=jnp.zeros(layout.size, layout.dtype),
            slope=zero,
            share=one,
            num_trials=jnp.array(0),
            max_trials=jnp.array(self.max_trials),
            started=jnp.array(False),
        )

    def propose(self, state, base, project, value_fn):
        layout = Layout(base.x)
        x, gradient = layout.ravel(base.x), layout.ravel(base.gradient)

        def move(point):
            return layout.ravel(project(layout.unravel(point)))

        direction = jax.lax.cond(
            state.num_trials == 0,
            lambda: self._direction(state.model, x, gradient, move),
            lambda: state.direction,
        )
        slope = jnp.vdot(gradient, direction)
        # In the set, but for rounding.
        point = project(layout.unravel(x + state.share * direction))
        where_to = lambda s: (s.direction, s.slope)  # noqa: E731
        return point, eqx.tree_at(where_to, state, (direction, slope))

    def judge(self, state, base, trial):
        layout = Layout(base.x)
        dtype, value = layout.dtype, base.value.astype(layout.dtype)
        new_value, share = trial.value.astype(layout.dtype), state.share
        slack = 10 * jnp.finfo(base.value.dtype).eps * jnp.abs(value)
        bound = jnp.max(state.values) + slack + ARMIJO * share * state.slope
        # NaN does not satisfy it.
        moves = ~state.started | ((new_value <= bound) & ~trial.failed)
        num_trials = state.num_trials + 1
        stays = ~moves & (num_trials >= state.max_trials)
        done = moves | stays

        step = layout.ravel(trial.x) - layout.ravel(base.x)
        change = layout.ravel(trial.gradient) - layout.ravel(base.gradient)
        # What has led nowhere is forgotten.
        steps = moves & state.started & (jnp.vdot(step, step) > 0)
        learnt = self._learnt(state.model, step, change)
        model = tree_where(steps, learnt, self._blank(layout))
        # Where a search has found nothing the next one is a quarter as long.
        fewer = where(stays, max(2, self.max_trials // 4), self.max_trials)
        values = jnp.roll(state.values, 1).at[0].set(where(moves, new_value, value))
        rise = where(trial.failed, jnp.inf, new_value - value)
        return (
            _SearchState(
                model=tree_where(done, model, state.model),
                values=where(done, values, state.values),
                direction=state.direction,
                slope=state.slope,
                share=where(done, 1, shortened(share, rise, state.slope)).astype(dtype),
                num_trials=where(done, 0, num_trials),
                max_trials=where(done, fewer, state.max_trials),
                started=jnp.array(True),
            ),
            moves,
            stays,
        )
