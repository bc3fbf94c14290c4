"""Single loops against their formulas in NumPy, and where they come to rest."""

import functools
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import tree_allclose, tree_identical

import bilevel_eqx as blx
from bilevel_eqx._pipeline import estimators
from bilevel_eqx._pipeline.oracles import LoopPoint, OuterTerms, terms_of
from bilevel_eqx._problem.sampling import Epochs
from bilevel_eqx.pipelines import LBFGS, MiniBatch, Momentum, SAGA, SARAH, SingleLoop


#
# Logistic regression with a log-penalty a feature, in both languages. The derivatives in
# NumPy are from the formulas.
#

NUM_INNER, NUM_OUTER, DIM = 37, 23, 4
PENALTY, DECAY = 0.2, 0.1


def losses(x, y, batch, key):
    features, signs = batch
    return jax.nn.softplus(-signs * (features @ y))


def inner_penalty(x, y):
    return PENALTY / 2 * jnp.sum(jnp.exp(x) * y**2)


def outer_penalty(x, y):
    return DECAY / 2 * jnp.sum(x**2)


def make(dtype=jnp.float64, **kwargs):
    rng = np.random.default_rng(0)

    def data(size):
        features = rng.normal(size=(size, DIM))
        signs = np.sign(features[:, 0] + rng.normal(size=size))
        return jnp.asarray(features, dtype), jnp.asarray(signs, dtype)

    return blx.FiniteSumProblem(
        losses,
        losses,
        data(NUM_OUTER),
        data(NUM_INNER),
        inner_penalty=inner_penalty,
        outer_penalty=outer_penalty,
        **kwargs,
    )


X = jnp.array([0.1, 0.2, -0.3, 0.4])
Y = jnp.array([0.5, -1.0, 0.3, 0.2])


def _sigmoid(u):
    return 1 / (1 + np.exp(-u))


class ByHand:
    """f_y, f_yy v, f_xy v, F_y, F_x on given samples with given weights."""

    def __init__(self, problem):
        self.inner = tuple(map(np.asarray, problem.inner_data))
        self.outer = tuple(map(np.asarray, problem.outer_data))

    def slope(self, x, y, samples):
        return self._loss_slope(self.inner, y, samples) + PENALTY * np.exp(x) * y

    def product(self, x, y, v, samples):
        index, weights = samples
        A = self.inner[0][index]
        p = _sigmoid(A @ y)
        return A.T @ (weights * p * (1 - p) * (A @ v)) + PENALTY * np.exp(x) * v

    def cross(self, x, y, v, samples):
        return PENALTY * np.exp(x) * y * v

    def outer_y(self, x, y, samples):
        return self._loss_slope(self.outer, y, samples)

    def outer_x(self, x, y, samples):
        return DECAY * x

    def inner_terms(self, x, y, v, samples):
        return np.stack(
            [
                self.slope(x, y, samples),
                self.product(x, y, v, samples),
                self.cross(x, y, v, samples),
            ]
        )

    def outer_terms(self, x, y, samples):
        return np.stack([self.outer_y(x, y, samples), self.outer_x(x, y, samples)])

    def _loss_slope(self, data, y, samples):
        index, weights = samples
        A, s = data[0][index], data[1][index]
        return A.T @ (weights * -s * _sigmoid(-s * (A @ y)))


INNER_BATCH, OUTER_BATCH = 8, 5
KEY = jr.key(7)
RATE, OUTER_RATE, DAMPING, THETA, PERIOD = 0.3, 0.2, 0.05, 0.3, 7


