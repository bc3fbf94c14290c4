"""The curvature of a function along S(x), with as many products as are allowed."""

from typing import NamedTuple

import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Scalar

from .._linalg.eigenbasis import Eigenbasis, eigenbasis_within, negative_curvature
from .._linalg.power_iteration import largest_magnitude
from .._linear_solver.pseudoinverse import krylov_inverse
from .._tree import nonzero, tree_axpy, where
from .picture import as_operator, Picture


class Curvatures(NamedTuple):
    """Those of a symmetric operator W in the tangent space of S(x)."""

    basis: Eigenbasis
    """The eigenvectors of $P W P$. Beyond the dense size these are Ritz vectors."""
    negative: Scalar
    """The size of the most negative eigenvalue, relative to the largest."""
    across: Scalar
    """The share of its eigenvector that may be across S(x)."""


def curvatures_along(
    here: Picture,
    W: lx.AbstractLinearOperator,
    start: Float[Array, " n"],
    scale: float = 0.0,
) -> Curvatures:
    """The curvatures of W along S(x); the most negative one relative to the largest, or
    to a scale that is larger. Where products with H are counted, it takes half of them.
    """
    if here.projects_everything:
        basis = eigenbasis_within(here.project, W, start, here.share_of_products(0.5, 84))
        exact = jnp.zeros((), start.dtype)
        return Curvatures(basis, negative_curvature(basis, scale), exact)
    assert here.max_products is not None
    budget = here.max_products // 2
    # A product with W. If S(x) is a plane it is one with F_yy.
    each = 1 if here.is_plane else 3
    size = largest_magnitude(W.mv, start, _POWER_STEPS)
    num_steps = max(2, (3 * budget // 4 - _POWER_STEPS * each) // (each + 1))

    # The picture's P knows a Krylov space of H, and what W leads out of that space may be
    # across S(x). So what is across gets a curvature that is larger than all of W.
    H, weight = here.at.definite_hessian(), 4 * size / here.inverse.smallest
    penalised = as_operator(
        lambda v: tree_axpy(weight, H.mv(v), W.mv(v)), here.y, dense=False
    )
    basis = eigenbasis_within(here.project, penalised, start, num_steps, size)
    within = jnp.any(basis.vectors != 0, axis=0)
    lowest = basis.vectors[:, jnp.argmin(where(within, basis.values, jnp.inf))]

    # The lowest vector is nearly along S(x). What is across is taken away.
    image = H.mv(lowest)
    inverse = krylov_inverse(H, image[None], max(1, budget // 4), not here.is_plane)
    along = lowest - inverse(image)[0]
    square = jnp.sum(along**2)
    value, left = (along @ A.mv(along) / nonzero(square) for A in (W, H))
    rounding = 100 * jnp.finfo(size.dtype).eps * size
    found = (square > _LEAST_SHARE) & (-value > rounding)
    negative = where(found, -value, 0)
    largest = jnp.maximum(jnp.maximum(size, negative), scale)
    smallest = jnp.minimum(here.inverse.smallest, inverse.smallest)
    across = where(found, jnp.minimum(1, jnp.abs(left) / smallest), 0)
    return Curvatures(basis, negative / nonzero(largest), across)


# For the size of W, which is only to be outweighed.
_POWER_STEPS = 4


# A vector with less than this in the null space of H says nothing about it.
_LEAST_SHARE = 0.05
