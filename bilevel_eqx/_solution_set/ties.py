r"""Other points of the ball that may be as bad as the worst one.

Where the worst value has a kink, several points are worst. If S(x) is a plane and F
quadratic in y, they are the points $q + z$ with z in the eigenspace of the largest
curvature and of one length, so that every mirror image of one of them within that
eigenspace is another. At other F the mirror images are worth a try.
"""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree, Scalar

from .._tree import Layout, nonzero, vector_norm, where
from .worst_in_ball import danskin_gradient, pressure, WorstCase


def gains_and_gradients(worst: WorstCase) -> tuple[Float[Array, " p"], PyTree[Array]]:
    """By how much F at y and at mirror images of it in S(x) exceeds that at y, and by
    Danskin's theorem the gradient of the worst value if that point is worst. They have a
    leading axis, and y is first.

    Where S(x) is curved the images would not lie in it, and y is alone.
    """
    here, center = worst.picture, worst.center
    if not here.is_plane:
        gradient = danskin_gradient(here, here.y, center, worst.multiplier)
        return jnp.zeros((1,), here.y.dtype), jtu.tree_map(lambda u: u[None], gradient)

    def at(y):
        value, slope = jax.value_and_grad(here.problem.outer, argnums=1)(here.x, y)
        multiplier = pressure(here, slope, y - center.picture.y, worst.radius)
        by_slopes = 0.5 * jnp.vdot(slope + worst.slope, y - here.y)
        gain = _gain(worst.value, value, by_slopes)
        return gain, danskin_gradient(here, y, center, multiplier)

    # One after the other, so that the program contains the derivative once.
    return jax.lax.map(at, _mirror_images(worst))


def _gain(before: Scalar, after: Scalar, by_slopes: Scalar) -> Scalar:
    """The difference of two values; where rounding hides it, as a large constant in F
    does, what it is by the slopes at both ends (exactly, if F is quadratic)."""
    gain = (after - before).astype(by_slopes.dtype)
    rounding = jnp.finfo(after.dtype).eps * (jnp.abs(before) + jnp.abs(after))
    return where(jnp.abs(gain - by_slopes) <= 10 * rounding, by_slopes, gain)


def _mirror_images(worst: WorstCase) -> Float[Array, "p n"]:
    here, offset = worst.picture, worst.offset

    def mirrored(direction):
        direction = here.project(direction)
        square = jnp.vdot(direction, direction)
        length = jnp.vdot(direction, offset) / nonzero(square)
        return here.y - 2 * length * direction

    top = worst.basis.vectors[:, jnp.argmax(worst.basis.values)]
    images = jax.vmap(mirrored)(jnp.stack([_towards_zero(worst), offset, top]))
    return jnp.concatenate([here.y[None], images])


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
    steps = where(highest[None, :], worst.basis.vectors, 0).T * length
    start = gradient(here.y)
    changes = jax.vmap(gradient)(here.y[None] + steps) - start[None]
    # Rounding of the gradients is no change of them.
    changes = where(highest[:, None], changes, 0)
    rounding = float(jnp.finfo(changes.dtype).eps) ** 0.5
    shares = jnp.linalg.lstsq(changes.T, -start, rcond=rounding)[0]
    return shares @ steps
