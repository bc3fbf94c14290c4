"""Points of S(x), and how they move: the nearest one, with its true derivative; what is
said of quadratics in a ball; and spectra of operators too large to decompose."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import (
    as_numpy,
    dense_derivatives,
    dtypes,
    finite_difference_jvp,
    flatten,
    make_moving,
    moving_features,
    random_like,
    tree_allclose,
    tree_dot,
    tree_has_dtype,
)
from jaxtyping import Array
from scipy import optimize

import bilevel_eqx as blx
from bilevel_eqx._linalg.eigenbasis import (
    eigenbasis,
    eigenbasis_within,
    negative_curvature,
)
from bilevel_eqx._linalg.trust_region import trust_region


nearest = blx.MinimumDisplacement()
warm = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
at_solution = blx.Implicit(None, blx.Pseudoinverse())


#
# The one-row toy, by hand
#


@jax.jit
def _row_and_slope(x):
    return moving_features(x), jax.jacfwd(moving_features)(x)


def _one_row(problem, x, y0):
    """The projection, its derivative, and -H^+ B."""
    phi, d_phi = map(as_numpy, _row_and_slope(x))
    y0, square, target = as_numpy(y0), phi @ phi, float(problem.target)
    y = y0 + phi * (target - phi @ y0) / square
    by_implicit = -phi * (d_phi @ y) / square
    null = d_phi - phi * (phi @ d_phi) / square
    return y, by_implicit + null * (target - phi @ y0) / square, by_implicit


@pytest.mark.parametrize("dtype", dtypes)
def test_t12(dtype):
    problem, x, y0 = make_moving(dtype)
    y, true, by_implicit = _one_row(problem, x, y0)
    u = jnp.asarray([0.3, -1.0, 2.0], dtype)

    @jax.jit
    def both(x):
        cold, other = nearest(problem, x, y0), warm(problem, x, y0)
        one = jnp.ones_like(x)
        pulled = cold.pullback(u)[0], cold.jacobian.T.mv(u)
        return cold.y, cold.jacobian.mv(one), pulled, other.jacobian.mv(one)

    point, pushed, pulled, pushed_by_implicit = both(x)
    tol = 1e-10 if dtype == jnp.float64 else 2e-5
    assert tree_allclose(point, y, rtol=tol)
    assert tree_allclose(pushed, true, rtol=tol)
    assert tree_allclose(pulled, (true @ as_numpy(u),) * 2, rtol=tol)
    assert tree_has_dtype((point, pushed, pulled), dtype)
    # And what is usually taken for it is something else.
    assert tree_allclose(pushed_by_implicit, by_implicit, rtol=tol)
    assert np.linalg.norm(by_implicit - true) > 0.1 * np.linalg.norm(true)


@pytest.mark.slow
def test_cold_start_follows_the_true_gradient():
    problem, x, y0 = make_moving()
    solution = blx.solve(problem, blx.ColdStart(), x, y0, num_steps=30)

    def value(x):
        y, *_ = _one_row(problem, x, y0)
        return 0.5 * np.sum((y - 1) ** 2)

    slope = finite_difference_jvp(value, solution.x, jnp.ones_like(solution.x))
    assert abs(slope) < 1e-6 and value(solution.x) < value(x)
    assert solution.certificate.largest < 1e-6
    biased = blx.solve(
        problem,
        blx.ColdStart(),
        x,
        y0,
        pipeline=blx.GradientPipeline(warm, optax.sgd(0.3)),
        num_steps=300,
    )
    assert biased.stats["outer_residual"] < 1e-6  # at rest
    assert biased.certificate.residuals["outer"] > 1e-2  # and not where it should be


#
# Finite differences of the projection: a plane that moves, and a network
#


class MovingRows(blx.AbstractBilevelProblem):
    """Three rows that depend on x; three squares of eight variables."""

    mixing: Array

    def rows(self, x):
        return jnp.sin(jnp.tensordot(self.mixing, x, axes=1))

    def outer(self, x, y):
        return jnp.sum(y["a"]) + jnp.sum(y["b"] ** 2)

    def inner(self, x, y):
        weights = jnp.concatenate([y["a"], y["b"].ravel()])
        return 0.5 * jnp.sum((self.rows(x) @ weights - 1) ** 2)


class Network(blx.AbstractLeastSquaresProblem):
    targets: Array

    def outer(self, x, y):
        return jnp.sum(jnp.sin(y["w"])) + jnp.sum(y["v"] ** 2)

    def inner_residual(self, x, y):
        return jnp.tanh(x @ y["w"]) @ y["v"] - self.targets


def _moving_rows():
    rng = np.random.default_rng(1)
    y0 = {"a": rng.normal(size=2), "b": rng.normal(size=(2, 3))}
    y0 = jax.tree.map(jnp.asarray, y0)
    return MovingRows(jnp.asarray(rng.normal(size=(3, 8, 4)))), jnp.ones(4), y0


def _network():
    rng = np.random.default_rng(0)
    targets, x = 0.5 * rng.normal(size=3), rng.normal(size=(3, 2))
    y0 = {"w": rng.normal(size=(2, 5)), "v": rng.normal(size=5)}
    problem = Network(jnp.asarray(targets))
    return problem, jnp.asarray(x), jax.tree.map(jnp.asarray, y0)


def _network_as_it_is():
    problem, x, y0 = _network()
    return blx.BilevelProblem(problem.outer, problem.inner), x, y0


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    (
        _moving_rows,
        pytest.param(_network, marks=pytest.mark.slow),
        pytest.param(_network_as_it_is, marks=pytest.mark.slow),
    ),
)
def test_finite_differences_of_the_projection(make, getkey):
    problem, x, y0 = make()
    t_x, t_y0, u = (random_like(getkey(), v) for v in (x, y0, y0))
    no_x, no_y0 = jax.tree.map(jnp.zeros_like, (x, y0))

    @jax.jit
    def project(x, y0, t_x, t_y0):
        """The point, its derivative in both, and the transpose: one program for all."""
        y, push = jax.linearize(
            lambda x, y0: blx.best_response(problem, x, y0, nearest), x, y0
        )
        return y, push(t_x, t_y0), jax.linear_transpose(push, x, y0)(u)

    def point(x, y0):
        return project(x, y0, no_x, no_y0)[0]

    y, of_x, (pull_x, pull_y0) = project(x, y0, t_x, no_y0)
    _, of_y0, _ = project(x, y0, no_x, t_y0)
    # It is stationary: no way from the anchor leads along S(x). And it is no farther than
    # another minimum.
    H, *_ = dense_derivatives(problem, x, y)
    values, vectors = np.linalg.eigh(H)
    null = vectors[:, values < 1e-8 * values[-1]]
    assert null.shape[1] > 0
    assert np.linalg.norm(null.T @ (flatten(y) - flatten(y0))) < 1e-8
    by_descent = blx.best_response(problem, x, y0, warm)
    assert _distance(y, y0) <= _distance(by_descent, y0) + 1e-12

    @jax.jit
    def respond(x, y0, y):
        response, usual = nearest(problem, x, y0), at_solution(problem, x, y)
        return response.jacobian.mv(t_x), response.pullback(u)[0], usual.jacobian.mv(t_x)

    pushed, pulled, usual = respond(x, y0, y)
    by_difference = finite_difference_jvp(lambda x: point(x, y0), x, t_x)
    assert tree_allclose(of_x, by_difference, rtol=1e-6)
    assert tree_allclose(pushed, of_x, rtol=1e-8)
    assert tree_allclose(pulled, pull_x, rtol=1e-8)
    by_difference = finite_difference_jvp(lambda y0: point(x, y0), y0, t_y0)
    assert tree_allclose(of_y0, by_difference, rtol=1e-6)
    assert np.isclose(tree_dot(pull_x, t_x), tree_dot(u, of_x), rtol=1e-8)
    assert np.isclose(tree_dot(pull_y0, t_y0), tree_dot(u, of_y0), rtol=1e-8)
    # The usual Jacobian fails the same test.
    assert not tree_allclose(usual, of_x, rtol=1e-2)


def _distance(y, y0):
    return np.linalg.norm(flatten(y) - flatten(y0))


@pytest.mark.slow
def test_minimum_displacement_where_the_minimum_is_unique():
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(y), lambda x, y: 0.5 * jnp.sum((y - jnp.sin(x)) ** 2)
    )
    x, y0 = jnp.array([0.3, 0.8]), jnp.array([1.0, -1.0])
    ours = blx.hypergradient(problem, x, y0, nearest)
    assert tree_allclose(ours.gradient, jnp.cos(x), rtol=1e-12)
    # And the second derivative.
    hessian = jax.jit(
        jax.hessian(lambda x: jnp.sum(blx.best_response(problem, x, y0, nearest)))
    )
    assert tree_allclose(hessian(x), -np.diag(np.sin(x)), rtol=1e-10)


class OneMinimum(blx.AbstractBilevelProblem):
    """Five residuals in four weights, A bend(y) = x: bend(y) is A^+ x."""

    features: Array
    outer_features: Array
    bend: bool = eqx.field(static=True)

    def outer(self, x, y):
        return jnp.sum((self.outer_features @ y - 1) ** 2) + 0.1 * jnp.sum(x**2)

    def residual(self, x, y):
        return self.features @ (jnp.sinh(y) if self.bend else y) - x

    def inner(self, x, y):
        return 0.5 * jnp.sum(self.residual(x, y) ** 2)

    def truth(self, x):
        """The minimum, and the gradient of F there."""
        A, C, x = map(as_numpy, (self.features, self.outer_features, x))
        bent = np.linalg.pinv(A) @ x
        y = np.arcsinh(bent) if self.bend else bent
        slope = 1 / np.cosh(y) if self.bend else np.ones(4)
        J = slope[:, None] * np.linalg.pinv(A)
        return y, 0.2 * x + J.T @ (2 * C.T @ (C @ y - 1))


def _one_minimum(kind):
    """Linear, as a sum of squares; or neither."""
    rng = np.random.default_rng(0)
    features, outer_features = (jnp.asarray(rng.normal(size=(k, 4))) for k in (5, 3))
    problem = truth = OneMinimum(features, outer_features, kind == "bent")
    if kind == "squares":
        problem = blx.LeastSquaresProblem(truth.outer, truth.residual)
    return problem, truth, jnp.asarray(rng.normal(size=5)), jnp.zeros(4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("squares", "bent"))
def test_the_nearest_minimum_where_there_is_one(kind):
    problem, truth, x, y0 = _one_minimum(kind)
    y, gradient = truth.truth(x)
    out = blx.hypergradient(problem, x, y0, blx.MinimumDisplacement())
    assert tree_allclose(out.y, y, rtol=1e-10)
    assert tree_allclose(out.gradient, gradient, rtol=1e-9)


_slow = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, equilibrium",
    (
        ("squares", blx.Optimistic()),
        pytest.param("squares", blx.Pessimistic(0.5), marks=_slow),
        pytest.param("squares", blx.ColdStart(), marks=_slow),
        pytest.param("squares", blx.Stackelberg(), marks=_slow),
        pytest.param("bent", blx.Optimistic(), marks=_slow),
        pytest.param("bent", blx.Pessimistic(0.5), marks=_slow),
        pytest.param("bent", blx.ColdStart(), marks=_slow),
        pytest.param("bent", blx.Stackelberg(), marks=_slow),
    ),
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_all_concepts_are_one_where_the_minimum_is_unique(kind, equilibrium):
    """There is nothing to select, and rounding must not be taken for something."""
    problem, truth, x0, y0 = _one_minimum(kind)
    solution = blx.solve(problem, equilibrium, x0, y0, num_steps=30)
    assert solution.certificate.largest < 1e-6
    y, gradient = truth.truth(solution.x)
    assert tree_allclose(solution.y, y, rtol=1e-7)
    assert np.linalg.norm(gradient) < 1e-6
    assert solution.value < problem.outer(x0, jnp.asarray(truth.truth(x0)[0]))


class FittedNetwork(blx.AbstractBilevelProblem):
    """x are the inputs of some samples, which a network fits exactly. S(x) is so curved
    that many of its points are nearer to y0 than all others around."""

    labels: Array

    def residual(self, x, y):
        for i, layer in enumerate(y):
            ones = jnp.ones((len(x), 1), x.dtype)
            x = jnp.concatenate([jnp.tanh(x) if i else x, ones], axis=1)
            x = x @ layer
        return x[:, 0] - self.labels

    def inner(self, x, y):
        return 0.5 * jnp.sum(self.residual(x, y) ** 2)

    def outer(self, x, y):
        return jnp.sum(x**2) + sum(jnp.sum(u**2) for u in y)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fitted(keys, num_samples, width, dtype=jnp.float64):
    """The problem, x and y0."""
    x = jr.normal(keys[0], (num_samples, 2), dtype)
    labels = jr.normal(keys[1], (num_samples,), dtype)
    shapes = (3, width), (width + 1, width), (width + 1, 1)
    y0 = [0.5 * jr.normal(k, shape, dtype) for k, shape in zip(keys[2:], shapes)]
    return FittedNetwork(labels), x, y0


@jax.jit
def _squares(v, problem, x, y0, weight):
    """What is squared in |y - y0|^2 + |r|^2 / weight."""
    start, unflatten = jax.flatten_util.ravel_pytree(y0)
    residual = problem.residual(x, unflatten(v)) / jnp.sqrt(weight)
    return jnp.concatenate([residual, v - start])


_slopes_of_squares: Any = jax.jit(jax.jacfwd(_squares))


def _penalised_distance(problem, x, y0):
    """The distance from y0 to S(x), by SciPy: what minimises that as the weight falls."""
    v = start = flatten(y0)
    for weight in 10.0 ** np.arange(1, -8, -1):
        args = problem, x, y0, jnp.asarray(weight)
        v = optimize.least_squares(_squares, v, _slopes_of_squares, args=args).x
    residual = _squares(v, problem, x, y0, jnp.asarray(1.0))[: len(x)]
    assert np.abs(residual).max() < 1e-5
    return np.linalg.norm(v - start)


@pytest.mark.slow
def test_none_of_many_nearest_points_but_a_near_one():
    @eqx.filter_jit
    def answer(problem, x, y0):
        y = blx.best_response(problem, x, y0, nearest)
        return y, jax.grad(problem.inner, argnums=1)(x, y)

    closer = []
    for seed in range(5):
        problem, x, y0 = _fitted(jr.split(jr.key(seed), 5), 12, 8)
        y, slope = answer(problem, x, y0)
        assert np.linalg.norm(flatten(slope)) < 1e-8
        closer.append(_penalised_distance(problem, x, y0) / _distance(y, y0))
    # Neither is sure to find the nearest of all.
    assert min(closer) > 0.96, closer
    assert np.mean(closer) > 0.98


@pytest.mark.slow
def test_a_strongly_curved_set_in_single_precision():
    """Twenty points: the whole step of Newton's method along S(x) is a hundred times too
    long. The same share of all its components leads nowhere."""
    residuals = []
    for seed in (0, 1, 3, 5):
        problem, x, y0 = _fitted(jr.split(jr.key(seed), 5), 20, 12, jnp.float32)
        out = blx.hypergradient(problem, x, y0, nearest, throw=False)
        assert out.stats["inner_residual"] < 1e-4
        residuals.append(out.stats["displacement_residual"])
    assert max(residuals) < 1e-3, residuals


@pytest.mark.slow
def test_a_path_goes_on_at_the_next_x():
    """It leads to where a new one leads, in fewer steps; and from a path that is of no
    use as far as a new one."""
    keys = jr.split(jr.key(2), 6)
    problem, x, y0 = _fitted(keys, 12, 8)
    new = nearest.init(problem, x, y0)
    counted = []

    class Counted(FittedNetwork):
        def inner(self, x, y):
            jax.debug.callback(lambda: counted.append(1))
            return super().inner(x, y)

    @eqx.filter_jit
    def run(x, state):
        out = nearest(Counted(problem.labels), x, y0, state)
        difference = jax.tree.map(jnp.subtract, out.y, y0)
        slope = optax.tree.norm(jax.grad(problem.inner, argnums=1)(x, out.y))
        return out.state, optax.tree.norm(difference), slope

    def numbers(x, state):
        counted.clear()
        state, distance, slope = jax.block_until_ready(run(x, state))
        jax.effects_barrier()
        assert slope < 1e-8
        return state, float(distance), len(counted)

    known, _, _ = numbers(x, new)
    near = x + 1e-3 * jr.normal(keys[5], x.shape)
    _, anew, many = numbers(near, new)
    _, further, few = numbers(near, known)
    assert abs(further - anew) < 1e-6 * anew
    assert few < 0.8 * many
    useless = jax.tree.map(lambda u: jnp.nan * u, known.path)
    _, again, _ = numbers(near, known._replace(y=new.y, path=useless))
    assert abs(again - anew) < 1e-6 * anew


class Ellipse(blx.AbstractLeastSquaresProblem):
    """Its size is 1 + x. From elsewhere, one step gets near and not there."""

    axes: Array

    def outer(self, x, y):
        return jnp.sum((y - 1) ** 2)

    def inner_residual(self, x, y):
        return jnp.sum((y / self.axes) ** 2) - (1 + x) ** 2


@pytest.mark.slow
def test_a_selection_that_stops_short_is_refused():
    problem, x, y0 = Ellipse(jnp.array([1.0, 0.3])), jnp.array(0.2), jnp.array([2.0, 1.5])
    hasty = blx.MinimumDisplacement(selection_steps=1, selection_tolerance=1e-9)
    with pytest.raises(Exception, match="selection_steps"):
        blx.hypergradient(problem, x, y0, hasty)
    # `test_nothing_silent.py` has what comes back with `throw=False`.
    patient = blx.MinimumDisplacement(selection_steps=1, selection_tolerance=None)
    out = blx.hypergradient(problem, x, y0, patient, throw=False)
    assert out.result == blx.RESULTS.successful
    assert out.stats["displacement_residual"] > 1e-9


#
# Quadratics in a ball
#


def _matrix(values, seed=0):
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return (Q * np.asarray(values)[None, :]) @ Q.T, Q


def _operator(matrix):
    return lx.MatrixLinearOperator(jnp.asarray(matrix), lx.symmetric_tag)


@eqx.filter_jit
def _in_a_ball(operator, g, radius, *tolerance):
    return trust_region(eigenbasis(operator), g, radius, *tolerance)


@pytest.mark.parametrize(
    "values",
    [(2.0, 1.0, -1.0, 0.5), (-1.0, -2.0, -0.5, -3.0), (0.0, 0.0, 0.0, 0.0)],
    ids=["indefinite", "concave", "zero"],
)
@pytest.mark.parametrize("radius", (0.1, 1.0, 30.0))
def test_trust_region(values, radius):
    matrix, _ = _matrix(values)
    g = np.array([0.3, -1.0, 0.7, 0.2])
    out = _in_a_ball(_operator(matrix), jnp.asarray(g), jnp.asarray(radius))
    s, nu = as_numpy(out.step), float(out.multiplier)
    assert np.linalg.norm(s) <= radius * (1 + 1e-9)
    # Moré and Sorensen's conditions, which are sufficient.
    assert np.allclose((nu * np.eye(4) - matrix) @ s, g, rtol=1e-8, atol=1e-8)
    assert nu >= max(0, max(values)) - 1e-9
    assert nu * (radius - np.linalg.norm(s)) < 1e-8 * max(1, nu * radius)
    assert float(out.value) == pytest.approx(g @ s + 0.5 * s @ matrix @ s)
    assert tree_allclose(out.mixture, out.step, rtol=1e-6)


def test_trust_region_where_two_points_tie():
    matrix, Q = _matrix((2.0, 1.0, -1.0, 0.5))
    g = Q @ np.array([0.0, 0.3, -0.2, 0.1])  # nothing along the top eigenvector
    out = _in_a_ball(_operator(matrix), jnp.asarray(g), 2.0, 1e-12)
    s = as_numpy(out.step)
    assert np.linalg.norm(s) == pytest.approx(2.0)
    mirrored = s - 2 * Q[:, 0] * (Q[:, 0] @ s)
    for point in (s, mirrored):
        assert float(out.value) == pytest.approx(g @ point + 0.5 * point @ matrix @ point)
    # What is between them is neither, and as high with its lift.
    between = as_numpy(out.mixture)
    assert abs(Q[:, 0] @ between) < 1e-4
    model = g @ between + 0.5 * between @ matrix @ between
    assert model + float(out.lift) == pytest.approx(float(out.value), rel=1e-6)


@pytest.mark.slow
def test_lanczos_where_there_are_too_many_to_decompose():
    n = 1500
    diagonal = jnp.asarray(np.r_[-0.5, np.linspace(0.0, 1.0, n - 2), 3.0])
    struct = jax.ShapeDtypeStruct((n,), diagonal.dtype)
    operator = lx.FunctionLinearOperator(lambda v: diagonal * v, struct, lx.symmetric_tag)
    decompose = eqx.filter_jit(eigenbasis)
    basis = decompose(operator)
    assert basis.vectors.shape[1] < 100
    assert float(jnp.min(basis.values)) == pytest.approx(-0.5, abs=1e-6)
    assert float(jnp.max(basis.values)) == pytest.approx(3.0, abs=1e-9)
    assert float(negative_curvature(basis)) == pytest.approx(0.5 / 3, abs=1e-6)
    vectors = as_numpy(basis.vectors)
    gram = vectors.T @ vectors
    assert np.allclose(gram, np.eye(len(gram)), atol=1e-10)
    # A Krylov space that ends early adds nothing of its own.
    identity = lx.FunctionLinearOperator(lambda v: 2 * v, struct, lx.symmetric_tag)
    start = np.random.default_rng(0).normal(size=n)
    values = decompose(identity, jnp.asarray(start)).values
    assert np.allclose(values, 2.0)


@pytest.mark.parametrize("n", (6, 1500))
@pytest.mark.parametrize("rank", (3, 0))
def test_eigenvalues_within_a_subspace(n, rank):
    """Nothing of the rest of the space is among them, however small the subspace."""
    diagonal = jnp.asarray(np.r_[2.0, -1.0, 0.5, np.full(n - 3, 5.0)])
    mask = jnp.asarray((np.arange(n) < rank).astype(float))
    struct = jax.ShapeDtypeStruct((n,), diagonal.dtype)
    operator = lx.FunctionLinearOperator(lambda v: diagonal * v, struct, lx.symmetric_tag)

    def project(v):  # as it is with rounding
        return mask * v + 1e-16 * jnp.roll(v, 1)

    start = project(jnp.asarray(np.random.default_rng(0).normal(size=n)))
    basis = eqx.filter_jit(eigenbasis_within)(project, operator, start)
    values, vectors = as_numpy(basis.values), as_numpy(basis.vectors)
    is_within = np.linalg.norm(vectors, axis=0) > 0.5
    expected = [-1.0, 0.5, 2.0][:rank]
    assert np.allclose(np.sort(values[is_within]), expected, atol=1e-9)
    # What fills up the rest is from inside of the spectrum, or zero.
    assert np.min(values) >= min(expected, default=0) - 1e-9
    assert np.max(values) <= max(expected, default=0) + 1e-9
    assert np.max(np.abs(vectors[rank:]), initial=0) < 1e-7


def test_the_worst_of_an_outer_objective_that_is_not_quadratic():
    """The quadratic model at the worst point knows of another that is worse in the model
    alone: F is 4.8 at 2 and 3.2 at -2, and the model at 2 says 9.6 of -2."""
    problem = blx.BilevelProblem(
        lambda x, y: 0.5 * x[0] ** 2 + x[0] * y[0] + y[0] ** 2 + 0.1 * y[0] ** 3,
        lambda x, y: 0.5 * y[1] ** 2 + 0 * x[0],
    )
    pipeline = blx.pipelines.NullSpaceAscent()

    @jax.jit
    def select(x, y):
        out = pipeline.select(problem, blx.Pessimistic(2.0), x, y, jnp.zeros(2))
        return out.y, out.value, out.gradient

    for x in (0.0, 0.3, 0.5):
        for start in (2.0, -2.0, 0.1):
            y, value, gradient = select(jnp.array([x]), jnp.array([start, 0.0]))
            assert tree_allclose(y, jnp.array([2.0, 0.0]), rtol=1e-10)
            assert float(value) == pytest.approx(0.5 * x**2 + 2 * x + 4.8)
            assert float(gradient[0]) == pytest.approx(x + 2)
