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
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._failure.results import RESULTS
from .._tree import nonzero, tree_dtype, tree_eps, tree_norm


# Of the largest F_y: how much rounding in D_v is harm.
_HARM = 0.1


# In units of the largest F_y: H v is no larger where v only drifts along null(H).
_DRIFT = 10.0


class AdjointGrowth(eqx.Module):
    """What v is measured by: the largest curvature along v and the largest F_y so far."""

    curvature: Scalar
    outer_y: Scalar


def no_growth(v: PyTree[Array]) -> AdjointGrowth:
    """Before the first step."""
    zero = jnp.zeros((), tree_dtype(v))
    return AdjointGrowth(zero, zero)


def watched(
    before: AdjointGrowth,
    v: PyTree[Array],
    product: PyTree[Array],
    outer_y: PyTree[Array],
) -> tuple[AdjointGrowth, Scalar, RESULTS]:
    """What is known after one more product H v; the curvature along v; and whether v has
    grown too large."""
    length, pull = tree_norm(v), tree_norm(product)
    curvature = pull / nonzero(length)
    growth = AdjointGrowth(
        jnp.maximum(before.curvature, curvature),
        jnp.maximum(before.outer_y, tree_norm(outer_y)),
    )
    harms = tree_eps(v) * growth.curvature * length > _HARM * growth.outer_y
    drifts = pull <= _DRIFT * growth.outer_y
    result = RESULTS.where(drifts, RESULTS.adjoint_unbounded, RESULTS.adjoint_diverged)
    return growth, curvature, RESULTS.where(harms, result, RESULTS.successful)
