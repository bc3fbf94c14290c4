r"""Other points of the ball that may be as bad as the worst one.

Where the worst value has a kink, several points are worst. If S(x) is a plane and F
quadratic in y, they are the points $q + z$ with z in the eigenspace of the largest
curvature and of one length, so that every mirror image of one of them within that
eigenspace is another. Elsewhere F is ascended from a few points of the ball.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._tree import Layout, nonzero, tree_waves, vector_norm, where
from .worst_in_ball import (
    danskin_gradient,
    find_worst,
    gains_from,
    pressure,
    WorstCase,
)


MOST_ASCENDED = 64
"""How many entries y may have for F to be ascended from other points."""


def gains_and_gradients(
    worst: WorstCase, terms: Scalar, quadratic: bool
) -> tuple[Float[Array, " p"], PyTree[Array]]:
    """By how much F at y and at other points of the ball exceeds that at y, and by
    Danskin's theorem the gradient of the worst value if that point is worst. They have a
    leading axis, and y is first.

    `terms` is the size of the terms in F_y, and `quadratic` whether S(x) is a plane and F
    quadratic.
    """
    here = worst.picture
    if not quadratic and here.y.size <= MOST_ASCENDED:
        return _of_ascents(worst, terms)
    # Images in a tangent plane lie in S(x) only if it is one.
    images = [_mirror_images(worst)] if here.is_plane else []
    return _of_points(worst, jnp.concatenate([here.y[None], *images]))


def _of_points(worst: WorstCase, points: Float[Array, "p n"]):
    here, center = worst.picture, worst.center
    gain = gains_from(here.problem.outer, here.x, here.y, worst.value)

    def at(y):
        slope = jax.grad(here.problem.outer, argnums=1)(here.x, y)
        multiplier = pressure(here, slope, y - center.picture.y, worst.radius)
        return gain(y), danskin_gradient(here, y, center, multiplier)

    # One after the other, so that the program contains the derivative once.
    return jax.lax.map(at, points)


class _Known(NamedTuple):
    """Of each point; of a search that has failed, what is known of y."""

    y: Float[Array, "p n"]
    gain: Float[Array, " p"]
    gradient: Float[Array, "p m"]


def _of_ascents(worst: WorstCase, terms: Scalar):
    here, center = worst.picture, worst.center
    layout, c = Layout(here.x), center.picture.y
    small = float(jnp.finfo(c.dtype).eps) ** 0.5
    gain = gains_from(here.problem.outer, here.x, here.y, worst.value)

    def ascended(start, max_steps) -> tuple[_Known, Bool[Array, ""]]:
        found = find_worst(
            here.problem, here.x, start, center, worst.radius, max_steps, 0.0
        )
        there = found.picture
        off = vector_norm(there.pinv(there.gradient))
        beyond = jnp.maximum(0, vector_norm(there.y - c) - worst.radius)
        reached = off <= small * (vector_norm(c) + worst.radius)
        # A step may end slightly outside of the ball. What F gains by that is no gain.
        reached = reached & (beyond <= small**0.5 * worst.radius)
        good = reached & (found.uphill <= small * terms)
        gained = gain(there.y) - found.multiplier * worst.radius * beyond
        gradient = layout.ravel(found.gradient)
        return _Known(there.y, gained, gradient), good

    starts = jnp.concatenate([here.y[None], _starts(worst), here.y[None]])
    count = len(starts)

    # One after the other, so that the program contains a search once.
    def body(i, known):
        first, last = i == 0, i == count - 1
        # By the points before this one.
        steps = jax.vmap(center.picture.project)(known.y - known.y[:1])
        so_far = jnp.arange(count)[:, None] < i
        changes = where(so_far, known.gradient - known.gradient[:1], 0)
        direction = _towards_zero(steps, changes, known.gradient[0])
        start = where(last, _mirrored(worst, direction), starts[i])
        # At y itself no step is taken.
        new, good = ascended(start, where(first, -1, _ASCENT_STEPS))
        return jtu.tree_map(
            lambda row, rows: rows.at[i].set(where(good | first, row, rows[0])),
            new,
            known,
        )

    size = here.y.size, layout.size
    blank = _Known(
        jnp.zeros((count, size[0]), c.dtype),
        jnp.zeros(count, c.dtype),
        jnp.zeros((count, size[1]), layout.dtype),
    )
    known = jax.lax.fori_loop(0, count, body, blank)
    return known.gain, jax.vmap(layout.unravel)(known.gradient)


_ASCENT_STEPS = 50


#
# The other points
#


def _mirror_images(worst: WorstCase) -> Float[Array, "p n"]:
    """Those along the eigenspace of the largest curvature are as bad."""
    here, layout = worst.picture, Layout(worst.picture.x)

    def gradient(y):
        at = danskin_gradient(here, y, worst.center, worst.multiplier)
        return layout.ravel(at)

    values, vectors = worst.basis.values, worst.basis.vectors
    scale = jnp.maximum(jnp.max(jnp.abs(values)), worst.multiplier)
    highest = values >= worst.multiplier - 1e-6 * scale
    steps = where(highest[None, :], vectors, 0).T * vector_norm(worst.offset)
    start = gradient(here.y)
    changes = jax.vmap(gradient)(here.y[None] + steps) - start[None]
    # Rounding of the gradients is no change of them.
    changes = where(highest[:, None], changes, 0)
    to_zero = _towards_zero(steps, changes, start)
    directions = jnp.stack([to_zero, worst.offset, _top(worst)])
    return jax.vmap(lambda d: _mirrored(worst, d))(directions)


def _top(worst: WorstCase) -> Float[Array, " n"]:
    """The direction along S(x) in which F is curved the most."""
    return worst.basis.vectors[:, jnp.argmax(worst.basis.values)]


def _towards_zero(
    steps: Float[Array, "k n"], changes: Float[Array, "k m"], start: Float[Array, " m"]
) -> Float[Array, " n"]:
    """The direction in which the gradient goes to zero, from its changes along others.

    It is affine in y where S(x) is a plane and F quadratic. So zero lies between its
    values at y and at the mirror image along that direction, if it is between its values
    at any worst points.
    """
    rounding = float(jnp.finfo(changes.dtype).eps) ** 0.5
    shares = jnp.linalg.lstsq(changes.T, -start, rcond=rounding)[0]
    return shares.astype(steps.dtype) @ steps


def _mirrored(worst: WorstCase, direction: Float[Array, " n"]) -> Float[Array, " n"]:
    """The mirror image of y along a direction, in the tangent space at the center."""
    direction = worst.center.picture.project(direction)
    square = jnp.vdot(direction, direction)
    length = jnp.vdot(direction, worst.displacement) / nonzero(square)
    return worst.picture.y - 2 * length * direction


def _starts(worst: WorstCase) -> Float[Array, "p n"]:
    """Mirror images, and two ends of the ball. Where S(x) is curved they are near it at
    best."""
    c = worst.center.picture.y
    waves = worst.center.picture.project(tree_waves(c))
    way = worst.radius * waves / nonzero(vector_norm(waves))
    directions = jnp.stack([worst.displacement, _top(worst), waves])
    images = jax.vmap(lambda d: _mirrored(worst, d))(directions)
    return jnp.concatenate([images, jnp.stack([c + way, c - way])])
