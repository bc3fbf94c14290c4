"""Certificates mean what they say: zero at an equilibrium and nowhere else, whatever the
units, to second order too."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import as_numpy
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx._linalg.convex_hull import nearest_to_zero


#
# Random linear-quadratic problems in any units, 200 for each concept, as one batch
#

N, M, K = 8, 3, 6
COUNT = 200
EPSILON = 0.3


class Units(eqx.Module):
    """What a problem is measured in."""

    F: Array
    f: Array
    x: Array
    y: Array
    shift: Array

    @staticmethod
    def draw(rng) -> "Units":
        units = 10 ** rng.uniform(-6, 6, size=4)
        return Units(*map(jnp.asarray, units), jnp.asarray(10 ** rng.uniform(-2, 6)))

    @staticmethod
    def none() -> "Units":
        return Units(*(jnp.asarray(1.0) for _ in range(4)), jnp.asarray(0.0))


class LinearQuadratic(blx.AbstractBilevelProblem):
    """F = |A y + C x - b|^2 / 2 + |x - e|^2 / 20 and f = |G y - T x - t|^2 / 2."""

    A: Array
    C: Array
    b: Array
    e: Array
    G: Array
    T: Array
    t: Array
    units: Units

    def outer(self, x, y):
        x, y = x / self.units.x, y / self.units.y
        value = 0.5 * jnp.sum((self.A @ y + self.C @ x - self.b) ** 2)
        value = value + 0.05 * jnp.sum((x - self.e) ** 2)
        return self.units.F * (value + self.units.shift)

    def inner(self, x, y):
        x, y = x / self.units.x, y / self.units.y
        value = 0.5 * jnp.sum((self.G @ y - self.T @ x - self.t) ** 2)
        return self.units.f * (value + self.units.shift)


@dataclasses.dataclass
class Drawn:
    """A problem with its closed forms, by NumPy alone: S(x) = c + J x + null z."""

    A: np.ndarray
    C: np.ndarray
    b: np.ndarray
    e: np.ndarray
    G: np.ndarray
    T: np.ndarray
    t: np.ndarray
    y0: np.ndarray
    null: np.ndarray
    J: np.ndarray
    c: np.ndarray
    x_pessimistic: np.ndarray
    radius: float

    def problem(self, units):
        names = ("A", "C", "b", "e", "G", "T", "t")
        return LinearQuadratic(*(jnp.asarray(getattr(self, n)) for n in names), units)

    def stationary(self, row):
        """x where row (A y + C x - b) + (x - e) / 10 = 0 at y = c + J x."""
        matrix = row @ (self.A @ self.J + self.C) + 0.1 * np.eye(M)
        right = 0.1 * self.e - row @ (self.A @ self.c - self.b)
        x = np.linalg.solve(matrix, right)
        return x, self.c + self.J @ x

    def cold(self):
        return self.stationary((self.A @ self.J + self.C).T)

    def partial(self):
        H = self.G.T @ self.G + EPSILON * np.eye(N)
        return self.stationary(
            (self.A @ np.linalg.solve(H, self.G.T @ self.T) + self.C).T
        )

    def nash(self):
        return self.stationary(self.C.T)

    def optimistic(self):
        both = np.hstack([self.A @ self.J + self.C, self.A @ self.null])
        matrix, right = both.T @ both, -both.T @ (self.A @ self.c - self.b)
        matrix[:M, :M] += 0.1 * np.eye(M)
        right[:M] += 0.1 * self.e
        answer = np.linalg.lstsq(matrix, right, rcond=1e-13)[0]
        x, z = answer[:M], answer[M:]
        return x, self.c + self.J @ x + self.null @ z

    def pessimistic(self):
        """The worst y at an x, by its multiplier; and e such that x is stationary."""
        x = self.x_pessimistic
        center = self.c + self.J @ x
        along = self.A @ self.null
        misfit = self.A @ center + self.C @ x - self.b
        q, V = np.linalg.eigh(along.T @ along)
        slope = V.T @ (along.T @ misfit)
        low, high = 0.0, np.linalg.norm(slope) / self.radius
        for _ in range(300):
            middle = 0.5 * (low + high)
            long = np.linalg.norm(slope / (q[-1] - q + middle)) > self.radius
            low, high = (middle, high) if long else (low, middle)
        z = slope / (q[-1] - q + high)
        y = center + self.null @ V @ (self.radius * z / np.linalg.norm(z))
        # y - c lies in the null space, which does not move.
        gradient = (self.A @ self.J + self.C).T @ (self.A @ y + self.C @ x - self.b)
        self.e = x + gradient / 0.1
        return x, y


def _draw(rng, regular, singular):
    rank = N if regular else int(rng.integers(1, N if singular else N + 1))
    condition = 10 ** rng.uniform(0, 8)
    u, v = (np.linalg.qr(rng.normal(size=(N, N)))[0][:, :rank] for _ in range(2))
    s = np.logspace(0, -0.5 * np.log10(condition), rank)
    J, t = v @ (v.T @ rng.normal(size=(N, M))), v @ (v.T @ rng.normal(size=N))
    G = (u * s) @ v.T
    y0 = rng.normal(size=N)
    null = np.linalg.qr(v, mode="complete")[0][:, rank:]
    return Drawn(
        A=rng.normal(size=(K, N)) / 3,
        C=rng.normal(size=(K, M)) / 3,
        b=rng.normal(size=K),
        e=rng.normal(size=M),
        G=G,
        T=G @ J,
        t=G @ t,
        y0=y0,
        null=null,
        J=J,
        c=t + null @ (null.T @ y0),
        x_pessimistic=rng.normal(size=M),
        radius=10 ** rng.uniform(-1, 1),
    )


def _equilibrium(name, parameter):
    if name == "partial":
        return blx.WarmStart(parameter)
    if name == "pessimistic":
        return blx.Pessimistic(parameter)
    return {
        "cold": blx.ColdStart(),
        "warm": blx.WarmStart(),
        "Stackelberg": blx.Stackelberg(),
        "optimistic": blx.Optimistic(),
        "Nash": blx.Nash(),
    }[name]


@eqx.filter_jit
def _residuals(name, problems, parameters, x, y, y0):
    def one(problem, parameter, x, y, y0):
        equilibrium = _equilibrium(name, parameter)
        return blx.certify(problem, equilibrium, x, y, y0=y0).residuals

    return eqx.filter_vmap(one)(problems, parameters, x, y, y0)


def _stack(trees):
    # By NumPy: in JAX each is a program of as many arguments as there are trees.
    return jax.tree.map(lambda *u: jnp.asarray(np.stack(u)), *trees)


def _off(rng, point):
    """A random displacement of one per cent."""
    move = rng.normal(size=point.shape)
    size = np.linalg.norm(point, axis=1) / np.linalg.norm(move, axis=1)
    return 0.01 * size[:, None] * move


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ("warm", "partial", "cold", "optimistic", "pessimistic", "Stackelberg", "Nash"),
)
def test_linear_quadratic_in_any_units(name):
    rng = np.random.default_rng(11)
    drawn, points, units = [], [], []
    for _ in range(COUNT):
        one = _draw(rng, name == "Stackelberg", name == "pessimistic")
        closed_form = {"warm": "cold", "Stackelberg": "cold"}.get(name, name.lower())
        points.append(getattr(one, closed_form)())
        drawn.append(one)
        units.append(Units.draw(rng))
    x, y = (np.array(u) for u in zip(*points))
    y0, radii = np.array([d.y0 for d in drawn]), np.array([d.radius for d in drawn])
    plain = _stack([d.problem(Units.none()) for d in drawn])
    scaled = _stack([d.problem(u) for d, u in zip(drawn, units)])
    x_unit, y_unit, f_unit = (
        np.array([float(getattr(u, n)) for u in units]) for n in ("x", "y", "f")
    )

    def in_plain(x, y):
        parameters = np.full(COUNT, EPSILON) if name == "partial" else radii
        return jax.tree.map(np.asarray, _residuals(name, plain, parameters, x, y, y0))

    def in_units(x, y):
        # A radius is in the units of y, and epsilon in those of the curvature of f.
        epsilon = EPSILON * f_unit / y_unit**2
        parameters = epsilon if name == "partial" else radii * y_unit
        there = (v * u[:, None] for v, u in ((x, x_unit), (y, y_unit), (y0, y_unit)))
        out = _residuals(name, scaled, parameters, *there)
        return jax.tree.map(np.asarray, out)

    # At an equilibrium. What is left is rounding, times the condition number.
    for residuals in (in_plain(x, y), in_units(x, y)):
        assert max(np.max(r) for r in residuals.values()) < 1e-6
    # Off it.
    for move_x, move_y in ((1, 0), (0, 1), (1, 1)):
        moved = x + move_x * _off(rng, x), y + move_y * _off(rng, y)
        residuals, there = in_plain(*moved), in_units(*moved)
        assert np.min(np.max([*residuals.values()], axis=0)) > 1e-5
        for key, value in residuals.items():
            assert np.allclose(there[key], value, rtol=1e-6, atol=1e-7), key


#
# One problem, all concepts: factors from 1e-8 to 1e8, and constants of 1e6
#


def _factors():
    yield from ((c, 0.0, 1.0, 0.0) for c in (1e-8, 1e8))
    yield from ((1.0, 1e6, 1.0, 1e6), (1.0, 0.0, 1e-8, 0.0), (1.0, 0.0, 1e8, 0.0))


def _drowned():
    """Constants so large that the values of the objectives have no digits left."""
    yield from ((1e-8, 1e6, 1.0, 0.0), (1.0, 0.0, 1e-8, 1e6), (1e-8, -1e8, 1e-8, 1e8))


class Separable(blx.AbstractBilevelProblem):
    """Sums of terms whose coefficients are data, so that each concept is one program.

    F is a square about 1, one about x, and a hill at x = 0; f is wells, with minima at -1
    and 1 and a maximum at 0, and a square about x.
    """

    F: Array
    F_shift: Array
    f: Array
    f_shift: Array
    about_one: Array
    about_x: Array
    hill: Array
    wells: Array
    weights: Array

    @staticmethod
    def make(**given) -> "Separable":
        zero = dict.fromkeys((f.name for f in dataclasses.fields(Separable)), 0.0)
        values = zero | dict(F=1.0, f=1.0, wells=np.zeros(2), weights=np.ones(2)) | given
        return Separable(**{name: jnp.asarray(value) for name, value in values.items()})

    def outer(self, x, y):
        value = self.about_one / 2 * jnp.sum((y - 1) ** 2)
        value = value + self.about_x * jnp.sum((y - x) ** 2)
        return self.F * (value - self.hill / 2 * jnp.sum(x**2)) + self.F_shift

    def inner(self, x, y):
        value = jnp.sum(self.wells * (y**2 - 1) ** 2) / 4
        value = value + jnp.sum(self.weights * (y - x) ** 2) / 2
        return self.f * value + self.f_shift


@pytest.mark.parametrize(
    "equilibrium",
    (
        blx.ColdStart(),
        blx.WarmStart(),
        blx.Stackelberg(),
        blx.Optimistic(),
        blx.Nash(),
        blx.Pessimistic(0.5),
    ),
    ids=lambda e: type(e).__name__,
)
def test_factors_and_constants(equilibrium):
    x, y = jnp.array([2.0, 1.0]), jnp.array([1.5, 1.0])

    def largest(F, F_shift, f, f_shift):
        problem = Separable.make(
            about_one=1.0, F=F, F_shift=F_shift, f=f, f_shift=f_shift
        )
        return float(blx.certify(problem, equilibrium, x, y, y0=jnp.zeros(2)).largest)

    expected = largest(1.0, 0.0, 1.0, 0.0)
    assert expected > 0.05
    for factors in (*_factors(), *_drowned()):
        assert largest(*factors) == pytest.approx(expected, rel=1e-6)


class Game(blx.AbstractBilevelProblem):
    """A zero-sum game in two numbers, off its equilibrium."""

    factor: Array
    shift: Array

    def outer(self, x, y):
        value = -0.5 * x**2 + 2 * x * y - 0.5 * y**2 + x
        return self.factor * value + self.shift

    def inner(self, x, y):
        return -self.outer(x, y)


class Corner(blx.AbstractBilevelProblem):
    """Toy B: the worst inner minimum in a box is at its corner."""

    factors: Array

    def outer(self, x, y):
        F, shift, _, _ = self.factors
        return F * (jnp.sum((x - 1) ** 2) / 3 - jnp.sum((y - 1) ** 2)) + shift

    def inner(self, x, y):
        _, _, f, shift = self.factors
        return f * (jnp.sqrt(jnp.sum(x**2)) - jnp.sum(y)) ** 2 + shift


def test_factors_and_constants_of_a_game():
    def residuals(factor, shift=0.0):
        problem = Game(jnp.asarray(factor), jnp.asarray(shift))
        # The weight is in units of the curvature.
        equilibrium = blx.ProximalEquilibrium(jnp.asarray(2.0 * factor))
        out = blx.certify(problem, equilibrium, jnp.array(0.3), jnp.array(0.2))
        return np.array([float(v) for v in out.residuals.values()])

    expected = residuals(1.0)
    assert np.max(expected) > 0.1
    for factors in ((1e-8,), (1e8,), (1.0, 1e6)):
        assert np.allclose(residuals(*factors), expected, rtol=1e-6, atol=1e-12)


def test_factors_and_constants_in_a_set():
    within = blx.Pessimistic(within=lambda y: jnp.clip(y, 0.5 / np.sqrt(3), 100.0))
    x, y = jnp.full(3, 0.5), jnp.full(3, 0.5 / np.sqrt(3))

    def residuals(*factors):
        problem = Corner(jnp.array(factors))
        assert blx.certify(problem, within, x, y).largest < 1e-6
        out = blx.certify(problem, within, 1.2 * x, 1.2 * y).residuals
        return np.array([float(v) for v in out.values()])

    expected = residuals(1.0, 0.0, 1.0, 0.0)
    assert np.max(expected) > 0.1
    for factors in _factors():
        # The penalty is right to 1e-7.
        assert np.allclose(residuals(*factors), expected, rtol=1e-6, atol=2e-7)


#
# A sharp minimum at zero, which has no size
#


class AtZero(blx.AbstractBilevelProblem):
    """y = G^+ (x - x*), which is zero at x*; F is least there."""

    G: Array
    target: Array

    def outer(self, x, y):
        return 0.5 * jnp.sum(y**2)

    def inner(self, x, y):
        return 0.5 * jnp.sum((self.G @ y - (x - self.target)) ** 2)


@pytest.mark.parametrize("error", (0.0, 1e-16, 1e-10))
@pytest.mark.parametrize("concept", (blx.WarmStart(), blx.Stackelberg(), blx.ColdStart()))
def test_an_inner_minimum_at_zero(concept, error):
    rng = np.random.default_rng(3)
    problem = AtZero(
        jnp.asarray(rng.normal(size=(5, 4))), jnp.asarray(rng.normal(size=5))
    )
    x = problem.target + error * jnp.asarray(rng.normal(size=5))
    y = error * jnp.asarray(rng.normal(size=4))
    certificate = blx.certify(problem, concept, x, y, y0=jnp.zeros(4))
    assert certificate.residuals["inner"] <= 1e3 * error


def test_solve_says_where_it_started():
    """F = x^2 / 2 and f = (y - x)^2 / 2: without a start there is no size at zero."""
    problem = blx.BilevelProblem(
        lambda x, y: 0.5 * jnp.sum(x**2), lambda x, y: 0.5 * jnp.sum((y - x) ** 2)
    )
    near = jnp.array([1e-9])
    assert blx.certify(problem, blx.Nash(), near, near).largest > 0.1
    known = blx.certify(problem, blx.Nash(), near, near, x0=near + 1, y0=near + 1)
    assert known.largest < 1e-8
    solution = blx.solve(
        problem, blx.Nash(), jnp.ones(1), jnp.ones(1), num_steps=200, throw=False
    )
    assert solution.certificate.largest < 1e-8


#
# The second order in y
#


_all = (
    blx.ColdStart(),
    blx.WarmStart(),
    blx.WarmStart(0.1),
    blx.Stackelberg(),
    blx.Optimistic(),
    blx.Nash(),
    blx.Pessimistic(0.5),
)


@pytest.mark.parametrize("equilibrium", _all, ids=str)
def test_a_maximum_or_saddle_of_f_is_no_inner_minimum(equilibrium):
    def at(problem, x, y):
        x, y = jnp.asarray(x), jnp.asarray(y)
        out = blx.certify(problem, equilibrium, x, y, y0=y)
        return {k: float(v) for k, v in out.residuals.items()}

    wells = Separable.make(about_x=1.0, wells=np.ones(2), weights=np.zeros(2))
    maximum, saddle = (
        at(wells, np.zeros(2), np.zeros(2)),
        at(wells, np.zeros(2), [0.0, 1.0]),
    )
    bent = Separable.make(about_x=1.0, weights=np.array([-1.0, 0.0]))
    flat = at(bent, np.zeros(2), np.zeros(2))
    bent = Separable.make(about_x=1.0, weights=np.array([1.0, -0.2]))
    slight = at(bent, np.ones(2), np.ones(2))
    for residuals in (maximum, flat):
        assert residuals["inner"] < 1e-12 and residuals["inner curvature"] == 1
    # H = diag(-1, 2) and diag(1, -0.2), relative to the largest; epsilon adds to both.
    epsilon = float(getattr(equilibrium, "epsilon", 0.0))
    expected = (1 - epsilon) / (2 + epsilon)
    assert saddle["inner curvature"] == pytest.approx(expected)
    expected = (0.2 - epsilon) / (1 + epsilon)
    assert slight["inner curvature"] == pytest.approx(expected)
    # And a minimum is one.
    assert at(wells, np.ones(2), [1.0, -1.0])["inner curvature"] == 0


def test_a_maximum_in_a_set():
    def problem(low):
        return blx.BilevelProblem(
            lambda x, y: jnp.sum((y - x) ** 2),
            lambda x, y: -0.5 * jnp.sum(y**2) + 0 * jnp.sum(x),
            project_y=lambda y: optax.projections.projection_box(y, low, 1.0),
        )

    def at(low, y):
        y = jnp.array([y])
        return blx.certify(problem(low), blx.WarmStart(), y, y).residuals

    # Inside of the set, and in a corner of it, where f is least.
    inside, corner = at(-1.0, 0.0), at(-1.0, 1.0)
    assert inside["inner"] == 0 and inside["inner curvature"] == 1
    assert corner["inner"] < 1e-12 and corner["inner curvature"] == 0
    # Off the corner, where the gradient leads to it.
    assert at(-1.0, 0.9)["inner"] > 1e-2


def test_f_without_a_minimum():
    # The gradient lies in the null space of H, where no Newton step goes.
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum((y - x) ** 2),
        lambda x, y: 0.5 * (y[0] - x[0]) ** 2 + 0.1 * y[1],
    )
    one = jnp.ones(2)
    assert blx.certify(problem, blx.WarmStart(), one, one).residuals["inner"] > 1e-2
    linear = blx.BilevelProblem(problem.outer, lambda x, y: jnp.sum(y) + 0 * x[0])
    assert blx.certify(linear, blx.WarmStart(), one, one).residuals["inner"] == 1


#
# The second order along S(x)
#


class Ellipse(blx.AbstractLeastSquaresProblem):
    """S(x) is an ellipsoid. F is linear."""

    axes: Array
    slope: Array

    def outer(self, x, y):
        return jnp.sum(self.slope * y) + 0.5 * jnp.sum((x - 1) ** 2)

    def inner_residual(self, x, y):
        return jnp.sum((y / self.axes) ** 2) - 1 + 0 * x[0]


class Plain(blx.AbstractBilevelProblem):
    """The same, without saying that f is a square."""

    squares: blx.AbstractLeastSquaresProblem

    def outer(self, x, y):
        return self.squares.outer(x, y)

    def inner(self, x, y):
        return self.squares.inner(x, y)


@pytest.mark.parametrize("structured", (True, False))
@pytest.mark.parametrize(
    "axes, y0, nearest, others",
    (
        ((1.0, 1.0), (2.0, 0.0), (1.0, 0.0), ((-1.0, 0.0),)),
        ((1.0, 1.0, 1.0), (0.0, 0.5, 0.0), (0.0, 1.0, 0.0), ((0.0, -1.0, 0.0),)),
        # The curvature of the far end has a radius of 4, and its distance is 6.
        ((2.0, 1.0), (0.0, 5.0), (0.0, 1.0), ((0.0, -1.0),)),
        ((2.0, 1.0), (3.0, 0.0), (2.0, 0.0), ((-2.0, 0.0),)),
    ),
)
def test_the_farthest_is_not_the_nearest(structured, axes, y0, nearest, others):
    problem = Ellipse(jnp.array(axes), jnp.zeros(len(axes)))
    problem = problem if structured else Plain(problem)
    x, start = jnp.ones(1), jnp.array(y0)

    def at(y):
        return blx.certify(problem, blx.ColdStart(), x, jnp.array(y), y0=start)

    assert at(nearest).largest < 1e-10
    for other in others:
        residuals = at(other).residuals
        # To first order it is as good as the nearest.
        for name in ("inner", "inner curvature", "displacement", "outer"):
            assert residuals[name] < 1e-10
        assert residuals["curvature"] > 0.1


def test_the_curvature_of_the_distance_by_hand():
    # On the unit circle at (-1, 0), from (2, 0): W = 1 + (y - y0) . y = -2 along S(x).
    problem = Ellipse(jnp.ones(2), jnp.zeros(2))
    y, y0 = jnp.array([-1.0, 0.0]), jnp.array([2.0, 0.0])
    for start, expected in ((y0, 1.0), (jnp.array([-0.5, 0.0]), 0.0)):
        out = blx.certify(problem, blx.ColdStart(), jnp.ones(1), y, y0=start)
        assert out.residuals["curvature"] == pytest.approx(expected)
    # From (0.5, 0) it is 1 - 1.5 = -0.5, and less than one.
    out = blx.certify(problem, blx.ColdStart(), jnp.ones(1), y, y0=jnp.array([0.5, 0.0]))
    assert out.residuals["curvature"] == pytest.approx(0.5)


@pytest.mark.slow
def test_optimistic_and_pessimistic_on_a_circle():
    # F = y_0: least at (-1, 0), largest at (1, 0).
    problem = Ellipse(jnp.ones(2), jnp.array([1.0, 0.0]))
    x, y0 = jnp.ones(1), jnp.array([0.8, 0.6])
    best, worst = jnp.array([-1.0, 0.0]), jnp.array([1.0, 0.0])
    assert blx.certify(problem, blx.Optimistic(), x, best).largest < 1e-10
    residuals = blx.certify(problem, blx.Optimistic(), x, worst).residuals
    assert residuals["selection"] < 1e-10 and residuals["curvature"] == 1
    # The ball holds all of the circle. That f is a square is not said here: on a circle
    # that says so, `test_ties_on_a_curved_set` has the worst, and points off it.
    wide = blx.Pessimistic(jnp.asarray(3.0))
    assert blx.certify(Plain(problem), wide, x, worst, y0=y0).largest < 1e-10
    residuals = blx.certify(Plain(problem), wide, x, best, y0=y0).residuals
    assert residuals["selection"] < 1e-10 and residuals["curvature"] == 1
    # Off the circle H is nonsingular, and the ball cannot press along S(x).
    for size in (1.0, 3.0, 1e-5, 7e6):
        axes, slope = (jnp.asarray(u) for u in (size * np.ones(2), [1 / size, 0.0]))
        ball = blx.Pessimistic(jnp.asarray(0.5 * size))
        off = size * jnp.array([-0.66, 0.88])
        scaled = Plain(Ellipse(axes, slope))
        out = blx.certify(scaled, ball, x, off, y0=size * y0).residuals
        assert out["ball"] > 0.1 and out["selection"] < 1e-10


#
# The worst in a ball
#


class OnPlane(blx.AbstractBilevelProblem):
    """S(x) is where the last entry of y is zero, for any F: a sum of functions, of which
    all but one count for nothing. Which one is data."""

    fns: tuple[eqx.Module, ...]
    counts: Array

    def outer(self, x, y):
        return sum(c * fn(x, y) for c, fn in zip(self.counts, self.fns))

    def inner(self, x, y):
        return 0.5 * y[-1] ** 2 + 0 * jnp.sum(x)


class Exponential(eqx.Module):
    def __call__(self, x, y):
        return 0.5 * jnp.sum(x**2) + jnp.exp(y[0])


class Linear(eqx.Module):
    def __call__(self, x, y):
        return 0.5 * jnp.sum(x**2) + y[0] + 2 * y[1]


class Concave(eqx.Module):
    def __call__(self, x, y):
        return 0.5 * jnp.sum(x**2) - jnp.sum((y[:2] - 0.3) ** 4 + (y[:2] - 0.3) ** 2)


class Cubic(eqx.Module):
    """On a segment: a local maximum at -2, the worst at 2."""

    def __call__(self, x, y):
        return 0.5 * jnp.sum(x**2) + y[0] ** 2 + 0.1 * y[0] ** 3


class TrulySaddle(eqx.Module):
    """At (1, 0) the ball holds y, and F grows along its boundary."""

    def __call__(self, x, y):
        return 0.5 * jnp.sum(x**2) + y[0] + y[1] ** 2


class HardCase(eqx.Module):
    """F = ((y_0 - x)^2 + y_1^2 / 2 + y_1) / 2: at x = 0 the slope has no part along y_0,
    where the curvature is largest."""

    def __call__(self, x, y):
        return 0.5 * ((y[0] - x[0]) ** 2 + 0.5 * y[1] ** 2 + y[1]) + x[0] ** 2


# Those of as many entries of y.
_TOGETHER = (Exponential(), Cubic()), (Linear(), Concave(), TrulySaddle(), HardCase())


def _worst(fn, radius, y, x=(0.0,), *, about=None):
    y = jnp.asarray(y)
    y0 = jnp.zeros(y.size) if about is None else jnp.asarray(about)
    together = next((fns for fns in _TOGETHER if fn in fns), (fn,))
    counts = jnp.array([float(other == fn) for other in together])
    problem = OnPlane(together, counts)
    return blx.certify(problem, blx.Pessimistic(radius), jnp.asarray(x), y, y0=y0)


@pytest.mark.parametrize(
    "fn, radius, y",
    (
        (Exponential(), 2.0, (2.0, 0.0)),
        (Exponential(), 5.0, (5.0, 0.0)),
        (Exponential(), 0.1, (0.1, 0.0)),
        (Linear(), 3.0, (3 / 5**0.5, 6 / 5**0.5, 0.0)),
        (Concave(), 2.0, (0.3, 0.3, 0.0)),
        (Cubic(), 2.0, (2.0, 0.0)),
    ),
    ids=lambda v: type(v).__name__,
)
def test_the_worst_has_no_residual(fn, radius, y):
    assert _worst(fn, radius, y).largest < 1e-10


def test_a_point_that_is_not_the_worst():
    # The least on the segment.
    assert _worst(Exponential(), 2.0, (-2.0, 0.0)).largest > 0.1
    # Worst nearby, and to second order.
    cubic = _worst(Cubic(), 2.0, (-2.0, 0.0))
    first_order = ("inner", "ball", "selection", "curvature", "outer")
    assert all(cubic.residuals[name] < 1e-10 for name in first_order)
    assert cubic.residuals["others"] > 0.01
    assert any("six ascents of F" in note for note in cubic.notes)
    # The curvature along the boundary is 2, and nu is one.
    saddle = _worst(TrulySaddle(), 1.0, (1.0, 0.0, 0.0))
    assert saddle.residuals["selection"] < 1e-10
    assert saddle.residuals["curvature"] == pytest.approx(0.5)
    # Deep in the ball, where F is least.
    flat = _worst(Concave(), 2.0, (0.3, 0.31, 0.0))
    assert flat.residuals["selection"] > 1e-3
    # Outside of the ball.
    assert _worst(Linear(), 1.0, (3.0, 6.0, 0.0)).residuals["ball"] > 1


class Distance(eqx.Module):
    """F = |x - y - a|^2 / 2 + |x - b|^2 / 2. At x = a every point of a circle is worst,
    and the gradients there are b - a + z, with z on the circle."""

    a: Array
    b: Array

    def __call__(self, x, y):
        near = 0.5 * jnp.sum((x - y[:2] - self.a) ** 2)
        return near + 0.5 * jnp.sum((x - self.b) ** 2)


@pytest.mark.parametrize(
    "y", ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.6, 0.8, 0.0), (-0.8, 0.6, 0.0))
)
def test_ties(y):
    zero = jnp.zeros(2)
    centred = Distance(zero, zero)
    assert _worst(centred, 1.0, y, x=(0.0, 0.0)).largest < 1e-10
    # Zero between the gradients, at a place with nothing special about it.
    a, b = jnp.array([0.3, -0.2]), jnp.array([-0.4, 0.3])
    assert _worst(Distance(a, b), 1.0, y, x=a).largest < 1e-7
    # Off the kink, and where the gradients lie around another point.
    assert _worst(Distance(a, b), 1.0, y, x=a + 0.01).largest > 1e-3
    assert _worst(Distance(a, a + 1.2), 1.0, y, x=a).residuals["outer"] > 1e-2


class OnSphere(blx.AbstractLeastSquaresProblem):
    """The last entry of x is the logarithm of the radius r of the sphere S(x), u is the
    rest of x, and F = |u - y - a|^2 / 2 + |u - b|^2 / 2 - s log r."""

    a: Array
    b: Array
    s: Array

    def inner_residual(self, x, y):
        return jnp.sum(y**2) - jnp.exp(2 * x[-1])

    def outer(self, x, y):
        near = 0.5 * jnp.sum((x[:-1] - y - self.a) ** 2)
        return near + 0.5 * jnp.sum((x[:-1] - self.b) ** 2) - self.s * x[-1]


def _tied_on_sphere(dimension, radius):
    """A problem, x, and how far along the axis and from it the worst points are.

    With the center of the ball on the first axis, they are on its boundary: at a distance
    R from (r, 0, ...), and so at h = r - R^2 / (2 r) along the axis and d from it, with
    h^2 + d^2 = r^2. They are tied where u and a differ along the axis alone. Zero lies
    between the gradients there if u_0 = (a_0 + b_0 + h) / 2, if a and b differ by less
    than d across the axis, and if s is the derivative of the rest in log r.
    """
    a = np.array([0.3, -0.2, 0.4])[:dimension]
    b = np.array([2.5, 0.1, 0.2])[:dimension]
    r = np.exp(0.2)
    along = r - radius**2 / (2 * r)
    across = np.sqrt(r**2 - along**2)
    u = np.append((a[0] + b[0] + along) / 2, a[1:])
    # F there has the term (u_0 - a_0 - h)^2 / 2 + d^2 / 2.
    change = r + radius**2 / (2 * r)
    s = -(u[0] - a[0] - along) * change + r**2 - along * change
    x = jnp.asarray(np.append(u, np.log(r)))
    return OnSphere(*map(jnp.asarray, (a, b, s))), x, along, across


@pytest.mark.slow
@pytest.mark.parametrize("dimension", (2, 3))
def test_ties_on_a_curved_set(dimension):
    """Two points on a circle, and a circle on a sphere."""
    radius = 0.8
    problem, x, along, across = _tied_on_sphere(dimension, radius)
    y0 = jnp.asarray([1.4, 0.0, 0.0][:dimension])

    def residuals(problem, x, y, size=1.0):
        equilibrium = blx.Pessimistic(jnp.asarray(radius * size))
        return blx.certify(problem, equilibrium, x, y, y0=size * y0).residuals

    angles = (0.0, np.pi) if dimension == 2 else (0.0, 1.0, 2.5)
    for angle in angles:
        way = np.array([np.cos(angle), np.sin(angle)])[: dimension - 1]
        y = jnp.asarray(np.append(along, across * way))
        assert max(residuals(problem, x, y).values()) < 1e-8
        # One per cent off the tie, along it, and in all entries of x.
        for move in (*np.eye(dimension + 1)[:2], np.ones(dimension + 1)):
            off = 0.01 * jnp.linalg.norm(x) * move
            assert max(residuals(problem, x + off, y).values()) > 1e-4
        # Zero does not lie between the gradients.
        far = dataclasses.replace(problem, b=problem.b.at[1].add(3.0))
        assert residuals(far, x, y)["outer"] > 0.1
    # The nearest of the boundary is stationary, and not the worst.
    least = jnp.zeros(dimension).at[0].set(jnp.exp(x[-1]))
    out = residuals(problem, x, least)
    assert out["selection"] < 1e-8 and out["curvature"] > 0.1 and out["others"] > 1e-3
    # Off the sphere H is nonsingular, and the ball cannot press along S(x).
    off = 1.1 * least[0] * jnp.asarray([-0.6, 0.8, 0.0][:dimension])
    for size in (1.0, 3.0, 1e-5, 7e6):
        scaled = x.at[-1].add(np.log(size))
        assert residuals(problem, scaled, size * off, size)["ball"] > 0.1


def test_other_worst_points_beyond_the_size_that_is_searched():
    large = OnSphere(jnp.zeros(80), jnp.zeros(80), jnp.ones(()))
    x, y = jnp.zeros(81), jnp.zeros(80).at[0].set(1.0)
    shape = eqx.filter_eval_shape(
        lambda x, y: blx.certify(large, blx.Pessimistic(0.8), x, y, y0=y), x, y
    )
    assert any("other worst y are not looked for" in n for n in shape.notes)


class Bumps(eqx.Module):
    """Not quadratic, and worst at points that are not each other's images."""

    c: Array
    d: Array

    def __call__(self, x, y):
        bumps = jnp.exp(0.7 * y[0]) + jnp.sin(y[1]) * y[0] + 0.1 * y[0] ** 3
        return self.c * (0.5 * jnp.sum((x - 0.3) ** 2) + x[0] * y[0] + bumps) + self.d


