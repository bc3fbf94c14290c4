"""Means over data: their derivatives in blocks, and the batches drawn from them."""

import collections

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import tree_allclose

import bilevel_eqx as blx
from bilevel_eqx._equilibrium import stackelberg
from bilevel_eqx._problem.batches import Batches
from bilevel_eqx._problem.finite_sum import OnBatches
from bilevel_eqx._problem.sampling import Epochs, shuffled


NUM_TRAIN, NUM_VALIDATION, DIM = 37, 23, 4


def logistic(x, y, batch, key):
    features, signs = batch
    return jax.nn.softplus(-signs * (features @ y))


def weighted(x, y, batch, key):
    return jnp.exp(x[0]) * logistic(x, y, batch, key)


def penalty(x, y):
    return 0.05 * jnp.sum(jnp.exp(x) * y**2)


def make(block_size=None, dtype=jnp.float64, shuffled=False):
    def data(seed, size):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(size, DIM))
        signs = np.sign(features[:, 0] + rng.normal(size=size))
        return jnp.asarray(features, dtype), jnp.asarray(signs, dtype)

    return blx.FiniteSumProblem(
        logistic,
        weighted,
        data(1, NUM_VALIDATION),
        data(0, NUM_TRAIN),
        inner_penalty=penalty,
        block_size=block_size,
        shuffled=shuffled,
    )


X = jnp.array([0.1, 0.2, -0.3, 0.4])
Y = jnp.array([0.5, -1.0, 0.3, 0.2])


@eqx.filter_jit
def values(problem):
    return problem.inner(X, Y), problem.outer(X, Y)


@pytest.mark.slow
def test_the_mean_of_the_losses():
    problem = make()
    inner, outer = values(problem)
    features, signs = map(np.asarray, problem.inner_data)
    losses = np.log1p(np.exp(-signs * (features @ np.asarray(Y))))
    f = np.exp(0.1) * losses.mean() + 0.05 * np.sum(np.exp(X) * np.asarray(Y) ** 2)
    assert np.allclose(inner, f, rtol=1e-14)
    features, signs = map(np.asarray, problem.outer_data)
    losses = np.log1p(np.exp(-signs * (features @ np.asarray(Y))))
    assert np.allclose(outer, losses.mean(), rtol=1e-14)


def _derivatives(problem):
    f, (features, signs) = problem.inner, problem.inner_data

    def of_data(features):
        data = features, signs
        return eqx.tree_at(lambda p: p.inner_data, problem, data).inner

    return {
        "value and gradient": jax.value_and_grad(f, (0, 1))(X, Y),
        "reverse over reverse": jax.jacrev(jax.jacrev(f, 1), 0)(X, Y),
        "forward over reverse": jax.jacfwd(jax.grad(f, (0, 1)), 1)(X, Y),
        "forward over forward": jax.jacfwd(jax.jacfwd(f, 1), 0)(X, Y),
        "third": jax.jacrev(jax.jacfwd(jax.jacrev(f, 1), 0), 1)(X, Y),
        "a batch": jax.vmap(jax.grad(f, 1), (None, 0))(X, jnp.stack([Y, 2 * Y])),
        "data": jax.grad(lambda A: of_data(A)(X, Y))(features),
        "data, then y": jax.jacfwd(lambda A: jax.grad(of_data(A), 1)(X, Y))(features),
        "y, then data": jax.jacrev(
            lambda y: jax.grad(lambda A: of_data(A)(X, y))(features)
        )(Y),
    }


# That divide the data and that do not; one of more than there are.
@pytest.mark.slow
@pytest.mark.parametrize("block_size", (10, 36, 50))
def test_blocks_change_nothing(block_size):
    derivatives = eqx.filter_jit(_derivatives)
    ours, whole = derivatives(make(block_size)), derivatives(make())
    for name in whole:
        assert tree_allclose(ours[name], whole[name], rtol=1e-12), name


RIDGE = np.random.default_rng(2).normal(size=(NUM_TRAIN, DIM + 1))


