"""The diagonal of the Hessian, as a preconditioner."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree, ScalarLike

from .._arguments import as_count, as_rate, check_count, check_positive
from .._tree import where
from .misc import check_square
from .preconditioner import AbstractPreconditioner, probed


class Diagonal(AbstractPreconditioner):
    r"""$P = \max(d, 0) + \rho$ with an estimate of the diagonal of $H$ by random signs
    $z_1, \dots, z_p$:

    $$d = \frac1p \sum_{k=1}^p z_k \odot H z_k.$$

    It is exact if $H$ is diagonal. Otherwise $d_i$ has the expectation $H_{ii}$ and the
    variance $\frac1p \sum_{j \ne i} H_{ij}^2$. It helps where the diagonal varies by more
    than that: penalties of very different sizes, features of different scales.

    ??? cite "Reference"

        Bekas, Kokiopoulou and Saad, *An estimator for the diagonal of a matrix*, Applied
        Numerical Mathematics, 2007.
    """

    num_probes: int = eqx.field(converter=as_count)
    damping: ScalarLike = eqx.field(converter=as_rate)

    def __check_init__(self):
        check_count(self.num_probes, "num_probes", "Diagonal")
        check_positive(self.damping, "damping", "Diagonal")

    def prepare(self, operator: lx.AbstractLinearOperator) -> PyTree[Array]:
        """The estimate of the diagonal."""
        check_square(operator, "Diagonal")
        z, image = probed(operator, self.num_probes)
        return jtu.tree_map(lambda z, w: jnp.mean(z * w, axis=0), z, image)

    def precondition(self, prepared: PyTree[Array], r: PyTree[Array]) -> PyTree[Array]:
        r"""$P^{-1} r$."""

        def divide(d, r):
            # What is not finite counts as no estimate.
            d = where(jnp.isfinite(d), jnp.maximum(d, 0), 0)
            return r / (d + jnp.asarray(self.damping, d.dtype)).astype(r.dtype)

        return jtu.tree_map(divide, prepared, r)


Diagonal.__init__.__doc__ = r"""**Arguments:**

- `num_probes`: p, the number of products with $H$.
- `damping`: $\rho$, positive, in units of the curvature.
"""
