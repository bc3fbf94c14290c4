"""Certificates: that they are what the definitions say, and that they tell the concepts
apart."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    as_numpy,
    CurvedLeastSquares,
    dtypes,
    finite_difference_gradient,
    grid,
    make_curved,
    toy_a,
    tree_allclose,
    tree_has_dtype,
)
from jaxtyping import Array, PyTree

import bilevel_eqx as blx


toy = toy_a()
C = 0.4
EPSILON = 1.0


def _share(wrong, right):
    """The scaling that `certify` documents."""
    wrong, right = np.linalg.norm(wrong), np.linalg.norm(right)
    return wrong / (wrong + right) if wrong else 0.0


#
# Toy A
#


def _toy_points():
    """A point (w, x0, x1) for each concept, by hand."""
    m = 1 - (1 - 0.3) ** 3
    full = (1 + C) / 2
    partial = (1 + C * (1 + EPSILON)) / (2 + EPSILON)
    k_warm = (C + m) / (1 + m)
    k_cold = (C + m) / (1 + m**2)
    return {
        "full": (full, full, C),
        "partial": (partial, partial, C),
        "K steps, warm": (k_warm, k_warm, C),
        "K steps, cold": (k_cold, m * k_cold, C),
        "optimistic": (1.0, 1.0, 1.0),
        "Nash": (0.2, 0.2, 0.2),
        "nowhere": (0.3, -0.4, 2.0),
    }


def _toy_concepts():
    """A concept, where it starts, and the points that satisfy its definition."""
    return {
        # With fixed features cold and full warm start agree on every path, and where
        # x1 was at its best to begin with, the optimistic point is one too.
        "full": (blx.WarmStart(), None, ("full", "optimistic")),
        "partial": (blx.WarmStart(EPSILON), None, ("partial", "optimistic")),
        "cold": (blx.ColdStart(), (0.0, C), ("full",)),
        "cold from 1": (blx.ColdStart(), (0.0, 1.0), ("optimistic",)),
    }


def _toy_residuals(name, y0, w, x0, x1):
    """Every residual, by hand: H = diag(1, 0), B = (-1, 0)."""
    J = 1 / (1 + EPSILON) if name == "partial" else 1.0
    y, start = np.array([x0, x1]), np.array([x0, x1] if y0 is None else y0)
    sizes = np.abs(y) + np.abs(y - start)
    step = J * (x0 - w)
    reach = J * abs(w) if step else 0.0
    # F = ((w - x1)^2 + (x0 - 1)^2) / 2, and its gradients at other signs of the terms.
    F_w, F_x = w - x1, np.array([x0 - 1, x1 - w])
    by_w, by_x = w * np.cos(1), sizes * np.sin([1, 2])
    change_w, change_x = by_w - by_x[1], np.array([by_x[0], by_x[1] - by_w])
    mixed = J * np.cos(1) * (abs(F_x[0]) + abs(change_x[0]))
    terms = abs(F_w) + abs(change_w) + abs(mixed)
    residuals = {
        "inner": _share(step, np.linalg.norm(sizes) + reach),
        "inner curvature": 0.0,
        "outer": _share(F_w + J * (x0 - 1), terms),
    }
    if y0 is not None:
        residuals["displacement"] = _share(x1 - y0[1], sizes)
        residuals["curvature"] = 0.0
    return residuals


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("name", list(_toy_concepts()))
def test_toy_a(name, dtype):
    equilibrium, y0, own = _toy_concepts()[name]
    start = None if y0 is None else jnp.asarray(y0, dtype)
    points = _toy_points()
    for point, (w, x0, x1) in points.items():
        certificate = blx.certify(
            toy,
            equilibrium,
            jnp.asarray(w, dtype),
            jnp.asarray([x0, x1], dtype),
            y0=start,
        )
        expected = _toy_residuals(name, y0, w, x0, x1)
        # The terms are known by differences.
        tol = 1e-8 if dtype == jnp.float64 else 1e-3
        assert tree_allclose(certificate.residuals, expected, rtol=tol, atol=1e-3 * tol)
        assert tree_has_dtype(certificate, dtype)
        if point in own:
            assert certificate.largest < 1e-6
        else:
            assert certificate.largest > 1e-2
        assert tree_allclose(certificate.largest, max(expected.values()), rtol=tol)


def test_vmap_over_epsilon_from_zero():
    # Zero is then known only at run time; it must mean what it means otherwise.
    epsilon = jnp.array([0.0, 0.1, EPSILON])
    w, y = jnp.array(0.3), jnp.array([0.3, C])

    @jax.jit
    @jax.vmap
    def outer_residual(epsilon):
        return blx.certify(toy, blx.WarmStart(epsilon), w, y).residuals["outer"]

    residuals = outer_residual(epsilon)
    for value, residual in zip(epsilon, residuals):
        alone = blx.certify(toy, blx.WarmStart(float(value)), w, y)
        assert tree_allclose(residual, alone.residuals["outer"], rtol=1e-10)
    assert len(np.unique(residuals)) == 3


#
# The partial warm start, with the curvature of the residual
#


@pytest.mark.parametrize("structured", (True, False))
def test_partial_warm_start_of_a_nonlinear_problem(structured):
    # Away from any equilibrium, so that no term is small.
    problem, x, y = make_curved()
    y = jax.tree.map(lambda u: u + 0.2, y)
    flat_x, unravel_x = jax.flatten_util.ravel_pytree(x)
    flat_y, unravel_y = jax.flatten_util.ravel_pytree(y)

    def inner(x, y):
        return problem.inner(unravel_x(x), unravel_y(y))

    def outer(x, y):
        return problem.outer(unravel_x(x), unravel_y(y))

    @jax.jit
    def derivatives(x, y):
        f_y = jax.grad(inner, argnums=1)
        H, B = jax.jacfwd(f_y, argnums=1)(x, y), jax.jacfwd(f_y)(x, y)
        return f_y(x, y), H, B, *jax.grad(outer, argnums=(0, 1))(x, y)

    f_y, H, B, F_x, F_y = map(as_numpy, derivatives(flat_x, flat_y))
    damped = H + 0.5 * np.eye(len(flat_y))
    gradient = F_x - B.T @ np.linalg.solve(damped, F_y)
    # That the curvature matters here, and that epsilon does.
    full = F_x - B.T @ np.linalg.solve(H, F_y)
    assert not np.allclose(full, gradient, rtol=0.1)

    def residuals(gradient):
        """With a linear term in F, for which this x is stationary if the certificate
        knows each component of the gradient."""
        tilted = Tilted(problem, unravel_x(-jnp.asarray(gradient)))
        tilted = tilted if structured else blx.BilevelProblem(tilted.outer, tilted.inner)
        return blx.certify(tilted, blx.WarmStart(0.5), x, y).residuals

    assert residuals(gradient)["outer"] < 1e-12
    assert residuals(full)["outer"] > 1e-2
    assert residuals(gradient)["inner"] > 1e-2


class Tilted(blx.AbstractLeastSquaresProblem):
    """A problem with a linear term in F."""

    problem: CurvedLeastSquares
    slope: PyTree[Array]

    def outer(self, x, y):
        return self.problem.outer(x, y) + optax.tree.vdot(self.slope, x)

    def inner_residual(self, x, y):
        return self.problem.inner_residual(x, y)


#
# The cold start: T12. The response is a projection on a set that moves, and turns.
#


class MovingRows(blx.AbstractLeastSquaresProblem):
    """Two rows, in five weights, that turn with x."""

    directions: Array
    shift: Array

    def features(self, x):
        return jnp.sin(jnp.tensordot(x, self.directions, 1) + self.directions[0])

    def inner_residual(self, x, y):
        return self.features(x) @ y - jnp.array([1.5, -0.5]) * jnp.sum(x**2)

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - 1) ** 2) + jnp.sum(self.shift * x)

    def project(self, x, y0):
        phi = self.features(x)
        error = self.inner_residual(x, y0)
        return y0 - phi.T @ jnp.linalg.solve(phi @ phi.T, error)


def make_rows():
    rng = np.random.default_rng(7)
    rows = MovingRows(jnp.asarray(rng.normal(size=(3, 2, 5))), jnp.zeros(3))
    x = jnp.asarray([0.5, -0.8, 0.3])
    y0 = jnp.asarray(rng.normal(size=5))
    return rows, x, y0


class Plain(blx.AbstractBilevelProblem):
    """The same, without saying that the inner objective is a sum of squares."""

    problem: blx.AbstractLeastSquaresProblem

    def outer(self, x, y):
        return self.problem.outer(x, y)

    def inner(self, x, y):
        return self.problem.inner(x, y)


class Sphere(blx.AbstractLeastSquaresProblem):
    """S(x) is a sphere: x[0] moves its centre, and x[1] is the square of its radius."""

    shift: Array

    def outer(self, x, y):
        weights = jnp.array([1.0, 2.0, -0.5])
        return 0.5 * jnp.sum((y - weights) ** 2) + jnp.sum(self.shift * x)

    def centre(self, x):
        return x[0] * jnp.array([1.0, 0.0, -1.0])

    def inner_residual(self, x, y):
        return jnp.sum((y - self.centre(x)) ** 2) - x[1]

    def project(self, x, y0):
        away = y0 - self.centre(x)
        return self.centre(x) + jnp.sqrt(x[1]) * away / jnp.linalg.norm(away)


class Ellipse(blx.AbstractLeastSquaresProblem):
    """S(x) is an ellipse whose axes x moves; its points are (a cos, b sin)."""

    shift: Array

    def outer(self, x, y):
        return jnp.sum(jnp.sin(y)) + jnp.sum(y**2) + jnp.sum(self.shift * x)

    def inner_residual(self, x, y):
        return jnp.sum((y / x) ** 2) - 1

    def project(self, x, y0):
        # The angle of the nearest point, by Newton's method in one variable.
        def point(angle):
            return x * jnp.stack([jnp.cos(angle), jnp.sin(angle)])

        slope = jax.grad(lambda angle: 0.5 * jnp.sum((point(angle) - y0) ** 2))

        def newton(_, angle):
            return angle - slope(angle) / jax.grad(slope)(angle)

        return point(jax.lax.fori_loop(0, 20, newton, jnp.arctan2(y0[1], y0[0])))


def _cold_problems():
    rows, x, y0 = make_rows()
    sphere = Sphere(jnp.zeros(2)), jnp.array([0.3, 1.7]), jnp.array([0.9, -0.6, 1.5])
    ellipse = Ellipse(jnp.zeros(2)), jnp.array([1.5, 0.8]), jnp.array([1.6, 1.1])
    return {"rows": (rows, x, y0), "sphere": sphere, "ellipse": ellipse}


@pytest.mark.parametrize(
    "name, structured",
    grid(
        lambda name, structured: name == "sphere" or structured == (name == "rows"),
        _cold_problems(),
        (True, False),
    ),
)
def test_cold_start_is_stationarity_through_the_projection(name, structured):
    problem, x, y0 = _cold_problems()[name]

    @jax.jit
    def cold(x):
        y = problem.project(x, y0)
        return y, problem.outer(x, y), problem.inner(x, y)

    def cold_value(x):
        return cold(x)[1]

    y, value, inner = cold(x)
    assert np.abs(inner) < 1e-20
    gradient = finite_difference_gradient(cold_value, x)
    # A linear term that makes this x stationary: then the certificate is zero only if
    # each component of the gradient is right.
    mended = eqx.tree_at(lambda p: p.shift, problem, -gradient)

    def residuals(problem):
        problem = problem if structured else Plain(problem)
        certificate = blx.certify(problem, blx.ColdStart(), x, y, y0=y0)
        return certificate.residuals

    before, after = residuals(problem), residuals(mended)
    assert np.linalg.norm(gradient) > 0.1 * abs(value)
    assert before["outer"] > 1e-2
    assert after["outer"] < 1e-8
    for residual in (before, after):
        others = [residual[name] for name in residual if name != "outer"]
        assert max(others) < 1e-8
    # -H^+ B alone, which is right for the warm start, is not what is zero here.
    warm = blx.certify(mended, blx.WarmStart(), x, y)
    assert warm.residuals["outer"] > 1e-2


def test_displacement():
    problem, x, y0 = make_rows()
    y = eqx.filter_jit(problem.project)(x, y0)
    phi = as_numpy(eqx.filter_jit(problem.features)(x))
    rng = np.random.default_rng(3)
    along = rng.normal(size=5)
    along = along - np.linalg.pinv(phi) @ phi @ along
    moved = y + 0.3 * jnp.asarray(along)
    certificate = blx.certify(problem, blx.ColdStart(), x, moved, y0=y0)
    # Still an inner minimum, and no longer the nearest one.
    assert certificate.residuals["inner"] < 1e-10
    expected = _share(0.3 * along, np.abs(moved) + np.abs(moved - y0))
    assert tree_allclose(certificate.residuals["displacement"], expected, rtol=1e-8)


def _minimise(fn, x):
    """Newton's method with a line search, on a dense Hessian."""
    value, gradient, hessian = (jax.jit(f) for f in (fn, jax.grad(fn), jax.hessian(fn)))
    for _ in range(50):
        g, h = as_numpy(gradient(x)), as_numpy(hessian(x))
        eigenvalues, vectors = np.linalg.eigh(h)
        step = vectors @ (vectors.T @ g / np.maximum(np.abs(eigenvalues), 1e-3))
        t = 1.0
        # Negated, so that NaN is no decrease.
        while not value(x - jnp.asarray(t * step)) <= value(x) and t > 1e-8:
            t = t / 2
        x = x - jnp.asarray(t * step)
    assert np.linalg.norm(gradient(x)) < 1e-10
    return x


