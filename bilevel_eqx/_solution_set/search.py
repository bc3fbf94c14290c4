r"""The point of S(x) at which an objective is least."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._linalg.newton_direction import newton_direction
from .._linalg.power_iteration import DENSE_SIZE
from .._optimiser.backtracking import backtrack
from .._problem.base import AbstractBilevelProblem
from .._tree import nonzero, vector_norm, where
from .picture import flat_picture, Picture, restore


class _Search(NamedTuple):
    y: Float[Array, " n"]
    num_steps: Int[Array, ""]
    # The norm of the slope along S(x), before the first step.
    first_norm: Scalar
    # No step is longer: where S(x) is strongly curved, no way back leads to it from afar.
    radius: Scalar
    # The next step is not to be taken: y is as good as it gets.
    settled: Bool[Array, ""]
    done: Bool[Array, ""]
    # The arrays of the picture at y; `None` where they are as cheap to compute anew.
    computed: Any


_MAX_TRIALS = 20


# In units of y.
_SHORTEST = 1e-5


def select(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: Float[Array, " n"],
    objective: Callable[[Float[Array, " n"]], Scalar],
    linear_solver: lx.AbstractLinearSolver,
    max_steps: int,
) -> tuple[Picture, Int[Array, ""]]:
    r"""Minimises an objective $\phi(y)$ within S(x), from a point of it.

    Newton's method along S(x): the step d solves $P W P d = -P \phi_y$ by conjugate
    gradients, and steps $-H^+ \nabla_y f$ bring back to S(x) what leaves it on the way.
    One step is exact where S(x) is a plane and $\phi$ quadratic.

    Returns the picture at the point found, and the number of steps.
    """
    eps = float(jnp.finfo(y.dtype).eps)

    def at(y):
        return flat_picture(problem, x, y, linear_solver, on_set=True)

    def advance(here: Picture, first_norm: Scalar, radius: Scalar):
        value, slope = jax.value_and_grad(objective)(here.y)
        mu = here.multiplier(slope)
        lagrangian = here.lagrangian(lambda x, y: objective(y), mu)
        downhill = -here.project(slope)
        W = here.within(lambda v: lagrangian.push(v)[1])
        norm = vector_norm(downhill)
        first_norm = where(first_norm == 0, norm, first_norm)
        # The more exactly, the closer: this still converges superlinearly. On a plane one
        # exact step may be all.
        shrunk = jnp.sqrt(norm / nonzero(first_norm))
        rtol = 0.0 if here.is_plane else jnp.minimum(0.01, shrunk)
        direction = newton_direction(W, downhill, rtol, size=norm, radius=radius)
        direction = here.project(direction)
        expected = jnp.vdot(downhill, direction)
        length, size = vector_norm(direction), vector_norm(here.y)
        normal = here.pinv(here.gradient)
        off = vector_norm(normal)

        def trial(t):
            point, last, norm = restore(here, here.y + t.astype(y.dtype) * direction)
            # What is left off S(x) would pass for curvature across it.
            small = jnp.maximum(1e-5 * t.astype(y.dtype) * length, 100 * eps * size)
            back = (last <= small) | (norm <= vector_norm(here.gradient))
            return point, objective(point), back

        # From a point off S(x) the way back may lead uphill.
        uphill = 2 * jnp.abs(jnp.vdot(slope, normal)).astype(value.dtype)
        t, new_y, _ = backtrack(
            trial,
            here.y,
            value,
            -expected,
            highest=value + uphill,
            max_trials=_MAX_TRIALS,
            interpolate=True,
        )
        on_set = off <= 1e3 * eps * size
        small = (length <= 10 * eps * size) & on_set
        # At such a step rounding decides, and it is taken nonetheless: near the end it
        # squares the error.
        settled = (expected <= eps * jnp.abs(value)) & on_set
        # The next step uses a length that was possible as well as it can. Where the
        # objective curves down along S(x), it is twice as long.
        taken = t.astype(y.dtype) * length
        shorter = t < 1
        before = where(jnp.isinf(radius), 0, radius)
        radius = where(shorter, taken, jnp.maximum(before, 2 * length))
        # At a kink, which no tangent knows of, they become ever shorter.
        settled = settled | (shorter & (taken <= _SHORTEST * size))
        stop = small | (t == 0)
        return where(small, here.y, new_y), first_norm, radius, settled, stop

    def unfinished(search: _Search):
        return ~search.done

    # Each step begins with the picture, and the last one is the picture alone: what the
    # search ends with need not be computed anew.
    def body(search: _Search) -> _Search:
        here = at(search.y)
        last = search.settled | (search.num_steps >= max_steps)
        yes = jnp.array(True)
        new_y, first_norm, radius, settled, stop = jax.lax.cond(
            last,
            lambda: (search.y, search.first_norm, search.radius, yes, yes),
            lambda: advance(here, search.first_norm, search.radius),
        )
        num_steps = search.num_steps + (~last).astype(search.num_steps.dtype)
        done = last | stop
        return _Search(new_y, num_steps, first_norm, radius, settled, done, here.carried)

    no, zero, none = jnp.array(False), jnp.array(0), jnp.zeros((), y.dtype)
    structure = eqx.filter_eval_shape(lambda y: at(y).computed, y)
    dense = y.size <= DENSE_SIZE
    blank = _zeros(structure) if dense else None
    far = jnp.full((), jnp.inf, y.dtype)
    start = _Search(y, zero, none, far, no, no, blank)
    search = jax.lax.while_loop(unfinished, body, start)
    computed = None
    if dense:
        rest = eqx.filter(structure, _is_shape, inverse=True)
        computed = eqx.combine(search.computed, rest)
    here = flat_picture(problem, x, search.y, linear_solver, computed=computed)
    return here, search.num_steps


def _is_shape(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _zeros(structure):
    shapes = eqx.filter(structure, _is_shape)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
