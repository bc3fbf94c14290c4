"""Problems whose inner variables are a root or a fixed point.

The references are NumPy's linear algebra, finite differences, and JAX's own derivatives
of a loop.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest
from helpers import as_numpy, finite_difference_gradient, grid, tree_has_dtype
from jaxtyping import Array

import bilevel_eqx as blx


#
# A linear root, A(x) y = b(x). Its matrix is far from symmetric.
#


class LinearRoot(blx.AbstractRootProblem):
    """r = (A_0 + x_1 A_1 + x_2 A_2) y - b - B x."""

    matrices: Array
    b: Array
    B: Array
    target: Array
    scale: Array

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.target) ** 2) + 0.05 * jnp.sum(x**2)

    def root(self, x, y):
        A = self.matrices[0] + jnp.tensordot(x, self.matrices[1:], 1)
        return self.scale * (A @ y - self.b - self.B @ x)


def _matrix(rng, n, condition):
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    return left @ np.diag(np.geomspace(1, 1 / condition, n)) @ right.T


def linear_root(condition=10.0, n=5, dtype=np.float64, scale=1.0):
    rng = np.random.default_rng(0)
    A = _matrix(rng, n, condition)
    # They vanish on what A makes small, so that the condition holds for all x.
    matrices = np.stack([A, 0.1 * rng.normal(size=(n, n)) @ A, 0.1 * A])
    arrays = matrices, A @ rng.normal(size=n), A @ rng.normal(size=(n, 2))
    arrays = *arrays, rng.normal(size=n), np.asarray(scale)
    return LinearRoot(*(jnp.asarray(u, dtype) for u in arrays))


slow = pytest.mark.slow
X = np.array([0.3, -0.2])


def closed_form(problem, x):
    """y, J and the hypergradient, with NumPy."""
    matrices, b, B, target = map(
        as_numpy, (problem.matrices, problem.b, problem.B, problem.target)
    )
    A = matrices[0] + np.tensordot(x, matrices[1:], 1)
    y = np.linalg.solve(A, b + B @ x)
    J = np.linalg.solve(A, B - np.stack([M @ y for M in matrices[1:]], axis=1))
    return y, J, J.T @ (y - target) + 0.1 * x


def _relative(value, reference):
    return np.linalg.norm(as_numpy(value) - reference) / np.linalg.norm(reference)


@eqx.filter_jit
def _values(problem, x, y0, response):
    """The hypergradient, and y and its Jacobian in both modes."""

    def respond(x):
        return blx.best_response(problem, x, y0, response)

    out = blx.hypergradient(problem, x, y0, response)
    # Reverse mode is the transpose of forward mode: one solve for y is enough for both.
    y, push = jax.linearize(respond, x)
    pull = jax.linear_transpose(push, x)
    forward = jax.vmap(push, out_axes=1)(jnp.eye(x.size, dtype=x.dtype))
    (reverse,) = jax.vmap(pull)(jnp.eye(y.size, dtype=y.dtype))
    return out, y, forward, reverse


tight = dict(rtol=1e-12, atol=1e-12)


PAIRS = {
    "projection, pseudoinverse": (blx.Projection(), blx.Pseudoinverse()),
    "newton, lu": (optx.Newton(**tight), lx.LU()),
    "newton, auto": (optx.Newton(**tight), lx.AutoLinearSolver(well_posed=None)),
    "chord, gmres": (optx.Chord(1e-9, 1e-9), lx.GMRES(**tight, restart=5)),
    "levenberg, bicgstab": (optx.LevenbergMarquardt(**tight), lx.BiCGStab(**tight)),
    "dogleg, svd": (optx.Dogleg(**tight), lx.SVD()),
    "newton, normal": (optx.Newton(**tight), lx.Normal(lx.CG(**tight))),
    "bfgs, qr": (optx.BFGS(1e-10, 1e-10), lx.QR()),
}


# "newton, lu" is below, and in most of the other tests.
@slow
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair != "newton, lu"])
def test_linear_root_by_every_solver(pair):
    problem, (solver, linear_solver) = linear_root(), PAIRS[pair]
    y, J, gradient = closed_form(problem, X)
    response = blx.Implicit(solver, linear_solver)
    out, found, forward, reverse = _values(
        problem, jnp.asarray(X), jnp.zeros(5), response
    )
    for value, reference in ((out.y, y), (found, y), (forward, J), (reverse, J)):
        assert _relative(value, reference) < 1e-7
    assert _relative(out.gradient, gradient) < 1e-7
    assert out.stats["inner_residual"] < 1e-7


@pytest.mark.parametrize("pair", ("projection, pseudoinverse", "newton, lu"))
def test_condition_is_not_squared(pair):
    condition = 1e6
    problem = linear_root(condition)
    y, _, gradient = closed_form(problem, X)
    solver, linear_solver = PAIRS[pair]
    response = blx.Implicit(solver, linear_solver)
    out = blx.hypergradient(problem, jnp.asarray(X), jnp.zeros(5), response)
    # A few times eps * condition = 2e-10.
    assert _relative(out.y, y) < 1e-9
    assert _relative(out.gradient, gradient) < 1e-9


def test_normal_equations_lose_twice_the_digits():
    # So that the bound above says something: this is what a square of r costs.
    problem = linear_root(1e6)
    y, _, gradient = closed_form(problem, X)
    squares = blx.BilevelProblem(
        problem.outer, lambda x, y: 0.5 * jnp.sum(problem.root(x, y) ** 2)
    )
    response = blx.Implicit(None, lx.LU())
    out = blx.hypergradient(
        squares, jnp.asarray(X), jnp.asarray(y), response, throw=False
    )
    assert _relative(out.gradient, gradient) > 1e-6


@pytest.mark.slow
def test_in_float32():
    problem = linear_root(dtype=np.float32)
    y, J, gradient = closed_form(problem, X)
    x, y0 = jnp.asarray(X, jnp.float32), jnp.zeros(5, jnp.float32)
    response = blx.Implicit(optx.Newton(1e-5, 1e-5), lx.LU())
    out, found, forward, reverse = _values(problem, x, y0, response)
    assert tree_has_dtype((out.y, out.gradient, found, forward, reverse), jnp.float32)
    for value, reference in ((out.y, y), (forward, J), (reverse, J)):
        assert _relative(value, reference) < 1e-4
    assert _relative(out.gradient, gradient) < 1e-4


@pytest.mark.parametrize("linear_solver", (lx.LU(), blx.Pseudoinverse()))
def test_skew_root(linear_solver):
    # R y = x for a rotation by a right angle, whose symmetric part is zero, so that
    # y = R^T x and J = R^T. An adjoint without the transpose has the wrong sign.
    R = np.array([[0.0, -1.0], [1.0, 0.0]])
    c = np.array([1.0, 2.0])
    problem = blx.RootProblem(lambda x, y: jnp.dot(c, y), lambda x, y: R @ y - x)
    response = blx.Implicit(optx.Newton(**tight), linear_solver)
    out = blx.hypergradient(problem, jnp.array([0.5, 0.7]), jnp.zeros(2), response)
    assert np.allclose(out.y, R.T @ [0.5, 0.7], rtol=1e-14)
    assert np.allclose(out.gradient, R @ c, rtol=1e-14)
    assert np.allclose(out.adjoint, R @ c, rtol=1e-14)  # R^-T c


def test_under_vmap():
    problem, response = linear_root(), blx.Implicit(optx.Newton(**tight), lx.LU())
    xs = np.array([[0.3, -0.2], [0.0, 0.0], [-0.4, 0.5]])

    def of(x):
        out = blx.hypergradient(problem, x, jnp.zeros(5), response)
        return out.y, out.gradient

    ys, gradients = jax.jit(jax.vmap(of))(jnp.asarray(xs))
    for x, y, gradient in zip(xs, ys, gradients):
        assert _relative(y, closed_form(problem, x)[0]) < 1e-12
        assert _relative(gradient, closed_form(problem, x)[2]) < 1e-12


def test_operators():
    problem, x, u = linear_root(), jnp.asarray(X), np.arange(5.0)
    y, J, _ = closed_form(problem, X)
    A, B = jax.jit(jax.jacobian(problem.root, argnums=(1, 0)))(x, y)

    @jax.jit
    def matrices(x, y, u):
        H, cross = blx.inner_hessian(problem, x, y), blx.cross_derivative(problem, x, y)
        assert not lx.is_symmetric(H)
        found = blx.response_jacobian(problem, x, y, lx.LU())
        damped = blx.response_jacobian(problem, x, y, lx.LU(), damping=0.5)
        as_matrices = (part.as_matrix() for part in (H, cross, found, damped))
        return *as_matrices, found.T.mv(u)

    H, cross, found, damped, pulled = matrices(x, jnp.asarray(y), u)
    assert np.allclose(H, A, rtol=1e-13)
    assert np.allclose(cross, B, rtol=1e-13)
    assert np.allclose(found, J, rtol=1e-10)
    assert np.allclose(pulled, J.T @ u, rtol=1e-10)
    reference = -np.linalg.solve(A + 0.5 * np.eye(5), B)
    assert np.allclose(damped, reference, rtol=1e-10)


#
# A deep equilibrium layer, z = tanh(W z + U x + b)
#


class Layer(eqx.Module):
    W: Array
    U: Array
    b: Array

    def __call__(self, x, z):
        return jnp.tanh(self.W @ z + self.U @ x + self.b)


class Misfit(eqx.Module):
    target: Array

    def __call__(self, x, z):
        return 0.5 * jnp.sum((z - self.target) ** 2) + 0.05 * jnp.sum(x**2)


def layer_problem(dtype=np.float64, size=0.3):
    rng = np.random.default_rng(1)
    W, U, b, target = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((6, 6), (6, 3), 6, 6)
    )
    return blx.FixedPointProblem(Misfit(target), Layer(size * W, U, b))


x_layer = np.array([0.4, -0.3, 0.1])


@eqx.filter_jit
def _iterated(problem, x):
    """The fixed point, by a loop that JAX differentiates."""

    def step(z, _):
        return problem.fixed_point(x, z), None

    return jax.lax.scan(step, jnp.zeros(6, x.dtype), None, length=120)[0]


@eqx.filter_jit
def _iterated_value(problem, x):
    return problem.outer(x, _iterated(problem, x))


LAYER_RESPONSES = {
    "fixed-point iteration, neumann": blx.Implicit(
        optx.FixedPointIteration(1e-13, 1e-13), blx.Neumann(100, 1.0)
    ),
    "damped iteration, gmres": blx.Implicit(
        optx.FixedPointIteration(1e-13, 1e-13, damp=0.3), lx.GMRES(**tight)
    ),
    "projection, lu": blx.Implicit(blx.Projection(), lx.LU()),
    "newton, bicgstab": blx.Implicit(optx.Newton(**tight), lx.BiCGStab(**tight)),
    "unrolled": blx.Unrolled(optax.sgd(1.0), 100),
}


@pytest.mark.parametrize(
    "name,",
    grid(lambda name: "damped" not in name and "lu" not in name, LAYER_RESPONSES),
)
def test_layer(name):
    problem, x = layer_problem(), jnp.asarray(x_layer)
    response = LAYER_RESPONSES[name]
    gradient = jax.grad(lambda x: _iterated_value(problem, x))(x)
    out = blx.hypergradient(problem, x, jnp.zeros(6), response)
    assert np.allclose(out.y, _iterated(problem, x), rtol=1e-10)
    assert np.allclose(out.gradient, gradient, rtol=1e-10)
    differences = finite_difference_gradient(lambda x: _iterated_value(problem, x), x)
    assert np.allclose(out.gradient, differences, rtol=1e-7)


@pytest.mark.slow
def test_layer_to_second_order_and_in_its_weights():
    problem, x = layer_problem(), jnp.asarray(x_layer)
    response = blx.Implicit(optx.Newton(**tight), lx.LU())

    def value(x):
        return problem.outer(x, blx.best_response(problem, x, jnp.zeros(6), response))

    hessian = jax.jit(jax.hessian(value))(x)
    reference = jax.jit(jax.hessian(lambda x: _iterated_value(problem, x)))(x)
    assert np.allclose(hessian, reference, rtol=1e-9)

    @eqx.filter_jit
    @eqx.filter_grad
    def in_weights(problem):
        return problem.outer(x, blx.best_response(problem, x, jnp.zeros(6), response))

    reference = eqx.filter_grad(lambda problem: _iterated_value(problem, x))(problem)
    found = in_weights(problem)
    for u, v in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
        assert np.allclose(u, v, rtol=1e-9, atol=1e-12)


def test_closed_over_values_are_differentiated():
    def response_of(c):
        problem = blx.RootProblem(lambda x, y: jnp.sum(y), lambda x, y: c * y + y**3 - x)
        response = blx.Implicit(optx.Newton(**tight), lx.LU())
        return blx.best_response(problem, jnp.array(2.0), jnp.array(0.5), response)

    # y = 1 at c = 1, and dy/dc = -y / (c + 3 y^2).
    assert np.allclose(response_of(jnp.array(1.0)), 1.0)
    assert np.allclose(jax.grad(response_of)(jnp.array(1.0)), -0.25, rtol=1e-12)


def test_truncated_series_is_that_of_unrolled_steps():
    # On a linear map from zero, K steps have the Jacobian of K Neumann terms.
    rng = np.random.default_rng(2)
    M, B = (
        jnp.asarray(0.4 * rng.normal(size=(4, 4))),
        jnp.asarray(rng.normal(size=(4, 2))),
    )
    problem = blx.FixedPointProblem(
        lambda x, y: jnp.sum(jnp.arange(4.0) * y), lambda x, y: M @ y + B @ x
    )
    x, y0 = jnp.asarray(X), jnp.zeros(4)
    unrolled = blx.hypergradient(problem, x, y0, blx.Unrolled(optax.sgd(1.0), 7))
    series = blx.hypergradient(problem, x, y0, blx.Implicit(None, blx.Neumann(7, 1.0)))
    powers = sum(np.linalg.matrix_power(as_numpy(M), k) for k in range(7))
    reference = (powers @ as_numpy(B)).T @ np.arange(4.0)
    assert np.allclose(unrolled.gradient, reference, rtol=1e-12)
    assert np.allclose(series.gradient, reference, rtol=1e-12)
    assert np.allclose(unrolled.y, powers @ as_numpy(B) @ X, rtol=1e-12)


@pytest.mark.slow
def test_root_within_a_root():
    # z + z^3 = x + y within y + z / 2 = 1, at y = 0, z = 2, x = 10.
    inner = blx.RootProblem(lambda x, y: y, lambda x, y: y + y**3 - x)
    response = blx.Implicit(optx.Newton(**tight), lx.LU())

    def root(x, y):
        return y + 0.5 * blx.best_response(inner, x + y, jnp.array(1.0), response) - 1

    problem = blx.RootProblem(lambda x, y: 3 * y, root)
    out = blx.hypergradient(problem, jnp.array(10.0), jnp.array(0.5), response)
    slope = 1 / 13  # dz / dx = 1 / (1 + 3 z^2)
    assert np.allclose(out.y, 0, atol=1e-12)
    expected = -3 * 0.5 * slope / (1 + 0.5 * slope)
    assert np.allclose(out.gradient, expected, rtol=1e-10)


#
# Pytrees
#


def _coupled(x, y):
    """2 u + v_1 = x_1, v + u (1, -1) = x_2 (1, 2): u and v of different shapes."""
    u, v = y["u"], y["v"]
    ones = jnp.array([1.0, -1.0], v.dtype)
    shift = (x["b"] * jnp.array([1.0, 2.0], x["b"].dtype)).astype(v.dtype)
    first = (2 * u + v[0].astype(u.dtype) - x["a"]).astype(u.dtype)
    return {"u": first, "v": v + u.astype(v.dtype) * ones - shift}


def _coupled_answer(a, b):
    A = np.array([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    rhs = np.array([a, b, 2 * b])
    adjoint = np.linalg.solve(A.T, [1.0, 2.0, 3.0])
    return np.linalg.solve(A, rhs), (adjoint[0], adjoint[1] + 2 * adjoint[2])


@pytest.mark.parametrize("narrow", (False, True))
def test_pytrees(narrow):
    def outer(x, y):
        weights = jnp.array([2.0, 3.0], y["v"].dtype)
        return y["u"] + jnp.sum(weights * y["v"]).astype(y["u"].dtype)

    problem = blx.RootProblem(outer, _coupled)
    x = {"a": jnp.array(0.5), "b": jnp.array(-1.5)}
    dtype = jnp.float32 if narrow else jnp.float64
    y0 = {"u": jnp.array(0.0), "v": jnp.zeros(2, dtype)}
    # A matrix has one type, and so a linear solver that makes one needs a single type.
    linear_solver = blx.Neumann(300, 0.3) if narrow else blx.Pseudoinverse()
    response = blx.Implicit(blx.Projection(), linear_solver)
    out = blx.hypergradient(problem, x, y0, response)
    y, (in_a, in_b) = _coupled_answer(0.5, -1.5)
    rtol = 1e-5 if narrow else 1e-12
    assert out.y["v"].dtype == dtype
    assert np.allclose(out.y["u"], y[0], rtol=rtol)
    assert np.allclose(out.y["v"], y[1:], rtol=rtol)
    assert np.allclose(out.gradient["a"], in_a, rtol=rtol)
    assert np.allclose(out.gradient["b"], in_b, rtol=rtol)


#
# Equilibria
#


class LinearGame(blx.AbstractRootProblem):
    """A y = B x + b and F = |y - t|^2 / 2 + c |x|^2 / 2."""

    A: Array
    B: Array
    b: Array
    target: Array
    weight: Array

    def outer(self, x, y):
        square = jnp.sum((y - self.target) ** 2)
        return 0.5 * (square + self.weight * jnp.sum(x**2))

    def root(self, x, y):
        return self.A @ y - self.B @ x - self.b


def linear_game(scale=1.0):
    rng = np.random.default_rng(3)
    A, B = rng.normal(size=(4, 4)) + 2 * np.eye(4), rng.normal(size=(4, 2))
    b, t = rng.normal(size=(2, 4))
    J, y_b = np.linalg.solve(A, B), np.linalg.solve(A, b)
    x = np.linalg.solve(J.T @ J + 0.3 * np.eye(2), J.T @ (t - y_b))
    arrays = scale * A, scale * B, scale * b, t, np.array(0.3)
    return LinearGame(*map(jnp.asarray, arrays)), x, J @ x + y_b


def _residuals(problem, equilibrium, x, y):
    out = blx.certify(problem, equilibrium, jnp.asarray(x), jnp.asarray(y))
    return {name: float(value) for name, value in out.residuals.items()}, out


@pytest.mark.parametrize("equilibrium", (blx.Stackelberg(), blx.WarmStart()))
def test_certificate_at_the_equilibrium_and_off_it(equilibrium):
    problem, x, y = linear_game()
    at, certificate = _residuals(problem, equilibrium, x, y)
    assert max(at.values()) < 1e-13
    assert certificate.accuracy < 1e-13
    assert "y is a root: r = 0" in str(certificate)
    assert "(dr/dx)^T (dr/dy)^" in str(certificate)

    # Off the root: the way back to it is a share of the size of y, and of how far y moves
    # that way if each entry of x changes by its own size.
    offset = np.array([0.1, 0.0, -0.2, 0.3])
    A, B = as_numpy(problem.A), as_numpy(problem.B)
    way = np.linalg.norm(offset)
    reach = np.abs(np.linalg.solve(A, B).T @ (offset / way)) @ np.abs(x)
    expected = way / (way + np.linalg.norm(y + offset) + reach)
    off, _ = _residuals(problem, equilibrium, x, y + offset)
    assert np.allclose(off["inner"], expected, rtol=1e-10)

    # Off the equilibrium, at the root.
    moved = x + [0.5, -0.2]
    J = np.linalg.solve(A, as_numpy(problem.B))
    there = y + J @ [0.5, -0.2]
    gradient = 0.3 * moved + J.T @ (there - as_numpy(problem.target))
    off, _ = _residuals(problem, equilibrium, moved, there)
    assert off["inner"] < 1e-14
    # A share of the terms that cancel in it.
    assert 0.01 * np.linalg.norm(gradient) < off["outer"] < 1


@pytest.mark.parametrize("scale", (1e-6, 1e5))
def test_certificate_does_not_depend_on_the_units_of_the_root(scale):
    (problem, x, y), (scaled, *_) = linear_game(), linear_game(scale)
    at = x + 0.3, y - 0.2
    a, _ = _residuals(problem, blx.Stackelberg(), *at)
    b, _ = _residuals(scaled, blx.Stackelberg(), *at)
    assert all(np.allclose(a[name], b[name], rtol=1e-9) for name in a)


@pytest.mark.slow
def test_certificate_of_a_root_that_is_not_isolated():
    # dr/dy has rank one: its singular values are sqrt(10) and 0.
    problem = blx.RootProblem(
        lambda x, y: jnp.sum((y - 1) ** 2),
        lambda x, y: (jnp.sum(y) - x) * jnp.array([1.0, 2.0]),
    )
    residuals, _ = _residuals(problem, blx.Stackelberg(), 1.0, [0.5, 0.5])
    assert residuals["inner"] == 0 and residuals["uniqueness"] == 1
    with pytest.raises(ValueError, match="isolated root, but dr/dy is singular"):
        blx.solve(
            problem, blx.Stackelberg(), jnp.array(1.0), jnp.array([0.5, 0.5]), num_steps=3
        )
    # A warm start follows the nearest root: y = (x, x) / 2, at best x = 2.
    x0, y0 = jnp.array(1.0), jnp.zeros(2)
    solution = blx.solve(problem, blx.WarmStart(), x0, y0, num_steps=20)
    assert np.allclose(solution.x, 2) and np.allclose(solution.y, 1)
    assert solution.certificate.largest < 1e-12


# A leader is in the two tests after the next.
@pytest.mark.slow
def test_solve_by_default():
    problem, x, y = linear_game()
    x0, y0 = jnp.zeros(2), jnp.zeros(4)
    solution = blx.solve(problem, blx.WarmStart(), x0, y0, num_steps=30)
    assert np.allclose(solution.x, x, rtol=1e-8) and np.allclose(solution.y, y, rtol=1e-8)
    assert solution.certificate.largest < 1e-8


def test_solve_alternating():
    # y takes one damped fixed-point step for each step of x.
    problem, x, y = linear_game()
    response = blx.Implicit(None, lx.LU())
    pipeline = blx.GradientPipeline(
        response, optax.sgd(0.1), inner_update=blx.Unrolled(optax.sgd(0.3), 1)
    )
    x0, y0 = jnp.zeros(2), jnp.zeros(4)
    solution = blx.solve(
        problem, blx.WarmStart(), x0, y0, pipeline=pipeline, num_steps=1500
    )
    assert np.allclose(solution.x, x, rtol=1e-6) and np.allclose(solution.y, y, rtol=1e-6)
    assert solution.certificate.largest < 1e-6


@slow
def test_solve_under_vmap():
    problem, x, y = linear_game()
    other = eqx.tree_at(lambda p: p.target, problem, 2 * problem.target)

    @eqx.filter_jit
    @eqx.filter_vmap
    def solved(target):
        moved = eqx.tree_at(lambda p: p.target, problem, target)
        x0, y0 = jnp.zeros(2), jnp.zeros(4)
        return blx.solve(moved, blx.Stackelberg(), x0, y0, num_steps=25)

    solutions = solved(jnp.stack([problem.target, other.target]))
    assert np.allclose(solutions.x[0], x, rtol=1e-8)
    assert np.allclose(solutions.y[0], y, rtol=1e-8)
    assert np.max(solutions.certificate.largest) < 1e-8


@pytest.mark.slow
def test_solve_confines_x():
    problem, x, _ = linear_game()
    bounded = blx.RootProblem(
        problem.outer, problem.root, project_x=lambda x: jnp.clip(x, -0.1, 0.1)
    )
    assert np.max(np.abs(x)) > 0.1
    x0, y0 = jnp.zeros(2), jnp.zeros(4)
    solution = blx.solve(bounded, blx.Stackelberg(), x0, y0, num_steps=40)
    assert np.max(np.abs(solution.x)) <= 0.1
    assert solution.certificate.largest < 1e-7


@slow
def test_certificate_beyond_the_dense_size():
    # y = y shifted by one, times a half, plus x c: y = x sum_k 2^-k shift^k c.
    n = 1500
    c = jnp.cos(jnp.arange(n, dtype=float))
    problem = blx.FixedPointProblem(
        lambda x, y: 0.5 * jnp.sum((y - c) ** 2),
        lambda x, y: 0.5 * jnp.roll(y, 1) + x * c,
    )
    total = sum(0.5**k * np.roll(as_numpy(c), k) for k in range(60))
    x = float(total @ as_numpy(c) / (total @ total))
    at, certificate = _residuals(problem, blx.Stackelberg(), x, x * total)
    assert max(at.values()) < 1e-6 and certificate.accuracy < 1e-6
    arguments = problem, blx.Stackelberg(), jnp.asarray(x), jnp.asarray(x * total)
    rough = blx.certify(*arguments, max_products=12)
    assert 1e-6 < rough.accuracy < 1
    off, _ = _residuals(problem, blx.Stackelberg(), x + 0.1, x * total)
    assert off["inner"] > 1e-3 and off["uniqueness"] == 0


#
# Failures
#


x1, y1 = jnp.array(1.0), jnp.array(0.5)


def _outer(x, y):
    return jnp.sum(y**2) + 0 * x


repelling = blx.FixedPointProblem(_outer, lambda x, y: 2 * y - x + 0.1 * jnp.sin(y))
short = blx.FixedPointProblem(_outer, lambda x, y: 0.99 * y + 0.1 * x)
rootless = blx.RootProblem(_outer, lambda x, y: y**2 + 1 + x**2)
nan = blx.RootProblem(_outer, lambda x, y: jnp.log(y - 1) - x)
iteration = optx.FixedPointIteration(1e-10, 1e-10)


FAILURES = {
    "diverges": (repelling, iteration, 10, "root_diverged", "FixedPointIteration(rtol"),
    "overflows": (repelling, iteration, 5000, "root_diverged", "eigenvalues of d phi"),
    "stops short": (short, iteration, 3, "root_not_converged", "The residual has norm"),
    "no root": (rootless, blx.Projection(), None, "root_not_converged", "no root near"),
    "nan": (nan, optx.Newton(**tight), 50, "nonfinite_step", "Not finite: y"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_have_their_own_sentence(name):
    problem, solver, max_steps, entry, words = FAILURES[name]
    response = blx.Implicit(solver, lx.LU(), max_steps=max_steps)
    out = blx.hypergradient(problem, x1, y1, response, throw=False)
    assert out.result == getattr(blx.RESULTS, entry)
    with pytest.raises(eqx.EquinoxRuntimeError, match=words.replace("(", r"\(")):
        blx.hypergradient(problem, x1, y1, response)
    with pytest.raises(eqx.EquinoxRuntimeError, match=words.replace("(", r"\(")):
        blx.best_response(problem, x1, y1, response)


def test_what_diverged_is_found_by_what_the_sentence_recommends():
    solvers = blx.Projection(), optx.Newton(**tight)
    for solver in solvers:
        y = blx.best_response(repelling, x1, y1, blx.Implicit(solver, lx.LU()))
        assert np.allclose(y + 0.1 * np.sin(y), 1, rtol=1e-12)


def test_divergence_in_a_run_names_its_step():
    response = blx.Implicit(iteration, lx.LU(), max_steps=20)
    pipeline = blx.GradientPipeline(response, optax.sgd(0.1))
    with pytest.raises(eqx.EquinoxRuntimeError, match="outer step 1: The solve for the"):
        blx.solve(repelling, blx.WarmStart(), x1, y1, pipeline=pipeline, num_steps=5)


def test_diverging_series():
    response = blx.Implicit(blx.Projection(), blx.Neumann(20, 1.0))
    out = blx.hypergradient(repelling, x1, y1, response, throw=False)
    assert out.result == blx.RESULTS.neumann_diverged
    with pytest.raises(eqx.EquinoxRuntimeError, match="I - step_size dr/dy"):
        blx.hypergradient(repelling, x1, y1, response)


def test_singular_jacobian_is_reported():
    # All of the line y_1 + y_2 = x are roots, and LU divides by zero.
    problem = blx.RootProblem(
        lambda x, y: y[0], lambda x, y: (jnp.sum(y) - x) * jnp.array([1.0, 1.0])
    )
    response = blx.Implicit(None, lx.LU())
    y = jnp.array([0.5, 0.5])
    with pytest.raises(eqx.EquinoxRuntimeError):
        blx.hypergradient(problem, jnp.array(1.0), y, response)


#
# Refusals
#


scalar = blx.RootProblem(lambda x, y: jnp.sum(y**2), lambda x, y: y + y**3 - x)
minimum = blx.BilevelProblem(lambda x, y: y**2, lambda x, y: (y - x) ** 2)
newton = optx.Newton(**tight)


def _respond(response, problem=scalar):
    return lambda: blx.hypergradient(problem, x1, y1, response)


def _solve(equilibrium):
    return lambda: blx.solve(scalar, equilibrium, x1, y1, num_steps=2)


def _certify(equilibrium):
    return lambda: blx.certify(scalar, equilibrium, x1, y1, y0=y1)


def _error_bound():
    out = blx.hypergradient(scalar, x1, y1, blx.Implicit(newton, lx.LU()))
    return blx.error_bound(scalar, x1, out, "dense")


def _retrain_gap():
    run = dict(num_steps=2, certify=False)
    solution = blx.solve(scalar, blx.Stackelberg(), x1, y1, **run)
    return blx.retrain_gap(scalar, solution)


def _shaped(root, name=blx.RootProblem):
    problem = name(lambda x, y: jnp.sum(y), root)
    return lambda: blx.hypergradient(
        problem, x1, jnp.ones(2), blx.Implicit(newton, lx.LU())
    )


class _Confined(blx.AbstractRootProblem):
    def outer(self, x, y):
        return y**2

    def root(self, x, y):
        return y - x

    def project_y(self, y):
        return jnp.clip(y, 0, 1)


REFUSALS = {
    "cg": (_respond(blx.Implicit(newton, lx.CG(**tight))), "`CG` solves only symm.*LU"),
    "cholesky": (_respond(blx.Implicit(newton, lx.Cholesky())), "`Cholesky` solves only"),
    "truncated": (_respond(blx.Implicit(newton, blx.TruncatedCG(5))), "`TruncatedCG` so"),
    "proximal": (_respond(blx.Proximal(1.0, None, lx.LU())), "`Proximal`.*`WarmStart"),
    "nearest": (
        _respond(blx.MinimumDisplacement()),
        "`MinimumDisplacement` is for inner",
    ),
    "aggregated": (_respond(blx.Aggregated(5)), "`Aggregated` is for .*Use `Implicit`"),
    "line search": (_respond(blx.Unrolled(optax.lbfgs(), 3)), "it has a line search"),
    "cold": (_solve(blx.ColdStart()), "`ColdStart` is for.*Use `Stackelberg"),
    "optimistic": (_solve(blx.Optimistic()), "`Optimistic` is for .* a root"),
    "pessimistic": (_certify(blx.Pessimistic(1.0)), "`Pessimistic` is for"),
    "nash": (_certify(blx.Nash()), "`Nash` is for .*WarmStart"),
    "proximal game": (_solve(blx.ProximalEquilibrium(1.0)), "`ProximalEquilibrium` is"),
    "partial": (_solve(blx.WarmStart(0.5)), "a full warm start, `WarmStart"),
    "partial, certified": (_certify(blx.WarmStart(0.5)), "a full warm start, `WarmStart"),
    "diagnose": (lambda: blx.diagnose(scalar, x1, y1), "`diagnose`.*check_hypergradient"),
    "compare": (lambda: blx.compare(scalar, x1, y1), "`compare` is for"),
    "bound": (_error_bound, "`error_bound` is for .*check_hypergradient"),
    "retrain": (_retrain_gap, "`retrain_gap` is for"),
    "inner": (lambda: scalar.inner(x1, y1), "it has no inner objective"),
    "shape": (_shaped(lambda x, y: jnp.sum(y) - x), "root.x, y.. must return .* of y"),
    "structure": (
        _shaped(lambda x, y: (y, y)),
        "must return a pytree with the structure",
    ),
    "type": (_shaped(lambda x, y: y.astype(jnp.float32)), "`.astype.....` mends a type"),
    # Which a subtraction would spread over y.
    "number": (
        _shaped(lambda x, y: jnp.sum(y) * x, blx.FixedPointProblem),
        "problem.fixed_point.x, y.. must return",
    ),
    "constant": (
        _shaped(lambda x, y: x + 0 * jnp.ones(2)),
        "The root does not depend on",
    ),
    "confined": (_respond(blx.Implicit(newton, lx.LU()), _Confined()), "a `project_y`"),
    "bounds": (
        _respond(blx.Implicit(optx.Bisection(1e-8, 1e-8), lx.LU())),
        "needs bounds of the root",
    ),
    "minimum": (
        _respond(blx.Implicit(newton, lx.LU()), minimum),
        "`Newton` finds a root",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    call, words = REFUSALS[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_refusals_under_differentiation():
    response = blx.Implicit(newton, blx.TruncatedCG(5))
    with pytest.raises(ValueError, match="solves only symmetric systems"):
        jax.grad(lambda x: blx.best_response(scalar, x, y1, response))(x1)


#
# The audit
#


@pytest.mark.slow
def test_check_hypergradient():
    problem = layer_problem()
    check = blx.check_hypergradient(problem, jnp.asarray(x_layer), jnp.zeros(6))
    assert check.sound and check.findings == ()
    assert len(check.responses) == 4
    assert all(answer.right for answer in check.responses.values())


def test_check_hypergradient_finds_a_fault():
    # A residual whose derivative in x is not that of its values.
    problem = blx.RootProblem(
        lambda x, y: jnp.sum(y**2),
        lambda x, y: y + y**3 - x - jax.lax.stop_gradient(jnp.sin(x)),
    )
    check = blx.check_hypergradient(problem, x1, y1, (blx.Implicit(newton, lx.LU()),))
    assert not check.sound
    assert any("derivative of the root in x" in finding for finding in check.findings)
    (answer,) = check.responses.values()
    assert not answer.right


def test_check_hypergradient_of_swapped_arguments():
    problem = blx.RootProblem(
        lambda x, y: jnp.sum(y**2), lambda y, x: y @ jnp.ones((2, 3)) @ x + y
    )
    check = blx.check_hypergradient(problem, jnp.ones(3), jnp.ones(2))
    assert not check.sound and len(check.findings) == 1


def test_a_root_without_forward_mode():
    # A rule for reverse mode alone: there is no Jacobian to take Newton steps with.
    @jax.custom_vjp
    def half(y):
        return y / 2

    half.defvjp(lambda y: (half(y), None), lambda _, u: (u / 2,))
    problem = blx.RootProblem(
        lambda x, y: jnp.sum(y**2), lambda x, y: y - half(y) - jnp.cos(x)
    )
    check = blx.check_hypergradient(problem, jnp.ones(2), jnp.zeros(2))
    assert len(check.findings) == 1
    assert "derivatives of `root` cannot be computed in forward mode" in str(check)
    assert "custom_vjp" in str(check)