def _closed_over(s, w, block_size, repeats=1):
    """A ridge regression whose losses close over a number and an array."""

    def losses(x, y, batch, key):
        return s * (batch[:, :-1] @ (w * y) - batch[:, -1]) ** 2

    data = jnp.tile(jnp.asarray(RIDGE), (repeats, 1))
    return blx.FiniteSumProblem(
        losses,
        losses,
        data,
        data,
        inner_penalty=lambda x, y: jnp.sum(jnp.exp(x) * y**2),
        block_size=block_size,
    )


def _ridge_minimum(s, w):
    A, b = RIDGE[:, :-1] * w, RIDGE[:, -1]
    H = s * A.T @ A / NUM_TRAIN + np.diag(np.exp(X))
    return np.linalg.solve(H, s * A.T @ b / NUM_TRAIN)


def _ridge_slopes(s, w):
    """The derivatives of the minimum, by a complex step."""
    of_s = _ridge_minimum(s + 1e-30j, w).imag / 1e-30
    of_w = [_ridge_minimum(s, w + 1e-30j * e).imag / 1e-30 for e in np.eye(DIM)]
    return of_s, np.stack(of_w, 1)


def test_losses_in_blocks_may_close_over_values():
    """With respect to which the mean is differentiated, in both modes, jitted or not."""
    s, w, y = 1.3, np.array([1.0, 0.5, -2.0, 0.7]), np.asarray(Y)
    residual = RIDGE[:, :-1] @ (w * y) - RIDGE[:, -1]
    slope = 2 * RIDGE[:, :-1].T @ residual / NUM_TRAIN
    first = np.mean(residual**2), s * slope * y

    def inner(s, w):
        return _closed_over(s, w, 10).inner(X, Y)

    # Eagerly JAX fails in another way than within a jitted program.
    assert tree_allclose(jax.grad(inner, (0, 1))(s, w), first, rtol=1e-12)
    forward = jax.jacfwd(inner, (0, 1))
    found, (_, second) = jax.jit(lambda s, w: (forward(s, w), jax.jacrev(forward)(s, w)))(
        s, w
    )
    assert tree_allclose(found, first, rtol=1e-12)
    assert tree_allclose(second, slope * y, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("repeats, block_size", ((1, 10), (1_500, "auto")))
def test_the_response_to_what_losses_close_over(repeats, block_size):
    s, w = jnp.array(1.3), jnp.array([1.0, 0.5, -2.0, 0.7])
    response = blx.Implicit(blx.Projection(blx.Pseudoinverse()), blx.Pseudoinverse())

    def minimum(s, w):
        # On more than 2 MB of data `"auto"` takes blocks.
        problem = _closed_over(s, w, block_size, repeats)
        return blx.best_response(problem, X, jnp.zeros(DIM), response)

    wanted = _ridge_slopes(1.3, np.asarray(w))
    both = jax.jacfwd(minimum, (0, 1)), jax.jacrev(minimum, (0, 1))
    for derivative in (both[0], jax.jit(both[0]), jax.jit(both[1])):
        assert tree_allclose(derivative(s, w), wanted, rtol=1e-8)
    if repeats == 1:
        second = jax.jit(jax.jacfwd(jax.jacrev(minimum)))(s, w)
        above, below = (_ridge_slopes(t, np.asarray(w))[0] for t in (1.3001, 1.2999))
        assert tree_allclose(second, (above - below) / 2e-4, rtol=1e-6)


@pytest.mark.slow
def test_a_mean_in_blocks_within_an_objective():
    """Of another problem, whose outer variable its losses close over."""
    response = blx.Implicit(blx.Projection(blx.Pseudoinverse()), blx.Pseudoinverse())
    w = jnp.ones(DIM)

    def outer(s, z):
        y = blx.best_response(_closed_over(s, w, 10), X, jnp.zeros(DIM), response)
        return jnp.sum(y**2) + (z - s) ** 2

    problem = blx.BilevelProblem(outer, lambda s, z: (z - 2 * s) ** 2)
    found = blx.hypergradient(problem, jnp.array(1.3), jnp.array(0.0), response)
    # At the minimum z is 2 s.
    slope, _ = _ridge_slopes(1.3, np.ones(DIM))
    expected = 2 * _ridge_minimum(1.3, np.ones(DIM)) @ slope + 2 * 1.3
    assert tree_allclose(found.gradient, expected, rtol=1e-8)


@pytest.mark.slow
def test_data_and_what_losses_close_over_move_together():
    def inner(s, data):
        def losses(x, y, batch, key):
            return s * (batch[:, :-1] @ y - batch[:, -1]) ** 2

        problem = blx.FiniteSumProblem(losses, losses, data, data, block_size=10)
        return problem.inner(X, Y)

    residual = RIDGE[:, :-1] @ np.asarray(Y) - RIDGE[:, -1]
    of_data = 2 * residual[:, None] * np.append(np.asarray(Y), -1.0) / NUM_TRAIN
    wanted = (np.mean(residual**2), 1.3 * of_data), (0.0, of_data)
    data = jnp.asarray(RIDGE)

    def slopes(s):
        return jax.grad(inner, (0, 1))(s, data)

    found = jax.jit(lambda s: (slopes(s), jax.jacrev(slopes)(s)))(1.3)
    assert tree_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def _temporary_bytes(num_samples, block_size):
    data = jnp.zeros((num_samples, 20)), jnp.ones(num_samples)
    hidden = jnp.zeros((20, 30)), jnp.zeros(30)

    def losses(x, y, batch, key):
        features, signs = batch
        first, second = y
        return jax.nn.softplus(-signs * (jnp.tanh(features @ first) @ second))

    def cg(data, y, v):
        problem = blx.FiniteSumProblem(losses, losses, data, data, block_size=block_size)
        _, push = jax.linearize(lambda y: jax.grad(problem.inner, 1)(X, y), y)
        return jax.lax.scan(lambda v, _: (push(v), None), v, length=3)[0]

    memory = jax.jit(cg).lower(data, hidden, hidden).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data():
    # Several products with one linearisation, of a network: what is usually stored.
    small, large = (_temporary_bytes(n, 100) for n in (1_050, 8_050))
    # Of 21 numbers of a sample a few: those of the last layer, and not of the hidden one.
    assert large < small + 10 * 8 * 7_000
    assert _temporary_bytes(8_050, None) > 30 * 8 * 7_000 + large


def _jaxprs(jaxpr):
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _jaxprs(inner)


def _product(block_size, num_samples):
    """A product with the Hessian, and its program after the linearisation."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(num_samples, DIM)))
    data = features, jnp.sign(features[:, 0])
    problem = blx.FiniteSumProblem(logistic, logistic, data, data, block_size=block_size)
    _, push = jax.linearize(lambda y: jax.grad(problem.inner, 1)(X, y), Y)
    return push(Y), list(_jaxprs(jax.make_jaxpr(push)(Y).jaxpr))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="blocks are for a CPU")
def test_blocks_for_the_cache():
    """They are read for the product alone: once forward and once back."""
    expected, _ = _product(None, 60_000)
    found, programs = _product("auto", 60_000)
    assert tree_allclose(found, expected, rtol=1e-12)
    eqns = [eqn for program in programs for eqn in program.eqns]
    (loop,) = (eqn for eqn in eqns if eqn.primitive.name == "scan")
    # 2^18 bytes, of 5 numbers a sample.
    assert loop.params["length"] == -(-60_000 // (2**18 // (8 * (DIM + 1))))
    passes = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
    passes = [p for p in passes if any(u.aval.ndim == 2 for u in p.invars)]
    assert len(passes) == 2
    # Small data stay in the cache.
    _, programs = _product("auto", 1_000)
    names = {eqn.primitive.name for program in programs for eqn in program.eqns}
    assert "scan" not in names


def _minimum(x):
    """What the inner minimum is, what F is there, and how both move with x: by Newton's
    method, in NumPy."""
    problem, x, y = make(), np.asarray(x), np.zeros(DIM)
    (A, s), (C, t) = (
        map(np.asarray, data) for data in (problem.inner_data, problem.outer_data)
    )

    def of_losses(y):
        share = 1 / (1 + np.exp(s * (A @ y)))
        hessian = (A.T * share * (1 - share)) @ A
        return [np.exp(x[0]) / NUM_TRAIN * u for u in (-A.T @ (s * share), hessian)]

    for _ in range(20):
        slope, hessian = of_losses(y)
        H = hessian + 0.1 * np.diag(np.exp(x))
        y = y - np.linalg.solve(H, slope + 0.1 * np.exp(x) * y)
    slope, hessian = of_losses(y)
    H = hessian + 0.1 * np.diag(np.exp(x))
    mixed = np.outer(slope, np.eye(DIM)[0]) + 0.1 * np.diag(np.exp(x) * y)
    jacobian = -np.linalg.solve(H, mixed)
    value = np.mean(np.log1p(np.exp(-t * (C @ y))))
    F_y = -C.T @ (t / (1 + np.exp(t * (C @ y)))) / NUM_VALIDATION
    return y, jacobian, value, jacobian.T @ F_y


@pytest.mark.slow
def test_everything_that_takes_a_problem_takes_it():
    problem = make(10)
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())

    @eqx.filter_jit
    def answers(problem):
        out = blx.hypergradient(problem, X, Y, response)
        slope = jax.jacfwd(lambda x: blx.best_response(problem, x, Y, response))(X)
        return out.y, slope, out.value, out.gradient

    assert tree_allclose(answers(problem), _minimum(X), rtol=1e-8)
    solution = blx.solve(problem, blx.WarmStart(), X, Y, num_steps=5)
    y, _, value, gradient = _minimum(solution.x)
    assert tree_allclose((solution.y, solution.value), (y, value), rtol=1e-8)
    assert value < _minimum(X)[2]
    assert solution.certificate.residuals["inner"] < 1e-8


class Indexed(blx.AbstractFiniteSumProblem):
    inner_data: tuple
    outer_data: tuple

    block_size = 4

    def inner_losses(self, x, y, batch, key):
        target, index = batch
        return jax.nn.sigmoid(x[index]) * (y - target) ** 2

    def outer_losses(self, x, y, batch, key):
        (target,) = batch
        return (y - target) ** 2


@pytest.mark.slow
def test_x_has_an_entry_for_each_sample():
    target, x, y = np.arange(10.0), np.linspace(-1, 1, 10), 4.0
    data = (jnp.asarray(target), jnp.arange(10)), (jnp.array([2.0, 3.0]),)
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())

    @jax.jit
    def both(x, y):
        problem = Indexed(*data)
        slope = jax.grad(problem.inner)(x, y)
        return slope, blx.best_response(problem, x, y, response)

    weights = 1 / (1 + np.exp(-x))
    slope = weights * (1 - weights) * (y - target) ** 2 / 10
    # The minimum is a weighted mean, in closed form.
    mean = weights @ target / np.sum(weights)
    assert tree_allclose(both(jnp.asarray(x), jnp.array(y)), (slope, mean), rtol=1e-12)


@pytest.mark.parametrize("size", (1, 2, 3, 17, 100, 4_097))
def test_a_shuffle_is_a_permutation(size):
    shuffle = jax.jit(jax.vmap(lambda key: shuffled(key, jnp.arange(size), size)))
    for order in np.asarray(shuffle(jr.split(jr.key(0), 5))):
        assert np.array_equal(np.sort(order), np.arange(size))


def test_all_permutations_are_as_likely():
    keys = jr.split(jr.key(0), 24_000)
    of_keys = jax.vmap(lambda key: shuffled(key, jnp.arange(4), 4))(keys)
    of_counts = jax.vmap(lambda count: shuffled(keys[0], jnp.arange(4), 4, count))(
        jnp.arange(24_000)
    )
    for orders in (of_keys, of_counts):
        counts = collections.Counter(map(tuple, np.asarray(orders).tolist()))
        assert len(counts) == 24
        # 1,000 each, with a standard deviation of 31.
        assert all(abs(count - 1_000) < 140 for count in counts.values())
    # What follows on an order is as likely, too: 42 each, with a deviation of 6.5.
    number = np.asarray(of_counts) @ np.array([64, 16, 4, 1])
    pairs = collections.Counter(zip(number.tolist(), number[1:].tolist()))
    assert len(pairs) == 24**2 and max(pairs.values()) < 42 + 5 * 6.5


@pytest.mark.parametrize(
    "kind", ({}, {"fixed": True}, {"neighbours": True}), ids=lambda kind: str(*kind)
)
@pytest.mark.parametrize("batch_size", (1, 5, 7, 37))
def test_an_epoch_has_each_sample_once(batch_size, kind):
    epochs, fixed = Epochs(NUM_TRAIN, batch_size, **kind), len(kind) > 0
    num = epochs.num_batches
    draw = jax.jit(jax.vmap(lambda count: epochs(jr.key(3), count)))
    indices, weights = map(np.asarray, draw(jnp.arange(3 * num)))
    for epoch in range(3):
        of_epoch = slice(epoch * num, (epoch + 1) * num)
        drawn = indices[of_epoch][weights[of_epoch] > 0]
        assert np.array_equal(np.sort(drawn), np.arange(NUM_TRAIN))
        # The mean over the batches is the mean over the samples.
        assert np.allclose(np.sum(weights[of_epoch]) / num, 1)
    if 1 < batch_size < NUM_TRAIN:
        batches = [frozenset(b[w > 0].tolist()) for b, w in zip(indices, weights)]
        first, second = batches[:num], batches[num : 2 * num]
        assert (set(first) == set(second)) == fixed
        assert first != second
    if kind == {"neighbours": True}:
        assert np.all(np.diff(indices, axis=1) == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fixed, shuffled", ((False, False), (True, False), (False, True))
)
def test_batches_are_unbiased_over_an_epoch(fixed, shuffled):
    def terms(problem):
        def slopes(y):
            return jax.grad(problem.inner, (0, 1))(X, y)

        return *jax.jvp(slopes, (Y,), (Y,)), jax.grad(problem.outer, 1)(X, Y)

    @eqx.filter_jit
    def means(problem):
        batches = Batches(8, 5, fixed)
        on = jax.vmap(lambda count: terms(batches(problem, jr.key(1), count, count)))
        # An epoch has as many batches at both levels.
        of_batches = jtu.tree_map(lambda u: jnp.mean(u, 0), on(jnp.arange(5)))
        return of_batches, terms(problem)

    assert -(-NUM_TRAIN // 8) == -(-NUM_VALIDATION // 5) == 5
    of_batches, of_all = means(make(shuffled=shuffled))
    assert tree_allclose(of_batches, of_all, rtol=1e-12)


@pytest.mark.slow
def test_a_sample_is_the_problem_on_some_of_the_data():
    problem = make()

    @jax.jit
    def samples(key, keys):
        small = problem.sample(key, 7, None)
        full = problem.sample(key, NUM_TRAIN, NUM_VALIDATION)
        many = jax.vmap(lambda key: problem.sample(key, 7, 1).inner(X, Y))(keys)
        return small.outer(X, Y), full.inner(X, Y), many

    inner, outer = values(problem)
    on_all, in_another_order, many = samples(jr.key(0), jr.split(jr.key(1), 4_000))
    assert tree_allclose(on_all, outer, rtol=1e-14)
    assert tree_allclose(in_another_order, inner, rtol=1e-12)
    # Its mean over many keys is the mean over the data.
    error = np.std(many) / np.sqrt(4_000)
    assert abs(np.mean(many) - inner) < 4 * error


def test_dropout_rests_where_all_data_are_used():
    def losses(x, y, batch, key):
        kept = 1.0
        if key is not None:
            kept = jnp.where(jr.bernoulli(key, 0.5, batch.shape), 2.0, 0.0)
        return kept * y * batch

    problem = blx.FiniteSumProblem(losses, losses, jnp.ones(6), jnp.ones(6))
    assert problem.inner(X, jnp.array(1.0)) == 1
    values = [
        float(problem.sample(jr.key(i), 6, 6).inner(X, jnp.array(1.0))) for i in range(5)
    ]
    assert len(set(values)) > 1


@pytest.mark.slow
def test_float32_stays_float32():
    problem = make(10, jnp.float32)
    x, y = X.astype(jnp.float32), Y.astype(jnp.float32)

    def numbers(key):
        for p in (problem, problem.sample(key, 7, 5)):
            yield p.inner(x, y), p.outer(x, y), jax.grad(p.inner, (0, 1))(x, y)

    found = jax.eval_shape(lambda key: tuple(numbers(key)), jr.key(0))
    assert all(u.dtype == jnp.float32 for u in jtu.tree_leaves(found))


@pytest.mark.parametrize("dtype, rtol", (("bfloat16", 1e-2), ("float16", 5e-3)))
def test_losses_in_half_precision_are_summed_in_single(dtype, rtol):
    """In blocks and in batches, as `jnp.mean` does. 100,000 numbers of about one are more
    than half precision can count to."""
    size = 100_000
    data = 0.5 + np.random.default_rng(0).random(size)

    def losses(x, y, batch, key):
        return y * batch.astype(dtype)

    problem = blx.FiniteSumProblem(losses, losses, data, data, block_size=10)

    @jax.jit
    def means(key, y):
        on_all = problem.sample(key, size, size)
        slope = jax.grad(problem.inner, 1)(X, y)
        return problem.inner(X, y), slope, on_all.inner(X, y)

    found = means(jr.key(0), jnp.ones((), dtype))
    assert all(u.dtype == dtype for u in found)
    found = [np.asarray(u, np.float64) for u in found]
    assert np.allclose(found, np.mean(data), rtol=rtol)


def _with(**changes):
    arguments = {
        "outer_losses": logistic,
        "inner_losses": logistic,
        "outer_data": make().outer_data,
        "inner_data": make().inner_data,
        **changes,
    }
    return blx.FiniteSumProblem(**arguments)


@pytest.mark.parametrize(
    "problem, sentence",
    (
        (lambda: _with(inner_losses=lambda *a: jnp.mean(logistic(*a))), "each sample"),
        (lambda: _with(outer_losses=lambda *a: logistic(*a)[:, None]), "each sample"),
        (
            lambda: _with(inner_data=(jnp.ones((5, DIM)), jnp.ones(4))),
            r"inner_data\[0\]` has 5, `problem.inner_data\[1\]` has 4",
        ),
        (lambda: _with(outer_data=()), "contains no arrays"),
        (lambda: _with(inner_data=jnp.array(1.0)), "leading axis"),
        (lambda: _with(block_size=0), "at least one"),
    ),
)
def test_what_cannot_be_right_is_refused(problem, sentence):
    with pytest.raises(ValueError, match=sentence):
        blx.solve(problem(), blx.WarmStart(), X, Y, num_steps=1)


@pytest.mark.parametrize(
    "call, sentence",
    (
        (lambda: _uneven(None).inner(X, Y), r"inner_data\[1\]` has 4"),
        (lambda: _uneven(2).inner(X, Y), r"inner_data\[1\]` has 4"),
        (lambda: _uneven(None).sample(jr.key(0), 3, 3), r"inner_data\[1\]` has 4"),
        (lambda: _with(block_size=0).outer(X, Y), "at least one"),
        (lambda: _with(outer_data=()).sample(jr.key(0), 3, 3), "contains no arrays"),
        (lambda: _means(None).inner(X, Y), r"shape \(37,\) for all data"),
        (lambda: _means(7).inner(X, Y), r"shape \(7,\) for a block of the data"),
        (lambda: _means(7, True).inner(X, Y), "each sample"),
        (lambda: _means(None, True).inner(X, Y), "each sample"),
    ),
)
def test_the_same_is_refused_where_an_objective_is_called(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def _uneven(block_size):
    data = np.ones((5, DIM)), np.ones(4)
    return _with(inner_data=data, block_size=block_size)


def _means(block_size, as_columns=False):
    def losses(*arguments):
        losses = logistic(*arguments)
        return losses[:, None] if as_columns else jnp.mean(losses)

    return _with(inner_losses=losses, block_size=block_size)


@pytest.mark.parametrize("level", ("inner", "outer"))
@pytest.mark.parametrize("of", (jnp.mean, lambda u: u[:, None], lambda u: u.astype(int)))
def test_losses_that_differ_on_batches_are_refused(level, of):
    # Right where all data are used.
    def differing(x, y, batch, key):
        losses = (batch - jnp.sum(y)) ** 2
        return losses if key is None else of(losses)

    def right(x, y, batch, key):
        return differing(x, y, batch, None)

    outer, inner = (right, differing) if level == "inner" else (differing, right)
    data = jnp.arange(6.0)
    problem = blx.FiniteSumProblem(outer, inner, data, data)
    x = y = jnp.ones(2)
    drawn = problem.sample(jr.key(0), 4, 4)
    sentence = rf"`problem.{level}_losses.* of shape \(4,\) for a batch of 4 with a key"
    with pytest.raises(ValueError, match=sentence):
        getattr(drawn, level)(x, y)
    # And where a run begins.
    sgd = optax.sgd(0.1)
    response = blx.Unrolled(sgd, 1)
    pipeline = blx.GradientPipeline(response, sgd, inner_batch=4, outer_batch=4)
    with pytest.raises(ValueError, match=sentence):
        blx.solve(
            problem,
            blx.WarmStart(),
            x,
            y,
            pipeline=pipeline,
            num_steps=1,
            certify=False,
        )


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="38 samples.*`inner_data` has 37"):
        make().sample(jr.key(0), 38, 1)
    with pytest.raises(ValueError, match="`problem.outer_data` has 23"):
        Batches(1, 24).check(make(), "Pipeline")
    plain = blx.BilevelProblem(lambda x, y: y, lambda x, y: y**2)
    with pytest.raises(ValueError, match="FiniteSumProblem"):
        Batches(1, None).check(plain, "Pipeline")


class Columns(blx.AbstractFiniteSumProblem):
    """Least squares, in which each sample has only some of the columns."""

    inner_data: jax.Array
    outer_data: jax.Array

    def inner_losses(self, x, y, batch, key):
        return 0.5 * (batch @ y - jnp.sum(x)) ** 2

    def outer_losses(self, x, y, batch, key):
        return 0.5 * (batch @ y) ** 2


def test_a_unique_minimum_is_seen_on_some_of_the_data(monkeypatch):
    seen = []
    extremes = stackelberg._extremes

    def spied(problem, x, y):
        seen.append(type(problem))
        return extremes(problem, x, y)

    monkeypatch.setattr(stackelberg, "_extremes", spied)
    size, dim = 768, 3

    def check(data):
        seen.clear()
        problem = Columns(data, data)
        blx.Stackelberg().check(problem, jnp.zeros(1), jnp.zeros(dim))

    mixed = jr.normal(jr.key(0), (size, dim))
    check(mixed)
    assert seen == [OnBatches]
    # Every third sample is of the first column: all columns are seen on all data only.
    alternating = jnp.tile(jnp.eye(dim), (size // dim, 1))
    check(alternating)
    assert seen == [OnBatches, Columns]
    with pytest.raises(ValueError, match="needs a unique inner minimum"):
        check(mixed.at[:, 0].set(0.0))
    assert seen == [OnBatches, Columns]


#
# Memory
#


@pytest.mark.slow
def test_blocks_need_little_more_memory_than_the_data():
    """A hypergradient and a certificate on 200,000 samples of 500 numbers: what their
    program has room for, with the data. Nothing else of either touches the data."""

    def losses(x, y, batch, key):
        features, targets = batch
        return 0.5 * (features @ y - targets) ** 2

    def work(data, x, y):
        problem = blx.FiniteSumProblem(
            losses, losses, *data, inner_penalty=penalty, block_size="auto"
        )
        response = blx.Implicit(blx.Projection(), blx.TruncatedCG(20))
        found = blx.hypergradient(problem, x, y, response)
        certificate = blx.certify(problem, blx.WarmStart(), x, found.y)
        return found.gradient, certificate.largest

    def single(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    data = [(single(size, 500), single(size)) for size in (50_000, 150_000)]
    program = jax.jit(work).lower(data, single(500), single(500)).compile()
    memory = program.memory_analysis()
    assert memory is not None
    size = 4 * 200_000 * 501
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert needed >= size
    assert needed + memory.temp_size_in_bytes < 1.3 * size
