r"""Watches the adjoint of a single loop for growth that does harm.

v moves by $-(H v + \epsilon v + F_y)$. If the rate is too large, or H has negative
eigenvalues, it diverges. If H is singular and there is no damping, what H annihilates of
$F_y$ stays, and v grows along it by as much in each step. H v, and with it x, does not
notice, until the rounding in that product, $u L \|v\|$ with the precision u and the
largest curvature L, is as large as $F_y$ itself.

If H is positive definite and the rates are stable, $\|v\|$ is at most
$\max \|F_y\| / \lambda_{\min}$. So the harm needs a condition number of a tenth of
$1 / u$ there.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Scalar

from .._failure.results import RESULTS
from .._tree import nonzero, tree_dtype, tree_norm


# Of the largest F_y: how much rounding in D_v is harm.
_HARM = 0.1


# In units of the largest F_y: H v is no larger where v only drifts along null(H).
_DRIFT = 10.0


# Norms of large vectors take time, and growth that does harm takes many steps.
_EVERY = 32


class AdjointGrowth(eqx.Module):
    """What is known of v and what it is measured by."""

    curvature: Scalar
    """|H v| / |v| when it was last looked at."""
    largest_curvature: Scalar
    largest_outer_y: Scalar
    length: Scalar
    """|v| then."""

    def verdict(self, eps: float) -> RESULTS:
        """Whether v has grown too large for numbers of the precision `eps`."""
        rounding = eps * self.largest_curvature * self.length
        drifts = self.curvature * self.length <= _DRIFT * self.largest_outer_y
        kind = RESULTS.where(drifts, RESULTS.adjoint_unbounded, RESULTS.adjoint_diverged)
        harms = rounding > _HARM * self.largest_outer_y
        return RESULTS.where(harms, kind, RESULTS.successful)


def no_growth(v: PyTree[Array]) -> AdjointGrowth:
    """Before the first step."""
    zero = jnp.zeros((), tree_dtype(v))
    return AdjointGrowth(zero, zero, zero, zero)


def watched(
    before: AdjointGrowth,
    count: Int[Array, ""],
    v: PyTree[Array],
    product: PyTree[Array],
    outer_y: PyTree[Array],
) -> AdjointGrowth:
    """What is known in step `count`, from v, H v and F_y."""

    def look():
        length = tree_norm(v)
        curvature = tree_norm(product) / nonzero(length)
        return AdjointGrowth(
            curvature,
            jnp.maximum(before.largest_curvature, curvature),
            jnp.maximum(before.largest_outer_y, tree_norm(outer_y)),
            length,
        )

    # In the first steps v is nowhere in particular, and shows how large H is.
    due = (count < _EVERY) | (count % _EVERY == 0)
    return jax.lax.cond(due, look, lambda: before)
