import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from helpers import (
    as_numpy,
    descend,
    dtypes,
    gradient_descent,
    LinearBilevel,
    LinearLeastSquares,
    make_curved,
    make_features,
    make_linear,
    make_moving,
    make_softmax,
    moving_features,
    project,
    resolve,
    tolerance,
    tree_allclose,
    tree_has_dtype,
)
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx._inner_solver.minimum import minimise_inner


@eqx.filter_jit
def _minimise(fn, solver, y0, args=None, max_steps=None):
    """As any optimistix minimiser."""
    solution = optx.minimise(fn, solver, y0, args, max_steps=max_steps)
    return solution.value, solution.stats["num_steps"]


def _least_squares(y, args):
    features, x = args
    return 0.5 * jnp.sum((features @ y - x) ** 2)


def _arguments(dtype=jnp.float64):
    problem, x, y = make_linear(LinearBilevel, dtype)
    return (problem.features, x), y


#
# Gradient descent
#


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("num_steps", (1, 7))
def test_gradient_descent(num_steps, dtype):
    args, y0 = _arguments(dtype)
    solver = blx.GradientDescent(0.4, num_steps)
    y, count = _minimise(_least_squares, solver, y0, args)
    expected = gradient_descent(*args, y0, num_steps, 0.4)
    assert tree_allclose(y, expected, rtol=tolerance(dtype))
    assert tree_has_dtype(y, dtype)
    assert count == num_steps


@pytest.mark.parametrize("dtype", dtypes)
def test_t6_gradient_descent_tends_to_the_projection(dtype):
    args, y0 = _arguments(dtype)
    solver = blx.GradientDescent(0.4, 300)
    y, _ = _minimise(_least_squares, solver, y0, args)
    assert tree_allclose(y, project(*args, y0), rtol=tolerance(dtype))
    # What it leaves alone is the part that f does not see: not the point of least norm.
    assert not tree_allclose(y, project(*args, jnp.zeros_like(y0)), rtol=1e-2)


def test_gradient_descent_on_pytrees():
    problem, x, y0 = make_softmax()
    solver = blx.GradientDescent(0.5, 3)
    y, _ = _minimise(lambda y, args: problem.inner(x, y), solver, y0)
    assert tree_allclose(y, descend(problem, x, y0, 3, 0.5), rtol=1e-13)


def test_gradient_descent_step_sizes_under_vmap():
    args, y0 = _arguments()

    def descend(step_size):
        return _minimise(
            _least_squares, blx.GradientDescent(step_size, 5), y0, args
        )[0]  # fmt: skip

    step_sizes = jnp.array([0.1, 0.2, 0.4])
    for y, step_size in zip(jax.vmap(descend)(step_sizes), step_sizes):
        expected = gradient_descent(*args, y0, 5, float(step_size))
        assert tree_allclose(y, expected, rtol=1e-12)


#
# Projection
#


@pytest.mark.parametrize("dtype", dtypes)
def test_projection_takes_one_step_on_a_quadratic(dtype):
    args, y0 = _arguments(dtype)
    # One step is all that it is given.
    y, _ = _minimise(_least_squares, blx.Projection(max_steps=1), y0, args)
    assert tree_allclose(y, project(*args, y0), rtol=tolerance(dtype))
    assert tree_has_dtype(y, dtype)
    # Given more, it takes one look at the gradient there.
    solver = blx.Projection(rtol=1e-4)
    again, count = _minimise(_least_squares, solver, y0, args)
    assert count == 2
    assert tree_allclose(again, y, rtol=1e-12)


@pytest.mark.parametrize(
    "cls, dense_size, dtype",
    (
        (LinearBilevel, 1024, jnp.float64),
        (LinearBilevel, 1, jnp.float64),
        (LinearLeastSquares, 1024, jnp.float32),
        (LinearLeastSquares, 1, jnp.float64),
    ),
)
def test_projection_within_a_response(cls, dense_size, dtype):
    """Full warm start from w_t is w_t + Phi^+ (x - Phi w_t)."""
    problem, x, y0 = make_linear(cls, dtype)
    linear_solver = blx.Pseudoinverse(dense_size=dense_size)
    response = blx.Implicit(blx.Projection(linear_solver), linear_solver)
    y = blx.best_response(problem, x, y0, response)
    expected = project(problem.features, x, y0)
    assert tree_allclose(y, expected, rtol=10 * tolerance(dtype))
    assert tree_has_dtype(y, dtype)