@pytest.mark.slow
def test_factors_and_constants_where_f_is_not_quadratic():
    y0, equilibrium = jnp.zeros(3), blx.Pessimistic(1.5)

    @eqx.filter_jit
    def residuals(c, d, x, y):
        problem = OnPlane((Bumps(c, d),), jnp.ones(1))
        return blx.certify(problem, equilibrium, x, y, y0=y0).residuals

    rng = np.random.default_rng(0)
    for _ in range(4):
        x, y = jnp.asarray(rng.normal(size=2)), jnp.asarray(rng.normal(size=3))
        plain = residuals(jnp.asarray(1.0), jnp.asarray(0.0), x, y)
        # The last constants leave the values of F no digits.
        for c, d in ((1e-8, 0.0), (1e8, 0.0), (1e-8, 1.0), (1e-8, 1e6)):
            found = residuals(jnp.asarray(c), jnp.asarray(d), x, y)
            for name, value in found.items():
                assert np.allclose(value, plain[name], rtol=1e-6, atol=1e-10), name


def test_the_hard_case():
    # (nu - W) (y - c) = slope: with nu = 1, y_1 = (1/2) / (1 - 1/2) = 1, and y_0 = +-1.
    for sign in (1, -1):
        y, radius = (sign * 1.0, 1.0, 0.0), 2**0.5
        assert _worst(HardCase(), radius, y).largest < 1e-7
        assert _worst(HardCase(), radius, y, x=(0.01,)).largest > 1e-4
    # On the sphere, and stationary: but there y_0 = 0 is a saddle.
    residuals = _worst(HardCase(), 2**0.5, (0.0, 2**0.5, 0.0)).residuals
    assert residuals["selection"] < 1e-10 and residuals["curvature"] > 0.05