def test_cold_optimum():
    # Found by an independent optimiser of an independent projection.
    problem, x, y0 = make_rows()
    project = eqx.filter_jit(problem.project)
    x = _minimise(lambda x: problem.outer(x, problem.project(x, y0)), x)
    y = project(x, y0)
    certificate = blx.certify(problem, blx.ColdStart(), x, y, y0=y0)
    assert certificate.largest < 1e-6
    # Where the features move, it is another point than a warm start's.
    assert blx.certify(problem, blx.WarmStart(), x, y).largest > 1e-2
    # And another than the cold one from elsewhere.
    elsewhere = blx.certify(problem, blx.ColdStart(), x, y, y0=y0 + 1.0)
    assert elsewhere.residuals["displacement"] > 1e-2


#
# The certificate itself
#


def test_certificate_prints():
    w, y = jnp.array(0.7), jnp.array([0.7, C])
    certificate = blx.certify(toy, blx.ColdStart(), w, y, y0=jnp.array([0.0, C]))
    names = {"inner", "inner curvature", "displacement", "curvature", "outer"}
    assert set(certificate.residuals) == names
    assert set(certificate.meanings) == set(certificate.residuals)
    header, *lines, accuracy, note = str(certificate).splitlines()
    assert header == "Certificate for a cold start"
    assert f"{float(certificate.accuracy):.2e}" in accuracy
    assert "stationary" in note and "not checked" in note
    for line, (name, meaning) in zip(lines, certificate.meanings.items(), strict=True):
        assert name in line and meaning in line
        assert f"{float(certificate.residuals[name]):.2e}" in line
    warm = blx.certify(toy, blx.WarmStart(), w, y)
    assert set(warm.residuals) == {"inner", "inner curvature", "outer"}
    assert "a full warm start" in str(warm)
    assert "a partial warm start" in str(blx.certify(toy, blx.WarmStart(0.1), w, y))


