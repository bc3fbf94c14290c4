"""Backtracking along a path, the one line search of this package by values alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Scalar, ScalarLike

from .._tree import nonzero, tree_where, where


ARMIJO = 1e-4


def backtrack(
    trial: Callable[[Scalar], tuple[PyTree[Array], Scalar, Bool[Array, ""]]],
    start: PyTree[Array],
    value: Scalar,
    slope: Scalar,
    *,
    highest: Scalar | None = None,
    rounding: ScalarLike = 10.0,
    max_trials: int = 20,
    interpolate: bool = False,
) -> tuple[Scalar, PyTree[Array], Scalar]:
    r"""The first of $t = 1, \tfrac12, \tfrac14, \dots$ along a path that decreases an
    objective enough, $\phi(t) \le \phi(0) + 10^{-4}\, t\, \phi'(0)$ (Armijo's rule).

    **Arguments:**

    - `trial`: maps t to the point there, its value, and whether it may be accepted.
    - `start`: the point at t = 0.
    - `value`, `slope`: $\phi(0)$ and $\phi'(0)$.
    - `highest`: what stands for $\phi(0)$ in the rule, if that may be exceeded.
    - `rounding`: how much larger a value may be by rounding, in units of its last digit.
        At a minimum rounding decides between two equal values.
    - `max_trials`: how many t are tried.
    - `interpolate`: whether the next t is where a parabola through what is known is
        least, within reason, instead of half of the last.

    **Returns:**

    t, its point and its value; zero, `start` and `value` where no trial was accepted.
    """
    slack = jnp.asarray(rounding, value.dtype) * jnp.finfo(value.dtype).eps
    bound = (value if highest is None else highest) + slack * jnp.abs(value)
    slope = slope.astype(value.dtype)

    def unfinished(carry):
        count, _, _, accepted, _ = carry
        return ~accepted & (count < max_trials)

    # What is in the loop is compiled once: the first trial is there too.
    def body(carry):
        count, t, _, _, last = carry
        shorter = shortened(t, last - value, slope) if interpolate else 0.5 * t
        t = where(count == 0, 1, shorter)
        point, reached, allowed = trial(t)
        reached = reached.astype(value.dtype)
        # NaN does not satisfy it.
        accepted = allowed & (reached <= bound + ARMIJO * t * slope)
        return count + 1, t, point, accepted, reached

    one = jnp.ones((), value.dtype)
    carry = jnp.array(0), one, start, jnp.array(False), value
    _, t, point, accepted, reached = jax.lax.while_loop(unfinished, body, carry)
    found = where(accepted, t, 0), point, reached
    return tree_where(accepted, found, (jnp.zeros_like(t), start, value))


def shortened(t: Scalar, rise: Scalar, slope: Scalar) -> Scalar:
    r"""The t to try next: where the parabola through $\phi'(0)$ and the rise from
    $\phi(0)$ to $\phi(t)$ is least, if that is between a tenth and a half of t; otherwise
    a half of t."""
    curvature = 2 * (rise - t * slope)
    least = -slope * t**2 / nonzero(curvature)
    return where((least >= 0.1 * t) & (least <= 0.5 * t), least, 0.5 * t)
