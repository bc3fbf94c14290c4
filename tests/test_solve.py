"""`solve`: that a run is the loop it stands for, when it stops, what it keeps, and
what it says when it fails."""

import concurrent.futures
import itertools
import os
import re
import signal
import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import (
    as_numpy,
    Counter,
    damped_jacobian,
    gradient_descent,
    linear_reference,
    LinearBilevel,
    LinearLeastSquares,
    make_linear,
    make_ridge,
    neumann_jacobian,
    project,
    STEP_SIZE,
    tolerance,
    toy_a,
    tree_allclose,
    tree_has_dtype,
    tree_identical,
)
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx._solve import segments, split


slow = pytest.mark.slow
exact = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
RATE = 0.1


def _points(x, y, metrics):
    return {"x": x, "y": y, "value": metrics["value"]}


#
# A run is a loop. The loops here are NumPy's.
#


def _algorithms():
    """A concept, a pipeline, and in NumPy: the response with its Jacobian, and the
    inner update."""
    K, epsilon = 3, 0.7
    sgd = optax.sgd(STEP_SIZE)
    outer = optax.sgd(RATE)

    def projection(phi, x, anchor):
        return project(phi, x, anchor), np.linalg.pinv(phi)

    def unroll(phi, x, anchor):
        y = gradient_descent(phi, x, anchor, K, STEP_SIZE)
        return y, neumann_jacobian(phi, K, STEP_SIZE)

    def one_step(phi, x, anchor):
        return gradient_descent(phi, x, anchor, 1, STEP_SIZE)

    def proximal(phi, x, anchor):
        hessian = phi.T @ phi + epsilon * np.eye(phi.shape[1])
        y = np.linalg.solve(hessian, phi.T @ x + epsilon * anchor)
        return y, damped_jacobian(phi, epsilon)

    def gradient(response, inner_update=None):
        return blx.GradientPipeline(response, outer, inner_update)

    algorithm_1 = gradient(blx.Unrolled(sgd, K), blx.Unrolled(sgd, 1))
    algorithm_3 = gradient(blx.Proximal(epsilon, blx.Projection(), lx.Cholesky()))
    cold, warm, partial = blx.ColdStart(), blx.WarmStart(), blx.WarmStart(epsilon)
    return {
        "full warm": (warm, gradient(exact), projection, None),
        "Algorithm 1": (warm, algorithm_1, unroll, one_step),
        "Algorithm 3": (partial, algorithm_3, proximal, None),
        "cold": (cold, gradient(exact), projection, None),
        "cold unrolled": (cold, gradient(blx.Unrolled(sgd, K)), unroll, None),
    }


def _numpy_run(problem, x, y0, warm, response, inner_update, num_steps):
    phi, x, y0 = as_numpy(problem.features), as_numpy(x), as_numpy(y0)
    outer_phi = as_numpy(problem.outer_features)
    targets = as_numpy(problem.outer_targets)
    y = y0
    ahead, jacobian = response(phi, x, y0)
    y = ahead if inner_update is None else y0
    history = []
    for _ in range(num_steps):
        x = x - RATE * linear_reference(problem, x, ahead, jacobian)
        if inner_update is not None:
            y = inner_update(phi, x, y if warm else y0)
        ahead, jacobian = response(phi, x, y if warm else y0)
        y = ahead if inner_update is None else y
        misfit = outer_phi @ ahead - targets
        value = 0.5 * misfit @ misfit + 0.25 * np.sum((x - 1) ** 2)
        history.append((x, y, value))
    return dict(zip(("x", "y", "value"), map(np.stack, zip(*history))))


@pytest.mark.parametrize("name", list(_algorithms()))
def test_a_run_is_a_loop(name):
    equilibrium, pipeline, response, inner_update = _algorithms()[name]
    problem, x0, y0 = make_linear(LinearLeastSquares, jnp.float64)
    run = dict(pipeline=pipeline, num_steps=7, record=_points, certify=False)
    solution = blx.solve(problem, equilibrium, x0, y0, **run)
    expected = _numpy_run(problem, x0, y0, equilibrium.warm, response, inner_update, 7)
    assert tree_allclose(solution.history, expected, rtol=1e-10)
    last = jtu.tree_map(lambda h: h[-1], expected)
    assert tree_allclose(solution.x, last["x"], rtol=1e-10)
    assert tree_allclose(solution.y, last["y"], rtol=1e-10)
    assert solution.result == blx.RESULTS.successful
    # The value is that of the point returned, which need not be the point ahead.
    value = problem.outer(solution.x, solution.y)
    assert tree_allclose(solution.value, value, rtol=1e-12)


def test_one_step_of_gradient_descent():
    """In float32. In float64, `test_a_run_is_a_loop` takes several."""
    dtype = jnp.float32
    problem, x0, y0 = make_linear(LinearBilevel, dtype)
    phi = as_numpy(problem.features)
    solution = blx.solve(
        problem,
        blx.WarmStart(),
        x0,
        y0,
        pipeline=blx.GradientPipeline(exact, optax.sgd(RATE)),
        num_steps=1,
    )
    y = project(phi, x0, y0)
    gradient = linear_reference(problem, x0, y, np.linalg.pinv(phi))
    x = as_numpy(x0) - RATE * gradient
    tol = tolerance(dtype)
    assert tree_allclose(solution.x, x, rtol=tol)
    assert tree_allclose(solution.y, project(phi, x, y), rtol=tol)
    assert tree_has_dtype(solution, dtype)


class Mixed(blx.AbstractBilevelProblem):
    """y = {"matrix": (u, 2 u), "scalar": v / (1 + |u|^2)}, with x = (u, {"v": v})."""

    def outer(self, x, y):
        misfit = jnp.sum((y["matrix"] - 1) ** 2) + (y["scalar"] - 1) ** 2
        return 0.5 * misfit + 0.05 * x[1]["v"] ** 2

    def inner(self, x, y):
        u, v = x[0], x[1]["v"]
        rows = jnp.stack([u, 2 * u])
        matrix = 0.5 * (1 + jnp.exp(v)) * jnp.sum((y["matrix"] - rows) ** 2)
        scalar = 0.5 * (1 + jnp.sum(u**2)) * y["scalar"] ** 2 - v * y["scalar"]
        return matrix + scalar

    def solution(self, x):
        u, v = x[0], x[1]["v"]
        return {"matrix": jnp.stack([u, 2 * u]), "scalar": v / (1 + jnp.sum(u**2))}