@pytest.mark.parametrize("count, dimension", ((2, 1), (2, 5), (4, 2), (4, 3), (4, 7)))
def test_nearest_to_zero_of_a_hull(count, dimension):
    rng = np.random.default_rng(count + 10 * dimension)
    find = jax.jit(nearest_to_zero)
    for offset in (0.0, 0.5, 3.0):
        points = rng.normal(size=(count, dimension)) + offset
        weights = as_numpy(find(jnp.asarray(points @ points.T), jnp.zeros(count)))
        assert np.all(weights >= 0) and np.sum(weights) == pytest.approx(1)
        nearest = weights @ points
        # The nearest point is the one that no corner is on the other side of.
        assert np.min(points @ nearest) >= nearest @ nearest - 1e-9
    # Twice the same corner, and zero within the segment.
    twice = np.array([[1.0], [1.0], [-3.0]])
    weights = as_numpy(find(jnp.asarray(twice @ twice.T), jnp.zeros(3)))
    assert weights @ twice == pytest.approx(0)
    # At a price, one of them alone may be better.
    weights = find(jnp.asarray(twice @ twice.T), jnp.array([0.0, 0.0, 9.0]))
    assert weights[2] == 0


#
# The second order in x
#


@pytest.mark.parametrize("equilibrium", _all, ids=str)
def test_an_outer_maximum_does_not_pass_in_silence(equilibrium):
    # F = -x^2 / 2 + ..., greatest at x = 0.
    hill, zero = Separable.make(hill=1.0, about_x=0.1), jnp.zeros(2)
    certificate = blx.certify(hill, equilibrium, zero, zero, y0=zero)
    if isinstance(equilibrium, blx.Nash):
        assert certificate.residuals["outer curvature"] == 1
    else:
        assert any("minimum is not checked" in note for note in certificate.notes)
        assert "minimum is not checked" in str(certificate)


