"""The largest eigenvalue of a symmetric map, by power iteration."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._tree import (
    nonzero,
    tree_axpy,
    tree_eps,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_waves,
)


def largest_curvature(fn: Callable[[PyTree], Scalar], at: PyTree[Array]) -> Scalar:
    """An estimate from below of the largest curvature of `fn`, by power iteration.

    It is for a step size that does not diverge.
    """
    return largest_magnitude(jax.linearize(jax.grad(fn), at)[1], at)


def curvature_by_differences(
    gradient: Callable[[PyTree], PyTree], at: PyTree[Array]
) -> Scalar:
    """The same from differences of gradients, for what cannot be differentiated twice."""
    here = gradient(at)
    h = tree_eps(at) ** 0.5 * jnp.maximum(1, tree_norm(at))

    def product(vector):
        return tree_scale(1 / h, tree_sub(gradient(tree_axpy(h, vector, at)), here))

    return largest_magnitude(product, at)


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


def typical_magnitude(product: Callable[[PyTree], PyTree], like: PyTree[Array]) -> Scalar:
    """The size of a linear map along a vector that is nothing special."""
    waves = tree_waves(like)
    return tree_norm(product(waves)) / tree_norm(waves)


DENSE_SIZE = 1024


"""A matrix of at most this size is decomposed. A larger one is only multiplied with."""
