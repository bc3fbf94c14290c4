"""Pipelines against the paper's closed forms: toy A, and T6 to T10."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    as_numpy,
    damped_jacobian,
    LinearBilevel,
    LinearLeastSquares,
    make_features,
    make_linear,
    make_moving,
    moving_features,
    neumann_jacobian,
    project,
    tolerance,
    toy_a,
    tree_allclose,
    tree_has_dtype,
)
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx import tasks
from bilevel_eqx._optimiser.descent import advance, Point
from bilevel_eqx._optimiser.lbfgs import LBFGS
from bilevel_eqx._optimiser.projected_quasi_newton import ProjectedQuasiNewton
from bilevel_eqx._optimiser.spectral_projected_gradient import SpectralProjectedGradient


exact = blx.Implicit(blx.Projection(), blx.Pseudoinverse())


@pytest.fixture
def as_optax_likes_it():
    """Its L-BFGS mixes types and ranks of its own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


#
# Toy A
#

toy = toy_a()
ALPHA, K = 0.3, 3
M = 1 - (1 - ALPHA) ** K


def _toy_pipelines():
    """A concept, a response, and w as a function of where the start has x1 = c."""
    inner = optax.sgd(ALPHA)

    def proximal(epsilon):
        return blx.Proximal(epsilon, blx.Projection(), blx.Pseudoinverse())

    warm, cold = blx.WarmStart(), blx.ColdStart()
    return {
        "full warm": (warm, exact, None, lambda c: (1 + c) / 2),
        "cold": (cold, exact, None, lambda c: (1 + c) / 2),
        "partial": (
            blx.WarmStart(0.5),
            proximal(0.5),
            None,
            # Where (w - c) + (w - 1) / (1 + epsilon) = 0.
            lambda c: (1 + 1.5 * c) / 2.5,
        ),
        "K steps, warm": (
            warm,
            blx.Unrolled(inner, K),
            None,
            lambda c: (c + M) / (1 + M),
        ),
        "Algorithm 1": (
            warm,
            blx.Unrolled(inner, K),
            blx.Unrolled(inner, 1),
            lambda c: (c + M) / (1 + M),
        ),
        "Neumann": (
            warm,
            blx.Implicit(blx.Projection(), blx.Neumann(K, ALPHA)),
            None,
            lambda c: (c + M) / (1 + M),
        ),
        # From (0, c), K steps get to x0 = M w: minimise
        # (w - c)^2 / 2 + (M w - 1)^2 / 2.
        "K steps, cold": (
            cold,
            blx.Unrolled(inner, K),
            None,
            lambda c: (c + M) / (1 + M**2),
        ),
    }


def _in_both_types():
    in_single = "partial", "K steps, cold"
    # What these two have besides is in `test_properties.test_hypergradient`, in float32.
    in_double = "K steps, warm", "Neumann"
    for name in _toy_pipelines():
        yield pytest.param(name, jnp.float64, id=f"{name}-float64")
        marks = [] if name in in_single else [pytest.mark.slow]
        if name not in in_double:
            yield pytest.param(name, jnp.float32, id=f"{name}-float32", marks=marks)


@pytest.mark.parametrize("name, dtype", list(_in_both_types()))
def test_toy_a(name, dtype):
    equilibrium, response, inner_update, expected = _toy_pipelines()[name]
    pipeline = blx.GradientPipeline(response, optax.sgd(0.5), inner_update)
    tol = tolerance(dtype)
    # At c = 0: 1/2, 1 / (2 + epsilon), m / (1 + m) and m / (1 + m^2).
    for c in (0.0, 0.4, -1.3):
        x0, y0 = jnp.asarray(0.0, dtype), jnp.asarray([0.0, c], dtype)
        solution = blx.solve(toy, equilibrium, x0, y0, pipeline=pipeline, num_steps=300)
        assert tree_allclose(solution.x, expected(c), rtol=tol)
        assert tree_allclose(solution.y[1], c, rtol=tol)
        assert tree_has_dtype(solution, dtype)
        # What truncates comes to rest, and yet not at the equilibrium asked for.
        assert solution.stats["outer_residual"] < 10 * tol
        if name in ("full warm", "cold", "partial"):
            assert solution.certificate.largest < 10 * tol
        else:
            assert solution.certificate.largest > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "equilibrium, dtype",
    ((blx.ColdStart(), jnp.float32), (blx.WarmStart(), jnp.float64)),
)
def test_toy_a_defaults(equilibrium, dtype, as_optax_likes_it):
    y0 = jnp.asarray([0.0, 0.4], dtype)
    solution = blx.solve(toy, equilibrium, jnp.zeros((), dtype), y0, num_steps=20)
    tol = tolerance(dtype)
    assert tree_allclose(solution.x, 0.7, rtol=tol)
    assert tree_allclose(solution.y, np.array([0.7, 0.4]), rtol=tol)
    assert tree_allclose(solution.value, 0.09, rtol=tol)
    assert solution.certificate.largest < 10 * tol
    assert tree_has_dtype((solution.x, solution.y, solution.certificate), dtype)


