"""Pipelines on mini-batches, against loops in NumPy, written from the formulas."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import toy_a, tree_allclose, tree_identical

import bilevel_eqx as blx
from bilevel_eqx._optimiser.lbfgs import LBFGS
from bilevel_eqx._problem.sampling import Epochs


NUM_TRAIN, NUM_VALIDATION, DIM = 37, 23, 4
X0 = np.array([-1.0, -2.0, -1.5, -0.5])
Y0 = np.array([0.5, -1.0, 0.3, 0.2])
KEY = jr.key(7)


def _data(seed, size):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(size, DIM))
    return features, np.sign(features[:, 0] + rng.normal(size=size))


TRAIN, VALIDATION = _data(0, NUM_TRAIN), _data(1, NUM_VALIDATION)


def logistic(x, y, batch, key):
    features, signs = batch
    return jax.nn.softplus(-signs * (features @ y))


def weighted(x, y, batch, key):
    return jnp.exp(x[0]) * logistic(x, y, batch, key)


problem = blx.FiniteSumProblem(
    logistic,
    weighted,
    VALIDATION,
    TRAIN,
    inner_penalty=lambda x, y: 0.5 * jnp.sum(jnp.exp(x) * y**2),
    outer_penalty=lambda x, y: 0.05 * jnp.sum(x**2),
)


def _batches(size, batch_size, key):
    """From the number of a batch to its indices and weights."""
    if batch_size is None:
        return lambda count: (np.arange(size), np.full(size, 1 / size))
    samples_key, _ = jr.split(key)
    epochs = Epochs(size, batch_size)
    # All at once: to draw one is a program, and to call it takes longer than to run it.
    drawn = jax.jit(jax.vmap(lambda count: epochs(samples_key, count)))(jnp.arange(600))
    indices, weights = map(np.asarray, drawn)
    return lambda count: (indices[count], weights[count])


exact_response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())


class Loop:
    """The gradients of that problem in NumPy, on the batches that a run draws.

    `inner` and `outer` are the sizes of batches; `None` is all data.
    """

    def __init__(self, inner, outer, key=KEY):
        inner_key, outer_key = jr.split(key)
        self.inner = _batches(NUM_TRAIN, inner, inner_key)
        self.outer = _batches(NUM_VALIDATION, outer, outer_key)

    def draw(self, count):
        """The indices and the weights of an inner and of an outer batch."""
        return self.inner(count), self.outer(count)

    def _mean(self, data, batch, y):
        """The mean of the logistic losses, its gradient and its Hessian in y."""
        indices, weights = batch
        features, signs = data[0][indices], data[1][indices]
        share = 1 / (1 + np.exp(signs * (features @ y)))
        slope = -features.T @ (weights * signs * share)
        hessian = features.T @ np.diag(weights * share * (1 - share)) @ features
        return -weights @ np.log(1 - share), slope, hessian

    def f_y(self, x, y, batch):
        return np.exp(x[0]) * self._mean(TRAIN, batch, y)[1] + np.exp(x) * y

    def f_yy(self, x, y, batch):
        return np.exp(x[0]) * self._mean(TRAIN, batch, y)[2] + np.diag(np.exp(x))

    def f_yx(self, x, y, batch):
        through_losses = np.exp(x[0]) * self._mean(TRAIN, batch, y)[1]
        return np.outer(through_losses, np.eye(DIM)[0]) + np.diag(np.exp(x) * y)

    def f_x(self, x, y, batch):
        through_losses = np.exp(x[0]) * self._mean(TRAIN, batch, y)[0]
        return through_losses * np.eye(DIM)[0] + 0.5 * np.exp(x) * y**2

    def F_y(self, x, y, batch):
        return self._mean(VALIDATION, batch, y)[1]

    def F_x(self, x, y, batch):
        return 0.1 * x


def _run(pipeline, num_steps=50, equilibrium=None, problem=problem, start=(X0, Y0)):
    """A run whose history has x and y after each step."""
    return blx.solve(
        problem,
        blx.Optimistic() if equilibrium is None else equilibrium,
        *map(jnp.asarray, start),
        pipeline=pipeline,
        num_steps=num_steps,
        key=KEY,
        record=_variables,
        certify=False,
    )


def _variables(x, y, metrics):
    return x, y


SIZES = pytest.mark.parametrize(
    "sizes",
    (
        (8, 5),
        pytest.param((None, 5), marks=pytest.mark.slow),
        pytest.param((None, None), marks=pytest.mark.slow),
    ),
)


#
# F2SA and PBGD
#


def falling(rate, power):
    return optax.sgd(lambda count: rate * (1 + count) ** power)


@pytest.mark.slow
@SIZES
def test_f2sa_is_its_formula(sizes):
    T, a1, a2, b, delta = 3, 0.05, 0.2, 0.3, 0.1
    # The first two count the steps of z and y, of which there are T for one of x.
    pipeline = blx.PenaltyDescent(
        falling(a2, -4 / 7),
        falling(a1, -5 / 7),
        falling(b, -4 / 7),
        num_inner_steps=T,
        inner_batch=sizes[0],
        outer_batch=sizes[1],
    )
    loop, (x, y, z), penalty = Loop(*sizes), (X0, Y0, Y0), 1.0
    path = []
    for k in range(50):
        for t in range(T):
            inner, outer = loop.draw(k * (T + 1) + t)
            step_y = loop.F_y(x, y, outer) + penalty * loop.f_y(x, y, inner)
            step_z = loop.f_y(x, z, inner)
            y = y - a1 * (1 + k * T + t) ** (-5 / 7) * step_y
            z = z - a2 * (1 + k * T + t) ** (-4 / 7) * step_z
        inner, outer = loop.draw(k * (T + 1) + T)
        gap = loop.f_x(x, y, inner) - loop.f_x(x, z, inner)
        x = x - b * (1 + k) ** (-4 / 7) * (loop.F_x(x, y, outer) + penalty * gap)
        penalty += delta
        path.append((x, y, z))
    xs, ys, _ = map(np.stack, zip(*path))
    solution = _run(pipeline)
    assert tree_allclose(solution.history, (xs, ys), rtol=1e-12)
    assert tree_allclose(solution.state.minimum, z, rtol=1e-12)


@pytest.mark.slow
@SIZES
def test_pbgd_is_its_formula(sizes):
    T, a1, a2, b, penalty = 3, 0.05, 0.2, 0.3, 4.0
    pipeline = blx.PenaltyDescent(
        optax.sgd(a2),
        optax.sgd(a1),
        optax.sgd(b),
        num_inner_steps=T,
        penalty=penalty,
        growth=0.0,
        joint=True,
        inner_batch=sizes[0],
        outer_batch=sizes[1],
    )
    loop, (x, y, z) = Loop(*sizes), (X0, Y0, Y0)
    path = []
    for k in range(50):
        for t in range(T):
            z = z - a2 * loop.f_y(x, z, loop.draw(k * (T + 1) + t)[0])
        inner, outer = loop.draw(k * (T + 1) + T)
        step_y = loop.F_y(x, y, outer) + penalty * loop.f_y(x, y, inner)
        gap = loop.f_x(x, y, inner) - loop.f_x(x, z, inner)
        step_x = loop.F_x(x, y, outer) + penalty * gap
        x, y = x - b * step_x, y - a1 * step_y
        path.append((x, y))
    expected = tuple(map(np.stack, zip(*path)))
    assert tree_allclose(_run(pipeline).history, expected, rtol=1e-12)


@pytest.mark.slow
@SIZES
def test_bome_is_its_formula(sizes):
    T, eta, rate = 3, 0.5, 0.3
    pipeline = blx.ValueFunctionDescent(
        falling(rate, -0.5), T, eta, inner_batch=sizes[0], outer_batch=sizes[1]
    )
    loop, (x, y) = Loop(*sizes), (X0, Y0)
    path = []
    for k in range(50):
        inner, outer = loop.draw(k)
        best = y
        for _ in range(T):
            slope = loop.f_y(x, best, inner)
            curvature = slope @ loop.f_yy(x, best, inner) @ slope
            best = best - slope @ slope / curvature * slope
        of_q = loop.f_x(x, y, inner) - loop.f_x(x, best, inner), loop.f_y(x, y, inner)
        of_q, of_f = (
            np.concatenate(of_q),
            np.concatenate([loop.F_x(x, y, outer), loop.F_y(x, y, outer)]),
        )
        square = of_q @ of_q
        if sizes != (None, None):
            square = max(square, 1e-8 * of_f @ of_f)
        direction = of_f + max(eta - of_f @ of_q / square, 0) * of_q
        step = rate * (1 + k) ** -0.5 * direction
        x, y = x - step[:DIM], y - step[DIM:]
        path.append((x, y))
    expected = tuple(map(np.stack, zip(*path)))
    assert tree_allclose(_run(pipeline).history, expected, rtol=1e-12)


@pytest.mark.slow
@SIZES
def test_pzobo_is_its_formula(sizes):
    T, m, mu, a, b = 3, 4, 0.1, 0.2, 0.3
    pipeline = blx.ZerothOrder(
        optax.sgd(a),
        falling(b, -0.5),
        num_inner_steps=T,
        num_directions=m,
        smoothing=mu,
        inner_batch=sizes[0],
        outer_batch=sizes[1],
    )
    samples_key, directions_key = jr.split(KEY)
    loop, (x, y) = Loop(*sizes, samples_key), (X0, Y0)
    path = []
    for k in range(50):

        def end(x):
            moved = y
            for t in range(T):
                moved = moved - a * loop.f_y(x, moved, loop.inner(k * T + t))
            return moved

        key = jr.split(jr.fold_in(directions_key, k), 1)[0]
        directions = np.asarray(jr.normal(key, (m, DIM)))
        deltas = [(end(x + mu * u) - end(x)) / mu for u in directions]
        y = end(x)
        outer = loop.outer(k)
        slope = loop.F_y(x, y, outer)
        through_y = np.mean(
            [delta @ slope * u for delta, u in zip(deltas, directions)], 0
        )
        x = x - b * (1 + k) ** -0.5 * (loop.F_x(x, y, outer) + through_y)
        path.append((x, y))
    expected = tuple(map(np.stack, zip(*path)))
    history = _run(pipeline, equilibrium=blx.WarmStart()).history
    assert tree_allclose(history, expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", ((8, 5), pytest.param((8, None), marks=pytest.mark.slow))
)
def test_a_hypergradient_is_on_one_batch(sizes):
    # One unrolled step: y + J dx with J = -a f_yx.
    a, b = 0.2, 0.3
    pipeline = blx.GradientPipeline(
        blx.Unrolled(optax.sgd(a), 1),
        falling(b, -0.5),
        inner_batch=sizes[0],
        outer_batch=sizes[1],
    )
    loop, (x, y) = Loop(*sizes), (X0, Y0)
    path = []
    # The first batch is for the answer to x0, which does not count as a step.
    for k in range(51):
        inner, outer = loop.draw(k)
        jacobian = -a * loop.f_yx(x, y, inner)
        y = y - a * loop.f_y(x, y, inner)
        path.append((x, y))
        gradient = loop.F_x(x, y, outer) + jacobian.T @ loop.F_y(x, y, outer)
        x = x - b * (1 + k) ** -0.5 * gradient
    expected = tuple(map(np.stack, zip(*path[1:])))
    history = _run(pipeline, equilibrium=blx.WarmStart()).history
    assert tree_allclose(history, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "optimiser",
    (
        LBFGS(),
        optax.lbfgs(),
        optax.lbfgs(linesearch=None),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        blx.pipelines.SpectralProjectedGradient(),
    ),
    ids=("ours", "optax", "no search", "backtracking", "spectral"),
)
def test_what_compares_points_is_refused_with_batches(optimiser):
    pipeline = blx.GradientPipeline(
        blx.Unrolled(optax.sgd(0.1), 1), optimiser, outer_batch=5
    )
    with pytest.raises(ValueError, match="compare the batches"):
        _run(pipeline, 1, blx.WarmStart())


@pytest.mark.slow
def test_what_a_run_draws_does_not_depend_on_how_it_is_cut():
    pipeline = blx.GradientPipeline(
        blx.Unrolled(optax.sgd(0.2), 2, batch_size=8, key=KEY),
        optax.adam(0.1),
        outer_batch=5,
    )
    whole = _run(pipeline, 6, blx.WarmStart())
    half = _run(pipeline, 3, blx.WarmStart())
    again = blx.solve(
        problem,
        blx.WarmStart(),
        jnp.asarray(X0),
        jnp.asarray(Y0),
        pipeline=pipeline,
        num_steps=3,
        state=half.state,
        certify=False,
    )
    assert tree_identical((whole.x, whole.y), (again.x, again.y))


@pytest.mark.parametrize("size", (2, None))
def test_bome_on_batches_has_a_floor(size):
    # Where q is as good as zero, on all data, it takes half of the gradient of F away.
    linear = blx.FiniteSumProblem(
        lambda x, y, batch, key: -y * jnp.ones_like(batch),
        lambda x, y, batch, key: 0.5 * (y - x) ** 2 * jnp.ones_like(batch),
        jnp.ones(4),
        jnp.ones(4),
    )
    pipeline = blx.ValueFunctionDescent(optax.sgd(1.0), 1, inner_batch=size)
    gap = 1e-6
    x, y = _run(pipeline, 1, problem=linear, start=(np.zeros(()), np.array(gap))).history
    pressure = 0.5 + gap / max(2 * gap**2, 0 if size is None else 1e-8)
    assert tree_allclose(x, np.array([pressure * gap]), rtol=1e-9)
    assert tree_allclose(y, np.array([gap + 1 - pressure * gap]), rtol=1e-9)


@pytest.mark.parametrize("joint", (False, True))
def test_penalties_of_a_fixed_size_come_to_rest_at_their_own_minimum(joint):
    # min_y F + c f is c / (1 + c) (x - 1)^2 / 2 + x^2 / 2, so that x = c / (1 + 2 c).
    toy = blx.BilevelProblem(
        lambda x, y: 0.5 * jnp.sum((y - 1) ** 2) + 0.5 * jnp.sum(x**2),
        lambda x, y: 0.5 * jnp.sum((y - x) ** 2),
    )
    penalty = jnp.array([1.0, 2.0, 4.0])

    def run(penalty):
        rate = optax.sgd(0.3 / penalty)
        pipeline = blx.PenaltyDescent(
            outer_optimiser=rate, penalty=penalty, growth=0.0, joint=joint
        )
        start = np.zeros(2), np.zeros(2)
        return _run(pipeline, 1000, blx.Stackelberg(), toy, start)

    solution = jax.vmap(run)(penalty)
    at_rest = jnp.outer(penalty / (1 + 2 * penalty), jnp.ones(2))
    assert tree_allclose(solution.x, at_rest, rtol=1e-10)
    # That y is the inner minimum, and not what the penalty makes of it.
    assert tree_allclose(solution.y, at_rest, rtol=1e-10)


@pytest.mark.parametrize("name", ("F2SA", "PBGD"))
def test_penalties_select_the_best_inner_minimum(name):
    # Each penalty function has its minimum there: w = x1 = x0 = 1, and F = 0.
    solution = blx.solve(
        toy_a(),
        blx.Optimistic(),
        jnp.array(0.5),
        jnp.array([0.0, 0.3]),
        pipeline=name,
        num_steps=2000,
    )
    assert tree_allclose(solution.x, 1.0, rtol=1e-4)
    assert tree_allclose(solution.y, jnp.ones(2), rtol=1e-4)
    assert solution.certificate.largest < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ("F2SA", "PBGD"))
def test_defaults_find_the_unique_minimum(name):
    solution = _run(name, 1000, blx.Stackelberg())
    exact = _run(blx.GradientPipeline(exact_response, LBFGS()), 100, blx.Stackelberg())
    assert tree_allclose(solution.value, exact.value, rtol=1e-3)


#
# Objectives with a rule for their first derivative, and no other
#


def _on_the_host(fn, u):
    shape = jax.ShapeDtypeStruct(u.shape, u.dtype)
    return jax.pure_callback(fn, shape, u, vmap_method="expand_dims")


@jax.custom_vjp
def length(u):
    """sqrt(1 + u^2), by a loop of unknown length: Newton's method."""
    square = 1 + u**2

    def step(carry):
        root, _ = carry
        return 0.5 * (root + square / root), root

    start = square, jnp.zeros_like(square)
    far = lambda carry: jnp.any(jnp.abs(carry[0] - carry[1]) > 1e-14)  # noqa: E731
    return jax.lax.while_loop(far, step, start)[0]


