"""Decompositions of matrices. Under `vmap` on a CPU they take one matrix at a time."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._compat import one_matrix_at_a_time


def check_precision(dtype: Any, owner: str) -> None:
    """Refuses types in which no matrix can be decomposed."""
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"{owner} decomposes a matrix, and matrices of type {dtype} cannot be "
            "decomposed. Cast the variables to float32; or use what only multiplies with "
            "the inner Hessian: `TruncatedCG` or `Neumann` as the linear solver and "
            "`GradientDescent` as the inner solver, or `Unrolled`."
        )


def _checked(decompose: Callable[[Array], Any]) -> Callable[[Array], Any]:
    in_turn = one_matrix_at_a_time(decompose)

    def checked(matrix: Array) -> Any:
        check_precision(matrix.dtype, "`Pseudoinverse`, or a certificate or audit,")
        return in_turn(matrix)

    return checked


# Both take the symmetric part of a matrix.
eigh = _checked(lambda matrix: tuple(jnp.linalg.eigh(matrix)))


def eigenvectors(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """The eigenvalues, in ascending order, and the eigenvectors, as rows."""
    values, vectors = eigh(matrix)
    return values, vectors.T


def quadratic_forms(
    vectors: Float[Array, "k n"], matrix: Float[Array, "n n"]
) -> Float[Array, " k"]:
    r"""$q^\top M q$ for each row q."""
    return jnp.sum(vectors @ matrix * vectors, axis=1)


def eigenvectors_and_forms(
    matrix: Float[Array, "n n"], other: Float[Array, "n n"]
) -> tuple[Float[Array, " n"], Float[Array, "n n"], Float[Array, " n"]]:
    """Those of a matrix, and the quadratic forms of another one at its eigenvectors."""
    values, vectors = eigenvectors(matrix)
    return values, vectors, quadratic_forms(vectors, other)


eigvalsh = _checked(lambda matrix: jnp.linalg.eigvalsh(matrix))


svd = _checked(lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)))


qr = _checked(lambda matrix: tuple(jnp.linalg.qr(matrix)))


inv = _checked(lambda matrix: jnp.linalg.inv(matrix))