#
# Large problems, other types, and what must not be lost
#


@pytest.mark.parametrize(
    "equilibrium",
    (
        blx.Stackelberg(),
        pytest.param(blx.WarmStart(), marks=pytest.mark.slow),
        pytest.param(blx.WarmStart(0.5), marks=pytest.mark.slow),
        pytest.param(blx.ColdStart(), marks=pytest.mark.slow),
    ),
    ids=str,
)
def test_a_minimum_in_x_to_second_order(equilibrium):
    # F = cos(y) with y = x: stationary wherever sin(x) = 0.
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(jnp.cos(y)), lambda x, y: jnp.sum((y[:2] - x) ** 2)
    )
    size = 2 if isinstance(equilibrium, blx.Stackelberg) else 3
    for x, expected in (([0, 0], 1), ([np.pi, 0], 1), ([np.pi, np.pi], 0)):
        x = jnp.asarray(x, float)
        y = jnp.append(x, np.pi)[:size]
        found = blx.certify(problem, equilibrium, x, y, y0=y, second_order=True)
        assert np.isclose(found.residuals["outer curvature"], expected, atol=1e-12)
        assert found.residuals["outer"] < 1e-12
        assert "minimum is not checked" not in str(found)


def test_where_no_second_derivative_in_x_is_known():
    problem = blx.BilevelProblem(lambda x, y: jnp.sum(x * y), lambda x, y: y[0] ** 2)
    inside = blx.Pessimistic(within=lambda y: jnp.clip(y, -1, 1))
    found = blx.certify(problem, inside, jnp.zeros(2), jnp.zeros(2), second_order=True)
    assert "not checked for this concept" in str(found)


