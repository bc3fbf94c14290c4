r"""How much of a sampled hypergradient is noise.

Of the last steps the mean m and the mean square s of the hypergradient g are known, with
weights $w_j$ that fall geometrically into the past. If g has the mean $\bar g$ and the
variance $\sigma^2$ (the sum of those of its entries), and those of two steps are
independent,

$$E s = |\bar g|^2 + \sigma^2, \qquad
E |m|^2 = |\bar g|^2 + \sigma^2 / N, \qquad N = \frac{(\sum w_j)^2}{\sum w_j^2},$$

so that $(s - |m|^2) / (1 - 1 / N)$ is an unbiased estimate of $\sigma^2$. Its share of s
is one where g is nothing but noise.

x moves meanwhile, and what $\bar g$ changes by within the window counts as noise too.
"""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._problem.base import AbstractBilevelProblem
from .._problem.batches import Batches
from .._problem.finite_sum import OnBatches
from .._tree import nonzero, tree_dtype, tree_size


# The weight of a step is this share of that of the step after. Then N is about 200.
_DECAY = 0.99


# So many entries of x show it. More would take as long as a step on a small batch.
_LARGEST = 4_096


class Noise(eqx.Module):
    """What is known of the hypergradients of the steps so far."""

    moments: Float[Array, "2 k"]
    """Weighted sums of some entries, evenly spaced, and of their squares."""
    count: Int[Array, ""]

    @property
    def share(self) -> Scalar:
        """From zero, where all is signal, to one, where all is noise; NaN before there
        are two steps."""
        decay = jnp.asarray(_DECAY, self.moments.dtype)
        power = decay ** self.count.astype(decay.dtype)
        # 1 / N, and the sum of the weights, by the sums of geometric series.
        inverse = (1 - decay) * (1 + power) / ((1 + decay) * nonzero(1 - power))
        mean, square = self.moments / nonzero(1 - power)
        total = jnp.sum(square)
        noise = (total - jnp.sum(mean**2)) / nonzero(1 - inverse)
        share = jnp.clip(noise / nonzero(total), 0, 1)
        return jnp.where(self.count < 2, jnp.nan, share)


def no_noise(
    problem: AbstractBilevelProblem, batches: Batches, x: PyTree[Array]
) -> Noise | None:
    """Before the first step; `None` if all data are used."""
    sampled = batches.inner_size is not None or batches.outer_size is not None
    if not sampled and not isinstance(problem, OnBatches):
        return None
    size = _entries(x).size
    return Noise(jnp.zeros((2, size), tree_dtype(x)), jnp.zeros((), jnp.int32))


def after_step(noise: Noise | None, gradient: PyTree[Array]) -> Noise | None:
    """What is known after another step."""
    if noise is None:
        return None
    entries = _entries(gradient)
    new = jnp.stack([entries, entries**2])
    decay = jnp.asarray(_DECAY, new.dtype)
    return Noise(decay * noise.moments + (1 - decay) * new, noise.count + 1)


def with_noise(metrics: dict, noise: Noise | None) -> dict:
    """The metrics of a step, and how much of its hypergradient is noise."""
    return metrics if noise is None else {**metrics, "outer_noise": noise.share}


def _entries(tree: PyTree[Array]) -> Float[Array, " k"]:
    every = -(-tree_size(tree) // _LARGEST)
    parts = [u.reshape(-1)[::every] for u in jtu.tree_leaves(tree)]
    return jnp.concatenate([u.astype(tree_dtype(tree)) for u in parts])
