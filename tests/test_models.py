"""Models as people have them: Equinox models with dropout and with batch normalisation.

The recipes are those of the page on mini-batches.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import tree_allclose

import bilevel_eqx as blx
from bilevel_eqx._problem.batches import Batches
from bilevel_eqx._tree import tree_norm
from bilevel_eqx.pipelines import SingleLoop


NUM, DIM, HIDDEN = 40, 3, 4


def _data(seed, size=NUM):
    inputs = jr.normal(jr.key(seed), (size, DIM))
    noise = 0.3 * jr.normal(jr.key(seed + 1), (size,))
    return inputs, jnp.sin(inputs[:, 0]) + noise


TRAIN, VALIDATION = _data(0), _data(2)


def _penalty(x, y):
    return jnp.exp(x) * sum(jnp.sum(w**2) for w in jtu.tree_leaves(y))


#
# Dropout of the inputs of a linear model. In the mean over the keys it is a penalty,
# (w.u - t)^2 + p / (1 - p) sum_j w_j^2 u_j^2.
#


RATE = 0.4


def _dropout_problem():
    model = eqx.nn.Sequential(
        [
            eqx.nn.Dropout(RATE),
            eqx.nn.Linear(DIM, "scalar", use_bias=False, key=jr.key(0)),
        ]
    )
    y, static = eqx.partition(model, eqx.is_inexact_array)

    def losses(x, y, batch, key):
        inputs, targets = batch
        model = eqx.nn.inference_mode(eqx.combine(y, static), key is None)
        keys = None if key is None else jr.split(key, len(targets))
        return (jax.vmap(model)(inputs, key=keys) - targets) ** 2

    problem = blx.FiniteSumProblem(
        losses, losses, VALIDATION, TRAIN, inner_penalty=_penalty, block_size=16
    )
    return problem, y


def _weights(y):
    (w,) = jtu.tree_leaves(y)
    return w[0]


def _mean_square(data, w):
    inputs, targets = map(np.asarray, data)
    return np.mean((inputs @ w - targets) ** 2)


def _added_by_dropout(data):
    """In each of the weights, what dropout adds to the loss is this times its square."""
    return RATE / (1 - RATE) * np.mean(np.asarray(data[0]) ** 2, axis=0)


@pytest.mark.slow
def test_dropout_has_a_key_in_batches_and_rests_on_all_data():
    problem, y = _dropout_problem()
    x, w = jnp.array(-3.0), np.asarray(_weights(y))
    rest = np.exp(-3.0) * w @ w

    @jax.jit
    def at_rest(key):
        # One level on all of its data, the other on as many that are drawn.
        small = problem.sample(key, NUM, None)
        return problem.inner(x, y), problem.outer(x, y), small.outer(x, y)

    inner, outer, of_sample = at_rest(jr.key(0))
    assert tree_allclose(inner, _mean_square(TRAIN, w) + rest, rtol=1e-12)
    assert tree_allclose(outer, _mean_square(VALIDATION, w), rtol=1e-12)
    assert tree_allclose(of_sample, outer, rtol=1e-12)

    @jax.jit
    @jax.vmap
    def draws(key):
        small = problem.sample(key, NUM, NUM)
        return small.inner(x, y) - rest, small.outer(x, y)

    drawn = map(np.asarray, draws(jr.split(jr.key(1), 4_000)))
    for data, values in zip((TRAIN, VALIDATION), drawn):
        added = _added_by_dropout(data) @ w**2
        error = np.std(values) / np.sqrt(4_000)
        assert abs(np.mean(values) - _mean_square(data, w) - added) < 4 * error
        assert 4 * error < 0.1 * added


def _record(x, y, metrics):
    return x, _weights(y)


@pytest.mark.slow
def test_a_single_loop_trains_with_dropout():
    problem, y = _dropout_problem()
    pipeline = SingleLoop(
        optax.sgd(lambda count: 0.2 / (1 + count / 200)),
        optax.sgd(0.1),
        optax.sgd(0.01),
        inner_batch=16,
        outer_batch=16,
    )
    solution = blx.solve(
        problem,
        blx.Stackelberg(),
        jnp.array(-3.0),
        y,
        pipeline=pipeline,
        num_steps=8_000,
        record=_record,
        certify=False,
    )
    x, w = (np.mean(np.asarray(u)[4_000:], axis=0) for u in solution.history)
    inputs, targets = map(np.asarray, TRAIN)

    def ridge(added):
        H = inputs.T @ inputs / NUM + np.diag(added + np.exp(x))
        return np.linalg.solve(H, inputs.T @ targets / NUM)

    # It is the minimum of the mean over the keys, and not that without dropout.
    expected = ridge(_added_by_dropout(TRAIN))
    plain = ridge(np.zeros(DIM))
    assert np.linalg.norm(w - expected) < 0.1 * np.linalg.norm(plain - expected)
    assert np.linalg.norm(plain - expected) > 0.1 * np.linalg.norm(expected)


#
# Batch normalisation: with the statistics of a fixed batch, as a part of the losses, and
# with statistics that are given and computed anew between solves.
#


class Net(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key)
        self.first = eqx.nn.Linear(DIM, HIDDEN, key=keys[0])
        # After one update the state is the statistics of that batch. In mode "batch" the
        # variance would still be near the one that it starts with.
        self.norm = eqx.nn.BatchNorm(HIDDEN, axis_name="batch", mode="ema")
        self.last = eqx.nn.Linear(HIDDEN, "scalar", key=keys[1])

    def __call__(self, u, state):
        u, state = self.norm(self.first(u), state)
        return self.last(jnp.tanh(u)), state


def _net():
    return eqx.nn.make_with_state(Net)(jr.key(7))


def _run(net, state, inputs):
    apply = jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return apply(inputs, state)


class Normalised(blx.AbstractFiniteSumProblem):
    inner_data: tuple
    outer_data: tuple
    net: Net  # what is not in y: no arrays
    state: eqx.nn.State  # as it was made
    reference: jax.Array | None  # or `None`: the state holds the statistics

    block_size = 16

    def losses(self, y, batch):
        net, state, (inputs, targets) = eqx.combine(y, self.net), self.state, batch
        if self.reference is not None:
            state = _run(net, state, self.reference)[1]
        outputs, _ = _run(eqx.nn.inference_mode(net), state, inputs)
        return (outputs - targets) ** 2

    def inner_losses(self, x, y, batch, key):
        return self.losses(y, batch)

    def outer_losses(self, x, y, batch, key):
        return self.losses(y, batch)

    def inner_penalty(self, x, y):
        return _penalty(x, y)


def _by_hand(y, inputs, reference):
    """The formula of batch normalisation, with the statistics of `reference`."""

    def hidden(inputs):
        return inputs @ y.first.weight.T + y.first.bias[None, :]

    of_reference = hidden(reference)
    mean = jnp.mean(of_reference, axis=0)[None, :]
    variance = jnp.mean((of_reference - mean) ** 2, axis=0)[None, :]
    u = (hidden(inputs) - mean) / jnp.sqrt(variance + 1e-5)
    u = u * y.norm.weight[None, :] + y.norm.bias[None, :]
    return (jnp.tanh(u) @ y.last.weight.T + y.last.bias[None, :])[:, 0]


@pytest.mark.slow
def test_batch_normalisation_by_a_reference_batch():
    net, state = _net()
    y, static = eqx.partition(net, eqx.is_inexact_array)
    reference = TRAIN[0][:20]
    problem, x = Normalised(TRAIN, VALIDATION, static, state, reference), jnp.array(-4.0)

    def f(x, y):
        outputs = _by_hand(y, TRAIN[0], reference)
        return jnp.mean((outputs - TRAIN[1]) ** 2) + _penalty(x, y)

    def F(y):
        return jnp.mean((_by_hand(y, VALIDATION[0], reference) - VALIDATION[1]) ** 2)

    # The gradient goes through the statistics, in blocks and in batches.
    draw, num_batches = Batches(16, None), -(-NUM // 16)

    @jax.jit
    def gradients(x, y):
        def on(count):
            on_batch = draw(problem, jr.key(3), count, count)
            return jax.value_and_grad(on_batch.inner, (0, 1))(x, y)

        batches = jax.vmap(on)(jnp.arange(num_batches))
        return (
            jax.value_and_grad(f, (0, 1))(x, y),
            jax.value_and_grad(problem.inner, (0, 1))(x, y),
            jtu.tree_map(lambda u: jnp.mean(u, 0), batches),
        )

    whole, in_blocks, mean = gradients(x, y)
    assert tree_allclose(in_blocks, whole, rtol=1e-9)
    assert tree_allclose(mean, whole, rtol=1e-9)

    @jax.jit
    def trained(x):
        def step(y, _):
            slope = jax.grad(f, 1)(x, y)
            return jtu.tree_map(lambda u, g: u - 0.1 * g, y, slope), None

        return F(jax.lax.scan(step, y, length=10)[0])

    out = blx.hypergradient(problem, x, y, blx.Unrolled(optax.sgd(0.1), 10))
    value, gradient = jax.jit(jax.value_and_grad(trained))(x)
    assert tree_allclose((out.value, out.gradient), (value, gradient), rtol=1e-9)
    by_differences = (trained(x + 1e-4) - trained(x - 1e-4)) / 2e-4
    assert tree_allclose(out.gradient, by_differences, rtol=1e-6)


@pytest.mark.slow
def test_batch_normalisation_by_statistics_that_are_given():
    net, state = _net()
    y, static = eqx.partition(net, eqx.is_inexact_array)
    traces = []

    class Counted(Normalised):
        def inner_penalty(self, x, y):
            traces.append(None)
            return _penalty(x, y)

    @jax.jit
    def refreshed(y):
        return _run(eqx.combine(y, static), state, TRAIN[0])[1]

    pipeline = SingleLoop(optax.sgd(0.1), optax.sgd(0.1), optax.sgd(0.1), damping=0.1)

    def go_on(x, y, state):
        problem = Counted(TRAIN, VALIDATION, static, refreshed(y), None)
        return problem, blx.solve(
            problem,
            blx.WarmStart(0.1),
            x,
            y,
            pipeline=pipeline,
            num_steps=500,
            save_every=500,
            state=state,
            certify=False,
        )

    problem, solution = go_on(jnp.array(-5.0), y, None)
    counts = []
    for _ in range(20):
        problem, solution = go_on(solution.x, solution.y, solution.state)
        counts.append(len(traces))
    # Other statistics are other data of the same program.
    assert len(set(counts)) == 1

    # It comes to rest where y is a minimum for statistics that are its own.
    x, y = solution.x, solution.y
    moving = Normalised(TRAIN, VALIDATION, static, state, TRAIN[0])

    @jax.jit
    def at(x, y):
        slopes = [tree_norm(jax.grad(p.inner, 1)(x, y)) for p in (problem, moving)]
        outputs = _by_hand(y, VALIDATION[0], TRAIN[0])
        return slopes, jnp.mean((outputs - VALIDATION[1]) ** 2)

    (slope, slope_if_moving), value = at(x, y)
    assert tree_allclose(refreshed(y), problem.state, rtol=2e-3)
    assert tree_allclose(solution.value, value, rtol=2e-3)
    # That is no minimum if one heeds that they move with y.
    assert slope < 0.02 * slope_if_moving
