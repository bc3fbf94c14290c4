r"""Other points of the ball that may be as bad as the worst one.

Where the worst value has a kink, several points are worst. If S(x) is a plane and F
quadratic in y, they are the points $q + z$ with z in the eigenspace of the largest
curvature and of one length, so that every mirror image of one of them within that
eigenspace is another. At other F the mirror images are worth a try.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._tree import Layout, nonzero, vector_norm
from .worst_in_ball import danskin_gradient, pressure, WorstCase


def mirror_images(worst: WorstCase) -> Float[Array, "p n"]:
    """y, and mirror images of it in S(x). Where S(x) is curved, they would not lie in it,
    and y is alone."""
    here, offset = worst.picture, worst.offset
    if not here.is_plane:
        return here.y[None]

    def mirrored(direction):
        direction = here.project(direction)
        square = jnp.vdot(direction, direction)
        length = jnp.vdot(direction, offset) / nonzero(square)
        return here.y - 2 * length * direction

    top = worst.basis.vectors[:, jnp.argmax(worst.basis.values)]
    images = jax.vmap(mirrored)(jnp.stack([_towards_zero(worst), offset, top]))
    return jnp.concatenate([here.y[None], images])


def value_and_gradient(
    worst: WorstCase, y: Float[Array, " n"]
) -> tuple[Scalar, PyTree[Array]]:
    """F at a mirror image, and by Danskin's theorem the gradient of the worst value if
    that point is worst."""
    here, displacement = worst.picture, y - worst.center.picture.y
    value, slope = jax.value_and_grad(here.problem.outer, argnums=1)(here.x, y)
    multiplier = pressure(here, slope, displacement, worst.radius)
    return value, danskin_gradient(here, y, worst.center, multiplier)


def _towards_zero(worst: WorstCase) -> Float[Array, " n"]:
    """The direction within the eigenspace of the largest curvature in which the gradient
    goes to zero.

    The gradient is affine in y there. So zero lies between its values at y and at the
    mirror image along that direction, if it is between its values at any worst points.
    """
    here, layout = worst.picture, Layout(worst.picture.x)

    def gradient(y):
        at = danskin_gradient(here, y, worst.center, worst.multiplier)
        return layout.ravel(at)

    values, length = worst.basis.values, vector_norm(worst.offset)
    scale = jnp.maximum(jnp.max(jnp.abs(values)), worst.multiplier)
    highest = values >= worst.multiplier - 1e-6 * scale
    steps = jnp.where(highest[None, :], worst.basis.vectors, 0).T * length
    start = gradient(here.y)
    changes = jax.vmap(gradient)(here.y[None] + steps) - start[None]
    shares = jnp.linalg.lstsq(changes.T, -start)[0]
    return shares @ steps
