"""The point of S(x) at which an objective is least."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._derivatives.first import inner_gradient
from .._derivatives.second import HessianAt, is_curved
from .._inner_solver.projection import Projection
from .._linear_solver.truncated_cg import newton_direction
from .._problem.base import AbstractBilevelProblem
from .._tree import (
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_where,
)
from .tangent import SolutionSet


class _Search(eqx.Module):
    y: PyTree[Array]
    num_steps: Int[Array, ""]
    done: Bool[Array, ""]


_RESTORATIONS = 30


_HALVINGS = 20


def select(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    objective: Callable[[PyTree[Array]], Scalar],
    linear_solver: lx.AbstractLinearSolver,
    max_steps: int,
) -> tuple[PyTree[Array], Int[Array, ""]]:
    r"""Minimises an objective $\phi(y)$ within $S(x)$, from a point of it.

    Newton's method along $S(x)$: the step $d$ solves $P W P d = -P \phi_y$, by conjugate
    gradients, and what leaves $S(x)$ on the way is brought back by steps
    $-H^+ \nabla_y f$. One step is exact where $S(x)$ is a plane and $\phi$ quadratic.
    """
    eps = float(jnp.finfo(tree_dtype(y)).eps)
    value_and_slope = jax.value_and_grad(objective)

    def unfinished(search: _Search):
        return ~search.done

    def body(search: _Search) -> _Search:
        y = polished(problem, x, search.y)
        S = SolutionSet(problem, x, y, linear_solver)
        value, slope = value_and_slope(y)
        W = S.lagrangian_hessian(objective, tree_scale(-1, S.pinv(slope)))
        downhill = tree_scale(-1, S.project(slope))
        direction = newton_direction(S.within(W), downhill)
        direction = S.project(direction)
        expected = tree_dot(downhill, direction)
        t, new_y = _line_search(S, objective, value, direction, -expected)
        num_steps = search.num_steps + 1
        # At such a step rounding decides, and it was taken nonetheless: near the end
        # it squares the error.
        small = tree_norm(direction) <= 10 * eps * tree_norm(y)
        settled = expected <= eps * jnp.abs(value)
        # At a kink, which no tangent knows of, steps shrink and gain next to nothing.
        gained = value - objective(new_y)
        settled = settled | ((t < 1) & (gained <= 1e-3 * jnp.abs(value)))
        done = small | settled | (t == 0) | (num_steps >= max_steps)
        new_y = tree_where(small, y, new_y)
        return _Search(new_y, num_steps, done)

    search = _Search(y, jnp.array(0), jnp.array(False))
    search = jax.lax.while_loop(unfinished, body, search)
    return search.y, search.num_steps


def polished(problem, x, y: PyTree[Array]) -> PyTree[Array]:
    """A point of S(x) from one close to it. What a step along a curved S(x) leaves
    undone would pass for curvature, and hide that it is along S(x)."""
    if not is_curved(problem, x, y):
        return y

    def inner(y, args):
        return problem.inner(x, y)

    options = {"hessian": HessianAt(problem, x)}
    return optx.minimise(inner, Projection(), y, options=options, throw=False).value


def _line_search(S: SolutionSet, objective, value, direction, slope):
    """The first of 1, 1/2, ... whose step, brought back to S(x), descends; or none."""
    eps = jnp.finfo(value.dtype).eps
    slack = 10 * eps * jnp.abs(value)
    length = tree_norm(direction)
    at_start = tree_norm(S.gradient)

    def unfinished(carry):
        count, _, _, bad = carry
        return bad & (count < _HALVINGS)

    def halve(carry):
        count, t, _, _ = carry
        t = 0.5 * t
        y, astray = restore(S, tree_axpy(t, direction, S.y))
        bound = value + 1e-4 * (t * slope).astype(value.dtype)
        # Negated below, so that NaN is bad too.
        descends = objective(y) <= bound + slack
        gradient = tree_norm(inner_gradient(S.problem, S.x, y))
        back = (astray <= 1e-2 * t * length) | (gradient <= at_start)
        return count + 1, t, y, ~(descends & back)

    # Halved before it is tried: what is in the loop is compiled only once.
    carry = jnp.array(0), jnp.full_like(length, 2), S.y, jnp.array(True)
    _, t, y, bad = jax.lax.while_loop(unfinished, halve, carry)
    return jnp.where(bad, 0, t), tree_where(bad, S.y, y)


def restore(S: SolutionSet, y: PyTree[Array]) -> tuple[PyTree[Array], Scalar]:
    r"""Brings y back to $S(x)$ by steps $-H^+ \nabla_y f$, with the $H$ of `S`.

    Also returns the length of the last step, which says how far off it may still be.
    """
    eps = jnp.finfo(tree_dtype(y)).eps

    def unfinished(carry):
        count, y, length, before = carry
        contracts = length < 0.9 * before
        return contracts & (length > eps * tree_norm(y)) & (count < _RESTORATIONS)

    def body(carry):
        count, y, before, _ = carry
        step = S.pinv(inner_gradient(S.problem, S.x, y))
        length = tree_norm(step)
        # A step that is longer than the last leads away.
        y = tree_where(length < before, tree_sub(y, step), y)
        return count + 1, y, length, before

    largest = jnp.asarray(jnp.finfo(tree_dtype(y)).max, tree_dtype(y))
    carry = jnp.array(0), y, 0.5 * largest, largest
    _, y, length, _ = jax.lax.while_loop(unfinished, body, carry)
    return y, length