def _slope(u, cotangent):
    return (cotangent * _on_the_host(lambda u: u / np.sqrt(1 + u**2), u),)


length.defvjp(lambda u: (length(u), u), _slope)


differentiable_once = blx.BilevelProblem(
    lambda x, y: 0.5 * jnp.sum((y - 1) ** 2) + 0.5 * jnp.sum(x**2),
    lambda x, y: jnp.sum(length(y - x)),
)


def test_there_is_no_second_derivative_of_that():
    def slope(y):
        return jax.grad(differentiable_once.inner, argnums=1)(jnp.zeros(2), y)

    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(slope, (jnp.ones(2),), (jnp.ones(2),))


@pytest.mark.slow
@pytest.mark.parametrize(
    "pipeline, equilibrium",
    (
        (blx.PenaltyDescent(outer_optimiser=optax.sgd(0.3)), blx.Optimistic()),
        (
            blx.ZerothOrder(outer_optimiser=falling(0.2, -0.5), smoothing=0.01),
            blx.WarmStart(),
        ),
    ),
    ids=("penalty", "differences"),
)
def test_one_derivative_is_enough(pipeline, equilibrium):
    start = np.zeros(2), np.zeros(2)
    x = _run(pipeline, 300, equilibrium, differentiable_once, start).x
    # The inner minimum is y = x, and half of (x - 1)^2 + x^2 is least at 1 / 2.
    assert tree_allclose(x, np.full(2, 0.5), rtol=0.02)