def test_certificate_prints_under_transformations():
    y = jnp.array([0.7, C])
    printed = []

    @jax.jit
    def traced(w):
        certificate = blx.certify(toy, blx.WarmStart(), w, y)
        printed.append(str(certificate))
        return certificate.largest

    traced(jnp.array(0.7))
    assert "traced" in printed[0]
    batch = jax.jit(jax.vmap(lambda w: blx.certify(toy, blx.WarmStart(), w, y)))(
        jnp.ones(2)
    )
    row = next(line for line in str(batch).splitlines() if "outer" in line)
    assert row.count("0.") == 2 and "[" in row


def test_largest_hands_nan_on():
    certificate = blx.Certificate("x", {"a": (jnp.nan, "a"), "b": (1.0, "b")})
    assert np.isnan(certificate.largest)
    assert blx.Certificate("x", {"a": (2.0, "a"), "b": (1.0, "b")}).largest == 2


def test_cold_start_needs_its_start():
    with pytest.raises(ValueError, match=r"certify\(problem, ColdStart\(\), .* y0=...\)"):
        blx.certify(toy, blx.ColdStart(), jnp.array(0.7), jnp.array([0.7, C]))


@pytest.mark.parametrize("epsilon", (-0.1, float("nan")))
def test_epsilon_is_not_negative(epsilon):
    match = r"`WarmStart\(epsilon=...\)` must be at least zero"
    with pytest.raises(ValueError, match=match):
        blx.WarmStart(epsilon)


