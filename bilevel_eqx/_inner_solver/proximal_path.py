"""An inner minimum, and the one at the end of a path from an anchor."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._linalg.power_iteration import largest_curvature
from .._problem.base import AbstractBilevelProblem
from .._problem.proximal import proximal
from .._tree import where
from .minimum import minimise_inner
from .projection import Projection


# In units of the largest curvature of f at the anchor. At the first one y has hardly left
# the anchor; at the last but one it is at an inner minimum but for rounding in float32.
_WEIGHTS = 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 0.0


# A less exact path ends elsewhere, and the search from there takes ten times the steps.
_RTOL = 1e-6


_MAX_STEPS = 200


class TwoMinima(NamedTuple):
    direct: Float[Array, " n"]
    """What Newton's method leads to from the start."""
    path: Float[Array, "k n"]
    """The points of the path from the anchor. The last one is an inner minimum."""
    num_steps: Int[Array, ""]
    """Those that led to the first."""


def path_not_known(anchor: Float[Array, " n"]) -> Float[Array, "k n"]:
    """What stands for a path if there is none yet."""
    return jnp.broadcast_to(anchor, (len(_WEIGHTS), anchor.size))


def two_minima(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    start: Float[Array, " n"],
    anchor: Float[Array, " n"],
    path: Float[Array, "k n"] | None = None,
) -> TwoMinima:
    r"""The inner minimum that `Projection` finds from a start, and the path from an
    anchor a that is made of the minima of $f(x, y) + \frac\delta2 \|y - a\|^2$, as
    $\delta$ falls to zero.

    If these are the least of all, the end is the inner minimum nearest to a (Tikhonov).
    Here they are local minima, found by Newton's method from the one before, or, where f
    and its penalty are lower there, from that of a `path` at another x. So nothing is
    certain, but a minimiser of f alone often ends farther from a.

    Both are in one loop, which makes the program shorter.
    """
    largest = largest_curvature(lambda y: problem.inner(x, y), anchor)
    exact = 100 * float(jnp.finfo(anchor.dtype).eps)

    def follow(y, stage):
        weight, restarts, known = stage
        rtol: Any = where(weight == 0, exact, max(_RTOL, exact))
        solver = Projection(rtol=rtol, max_steps=_MAX_STEPS)
        nearby = proximal(problem, anchor, weight * largest)
        y = where(restarts, anchor, y)
        if known is not None:
            y = where(nearby.inner(x, known) < nearby.inner(x, y), known, y)
        found = minimise_inner(nearby, x, y, solver, curved=True)
        return found.value, (found.value, found.stats["num_steps"])

    weights = jnp.asarray((0.0, *_WEIGHTS), anchor.dtype)
    known = None if path is None else jnp.concatenate([start[None], path])
    stages = weights, jnp.arange(weights.size) == 1, known
    _, (minima, num_steps) = jax.lax.scan(follow, start, stages)
    return TwoMinima(minima[0], minima[1:], num_steps[0])
