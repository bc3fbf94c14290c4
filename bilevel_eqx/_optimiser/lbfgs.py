"""L-BFGS whose line search evaluates each point once."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._arguments import as_count, check_count
from .._tree import Layout, nonzero, vector_norm, where
from .backtracking import shortened
from .descent import AbstractDescent


class _LBFGSState(eqx.Module):
    # Differences of the last points and of their gradients; the newest comes last.
    steps: Float[Array, "memory n"]
    changes: Float[Array, "memory n"]
    direction: Float[Array, " n"]
    # Of the line search: the slope at its start, the present trial and the interval that
    # has a good one.
    slope: Scalar
    length: Scalar
    low: Scalar
    high: Scalar
    num_trials: Int[Array, ""]
    max_trials: Int[Array, ""]
    started: Bool[Array, ""]


# Sufficient decrease and sufficient flattening, as in Nocedal and Wright.
_DECREASE = 1e-4
_FLATTENING = 0.9


class LBFGS(AbstractDescent):
    r"""Quasi-Newton steps $x \leftarrow x - t\, Q \nabla\phi(x)$, with Q from the last
    changes of x and of the gradient.

    No rate is to be chosen. t is the first of a bracketing search that decreases
    $\phi$ enough and flattens it enough (the weak conditions of Wolfe). Like gradient
    descent it moves x only within the span of the gradients, which is what selects
    among many outer solutions. A point at which the inner or the linear solve fails is
    too far away, and the search comes back from it. If it finds no better point, x stays.

    Unlike `optax.lbfgs` it takes the hypergradient of an accepted point from the search,
    so that a step costs one evaluation where the first trial is good, and its program
    has the evaluation once.

    ??? cite "References"

        Nocedal and Wright, *Numerical Optimization*, 2006: Algorithm 7.4. Lewis and
        Overton, *Nonsmooth optimization via quasi-Newton methods*, 2013, for the search.
        Hager and Zhang, *A new conjugate gradient method with guaranteed descent and an
        efficient line search*, 2005, for what decreases within rounding.
    """

    memory: int = eqx.field(default=10, converter=as_count)
    max_trials: int = eqx.field(default=10, converter=as_count)

    searches: ClassVar[bool] = True

    def __check_init__(self):
        check_count(self.memory, "memory", "LBFGS")
        check_count(self.max_trials, "max_trials", "LBFGS")

    def init(self, x):
        layout = Layout(x)
        zeros = jnp.zeros(layout.size, layout.dtype)
        history = jnp.zeros((self.memory, layout.size), layout.dtype)
        zero, one = jnp.zeros((), layout.dtype), jnp.ones((), layout.dtype)
        no, none = jnp.array(False), jnp.array(0)
        trials = none, jnp.array(self.max_trials)
        return _LBFGSState(history, history, zeros, zero, one, zero, zero, *trials, no)

    def propose(self, state, base, project, value_fn):
        layout = Layout(base.x)
        x = layout.ravel(base.x) + state.length * state.direction
        return project(layout.unravel(x)), state

    def judge(self, state, base, trial):
        layout = Layout(base.x)
        new_slope = jnp.vdot(layout.ravel(trial.gradient), state.direction)
        value, new_value = base.value.astype(layout.dtype), trial.value
        new_value = new_value.astype(layout.dtype)
        slack = 10 * jnp.finfo(base.value.dtype).eps * jnp.abs(value)
        slope, length = state.slope, state.length
        # Negated comparisons would accept NaN: these do not.
        decreases = new_value <= value + _DECREASE * length * slope
        flat_enough = new_slope <= (2 * _DECREASE - 1) * slope
        within_rounding = (new_value <= value + slack) & flat_enough
        decreases = (decreases | within_rounding) & ~trial.failed
        flattens = new_slope >= _FLATTENING * slope
        num_trials = state.num_trials + 1
        low = where(decreases, length, state.low)
        high = where(decreases, state.high, length)
        searching = eqx.tree_at(
            lambda s: (s.low, s.high, s.num_trials), state, (low, high, num_trials)
        )
        searching = eqx.tree_at(
            lambda s: s.length, searching, self._next(searching, value, new_value)
        )
        # Once no better one is to be had, one that decreases will do. The last trial is
        # the best that is known. If none is, x stays: anew it might be worse.
        eps = jnp.finfo(base.value.dtype).eps
        last = num_trials >= state.max_trials
        last = last | (length * jnp.abs(slope) <= eps * jnp.abs(value))
        hopeless = (num_trials >= state.max_trials - 1) & (low == 0)
        moves = ~state.started | (decreases & (flattens | last))
        stays = ~moves & (last | hopeless)
        x = where(stays, layout.ravel(base.x), layout.ravel(trial.x))
        gradient = layout.ravel(base.gradient), layout.ravel(trial.gradient)
        gradient = where(stays, *gradient)
        gained = moves & (new_value < value - slack)
        turned = self._turn(state, base, x, gradient, layout, moves, gained)
        done = moves | stays
        chosen = jax.tree.map(lambda u, v: where(done, u, v), turned, searching)
        return chosen, moves, stays

    def _next(self, state, value, new_value):
        """The next trial, in or beyond the interval that is known to have a good one."""
        length, low, high = state.length, state.low, state.high
        shorter = shortened(length, new_value - value, state.slope)
        inside = where(low == 0, shorter, 0.5 * (low + high))
        following = where(high == 0, 2 * length, inside)
        last = state.num_trials >= state.max_trials - 1
        return where(last, low, following)

    def _turn(self, state, base, x, gradient, layout: Layout, found, gained):
        """The state at the end of a search, with a new direction. What has led nowhere
        is forgotten."""
        step = x - layout.ravel(base.x)
        change = gradient - layout.ravel(base.gradient)
        memory = remembered(state.steps, state.changes, step, change, state.started)
        steps, changes = (where(found | ~state.started, u, 0) for u in memory)
        direction = -_apply_inverse(steps, changes, gradient)
        slope = jnp.vdot(gradient, direction)
        # Without a memory the first step has the size of one, or of the gradient.
        plain = -gradient / jnp.maximum(1, vector_norm(gradient))
        fresh = ~(slope < 0) | (jnp.sum(steps[-1] ** 2) == 0)
        direction = where(fresh, plain, direction)
        slope = jnp.vdot(gradient, direction)
        zero, one = jnp.zeros_like(slope), jnp.ones_like(slope)
        none, yes = jnp.zeros_like(state.num_trials), jnp.array(True)
        # Where a search has gained nothing, as within rounding of a minimum, the next one
        # is a quarter as long.
        shorter = jnp.maximum(2, state.max_trials // 4)
        max_trials = where(gained | ~state.started, self.max_trials, shorter)
        trials = none, max_trials.astype(none.dtype)
        return _LBFGSState(
            steps, changes, direction, slope, one, zero, zero, *trials, yes
        )


LBFGS.__init__.__doc__ = """**Arguments:**