@pytest.mark.slow
def test_toy_a_default_partial_warm_start(as_optax_likes_it):
    # The line search must be given the objective that the gradient is of: from another
    # anchor it finds no decrease and the run stands still for a hundred steps.
    x0, y0 = jnp.zeros(()), jnp.array([0.0, 0.4])
    for epsilon in (0.1, 0.3, 1.0, 3.0):
        equilibrium = blx.WarmStart(jnp.asarray(epsilon))
        solution = blx.solve(toy, equilibrium, x0, y0, num_steps=60)
        expected = (1 + 0.4 * (1 + epsilon)) / (2 + epsilon)
        assert tree_allclose(solution.x, expected, rtol=1e-8)
        assert solution.certificate.largest < 1e-6


#
# T6 and T7: projections, one after the other. x says which equation is to be met, and
# the optimiser is one that goes through them in turn.
#

NUM_ROWS = 3
in_turn = optax.stateless(lambda updates, x: jnp.mod(x + 1, NUM_ROWS) - x)


class OneOfSeveral(blx.AbstractLeastSquaresProblem):
    features: Array
    targets: Array

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - 1) ** 2)

    def inner_residual(self, x, y):
        # At x = i, the i-th row; in between, so that there is a derivative, a mixture.
        weight = jnp.maximum(0, 1 - jnp.abs(x - jnp.arange(NUM_ROWS, dtype=x.dtype)))
        return jnp.sum(weight * (self.features @ y - self.targets))


def _one_of_several():
    rng = np.random.default_rng(11)
    features = make_features(2, singular_values=(1.3, 1.0, 0.8))
    problem = OneOfSeveral(jnp.asarray(features), jnp.asarray(rng.normal(size=3)))
    return problem, jnp.array(0.0), jnp.asarray(rng.normal(size=5))


def _points(x, y, metrics):
    return x, y


@pytest.mark.slow
def test_t6_full_warm_start_takes_kaczmarz_steps():
    problem, x0, y0 = _one_of_several()
    pipeline = blx.GradientPipeline(exact, in_turn)
    solution = blx.solve(
        problem,
        blx.WarmStart(),
        x0,
        y0,
        pipeline=pipeline,
        num_steps=200,
        record=_points,
        certify=False,
    )
    rows, targets = as_numpy(problem.features), as_numpy(problem.targets)
    x, y = 0, as_numpy(y0)
    y = y + rows[x] * (targets[x] - rows[x] @ y) / (rows[x] @ rows[x])
    for step in range(200):
        x = (x + 1) % NUM_ROWS
        y = y + rows[x] * (targets[x] - rows[x] @ y) / (rows[x] @ rows[x])
        if step < 7:
            assert tree_allclose(solution.history[0][step], float(x), rtol=0)
            assert tree_allclose(solution.history[1][step], y, rtol=1e-10)
    # T7: where it ends is nearest to the start among the points on all three.
    assert tree_allclose(solution.y, project(rows, targets, y0), rtol=1e-10)


@pytest.mark.slow
def test_t7_partial_cycling_reaches_the_same_point():
    problem, x0, y0 = _one_of_several()

    def run(epsilon):
        response = blx.Proximal(epsilon, blx.Projection(), blx.Pseudoinverse())
        return blx.solve(
            problem,
            blx.WarmStart(epsilon),
            x0,
            y0,
            pipeline=blx.GradientPipeline(response, in_turn),
            num_steps=1500,
            record=_points,
            save_every=100,
            certify=False,
        )

    solutions = [run(jnp.array(epsilon)) for epsilon in (0.05, 1.0, 5.0)]
    expected = project(problem.features, problem.targets, y0)
    for solution in solutions:
        assert tree_allclose(solution.y, expected, rtol=1e-8)
    # On the way there they differ.
    _, second, third = (as_numpy(solution.history[1])[0] for solution in solutions)
    assert np.linalg.norm(third - second) > 1e-3


