"""The largest value of a quadratic in a ball."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from .._tree import nonzero, where
from .eigenbasis import Eigenbasis


class WorstStep(eqx.Module):
    """The largest value of a quadratic in a ball, and the multiplier of the ball.

    `mixture` is `step`, unless two maxima are equal or nearly so: it then lies between
    them. The gradient at `mixture` is that of the smoothed maximum, whose value is that
    at `mixture` plus `lift`.
    """

    step: PyTree[Array]
    mixture: PyTree[Array]
    lift: Scalar
    multiplier: Scalar
    value: Scalar


_BISECTIONS = 200


def trust_region(
    basis: Eigenbasis,
    slope: PyTree[Array],
    radius: ScalarLike,
    rounding: ScalarLike = 0.0,
) -> WorstStep:
    r"""$\max_{\|s\| \le R} g^\top s + \tfrac12 s^\top Q s$, globally.

    At the maximum $(\lambda I - Q) s = g$ with $\lambda \ge \max(0, \lambda_{\max}(Q))$,
    and $\|s\| = R$ or $\lambda = 0$ (Moré and Sorensen, 1983).
    """
    q, g = basis.values, basis.coordinates(slope)
    eps = jnp.finfo(q.dtype).eps
    radius = jnp.asarray(radius, q.dtype)
    size = jnp.max(jnp.abs(q))
    top = jnp.max(q)
    curved = top > 100 * eps * size
    floor = where(curved, top, 0)
    gap = floor - q

    def coordinates(excess):
        denominator = gap + excess
        return where(denominator > 0, g / where(denominator > 0, denominator, 1), 0)

    def excess_for(barrier):
        """The excess of lambda over its floor at which the step has length R."""

        def too_long(excess):
            length = jnp.sum(coordinates(excess) ** 2)
            return length + 2 * barrier / excess > radius**2

        def bisect(_, bounds):
            low, high = bounds
            middle = 0.5 * (low + high)
            long = too_long(middle)
            return where(long, middle, low), where(long, high, middle)

        high = jnp.linalg.norm(g) / radius + jnp.sqrt(2 * barrier) / radius
        high = high + 4 * barrier / radius**2
        bounds = jnp.zeros_like(high), jnp.maximum(high, jnp.finfo(q.dtype).tiny)
        return jax.lax.fori_loop(0, _BISECTIONS, bisect, bounds)[1]

    excess = excess_for(jnp.zeros((), q.dtype))
    step = coordinates(excess)
    # The slope along the top eigenvector is zero: both of its directions are maxima.
    missing = jnp.sqrt(jnp.maximum(0, radius**2 - jnp.sum(step**2)))
    along_top = jnp.arange(q.size) == jnp.argmax(q)
    sign = where(jnp.sum(where(along_top, g, 0)) < 0, -1, 1)
    tied = curved & (missing > 100 * jnp.sqrt(eps) * radius)
    step = where(tied & along_top, step + sign * missing, step)

    # A logarithmic barrier keeps lambda above its floor. That smooths the kinks of the
    # dual, min over lambda of (g^T (lambda I - Q)^-1 g + lambda R^2) / 2.
    barrier = jnp.asarray(rounding, q.dtype) * radius**2 * size
    barrier = where(curved, barrier, 0)
    rounded = excess_for(barrier)
    mixture = coordinates(rounded)
    lift = 0.5 * (floor + rounded) * (radius**2 - jnp.sum(mixture**2))
    barrier_value = barrier * jnp.log(rounded / nonzero(size))
    lift = lift - where(barrier == 0, 0, barrier_value)
    value = jnp.sum(g * step) + 0.5 * jnp.sum(q * step**2)
    return WorstStep(
        basis.combine(step, slope),
        basis.combine(mixture, slope),
        lift,
        floor + excess,
        value,
    )
