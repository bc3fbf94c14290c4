"""The largest eigenvalue of a symmetric map, by power iteration."""

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree, Scalar

from .._tree import nonzero, tree_norm, tree_scale, tree_waves


def largest_curvature(fn: Callable[[PyTree], Scalar], at: PyTree[Array]) -> Scalar:
    """An estimate from below of the largest curvature of `fn`, by power iteration.

    It is for a step size that does not diverge.
    """
    return largest_magnitude(jax.linearize(jax.grad(fn), at)[1], at)


NUM_STEPS = 20


def largest_magnitude(
    product: Callable[[PyTree], PyTree], like: PyTree[Array], num_steps: int = NUM_STEPS
) -> Scalar:
    """An estimate from below of the largest absolute eigenvalue of a symmetric map."""

    def multiply(vector, _):
        image = product(vector)
        size = tree_norm(image)
        return tree_scale(1 / nonzero(size), image), size

    start = tree_waves(like)
    start = tree_scale(1 / tree_norm(start), start)
    return jax.lax.scan(multiply, start, None, length=num_steps)[1][-1]


DENSE_SIZE = 1024


"""A matrix of at most this size is decomposed. A larger one is only multiplied with."""
