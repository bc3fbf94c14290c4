"""Decompositions of matrices, one at a time where several at once would never end.

On a CPU jaxlib (0.10) hands a batch of decompositions to the threads of the pool that it
runs on itself, and waits for them. As many of these in one program as there are threads,
with nothing to order them, and each waits for the others: under `vmap` a program that
decomposes two matrices stands still on two cores. So a batch is taken one by one there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def _safe(decompose: Callable[[Array], Any]) -> Callable[[Array], Any]:
    one_by_one = jax.custom_batching.sequential_vmap(decompose)

    def safe(matrix: Array) -> Any:
        return jax.lax.platform_dependent(matrix, cpu=one_by_one, default=decompose)

    return safe


eigh = _safe(lambda matrix: tuple(jnp.linalg.eigh(matrix)))


eigvalsh = _safe(lambda matrix: jnp.linalg.eigvalsh(matrix))


svd = _safe(lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)))


qr = _safe(lambda matrix: tuple(jnp.linalg.qr(matrix)))


inv = _safe(lambda matrix: jnp.linalg.inv(matrix))