@pytest.mark.parametrize("dtype", dtypes)
def test_projection_is_kaczmarz_on_one_row(dtype):
    problem, x, w = make_moving(dtype)
    response = blx.Implicit(blx.Projection(max_steps=1), blx.Pseudoinverse())
    y = blx.best_response(problem, x, w, response)
    phi, w = as_numpy(moving_features(x)), as_numpy(w)
    expected = w + phi * (float(problem.target) - phi @ w) / (phi @ phi)
    assert tree_allclose(y, expected, rtol=tolerance(dtype))


def test_projection_at_a_minimum():
    # No step is taken, and nothing is divided by zero.
    args, y0 = _arguments()
    solution = jnp.asarray(project(*args, y0))
    y, _ = _minimise(_least_squares, blx.Projection(), solution, args)
    assert tree_allclose(y, solution, rtol=1e-14)
    fn = lambda y, args: 0.5 * jnp.sum(y**2)  # noqa: E731
    zeros = jnp.zeros(3)
    y, count = _minimise(fn, blx.Projection(), zeros)
    assert tree_allclose(y, zeros, rtol=0)
    assert count <= 1


@pytest.mark.parametrize(
    "dtype", (jnp.float64, pytest.param(jnp.float32, marks=pytest.mark.slow))
)
def test_projection_on_a_nonlinear_problem(dtype):
    problem, x, y0 = make_softmax(dtype)
    expected = resolve(*make_softmax())
    y, count = _minimise(lambda y, args: problem.inner(x, y), blx.Projection(), y0)
    assert tree_allclose(y, expected, rtol=10 * tolerance(dtype))
    # Newton's method, not gradient descent.
    assert count < 10


def test_projection_on_nonlinear_least_squares():
    problem, x, y0 = make_curved()
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    y = blx.best_response(problem, x, y0, response)
    expected = resolve(problem, x, y0)
    assert tree_allclose(y, expected, rtol=1e-10)


def test_projection_descends_where_the_curvature_is_negative():
    """A plain Newton step would go to the maximum between the two wells."""
    fn = lambda y, args: jnp.sum(y**4 / 4 - y**2 / 2)  # noqa: E731
    y, _ = _minimise(fn, blx.Projection(), jnp.array([0.3]))
    assert tree_allclose(y, np.ones(1), rtol=1e-10)


def test_projection_searches_along_the_line():
    """On log cosh the plain Newton step diverges from |y| > 1.1."""
    fn = lambda y, args: jnp.sum(jnp.log(jnp.cosh(y)))  # noqa: E731
    y, _ = _minimise(fn, blx.Projection(), jnp.array([2.0, -3.0]))
    assert tree_allclose(y, np.zeros(2), rtol=1e-10)


def test_projection_under_vmap():
    args, y0 = _arguments()
    y0s = jnp.stack([y0, 0 * y0, -2 * y0])
    ys, _ = jax.vmap(lambda y0: _minimise(_least_squares, blx.Projection(), y0, args))(
        y0s
    )
    for y, start in zip(ys, y0s):
        assert tree_allclose(y, project(*args, start), rtol=1e-12)


#
# T7: cycling through solution sets
#


class Line(blx.AbstractLeastSquaresProblem):
    features: Array
    targets: Array

    def outer(self, x, y):
        return jnp.sum(y)

    def inner_residual(self, x, y):
        return self.features @ y - x * self.targets


@eqx.filter_jit
def _cycle(problems, response, x, y):
    """500 rounds."""

    def one_round(y, _):
        for problem in problems:
            y = blx.best_response(problem, x, y, response)
        return y, None

    return jax.lax.scan(one_round, y, None, length=500)[0]


@pytest.mark.parametrize(
    "epsilon, dtype",
    (
        (None, jnp.float64),
        (0.1, jnp.float64),
        (10.0, jnp.float64),
        (None, jnp.float32),
        pytest.param(0.1, jnp.float32, marks=pytest.mark.slow),
    ),
)
def test_t7_cycling(epsilon, dtype):
    """It converges to the projection of the start on the intersection of the solution
    sets; partial (proximal) cycling reaches the same point for every epsilon."""
    rng = np.random.default_rng(7)
    features = [make_features(seed, (1.2, 0.9), num_weights=6) for seed in (5, 6)]
    # They intersect, because a common solution makes the targets.
    common = rng.normal(size=6)
    targets = [phi @ common for phi in features]
    y0 = rng.normal(size=6)
    stacked = np.concatenate(features)
    expected = y0 + np.linalg.pinv(stacked) @ (np.concatenate(targets) - stacked @ y0)

    solver = blx.Pseudoinverse()
    if epsilon is None:
        response = blx.Implicit(blx.Projection(max_steps=1), solver)
    else:
        # The tolerance is relative to y, and the steps end up far below that.
        epsilon = jnp.array(epsilon, dtype)
        response = blx.Proximal(epsilon, blx.Projection(max_steps=1), solver)
    problems = [
        Line(jnp.asarray(phi, dtype), jnp.asarray(target, dtype))
        for phi, target in zip(features, targets)
    ]
    one, y = jnp.ones((), dtype), jnp.asarray(y0, dtype)
    for _ in range(10 if epsilon == 10.0 else 1):
        y = _cycle(problems, response, one, y)
    rtol = 1e-10 if dtype == jnp.float64 else 1e-3
    assert tree_allclose(y, expected, rtol=rtol)