class Samples:
    """The samples of each batch, and its place in an epoch."""

    def __init__(self, fixed=False):
        # As many as any of the tests asks for.
        num = 9 * 50
        keys = [jr.split(key)[0] for key in jr.split(KEY)]
        sizes = (NUM_INNER, INNER_BATCH), (NUM_OUTER, OUTER_BATCH)
        self.batches, self.places = [], []
        for key, (size, batch_size) in zip(keys, sizes):
            epochs = Epochs(size, batch_size, fixed)
            counts = jnp.arange(num, dtype=jnp.int32)
            draw = jax.jit(jax.vmap(lambda t: epochs(key, t)))  # noqa: B023
            place = jax.jit(jax.vmap(lambda t: epochs.place(key, t)))  # noqa: B023
            indices, weights = map(np.asarray, draw(counts))
            self.batches.append(list(zip(indices, weights)))
            self.places.append(np.asarray(place(counts)))

    def inner(self, t):
        return self.batches[0][t]

    def outer(self, t):
        return self.batches[1][t]


samples_of = functools.cache(Samples)


EVERYTHING = (
    (np.arange(NUM_INNER), np.full(NUM_INNER, 1 / NUM_INNER)),
    (np.arange(NUM_OUTER), np.full(NUM_OUTER, 1 / NUM_OUTER)),
)


def _directions(inner, outer, v):
    return inner[0], inner[1] + DAMPING * v + outer[0], inner[2] + outer[1]


def _on(problem, x, y, v, inner, outer):
    return _directions(
        problem.inner_terms(x, y, v, inner), problem.outer_terms(x, y, outer), v
    )


def _soba(problem, x, y, v, t, samples, state):
    return _on(problem, x, y, v, samples.inner(t), samples.outer(t)), None


def _ma_soba(problem, x, y, v, t, samples, h):
    D_y, D_v, D_x = _on(problem, x, y, v, samples.inner(t), samples.outer(t))
    h = (1 - THETA) * (0 if h is None else h) + THETA * D_x
    return (D_y, D_v, h), h


def _saba(problem, x, y, v, t, samples, tables):
    if tables is None:
        tables = np.zeros((5, 3, DIM)), np.zeros((5, 2, DIM))
    new = (
        problem.inner_terms(x, y, v, samples.inner(t)),
        problem.outer_terms(x, y, samples.outer(t)),
    )
    estimates = []
    for table, place, terms in zip(tables, samples.places, new):
        estimates.append(terms - table[place[t]] + table.mean(0))
        table[place[t]] = terms
    return _directions(*estimates, v), tables


def _srba(problem, x, y, v, t, samples, state):
    if t % PERIOD == 0:
        D = _on(problem, x, y, v, *EVERYTHING)
    else:
        before, last = state
        batches = samples.inner(t), samples.outer(t)
        new, old = _on(problem, x, y, v, *batches), _on(problem, *last, *batches)
        D = tuple(d + n - o for d, n, o in zip(before, new, old))
    return D, (D, (x, y, v))


def _at_once(directions, fixed=False):
    def run(problem, x, y, num_steps):
        samples, state, v = samples_of(fixed), None, np.zeros(DIM)
        path = []
        for t in range(num_steps):
            (D_y, D_v, D_x), state = directions(problem, x, y, v, t, samples, state)
            x, y, v = x - OUTER_RATE * D_x, y - RATE * D_y, v - RATE * D_v
            path.append((x, y, v))
        return path

    return run


def _amigo(problem, x, y, num_steps, cold=False):
    samples, v, path = samples_of(fixed=False), np.zeros(DIM), []
    for k in range(num_steps):
        outer, t = samples.outer(k), 9 * k
        for _ in range(5):
            y = y - RATE * problem.slope(x, y, samples.inner(t))
            t += 1
        F_y = problem.outer_y(x, y, outer)
        if cold:
            # stocBiO: the truncated Neumann series, with a fresh batch in each factor.
            # The first factor is applied to all terms but the last.
            series, term = np.zeros(DIM), F_y
            batches = [samples.inner(t + j) for j in range(3)]
            for j in range(3):
                term = F_y
                for batch in batches[3 - j :]:
                    pushed = problem.product(x, y, term, batch) + DAMPING * term
                    term = term - RATE * pushed
                series = series + term
            v = -RATE * series
        else:
            for j in range(3):
                product = problem.product(x, y, v, samples.inner(t + j))
                v = v - RATE * (product + DAMPING * v + F_y)
        t += 3
        D_x = problem.cross(x, y, v, samples.inner(t)) + problem.outer_x(x, y, outer)
        x = x - OUTER_RATE * D_x
        path.append((x, y, v))
    return path