- `memory`: how many of the last changes of x and of the gradient are kept.
- `max_trials`: the largest number of points that one line search evaluates.
"""


def remembered(
    steps: Float[Array, "memory n"],
    changes: Float[Array, "memory n"],
    step: Float[Array, " n"],
    change: Float[Array, " n"],
    wanted: Bool[Any, ""] = True,
) -> tuple[Float[Array, "memory n"], Float[Array, "memory n"]]:
    """The memory with one more pair, if it is wanted and the curvature along the step is
    positive; otherwise as it is."""
    eps = jnp.finfo(step.dtype).eps
    curved = jnp.vdot(step, change) > eps * jnp.vdot(change, change)

    def shifted(history, new):
        longer = jnp.concatenate([history[1:], new[None]])
        return where(wanted & curved, longer, history)

    return shifted(steps, step), shifted(changes, change)


def _apply_inverse(
    steps: Float[Array, "memory n"],
    changes: Float[Array, "memory n"],
    vector: Float[Array, " n"],
) -> Float[Array, " n"]:
    """The two-loop recursion: the inverse Hessian that the memory implies, times v."""
    products = jnp.sum(steps * changes, axis=1)
    weights = where(products == 0, 0, 1 / nonzero(products))

    def backward(vector, entry):
        step, change, weight = entry
        share = weight * jnp.vdot(step, vector)
        return vector - share * change, share

    entries = steps, changes, weights
    vector, shares = jax.lax.scan(backward, vector, entries, reverse=True)
    square = jnp.vdot(changes[-1], changes[-1])
    scale = where(square == 0, 1, products[-1] / nonzero(square))

    def forward(vector, entry):
        (step, change, weight), share = entry
        return vector + (share - weight * jnp.vdot(change, vector)) * step, None

    return jax.lax.scan(forward, scale * vector, (entries, shares))[0]
