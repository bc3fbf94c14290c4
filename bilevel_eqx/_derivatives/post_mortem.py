"""What can be found out about a failure, after it: at the point where it happened."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from .._compat import called_once
from .._linalg.power_iteration import largest_curvature
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_y
from .._tree import (
    all_finite,
    Layout,
    nonzero,
    tree_axpy,
    tree_dot,
    tree_eps,
    tree_max,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_where,
    vector_norm,
    where,
)
from .first import inner_gradient, outer_gradients
from .second import gradient_and_hessian, hessian_depends_on_y


# A program of its own, which is compiled only after a failure.
@called_once
def post_mortem(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    anchor: PyTree[Array],
    y: PyTree[Array],
) -> dict[str, Array]:
    """Figures for the sentence of a failure: which derivatives are not finite at (x, y),
    or at the anchor if y is not finite; and the curvature at the anchor.
    """
    at = tree_where(all_finite(y), y, anchor)
    value, outer_x, outer_y = outer_gradients(problem, x, at)
    inner, inner_y = jax.value_and_grad(problem.inner, argnums=1)(x, at)
    _, hessian = gradient_and_hessian(problem, x, at)
    parts = {
        "value": value,
        "outer_x": outer_x,
        "outer_y": outer_y,
        "inner": inner,
        "inner_y": inner_y,
        "inner_yy": hessian.mv(at),
    }
    curvature = largest_curvature(lambda y: problem.inner(x, y), anchor)
    finite = {name: all_finite(part) for name, part in parts.items()}
    return finite | {"inner_curvature": curvature}


_BISECTIONS = 60


@called_once
def kink_met(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    anchor: PyTree[Array],
    y: PyTree[Array],
) -> Scalar:
    r"""How far the inner gradient jumps where an inner solve has ended, relative to its
    size there. It is zero, to rounding, if the inner objective is smooth.

    It looks along $d$, the direction of steepest descent from y: close to y, where a
    search has come to rest; and at the lowest point, which is between the points of an
    oscillation. If the Hessian does not depend on y, it also looks from the anchor to y.
    """
    gradient, hessian = gradient_and_hessian(problem, x, y)
    residual = set_y(problem).remaining_step(gradient, y)
    size, scale = tree_norm(residual), jnp.maximum(tree_norm(y), 1)
    d = tree_scale(-1 / nonzero(size), residual)
    curvature = tree_dot(d, hessian.mv(d))

    def slope(t):
        return tree_dot(inner_gradient(problem, x, tree_axpy(t, d, y)), d)

    def unexpected(t):
        return jnp.abs(slope(t) - slope(0) - t * curvature)

    def bisect(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        descends = slope(middle) < 0
        return jnp.where(descends, middle, low), jnp.where(descends, high, middle)

    # A minimum that is further away than y is large is not next to y.
    bounds = jnp.zeros_like(size), scale
    low, high = jax.lax.fori_loop(0, _BISECTIONS, bisect, bounds)
    eps = tree_eps(y)
    close = eps ** (1 / 3) * scale
    jump = jnp.maximum(unexpected(close), unexpected(-close))
    between = jnp.abs(slope(high) - slope(low))
    # A gradient that is finite on both sides, but not there, is that of no smooth one.
    is_gap = ~jnp.isfinite(between) & jnp.isfinite(slope(0) + slope(scale))
    jump = jnp.maximum(jump, jnp.where(is_gap, jnp.inf, between))
    if not hessian_depends_on_y(problem, x, y):
        moved, before = tree_sub(y, anchor), inner_gradient(problem, x, anchor)
        change = tree_axpy(-1, hessian.mv(moved), tree_sub(gradient, before))
        jump = jnp.maximum(jump, tree_norm(change))
    # Below this, gradients are of the order of their rounding.
    rounding = 1e3 * eps * scale * largest_curvature(lambda y: problem.inner(x, y), y)
    return jump / nonzero(jnp.maximum(size, rounding))


def rests_at_kink(
    problem: AbstractBilevelProblem, x: PyTree[Array], trail: PyTree[Array]
) -> Bool[Array, ""]:
    """Whether an inner solve goes to and fro across a kink, by the points where its next
    steps lead, which have a leading axis.

    Only if these lead nowhere is there anything to pay: for a bisection between the two
    points next to each other where a step turns the most. A smooth gradient does not
    jump there, however long the steps are.
    """
    layout = Layout(jtu.tree_map(lambda u: u[0], trail))
    points = jax.vmap(layout.ravel)(trail)
    steps = jnp.diff(points, axis=0)
    lengths = jnp.sqrt(jnp.sum(steps**2, axis=1))
    net, path = vector_norm(points[-1] - points[0]), jnp.sum(lengths)
    eps = float(jnp.finfo(points.dtype).eps)
    moves = jnp.max(lengths) > eps**0.5 * vector_norm(points[-1])
    turns = jnp.sum(jnp.diff(steps, axis=0) ** 2, axis=1)
    turn = jnp.argmax(turns)
    start, step = points[turn], steps[turn]

    def gradient(t):
        at = inner_gradient(problem, x, layout.unravel(start + t * step))
        return layout.ravel(at)

    def jumps():
        before = gradient(jnp.zeros((), points.dtype))
        change = gradient(jnp.ones((), points.dtype)) - before

        def part(t):
            return jnp.vdot(gradient(t) - before, change)

        whole = jnp.vdot(change, change)

        def bisect(_, bounds):
            low, high = bounds
            middle = 0.5 * (low + high)
            beyond = part(middle) > 0.5 * whole
            return where(beyond, low, middle), where(beyond, middle, high)

        bounds = jnp.zeros_like(path), jnp.ones_like(path)
        low, high = jax.lax.fori_loop(0, _BISECTIONS, bisect, bounds)
        # A gradient that is not finite there is not that of a smooth function.
        is_small = part(high) - part(low) <= _LEAST_JUMP * whole
        return jnp.isfinite(whole) & ~is_small

    nowhere = moves & (net < 0.5 * path)
    return jax.lax.cond(nowhere, jumps, lambda: jnp.array(False))


def runs_off(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    anchor: PyTree[Array],
    trail: PyTree[Array],
) -> Bool[Array, ""]:
    """Whether an inner solve from the anchor that has led far away (`has_grown`)
    diverges: it has led uphill, and its next steps become longer and lead further uphill.

    The next steps of a solve that goes to and fro, or that leaves a saddle, do not do
    both. Those of a large rate on a network, and those of Adam close to a minimum, do for
    a while, but close to where they began, or below it.
    """
    y = jtu.tree_map(lambda u: u[0], trail)
    layout = Layout(y)
    points = jax.vmap(layout.ravel)(trail)
    # The squares of large numbers overflow long before these do.
    scaled = points / nonzero(jnp.max(jnp.abs(points[0])))
    lengths = jnp.sqrt(jnp.sum(jnp.diff(scaled, axis=0) ** 2, axis=1))
    ends = anchor, y, jtu.tree_map(lambda u: u[-1], trail)
    begun, first, last = (problem.inner(x, end) for end in ends)
    eps = float(jnp.finfo(points.dtype).eps)
    moves = _above(lengths[-1], eps**0.5 * vector_norm(scaled[-1]))
    grows = jnp.all(_above(lengths[1:], lengths[:-1])) & jnp.isfinite(lengths[0])
    uphill = _above(first, begun) & _above(last, first)
    return moves & grows & uphill


def _above(a: Array, b: Array) -> Bool[Array, "..."]:
    """Whether a is larger than b, or no number any more."""
    return (a > b) | ~jnp.isfinite(a)


def has_grown(before: PyTree[Array], now: PyTree[Array]) -> Bool[Array, ""]:
    """Whether the largest entry has grown so much that a solve may have diverged. It
    costs next to nothing, and mostly nothing else need be asked."""
    return tree_max(now) > _GROWTH * jnp.maximum(tree_max(before), 1)


_GROWTH = 4.0


# Of the change of the gradient over a step: where many kinks are crossed at once, one of
# them has a part of it. A smooth gradient changes by rounding.
_LEAST_JUMP = 1e-2


TRAIL = 16
"""How many steps a trail has."""
