"""Decompositions of matrices. Under `vmap` on a CPU they take one matrix at a time."""

import jax.numpy as jnp

from .._compat import one_matrix_at_a_time


eigh = one_matrix_at_a_time(lambda matrix: tuple(jnp.linalg.eigh(matrix)))


eigvalsh = one_matrix_at_a_time(lambda matrix: jnp.linalg.eigvalsh(matrix))


svd = one_matrix_at_a_time(
    lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False))
)


qr = one_matrix_at_a_time(lambda matrix: tuple(jnp.linalg.qr(matrix)))


inv = one_matrix_at_a_time(lambda matrix: jnp.linalg.inv(matrix))
