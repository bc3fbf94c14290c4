"""Conditioning, and what counts as zero curvature."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import as_numpy, dtypes, value_and_both
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx._derivatives.operators import AugmentedHessian
from bilevel_eqx._derivatives.second import expansion


implicit = blx.Implicit(blx.Projection(), blx.Pseudoinverse())


#
# Random linear-quadratic problems, against their known factors
#


class Squares(blx.AbstractLeastSquaresProblem):
    A: Array
    b: Array
    C: Array
    t: Array

    def inner_residual(self, x, y):
        return self.A @ y - self.b - self.C @ x

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.t) ** 2)


class Quadratic(blx.AbstractBilevelProblem):
    H: Array
    b: Array
    C: Array
    t: Array

    def inner(self, x, y):
        return 0.5 * jnp.vdot(y, self.H @ y) - jnp.vdot(y, self.b + self.C @ x)

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.t) ** 2)


SIZE, ROWS, OUTER = 6, 9, 3


def _factors(rng, rows):
    """An orthogonal basis for each side, and singular values of a random rank, scale and
    condition number."""
    U = np.linalg.qr(rng.normal(size=(rows, rows)))[0]
    V = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    rank = rng.integers(1, SIZE + 1)
    condition = 10 ** rng.uniform(0, 8)
    values = 10 ** rng.uniform(-6, 6) * condition ** -np.linspace(0, 1, rank)
    return U[:, :rank], values, V[:, :rank], U[:, rank:]


def _random_squares(rng, noise):
    U, s, V, rest = _factors(rng, ROWS)
    R = rng.normal(size=(s.size, OUTER))
    C = (U * s) @ R
    within, across = rng.normal(size=s.size), noise * rng.normal(size=rest.shape[1])
    t = rng.normal(size=SIZE)
    b = (U * s) @ within + s[0] * rest @ across
    y = V @ within
    gradient = R.T @ (V.T @ (y - t))
    condition, far = s[0] / s[-1], np.linalg.norm(across) / np.linalg.norm(y)
    # The condition of a least-squares solution: Wedin, 1973.
    condition = condition + condition**2 * far
    scale = np.linalg.norm(R, 2) * np.linalg.norm(y - t)
    return ((U * s) @ V.T, b, C, t), y, gradient, condition, scale


def _random_quadratic(rng):
    V, s, _, _ = _factors(rng, SIZE)
    R = rng.normal(size=(s.size, OUTER))
    C = (V * s) @ R
    within, t = rng.normal(size=s.size), rng.normal(size=SIZE)
    y = V @ within
    gradient = R.T @ (V.T @ (y - t))
    scale = np.linalg.norm(R, 2) * np.linalg.norm(y - t)
    return ((V * s) @ V.T, (V * s) @ within, C, t), y, gradient, s[0] / s[-1], scale


@jax.jit
def _gradients(problems):
    """By the hypergradient, and by the best response in both modes."""
    x, y = jnp.zeros(OUTER), jnp.zeros(SIZE)

    def one(problem):
        def composed(x):
            y_at_x = blx.best_response(problem, x, y, implicit, throw=False)
            return problem.outer(x, y_at_x)

        out = blx.hypergradient(problem, x, y, implicit, throw=False)
        nearest = blx.MinimumDisplacement()
        displaced = blx.hypergradient(problem, x, y, nearest, throw=False)
        modes = jax.grad(composed)(x), jax.jacfwd(composed)(x)
        gradients = jnp.stack([out.gradient, displaced.gradient, *modes])
        good = out.result == blx.RESULTS.successful
        good_displaced = displaced.result == blx.RESULTS.successful
        goods = jnp.stack([good, good_displaced, good, good])
        return out.y, gradients, goods

    # Not by `jax.vmap`, as below: to batch a program takes as long as to trace it.
    return jax.lax.map(one, problems)


def _check_random(kind, count):
    rng = np.random.default_rng(17)
    draw = {
        "squares": lambda rng: _random_squares(rng, 0.0),
        "noisy squares": lambda rng: _random_squares(rng, 1.0),
        "quadratic": _random_quadratic,
    }[kind]
    cls = Quadratic if kind == "quadratic" else Squares
    data, y, gradient, condition, scale = zip(*(draw(rng) for _ in range(count)))
    problems = cls(*(jnp.asarray(np.stack(part)) for part in zip(*data)))
    ys, gradients, good = map(as_numpy, _gradients(problems))
    bound = 100 * np.finfo(float).eps * np.array(condition)
    error_y = np.linalg.norm(ys - y, axis=1) / np.linalg.norm(y, axis=1)
    error = np.linalg.norm(gradients - np.stack(gradient)[:, None], axis=2)
    error = error / np.array(scale)[:, None]
    wrong = (error > np.maximum(bound, 1e-14)[:, None]) & good.astype(bool)
    assert not wrong.any(), (np.argwhere(wrong), error[wrong])
    assert not np.any((error_y > np.maximum(bound, 1e-14)) & good[:, 0].astype(bool))
    # Success is not withheld either.
    assert np.mean(good) > 0.99
    return error, np.array(condition)


KINDS = ("squares", "noisy squares", "quadratic")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_wrong_gradient_is_a_success_in_a_thousand(kind):
    error, condition = _check_random(kind, 1000)
    if kind == "squares":
        # Not by the square of the condition number, which would lose all digits here.
        assert np.all(error[condition > 1e7] < 1e-5)


#
# Random nonlinear problems, whose minimum and gradient are known
#


class _Bent(blx.AbstractBilevelProblem):
    r"""$f = \sum_i w_i e^{a_i^\top x} \log\cosh z_i$ with $z = V^\top y - R x$. Some
    weights are zero: the rank of H is the number of the others."""

    w: Array
    turns: Array
    V: Array
    R: Array
    t: Array
    slope: Array

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.t) ** 2) - self.slope @ x

    def inner(self, x, y):
        z = self.V.T @ y - self.R @ x
        return jnp.sum(self.w * jnp.exp(self.turns @ x) * jnp.log(jnp.cosh(z)))


class _BentSquares(blx.AbstractLeastSquaresProblem):
    r"""The same with $r_i = w_i e^{a_i^\top x} \sinh z_i$."""

    w: Array
    turns: Array
    V: Array
    R: Array
    t: Array
    slope: Array

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.t) ** 2) - self.slope @ x

    def inner_residual(self, x, y):
        z = self.V.T @ y - self.R @ x
        return self.V @ (self.w * jnp.exp(self.turns @ x) * jnp.sinh(z))


def _random_bent(rng, moves):
    """Data whose equilibrium of a full warm start is (x, y), and the condition."""
    V = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    rank, condition = rng.integers(1, SIZE + 1), 10 ** rng.uniform(0, 8)
    w = np.zeros(SIZE)
    w[:rank] = 10 ** rng.uniform(-6, 6) * condition ** -np.linspace(0, 1, rank)
    turns = moves * rng.normal(size=(SIZE, OUTER))
    R, x, t = (
        rng.normal(size=(SIZE, OUTER)),
        rng.normal(size=OUTER),
        rng.normal(size=SIZE),
    )
    present = w > 0
    y = V @ np.where(present, R @ x, rng.normal(size=SIZE))
    through = R.T @ (present * (V.T @ (y - t)))
    scale = np.linalg.norm(R, 2) * np.linalg.norm(y - t)
    # Of the weights with their factors.
    now = (w * np.exp(turns @ x))[present]
    data = w, turns, V, R, t, through
    return data, x, y, V[:, present] @ rng.normal(size=rank), scale, max(now) / min(now)


@jax.jit
def _bent_answers(problems, xs, ys, moves):
    def one(problem, x, y, move):
        at = blx.Implicit(None, blx.Pseudoinverse())
        out = blx.hypergradient(problem, x, y, at, throw=False)
        nearest = blx.MinimumDisplacement(None)
        displaced = blx.hypergradient(problem, x, y, nearest, throw=False)
        gradients = jnp.stack([out.gradient, displaced.gradient])
        good = jnp.stack([h.result == blx.RESULTS.successful for h in (out, displaced)])

        def largest(x, y):
            return blx.certify(problem, blx.WarmStart(), x, y).largest

        off = 0.01 * jnp.linalg.norm(y) * move / jnp.linalg.norm(move)
        moved = jnp.stack([largest(x, y + off), largest(1.01 * x, y)])
        return gradients, good, largest(x, y), moved

    return jax.lax.map(lambda at: one(*at), (problems, xs, ys, moves))


@pytest.mark.slow
@pytest.mark.parametrize("moves", (0.0, 0.3))
@pytest.mark.parametrize("cls", (_Bent, _BentSquares))
def test_random_nonlinear_problems(cls, moves):
    rng = np.random.default_rng(3)
    draws = [_random_bent(rng, moves) for _ in range(50)]
    data, xs, ys, off, scale, condition = zip(*draws)
    problems = cls(*(jnp.asarray(np.stack(part)) for part in zip(*data)))
    arrays = (jnp.asarray(np.stack(part)) for part in (xs, ys, off))
    gradients, good, at, moved = map(as_numpy, _bent_answers(problems, *arrays))
    # The hypergradient is zero there; its terms are not.
    error = np.linalg.norm(gradients, axis=2) / np.array(scale)[:, None]
    bound = 100 * np.finfo(float).eps * np.array(condition)
    wrong = (error > np.maximum(bound, 1e-13)[:, None]) & good.astype(bool)
    assert not wrong.any(), (np.argwhere(wrong), error[wrong])
    assert np.mean(good) > 0.99
    assert np.all(at < 1e-4)
    assert np.all(moved > 1e-6)


#
# Sums of squares
#


class _Sloped(blx.AbstractLeastSquaresProblem):
    """Residuals of condition number 1 / w, whose minimum is known."""

    w: Array
    rotation: Array
    bend: Array

    def inner_residual(self, x, y):
        z = self.rotation @ y
        s = z[0] + z[1]
        return jnp.stack([s + self.bend * s**3 - x[0], self.w * (z[0] - z[1])])

    def outer(self, x, y):
        return jnp.sum((self.rotation @ y - 1) ** 2)


@eqx.filter_jit
def _composed(problem, x, y0, tangent):
    """F at the best response, and its derivative in both modes."""

    def value(x):
        return problem.outer(x, blx.best_response(problem, x, y0, implicit))

    return value_and_both(value, (x,), (tangent,))


@pytest.mark.parametrize("w", (1e-4, 1e-8, 1e-9))
@pytest.mark.parametrize(
    "bend, angle, x, s, slope",
    # s = x, or s + s^3 = x.
    ((0.0, 0.0, 1.0, 1.0, 1.0), (0.0, 0.7, 3.0, 3.0, 1.0), (1.0, 0.3, 2.0, 1.0, 0.25)),
)
def test_a_sum_of_squares_does_not_square_its_condition(w, bend, angle, x, s, slope):
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    problem = _Sloped(jnp.array(w), jnp.asarray(rotation), jnp.array(bend))
    x, y0 = jnp.array([x]), jnp.zeros(2)
    # z = (s, s) / 2, and F = 2 (s / 2 - 1)^2.
    gradient, rtol = (s - 2) * slope, 100 * np.finfo(float).eps / w
    if bend == 0:
        # J = (1, 1) / 2 in the rotated coordinates.
        J = blx.response_jacobian(problem, x, jnp.zeros(2), blx.Pseudoinverse())
        assert np.allclose(rotation @ as_numpy(J.mv(jnp.ones(1))), 0.5, rtol=rtol)
        u = jnp.asarray(rotation.T @ np.array([0.3, 0.9]))
        assert np.allclose(J.T.mv(u), 0.6, rtol=rtol)
    for response in (implicit, blx.MinimumDisplacement()):
        out = blx.hypergradient(problem, x, y0, response)
        assert np.allclose(rotation @ as_numpy(out.y), s / 2, rtol=rtol)
        assert np.allclose(out.gradient, gradient, rtol=rtol)
    _, pushed, (pulled,) = _composed(problem, x, y0, jnp.ones(1))
    assert np.allclose(pushed, gradient, rtol=rtol)
    assert np.allclose(pulled, gradient, rtol=rtol)


class _Turning(blx.AbstractLeastSquaresProblem):
    """(A + x_1 A_1 + ...) y - b, at x = 0."""

    A: Array
    A_x: Array
    b: Array
    t: Array

    def inner_residual(self, x, y):
        return (self.A + jnp.tensordot(x, self.A_x, 1)) @ y - self.b

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.t) ** 2)


def _turning(rng, condition, rank, noise):
    """Data of such a problem, its gradients for a warm and a cold start, and how much
    they can change by rounding of the data."""
    U = np.linalg.qr(rng.normal(size=(ROWS, ROWS)))[0]
    V = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    U, rest, V = U[:, :rank], U[:, rank:], V[:, :rank]
    s = condition ** -np.linspace(0, 1, rank)
    # Through its range alone, so that the gradient is of the order of one.
    A_x = np.stack([(U * s) @ rng.normal(size=(rank, SIZE)) for _ in range(OUTER)])
    y, t = V @ rng.normal(size=rank), rng.normal(size=SIZE)
    across = noise * rest @ rng.normal(size=rest.shape[1])
    pinv = (V / s) @ U.T
    image = pinv.T @ (y - t)
    moved = -np.array([image @ (dA @ y) for dA in A_x])
    # A^T r = 0, and r is orthogonal to the columns of each A_i.
    null = (y - t) - V @ (V.T @ (y - t))
    turned = np.array([null @ (dA.T @ (pinv.T @ y)) for dA in A_x])
    # Wedin, 1973.
    sensitivity = condition + condition**2 * np.linalg.norm(across) / np.linalg.norm(y)
    data = (U * s) @ V.T, A_x, (U * s) @ (V.T @ y) + across, t
    return data, moved, moved + turned, sensitivity


@pytest.mark.slow
@pytest.mark.parametrize("dense_size", (1024, pytest.param(1, marks=pytest.mark.slow)))
def test_a_residual_whose_jacobian_moves_with_x(dense_size):
    # The term dA^T r, where r is rounding: times H^+, its error would be eps cond^2.
    rng = np.random.default_rng(5)
    conditions = np.repeat(10.0 ** np.arange(2, 9), 6)
    draws = [
        _turning(rng, condition, rank, noise)
        for condition, rank, noise in zip(
            conditions, (6, 6, 4, 4, 2, 3) * 7, (0, 1e-6, 0, 1e-6, 0, 0.1) * 7
        )
    ]
    data, warm, cold, sensitivity = zip(*draws)
    problems = _Turning(*(jnp.asarray(np.stack(part)) for part in zip(*data)))
    solver = blx.Pseudoinverse(dense_size=dense_size)
    implicit = blx.Implicit(blx.Projection(), solver)
    nearest = blx.MinimumDisplacement(linear_solver=solver)

    def gradients(problem):
        x, y0 = jnp.zeros(OUTER), jnp.zeros(SIZE)

        def composed(response):
            return lambda x: problem.outer(
                x, blx.best_response(problem, x, y0, response, throw=False)
            )

        ways = [
            blx.hypergradient(problem, x, y0, implicit, throw=False).gradient,
            blx.hypergradient(problem, x, y0, nearest, throw=False).gradient,
        ]
        if dense_size > 1:
            # What else differentiates makes the same solves.
            ways += [
                jax.grad(composed(implicit))(x),
                jax.grad(composed(nearest))(x),
                jax.jacfwd(composed(implicit))(x),
            ]
        return jnp.stack(ways)

    num_ways = 5 if dense_size > 1 else 2
    exact = np.stack([[w, c, w, c, w][:num_ways] for w, c in zip(warm, cold)])
    found = jax.jit(lambda problems: jax.lax.map(gradients, problems))(problems)
    error = np.linalg.norm(as_numpy(found) - exact, axis=2)
    error = error / np.linalg.norm(exact, axis=2)
    bound = 1000 if dense_size == 1 else 100
    assert np.all(error < bound * np.finfo(float).eps * np.array(sensitivity)[:, None])


@pytest.mark.parametrize("degree, tolerance", ((3, 1e-4), (6, 1e-3)))
def test_a_polynomial_fit_in_single_precision(degree, tolerance):
    # x are the targets. The condition number is 1.8e4 for degree 6. That times eps is
    # 2e-3, and a GPU's rounding needs more of it than a CPU's.
    tolerance *= 1 if jax.default_backend() == "cpu" else 2
    grid = np.linspace(0, 1, 20)
    A = np.vander(grid, degree + 1)
    t = np.cos(np.arange(degree + 1))
    pinv = np.linalg.pinv(A)
    x = np.sin(3 * grid)
    expected = pinv.T @ (pinv @ x - t)
    problem = Squares(*(jnp.asarray(u, jnp.float32) for u in (A, 0 * x, np.eye(20), t)))
    y0 = jnp.zeros(degree + 1, jnp.float32)
    out = blx.hypergradient(problem, jnp.asarray(x, jnp.float32), y0, implicit)
    error = np.linalg.norm(as_numpy(out.gradient) - expected)
    assert error < tolerance * np.linalg.norm(expected)


@pytest.mark.slow
def test_the_augmented_hessian():
    # Both forms of its inverse, against a matrix, with a curved residual.
    def residual(x, y):
        return jnp.concatenate([jnp.tanh(y) - x, 0.1 * y**2 - 0.2, y[:1] * y[1:2]])

    problem = blx.LeastSquaresProblem(lambda x, y: jnp.sum(y), residual)
    x, y = jnp.array([0.1, 0.2, 0.4]), jnp.array([0.3, 0.1, 0.5])
    right = np.cos(np.arange(7.0)), np.sin(np.arange(3.0))

    @jax.jit
    def found(right):
        K = AugmentedHessian(expansion(problem, x, y)[1])
        solvers = (blx.Pseudoinverse(dense_size=size) for size in (1024, 1))
        return K.as_matrix(), [lx.linear_solve(K, right, s).value for s in solvers]

    # The second derivative of <w, r(y)> - |w|^2 / 2 in (w, y), at w = r.
    a, b, c = v = as_numpy(y)
    t, slope = np.tanh(v), 1 - np.tanh(v) ** 2
    w = np.concatenate([t - as_numpy(x), 0.1 * v**2 - 0.2, [a * b]])
    J = np.vstack([np.diag(slope), np.diag(0.2 * v), [b, a, 0]])
    in_y = np.diag(-2 * t * slope * w[:3] + 0.2 * w[3:6])
    in_y[0, 1] = in_y[1, 0] = w[6]
    expected = np.block([[-np.eye(7), J], [J.T, in_y]])
    matrix, solutions = found(right)
    assert np.allclose(matrix, expected, rtol=1e-12, atol=1e-12)
    exact = np.linalg.solve(expected, np.concatenate(right))
    for p, q in solutions:
        assert np.allclose(np.concatenate([p, q]), exact, rtol=1e-8, atol=1e-8)


#
# Zero curvature
#


# Each is flat at zero, with curvature one there.
CURVES = {
    "log cosh": lambda d: jnp.log(jnp.cosh(d)),
    "cosh": lambda d: jnp.cosh(d) - 1,
    "exp": lambda d: jnp.exp(d) - d,
    "quartic": lambda d: d**2 / 2 + d**4,
}


class Separable(blx.AbstractBilevelProblem):
    """A curve of y - x in each entry. Which one is data: the others count for zero."""

    w: Array
    counts: Array

    @staticmethod
    def make(kind, w, dtype) -> "Separable":
        counts = [float(name == kind) for name in CURVES]
        return Separable(jnp.array([1, w], dtype), jnp.array(counts, dtype))

    def inner(self, x, y):
        curves = jnp.stack([curve(y - x) for curve in CURVES.values()])
        return jnp.sum(self.w * (self.counts @ curves))

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - 2) ** 2)


at_anchor = blx.Implicit(None, blx.Pseudoinverse())


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("dtype, w", ((jnp.float32, 2e-5), (jnp.float64, 1e-11)))
def test_small_curvature_is_not_zero_curvature(kind, dtype, w):
    problem = Separable.make(kind, w, dtype)
    x = jnp.ones(2, dtype)
    for response in (
        at_anchor,
        blx.MinimumDisplacement(None),
        blx.Implicit(None, blx.TruncatedCG(10)),
    ):
        out = blx.hypergradient(problem, x, x, response)
        assert np.allclose(out.gradient, [-1, -1], rtol=1e-2)
    z = jnp.array([2, 1], dtype)
    certificate = blx.certify(problem, blx.Stackelberg(), z, z)
    assert certificate.residuals["uniqueness"] == 0
    assert certificate.residuals["outer"] > 0.4


@pytest.mark.parametrize("dtype", dtypes)
def test_unique_is_what_is_inverted(dtype):
    # At each size of an eigenvalue, whether it counts is one decision.
    decisions = set()

    @eqx.filter_jit
    def both(problem, x):
        out = blx.hypergradient(problem, x, x, at_anchor, throw=False)
        certificate = blx.certify(problem, blx.Stackelberg(), x, x)
        return out.stats["linear_rank"], certificate.residuals["uniqueness"]

    x = jnp.ones(2, dtype)
    for kind in ("log cosh", "quadratic"):
        for w in 10.0 ** np.linspace(-18, -2, 65):
            if kind == "quadratic":
                H = jnp.diag(jnp.array([1, w], dtype))
                zero = jnp.zeros(2, dtype)
                problem = Quadratic(H, zero, H, zero)
            else:
                problem = Separable.make(kind, w, dtype)
            rank, missing = both(problem, x)
            assert (rank == 2) == (missing == 0), (kind, w)
            decisions.add((kind, int(rank)))
    assert len(decisions) == 4


@pytest.mark.parametrize("off", (1e-3, 1e-6, 1e-9, 0.0))
@pytest.mark.parametrize("dtype", dtypes)
def test_what_vanishes_at_the_minimum_is_zero_near_it(dtype, off):
    # S is a sphere, and its two tangents have eigenvalues of about 2 off.
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum((y - x) ** 2), lambda x, y: (jnp.vdot(y, y) - 1) ** 2 / 4
    )
    if off > np.sqrt(np.finfo(dtype).eps):
        pytest.skip("not a minimum for this type")
    y = jnp.asarray((1 + off) * np.array([0.6, 0.8, 0.0]), dtype)
    found = blx.diagnose(problem, jnp.ones(3, dtype), y)
    assert found.rank == 1 and found.singular


def test_unclear_decisions_are_reported():
    for w, clear in ((1e-6, True), (5e-14, False), (1e-16, False), (1e-19, True)):
        H = jnp.diag(jnp.array([1.0, w]))
        problem = Quadratic(H, jnp.zeros(2), H, jnp.zeros(2))
        x = jnp.ones(2)
        out = blx.hypergradient(problem, x, x, at_anchor)
        found = blx.diagnose(problem, x, x)
        # The uncertainty is 16 eps.
        ratio = w / (16 * np.finfo(float).eps)
        expected = max(ratio, 1 / ratio)
        assert np.isclose(out.stats["linear_margin"], expected, rtol=1e-6)
        assert np.isclose(found.margin, expected, rtol=1e-6)
        assert ("not clear" in str(found)) == (not clear)


#
# Truncated conjugate gradients
#


@pytest.mark.parametrize(
    "exponent, num_steps, good",
    ((8, 30, False), (8, 400, False), (4, 5, False), (1, 5, True), (2, 60, True)),
)
def test_truncated_cg_succeeds_if_it_is_better_than_nothing(exponent, num_steps, good):
    d = jnp.logspace(0, -exponent, 200)
    problem = Quadratic(jnp.diag(d), jnp.zeros(200), jnp.diag(d), jnp.ones(200))
    # As an array it is data.
    response = blx.Implicit(None, blx.TruncatedCG(jnp.asarray(num_steps)))
    x = jnp.zeros(200)
    out = blx.hypergradient(problem, x, x, response, throw=False)
    q = as_numpy(out.adjoint)
    residual = np.linalg.norm(as_numpy(d) * q + 1) / np.sqrt(200)
    assert np.isclose(out.stats["linear_residual"], residual, rtol=1e-4)
    assert (residual < 1) == good
    assert (out.result == blx.RESULTS.successful) == good
    if not good:
        match = f"ended after {num_steps} steps with a relative residual of"
        with pytest.raises(eqx.EquinoxRuntimeError, match=match):
            blx.hypergradient(problem, x, x, response)


#
# Uniqueness beyond the dense size
#


class Diagonal(blx.AbstractBilevelProblem):
    values: Array

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - 1) ** 2)

    def inner(self, x, y):
        return 0.5 * jnp.sum(self.values * (y - x) ** 2)


@pytest.mark.parametrize(
    "values, missing",
    (
        (np.r_[np.logspace(0, -3, 1499), 0], (0.5, 1)),
        (np.r_[np.logspace(0, -3, 299), 0], (1, 1)),
        (np.r_[np.ones(1499), -1e-3], (1, 1)),
        (np.r_[np.linspace(1, 2, 1499), 0], (0.9, 1)),
        (np.linspace(0.2, 1, 1500), (0, 0)),
    ),
)
def test_uniqueness_is_not_claimed_without_a_bound(values, missing):
    x, problem = jnp.ones(values.size), Diagonal(jnp.asarray(values))
    certificate = blx.certify(problem, blx.Stackelberg(), x, x)
    low, high = missing
    assert low <= float(certificate.residuals["uniqueness"]) <= high
    if values.size > 1024:
        assert "uniqueness is shown by 64 products" in str(certificate)
