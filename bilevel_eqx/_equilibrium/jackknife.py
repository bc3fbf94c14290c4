r"""Residuals on some of the data: what they would be on all of it, and how sure that is.

A residual is a share $r = a / (a + b)$ with a norm $a$, and the norm of a noisy gradient
is too large: at an equilibrium, where it should be zero, it is as large as the noise. But
$\theta = (a / b)^2 = (r / (1 - r))^2$ is a smooth function of means over the data. So the
jackknife (Quenouille 1949, Tukey 1958) is applied to it. The samples are in G groups, and
$\theta_g$ is the estimate without group g:

$$\beta = (1 - \tfrac nN) (G - 1) (\bar\theta - \hat\theta), \qquad
\theta = \hat\theta - \beta, \qquad
\sigma^2 = (1 - \tfrac nN) \tfrac{G - 1}G \sum_g (\theta_g - \bar\theta)^2 + \beta^2,$$

with n of N samples, drawn without replacement. $\beta$ is the noise in $\theta$, and
$\beta^2$ what it adds to the variance where it is all that there is (the jackknife alone
takes $\theta$ for linear). Inner and outer data are sampled independently, so that their
corrections and variances add up.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .._problem.base import AbstractBilevelProblem
from .._problem.finite_sum import (
    AbstractFiniteSumProblem,
    Batch,
    data_of,
    Level,
    num_samples,
    OnBatches,
)
from .._problem.sampling import subset
from .._tree import where


NUM_GROUPS = 20
"""Into how many groups the samples of a level are split, and so their smallest number."""


def jackknife(
    evaluate: Callable[[AbstractBilevelProblem], Any],
    residuals_of: Callable[[Any], dict[str, Scalar]],
    problem: AbstractFiniteSumProblem,
    count: int,
    key: PRNGKeyArray,
) -> tuple[Any, dict[str, Scalar], dict[str, Scalar]]:
    """What `evaluate` finds on `count` samples of each level, the residuals that it would
    find on all of them, and their standard errors."""
    levels: tuple[Level, Level] = ("inner", "outer")
    keys: dict[Level, PRNGKeyArray] = dict(zip(levels, jr.split(key)))
    sampled: dict[Level, Batch | None] = {
        level: _sampled(problem, level, keys[level], count) for level in levels
    }
    inner, outer = sampled["inner"], sampled["outer"]
    # The first row of each table is without a group of neither level.
    rows = [_weights(inner, outer, None)]
    rows += [_weights(inner, outer, level) for level in keys if sampled[level]]
    tables = jtu.tree_map(lambda *u: jnp.concatenate(u), *rows)

    # In one loop, so that the program contains the certificate once.
    num_rows = 1 + NUM_GROUPS * sum(b is not None for b in sampled.values())
    found = jax.lax.map(
        lambda row: evaluate(_on(problem, inner, outer, row[1])),
        (jnp.arange(num_rows), tables),
    )
    estimates, errors = {}, {}
    for name, shares in residuals_of(found).items():
        odds = _odds(shares) ** 2
        estimate, variance, start = odds[0], jnp.zeros_like(odds[0]), 1
        for level, batch in sampled.items():
            if batch is None:
                continue
            without = odds[start : start + NUM_GROUPS]
            start += NUM_GROUPS
            left = 1 - count / num_samples(problem, level)
            mean = jnp.mean(without)
            bias = left * (NUM_GROUPS - 1) * (mean - odds[0])
            spread = jnp.sum((without - mean) ** 2)
            estimate = estimate - bias
            variance += left * (NUM_GROUPS - 1) / NUM_GROUPS * spread + bias**2
        estimate, error = jnp.maximum(estimate, 0), jnp.sqrt(variance)
        low = jnp.maximum(estimate - error, 0)
        low, middle, high = map(_share, (low, estimate, estimate + error))
        estimates[name] = middle
        # Of theta to that of r, which is no linear function of it.
        errors[name] = jnp.maximum(high - middle, middle - low)
    return jtu.tree_map(lambda u: u[0], found), estimates, errors


def _odds(share: Array) -> Array:
    """a / b, from a / (a + b)."""
    return share / jnp.maximum(1 - share, jnp.finfo(share.dtype).eps)


def _share(square: Scalar) -> Scalar:
    """a / (a + b), from (a / b)^2."""
    odds = jnp.sqrt(square)
    return odds / (1 + odds)


def _sampled(problem, level: Level, key, count: int) -> Batch | None:
    """Some of the data of a level; `None` if there are no more than that."""
    size = num_samples(problem, level)
    if count >= size:
        return None
    if count < NUM_GROUPS:
        # From one sample the error would be zero.
        raise ValueError(
            f"`certify(num_samples={count})`: {count} of the {size} samples of "
            f"`problem.{level}_data` do not say how much the others scatter. Take at "
            f"least {NUM_GROUPS}, and better some hundreds; `None` takes all of them."
        )
    indices = subset(key, size, count, f"`{level}_data`")
    samples = jtu.tree_map(lambda u: u[indices], data_of(problem, level))
    # No key, as where all data are used.
    return Batch(samples, jnp.full((count,), 1 / count), None)


def _weights(inner: Batch | None, outer: Batch | None, without: Level | None):
    """The weights of the samples: whole, or in turn without each group of one level."""

    def table(batch: Batch | None, level: Level):
        if batch is None:
            return None
        count = batch.weights.size
        if level == without:
            return _without_groups(count)
        num_rows = 1 if without is None else NUM_GROUPS
        return jnp.broadcast_to(batch.weights, (num_rows, count))

    return table(inner, "inner"), table(outer, "outer")


def _without_groups(count: int) -> Float[Array, "groups samples"]:
    group = jnp.arange(count) % NUM_GROUPS
    kept = group[None, :] != jnp.arange(NUM_GROUPS)[:, None]
    return where(kept, 1 / jnp.sum(kept, 1, keepdims=True), 0)


def _on(problem, inner: Batch | None, outer: Batch | None, weights) -> OnBatches:
    def reweighted(batch: Batch | None, w):
        return None if batch is None else Batch(batch.samples, w, batch.key)

    return OnBatches(problem, *map(reweighted, (inner, outer), weights))
