"""The paper's tasks."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import as_numpy, tree_allclose, tree_has_dtype

import bilevel_eqx as blx
from bilevel_eqx import tasks


#
# Anti-distillation
#


def _features(inputs, num_frequencies, basis):
    """Feature by feature."""
    columns = [np.ones(len(inputs))]
    for function in (np.cos, np.sin):
        for n in range(1, num_frequencies + 1):
            amplitude = 2.0 ** (num_frequencies - n) if basis == "exponential" else 1 / n
            columns.append(amplitude * function(n * np.asarray(inputs)))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("basis", ("exponential", "reciprocal"))
@pytest.mark.parametrize("num_frequencies", (1, 10))
def test_fourier_features(basis, num_frequencies):
    inputs = np.array([-3.0, -0.4, 0.0, 2.5])
    features = tasks.fourier_features(
        jnp.asarray(inputs), num_frequencies=num_frequencies, basis=basis
    )
    expected = _features(inputs, num_frequencies, basis)
    assert tree_allclose(features, expected, rtol=1e-12)
    single = tasks.fourier_features(jnp.asarray(inputs, jnp.float32), basis=basis)
    assert tree_has_dtype(single, jnp.float32)


def test_fourier_features_of_no_basis():
    with pytest.raises(Exception, match="basis"):
        tasks.fourier_features(jnp.zeros(2), basis="polynomial")  # pyright: ignore


def _singular_values(interval):
    problem, _, _ = tasks.anti_distillation(interval=interval)
    assert problem.features.shape == (13, 21)
    return np.linalg.svd(as_numpy(problem.features), compute_uv=False)


def test_conditioning():
    # With both ends of a period, two of the 13 rows are the same one.
    s = _singular_values((-np.pi, np.pi))
    assert s[11] > 1 and s[12] < 1e-10
    s = _singular_values((-3.0, 3.0))
    assert tree_allclose((s[0] / s[-1]) ** 2, 1.162e5, rtol=1e-3)
    s = _singular_values((-1.0, 1.0))
    assert tree_allclose((s[0] / s[-1]) ** 2, 9.05e10, rtol=1e-2)


def test_anti_distillation():
    problem, x0, y0 = tasks.anti_distillation()
    inputs = np.linspace(-3, 3, 13)
    assert tree_allclose(
        problem.features, _features(inputs, 10, "exponential"), rtol=1e-12
    )
    assert tree_allclose(
        problem.validation_features, _features([0.0], 10, "exponential"), rtol=1e-12
    )
    assert tree_allclose(problem.validation_targets, np.array([2.0]), rtol=0)
    assert tree_allclose((x0, y0), (np.zeros(13), np.zeros(21)), rtol=0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=13), rng.normal(size=21)
    outer = 0.5 * np.sum((as_numpy(problem.validation_features) @ y - 2.0) ** 2)
    inner = 0.5 * np.sum((as_numpy(problem.features) @ y - x) ** 2)
    x, y = jnp.asarray(x), jnp.asarray(y)
    assert tree_allclose(problem.outer(x, y), outer, rtol=1e-12)
    assert tree_allclose(problem.inner(x, y), inner, rtol=1e-12)


# The norms of w and of lambda for each K, as the project's notes on the paper have them.
_norms = {
    ("exponential", 1e-8): {
        1: (0.003383, 3.9635),
        1e2: (0.003529, 3.4756),
        1e3: (0.005354, 2.6720),
        1e4: (0.01077, 2.2273),
        1e6: (0.02958, 2.0622),
        np.inf: (0.14684, 2.0),
    },
    ("reciprocal", 1e-3): {
        1: (1.2525, 3.4575),
        1e2: (1.2771, 3.0918),
        1e3: (1.7579, 2.2145),
        1e4: (2.4258, 2.0002),
        1e6: (2.4491, 2.0),
        np.inf: (2.4491, 2.0),
    },
}


@pytest.mark.parametrize("basis, step_size", list(_norms))
def test_norms_of_the_figures(basis, step_size):
    problem, _, _ = tasks.anti_distillation(basis=basis)
    for K, norms in _norms[basis, step_size].items():
        if np.isfinite(K):
            filter = tasks.neumann_filter(K, step_size)
        else:
            filter = tasks.pseudoinverse_filter()
        x, y = tasks.fixed_point(problem, filter)
        got = np.linalg.norm(y), np.linalg.norm(x)
        # They are given to four or five figures.
        assert tree_allclose(got, norms, rtol=5e-4, atol=0)
        # Every setting fits the validation point.
        assert tree_allclose(problem.validation_features @ y, np.array([2.0]), rtol=1e-8)


def _filters(step_size):
    """The filters, and in NumPy the same as matrix functions of H."""

    def neumann(K):
        def jacobian(phi):
            decay = np.eye(phi.shape[1]) - step_size * phi.T @ phi
            terms = np.eye(phi.shape[1]) - np.linalg.matrix_power(decay, K)
            return terms @ np.linalg.pinv(phi)

        return tasks.neumann_filter(K, step_size), jacobian

    def proximal(epsilon):
        def jacobian(phi):
            damped = phi.T @ phi + epsilon * np.eye(phi.shape[1])
            return np.linalg.solve(damped, phi.T)

        return tasks.proximal_filter(epsilon), jacobian

    return {
        "K = 1": neumann(1),
        "K = 50": neumann(50),
        "epsilon = 0.1": proximal(0.1),
        "epsilon = 10": proximal(10.0),
        "limit": (tasks.pseudoinverse_filter(), np.linalg.pinv),
    }


@pytest.mark.parametrize("basis", ("exponential", "reciprocal"))
@pytest.mark.parametrize("inputs", ([0.0], [-1.3, 0.2, 2.2]))
def test_t8_fixed_point(basis, inputs):
    targets = jnp.array([2.0, -1.0, 0.5])[: len(inputs)]
    problem, _, _ = tasks.anti_distillation(
        basis=basis,
        num_points=7,
        num_frequencies=5,
        validation_inputs=jnp.asarray(inputs),
        validation_targets=targets,
    )
    phi, validation = map(as_numpy, (problem.features, problem.validation_features))
    pinv = np.linalg.pinv(phi)
    for filter, jacobian in _filters(0.5 / np.linalg.norm(phi, 2) ** 2).values():
        x, y = tasks.fixed_point(problem, filter)
        G = jacobian(phi).T @ validation.T
        expected = G @ np.linalg.solve(validation @ pinv @ G, as_numpy(targets))
        assert tree_allclose((x, y), (expected, pinv @ expected), rtol=1e-8)
        # It is one: both residuals of its own dynamics are zero.
        assert np.linalg.norm(phi @ y - x) < 1e-10
        assert np.linalg.norm(validation @ y - targets) < 1e-10
    # T10: in the limit, the targets of least norm.
    least = np.linalg.pinv(validation @ pinv) @ as_numpy(targets)
    assert tree_allclose(expected, least, rtol=1e-8)


@pytest.mark.parametrize("basis, step_size", list(_norms))
def test_t10_limits_and_monotone_norms(basis, step_size):
    problem, _, _ = tasks.anti_distillation(basis=basis)
    limit = tasks.fixed_point(problem, tasks.pseudoinverse_filter())
    # With 0 on the grid all is put on that point.
    assert tree_allclose(limit[0], 2.0 * np.eye(13)[6], rtol=1e-9)

    def norms(make, values):
        points = jax.vmap(lambda v: tasks.fixed_point(problem, make(v)))(values)
        return [np.linalg.norm(u, axis=1) for u in points], points

    Ks = jnp.logspace(0, 12, 25)
    (x, y), points = norms(lambda K: tasks.neumann_filter(K, step_size), Ks)
    slack = 1e-9
    assert np.all(np.diff(x) < slack) and np.all(np.diff(y) > -slack)
    assert x[0] - x[-1] > 1 and y[-1] / y[0] > 1.9
    last = tuple(u[-1] for u in points)
    assert tree_allclose(last, limit, rtol=1e-6)

    epsilons = jnp.logspace(-9, 9, 25)
    (x, y), points = norms(tasks.proximal_filter, epsilons)
    assert np.all(np.diff(x) > -slack) and np.all(np.diff(y) < slack)
    assert x[-1] - x[0] > 1 and y[0] / y[-1] > 1.9
    first = tuple(u[0] for u in points)
    assert tree_allclose(first, limit, rtol=1e-6)


def test_t5_filters_are_alike():
    # With epsilon = 1 / (alpha K), m_K / m_epsilon is between 1 and 2.
    s = jnp.logspace(-6, 0, 200)
    largest = []
    for K in (1, 10, 10_000):
        ratio = tasks.neumann_filter(K, 0.99)(s) / tasks.proximal_filter(1 / (0.99 * K))(
            s
        )
        assert np.all(ratio >= 1 - 1e-12) and np.all(ratio <= 2)
        largest.append(np.max(ratio))
    assert tree_allclose(largest[-1], 1.2984, rtol=1e-4)


#
# Rings
#

# In one program, which compiles faster than its fifty operations one at a time.
rings = eqx.filter_jit(tasks.rings)


@eqx.filter_jit
def _losses(problem, x, y):
    return problem.outer(x, y), problem.inner(x, y), problem.accuracy(y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_classes, num_distilled, learn_labels",
    (
        (2, None, False),
        (3, 2, True),
        (1, 4, True),
        pytest.param(2, 5, False, marks=pytest.mark.slow),
    ),
)
def test_shapes_of_rings(num_classes, num_distilled, learn_labels):
    problem, x0, y0 = rings(
        jr.key(0),
        num_classes=num_classes,
        num_distilled=num_distilled,
        learn_labels=learn_labels,
        points_per_class=11,
        width=7,
        num_hidden=2,
    )
    k = num_classes if num_distilled is None else num_distilled
    assert problem.points.shape == (11 * num_classes, 2)
    assert np.bincount(problem.labels).tolist() == [11] * num_classes
    assert x0["points"].shape == (k, 2)
    if learn_labels:
        assert x0["logits"].shape == (k, num_classes)
        assert problem.distilled_labels is None
    else:
        assert set(x0) == {"points"}
        # Dealt out in turn.
        assert problem.distilled_labels.tolist() == [i % num_classes for i in range(k)]
    sizes = [2, 7, 7, num_classes]
    shapes = [((m, n), (n,)) for m, n in itertools.pairwise(sizes)]
    assert [(w.shape, b.shape) for w, b in y0] == shapes
    *values, accuracy = _losses(problem, x0, y0)
    for value in values:
        assert value.shape == () and np.isfinite(value)
    # With one class there is nothing to get wrong.
    assert 0 <= accuracy <= 1
    assert num_classes > 1 or accuracy == 1


@pytest.mark.slow
def test_radii_and_initial_weights():
    radii = [0.5, 2.0, 3.0]
    problem, _, y0 = rings(
        jr.key(1), num_classes=3, radii=radii, noise=0.01, points_per_class=500
    )
    for c, radius in enumerate(radii):
        ring = as_numpy(problem.points)[np.asarray(problem.labels) == c]
        distances = np.linalg.norm(ring, axis=1)
        assert abs(np.mean(distances) - radius) < 2e-3
        assert 0.008 < np.std(distances) < 0.012
        # All the way round.
        assert np.linalg.norm(np.mean(ring, axis=0)) < 0.15 * radius
    # LeCun-normal: the variance is one over the number of inputs.
    for (weight, bias), size in zip(y0, (2, 200, 200, 200)):
        assert weight.shape[0] == size
        assert 0.8 < np.std(weight) * np.sqrt(size) < 1.2
        assert np.all(bias == 0)
    default, _, _ = rings(jr.key(1), num_classes=3, noise=0.0, width=3)
    distances = np.linalg.norm(as_numpy(default.points), axis=1)
    assert tree_allclose(distances, np.repeat([0.25, 0.5, 0.75], 100), rtol=1e-10)


def test_one_radius_for_each_class():
    with pytest.raises(ValueError, match="3 classes and 2 radii"):
        tasks.rings(jr.key(0), num_classes=3, radii=[0.5, 1.0])


def _numpy_predict(y, points):
    *hidden, (last_weight, last_bias) = [(as_numpy(w), as_numpy(b)) for w, b in y]
    activations = as_numpy(points)
    for weight, bias in hidden:
        activations = np.maximum(activations @ weight + bias, 0)
    return activations @ last_weight + last_bias


def _numpy_log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("learn_labels", (False, True))
def test_losses_of_rings(learn_labels):
    problem, x0, y0 = rings(
        jr.key(2), num_classes=3, learn_labels=learn_labels, width=8, points_per_class=6
    )
    # A bias that is not zero.
    y0 = jax.tree.map(lambda u: jnp.asarray(as_numpy(u) + 0.1), y0)
    found_outer, found_inner, found_accuracy = _losses(problem, x0, y0)
    logits = _numpy_predict(y0, problem.points)
    labels = np.asarray(problem.labels)
    log_probabilities = _numpy_log_softmax(logits)
    outer = -np.mean(log_probabilities[np.arange(18), labels])
    assert tree_allclose(found_outer, outer, rtol=1e-10)
    accuracy = np.mean(np.argmax(logits, axis=1) == labels)
    assert tree_allclose(found_accuracy, accuracy, rtol=1e-6)
    log_probabilities = _numpy_log_softmax(_numpy_predict(y0, x0["points"]))
    if learn_labels:
        weights = np.exp(_numpy_log_softmax(as_numpy(x0["logits"])))
    else:
        weights = np.eye(3)
    inner = -np.mean(np.sum(weights * log_probabilities, axis=1))
    assert tree_allclose(found_inner, inner, rtol=1e-10)


def test_seeds_of_rings():
    @jax.jit
    def points(key):
        return tasks.rings(key, points_per_class=5, width=3)[0].points

    assert np.array_equal(points(jr.key(0)), points(jr.key(0)))
    batch = as_numpy(jax.jit(jax.vmap(points))(jr.split(jr.key(0), 2)))
    assert np.linalg.norm(batch[0] - batch[1]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_distilled, learn_labels",
    (pytest.param(3, False, marks=pytest.mark.slow), (2, True)),
)
def test_a_short_run_learns(num_distilled, learn_labels):
    problem, x0, y0 = rings(
        jr.key(0),
        num_classes=3,
        num_distilled=num_distilled,
        learn_labels=learn_labels,
        points_per_class=20,
        width=32,
        num_hidden=1,
    )
    pipeline = blx.GradientPipeline(
        blx.Unrolled(optax.sgd(0.1), 1), optax.sgd(1.0, momentum=0.9)
    )
    solution = blx.solve(
        problem,
        blx.WarmStart(),
        x0,
        y0,
        pipeline=pipeline,
        num_steps=300,
        save_every=100,
    )
    assert solution.value < _losses(problem, x0, y0)[0] - 0.05
    assert solution.history["value"].shape == (3,)
    for name in x0:
        moved = np.linalg.norm(as_numpy(solution.x[name]) - as_numpy(x0[name]), axis=1)
        assert np.all(moved > 1e-2)


#
# A datapoint on a line
#


@pytest.mark.slow
def test_kaczmarz_is_the_response():
    """T6: projections and proximal steps in closed form, and where all sets meet."""
    rng, num_weights = np.random.default_rng(0), 5
    problem, x0, y0 = tasks.line(
        origin=jnp.asarray(rng.normal(size=num_weights + 1)),
        direction=jnp.asarray(rng.normal(size=num_weights + 1)),
        validation_features=jnp.asarray(rng.normal(size=(4, num_weights))),
        validation_targets=jnp.asarray(rng.normal(size=4)),
    )
    assert y0.shape == (num_weights,) and x0.shape == ()
    x, y = jnp.array(0.7), jnp.asarray(rng.normal(size=num_weights))
    project = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    expected = tasks.kaczmarz_step(problem, x, y)
    assert tree_allclose(blx.best_response(problem, x, y, project), expected, rtol=1e-12)
    near = blx.Proximal(0.3, blx.Projection(), blx.Pseudoinverse())
    expected = tasks.kaczmarz_step(problem, x, y, epsilon=0.3)
    assert tree_allclose(blx.best_response(problem, x, y, near), expected, rtol=1e-12)

    meeting = tasks.meeting_point(problem, y)
    for place in (-3.0, 0.0, 0.7, 11.0):
        assert abs(float(problem.inner_residual(place, meeting))) < 1e-10
    # The nearest such point: the way to it is spanned by the features at two places.
    features = np.stack([problem.datapoint(place)[0] for place in (0.0, 1.0)])
    way = as_numpy(meeting - y)
    spanned = np.linalg.lstsq(features.T, way)[0]
    assert np.allclose(features.T @ spanned, way, atol=1e-12)


def test_line_of_the_figure():
    problem, x0, y0 = tasks.line()
    assert np.allclose(tasks.meeting_point(problem, y0), [1.2, 0.8])
    assert float(x0) == 0 and not np.any(y0)
    features, target = problem.datapoint(2.0)
    assert np.allclose(features, [2.0, 1.0]) and float(target) == pytest.approx(3.2)


#
# Images
#


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", (jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow))
)
def test_images(dtype):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(20, 4, 3)), dtype)
    labels = jnp.asarray(rng.integers(0, 3, size=20))

    @eqx.filter_jit
    def make(key):
        problem, x0, y0 = tasks.image_distillation(
            key, images, labels, num_distilled=2, num_classes=3, width=8
        )
        values = problem.outer(x0, y0), problem.accuracy(y0), problem.predict(y0, images)
        return (problem, x0, y0), (*values, problem.sample(key, None, 5).outer_batch)

    (problem, x0, y0), (outer, accuracy, predicted, batch) = make(jr.key(1))
    assert tree_has_dtype((x0, y0), dtype)
    assert x0["images"].shape == (2, 4, 3) and x0["logits"].shape == (2, 3)
    assert [w.shape for w, _ in y0] == [(12, 8), (8, 8), (8, 3)]
    hidden = np.tanh(as_numpy(images).reshape(20, 12) @ as_numpy(y0[0][0]))
    logits = np.tanh(hidden @ as_numpy(y0[1][0])) @ as_numpy(y0[2][0])
    assert np.allclose(predicted, logits, atol=1e-5)
    shifted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -shifted[np.arange(20), np.asarray(labels)].mean()
    assert float(outer) == pytest.approx(expected, rel=1e-5)
    share = np.mean(logits.argmax(axis=1) == as_numpy(labels))
    assert float(accuracy) == pytest.approx(share, rel=1e-6)
    drawn, classes = batch.samples
    assert drawn.shape == (5, 4, 3) and classes.shape == (5,)
    rows = {tuple(as_numpy(image).ravel()) for image in images}
    assert all(tuple(as_numpy(image).ravel()) in rows for image in drawn)

    # f is least at the entropy of the labels.
    shares = np.exp(_numpy_log_softmax(as_numpy(x0["logits"])))
    entropy = -np.mean(np.sum(shares * np.log(shares), axis=1))
    train = blx.Unrolled(optax.sgd(0.5), 2000)
    y = blx.best_response(problem, x0, y0, train)
    inner = eqx.filter_jit(lambda problem, x, y: problem.inner(x, y))(problem, x0, y)
    assert float(inner) == pytest.approx(entropy, abs=1e-3)


#
# The anti-distillation of Figure 8
#


@pytest.mark.slow
def test_anti_distillation_network(getkey):
    make = eqx.filter_jit(tasks.anti_distillation_network)
    problem, x0, y0 = make(getkey())
    assert x0.shape == (13,) and tree_has_dtype((x0, y0), jnp.float64)
    inputs = as_numpy(problem.inputs)
    weights = {name: as_numpy(leaf) for name, leaf in y0.items()}
    hidden = np.maximum(
        0, inputs[:, None] * weights["hidden_weights"] + weights["hidden_biases"]
    )
    fit = hidden @ weights["weights"] + weights["bias"]
    assert float(problem.inner(x0 + 1, y0)) == pytest.approx(0.5 * np.sum((fit - 1) ** 2))
    at_zero = np.maximum(0, weights["hidden_biases"]) @ weights["weights"]
    assert float(problem.outer(x0, y0)) == pytest.approx(0.5 * (at_zero - 2.0) ** 2)
