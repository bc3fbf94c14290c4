"""Projected gradient descent that chooses its own steps, for the outer variables."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._arguments import check_count
from .._tree import Layout, nonzero, where
from .backtracking import ARMIJO, shortened
from .descent import AbstractDescent


class _SpectralState(eqx.Module):
    # The last values: a step may rise above the last one, and not above all of them.
    values: Float[Array, " memory"]
    # Of the projected step, relative to the gradient; zero if it is not known yet.
    length: Scalar
    # Of the line search: the slope at its start, and the share of the step on trial.
    slope: Scalar
    share: Scalar
    num_trials: Int[Array, ""]
    max_trials: Int[Array, ""]
    started: Bool[Array, ""]


class SpectralProjectedGradient(AbstractDescent):
    r"""Gradient steps for variables that are confined to a convex set,

    $$x \leftarrow x + a\, d, \qquad d = \Pi(x - \lambda \nabla\phi(x)) - x, \qquad
    \lambda = \frac{\langle s, s \rangle}{\langle s, r \rangle},$$

    with s and r the last changes of x and of the gradient, and $\Pi$ the Euclidean
    projection on the set (`project_x`). No rate is to be chosen: a is 1, or less if the
    value would otherwise exceed the largest of the last ones. A point at which the inner
    or the linear solve fails is too far away, and the search comes back from it. If it
    finds no better point, x stays.

    The default pipelines take it where a problem has a `project_x`; elsewhere they take
    L-BFGS, whose steps a projection would spoil.

    ??? cite "Reference"

        Birgin, Martínez and Raydan, *Nonmonotone spectral projected gradient methods on
        convex sets*, 2000.
    """

    memory: int = 10
    max_trials: int = 20

    searches: ClassVar[bool] = True

    def __check_init__(self):
        check_count(self.memory, "memory", "SpectralProjectedGradient")
        check_count(self.max_trials, "max_trials", "SpectralProjectedGradient")

    def init(self, x):
        dtype = Layout(x).dtype
        values = jnp.full((self.memory,), -jnp.inf, dtype)
        zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
        trials = jnp.array(0), jnp.array(self.max_trials)
        return _SpectralState(values, zero, zero, one, *trials, jnp.array(False))

    def propose(self, state, base, project, value_fn):
        layout = Layout(base.x)
        x, gradient = layout.ravel(base.x), layout.ravel(base.gradient)

        def step(length):
            return layout.ravel(project(layout.unravel(x - length * gradient))) - x

        # The first step is of the size of one.
        first = 1 / nonzero(jnp.max(jnp.abs(step(1))))
        length = where(state.length == 0, first, state.length)
        direction = step(jnp.clip(length, 1 / _LONGEST, _LONGEST))
        slope = jnp.vdot(gradient, direction)
        # In the set, but for rounding.
        point = project(layout.unravel(x + state.share * direction))
        return point, eqx.tree_at(lambda s: s.slope, state, slope)

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
        curvature, square = jnp.vdot(step, change), jnp.vdot(step, step)
        # One where the curvature is negative, long.
        spectral = where(curvature > 0, square / nonzero(curvature), _LONGEST)
        length = where(moves & state.started & (square > 0), spectral, 0)
        values = jnp.roll(state.values, 1).at[0].set(where(moves, new_value, value))
        # Where a search has found nothing the next one is a quarter as long.
        fewer = where(stays, max(2, self.max_trials // 4), self.max_trials)
        rise = where(trial.failed, jnp.inf, new_value - value)
        return (
            _SpectralState(
                values=where(done, values, state.values),
                length=where(done, length, state.length),
                slope=state.slope,
                share=where(done, 1, shortened(share, rise, state.slope)).astype(dtype),
                num_trials=where(done, 0, num_trials),
                max_trials=where(done, fewer, state.max_trials),
                started=jnp.array(True),
            ),
            moves,
            stays,
        )


SpectralProjectedGradient.__init__.__doc__ = """**Arguments:**

- `memory`: how many of the last values there are to compare with.
- `max_trials`: the largest number of points that one line search evaluates.
"""


_LONGEST = 1e10