@pytest.mark.slow
def test_t7_a_cold_start_does_not_cycle():
    # It forgets every equation but the last.
    problem, x0, y0 = _one_of_several()
    solution = blx.solve(
        problem,
        blx.ColdStart(),
        x0,
        y0,
        pipeline=blx.GradientPipeline(exact, in_turn),
        num_steps=50,
        certify=False,
    )
    last = 50 % NUM_ROWS
    row, target = problem.features[last][None], problem.targets[last][None]
    assert tree_allclose(solution.y, project(row, target, y0), rtol=1e-10)
    everything = project(problem.features, problem.targets, y0)
    assert np.linalg.norm(solution.y - everything) > 0.1


def _paths(problem, x0, y0, num_steps=12):
    pipeline = blx.GradientPipeline(exact, optax.sgd(0.2))
    histories = [
        blx.solve(
            problem,
            equilibrium,
            x0,
            y0,
            pipeline=pipeline,
            num_steps=num_steps,
            record=_points,
            certify=False,
        ).history
        for equilibrium in (blx.WarmStart(), blx.ColdStart())
    ]
    return histories


@pytest.mark.slow
def test_t6_with_fixed_features_full_warm_is_cold():
    warm, cold = _paths(*make_linear(LinearBilevel, jnp.float64))
    assert tree_allclose(warm, cold, rtol=1e-10)
    # On a path that goes somewhere.
    assert np.linalg.norm(warm[0][-1] - warm[0][0]) > 0.1


@pytest.mark.slow
def test_t6_with_moving_features_they_separate():
    problem, x0, y0 = make_moving()
    warm, cold = _paths(problem, x0, y0)
    for (xs, ys), carries in ((warm, True), (cold, False)):
        anchor = y0
        phi = as_numpy(moving_features(x0))[None]
        if carries:
            anchor = project(phi, as_numpy(problem.target)[None], y0)
        for x, y in zip(xs, ys):
            phi = as_numpy(moving_features(x))[None]
            expected = project(phi, as_numpy(problem.target)[None], anchor)
            assert tree_allclose(y, expected, rtol=1e-10)
            anchor = expected if carries else y0
    assert np.abs(warm[0][-1] - cold[0][-1]) > 1e-2


#
# T8 to T10: anti-distillation
#


def _numpy_fixed_point(problem, jacobian):
    """T8, by pseudoinverses, for a given response Jacobian."""
    phi = as_numpy(problem.features)
    validation = as_numpy(problem.validation_features)
    targets = as_numpy(problem.validation_targets)
    pinv = np.linalg.pinv(phi)
    G = jacobian.T @ validation.T
    x = G @ np.linalg.solve(validation @ pinv @ G, targets)
    return x, pinv @ x


def _small_tasks():
    """Both bases, small and well conditioned enough for plain gradient descent."""
    inputs, targets = [-1.0, 0.7], [2.0, -1.0]
    problems = []
    for basis in ("exponential", "reciprocal"):
        problem, x0, y0 = tasks.anti_distillation(
            basis=basis,
            num_points=4,
            num_frequencies=3,
            interval=(-2.5, 2.5),
            validation_inputs=jnp.asarray(inputs),
            validation_targets=jnp.asarray(targets),
        )
        problems.append(problem)
    return problems, x0, y0