def _stocbio(problem, x, y, num_steps):
    return _amigo(problem, x, y, num_steps, cold=True)


def _sgd(rate):
    # An array, so that it is data.
    return optax.sgd(jnp.asarray(rate))


def loop(estimator=None, rate=RATE, outer_rate=OUTER_RATE, **kwargs):
    settings = {
        "inner_batch": INNER_BATCH,
        "outer_batch": OUTER_BATCH,
        "damping": DAMPING,
        **kwargs,
    }
    estimator = MiniBatch() if estimator is None else estimator
    return SingleLoop(
        _sgd(rate), _sgd(rate), _sgd(outer_rate), estimator=estimator, **settings
    )


several = {"inner_steps": 5, "adjoint_steps": 3}
METHODS = {
    "SOBA": (loop(), _at_once(_soba)),
    "SABA": (loop(SAGA()), _at_once(_saba, fixed=True)),
    "SRBA": (loop(SARAH(PERIOD)), _at_once(_srba)),
    "MA-SOBA": (loop(Momentum(THETA)), _at_once(_ma_soba)),
    "AmIGO": (loop(**several), _amigo),
    "stocBiO": (loop(**several, warm_adjoint=False), _stocbio),
}
# One of each kind; CI tries the others too.
_quick = ("SOBA", "SABA")
each_method = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in _quick else pytest.mark.slow)
        for name in METHODS
    ],
)


def everything(x, y, metrics):
    return {"x": x, "y": y, **metrics}