@pytest.mark.slow
def test_x_stays_in_its_set():
    confined = eqx.tree_at(
        lambda p: p.project_x,
        problem,
        lambda x: jnp.maximum(x, -0.5),
        is_leaf=lambda u: u is None,
    )
    start = np.maximum(X0, -0.5), Y0
    pipeline = blx.PenaltyDescent(
        outer_optimiser=optax.sgd(0.3), inner_batch=8, outer_batch=5
    )
    xs, _ = _run(pipeline, 20, problem=confined, start=start).history
    assert np.min(xs) == -0.5


@pytest.mark.parametrize(
    "pipeline",
    (blx.PenaltyDescent, blx.ValueFunctionDescent, blx.ZerothOrder),
    ids=lambda p: p.__name__,
)
def test_float32_stays_float32(pipeline):
    arrays, rest = eqx.partition((problem, X0, Y0), eqx.is_array)
    arrays = jax.tree.map(lambda u: jnp.asarray(u, jnp.float32), arrays)

    pipeline, concept = pipeline(inner_batch=8, outer_batch=5), pipeline.aims_at[0]()

    def run(arrays):
        problem, x, y = eqx.combine(arrays, rest)
        solution = blx.solve(
            problem, concept, x, y, pipeline=pipeline, num_steps=2, certify=False
        )
        return solution.x, solution.y, solution.history

    kinds = {u.dtype for u in jax.tree.leaves(jax.eval_shape(run, arrays))}
    assert jnp.dtype(jnp.float32) in kinds and jnp.dtype(jnp.float64) not in kinds