@pytest.mark.slow
@pytest.mark.parametrize("name", ("Algorithm 1", "Algorithm 3", "Neumann"))
def test_t9_all_reach_the_closed_form(name):
    problems, x0, y0 = _small_tasks()
    num_terms = 4
    alphas, epsilons, rates, expected = [], [], [], []
    for problem in problems:
        phi = as_numpy(problem.features)
        alpha = 0.9 / np.linalg.norm(phi, 2) ** 2
        epsilon = 1 / (alpha * num_terms)
        if name == "Algorithm 3":
            jacobian = damped_jacobian(phi, epsilon)
        else:
            jacobian = neumann_jacobian(phi, num_terms, alpha)
        expected.append(_numpy_fixed_point(problem, jacobian))
        # A tenth of the largest rate that is stable if y does not lag.
        validation = as_numpy(problem.validation_features)
        through = validation @ np.linalg.pinv(phi) @ jacobian.T @ validation.T
        rates.append(0.2 / np.max(np.abs(np.linalg.eigvals(through))))
        alphas.append(alpha)
        epsilons.append(epsilon)

    def run(problem, alpha, epsilon, rate):
        inner_update, equilibrium = None, blx.WarmStart()
        if name == "Algorithm 1":
            inner = optax.sgd(alpha)
            response = blx.Unrolled(inner, num_terms)
            inner_update = blx.Unrolled(inner, 1)
        elif name == "Algorithm 3":
            equilibrium = blx.WarmStart(epsilon)
            response = blx.Proximal(epsilon, blx.Projection(), blx.Pseudoinverse())
        else:
            linear_solver = blx.Neumann(num_terms, alpha)
            response = blx.Implicit(blx.Projection(), linear_solver)
        return blx.solve(
            problem,
            equilibrium,
            x0,
            y0,
            pipeline=blx.GradientPipeline(response, optax.sgd(rate), inner_update),
            num_steps=4000,
            tolerance=1e-9,
            save_every=500,
            certify=False,
        )

    for i, (problem, (x, y)) in enumerate(zip(problems, expected)):
        solution = run(problem, *map(jnp.asarray, (alphas[i], epsilons[i], rates[i])))
        assert tree_allclose(solution.x, x, rtol=1e-7)
        assert tree_allclose(solution.y, y, rtol=1e-7)
        # The library's own closed form, which the examples are drawn with.
        if name == "Algorithm 3":
            filter = tasks.proximal_filter(epsilons[i])
        else:
            filter = tasks.neumann_filter(num_terms, alphas[i])
        assert tree_allclose(tasks.fixed_point(problem, filter), (x, y), rtol=1e-10)
        # That the filter matters: the limit is elsewhere.
        limit = _numpy_fixed_point(problem, np.linalg.pinv(problem.features))
        assert np.linalg.norm(limit[0] - x) > 1e-2


@pytest.mark.slow
def test_t10_default_cold_start_is_the_limit(as_optax_likes_it):
    # The whole of Figure 3's task, whose H has rank 13 and a condition number of 1e5.
    problem, x0, y0 = tasks.anti_distillation()
    solution = blx.solve(problem, blx.ColdStart(), x0, y0, num_steps=30)
    assert tree_allclose(solution.x, 2.0 * np.eye(13)[6], rtol=1e-6)
    phi = as_numpy(problem.features)
    assert tree_allclose(solution.y, np.linalg.pinv(phi)[:, 6] * 2, rtol=1e-6)
    assert solution.certificate.largest < 1e-6


#
# What a pipeline reports
#


@pytest.mark.slow
def test_inner_residuals():
    problem, x0, y0 = make_linear(LinearLeastSquares, jnp.float64)
    phi = as_numpy(problem.features)
    sgd = optax.sgd(0.4)
    settings = {
        # y is a function of x: nothing can lag, and it is not for the response to
        # finish what it was told to truncate.
        "cold unrolled": (blx.ColdStart(), blx.Unrolled(sgd, 2), None, True),
        "cold implicit": (
            blx.ColdStart(),
            blx.Implicit(blx.GradientDescent(0.4, 3), blx.Pseudoinverse(), None),
            None,
            False,
        ),
        "warm unrolled": (blx.WarmStart(), blx.Unrolled(sgd, 2), None, False),
        "cold inner_update": (
            blx.ColdStart(),
            blx.Unrolled(sgd, 2),
            blx.Unrolled(sgd, 1),
            False,
        ),
    }
    for name, (equilibrium, response, inner_update, is_zero) in settings.items():
        pipeline = blx.GradientPipeline(response, optax.sgd(0.1), inner_update)
        solution = blx.solve(
            problem,
            equilibrium,
            x0,
            y0,
            pipeline=pipeline,
            num_steps=2,
            certify=False,
        )
        x, y = as_numpy(solution.x), as_numpy(solution.y)
        if name in ("warm unrolled", "cold inner_update"):
            # Where the last inner step began: the gradient there is at hand.
            y = np.linalg.solve(np.eye(y.size) - 0.4 * phi.T @ phi, y - 0.4 * phi.T @ x)
        expected = 0.0 if is_zero else np.linalg.norm(phi.T @ (phi @ y - x))
        residual = solution.stats["inner_residual"]
        assert tree_allclose(residual, expected, rtol=1e-10)
        assert is_zero or expected > 1e-3


