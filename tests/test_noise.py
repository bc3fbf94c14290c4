"""How much of a sampled hypergradient is noise."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import bilevel_eqx as blx
from bilevel_eqx._pipeline.noise import after_step, no_noise, Noise
from bilevel_eqx._problem.batches import Batches
from bilevel_eqx.pipelines import (
    PenaltyDescent,
    SingleLoop,
    ValueFunctionDescent,
    ZerothOrder,
)


SIZE, DIM = 2_000, 40
STILL = optax.sgd(0.0)
SIZES: dict[str, Any] = {"inner_batch": 1, "outer_batch": 8}


class Targets(blx.AbstractFiniteSumProblem):
    """F is half of the mean squared distance of x to some points, and y follows x."""

    inner_data: jax.Array
    outer_data: jax.Array

    def inner_losses(self, x, y, batch, key):
        return 0.5 * jnp.sum((y - x) ** 2) + 0 * batch[:, 0]

    def outer_losses(self, x, y, batch, key):
        return 0.5 * jnp.sum((x[None] - batch) ** 2, axis=1) + 0 * jnp.sum(y)


@pytest.fixture(scope="module")
def problem():
    points = jr.normal(jr.key(0), (SIZE, DIM))
    return Targets(jnp.zeros((SIZE, 1)), points)


def test_the_share_of_a_known_variance(problem):
    # x stands still, so its gradient is x minus the mean of a batch of points.
    loop, batch = SingleLoop(STILL, STILL, STILL, **SIZES), 8
    points = np.asarray(problem.outer_data)
    variance = np.sum(np.var(points, axis=0)) / batch * (SIZE - batch) / (SIZE - 1)
    expected, starts = [0.05, 0.5, 0.95, 1.0], []
    for share in expected:
        # |x - mean|^2 is such that this share of the mean square is the variance.
        length = np.sqrt(variance * (1 / share - 1) / DIM)
        starts.append(points.mean(axis=0) + length)

    @eqx.filter_jit
    def run(x):
        return blx.solve(
            problem,
            blx.WarmStart(),
            x,
            jnp.zeros(DIM),
            pipeline=loop,
            num_steps=400,
            save_every=400,
            certify=False,
        ).history["outer_noise"][-1]

    found = eqx.filter_vmap(run)(jnp.array(starts))
    # The variance of DIM entries is estimated from about 200 steps: 1 of 60, if alone.
    assert np.allclose(found, expected, atol=0.04)


def test_it_is_the_estimate_of_the_formula():
    rng = np.random.default_rng(1)
    x = (jnp.zeros((70, 100)), jnp.zeros(3))
    gradients = [(rng.normal(size=(70, 100)) + 1, rng.normal(size=3)) for _ in range(30)]
    noise = no_noise(_on_batches(), Batches(1, 1), x)
    assert noise is not None and np.isnan(noise.share)
    for k, gradient in enumerate(gradients):
        noise = after_step(noise, jax.tree.map(jnp.asarray, gradient))
        assert isinstance(noise, Noise) and np.isnan(noise.share) == (k == 0)
    # Every second entry, so that there are not more than 4,096.
    seen = np.array([np.concatenate([u.ravel()[::2], v[::2]]) for u, v in gradients])
    weights = 0.99 ** np.arange(30)[::-1]
    weights /= weights.sum()
    mean, square = weights @ seen, np.sum(weights @ seen**2)
    variance = (square - mean @ mean) / (1 - np.sum(weights**2))
    assert np.allclose(noise.share, variance / square, rtol=1e-12)
    # What does not change has no noise.
    still = no_noise(_on_batches(), Batches(1, 1), x)
    for _ in range(3):
        still = after_step(still, jax.tree.map(jnp.ones_like, x))
    assert still is not None and still.share < 1e-12


def _on_batches():
    return Targets(jnp.zeros((4, 1)), jnp.zeros((4, 1)))


def test_all_data_have_none(problem):
    assert no_noise(problem, Batches(None, None), jnp.zeros(DIM)) is None
    on = Batches(2, 2)(problem, jr.key(0), jnp.array(0), jnp.array(0))
    # Batches that are given to the run, and not drawn by the pipeline.
    assert no_noise(on, Batches(None, None), jnp.zeros(DIM)) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "pipeline, equilibrium",
    (
        (
            blx.GradientPipeline(blx.Unrolled(optax.sgd(0.5), 2), STILL, **SIZES),
            blx.WarmStart(),
        ),
        (PenaltyDescent(STILL, STILL, STILL, **SIZES), blx.Optimistic()),
        (ValueFunctionDescent(STILL, **SIZES), blx.Optimistic()),
        (ZerothOrder(STILL, STILL, **SIZES), blx.WarmStart()),
    ),
    ids=lambda part: type(part).__name__,
)
def test_pipelines_that_draw_batches_record_it(problem, pipeline, equilibrium):
    # At the mean of the points all that moves x is noise.
    x = jnp.mean(problem.outer_data, axis=0)
    solution = blx.solve(
        problem,
        equilibrium,
        x,
        x,
        pipeline=pipeline,
        num_steps=200,
        save_every=100,
        certify=False,
    )
    assert np.allclose(solution.history["outer_noise"], 1.0, atol=0.05)