@pytest.mark.parametrize(
    "bad, match",
    (
        ({"x": jnp.array(1)}, "Every leaf of `x` .* int64"),
        ({"y": jnp.arange(2)}, "Every leaf of `y` .* int64"),
        ({"y0": jnp.arange(2)}, "Every leaf of `y0` .* int64"),
        ({"problem": blx.BilevelProblem(lambda w, y: y, toy.inner)}, "outer objective"),
    ),
)
def test_wrong_arguments(bad, match):
    good = dict(problem=toy, x=jnp.array(0.7), y=jnp.array([0.7, C]), y0=jnp.zeros(2))
    with pytest.raises(ValueError, match=match):
        blx.certify(equilibrium=blx.ColdStart(), **{**good, **bad})


@pytest.mark.slow
@pytest.mark.parametrize(
    "concept, num_products",
    # The latter has to show that the minimum is unique, with half of the products.
    ((blx.WarmStart(), 40), (blx.Stackelberg(), 80)),
)
def test_a_large_certificate_takes_no_more_products_than_allowed(concept, num_products):
    # H has 1,500 eigenvalues, of which twenty are large and stand apart.
    size = 1500
    values = np.full(size, 1.0)
    values[:20] = np.arange(2, 22)
    values = jnp.asarray(values)

    def inner(x, y):
        return 0.5 * jnp.sum(values * (y - x[0]) ** 2)

    problem = blx.BilevelProblem(lambda x, y: 0.5 * jnp.sum((y - 2) ** 2), inner)
    x, y = jnp.array([1.0]), jnp.ones(size)
    certificate = blx.certify(problem, concept, x, y, max_products=num_products)
    # dF/dx = sum (y - 2) dy/dx = -1500. As many times the terms of F_y, whose signs are
    # mixed, make a number of another order.
    assert certificate.residuals["outer"] > 0.1
    assert certificate.accuracy < 1e-6
    rough = blx.certify(problem, concept, x, y, max_products=12)
    assert rough.accuracy > certificate.accuracy
    assert "linear solves behind these" in str(rough)


