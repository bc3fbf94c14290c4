"""The inner minimum that lies at the end of a path from an anchor."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

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


def proximal_path(
    problem: AbstractBilevelProblem, x: PyTree[Array], anchor: Float[Array, " n"]
) -> Float[Array, " n"]:
    r"""The end of the path from an anchor a that is made of the minima of
    $f(x, y) + \frac\delta2 \|y - a\|^2$, as $\delta$ falls to zero.

    If these are the least of all, the end is the inner minimum nearest to a (Tikhonov).
    Here they are local minima, found by Newton's method from the one before, so that
    nothing is certain. But a minimiser of f alone ends farther from a.
    """
    largest = largest_curvature(lambda y: problem.inner(x, y), anchor)
    exact = 100 * float(jnp.finfo(anchor.dtype).eps)

    def follow(y, weight):
        rtol: Any = where(weight == 0, exact, max(_RTOL, exact))
        solver = Projection(rtol=rtol, max_steps=_MAX_STEPS)
        nearby = proximal(problem, anchor, weight * largest)
        return minimise_inner(nearby, x, y, solver, curved=True).value, None

    weights = jnp.asarray(_WEIGHTS, anchor.dtype)
    return jax.lax.scan(follow, anchor, weights)[0]