def run(pipeline, num_steps, problem=None, x=X, y=Y, **kwargs):
    """With few programs: the record and the room for it are always the same."""
    settings = {
        "key": KEY,
        "certify": False,
        "record": everything,
        "save_every": max(1, num_steps // 40),
        **kwargs,
    }
    problem = make() if problem is None else problem
    equilibrium = blx.WarmStart(DAMPING)
    return blx.solve(
        problem, equilibrium, x, y, pipeline=pipeline, num_steps=num_steps, **settings
    )


@pytest.mark.slow
@each_method
def test_each_method_is_its_formula(name):
    pipeline, by_hand = METHODS[name]
    path = by_hand(ByHand(make()), np.asarray(X), np.asarray(Y), 50)
    solution = run(pipeline, 50)
    found = solution.history
    expected = [np.stack(u) for u in zip(*path)]
    assert tree_allclose([found["x"], found["y"]], expected[:2], rtol=1e-12)
    norms = np.linalg.norm(expected[2], axis=1)
    assert tree_allclose(found["adjoint_norm"], norms, rtol=1e-12)
    assert tree_allclose(solution.state.v, expected[2][-1], rtol=1e-12)


#
# T13: where a single loop ends on a linear inner problem
#


class Linear(blx.AbstractBilevelProblem):
    """Anti-distillation: more weights than targets, which are more than one."""

    features: jax.Array
    validation: jax.Array

    def inner(self, x, y):
        return 0.5 * jnp.sum((self.features @ y - x) ** 2)

    def outer(self, x, y):
        return 0.5 * (self.validation @ y - 2) ** 2


def _linear():
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    right, _ = np.linalg.qr(rng.normal(size=(5, 3)))
    features = left @ np.diag([1.0, 0.8, 0.6]) @ right.T
    # Not in the row space of the features: v drifts.
    return Linear(jnp.asarray(features), jnp.asarray(rng.normal(size=5)))


def _closed_form(problem, damping):
    """T8; and T10 if there is no damping."""
    features, validation = map(np.asarray, (problem.features, problem.validation))
    pinv = np.linalg.pinv(features)
    if damping == 0:
        x = np.linalg.pinv((validation @ pinv)[None, :])[:, 0] * 2
    else:
        H = features.T @ features
        G = features @ np.linalg.solve(H + damping * np.eye(5), validation)
        x = G / (validation @ pinv @ G) * 2
    return x, pinv @ x


DAMPINGS = (0.0, 0.05, 0.5, 5.0)
# Of y, of v and of x.
RATES = ((0.3, 0.3, 0.03), (0.3, 0.03, 0.01), (0.03, 0.3, 0.003), (0.3, 0.3, 0.001))


def _ends(problem, dampings, rates, num_steps):
    def end(damping, rates):
        pipeline = SingleLoop(*map(optax.sgd, rates), damping=damping)
        solution = blx.solve(
            problem,
            blx.WarmStart(),
            jnp.zeros(3),
            jnp.zeros(5),
            pipeline=pipeline,
            num_steps=num_steps,
            save_every=num_steps,
            certify=False,
        )
        return solution.x, solution.y, solution.stats["adjoint_norm"]

    over_rates = jax.vmap(end, (None, 0))
    both = jax.jit(jax.vmap(over_rates, (0, None)))
    return map(np.asarray, both(jnp.array(dampings), jnp.array(rates)))


@pytest.mark.slow
def test_damping_is_the_epsilon_of_a_warm_start():
    problem = _linear()
    # Many, for the slowest of x.
    xs, ys, norms = _ends(problem, DAMPINGS, RATES, 90_000)
    for i, damping in enumerate(DAMPINGS):
        x, y = _closed_form(problem, damping)
        for j in range(len(RATES)):
            assert tree_allclose([xs[i, j], ys[i, j]], [x, y], rtol=1e-10)
    # Without damping v stays where the rates have brought it, and x does not notice.
    drift = norms[0] / np.array([rate[1] / rate[2] for rate in RATES])
    assert drift[0] > 1 and np.allclose(drift, drift[0], rtol=1e-8)
    assert np.all(norms[1:] < 1e-8)


#
# Estimators
#


def _after_some_steps(name):
    """A state in the middle of a run, and one step's directions as a function of the
    state, the point and the count."""
    pipeline, _ = METHODS[name]
    # An epoch has five batches at both levels.
    state = run(pipeline, 40).state
    point = LoopPoint(state.x + 0.1, state.y - 0.1, state.v + 0.2)

    def directions(count):
        oracle = pipeline._oracle(make(), KEY, count, count)
        on_batch = oracle.on_batch()
        terms = terms_of(on_batch, point)
        return pipeline.estimator(oracle, on_batch, point, terms, state.estimator_state)[
            0
        ]

    # None of these is a multiple of the period, 7: no step is with all data.
    epoch = jnp.arange(50, 55, dtype=jnp.int32)
    found = jax.jit(jax.vmap(directions))(epoch)
    return state, point, jtu.tree_map(lambda u: jnp.mean(u, 0), found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("SOBA", "SABA", "SRBA", "MA-SOBA"))
def test_estimators_are_unbiased_over_an_epoch(name):
    state, (x, y, v), mean = _after_some_steps(name)
    problem = ByHand(make())
    expected = list(_on(problem, x, y, v, *EVERYTHING))
    if name == "MA-SOBA":
        expected[2] = (1 - THETA) * state.estimator_state + THETA * expected[2]
    if name == "SRBA":
        before, last = state.estimator_state
        old = _on(
            problem, *(np.asarray(u) for u in (last.x, last.y, last.v)), *EVERYTHING
        )
        expected = [b + e - o for b, e, o in zip(before, expected, old)]
    assert tree_allclose(list(mean), expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", (43, 501))
def test_means_are_those_of_the_tables(num_steps):
    state = run(METHODS["SABA"][0], num_steps).state
    for table in state.estimator_state:
        means = jtu.tree_map(lambda u: jnp.mean(u, 0), table.complete())
        assert tree_allclose(table.mean, means, rtol=1e-12)
        assert jnp.all(table.mean[0] != 0)


@pytest.mark.parametrize("length", (16, 23))
def test_means_forget_the_rounding_of_large_entries(length):
    # In float32, from entries that are 1e7 times those in the end.
    dim, num_steps = 5, 2_000
    rng = np.random.default_rng(length)
    last = rng.normal(size=(length, dim)).astype(np.float32)
    places = rng.integers(0, length, num_steps).astype(np.int32)
    sizes = (1 + 1e7 * 0.5 ** np.arange(num_steps)).astype(np.float32)

    @jax.jit
    def after(places, sizes):
        def body(table, at):
            place, size = at
            row = jnp.asarray(last)[place]
            terms = OuterTerms(size * row, row)
            return estimators._updated(table, place, terms)[1], None

        like = OuterTerms(*jnp.zeros((2, dim), jnp.float32))
        blank = estimators._blank_table(like, length)
        return jax.lax.scan(body, blank, (places, sizes))[0]

    table = after(places, sizes)
    for mean, entries in zip(table.mean, table.complete()):
        exact = np.mean(np.asarray(entries, np.float64), 0)
        assert mean.dtype == jnp.float32
        assert np.max(np.abs(np.asarray(mean) - exact)) < 1e-7


def _stationarity(solution):
    """How far x, y and v are from the fixed point of the full method."""
    x, y, v = map(np.asarray, (solution.x, solution.y, solution.state.v))
    directions = _on(ByHand(make()), x, y, v, *EVERYTHING)
    return max(np.max(np.abs(d)) for d in directions)


@pytest.mark.slow
def test_noise_vanishes_with_saga_and_sarah():
    def end(name):
        pipeline = METHODS[name][0]
        return _stationarity(run(pipeline, 4_000))

    assert end("SABA") < 1e-8
    assert end("SRBA") < 1e-8
    # At the same rates.
    assert end("SOBA") > 1e-4


@pytest.mark.slow
def test_full_batches_are_every_estimator():
    # With one batch there is nothing to estimate, and any problem will do.
    ends = [
        run(loop(e, inner_batch=None, outer_batch=None), 15).x
        for e in (None, SAGA(), SARAH(4))
    ]
    assert tree_allclose(ends[1], ends[0], rtol=1e-12)
    assert tree_allclose(ends[2], ends[0], rtol=1e-12)


#
# Runs
#


@pytest.mark.slow
# stocBiO carries what AmIGO carries.
@pytest.mark.parametrize("name", ("SOBA", "SABA", "SRBA", "MA-SOBA", "AmIGO"))
def test_resumes_to_the_last_bit(name, tmp_path):
    pipeline, _ = METHODS[name]
    path = tmp_path / "run.eqx"
    whole, part = run(pipeline, 60), run(pipeline, 37)
    again = run(pipeline, 23, state=part.state)
    assert tree_identical(again.state, whole.state)
    if pipeline.estimator == MiniBatch():
        # Without an estimate in it, a state is saved as those of `test_checkpoint.py`.
        return
    run(pipeline, 37, checkpoint=path)
    resumed = run(pipeline, 60, checkpoint=path)
    assert tree_identical(resumed.state, whole.state)
    assert tree_identical(resumed.history, whole.history)


@pytest.mark.slow
def test_vmap_over_keys():
    pipeline = METHODS["SABA"][0]
    keys = jr.split(jr.key(3), 3)
    batch = jax.jit(jax.vmap(lambda key: run(pipeline, 40, key=key).x))(keys)
    alone = np.stack([run(pipeline, 40, key=key).x for key in keys])
    assert tree_allclose(batch, alone, rtol=1e-12)
    assert not np.allclose(alone[0], alone[1], rtol=1e-3)


@pytest.mark.parametrize("name", ("SOBA", "SABA", "SRBA", "MA-SOBA", "AmIGO", "stocBiO"))
def test_registered(name):
    problem = make()
    entries = {e.name: e for e in blx.registered(blx.WarmStart)}
    pipeline = entries[name].factory(blx.WarmStart(0.3), problem)
    assert pipeline.damping == 0.3 and "epsilon" in entries[name].demands
    assert (pipeline.inner_batch, pipeline.outer_batch) == (NUM_INNER, NUM_OUTER)
    entries = {e.name: e for e in blx.registered(blx.Stackelberg)}
    assert entries[name].factory(blx.Stackelberg(), problem).damping == 0


@functools.cache
def _start_value():
    """The outer objective where x begins, at the inner minimum."""
    problem, x, y = ByHand(make()), np.asarray(X), np.asarray(Y)
    for _ in range(20):
        columns = [problem.product(x, y, v, EVERYTHING[0]) for v in np.eye(DIM)]
        y = y - np.linalg.solve(np.stack(columns), problem.slope(x, y, EVERYTHING[0]))
    features, signs = problem.outer
    losses = np.log1p(np.exp(-signs * (features @ y)))
    return float(np.mean(losses) + DECAY / 2 * np.sum(x**2))


@pytest.mark.slow
def test_default_rates_serve():
    problem = make()
    solution = blx.solve(
        problem,
        blx.Stackelberg(),
        X,
        Y,
        pipeline="SABA",
        num_steps=3_000,
        save_every=3_000,
    )
    assert solution.value < _start_value() - 1e-3
    assert solution.certificate.largest < 1e-2

    @jax.jit
    def rate(x):
        pipeline = SingleLoop(outer_optimiser=optax.sgd(0.1))
        return pipeline.init(problem, blx.WarmStart(), x, Y, KEY).rate

    # The rate is half of one over the largest curvature.
    by_hand, x, y = ByHand(problem), np.asarray(X), np.asarray(Y)
    H = np.stack([by_hand.product(x, y, v, EVERYTHING[0]) for v in np.eye(DIM)])
    assert np.allclose(rate(X), 0.5 / np.linalg.eigvalsh(H)[-1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimiser", (pytest.param("adam", marks=pytest.mark.slow), "schedule")
)
def test_any_optimiser(optimiser):
    made = optax.adam(0.02)
    if optimiser == "schedule":
        made = optax.sgd(lambda k: 0.3 / jnp.sqrt(1.0 + k))
    pipeline = SingleLoop(
        made, optax.sgd(0.2, momentum=0.5), made, inner_batch=8, outer_batch=5
    )
    x, y = X.astype(jnp.float32), Y.astype(jnp.float32)
    problem = make(jnp.float32)
    solution = run(pipeline, 200, problem, x, y)
    assert solution.x.dtype == solution.y.dtype == solution.state.v.dtype == jnp.float32
    assert solution.value < _start_value() - 1e-3


@pytest.mark.slow
def test_x_is_projected():
    problem = make(project_x=lambda x: jnp.clip(x, -0.2, 0.2))
    solution = run(loop(SAGA()), 4_000, problem)
    assert np.max(np.abs(solution.x)) <= 0.2 and np.any(np.abs(solution.x) == 0.2)
    assert solution.stats["outer_residual"] < 1e-8
    assert (
        blx.certify(problem, blx.WarmStart(DAMPING), solution.x, solution.y).largest
        < 1e-6
    )


class Dropout(blx.AbstractFiniteSumProblem):
    inner_data: jax.Array
    outer_data: jax.Array

    def inner_losses(self, x, y, batch, key):
        kept = 1.0 if key is None else jr.bernoulli(key, 0.5, batch.shape).astype(y.dtype)
        return kept * (y - x * batch) ** 2

    def outer_losses(self, x, y, batch, key):
        return (y - batch) ** 2


@pytest.mark.slow
def test_random_losses_have_a_key_of_their_own_in_each_step():
    data = jnp.ones(6)
    problem = Dropout(data, data)
    pipeline = loop(inner_batch=6, outer_batch=6)
    solution = run(pipeline, 8, problem, jnp.array(0.5), jnp.array(0.0))
    # All batches have the same samples.
    residuals = np.asarray(solution.history["inner_residual"])
    assert len(set(residuals.round(6))) > 4


#
# The adjoint, where nothing holds it
#


def _slope(x, y):
    """F_y has a part that H annihilates."""
    return 0.5 * (y[0] - 1) ** 2 + y[1]


def _flat(curvature=0.0):
    return blx.BilevelProblem(
        _slope, lambda x, y: 0.5 * (y[0] - x) ** 2 + 0.5 * curvature * y[1] ** 2
    )


def _run_flat(problem, num_steps, rate=0.5, damping=0.0, dtype=jnp.float32):
    pipeline = SingleLoop(
        optax.sgd(0.5), optax.sgd(rate), optax.sgd(0.1), damping=damping
    )
    return run(
        pipeline,
        num_steps,
        problem,
        jnp.zeros((), dtype),
        jnp.zeros(2, dtype),
        throw=False,
    )


@pytest.mark.slow
def test_growth_along_the_null_space_is_named():
    # It takes a tenth of 1 / precision: a million steps.
    solution = _run_flat(_flat(), 4_000_000)
    assert solution.result == blx.RESULTS.adjoint_unbounded
    norms = solution.history["adjoint_norm"]
    assert np.all(np.diff(norms[np.isfinite(norms)]) > 0)
    curvatures = solution.history["adjoint_curvature"]
    assert curvatures[np.isfinite(curvatures)][-1] < 1e-5
    assert np.allclose(solution.x, 1.0, atol=1e-3)
    sentence = blx.RESULTS[solution.result]
    assert "Give `damping`" in sentence and "epsilon" in sentence
    # Damping stops it.
    damped = _run_flat(_flat(), 4_000_000, damping=0.1)
    assert damped.result == blx.RESULTS.successful
    assert np.allclose(damped.state.v[1], -10.0, rtol=1e-4)


def test_no_alarm_where_the_inner_hessian_is_positive_definite():
    # v goes to -10,000.
    solution = _run_flat(_flat(1e-4), 500_000)
    assert solution.result == blx.RESULTS.successful
    assert np.allclose(solution.state.v[1], -1e4, rtol=1e-2)


@pytest.mark.parametrize("curvature, rate", ((0.0, 2.5), (-0.5, 0.5)))
def test_divergence_of_the_adjoint_is_named(curvature, rate):
    solution = _run_flat(_flat(curvature), 300, rate=rate)
    assert solution.result == blx.RESULTS.adjoint_diverged
    assert np.all(np.isfinite(solution.state.v))


#
# What is refused
#


def _refused(sentence, make_pipeline, problem=None, **kwargs):
    with pytest.raises(ValueError, match=sentence):
        run(make_pipeline(), 1, problem, **kwargs)


@pytest.mark.slow
def test_what_cannot_be_right_is_refused():
    _refused("38 samples.*has 37", lambda: loop(inner_batch=NUM_INNER + 1))
    _refused("`SingleLoop\\(outer_batch=...\\)`", lambda: loop(outer_batch=0))
    _refused("moves them in turn", lambda: loop(SAGA(), inner_steps=2))
    _refused("moves them in turn", lambda: loop(SARAH(3), warm_adjoint=False))
    _refused("`SARAH\\(period=...\\)`", lambda: SARAH(0))
    _refused("weight of the newest", lambda: Momentum(1.5))
    _refused("`SingleLoop\\(damping=...\\)`", lambda: loop(damping=-1.0))
    _refused("inner_steps", lambda: loop(inner_steps=0))
    _refused("outer_optimiser", lambda: SingleLoop(outer_optimiser=LBFGS()))
    _refused("estimator", lambda: loop(estimator="SAGA"))
    searching = optax.lbfgs()
    for name in ("inner_optimiser", "adjoint_optimiser", "outer_optimiser"):
        _refused(
            f"`SingleLoop\\({name}=...\\)` asks for values",
            lambda name=name: SingleLoop(**{name: searching}),
        )
    plain = blx.BilevelProblem(
        lambda x, y: jnp.sum(y), lambda x, y: jnp.sum((y - x) ** 2)
    )
    _refused("does not say what its samples are", loop, plain)

    confined = make(project_y=lambda y: jnp.clip(y, -1, 1))
    _refused("without constraints", loop, confined)
    root = blx.RootProblem(lambda x, y: jnp.sum(y), lambda x, y: y - x)
    _refused("have an inner objective|are a root", SingleLoop, root)
    unreached = blx.BilevelProblem(lambda x, y: jnp.sum(y), lambda x, y: jnp.sum(y**2))
    _refused("exactly zero", SingleLoop, unreached)
    with pytest.raises(ValueError, match="aims at `WarmStart` and `Stackelberg`"):
        blx.solve(make(), blx.ColdStart(), X, Y, pipeline=loop(), num_steps=1)


@pytest.mark.slow
def test_tables_that_do_not_fit_are_refused(monkeypatch):
    # Of 3 and of 2 vectors of 4 numbers of 8 bytes.
    num_inner, num_outer = -(-NUM_INNER // 9), -(-NUM_OUTER // 6)
    num_bytes = (3 * num_inner + 2 * num_outer) * 4 * 8
    monkeypatch.setattr(estimators, "_available_bytes", lambda: 2 * num_bytes - 1)
    sentence = f"have {num_bytes} bytes.* {2 * num_bytes - 1:,} bytes.*larger batches"
    _refused(sentence, lambda: loop(SAGA(), inner_batch=9, outer_batch=6))
    monkeypatch.setattr(estimators, "_available_bytes", lambda: 2 * num_bytes)
    fits, problem = loop(SAGA(), inner_batch=9, outer_batch=6), make()
    jax.eval_shape(lambda x: fits.init(problem, blx.WarmStart(), x, Y, KEY).x, X)
    monkeypatch.undo()
    assert (estimators._available_bytes() or 0) > 2**28


#
# Which labels are wrong?
#


class Cleaning(blx.AbstractFiniteSumProblem):
    """Softmax regression on weighted samples; x has the logit of each weight."""

    inner_data: tuple
    outer_data: tuple

    def inner_losses(self, x, y, batch, key):
        features, labels, index = batch
        logits = features @ y
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jax.nn.sigmoid(x[index]) * fit

    def outer_losses(self, x, y, batch, key):
        features, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(features @ y, labels)

    def inner_penalty(self, x, y):
        return 0.0015 * jnp.sum(y**2)


def _clean(seed):
    """The accuracy on 397 digits, the F1 of the wrong labels that were found, and the
    processor seconds. Half of 1,000 labels are wrong, and 400 more are known."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, digits = datasets.load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    features = np.concatenate([images / 16, np.ones((len(images), 1))], axis=1)
    features, digits = features[order].astype(np.float32), digits[order]
    wrong = rng.random(1000) < 0.5
    labels = (digits[:1000] + wrong * rng.integers(1, 10, 1000)) % 10
    train = jnp.asarray(features[:1000]), jnp.asarray(labels), jnp.arange(1000)
    validation = jnp.asarray(features[1000:1400]), jnp.asarray(digits[1000:1400])
    problem = Cleaning(train, validation)
    pipeline = loop(
        SAGA(), rate=0.5, outer_rate=100.0, inner_batch=64, outer_batch=64, damping=0.0
    )
    x, y = jnp.zeros(1000, jnp.float32), jnp.zeros((65, 10), jnp.float32)

    def cleaned(num_steps):
        return run(
            pipeline, num_steps, problem, x, y, record=_nothing, save_every=num_steps
        )

    cleaned(1)
    start = time.process_time()
    solution = cleaned(2_000)
    weights, y = np.asarray(solution.x), np.asarray(solution.y)
    seconds = time.process_time() - start
    accuracy = np.mean(np.argmax(features[1400:] @ y, axis=1) == digits[1400:])
    found = weights < 0
    f1 = 2 * np.sum(found & wrong) / (np.sum(found) + np.sum(wrong))
    return accuracy, f1, seconds


def _nothing(x, y, metrics):
    return ()


@pytest.mark.slow
def test_wrong_labels_are_found():
    accuracies, f1s, seconds = zip(*map(_clean, range(3)))
    assert np.mean(accuracies) >= 0.93
    assert np.mean(f1s) >= 0.95
    assert max(seconds) < 20
