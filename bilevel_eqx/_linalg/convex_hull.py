"""The point of a convex hull nearest to zero."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._tree import nonzero, where
from .decompositions import quadratic_forms


def nearest_to_zero(
    gram: Float[Array, "p p"], penalty: Float[Array, " p"]
) -> Float[Array, " p"]:
    r"""The weights $w \ge 0$ with sum one for which
    $\|\sum_i w_i g_i\| + \sum_i w_i c_i$ is least among those that are tried: the point
    nearest to zero in each face of the hull of g.

    For a few vectors g, given by their inner products. The point of the hull nearest to
    zero lies inside of one of the faces, and there its inner products with the corners
    are all the same.
    """
    count = len(gram)
    if count == 1:
        return jnp.ones(1, gram.dtype)
    scaled = gram / nonzero(jnp.max(jnp.abs(gram)))
    one = jnp.ones(count, gram.dtype)

    def weights(face):
        inside = face[:, None] & face[None, :]
        inner = where(inside, scaled, jnp.diag(where(face, 0, one)))
        edge = where(face, one, 0)[:, None]
        system = jnp.block([[inner, edge], [edge.T, jnp.zeros((1, 1), gram.dtype)]])
        w = jnp.linalg.solve(system, jnp.append(0 * one, 1))[:-1]
        # If the corners depend on one another the system is singular, and a smaller face
        # has the point too.
        good = jnp.all(jnp.isfinite(w)) & jnp.all(w >= 0)
        alone = face & (jnp.cumsum(face) == 1)
        w = where(good, w, alone.astype(w.dtype))
        return w / jnp.sum(w)

    faces = jnp.asarray(list(itertools.product((False, True), repeat=count))[1:])
    tried = jax.vmap(weights)(faces)
    square = quadratic_forms(tried, gram)
    best = jnp.argmin(jnp.sqrt(jnp.maximum(0, square)) + tried @ penalty)
    return tried[best]