#
# Optimistix's own
#


@pytest.mark.parametrize(
    "solver",
    (
        optx.BFGS(rtol=1e-12, atol=1e-12),
        optx.BestSoFarMinimiser(optx.NonlinearCG(rtol=1e-12, atol=1e-12)),
    ),
    ids=("BFGS", "NonlinearCG"),
)
def test_solvers_of_optimistix(solver):
    problem, x, y0 = make_softmax()
    expected = resolve(problem, x, y0)
    response = blx.Implicit(solver, blx.Pseudoinverse())
    y = blx.best_response(problem, x, y0, response)
    assert tree_allclose(y, expected, rtol=1e-7)


def test_inner_solvers_agree():
    """On a linear problem all of them find the projection of where they start."""
    problem, x, y0 = make_linear(LinearLeastSquares, jnp.float64)
    expected = project(problem.features, x, y0)
    linear_solver = blx.Pseudoinverse()
    for solver in (blx.GradientDescent(0.4, 300), blx.Projection()):
        response = blx.Implicit(solver, linear_solver)
        y = blx.best_response(problem, x, y0, response)
        assert tree_allclose(y, expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
@pytest.mark.parametrize("log_penalty", (-12.0, -17.0, -25.0))
def test_projection_goes_on_where_f_flattens(dtype, log_penalty):
    # A logistic loss of separable classes, whose gradient falls long before y arrives.
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 5))
    features *= np.where(features[:, :1] < 0, -1, 1)

    def inner(x, y):
        loss = jnp.mean(jnp.logaddexp(0, -jnp.asarray(features, y.dtype) @ y))
        return loss + 0.5 * jnp.exp(x) * jnp.sum(y**2)

    problem = blx.BilevelProblem(lambda x, y: jnp.sum(y) + x, inner)
    x = jnp.asarray(log_penalty, dtype)
    y = minimise_inner(problem, x, jnp.zeros(5, dtype), blx.Projection()).value
    gradient = jax.grad(inner, argnums=1)(x.astype(float), y.astype(float))
    hessian = jax.hessian(inner, argnums=1)(x.astype(float), y.astype(float))
    way = np.linalg.solve(as_numpy(hessian), as_numpy(gradient))
    allowed = 1e-4 if dtype == jnp.float32 else 1e-7
    assert np.linalg.norm(way) < allowed * np.linalg.norm(as_numpy(y))


@pytest.mark.parametrize("seed", range(3))
def test_projection_where_rounding_hides_the_descent(seed):
    # f is known to 1e-9, as if terms of it cancelled, and so y to 1e-4 by values alone.
    # The minimum is at 1.
    w = jnp.array([1.0, 1e-2])

    def objective(y, seed):
        rounding = 1e-9 * jnp.sin(1e9 * jnp.sum(y) + seed)
        return jnp.sum(w * jnp.cosh(y - 1)) + jax.lax.stop_gradient(rounding)

    start, seed = jnp.array([-1.0, 2.5]), jnp.array(float(seed))
    y = optx.minimise(objective, blx.Projection(), start, seed, max_steps=None).value
    assert jnp.max(jnp.abs(y - 1)) < 1e-8


def test_projection_refuses_a_gradient_that_vanishes_higher_up():
    # The first full Newton step, of 14, ends where f is flat; the constant hides the
    # descent of 13 that it promises, but not the rise.
    def objective(y, args):
        return jnp.sum(jnp.where(y < 5, jnp.log(jnp.cosh(y)), 30.0)) + 1e9

    start = jnp.array([-2.0])
    y = optx.minimise(objective, blx.Projection(), start, max_steps=None).value
    assert jnp.abs(y[0]) < 1e-2
