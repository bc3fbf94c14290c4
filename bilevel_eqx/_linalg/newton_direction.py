"""The direction of a truncated Newton step."""

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Scalar, ScalarLike

from .._tree import nonzero, where
from .zero_curvature import rounding_of


_NUM_STEPS = 100


def newton_direction(
    hessian: lx.AbstractLinearOperator,
    downhill: Float[Array, " n"],
    rtol: ScalarLike = 0.0,
    *,
    size: Scalar,
    radius: Scalar | None = None,
) -> Float[Array, " n"]:
    r"""A direction of descent: $H^{-1}$ applied to `downhill` by conjugate gradients,
    as far as the curvature is positive.

    Where the curvature along `downhill` is not positive, `downhill` itself, divided by
    the size of that curvature.

    `size` is the norm of `downhill`, which callers know. The direction is not longer than
    the `radius`. If that is finite, conjugate gradients that would go beyond it, or find
    no positive curvature, end on that sphere, as Steihaug's do (*The conjugate gradient
    method and trust regions in large scale optimization*, 1983).

    Not [`bilevel_eqx.TruncatedCG`][], which goes on along directions without curvature: a
    direction of descent has no use for them, and the program is a third as long.
    """
    eps = jnp.finfo(downhill.dtype).eps
    # Of order one, so that no square below overflows or underflows.
    b = downhill / nonzero(size)
    square = jnp.vdot(b, b)
    enough = jnp.maximum(jnp.asarray(rtol, b.dtype), eps) ** 2 * square
    most_steps = min(_NUM_STEPS, 2 * b.size + 1)
    most = None if radius is None else radius / nonzero(size)

    def unfinished(carry):
        count, _, _, _, rr, _, stop = carry
        return (count < most_steps) & (rr > enough) & ~stop

    def step(carry):
        count, q, r, p, rr, largest, _ = carry
        Hp = hessian.mv(p)
        pp, pHp = jnp.vdot(p, p), jnp.vdot(p, Hp)
        curvature = pHp / nonzero(pp)
        largest = jnp.maximum(largest, jnp.abs(curvature))
        # Negated, so that NaN is bad too.
        bad = ~(curvature > rounding_of(largest, b.size))
        # At the first step steepest descent is what there is.
        length = rr / nonzero(jnp.abs(pHp))
        length = where(bad & (count > 0), 0, length)
        if most is not None:
            # |q + furthest p| = most.
            bounded = jnp.isfinite(most)
            square_left = where(bounded, most, 1) ** 2 - jnp.vdot(q, q)
            qp, room = jnp.vdot(q, p), jnp.maximum(0, square_left)
            furthest = room / nonzero(qp + jnp.sqrt(qp**2 + pp * room))
            limited = where(bad, furthest, jnp.minimum(length, furthest))
            length = where(bounded, limited, length)
            bad = bad | (bounded & (length == furthest))
        q, r = q + length * p, r - length * Hp
        new_rr = jnp.vdot(r, r)
        return count + 1, q, r, r + new_rr / nonzero(rr) * p, new_rr, largest, bad

    zero = jnp.zeros((), b.dtype)
    carry = jnp.array(0), jnp.zeros_like(b), b, b, square, zero, jnp.array(False)
    return nonzero(size) * jax.lax.while_loop(unfinished, step, carry)[1]