@pytest.mark.slow
def test_by_hand():
    # `init` and `step` are for use outside of `solve` too.
    problem, x0, y0 = make_linear(LinearLeastSquares, jnp.float64)
    pipeline = blx.GradientPipeline(exact, optax.sgd(0.1))
    equilibrium = blx.WarmStart()
    solution = blx.solve(
        problem, equilibrium, x0, y0, pipeline=pipeline, num_steps=3, certify=False
    )
    expected = blx.hypergradient(problem, x0, y0, exact)
    init, step = eqx.filter_jit(pipeline.init), eqx.filter_jit(pipeline.step)
    state = init(problem, equilibrium, x0, y0, jax.random.key(0))
    assert not state.started
    state, metrics = step(problem, equilibrium, state)
    assert tree_allclose(state.x, x0, rtol=0)
    assert tree_allclose(metrics["value"], expected.value, rtol=1e-12)
    assert tree_allclose(state.gradient, expected.gradient, rtol=1e-12)
    for i in range(3):
        state, metrics = step(problem, equilibrium, state)
        assert tree_allclose(metrics["value"], solution.history["value"][i], rtol=1e-12)
    assert tree_allclose((state.x, state.y), (solution.x, solution.y), rtol=1e-12)


#
# L-BFGS
#


def _searched(evaluate, descent=LBFGS()):
    """The point at the end of one search from x = 1, whose value there is 1."""
    x = jnp.array([1.0])
    answer = jnp.array(0)
    at = Point(x, jnp.array(1.0), jnp.array([1.0]), jnp.array(False), answer)
    settings = dict(project=lambda x: x, value_fn=lambda x: 0.0)
    first = lambda x: at  # noqa: E731
    state, at = advance(
        descent, descent.init(x), at, first, started=jnp.array(False), **settings
    )
    _, end = advance(descent, state, at, evaluate, started=jnp.array(True), **settings)
    return end


_DESCENTS = LBFGS(), SpectralProjectedGradient(), ProjectedQuasiNewton()
_NAMES = "L-BFGS", "spectral", "projected quasi-Newton"


@pytest.mark.parametrize("descent", _DESCENTS, ids=_NAMES)
@pytest.mark.parametrize("fails", (False, True))
def test_a_search_that_finds_nothing_better_stays(fails, descent):
    # Worse everywhere but where it starts, as within the noise of an inner solve; or no
    # evaluation but the first succeeds.
    def evaluate(x):
        value = jnp.where(fails, 0.0, 1.5)
        return Point(x, value, jnp.ones_like(x), jnp.array(fails), jnp.array(7))

    end = _searched(evaluate, descent)
    assert end.x == 1 and end.value == 1 and end.answer == 0 and not end.failed


@pytest.mark.parametrize("descent", _DESCENTS, ids=_NAMES)
def test_a_search_comes_back_from_where_the_evaluation_fails(descent):
    def evaluate(x):
        # What has failed may look good.
        failed = x[0] < 0.7
        value, slope = jnp.where(failed, -1.0, x[0] ** 2), 2 * x
        return Point(x, value, slope, failed, jnp.array(7))

    end = _searched(evaluate, descent)
    assert 0.7 <= end.x < 1 and end.value == end.x**2
    assert end.answer == 7 and not end.failed


@pytest.mark.slow
def test_a_search_takes_a_better_point_in_the_end():
    # The slope never flattens, so that the best point of those tried must do.
    def evaluate(x):
        value = jnp.where(x[0] < 0.9, 2.0, x[0])
        return Point(x, value, jnp.ones_like(x), jnp.array(False), jnp.array(7))

    end = _searched(evaluate)
    assert 0.9 <= end.x < 1 and end.value < 1 and end.answer == 7