def _large_cold_start(size=1500):
    """A cold-start equilibrium in closed form; H has a thousand distinct eigenvalues, and
    five hundred that are zero."""
    rng = np.random.default_rng(0)
    values = np.where(np.arange(size) < 1000, np.geomspace(1, 0.1, size), 0)
    c, y0 = rng.normal(size=(2, size))
    U = np.stack([np.sin(np.arange(size)), np.ones(size)], axis=1)
    U = np.where(values[:, None] > 0, U, 0)

    def outer(x, y):
        return 0.5 * jnp.sum((y - c) ** 2) + 0.5 * jnp.sum(x**2)

    def inner(x, y):
        return 0.5 * jnp.sum(values * (y - U @ x) ** 2)

    # The nearest inner minimum is U x where H is not zero, and y0 elsewhere.
    x = np.linalg.solve(U.T @ U + np.eye(2), U.T @ c)
    y = np.where(values > 0, U @ x, y0)
    return blx.BilevelProblem(outer, inner), x, y, y0


@pytest.mark.slow
def test_a_large_cold_start_stated_plainly():
    """H^+ is right on F_y and on y - y0 alike: the space of their sum has neither."""
    problem, x, y, y0 = _large_cold_start()

    def certified(y, max_products=128):
        arguments = problem, blx.ColdStart(), jnp.asarray(x), jnp.asarray(y)
        return blx.certify(*arguments, y0=jnp.asarray(y0), max_products=max_products)

    known = certified(y)
    assert known.largest < 1e-8 and known.accuracy < 1e-8
    # What is not right is said to be not right; and few products are no error.
    rough = certified(y, 16)
    assert rough.largest > 0.1 and rough.accuracy > 0.1
    # One percent along S(x), and across it.
    moved = 0.01 * np.random.default_rng(1).normal(size=y.size)
    along = np.where(np.arange(y.size) < 1000, 0, moved)
    assert certified(y + along).residuals["displacement"] > 1e-3
    across = certified(y + moved - along).residuals
    assert across["inner"] > 1e-3 and across["displacement"] < 1e-8
