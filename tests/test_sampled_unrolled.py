"""Unrolled steps on mini-batches, and with rates that are outer variables."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import tree_allclose

import bilevel_eqx as blx
from bilevel_eqx._problem.sampling import Epochs


SIZE, DIM, BATCH, K, RATE = 11, 3, 4, 5, 0.3
KEY = jr.key(3)
_rng = np.random.default_rng(0)
A, B = jnp.asarray(_rng.normal(size=(SIZE, DIM))), jnp.asarray(_rng.normal(size=SIZE))
X, Y = jnp.array([0.3, -0.2, 0.1]), jnp.array([0.5, -1.0, 0.7])


def losses(x, y, batch, key):
    features, targets = batch
    kept = 1.0
    if key is not None:
        kept = jnp.where(jr.bernoulli(key, 0.5, targets.shape), 2.0, 0.0)
    return kept * (jnp.tanh(features @ y) - targets) ** 2


def penalty(x, y):
    return 0.1 * jnp.sum(jnp.exp(x) * y**2)


problem = blx.FiniteSumProblem(losses, losses, (A, B), (A, B), inner_penalty=penalty)


@functools.cache
def _all_batches():
    """The indices, the weights and the keys of the first batches."""
    samples_key, losses_key = jr.split(jr.split(KEY)[0])
    counts = jnp.arange(80)
    indices, weights = jax.jit(
        jax.vmap(lambda count: Epochs(SIZE, BATCH)(samples_key, count))
    )(counts)
    return indices, weights, jax.vmap(lambda count: jr.fold_in(losses_key, count))(counts)


def by_hand(x, y, start, num_steps=K, rates=None, momentum=0.9):
    """Steps on batches `start`, `start + 1`, ..., each with its own key."""
    rates = jnp.full((num_steps,), RATE) if rates is None else rates

    def step(carry, given):
        (y, trace), (rate, indices, weights, key) = carry, given

        def f(y):
            values = losses(x, y, (A[indices], B[indices]), key)
            return jnp.sum(weights * values) + penalty(x, y)

        trace = jax.grad(f)(y) + momentum * trace
        return (y - rate * trace, trace), None

    batches = jax.tree.map(lambda u: u[start : start + num_steps], _all_batches())
    return jax.lax.scan(step, (y, jnp.zeros(DIM)), (rates, *batches))[0][0]


def outer_by_hand(x, y):
    return jnp.mean(losses(x, y, (A, B), None))


def response(mode="checkpointed", num_steps=K, optimiser=None):
    optimiser = optax.sgd(RATE, 0.9) if optimiser is None else optimiser
    return blx.Unrolled(optimiser, num_steps, mode, batch_size=BATCH, key=KEY)


@pytest.fixture(scope="module")
def expected():
    y = by_hand(X, Y, 0)
    gradient = jax.grad(lambda x: outer_by_hand(x, by_hand(x, Y, 0)))(X)
    return y, gradient


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("checkpointed", "reverse", "forward"))
def test_steps_on_batches_and_their_derivative(mode, expected):
    out = blx.hypergradient(problem, X, Y, response(mode))
    assert tree_allclose((out.y, out.gradient), expected, rtol=1e-12)
    # The same without a length that is known.
    if mode != "reverse":
        dynamic = eqx.filter_jit(lambda num_steps: _hypergradient(mode, num_steps))
        assert tree_allclose(dynamic(jnp.array(K)), expected, rtol=1e-12)
    slope = jax.grad(
        lambda x: outer_by_hand(x, blx.best_response(problem, x, Y, response(mode)))
    )
    if mode != "forward":
        assert tree_allclose(slope(X), expected[1], rtol=1e-12)


def _hypergradient(mode, num_steps):
    out = blx.hypergradient(problem, X, Y, response(mode, num_steps))
    return out.y, out.gradient


def test_many_steps_are_checkpointed_in_chunks():
    y = by_hand(X, Y, 0, 70)
    assert tree_allclose(
        blx.best_response(problem, X, Y, response(num_steps=70)), y, rtol=1e-10
    )


@pytest.mark.slow
def test_rates_are_outer_variables():
    # The last steps of the schedule count with what y has then.
    def with_rates(x):
        return optax.sgd(lambda count: x[1][count], 0.9)

    def losses_(x, y, batch, key):
        return losses(x[0], y, batch, key)

    of_both = blx.FiniteSumProblem(
        losses_,
        losses_,
        (A, B),
        (A, B),
        inner_penalty=lambda x, y: penalty(x[0], y),
    )
    rates = jnp.linspace(0.4, 0.1, K)

    @jax.grad
    def expected(x):
        return outer_by_hand(x[0], by_hand(x[0], Y, 0, K, x[1]))

    for mode in ("checkpointed", "forward"):
        out = blx.hypergradient(
            of_both, (X, rates), Y, response(mode, optimiser=with_rates)
        )
        assert tree_allclose(out.gradient, expected((X, rates)), rtol=1e-12)


def test_rates_alone_reach_the_outer_objective():
    # f does not contain x.
    apart = blx.BilevelProblem(
        lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: 0.5 * jnp.sum(y**2)
    )
    unrolled = blx.Unrolled(lambda x: optax.sgd(lambda count: x[count]), 3)
    pipeline = blx.GradientPipeline(unrolled, optax.sgd(0.02))
    rates, y0 = jnp.array([0.5, 0.1, 0.2]), jnp.array([4.0, 4.0])
    # y = y0 prod(1 - x): from 4 to 1, where F is zero.
    solution = blx.solve(
        apart, blx.ColdStart(), rates, y0, pipeline=pipeline, num_steps=200, certify=False
    )
    assert tree_allclose(4 * jnp.prod(1 - solution.x), 1.0, rtol=1e-8)
    assert tree_allclose(solution.value, 0.0, rtol=1e-8)


@pytest.mark.slow
def test_a_warm_start_goes_on_with_the_next_batches():
    optimiser, outer_rate = optax.sgd(RATE), 0.2
    pipeline = blx.GradientPipeline(response(optimiser=optimiser), optax.sgd(outer_rate))
    x, y = X, Y
    for k in range(3):
        # The first step only answers x0.
        gradient = jax.grad(
            lambda x: outer_by_hand(x, by_hand(x, y, k * K, momentum=0.0))  # noqa: B023
        )(x)
        y = by_hand(x, y, k * K, momentum=0.0)
        if k < 2:
            x = x - outer_rate * gradient
    solution = blx.solve(
        problem, blx.WarmStart(), X, Y, pipeline=pipeline, num_steps=2, certify=False
    )
    assert tree_allclose((solution.x, solution.y), (x, y), rtol=1e-12)
    # A cold start has the same ones each time.
    cold = blx.solve(
        problem, blx.ColdStart(), X, Y, pipeline=pipeline, num_steps=2, certify=False
    )
    assert tree_allclose(cold.y, by_hand(cold.x, Y, 0, momentum=0.0), rtol=1e-12)


@pytest.mark.parametrize(
    "make, sentence",
    (
        (lambda: blx.Unrolled(optax.sgd(0.1), 3, key=KEY), "batch_size"),
        (lambda: blx.Unrolled(optax.sgd(0.1), 3, batch_size=0), "at least one"),
        (lambda: blx.Unrolled(lambda x: x, 3), "GradientTransformation"),
        (lambda: blx.Unrolled(optax.sgd(0.1), 3, batch_size=12), "12 samples"),
    ),
)
def test_what_cannot_be_unrolled_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        blx.hypergradient(problem, X, Y, make())


def test_batches_need_samples():
    plain = blx.BilevelProblem(
        lambda x, y: jnp.sum(y), lambda x, y: jnp.sum((y - x) ** 2)
    )
    with pytest.raises(ValueError, match="FiniteSumProblem"):
        blx.hypergradient(plain, X, Y, response())
    pipeline = blx.GradientPipeline(response(), optax.sgd(0.1), inner_batch=4)
    with pytest.raises(ValueError, match="Leave out one of the two"):
        blx.solve(problem, blx.WarmStart(), X, Y, pipeline=pipeline, num_steps=1)