@pytest.mark.parametrize(
    "arguments, sentence",
    (
        ({"penalty": 0.0}, "greater than zero"),
        ({"growth": -1.0}, "at least zero"),
        ({"inner_batch": 38}, "38 samples"),
        ({"outer_batch": 2.5}, "positive integer"),
        ({"num_inner_steps": 0}, "at least one"),
    ),
)
def test_what_a_penalty_cannot_do_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        _run(blx.PenaltyDescent(**arguments), 1)


def _shaken(x, y, batch, key):
    """Squares, with noise of size exp(x) on the features if there is a key."""
    features, targets = batch
    if key is not None:
        features = features + jnp.exp(x) * jr.normal(key, features.shape)
    return (features @ y - targets) ** 2


shaken = blx.FiniteSumProblem(
    lambda x, y, batch, key: _shaken(jnp.zeros(()), y, batch, None),
    _shaken,
    VALIDATION,
    TRAIN,
)
rate = optax.sgd(0.1)
three_steps = blx.Unrolled(rate, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pipeline",
    (
        blx.GradientPipeline(blx.Unrolled(rate, 3, batch_size=5), rate),
        pytest.param(
            blx.GradientPipeline(three_steps, rate, inner_batch=5), marks=pytest.mark.slow
        ),
        pytest.param(
            blx.SingleLoop(rate, rate, rate, inner_batch=5), marks=pytest.mark.slow
        ),
    ),
    ids=("steps on batches", "batches", "single loop"),
)
def test_x_may_be_in_what_is_random_alone(pipeline):
    """As the strength of augmentation is, and the rate of dropout: on all data, where
    nothing is random, x is in no objective."""
    x0, y0 = jnp.array(-1.0), jnp.array(Y0)

    def run(pipeline):
        return blx.solve(
            shaken, blx.WarmStart(), x0, y0, pipeline=pipeline, num_steps=4, certify=False
        )

    assert jnp.abs(run(pipeline).x - x0) > 1e-4


def test_what_rests_is_in_no_objective():
    with pytest.raises(ValueError, match="exactly zero for all x and y"):
        blx.hypergradient(shaken, jnp.array(-1.0), jnp.array(Y0), three_steps)
