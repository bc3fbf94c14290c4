"""Where a search for the inner minimum nearest to an anchor begins."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._derivatives.first import inner_gradient
from .._linalg.power_iteration import DENSE_SIZE, largest_curvature
from .._problem.base import AbstractBilevelProblem
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._problem.proximal import proximal
from .._tree import vector_norm, where
from .minimum import minimise_inner
from .projection import Projection


# In units of the largest curvature of f at the anchor. At the first one y has hardly left
# the anchor; at the last but one it is at an inner minimum but for rounding in float32.
_WEIGHTS = 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 0.0


# A less exact path ends elsewhere, and the search from there takes ten times the steps.
_RTOL = 1e-6


_MAX_STEPS = 200


def has_path(problem: AbstractBilevelProblem, anchor: Float[Array, " n"]) -> bool:
    """Whether a search begins as in `start_of_search`, if S(x) is curved."""
    squares = isinstance(problem, AbstractLeastSquaresProblem)
    return anchor.size <= DENSE_SIZE and not squares


def path_not_known(anchor: Float[Array, " n"]) -> Float[Array, "k n"]:
    """What stands for a path if there is none yet."""
    return jnp.broadcast_to(anchor, (len(_WEIGHTS), anchor.size))


def start_of_search(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    guess: Float[Array, " n"],
    anchor: Float[Array, " n"],
    path: Float[Array, "k n"] | None = None,
) -> tuple[Float[Array, " n"], Int[Array, ""], Float[Array, "k n"]]:
    r"""Where a search for the inner minimum nearest to an anchor a begins: at the one
    that `Projection` finds from a guess, or at the end of a path from a if that is
    nearer; the number of steps that led to the former; and the points of the path.

    The path is made of the minima of $f(x, y) + \frac\delta2 \|y - a\|^2$, as $\delta$
    falls to zero. If these are the least of all, the end is the inner minimum nearest to
    a (Tikhonov). Here they are local minima, found by Newton's method from the one
    before, or, where f and its penalty are lower there, from that of a `path` at another
    x. So nothing is certain, but a minimiser of f alone often ends farther from a.

    A search follows S(x), in steps that are short where S(x) is curved, to the next point
    that is nearest among its neighbours. The path leads to a nearer one at once. Its
    steps are products with H, which cost little where H is small enough to be decomposed
    in each step of the search. (Of a sum of squares the search takes cheap steps, and
    begins near.)
    """
    largest = largest_curvature(lambda y: problem.inner(x, y), anchor)
    eps = float(jnp.finfo(anchor.dtype).eps)
    exact = 100 * eps

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

    # Both in one loop, which makes the program shorter.
    weights = jnp.asarray((0.0, *_WEIGHTS), anchor.dtype)
    known = None if path is None else jnp.concatenate([guess[None], path])
    stages = weights, jnp.arange(weights.size) == 1, known
    _, (minima, num_steps) = jax.lax.scan(follow, guess, stages)
    direct, followed = minima[0], minima[1:]
    end = followed[-1]

    def measured(y):
        return vector_norm(inner_gradient(problem, x, y)), vector_norm(y - anchor)

    # In one batch, for the same reason.
    points = jnp.stack([end, direct, anchor])
    (slope, least, first), (distance, other, _) = jax.vmap(measured)(points)
    # What is nearer only because it is not at a minimum does not count.
    minimal = slope <= jnp.maximum(least, eps**0.5 * first)
    return where(minimal & (distance < other), end, direct), num_steps[0], followed