class Shell(blx.AbstractBilevelProblem):
    """S(x) is the sphere of radius r = exp(x_0 / 2 + x_1) around zero, and F is half the
    squared distance from a, plus a quadratic of x."""

    a: Array
    tilt: Array
    bend: Array

    def outer(self, x, y):
        of_x = self.tilt @ x + 0.5 * x @ (self.bend @ x)
        return 0.5 * jnp.sum((y - self.a) ** 2) + of_x

    def inner(self, x, y):
        return 0.25 * (jnp.sum(y**2) - jnp.exp(x[0] + 2 * x[1])) ** 2


@jax.jit
def _selected_on_shell(x, size, worst):
    """The angle with a of the selected point, and the derivatives of its F but for the
    quadratic of x, where |a| is `size`."""

    def radius_and_angle(x):
        r = jnp.exp(x[0] / 2 + x[1])
        # The nearest point; or the end of the ball of radius .6 around c, which is at an
        # angle of .5 with a.
        return r, worst * (0.5 + 2 * jnp.arcsin(0.3 / r))

    def value(x):
        r, angle = radius_and_angle(x)
        return 0.5 * (r**2 + size**2 - 2 * r * size * jnp.cos(angle))

    return *radius_and_angle(x), jax.grad(value)(x), jax.hessian(value)(x)


