"""`diagnose`: what it says of H against closed forms, and of each regime in words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    as_numpy,
    Counter,
    CountingOperator,
    damped_jacobian,
    dense_derivatives,
    dtypes,
    linear_problems,
    make_features,
    make_linear,
    make_moving,
    make_softmax,
    neumann_jacobian,
    project,
    resolve,
    toy_a,
)
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx._text import as_code
from bilevel_eqx._trust.squares import num_squares


def _at_a_minimum(cls, dtype=jnp.float64):
    problem, x, y = make_linear(cls, dtype)
    return problem, x, jnp.asarray(project(problem.features, x, y), dtype)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("cls", linear_problems)
def test_linear_least_squares(cls, dtype):
    problem, x, y = _at_a_minimum(cls, dtype)
    found = blx.diagnose(problem, x, y)
    rtol = 1e-10 if dtype == jnp.float64 else 1e-4
    assert found.exact and found.singular and found.at_minimum
    assert (found.rank, found.num_variables, found.num_products) == (3, 5, 6)
    assert np.isclose(found.largest, 1.4**2, rtol=rtol)
    assert np.isclose(found.smallest_nonzero, 0.6**2, rtol=rtol)
    assert np.isclose(found.step_size, 1 / 1.4**2, rtol=rtol)
    assert abs(found.smallest) < rtol
    # The eigenvalues are the squares of the singular values, and the cut is between.
    expected = np.append([0, 0], np.linalg.svd(as_numpy(problem.features))[1][::-1] ** 2)
    assert np.allclose(found.eigenvalues, expected, rtol=rtol, atol=rtol)
    assert found.is_zero.tolist() == [True] * 2 + [False] * 3
    assert np.all((np.abs(found.eigenvalues) <= found.cut) == found.is_zero)
    _, _, _, outer_y = dense_derivatives(problem, x, y)
    features = as_numpy(problem.features)
    along = outer_y - np.linalg.pinv(features) @ (features @ outer_y)
    assert np.isclose(found.null_share, along @ along / (outer_y @ outer_y), rtol=rtol)


def _relative_error(problem, outer_x, outer_y, jacobian):
    """Of a hypergradient, in the measure that the gaps are given in."""
    exact = np.linalg.pinv(as_numpy(problem.features)).T @ outer_y
    scale = max(np.linalg.norm(exact), np.linalg.norm(outer_x + exact))
    return np.linalg.norm(jacobian.T @ outer_y - exact) / scale


@pytest.mark.slow
def test_gaps_and_terms():
    problem, x, y = _at_a_minimum(linear_problems[0])
    found = blx.diagnose(problem, x, y)
    _, _, outer_x, outer_y = dense_derivatives(problem, x, y)
    error = functools.partial(_relative_error, problem, outer_x, outer_y)

    def series(num_terms):
        return error(neumann_jacobian(problem.features, num_terms, found.step_size))

    for name, gap in found.gaps.items():
        if "Neumann" in name:
            expected = series(int(name.split()[0]))
        else:
            # The name has only two digits of it.
            k = min((1, 10, 100), key=lambda k: abs(1.4**2 / k - float(name.split()[2])))
            expected = error(damped_jacobian(problem.features, 1.4**2 / k))
        assert np.isclose(gap, expected, rtol=1e-9, atol=1e-13), name
    assert found.terms[1.0] == 1
    for tolerance in (0.1, 0.01):
        count = found.terms[tolerance]
        assert count is not None and count > 1
        assert series(count) <= tolerance < series(count - 1)
    at_epsilon = error(damped_jacobian(problem.features, found.epsilon))
    assert np.isclose(at_epsilon, 0.1, rtol=1e-6)


@pytest.mark.slow
def test_at_a_stationary_point():
    # Where the hypergradient vanishes errors are relative to its part through y.
    # A full warm start from zero ends here.
    at = jnp.asarray(0.5), jnp.array([0.5, 0.0])
    found = blx.diagnose(toy_a(), *at)
    # H is diag(1, 0): at step size one a single term is exact on its range.
    assert found.terms == {1.0: 1, 0.1: 1, 0.01: 1}
    assert all(gap <= 1 for gap in found.gaps.values())
    assert np.isclose(found.null_share, 0.5, atol=1e-6)


#
# Sums of squares that are not stated as such
#


_A, _b = jnp.reshape(jnp.cos(jnp.arange(20.0)), (5, 4)), jnp.arange(5.0)
_w = jnp.array([1.0, 0.0, 2.0, 3.0, 0.5])


@jax.jit
def _jitted(r):
    return jnp.vdot(r, r)


_shown = {
    "sum": (lambda x, r: jnp.sum(r**2), 5),
    "mean": (lambda x, r: 0.5 * jnp.mean(jnp.square(r)), 5),
    "product": (lambda x, r: r @ r, 5),
    "itself": (lambda x, r: jnp.sum(r * r) / 3, 5),
    "norm": (lambda x, r: jnp.linalg.norm(r) ** 2, 5),
    "called": (lambda x, r: _jitted(r) / 2, 5),
    "weights": (lambda x, r: jnp.sum(_w * r**2), 5),
    "weighted": (lambda x, r: _w @ jnp.tanh(r) ** 2, 5),
    "ridge": (lambda x, r: jnp.sum(r**2) + jnp.exp(x[0]) * jnp.sum(r[:2] ** 2), 7),
    "constant": (lambda x, r: jnp.sum(r**2) - jnp.sum(x**2) - 3, 5),
    "tree": (lambda x, r: sum(jnp.sum(u**2) for u in (r[:2], jnp.sin(r[2:]))), 5),
}
_not_shown = {
    "signs": lambda x, r: jnp.sum((_w - 1) * r**2),
    "negative": lambda x, r: -jnp.sum(r**2),
    "factor": lambda x, r: x[1] * jnp.sum(r**2),
    "difference": lambda x, r: jnp.sum(r**2) - jnp.sum(r[:2] ** 2),
    "linear": lambda x, r: jnp.sum(r**2) + r[0],
    "cube": lambda x, r: jnp.sum(r**3),
    "two": lambda x, r: r @ (2 * r[::-1]),
    "logistic": lambda x, r: jnp.sum(jnp.logaddexp(0.0, r)),
    "power": lambda x, r: jnp.sum(r**2) ** 1.5,
    "function of it": lambda x, r: jnp.log1p(jnp.sum(r**2)),
    "moving weights": lambda x, r: jnp.sum(jnp.exp(r) * r**2),
    "rows": lambda x, r: jnp.sum(jnp.outer(r, r)),
}


def test_a_sum_of_squares_in_disguise():
    x, y = jnp.array([0.5, -1.0]), jnp.ones(4)
    for name, (f, count) in _shown.items():
        assert num_squares(lambda y: f(x, _A @ y - _b), y) == count, name
    for name, f in _not_shown.items():
        assert num_squares(lambda y: f(x, _A @ y - _b), y) is None, name


def test_what_a_sum_of_squares_would_gain():
    A = jnp.diag(jnp.array([1.0, 1e-3]))

    def residual(x, y):
        return A @ y - x

    plain = blx.BilevelProblem(
        lambda x, y: jnp.sum(y), lambda x, y: 0.5 * jnp.sum(residual(x, y) ** 2)
    )
    x, y = jnp.array([1.0, 1e-3]), jnp.ones(2)
    found = blx.diagnose(plain, x, y)
    assert found.num_squares == 2
    assert "a sum of 2 squares" in str(found)
    assert "1.0e+03 in place of 1.0e+06" in str(found)
    stated = blx.LeastSquaresProblem(lambda x, y: jnp.sum(y), residual)
    assert blx.diagnose(stated, x, y).num_squares is None


#
# More variables than are decomposed
#

NUM_LARGE = 1500


class Large(blx.AbstractBilevelProblem[Array, Array]):
    """Linear least squares, with rows of disjoint support: its spectrum is known."""

    singular_values: Array
    outer_features: Array
    ridge: Array

    @property
    def rows(self):
        return self.singular_values.size

    def predict(self, y):
        blocks = y[: 4 * self.rows].reshape(self.rows, 4)
        return self.singular_values * jnp.sum(blocks, axis=1) / 2

    def outer(self, x, y):
        return 0.5 * jnp.sum((self.outer_features @ y - 1) ** 2)

    def inner(self, x, y):
        fit = 0.5 * jnp.sum((self.predict(y) - x) ** 2)
        return fit + 0.5 * self.ridge * jnp.sum(y**2)


def _large(ridge=0.0, rows=300):
    rng = np.random.default_rng(0)
    values = jnp.asarray(np.linspace(1, 3, rows))
    outer_features = jnp.asarray(rng.normal(size=(3, NUM_LARGE)) / 30)
    problem = Large(values, outer_features, jnp.asarray(ridge))
    x = jnp.asarray(rng.normal(size=rows))
    blocks = jnp.repeat(values * x / 2 / (values**2 + ridge), 4)
    y = jnp.zeros(NUM_LARGE).at[: 4 * rows].set(blocks)
    return problem, x, y


def _large_reference(problem, y):
    """F_y, its share in the null space, and the eigenvalue that each entry belongs to."""
    features = as_numpy(problem.outer_features)
    outer_y = features.T @ (features @ as_numpy(y) - 1)
    means = outer_y[: 4 * problem.rows].reshape(-1, 4).sum(axis=1) / 2
    return outer_y, means, as_numpy(problem.singular_values) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("num_products", (None, 40))
def test_matrix_free(num_products):
    problem, x, y = _large()
    found = blx.diagnose(problem, x, y, num_products=num_products)
    assert not found.exact and found.singular and found.at_minimum
    assert found.num_products <= (num_products or 60)
    outer_y, coordinates, values = _large_reference(problem, y)
    share = 1 - coordinates @ coordinates / (outer_y @ outer_y)
    assert np.isclose(found.null_share, share, rtol=1e-6)
    assert np.isclose(found.largest, 9, rtol=1e-2)
    assert abs(found.smallest) < 1e-6
    assert abs(found.rank - 300) < 60
    # F_x = 0, and B^T is a scaling in these coordinates.
    exact = coordinates / np.sqrt(values)
    for k in (10, 100):
        left = (1 - found.step_size * values) ** k * exact
        expected = np.linalg.norm(left) / np.linalg.norm(exact)
        assert np.isclose(found.gaps[f"{k} Neumann terms"], expected, rtol=1e-4)
    for tolerance in (0.1, 0.01):

        def error(count):
            left = (1 - found.step_size * values) ** count * exact
            return np.linalg.norm(left) / np.linalg.norm(exact)

        count = found.terms[tolerance]
        assert count is not None
        assert error(count) <= tolerance * (1 + 1e-4) and error(count - 1) > tolerance


@pytest.mark.parametrize("seed", range(3))
def test_a_small_rank(seed):
    # Of which a random vector sees too little to count: those that F_y sees are counted.
    problem, x, y = _large(rows=12)
    found = blx.diagnose(problem, x, y, key=jax.random.key(seed))
    assert 12 <= found.rank <= 24
    assert found.num_products == 60 and found.residual < 1e-12


def test_damping_matrix_free():
    problem, x, y = _large()
    found = blx.diagnose(problem, x, y)
    _, coordinates, values = _large_reference(problem, y)
    exact = coordinates / np.sqrt(values)
    damped = coordinates * np.sqrt(values) / (values + found.epsilon)
    error = np.linalg.norm(damped - exact) / np.linalg.norm(exact)
    assert np.isclose(error, 0.1, rtol=1e-4)


@pytest.mark.slow
def test_a_decomposition_is_not_forced():
    # Few products where there could be as many as variables: the same, matrix-free.
    rng = np.random.default_rng(0)
    features = make_features(singular_values=(2.0, 1.5, 1.0), num_weights=40)
    arrays = features, rng.normal(size=(2, 40)), rng.normal(size=2)
    problem = linear_problems[1](*map(jnp.asarray, arrays))
    x = jnp.asarray(rng.normal(size=3))
    y = jnp.asarray(project(features, x, rng.normal(size=40)))
    dense = blx.diagnose(problem, x, y)
    few = blx.diagnose(problem, x, y, num_products=20)
    assert dense.exact and not few.exact
    assert dense.num_products == 41 and few.num_products <= 20
    assert np.isclose(dense.null_share, few.null_share, rtol=1e-9)
    assert dense.terms == few.terms
    for name in dense.gaps:
        assert np.isclose(dense.gaps[name], few.gaps[name], rtol=1e-6, atol=1e-9)
    assert np.isclose(dense.epsilon, few.epsilon, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_products",
    (
        pytest.param(10, marks=pytest.mark.slow),
        pytest.param(33, marks=pytest.mark.slow),
        60,
    ),
)
def test_products_are_counted(monkeypatch, num_products):
    class Counted(Large):
        """So that no program of another problem is met, nor one of this elsewhere."""

    problem, x, y = _large(rows=7)
    problem = Counted(problem.singular_values, problem.outer_features, problem.ridge)
    counter = Counter()
    matrix = jnp.diag(jnp.linspace(0.5, 2, NUM_LARGE))

    def counting(problem, x, y):
        return jax.grad(problem.inner, 1)(x, y), CountingOperator(matrix, counter)

    monkeypatch.setattr("bilevel_eqx._trust.diagnose.gradient_and_hessian", counting)
    found = blx.diagnose(problem, x, y, num_products=num_products)
    assert counter.read() == found.num_products <= num_products


#
# What is recommended
#


def recommended(found):
    """The response and the equilibrium, as they are printed."""
    (line,) = [u for u in str(found).splitlines() if u.startswith("Response: ")]
    response, equilibrium = line.removesuffix(".").split(". Equilibrium: ")
    response = response.removeprefix("Response: ")
    # The code makes the object.
    again = eval(response, {**vars(blx), "optax": optax})
    assert as_code(again) == as_code(found.response)
    return response, equilibrium


@pytest.mark.slow
def test_what_is_recommended_can_be_used():
    problem, x, y = make_linear(linear_problems[0], jnp.float64)
    away = blx.diagnose(problem, x, y)
    out = blx.hypergradient(problem, x, y, away.response)
    # A tenth off, as its number of steps was chosen for.
    exact = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    truth = blx.hypergradient(problem, x, y, exact).gradient
    assert np.linalg.norm(out.gradient - truth) <= 0.3 * np.linalg.norm(truth)
    found = blx.diagnose(problem, x, blx.best_response(problem, x, y, exact))
    assert found.equilibrium is not None
    blx.hypergradient(problem, x, y, found.response)
    pipeline = blx.GradientPipeline(found.response, optax.sgd(0.1))
    solution = blx.solve(
        problem, found.equilibrium, x, y, pipeline=pipeline, num_steps=2, certify=False
    )
    assert jnp.isfinite(solution.value)


@pytest.mark.slow
def test_unique():
    problem, x, y0 = make_softmax()
    y = resolve(problem, x, y0)
    found = blx.diagnose(problem, x, y)
    assert not found.singular and found.rank == found.num_variables == 9
    assert found.null_share == 0
    assert recommended(found) == (
        "Implicit(Projection(), Pseudoinverse())",
        "Stackelberg()",
    )
    hessian = dense_derivatives(problem, x, y)[0]
    values = np.linalg.eigvalsh(hessian)
    assert np.allclose([found.smallest, found.largest], values[[0, -1]])


@pytest.mark.slow
@pytest.mark.parametrize("ridge", (0.5, 1e-3))
def test_unique_and_large(ridge):
    problem, x, y = _large(ridge)
    found = blx.diagnose(problem, x, y)
    assert not found.singular and found.rank == NUM_LARGE
    assert np.isclose(found.smallest_nonzero, ridge, rtol=1e-6)
    response, equilibrium = recommended(found)
    assert "TruncatedCG" in response and equilibrium == "Stackelberg()"
    # The response is as right as it says.
    assert isinstance(found.response, blx.Implicit)
    short = blx.Implicit(None, found.response.linear_solver)
    full = blx.Implicit(None, blx.TruncatedCG(1000))
    a, b = (blx.hypergradient(problem, x, y, r).gradient for r in (short, full))
    assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)


def test_many_minima_that_matter():
    found = blx.diagnose(*_at_a_minimum(linear_problems[0]))
    assert found.null_share > 0.01
    assert recommended(found) == (
        "Implicit(Projection(), Pseudoinverse())",
        "ColdStart()",
    )
    assert "does not depend on x" in found.reason


def test_many_minima_that_move():
    problem, x, y = make_moving()
    y = blx.best_response(problem, x, y, blx.MinimumDisplacement())
    found = blx.diagnose(problem, x, y)
    assert recommended(found) == ("MinimumDisplacement()", "ColdStart()")
    assert "lacks" in found.reason
    assert found.rank == 1


def test_many_minima_that_do_not_matter():
    features = make_features()
    outer_features = np.random.default_rng(0).normal(size=(2, 3)) @ features
    arrays = features, outer_features, np.ones(2)
    problem = linear_problems[0](*map(jnp.asarray, arrays))
    x = jnp.asarray([1.0, -0.5, 0.3])
    found = blx.diagnose(problem, x, jnp.asarray(np.linalg.pinv(features) @ x))
    assert found.singular and found.null_share < 1e-12
    assert recommended(found)[1] == "WarmStart()"
    assert "does not matter to F" in found.reason


def test_not_at_a_minimum():
    found = blx.diagnose(*make_linear(linear_problems[0], jnp.float64))
    assert not found.at_minimum and found.gradient_norm > 0.1
    response, equilibrium = recommended(found)
    assert response.startswith("Unrolled(optax.sgd(0.51), ")
    assert found.equilibrium is None and "at a minimum" in equilibrium


def test_negative_curvature():
    saddle = blx.BilevelProblem(
        outer=lambda x, y: jnp.sum((y["a"] - 1) ** 2) + y["b"] ** 2,
        inner=lambda x, y: jnp.sum((y["a"] - x) ** 2) - 0.15 * (y["b"] - x[0]) ** 2,
    )
    x = jnp.asarray([0.2, 0.4])
    found = blx.diagnose(saddle, x, {"a": x, "b": x[0]})
    assert np.isclose(found.smallest, -0.3) and np.isclose(found.largest, 2)
    # H + epsilon I is definite, with as much to spare as was missing.
    assert np.isclose(found.epsilon, 0.6)
    assert recommended(found) == (
        "Proximal(0.6, Projection(), TruncatedCG(100))",
        "WarmStart(0.6)",
    )
    # Terms along the negative curvature grow until they overflow.
    assert found.terms[0.01] is None
    assert "negative" in found.reason


def test_series_that_never_converges():
    # The range of B is not in that of H, and F_y sees the rest: terms add up for ever.
    slope = blx.BilevelProblem(
        outer=lambda x, y: jnp.sum(y),
        inner=lambda x, y: 0.5 * y[0] ** 2 + x * (y[0] + y[1]),
    )
    found = blx.diagnose(slope, jnp.asarray(0.0), jnp.zeros(2))
    assert found.terms[0.01] is None and np.isnan(found.epsilon)
    assert "none" in str(found) and "nan" in str(found)


def test_text():
    found = blx.diagnose(*_at_a_minimum(linear_problems[0]))
    text = str(found)
    for part in (
        "5 inner variables, rank 3",
        "an inner minimum",
        f"{found.null_share:.1%} of it is in the null space",
        "10 Neumann terms: ",
        "damped by 2.0e-01: ",
        "relative error of 1, 0.1, 0.01: 1, ",
        "a step size of 0.51",
        f"an epsilon of {found.epsilon:.3g}",
        "6 products with H",
        "Response: Implicit(Projection(), Pseudoinverse()). Equilibrium: ColdStart().",
        found.reason,
    ):
        assert part in text, part


def test_refused():
    problem, x, y = _at_a_minimum(linear_problems[0])
    with pytest.raises(ValueError, match="num_products"):
        blx.diagnose(problem, x, y, num_products=9)
    with pytest.raises(ValueError, match="floating-point"):
        blx.diagnose(problem, x, jnp.arange(5))
    with pytest.raises(ValueError, match="finite"):
        blx.diagnose(problem, x, y.at[0].set(jnp.nan))


@pytest.mark.slow
def test_what_it_says_of_planted_faults():
    from test_check import _curve, exact

    said = {}
    for fault in ("", "stopped", "hidden", "unreachable", "endless"):
        problem, x, y0 = _curve(fault)
        y = blx.best_response(problem, x, y0, exact, throw=False)
        said[fault] = str(blx.diagnose(problem, x, y))
    assert "their part through y is zero" not in said[""]
    for fault in ("stopped", "unreachable"):
        assert "their part through y is zero" in said[fault]
    assert "rank 4" in said[""] and "rank 3" in said["hidden"]
    assert "y: not an inner minimum" in said["endless"]
    assert "y: an inner minimum" in said[""]
    problem, x, y0 = _curve()
    assert "y: not an inner minimum" in str(blx.diagnose(problem, x, y0))
    with pytest.raises(ValueError, match="no derivative"):
        blx.diagnose(problem, jnp.arange(5), y0)