@pytest.mark.slow
def test_pytrees_of_mixed_shapes():
    problem = Mixed()
    x = jnp.array([0.3, -0.2, 0.5]), {"v": jnp.array(0.7)}
    y0 = {"matrix": jnp.ones((2, 3)), "scalar": jnp.array(0.0)}
    pipeline = blx.GradientPipeline(
        blx.Implicit(blx.Projection(), lx.Cholesky()), optax.sgd(RATE)
    )
    run = dict(pipeline=pipeline, num_steps=5, certify=False)
    solution = blx.solve(problem, blx.ColdStart(), x, y0, **run)

    @jax.jit
    def step(x):
        gradient = jax.grad(lambda x: problem.outer(x, problem.solution(x)))(x)
        return jtu.tree_map(lambda u, g: u - RATE * g, x, gradient)

    for _ in range(5):
        x = step(x)
    assert tree_allclose(solution.x, x, rtol=1e-10)
    assert tree_allclose(solution.y, problem.solution(x), rtol=1e-10)


#
# The state of an inner optimiser
#


@pytest.mark.parametrize("equilibrium", (blx.WarmStart(), blx.ColdStart()))
@pytest.mark.parametrize("with_inner_update", (False, True))
def test_inner_optimiser_state(equilibrium, with_inner_update):
    # Carried along with y under a warm start, begun anew under a cold one.
    problem, x0, y0 = make_ridge()
    y0 = y0 + 0.3
    optimiser = optax.sgd(0.05, momentum=0.9)
    inner_update = blx.Unrolled(optimiser, 1) if with_inner_update else None
    pipeline = blx.GradientPipeline(
        blx.Unrolled(optimiser, 2), optax.sgd(1.0), inner_update
    )
    run = dict(pipeline=pipeline, num_steps=6, record=_points, certify=False)
    solution = blx.solve(problem, equilibrium, x0, y0, **run)

    def unroll(x, y, velocity, num_steps):
        for _ in range(num_steps):
            velocity = 0.9 * velocity + jax.grad(problem.inner, argnums=1)(x, y)
            y = y - 0.05 * velocity
        return y, velocity

    @jax.jit
    def look_ahead(x, y, velocity):
        def value(x):
            answer = unroll(x, y, velocity, 2)
            return problem.outer(x, answer[0]), answer

        return jax.grad(value, has_aux=True)(x)

    def loop(carries):
        start = y0, jnp.zeros_like(y0)
        x, last = x0, start
        gradient, ahead = look_ahead(x, *start)
        if not with_inner_update:
            last = ahead
        history = []
        for _ in range(6):
            x = x - gradient
            anchor = last if carries else start
            if with_inner_update:
                last = anchor = unroll(x, *anchor, 1)
                anchor = anchor if carries else start
            gradient, ahead = look_ahead(x, *anchor)
            if not with_inner_update:
                last = ahead
            history.append((x, last[0]))
        return jnp.stack([x for x, _ in history]), jnp.stack([y for _, y in history])

    x, y = loop(equilibrium.warm)
    assert tree_allclose(solution.history["x"], x, rtol=1e-10)
    assert tree_allclose(solution.history["y"], y, rtol=1e-10)
    # That the two can be told apart here.
    other, _ = loop(not equilibrium.warm)
    assert np.max(np.abs(other - x)) > 1e-3


def test_adam_inside_and_outside():
    problem, x0, y0 = make_ridge()
    inner, outer = optax.adam(0.1), optax.adam(0.2)
    pipeline = blx.GradientPipeline(blx.Unrolled(inner, 2), outer)
    # Adam itself mixes types.
    with jax.numpy_dtype_promotion("standard"):
        run = dict(pipeline=pipeline, num_steps=4, certify=False)
        solution = blx.solve(problem, blx.WarmStart(), x0, y0, **run)

        @jax.jit
        def look_ahead(x, y, state):
            def value(x):
                y_, state_ = y, state
                for _ in range(2):
                    gradient = jax.grad(problem.inner, argnums=1)(x, y_)
                    updates, state_ = inner.update(gradient, state_, y_)
                    y_ = optax.apply_updates(y_, updates)
                return problem.outer(x, y_), (y_, state_)

            return jax.grad(value, has_aux=True)(x)

        x, outer_state = x0, outer.init(x0)
        gradient, answer = look_ahead(x0, y0, inner.init(y0))
        for _ in range(4):
            updates, outer_state = outer.update(gradient, outer_state, x)
            x = optax.apply_updates(x, updates)
            gradient, answer = look_ahead(x, *answer)
    assert tree_allclose(solution.x, x, rtol=1e-10)
    assert tree_allclose(solution.y, answer[0], rtol=1e-10)
    # Eight inner steps and the two of the beginning.
    assert optax.tree.get(solution.state.inner_state, "count") == 10


#
# A problem on which every number of a run is known. Its x moves by RATE a step, up to
# the value at which the outer objective stops being one.
#


class Cliff(blx.AbstractBilevelProblem):
    edge: Array

    def outer(self, x, y):
        return jnp.where(y > self.edge, jnp.nan, -y)

    def inner(self, x, y):
        return 0.5 * (y - x) ** 2


march = blx.GradientPipeline(
    blx.Implicit(blx.GradientDescent(1.0, 1), lx.Cholesky()), optax.sgd(RATE)
)
zero = jnp.array(0.0)


def _march(edge, num_steps, **kwargs):
    kwargs.setdefault("pipeline", march)
    kwargs.setdefault("record", _points)
    return blx.solve(
        Cliff(jnp.asarray(edge)),
        blx.WarmStart(),
        zero,
        zero,
        num_steps=num_steps,
        **kwargs,
    )