@pytest.mark.slow
@pytest.mark.parametrize("worst", (False, True))
def test_the_second_derivative_of_a_selected_value(worst):
    x, size, reach = np.array([0.3, -0.2]), 1.7, 0.6
    r, angle, gradient, hessian = map(as_numpy, _selected_on_shell(x, size, 1.0 * worst))

    def on_shell(at):
        return r * np.array([np.cos(at), np.sin(at), 0.0])

    # a at the angle zero, c at .5, and y further away from a.
    y, y0 = on_shell(angle), 1.3 * on_shell(0.5)
    equilibrium = blx.Pessimistic(reach) if worst else blx.Optimistic()
    # The quadratic of x makes it stationary, and gives it any second derivative. These
    # tell all entries of one: no error leaves the first three shares as they are.
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    for wanted, share in (
        (np.diag([2.0, -1.0]), 0.5),
        (np.diag([-1.0, 2.0]), 0.5),
        (0.5 * np.eye(2) + 1.5 * swap, 0.5),
        (-np.eye(2), 1.0),
        (np.diag([2.0, 1.0]), 0.0),
    ):
        bend = wanted - hessian
        shell = Shell(
            jnp.array([size, 0.0, 0.0]),
            jnp.asarray(-gradient - bend @ x),
            jnp.asarray(bend),
        )
        at = map(jnp.asarray, (x, y))
        found = blx.certify(
            shell, equilibrium, *at, y0=jnp.asarray(y0), second_order=True
        )
        assert found.residuals["outer"] < 1e-7 and found.residuals["selection"] < 1e-7
        assert np.isclose(found.residuals["outer curvature"], share, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_no_second_derivative_at_a_kink():
    zero = jnp.zeros(2)
    problem = blx.BilevelProblem(Distance(zero, zero), lambda x, y: 0.5 * y[2] ** 2)
    y, concept = jnp.array([0.6, 0.8, 0.0]), blx.Pessimistic(1.0)
    found = blx.certify(problem, concept, zero, y, y0=jnp.zeros(3), second_order=True)
    assert found.largest < 1e-10


@pytest.mark.parametrize("kind", ("squares", "plain", "curved"))
def test_curvature_between_noise_and_signal(kind):
    class Weighted(blx.AbstractBilevelProblem):
        w: jax.Array

        def outer(self, x, y):
            return jnp.sum(y**2)

        def inner(self, x, y):
            bent = jnp.log(jnp.cosh(y - x)) if kind == "curved" else (y - x) ** 2
            return jnp.sum(self.w * bent)

    class WeightedSquares(blx.AbstractLeastSquaresProblem):
        w: jax.Array

        def outer(self, x, y):
            return jnp.sum(y**2)

        def inner_residual(self, x, y):
            return self.w * (y - x)

    cls, x = WeightedSquares if kind == "squares" else Weighted, jnp.ones(3)
    for weight in (0, 3e-15, 1e-14, 1e-12, 1):
        # Sixteen times machine precision is 3.6e-15.
        problem = cls(jnp.array([1.0, weight, 0.5]))
        found = blx.certify(problem, blx.WarmStart(), x, x)
        unclear = weight if 0 < weight < 1e-13 else 0
        assert found.unclear is not None
        assert np.isclose(found.unclear, unclear, rtol=1e-6, atol=0)
        assert ("between noise and signal" in str(found)) == (unclear > 0)


def test_uniqueness_is_denied_by_number():
    class Pair(blx.AbstractBilevelProblem):
        """With u and v both positive, only their difference is determined."""

        w: jax.Array

        def outer(self, x, y):
            return jnp.sum((y - 1) ** 2)

        def inner(self, x, y):
            return (y[0] - y[1] - x[0]) ** 2 / 2 + self.w / 2 * jnp.sum(y**2)

    class Bounded(Pair):
        def project_y(self, y):
            return jnp.maximum(y, 0)

    dtype = jnp.float32
    x, y = jnp.zeros(1, dtype), jnp.zeros(2, dtype) + 1
    # The rule is 1.9e-6 in single precision, and the eigenvalues are w and 2 + w.
    for cls, what in ((Pair, "H"), (Bounded, "H in the set")):
        sentence = rf"an eigenvalue of {what} is (.*) of the largest, and up to 1.91e-06"
        for w, size in ((0.0, 0.0), (2e-6, 1e-6), (2e-5, None)):
            problem = cls(jnp.asarray(w, dtype))
            found = re.search(
                sentence, str(blx.certify(problem, blx.Stackelberg(), x, y))
            )
            assert (found is None) == (size is None)
            if found is not None:
                assert float(found[1]) == pytest.approx(size, abs=2e-7)


@pytest.mark.slow
def test_real_curvature_of_many_variables_counts():
    """650 variables in single precision: rounding is 6e-6 of the largest, not 8e-5."""
    dtype, size = jnp.float32, 650
    weights = jnp.ones(size, dtype).at[7].set(4e-5)
    problem = Separable.make(about_one=1.0, weights=weights, wells=jnp.zeros(size))
    problem = jax.tree.map(lambda u: u.astype(dtype), problem)
    x = jnp.full(size, 0.5, dtype)
    certificate = blx.certify(problem, blx.Stackelberg(), x, x)
    assert certificate.residuals["uniqueness"] == 0
    assert np.isclose(float(certificate.unclear), 4e-5, rtol=1e-2)


@pytest.mark.parametrize("squares", (pytest.param(True, marks=pytest.mark.slow), False))
def test_more_variables_than_a_matrix_may_have(squares):
    """Negative curvature that a Krylov space sees; and the note that it may not."""
    size = 1100
    values = np.linspace(1, 2, size)
    values[7] = -1.0

    def inner(x, y):
        return 0.5 * jnp.sum(jnp.asarray(values) * (y - x[0]) ** 2)

    def residual(x, y):
        return (y - x[0]) * jnp.sqrt(jnp.abs(jnp.asarray(values)))

    def outer(x, y):
        return 0.5 * jnp.sum((y - 2) ** 2)

    problem = blx.BilevelProblem(outer, inner)
    if squares:
        problem = blx.LeastSquaresProblem(outer, residual)
    x, y = jnp.array([2.0]), jnp.full(size, 2.0)
    certificate = blx.certify(problem, blx.WarmStart(), x, y + 0.01, max_products=40)
    assert certificate.residuals["inner"] > 1e-4
    assert (certificate.residuals["inner curvature"] > 0.1) == (not squares)
    # What is a sum of squares by its form needs no search.
    assert any("Krylov" in note for note in certificate.notes) == (not squares)


@pytest.mark.parametrize("equilibrium", _all, ids=str)
def test_nan_is_handed_on(equilibrium):
    problem, y = Separable.make(about_x=1.0), jnp.array([1.0, jnp.nan])
    certificate = blx.certify(problem, equilibrium, jnp.ones(2), y, y0=jnp.zeros(2))
    assert np.isnan(certificate.largest)


@pytest.mark.parametrize("equilibrium", (blx.WarmStart(), blx.ColdStart()), ids=str)
def test_float32(equilibrium):
    rng = np.random.default_rng(2)
    drawn = [_draw(rng, False, False) for _ in range(50)]
    # Those whose curvatures are more than rounding in float32.
    singular_values = [np.linalg.svd(d.G)[1] for d in drawn]
    well = [s[s > 1e-9][-1] > 1e-2 * s[0] for s in singular_values]
    drawn = [d for d, good in zip(drawn, well) if good]
    assert len(drawn) > 10
    for d in drawn[:10]:
        x, y = d.cold()
        problem = jax.tree.map(lambda u: u.astype(jnp.float32), d.problem(Units.none()))
        x, y, y0 = (jnp.asarray(u, jnp.float32) for u in (x, y, d.y0))
        certificate = blx.certify(problem, equilibrium, x, y, y0=y0)
        assert certificate.residuals["inner"] < 1e-3
        assert certificate.residuals["inner curvature"] < 1e-3
        off = blx.certify(problem, equilibrium, 1.1 * x, 1.1 * y + 0.1, y0=y0)
        assert off.largest > 1e-2
        assert off.largest.dtype == jnp.float32