#
# The history
#


@pytest.mark.parametrize("save_every", (1, 4, 10, 11))
def test_history(save_every):
    solution = _march(np.inf, 10, save_every=save_every)
    steps = np.arange(save_every, 11, save_every)
    expected = {"x": RATE * steps, "y": RATE * steps, "value": -RATE * steps}
    assert tree_allclose(solution.history, expected, rtol=1e-12)
    # What does not divide the number of steps is taken all the same.
    assert tree_allclose(solution.x, 1.0, rtol=1e-12)
    assert solution.stats["num_steps"] == 10


def test_default_record():
    problem, x0, y0 = make_linear(LinearLeastSquares, jnp.float64)
    equilibrium, pipeline, response, inner_update = _algorithms()["Algorithm 1"]
    run = dict(pipeline=pipeline, num_steps=7, save_every=2, certify=False)
    solution = blx.solve(problem, equilibrium, x0, y0, **run)
    assert set(solution.history) == {"value", "outer_residual", "inner_residual"}
    run = _numpy_run(problem, x0, y0, True, response, inner_update, 7)
    phi = as_numpy(problem.features)
    for entry, step in enumerate((1, 3, 5)):
        x, y = run["x"][step], run["y"][step]
        gradient = linear_reference(problem, x, *response(phi, x, y))
        # Where the last inner step began.
        inner = np.linalg.norm(phi.T @ (phi @ run["y"][step - 1] - x))
        expected = {
            "value": run["value"][step],
            "outer_residual": np.linalg.norm(gradient),
            "inner_residual": inner,
        }
        got = {name: h[entry] for name, h in solution.history.items()}
        assert tree_allclose(got, expected, rtol=1e-10)
    # And the statistics are those of the last step, recorded or not.
    x, y = run["x"][6], run["y"][6]
    gradient = linear_reference(problem, x, *response(phi, x, y))
    outer = solution.stats["outer_residual"]
    assert tree_allclose(outer, np.linalg.norm(gradient), rtol=1e-10)


def test_record_of_a_pytree():
    def record(x, y, metrics):
        return {"sign": x > 0.25, "both": (x, 1), "count": jnp.asarray(3, jnp.int32)}

    history = _march(np.inf, 4, record=record).history
    assert history["sign"].dtype == bool
    assert history["sign"].tolist() == [False, False, True, True]
    assert history["both"][1].tolist() == [1] * 4
    assert history["count"].dtype == jnp.int32 and history["count"].shape == (4,)
    assert tree_allclose(history["both"][0], RATE * np.arange(1, 5), rtol=1e-12)


def test_no_record():
    assert _march(np.inf, 4, record=lambda x, y, metrics: None).history is None


def test_progress_is_reported():
    calls = []

    def report(step, num_steps, metrics):
        calls.append((step, num_steps, float(metrics["value"])))

    solution = _march(np.inf, 10, save_every=4, progress=report)
    jax.effects_barrier()
    assert tree_allclose(solution.x, 1.0, rtol=1e-12)
    expected = [(4, 10, -0.4), (8, 10, -0.8)]
    # The last two steps make no entry; that they are reported is no harm.
    assert np.allclose(calls[:2], expected)
    assert np.allclose(calls[2:], [(10, 10, -1.0)][: len(calls) - 2])


#
# Going on
#


@pytest.mark.slow
@pytest.mark.parametrize("equilibrium", (blx.WarmStart(), blx.ColdStart()))
def test_resumed_is_uninterrupted(equilibrium):
    problem, x0, y0 = make_ridge()
    momentum = optax.sgd(0.05, momentum=0.9)
    inner_update = blx.Unrolled(momentum, 1) if equilibrium.warm else None
    pipeline = blx.GradientPipeline(
        blx.Unrolled(momentum, 2), optax.sgd(0.3, momentum=0.5), inner_update
    )

    def run(num_steps, x, y, state=None):
        return blx.solve(
            problem,
            equilibrium,
            x,
            y,
            pipeline=pipeline,
            num_steps=num_steps,
            state=state,
            record=_points,
        )

    whole = run(10, x0, y0)
    first = run(4, x0, y0)
    # Only the shapes of these count, where the start is not part of the question.
    x, y = (x0 + 5, y0 - 7) if equilibrium.warm else (x0, y0)
    second = run(6, x, y, first.state)
    assert tree_identical(whole.state, second.state)
    for attribute in ("x", "y", "value", "certificate"):
        assert tree_identical(getattr(whole, attribute), getattr(second, attribute))
    joined = jtu.tree_map(
        lambda u, v: jnp.concatenate([u, v]), first.history, second.history
    )
    assert tree_identical(whole.history, joined)
    # That there was anything to carry on: a fresh start from there goes elsewhere.
    fresh = run(4, first.x, first.y)
    assert not np.allclose(fresh.x, whole.history["x"][7], rtol=1e-4)


#
# Stopping
#

# y lags behind x, both overshoot, and the hypergradient crosses zero in passing.
lagging = blx.GradientPipeline(
    blx.Unrolled(optax.sgd(0.1), 1), optax.sgd(2.0), blx.Unrolled(optax.sgd(0.1), 1)
)
TOLERANCE = 0.01


def _spring(tolerance, num_steps=400, save_every=1, x0=zero, **kwargs):
    return blx.solve(
        Spring(jnp.array(1.0)),
        blx.WarmStart(),
        x0,
        zero,
        pipeline=lagging,
        num_steps=num_steps,
        tolerance=tolerance,
        save_every=save_every,
        **kwargs,
    )


class Spring(blx.AbstractBilevelProblem):
    target: Array

    def outer(self, x, y):
        return 0.5 * (y - self.target) ** 2

    def inner(self, x, y):
        return 0.5 * (y - x) ** 2


def _spring_residuals(x, num_steps=400):
    """Both residuals after each step, by hand."""
    y, residuals = 0.0, []
    for _ in range(num_steps):
        ahead = y + 0.1 * (x - y)
        x = x - 2.0 * 0.1 * (ahead - 1)
        # The inner residual is where the inner step begins.
        inner = abs(y - x)
        y = y + 0.1 * (x - y)
        ahead = y + 0.1 * (x - y)
        residuals.append((abs(0.1 * (ahead - 1)), inner, x))
    return np.array(residuals)


@pytest.mark.parametrize("save_every", (1, 5))
def test_stops_on_both_residuals(save_every):
    residuals = _spring_residuals(0.0)
    small = residuals[:, :2] <= TOLERANCE
    stop = int(np.argmax(small.all(axis=1))) + 1
    # Either alone would stop in passing, far from the equilibrium at 1.
    for alone in small.T:
        early = int(np.argmax(alone))
        assert early < stop - 5 and abs(residuals[early, 2] - 1) > 0.2
    solution = _spring(TOLERANCE, save_every=save_every)
    assert solution.result == blx.RESULTS.successful
    assert solution.stats["num_steps"] == stop
    assert tree_allclose(solution.x, residuals[stop - 1, 2], rtol=1e-10)
    outer = residuals[save_every - 1 : stop : save_every, 0]
    assert outer.shape == (stop // save_every,)
    assert tree_allclose(solution.history["outer_residual"], outer, rtol=1e-8)


def test_stops_under_vmap():
    # Each element at a step of its own, with what is never reached blank.
    starts = jnp.array([0.0, 0.9, 3.0])
    solution = jax.vmap(lambda x0: _spring(TOLERANCE, x0=x0, certify=False))(starts)
    for i, start in enumerate(starts):
        residuals = _spring_residuals(float(start))
        small = residuals[:, :2] <= TOLERANCE
        stop = int(np.argmax(small.all(axis=1))) + 1
        assert solution.stats["num_steps"][i] == stop
        assert tree_allclose(solution.x[i], residuals[stop - 1, 2], rtol=1e-10)
        outer = solution.history["outer_residual"][i]
        assert tree_allclose(outer[:stop], residuals[:stop, 0], rtol=1e-8)
        assert np.all(np.isnan(outer[stop:]))


def test_tolerance_not_reached():
    with pytest.raises(eqx.EquinoxRuntimeError) as info:
        _spring(TOLERANCE, num_steps=12)
    outer, inner, x = _spring_residuals(0.0)[11]
    numbers = (
        f"After 12 outer steps the outer residual is {outer:.3g} and the inner residual "
        f"{inner:.3g}."
    )
    assert numbers in str(info.value)
    assert "did not both fall below `tolerance`" in str(info.value)
    solution = _spring(TOLERANCE, num_steps=12, throw=False)
    assert solution.result == blx.RESULTS.outer_max_steps_reached
    assert tree_allclose(solution.x, x, rtol=1e-10)
    assert solution.history["value"].shape == (12,)


#
# Failing
#


@pytest.mark.parametrize("save_every", (1, 5, 7, 11, 20))
def test_failure_at_a_known_step(save_every):
    # x is 1.1 after step 11, which is the first of a block, or the last, or between.
    solution = _march(1.05, 15, save_every=save_every, throw=False)
    assert solution.result == blx.RESULTS.nonfinite_step
    assert solution.stats["num_steps"] == 10
    short = _march(1.05, 10)
    assert tree_identical(solution.state, short.state)
    for name in ("x", "y", "value", "certificate"):
        assert tree_identical(getattr(solution, name), getattr(short, name))
    expected = jtu.tree_map(lambda h: h[save_every - 1 :: save_every], short.history)
    assert solution.history["x"].shape == (10 // save_every,)
    assert tree_allclose(solution.history, expected, rtol=1e-12)
    with pytest.raises(eqx.EquinoxRuntimeError, match="At outer step 11: NaN or inf"):
        _march(1.05, 15, save_every=save_every)
    # Had it ended there, nothing would have been amiss.
    assert short.result == blx.RESULTS.successful


@pytest.mark.slow
@pytest.mark.parametrize("save_every", (1, pytest.param(7, marks=slow)))
def test_one_failure_of_a_batch(save_every):
    edges = jnp.array([1.05, np.inf, 0.25])

    def run(edge):
        return _march(edge, 15, save_every=save_every, throw=False, certify=False)

    solution = jax.vmap(run)(edges)
    assert solution.stats["num_steps"].tolist() == [10, 15, 2]
    failed = solution.result != blx.RESULTS.successful
    assert failed.tolist() == [True, False, True]
    for i, edge in enumerate(edges):
        alone = run(edge)
        assert tree_allclose(solution.x[i], alone.x, rtol=1e-12)
        assert tree_allclose(solution.y[i], alone.y, rtol=1e-12)
        kept = len(alone.history["x"])
        history = jtu.tree_map(lambda h: h[i], solution.history)
        start = jtu.tree_map(lambda h: h[:kept], history)
        assert tree_allclose(start, alone.history, rtol=1e-12)
        assert np.all(np.isnan(history["x"][kept:]))
    if save_every == 1:
        with pytest.raises(eqx.EquinoxRuntimeError, match="NaN or infinity appeared"):
            jax.vmap(lambda edge: _march(edge, 15, certify=False))(edges)


@pytest.mark.parametrize("dtype", (pytest.param(jnp.float64, marks=slow), jnp.float32))
def test_divergence(dtype):
    # x is multiplied by -9999 a step, until the square of it overflows.
    problem = blx.BilevelProblem(
        outer=lambda x, y: 0.5 * y**2, inner=lambda x, y: 0.5 * (y - x) ** 2
    )
    one = jnp.ones((), dtype)
    pipeline = blx.GradientPipeline(exact, optax.sgd(1e4))
    fixed = dict(pipeline=pipeline, num_steps=60, certify=False)
    largest = float(jnp.finfo(dtype).max)
    good = int(np.floor(np.log(largest) / 2 / np.log(9999)))

    def run(**kwargs):
        return blx.solve(problem, blx.WarmStart(), one, one, **fixed, **kwargs)

    with pytest.raises(eqx.EquinoxRuntimeError, match=f"At outer step {good + 1}: "):
        run()
    solution = run(throw=False)
    assert solution.stats["num_steps"] == good
    assert tree_allclose(solution.x, (-9999.0) ** good, rtol=1e-4)
    assert np.isfinite(solution.value)
    assert solution.history["value"].shape == (good,)
    assert np.all(np.isfinite(solution.history["value"]))


def _failures():
    sgd = optax.sgd(RATE)
    slow = blx.Implicit(blx.GradientDescent(1e-3, 1), lx.Cholesky())
    wild = blx.Implicit(blx.Projection(), blx.Neumann(30, 2.5))
    return {
        "inner": (slow, "inner solve did not converge", "inner_not_converged"),
        "neumann": (wild, "Neumann series diverges", "neumann_diverged"),
        "nothing": (blx.Fixed(), "hypergradient is exactly zero", "zero_hypergradient"),
    }, sgd


@pytest.mark.parametrize("name", list(_failures()[0]))
def test_failure_from_the_start(name):
    failures, optimiser = _failures()
    response, match, result = failures[name]
    pipeline = blx.GradientPipeline(response, optimiser)
    problem = Spring(jnp.array(1.0))
    x0, y0 = jnp.array(0.5), jnp.array(0.2)

    def run(**kwargs):
        return blx.solve(
            problem, blx.WarmStart(), x0, y0, pipeline=pipeline, num_steps=5, **kwargs
        )

    with pytest.raises(eqx.EquinoxRuntimeError, match=f"At outer step 1: .*{match}"):
        run()
    solution = run(throw=False)
    assert solution.result == getattr(blx.RESULTS, result)
    assert solution.stats["num_steps"] == 0
    assert tree_allclose(solution.x, x0, rtol=0)
    assert solution.history["value"].shape == (0,)


def test_nan_at_the_start():
    for x0, y0 in ((jnp.array(np.nan), zero), (zero, jnp.array(np.nan))):
        with pytest.raises(eqx.EquinoxRuntimeError, match="NaN or infinity appeared"):
            blx.solve(
                Spring(jnp.array(1.0)),
                blx.WarmStart(),
                x0,
                y0,
                pipeline=lagging,
                num_steps=5,
            )


#
# Transformations. Toy A has a closed form for each of these.
#

toy = toy_a()
C = 0.4
start = jnp.array([0.1, C])


def _toy(equilibrium, response, rate=0.5, num_steps=80, w0=zero, y0=start, **kwargs):
    return blx.solve(
        toy,
        equilibrium,
        w0,
        y0,
        pipeline=blx.GradientPipeline(response, optax.sgd(rate)),
        num_steps=num_steps,
        **kwargs,
    )


@pytest.mark.slow
def test_vmap_over_initial_points():
    w0 = jnp.array([0.0, -1.0, 2.0])
    y0 = jnp.array([[0.1, 0.4], [0.0, -1.0], [3.0, 1.5]])
    solution = jax.vmap(lambda w, y: _toy(blx.WarmStart(), exact, w0=w, y0=y))(w0, y0)
    assert tree_allclose(solution.x, (1 + y0[:, 1]) / 2, rtol=1e-10)
    assert np.all(solution.certificate.largest < 1e-8)


@pytest.mark.slow
def test_vmap_over_epsilon():
    epsilon = jnp.array([0.05, 0.5, 3.0])

    def run(e):
        response = blx.Proximal(e, blx.Projection(), blx.Pseudoinverse())
        return _toy(blx.WarmStart(e), response)

    solution = jax.vmap(run)(epsilon)
    w = (1 + C * (1 + epsilon)) / (2 + epsilon)
    assert tree_allclose(solution.x, w, rtol=1e-10)
    assert np.all(solution.certificate.largest < 1e-8)


@pytest.mark.slow
def test_vmap_over_the_number_of_steps():
    """Of a series. (Of unrolled steps: `test_response.test_traced_num_steps`.)"""
    num_steps = jnp.array([1, 3, 20])

    def run(K):
        response = blx.Implicit(blx.Projection(), blx.Neumann(K, 0.3))
        return _toy(blx.WarmStart(), response, num_steps=300, certify=False)

    solution = jax.vmap(run)(num_steps)
    m = 1 - 0.7 ** np.asarray(num_steps)
    assert tree_allclose(solution.x, (C + m) / (1 + m), rtol=1e-10)


@pytest.mark.slow
def test_vmap_over_data_and_rates():
    targets = jnp.array([1.0, -2.0])
    rates = jnp.array([0.3, 0.5])

    def run(target, rate):
        pipeline = blx.GradientPipeline(exact, optax.sgd(rate))
        fixed = dict(pipeline=pipeline, num_steps=9, certify=False)
        return blx.solve(Spring(target), blx.ColdStart(), zero, zero, **fixed)

    solution = jax.vmap(run)(targets, rates)
    expected = targets * (1 - (1 - rates) ** 9)
    assert tree_allclose(solution.x, expected, rtol=1e-10)


def test_jit():
    jitted = eqx.filter_jit(lambda w0, **kwargs: _toy(blx.WarmStart(), exact, w0=w0))
    solution = jitted(jnp.array(2.0))
    assert tree_allclose(solution.x, (1 + C) / 2, rtol=1e-10)
    assert solution.history["value"].shape == (80,)
    # The sentence comes through; the numbers cannot.
    failing = eqx.filter_jit(lambda edge: _march(edge, 15, certify=False).x)
    with pytest.raises(eqx.EquinoxRuntimeError, match="NaN or infinity appeared"):
        failing(jnp.array(1.05))
    # A history that is cut short outside of `jit` has a fixed shape inside.
    run = dict(throw=False, certify=False)
    stopped = eqx.filter_jit(lambda edge: _march(edge, 15, **run))
    history = stopped(jnp.array(1.05)).history["x"]
    assert tree_allclose(history[:10], RATE * np.arange(1, 11), rtol=1e-12)
    assert history.shape == (15,) and np.all(np.isnan(history[10:]))


@pytest.mark.slow
def test_float32_stays_float32():
    # With 64-bit types on. (Without a state of its own: `test_pipeline.test_toy_a`.)
    y0 = start.astype(jnp.float32)
    w0 = zero.astype(jnp.float32)
    response = blx.Unrolled(optax.sgd(0.3, momentum=0.3), 30)
    solution = _toy(blx.WarmStart(), response, w0=w0, y0=y0)
    assert tree_has_dtype(solution, jnp.float32)
    assert tree_allclose(solution.x, (1 + C) / 2, rtol=1e-5)


def test_new_data_do_not_recompile():
    traces = []

    class Traced(blx.AbstractBilevelProblem):
        target: Array

        def outer(self, x, y):
            traces.append(None)
            return 0.5 * (y - self.target) ** 2

        def inner(self, x, y):
            return 0.5 * (y - x) ** 2

    counts = []
    for target, x0 in ((1.0, 0.0), (2.0, 0.5)):
        problem, x0 = Traced(jnp.array(target)), jnp.array(x0)
        blx.solve(problem, blx.WarmStart(), x0, zero, pipeline=march, num_steps=3)
        counts.append(len(traces))
    assert 0 < counts[0] == counts[1]


#
# What cannot be right
#


def _good():
    return dict(
        problem=Spring(jnp.array(1.0)),
        equilibrium=blx.WarmStart(),
        x0=zero,
        y0=zero,
        pipeline=march,
        num_steps=3,
    )


@pytest.mark.parametrize(
    "bad, match",
    (
        ({"num_steps": 0}, r"`solve\(num_steps=...\)` must be at least one; it is 0"),
        ({"num_steps": 2.5}, r"`solve\(num_steps=...\)` must be a positive integer"),
        ({"save_every": 0}, r"`solve\(save_every=...\)` must be at least one"),
        ({"tolerance": 0.0}, r"`solve\(tolerance=...\)` must be greater than zero"),
        ({"tolerance": -1.0}, r"`solve\(tolerance=...\)` must be greater than zero"),
        ({"x0": jnp.array(1)}, r"every leaf of `x0` .* type int64"),
        ({"y0": {"a": [0.5]}}, r"Every leaf of `y0` .*`y0\['a'\]\[0\]` is 0\.5"),
        ({"y0": jnp.arange(3)}, r"Every leaf of `y0` .* type int64"),
        ({"pipeline": "newton"}, "No pipeline `newton` is registered for `WarmStart`"),
    ),
)
def test_wrong_arguments(bad, match):
    arguments = {**_good(), **bad}
    with pytest.raises(ValueError, match=f"(?is){match}"):
        blx.solve(**arguments)


@pytest.mark.parametrize("name", ("outer", "inner"))
def test_not_a_scalar(name):
    objectives = {
        "outer": lambda x, y: 0.5 * jnp.sum((y - 1) ** 2),
        "inner": lambda x, y: 0.5 * jnp.sum((y - x) ** 2),
        name: lambda x, y: y - x,
    }
    arguments = {**_good(), "x0": jnp.zeros(2), "y0": jnp.zeros(2)}
    arguments["problem"] = blx.BilevelProblem(**objectives)
    match = rf"The {name} objective must return .*scalar.* shape \(2,\)"
    with pytest.raises(ValueError, match=match):
        blx.solve(**arguments)


def test_inner_objective_without_y():
    arguments = {
        **_good(),
        "problem": blx.BilevelProblem(lambda x, y: (y - x) ** 2, lambda x, y: x**2),
    }
    with pytest.raises(ValueError, match="inner objective does not depend on y"):
        blx.solve(**arguments)


def test_unregistered_equilibrium():
    class Unheard(blx.AbstractEquilibrium):
        warm = True

        def certify(self, problem, x, y, y0):
            return blx.Certificate("nothing", {})

    arguments = {**_good(), "equilibrium": Unheard(), "pipeline": None}
    with pytest.raises(ValueError) as info:
        blx.solve(**arguments)
    assert "No pipeline is registered for `Unheard`" in str(info.value)
    # The refusal lists what there is.
    for concept in ("ColdStart", "WarmStart"):
        assert concept in str(info.value)
    # A pipeline that is given needs no registry.
    arguments["pipeline"] = march
    solution = blx.solve(**arguments)
    assert tree_allclose(solution.x, 1 - 0.9**3, rtol=1e-10)


#
# Segments: a run outside of transformations is cut where the host has something to do.
#


@pytest.fixture
def cut(monkeypatch):
    """Sets the lengths of the segments, in steps, and keeps those that were run."""

    def set_lengths(lengths):
        lengths, taken = itertools.cycle(lengths), []
        monkeypatch.setattr(
            segments._Pace, "end", lambda self, done, save_every: done + next(lengths)
        )
        monkeypatch.setattr(
            segments._Pace, "took", lambda self, steps, seconds: taken.append(steps)
        )
        return taken

    return set_lengths


@pytest.mark.parametrize("save_every", (pytest.param(1, marks=slow), 4))
def test_the_answer_does_not_depend_on_the_cuts(cut, save_every):
    problem, x0, y0 = make_ridge()
    momentum = optax.sgd(0.05, momentum=0.9)
    pipeline = blx.GradientPipeline(
        blx.Unrolled(momentum, 2), optax.adam(0.1), blx.Unrolled(momentum, 1)
    )

    def run(lengths):
        taken = cut(lengths)
        # Adam itself mixes types.
        with jax.numpy_dtype_promotion("standard"):
            solution = blx.solve(
                problem,
                blx.WarmStart(),
                x0,
                y0,
                pipeline=pipeline,
                num_steps=150,
                save_every=save_every,
                record=_points,
                certify=False,
            )
        return solution, taken

    whole, taken = run([1000])
    assert taken == [150]
    for lengths in ([1], [7, 1, 30], [50, 2]):
        solution, taken = run(lengths)
        assert len(taken) > 4 and sum(taken) == 150
        assert tree_identical(solution, whole)


@pytest.mark.parametrize("save_every", (pytest.param(1, marks=slow), 7))
def test_a_failure_does_not_depend_on_the_cuts(cut, save_every):
    # Also where it fails in the first step of a segment, and after more than a round.
    whole = None
    for lengths in ([1000], [1], [70, 6, 34], [110]):
        cut(lengths)
        solution = _march(11.05, 150, save_every=save_every, throw=False)
        assert solution.stats["num_steps"] == 110
        assert tree_allclose(solution.x, 11.0, rtol=1e-10)
        whole = solution if whole is None else whole
        assert tree_identical(solution, whole)


def test_the_callers_arrays_stay_valid():
    problem, x0, y0 = make_ridge()
    gradient = blx.GradientPipeline(exact, optax.sgd(RATE))
    run = dict(num_steps=3, pipeline=gradient)
    first = blx.solve(problem, blx.WarmStart(), x0, y0, **run)
    again = blx.solve(problem, blx.WarmStart(), x0, y0, **run, state=first.state)
    for tree in (problem, x0, y0, first, again):
        leaves = jtu.tree_leaves(tree)
        assert not any(isinstance(u, jax.Array) and u.is_deleted() for u in leaves)


def test_segments_take_about_as_long_as_they_should():
    pace = segments._Pace()
    # The first is there to be compiled.
    for num_steps, seconds, then in (
        (0, 20.0, 1),
        (1, 1e-3, 100),
        (100, 0.1, 1000),
        (1000, 2.0, 500),
        (500, 500.0, 1),
    ):
        assert pace.end(0, 1) == num_steps
        pace.took(num_steps, seconds)
        assert pace.length == then
    # A short run at the end does not shorten those of the next run.
    pace.length = 5000
    pace.took(3, 1e-4)
    assert pace.length == 5000
    # They end with an entry of the history, if there is one in reach.
    pace.length = 500
    assert pace.end(130, 100) == 600
    assert pace.end(130, 1000) == 630


def test_a_run_of_a_known_program_is_one_segment(monkeypatch):
    """The first one is cut short, to see how long its steps take."""
    segment, lengths = segments._segment, []

    def counted(given, carry, room):
        lengths[-1].append(int(given[0][1]))
        return segment(given, carry, room)

    monkeypatch.setattr(segments, "_segment", counted)
    segments._pace_of.cache_clear()
    ends = []
    for num_steps in (20, 20, 200):
        lengths.append([])
        ends.append(_march(np.inf, num_steps, certify=False))
    assert lengths[0][:2] == [0, 1] and lengths[1] == [20]
    # With room for a longer history it is another program, which is compiled first.
    assert lengths[2][:2] == [0, 1]
    assert eqx.tree_equal(*(end.history for end in ends[:2]))


#
# Ctrl-C
#


def _after(step, action):
    """A function for `progress` that acts once, at a given step."""

    def report(at, num_steps, metrics):
        if at == step:
            action()

    return report


def _press():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("tolerance", (None, pytest.param(1e-12, marks=slow)))
def test_interrupted(cut, tolerance):
    cut([10])
    options = {"record": _points, "progress": _after(20, _press), "tolerance": tolerance}
    handler = signal.getsignal(signal.SIGINT)
    solution = _march(np.inf, 1000, throw=False, **options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert solution.result == blx.RESULTS.interrupted
    assert solution.stats["num_steps"] == 20
    assert tree_allclose(solution.history["x"], RATE * np.arange(1, 21), rtol=1e-10)
    assert tree_allclose(solution.x, 2.0, rtol=1e-10)
    assert solution.certificate is not None
    assert "Ctrl-C interrupted the run" in str(solution)
    with pytest.raises(KeyboardInterrupt, match="after step 20 of 1000. Nothing of it"):
        _march(np.inf, 1000, **options)
    assert signal.getsignal(signal.SIGINT) is handler
    # One that has just ended, or failed by itself, has heard it too.
    with pytest.raises(KeyboardInterrupt, match="after step 20 of 20"):
        _march(np.inf, 20, **options)


def test_interrupted_while_it_waits():
    """By a signal that comes while the program runs."""

    def wait(x):
        time.sleep(0.02)
        return x

    class Slow(blx.AbstractPipeline):
        def init(self, problem, equilibrium, x, y, key):
            return march.init(problem, equilibrium, x, y, key)

        def step(self, problem, equilibrium, state):
            shape = jax.ShapeDtypeStruct((), state.x.dtype)
            x = jax.pure_callback(wait, shape, state.x)
            return march.step(problem, equilibrium, eqx.tree_at(lambda s: s.x, state, x))

    options = {"pipeline": Slow(), "certify": False, "save_every": 10_000}

    def run():
        return _march(np.inf, 9_999, throw=False, **options)

    def press_in(*moments):
        for moment in moments:
            threading.Timer(moment, os.kill, (os.getpid(), signal.SIGINT)).start()

    _march(np.inf, 3, **options)
    press_in(1.0)
    solution = run()
    assert solution.result == blx.RESULTS.interrupted
    steps = int(solution.stats["num_steps"])
    assert 0 < steps < 500
    assert tree_allclose(solution.x, RATE * steps, rtol=1e-10)
    # A second one does not wait for the end of a segment, if Python runs before.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments._Pace, "end", lambda self, done, save_every: 9_999)
        press_in(0.3, 0.6)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run()
        assert time.monotonic() - began < 60
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_are_left_alone():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        solution = _march(np.inf, 30, progress=_after(20, _press))
        assert solution.stats["num_steps"] == 30 and heard == [True]
    finally:
        signal.signal(signal.SIGINT, before)
    # Another thread than the main one may not handle signals.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(_march, np.inf, 30).result().stats["num_steps"] == 30


@pytest.mark.parametrize("traced", (False, True))
def test_reports_of_a_failed_run(cut, traced):
    """Each once, also the last one."""
    cut([6])
    for save_every, steps in ((1, range(1, 11)), (4, (4, 8, 10)), (20, (10,))):
        said = []

        def report(step, num_steps, metrics, said=said):
            said.append((step, num_steps))

        def run(edge, options=dict(save_every=save_every, progress=report)):
            return _march(edge, 15, throw=False, certify=False, **options).x

        (jax.jit(run) if traced else run)(jnp.array(1.05))
        jax.effects_barrier()
        assert said == [(step, 15) for step in steps]


#
# The certificate is asked for, or not
#


@pytest.mark.slow
def test_certificate_not_asked_for():
    asked = _march(np.inf, 5)
    for run in (
        lambda **kwargs: _march(np.inf, 5, **kwargs),
        lambda **kwargs: eqx.filter_jit(_march)(jnp.array(np.inf), 5, **kwargs),
    ):
        solution = run(certify=False)
        assert solution.certificate is None
        assert tree_identical(solution.state, asked.state)
        text = str(solution)
        assert "certificate: not asked for" in text
        assert re.search(r"F +-0\.5\n", text) and re.search(r"steps +5\n", text)
        assert re.search(r"result +successful\n", text)
        assert f"{solution.result}" == "successful"
        assert re.search(r"outer_residual +1\n", text)
    text = str(asked)
    assert str(asked.certificate) in text and "not asked for" not in text
    quiet = dict(throw=False, certify=False)
    batch = jax.vmap(lambda e: _march(e, 5, **quiet))(jnp.array([0.25, np.inf]))
    assert re.search(r"result +1 of 2 successful\n", str(batch))


def test_the_certificate_is_a_program_of_its_own(monkeypatch):
    certificates = []

    class Counted(blx.AbstractEquilibrium):
        warm = True

        def certify(self, problem, x, y, y0):
            certificates.append(None)
            return blx.Certificate("counted", {"x": (jnp.abs(x), "x")})

    for response in (exact, blx.Unrolled(optax.sgd(0.1), 2)):
        for num_steps in (2, 3):
            solution = blx.solve(
                Spring(jnp.array(1.0)),
                Counted(),
                zero,
                zero,
                pipeline=blx.GradientPipeline(response, optax.sgd(RATE)),
                num_steps=num_steps,
            )
            assert solution.certificate.largest == jnp.abs(solution.x)
    assert len(certificates) == 1


@pytest.mark.slow
def test_a_value_that_is_closed_over_is_transformed():
    def run(target):
        problem = blx.BilevelProblem(
            lambda x, y: 0.5 * (y - target) ** 2, lambda x, y: 0.5 * (y - x) ** 2
        )
        fixed = dict(pipeline=march, num_steps=9, certify=False)
        return blx.solve(problem, blx.WarmStart(), zero, zero, **fixed).x

    targets = jnp.array([1.0, -2.0])
    expected = targets * (1 - 0.9**9)
    assert tree_allclose(jax.vmap(run)(targets), expected, rtol=1e-10)


#
# The program
#


def test_each_part_is_in_the_program_once():
    """A step, `record` and the start are traced into the loop once, and the metrics of a
    step that nobody looks at are not computed."""
    counter = {name: Counter() for name in ("init", "step", "metrics", "record")}

    class Counting(blx.AbstractPipeline):
        def init(self, problem, equilibrium, x, y, key):
            return march.init(problem, equilibrium, counted("init", x), y, key)

        def step(self, problem, equilibrium, state):
            state = eqx.tree_at(lambda s: s.x, state, counted("step", state.x))
            state, metrics = march.step(problem, equilibrium, state)
            return state, metrics | {"value": jnp.sinh(metrics["value"])}

    def counted(name, x):
        # With an effect, which no compiler takes away.
        counter[name].when_run()
        return x

    def record(x, y, metrics):
        return jnp.cosh(counted("record", metrics["value"]))

    def run(edge):
        return _march(
            edge,
            10,
            pipeline=Counting(),
            record=record,
            save_every=5,
            certify=False,
            throw=False,
        )

    text = eqx.filter_jit(run).lower(jnp.array(np.inf)).as_text()
    assert text.count("chlo.sinh") == text.count("chlo.cosh") == 1
    solution = run(jnp.array(np.inf))
    # The first step only evaluates the initial point.
    assert [counter[name].read() for name in ("init", "step")] == [1, 11]
    assert tree_allclose(solution.history, np.cosh(np.sinh([-0.5, -1.0])), rtol=1e-12)


def test_a_step_is_traced_once():
    # Though a run begins in one program and goes on in another.
    traced = []

    class Counting(blx.GradientPipeline):
        def step(self, problem, equilibrium, state):
            traced.append(state)
            return super().step(problem, equilibrium, state)

    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    pipeline = Counting(response, optax.sgd(0.1))
    x, y = jnp.array([1.0]), jnp.zeros(2)
    for scale in (1.0, 2.0):
        problem = blx.BilevelProblem(
            inner=lambda x, y: jnp.sum((y - x) ** 2),
            outer=lambda x, y: jnp.sum((y - 1) ** 2),
        )
        blx.solve(problem, blx.WarmStart(), scale * x, y, pipeline=pipeline, num_steps=3)
        assert len(traced) == 1
        traced.clear()


@pytest.mark.slow
def test_what_is_needed_later_is_computed_later():
    def fn(x):
        u = jnp.sin(x["a"])
        state = {"a": u + x["b"], "b": x["b"]}
        return state, jnp.sum(u) > 0, {"m": jnp.tanh(u) + jnp.exp(state["a"]), "n": 1.0}

    x = {"a": jnp.arange(3.0), "b": jnp.ones(3)}
    halves = split.split(*jax.make_jaxpr(fn, return_shape=True)(x))
    early = str(jax.make_jaxpr(halves.first)(x))
    late = str(jax.make_jaxpr(halves.second)(x, [x["a"]]))
    assert "sin" in early and "tanh" not in early and "exp" not in early
    assert "sin" not in late and "tanh" in late and "exp" in late
    state, facts, rest = halves.first(x)
    assert len(rest) == 1
    got = state, facts, halves.second(state, rest)
    assert tree_allclose(got, fn(x), rtol=1e-15)
