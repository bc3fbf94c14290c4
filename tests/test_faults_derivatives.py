"""Derivatives that are right or refused, and errors that name their cause."""

import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest
from helpers import (
    finite_difference_gradient,
    finite_difference_jvp,
    grid,
    tree_allclose,
    value_and_both,
)
from jaxtyping import Array

import bilevel_eqx as blx


exact = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
slow = pytest.mark.slow


class Rows(blx.AbstractBilevelProblem[Array, Array]):
    """A linear regression with targets x, singular if it has fewer rows than columns."""

    rows: Array

    def outer(self, x, y):
        return jnp.sum((y - 1) ** 2)

    def inner(self, x, y):
        return 0.5 * jnp.sum((self.rows @ y - x) ** 2)


def _rows(singular_values, num_columns, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    size = len(singular_values)
    left = np.linalg.qr(rng.normal(size=(size, size)))[0]
    right = np.linalg.qr(rng.normal(size=(num_columns, size)))[0]
    rows = (left * np.asarray(singular_values)) @ right.T
    x = rng.normal(size=size)
    return Rows(jnp.asarray(rows, dtype)), jnp.asarray(x, dtype), rows, x


#
# Linear solvers of other libraries
#

# Of one shape, so that there is one program for each solver and derivative.
_KINDS = {
    "regular": (1.4, 1.2, 1.0, 0.8, 0.6),
    "ill-conditioned": (1.0, 0.5, 1e-1, 1e-2, 1e-7),
    "singular": (1.4, 1.0, 0.6, 0.0, 0.0),
    "very singular": (1.4, 1.0, 0.0, 0.0, 0.0),
    "scaled": (1e-6, 2e-6, 0.0, 0.0, 0.0),
}


def _answer(problem, response, x):
    y0 = jnp.zeros(problem.rows.shape[1], x.dtype)
    return blx.best_response(problem, x, y0, response)


@eqx.filter_jit
def _pulled(problem, response, x):
    return jax.grad(lambda x: problem.outer(x, _answer(problem, response, x)))(x)


@eqx.filter_jit
def _pulled_in_a_batch(problem, response, xs):
    return jax.vmap(lambda x: _pulled(problem, response, x))(xs)


@eqx.filter_jit
def _pushed(problem, response, x):
    return jax.jvp(lambda x: _answer(problem, response, x), (x,), (x,))[1]


def _derivatives(problem, x, solver):
    """In reverse and in forward mode, with and without `jit` and `vmap`."""
    response = blx.Implicit(blx.Projection(), solver)
    y0 = jnp.zeros(problem.rows.shape[1], x.dtype)
    return {
        "hypergradient": lambda: (
            blx.hypergradient(problem, x, y0, response).gradient,
            "reverse",
        ),
        "reverse": lambda: (_pulled(problem, response, x), "reverse"),
        "forward": lambda: (_pushed(problem, response, x), "forward"),
        "vmap": lambda: (_pulled_in_a_batch(problem, response, x[None])[0], "reverse"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(_KINDS))
@pytest.mark.parametrize(
    "solver",
    (
        lx.LU(),
        lx.QR(),
        lx.Cholesky(),
        lx.CG(1e-12, 1e-12),
        lx.GMRES(1e-12, 1e-12),
        lx.SVD(),
        lx.AutoLinearSolver(well_posed=None),
    ),
    ids=lambda solver: type(solver).__name__,
)
def test_foreign_solvers_are_right_or_raise(solver, kind):
    problem, x, rows, at = _rows(_KINDS[kind], 5)
    pinv = np.linalg.pinv(rows, rcond=1e-10)
    truth = {"reverse": 2 * pinv.T @ (pinv @ at - 1), "forward": pinv @ at}
    raised = []
    ways = _derivatives(problem, x, solver)
    if not isinstance(solver, lx.LU | lx.CG):
        # The program of "vmap" contains the same; one direct and one iterative solver
        # show that it works without a batch.
        del ways["reverse"]
    for way, compute in ways.items():
        try:
            value, mode = compute()
        except eqx.EquinoxRuntimeError as error:
            raised.append(way)
            # Also where its solution is NaN: a learning rate has nothing to do with it.
            assert "`Pseudoinverse` if the inner Hessian is singular" in str(error)
            assert "learning rate" not in str(error)
            continue
        error = np.linalg.norm(value - truth[mode]) / np.linalg.norm(truth[mode])
        assert error < (1e-9 if kind == "regular" else 1e-2), way
    if kind == "regular" or isinstance(solver, lx.SVD) and kind != "ill-conditioned":
        assert raised == []
    if isinstance(solver, lx.LU | lx.QR | lx.Cholesky) and "singular" in kind:
        assert raised == list(ways)


@slow
@pytest.mark.parametrize("solver", (lx.LU(), lx.Cholesky()))
def test_foreign_solvers_in_float32(solver):
    problem, x, rows, at = _rows((1.4, 1.0, 0.6), 5, jnp.float32)
    ways = _derivatives(problem, x, solver)
    # All ways have the same judge, so that one solver is enough for the others.
    for way in ("hypergradient", "forward") if solver == lx.LU() else ("vmap",):
        with pytest.raises(eqx.EquinoxRuntimeError):
            ways[way]()
    response = blx.Proximal(0.5, blx.Projection(), solver)
    y0 = jnp.zeros(5, jnp.float32)
    gradient = jax.jit(
        jax.grad(lambda x: problem.outer(x, blx.best_response(problem, x, y0, response)))
    )(x)
    inverse = np.linalg.solve(rows.T @ rows + 0.5 * np.eye(5), rows.T)
    assert tree_allclose(gradient, 2 * inverse.T @ (inverse @ at - 1), rtol=1e-4)


@pytest.mark.slow
def test_jacobians_and_nearest_minima_check_too():
    problem, x, _, _ = _rows((1.4, 1.0, 0.6), 5)
    y = blx.best_response(problem, x, jnp.zeros(5), exact)
    response = blx.Implicit(None, lx.LU())
    # And as an operator of its own, in both directions.
    for product, vector in (
        (lambda v: response(problem, x, y).jacobian.mv(v), x),
        (lambda v: blx.response_jacobian(problem, x, y, lx.LU()).mv(v), x),
        (lambda v: blx.response_jacobian(problem, x, y, lx.LU()).T.mv(v), y),
    ):
        with pytest.raises(eqx.EquinoxRuntimeError, match="linear solve"):
            eqx.filter_jit(product)(vector)
    nearest = blx.MinimumDisplacement(blx.Projection(), lx.LU())
    with pytest.raises(eqx.EquinoxRuntimeError):
        blx.hypergradient(problem, x, jnp.zeros(5), nearest)


@pytest.mark.slow
def test_second_derivatives_of_checked_solves():
    # y = x / (1 + s), with s a leaf: d2y / ds2 = 2 x / (1 + s)^3.
    class Ridge(blx.AbstractBilevelProblem):
        s: Array

        def outer(self, x, y):
            return jnp.sum(y)

        def inner(self, x, y):
            return 0.5 * jnp.sum((y - x) ** 2) + 0.5 * self.s * jnp.sum(y**2)

    x, response = jnp.array([1.0, 2.0]), blx.Implicit(blx.Projection(), lx.LU())

    def total(s):
        return jnp.sum(blx.best_response(Ridge(s), x, jnp.zeros(2), response))

    second = eqx.filter_jit(jax.grad(jax.grad(total)))(jnp.array(0.5))
    assert np.isclose(second, 2 * 3.0 / 1.5**3, rtol=1e-10)


#
# Aggregated differentiates what it does
#


def _bda():
    rs = np.random.RandomState(0)
    A, c = jnp.asarray(rs.randn(3, 5)), jnp.asarray(rs.randn(5))
    problem = blx.BilevelProblem(
        lambda x, y: 0.5 * jnp.exp(x[0]) * jnp.sum((y - c) ** 2) + 0.05 * jnp.sum(x**2),
        lambda x, y: 0.5 * jnp.sum(((A * jnp.exp(x)[:, None]) @ y - 1) ** 2),
    )
    return problem, jnp.asarray(0.3 * rs.randn(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "response",
    (
        blx.Aggregated(20),
        blx.Aggregated(20, inner_step_size=0.1),
        blx.Aggregated(20, outer_step_size=0.1),
    ),
)
def test_aggregated_differentiates_its_rates(response):
    problem, x = _bda()
    anchor, along = 0.1 * jnp.arange(5.0), jnp.cos(jnp.arange(5.0))

    @eqx.filter_jit
    def total(x, anchor):
        """F, its derivative along one way of the anchor, and its gradient in x."""

        def value(x, anchor):
            return problem.outer(x, blx.best_response(problem, x, anchor, response))

        value, pushed, (in_x, _) = value_and_both(value, (x, anchor), (0 * x, along))
        return value, pushed, in_x

    out = blx.hypergradient(problem, x, anchor, response)
    _, pushed, in_x = total(x, anchor)
    expected = finite_difference_gradient(lambda x: total(x, anchor)[0], x)
    assert tree_allclose(out.gradient, expected, rtol=1e-8)
    assert tree_allclose(in_x, expected, rtol=1e-8)
    # And with respect to the anchor, where its step sizes are measured.
    expected = finite_difference_jvp(lambda a: total(x, a)[0], anchor, along)
    assert tree_allclose(pushed, expected, rtol=1e-8)


#
# Optimisers that cannot be differentiated
#


def _quartic(x, y):
    return jnp.sum((y - x) ** 2) + 0.1 * jnp.sum(y**4)


_curved = blx.BilevelProblem(lambda x, y: jnp.sum((y - 1) ** 2), _quartic)
_x = jnp.array([0.5, -0.3])


@pytest.mark.parametrize("mode", ("checkpointed", "reverse", "forward"))
@pytest.mark.parametrize(
    "optimiser",
    (
        optax.lbfgs(),
        optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
        optax.chain(optax.scale(-1.0), optax.scale_by_zoom_linesearch(5)),
        optax.chain(optax.clip(1.0), optax.chain(optax.lbfgs())),
        optax.masked(optax.lbfgs(), True),
    ),
    ids=("lbfgs", "backtracking", "zoom", "nested", "masked"),
)
def test_line_searches_are_not_unrolled(optimiser, mode):
    response = blx.Unrolled(optimiser, 20, mode)
    for call in (blx.hypergradient, blx.best_response):
        with pytest.raises(ValueError, match="line search.*Implicit\\(Projection"):
            call(_curved, _x, _x, response)


@pytest.mark.parametrize(
    "optimiser",
    (
        optax.lbfgs(0.3, linesearch=None),
        optax.adam(0.05),
        optax.sgd(0.1, momentum=0.5),
        optax.sgd(optax.cosine_decay_schedule(0.1, 100)),
        optax.polyak_sgd(0.1),
        optax.apply_if_finite(optax.sgd(0.1), 3),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
        optax.chain(optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), optax.scale(0.5)),
    ),
    ids=(
        "lbfgs",
        "adam",
        "momentum",
        "schedule",
        "polyak",
        "if",
        "sam",
        "opaque",
        "chain",
    ),
)
def test_other_optimisers_are(optimiser):
    response = blx.Unrolled(optimiser, 15)

    @eqx.filter_jit
    def total(x):
        return _curved.outer(x, blx.best_response(_curved, x, 0.5 * _x, response))

    gradient = blx.hypergradient(_curved, _x, 0.5 * _x, response).gradient
    expected = finite_difference_gradient(total, _x, 1e-4)
    assert tree_allclose(gradient, expected, rtol=1e-6)


#
# Kinks
#

_RNG = np.random.default_rng(0)
_A, _T = jnp.asarray(_RNG.normal(size=(8, 5))), jnp.asarray(_RNG.normal(size=8))


def _towards_one(x, y):
    return jnp.sum((y - 1) ** 2)


class Kinked(blx.AbstractBilevelProblem[Array, Array]):
    """A sum of functions with kinks, of which one counts. Which one is data, so that all
    share a program."""

    counts: Array

    def outer(self, x, y):
        return _towards_one(x, y)

    def inner(self, x, y):
        # The types of the data are those of x and y.
        A, t, counts = (u.astype(y.dtype) for u in (_A, _T, self.counts))
        scale, square = jnp.exp(x[0]), jnp.sum(y**2)
        lasso = 0.5 * jnp.sum((A @ y - t) ** 2) + 3 * scale * jnp.sum(jnp.abs(y))
        hinge = jnp.sum(jax.nn.relu(1 - A @ y)) + scale * square
        deviation = jnp.sum(jnp.abs(y - 0.3)) + 1e-3 * scale * square
        return counts @ jnp.stack([lasso, hinge, deviation])


_KINKED = {
    **{k: Kinked(u) for k, u in zip(("lasso", "hinge", "deviation"), jnp.eye(3))},
    # Where XLA rounds the entries twice, differently, none of them is the maximum, and
    # its derivative is NaN, which zero times it is, too. So this one is on its own.
    "largest": blx.BilevelProblem(
        _towards_one,
        lambda x, y: jnp.max(jnp.abs(y - 0.3)) + 1e-3 * jnp.exp(x[0]) * jnp.sum(y**2),
    ),
}
_searching = blx.Implicit(blx.GradientDescent(0.0123, 501), blx.Pseudoinverse())


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, name", list(itertools.product((jnp.float64, jnp.float32), _KINKED))
)
def test_a_kink_is_named(dtype, name):
    x, y0 = jnp.zeros(1, dtype), jnp.ones(5, dtype)
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(eqx.EquinoxRuntimeError, match="met a kink") as info:
            blx.hypergradient(_KINKED[name], x, y0, _searching)
    assert "`project_y`" in str(info.value)


def test_a_kink_within_a_program():
    # There the sentence knows less, and recommends nothing that is wrong.
    @eqx.filter_jit
    def value(x):
        return blx.hypergradient(_KINKED["lasso"], x, jnp.ones(5), _searching).value

    with pytest.raises(eqx.EquinoxRuntimeError, match="If it is smooth and"):
        value(jnp.zeros(1))


_descending = blx.GradientDescent(0.0123, 301)
_to_and_fro = {
    "sgd": blx.Unrolled(optax.sgd(0.0123), 300),
    "adam": blx.Unrolled(optax.adam(0.02), 301),
    "implicit": blx.Implicit(_descending, blx.Pseudoinverse(), tolerance=None),
}


@eqx.filter_jit
def _result(problem, x, y0, response):
    return blx.hypergradient(problem, x, y0, response, throw=False).result


@pytest.mark.parametrize(
    "dtype, name, steps",
    [
        (jnp.float32, "lasso", "sgd"),
        *(
            pytest.param(jnp.float64, *case, marks=pytest.mark.slow)
            for case in (
                *(("lasso", steps) for steps in _to_and_fro),
                *((name, "sgd") for name in _KINKED if name != "lasso"),
            )
        ),
    ],
)
def test_steps_to_and_fro_across_a_kink(dtype, name, steps):
    """Also within a program, where nothing can be found out after a failure."""
    x, y0 = jnp.zeros(1, dtype), jnp.ones(5, dtype)
    with jax.numpy_dtype_promotion("standard"):
        result = _result(_KINKED[name], x, y0, _to_and_fro[steps])
    assert result == blx.RESULTS.at_kink


_absolute_values = blx.BilevelProblem(
    _towards_one, lambda x, y: jnp.exp(x[0]) * jnp.sum(jnp.sqrt(y**2))
)


@pytest.mark.parametrize("start", (0.25, 0.2))
def test_to_and_fro_across_a_gradient_that_is_not_finite(start):
    """At zero the derivative of sqrt(y^2) is 0 / 0. From .25 the middle of two points is
    just there; from .2 only their neighbourhood."""
    response = blx.Unrolled(optax.sgd(0.5), 100)
    x, y0 = jnp.zeros(1), jnp.full(3, start)
    assert _result(_absolute_values, x, y0, response) == blx.RESULTS.at_kink


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, equilibrium, num_inner",
    (
        ("lasso", blx.WarmStart(), 1),
        ("lasso", blx.ColdStart(), 100),
        ("hinge", blx.WarmStart(), 3),
        ("deviation", blx.WarmStart(), 1),
    ),
)
def test_a_run_across_a_kink(name, equilibrium, num_inner):
    response = blx.Unrolled(optax.sgd(0.0123), num_inner)
    pipeline = blx.GradientPipeline(response, optax.sgd(1e-4))
    problem, x, y0 = _KINKED[name], jnp.zeros(1), jnp.ones(5)
    steps = 300 // num_inner
    out = blx.solve(problem, equilibrium, x, y0, pipeline=pipeline, num_steps=steps)
    assert any("to and fro across a kink" in note for note in out.certificate.notes)


def test_a_run_that_meets_no_kink():
    # Adam goes to and fro for ever; this bowl is smooth.
    response = blx.Unrolled(optax.adam(0.1), 3)
    pipeline = blx.GradientPipeline(response, optax.sgd(1e-2))
    bowl = _Bowl(jnp.asarray(1.0), jnp.asarray(9.5))
    x, y0 = jnp.zeros(1), jnp.ones(5)
    out = blx.solve(bowl, blx.WarmStart(), x, y0, pipeline=pipeline, num_steps=20)
    assert not any("kink" in note for note in out.certificate.notes)


class _Bowl(blx.AbstractBilevelProblem):
    """f = sqrt(width^2 + |y - x|^2), which is nearly a kink; or |y - x|^2 / 2."""

    width: jax.Array
    square: jax.Array

    def outer(self, x, y):
        return jnp.sum((y - 1) ** 2)

    def inner(self, x, y):
        nearly = jnp.sum(jnp.sqrt(self.width + (y - x[0]) ** 2))
        return nearly + self.square * jnp.sum((y - x[0]) ** 2)


@pytest.mark.parametrize("num_steps", (1, 64))
def test_no_kink_where_f_is_smooth(num_steps):
    # Steps that go to and fro for ever: twice one over the curvature, or more.
    response = blx.Unrolled(optax.sgd(jnp.asarray(0.1)), num_steps)
    for width, square in ((1e-4, 0.0), (1e-8, 0.0), (1.0, 9.5), (1e4, 10.0)):
        problem = _Bowl(jnp.asarray(width), jnp.asarray(square))
        out = blx.hypergradient(problem, jnp.full(1, 0.3), jnp.ones(5), response)
        assert out.result == blx.RESULTS.successful


def test_x_in_a_kink_alone():
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(y**2), lambda x, y: jnp.sum(jnp.abs(y - x))
    )
    with pytest.raises(ValueError, match=r"x is only in kinks, such as \|y - x\|"):
        blx.hypergradient(problem, _x, _x, blx.Unrolled(optax.sgd(0.1), 5))


@pytest.mark.slow
def test_newton_steps_that_meet_a_kink():
    # On each piece it is a quadratic.
    with pytest.raises(eqx.EquinoxRuntimeError, match="met a kink"):
        blx.hypergradient(_KINKED["lasso"], jnp.zeros(1), jnp.ones(5), exact)


@pytest.mark.parametrize(
    "inner",
    (
        lambda x, y: jnp.sum(jnp.cosh(3 * (y - x[0]))) + jnp.sum(y**4),
        lambda x, y: jnp.sum(jnp.sqrt(1e-2 + (y - x[0]) ** 2)),
        lambda x, y: 0.5 * jnp.sum((_A @ y - x[0]) ** 2),
    ),
    ids=("steep", "nearly a kink", "quadratic"),
)
def test_too_few_steps_are_no_kink(inner):
    problem = blx.BilevelProblem(lambda x, y: jnp.sum(y**2), inner)
    response = blx.Implicit(blx.GradientDescent(1e-4, 20), blx.Pseudoinverse())
    with pytest.raises(eqx.EquinoxRuntimeError, match="the inner solver more steps"):
        blx.hypergradient(problem, jnp.zeros(1), 2 * jnp.ones(5), response)


def test_minima_inside_of_a_piece():
    """A convex quadratic in pieces. The support of the minimum says on which it is."""
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum((y - 1) ** 2),
        lambda x, y: (
            0.5 * jnp.sum(jax.nn.relu(_A @ y + 1) ** 2)
            + 0.5 * jnp.exp(x[0]) * jnp.sum((y - 1) ** 2)
        ),
    )
    x = jnp.zeros(1)
    out = blx.hypergradient(problem, x, jnp.zeros(5), exact)
    active = np.asarray(_A)[np.asarray(_A @ out.y + 1) > 0]
    assert 0 < len(active) < 8
    H = active.T @ active + np.eye(5)
    y = np.linalg.solve(H, np.ones(5) - active.sum(axis=0))
    assert tree_allclose(out.y, y, rtol=1e-10)
    expected = -2 * (y - 1) @ np.linalg.solve(H, y - 1)
    assert tree_allclose(out.gradient, np.array([expected]), rtol=1e-10)


#
# Divergence
#


# Curvature 2: below 1 it does not diverge.
_bowl = blx.BilevelProblem(_curved.outer, lambda x, y: jnp.sum((y - x) ** 2))


@pytest.mark.parametrize("tolerance", (1e-3, None))
@pytest.mark.parametrize("step_size", (1.1, 2.0, 3.0))
def test_a_diverging_inner_solve(step_size, tolerance):
    solver = blx.GradientDescent(step_size, 60)
    response = blx.Implicit(solver, blx.TruncatedCG(5), tolerance)
    match = "inner solve diverged.*a step size below 1 does not diverge"
    with pytest.raises(eqx.EquinoxRuntimeError, match=match):
        blx.hypergradient(_bowl, _x, 3 * _x, response)
    out = blx.hypergradient(_bowl, _x, 3 * _x, response, throw=False)
    assert out.result == blx.RESULTS.inner_diverged
    # Also to the end of all numbers.
    steep = blx.Implicit(blx.GradientDescent(step_size, 300), blx.TruncatedCG(5), None)
    if step_size > 2.5:
        with pytest.raises(eqx.EquinoxRuntimeError, match="diverge"):
            blx.hypergradient(_curved, _x, 3 * _x, steep)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimiser, diverges",
    (
        (optax.sgd(1.1), True),
        (optax.sgd(2.0), True),
        (optax.sgd(0.5, momentum=0.95), False),
        (optax.sgd(3.0, momentum=0.5), True),
        (optax.sgd(0.99), False),
        (optax.adam(0.5), False),
    ),
)
def test_unrolled_steps_that_diverge(optimiser, diverges):
    response = blx.Unrolled(optimiser, 64)
    out = blx.hypergradient(_bowl, _x, 3 * _x, response, throw=False)
    expected = blx.RESULTS.inner_diverged if diverges else blx.RESULTS.successful
    assert out.result == expected


class Coupled(blx.AbstractBilevelProblem[Array, Array]):
    """A quadratic of curvatures 2 and less around x; and u^2 v^2 / 2."""

    curvatures: Array
    coupling: Array

    def outer(self, x, y):
        return jnp.sum((y - 1) ** 2)

    def inner(self, x, y):
        quadratic = 0.5 * jnp.sum(self.curvatures * (y - x) ** 2)
        return quadratic + 0.5 * self.coupling * jnp.prod(y[:2]) ** 2


def _coupled(dtype=jnp.float64, curvatures=(2.0, 1.0, 0.2), coupling=0.0):
    return Coupled(jnp.asarray(curvatures, dtype), jnp.asarray(coupling, dtype))


def _unrolled_run(problem, response, y0, num_steps=40, rate=1e-2, **kwargs):
    pipeline = blx.GradientPipeline(response, optax.sgd(rate))
    x = jnp.full(y0.shape, 0.5, y0.dtype)
    fixed = dict(pipeline=pipeline, num_steps=num_steps)
    return blx.solve(problem, blx.WarmStart(), x, y0, **fixed, **kwargs)


_SAID = "The inner solve diverged.*a step size below 1 does not diverge"


@pytest.mark.parametrize(
    "dtype, num_steps, said, kept",
    (
        # y_k - x grows 1.5-fold in a step, and at most 1e38 is a number.
        (jnp.float64, 1, f"^(?!At outer step).*{_SAID}", 40),
        (jnp.float32, 5, f"At outer step ..: {_SAID}", None),
        pytest.param(jnp.float32, 1, f"^(?!At outer step).*{_SAID}", 40, marks=slow),
        pytest.param(jnp.float64, 5, f"^(?!At outer step).*{_SAID}", 40, marks=slow),
    ),
)
def test_a_run_whose_unrolled_steps_diverge(dtype, num_steps, said, kept):
    response = blx.Unrolled(optax.sgd(jnp.asarray(1.25, dtype)), num_steps)
    problem, y0 = _coupled(dtype), jnp.arange(1.0, 4.0, dtype=dtype)
    fixed = dict(certify=False)
    with pytest.raises(eqx.EquinoxRuntimeError, match=said):
        _unrolled_run(problem, response, y0, **fixed)
    out = _unrolled_run(problem, response, y0, throw=False, **fixed)
    assert out.result == blx.RESULTS.inner_diverged
    assert np.isfinite(out.value) and out.value > 1e6
    if kept is not None:
        assert out.stats["num_steps"] == kept
    # And it is right about that.
    safe = blx.Unrolled(optax.sgd(jnp.asarray(0.95, dtype)), num_steps)
    assert _unrolled_run(problem, safe, y0, **fixed).value < 1


@pytest.mark.slow
@pytest.mark.parametrize("num_steps, rate", ((3, 2.5), (63, 1.1)))
def test_a_few_unrolled_steps_that_diverge(num_steps, rate):
    problem, y0 = _coupled(), jnp.arange(1.0, 4.0)
    response = blx.Unrolled(optax.sgd(jnp.asarray(rate)), num_steps)
    x = jnp.full(3, 0.5)
    with pytest.raises(eqx.EquinoxRuntimeError, match=_SAID):
        blx.hypergradient(problem, x, y0, response)
    with pytest.raises(eqx.EquinoxRuntimeError, match=_SAID):
        blx.best_response(problem, x, y0, response)
    # A rate that depends on x may still be learned.
    learned = blx.Unrolled(lambda x: optax.sgd(rate + 0 * x[0]), num_steps)
    assert np.all(np.isfinite(blx.hypergradient(problem, x, y0, learned).gradient))
    assert np.all(np.isfinite(blx.best_response(problem, x, y0, learned)))


def _rates(*rates):
    given = jnp.asarray(rates)
    return optax.sgd(lambda count: given[jnp.minimum(count, len(rates) - 1)])


# All of these go far from where they began, have gradients that grow for a while, or
# both.
_NOT_BLAMED = {
    "momentum": blx.Unrolled(optax.sgd(0.5, momentum=0.95), 5),
    "Adam": blx.Unrolled(optax.adam(3.0), 5),
    "sign": blx.Unrolled(optax.sign_sgd(4.0), 3),
    # The largest is four times what diverges if repeated, and all of them contract.
    "long steps": blx.Unrolled(_rates(0.52, 0.7, 0.5, 4.0), 4),
    "alternating": blx.Unrolled(optax.sgd(0.95), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_NOT_BLAMED))
def test_unrolled_steps_that_do_not_diverge(name):
    problem, response = _coupled(), _NOT_BLAMED[name]
    for start in (0.0, 0.51, 20.0):
        y0 = jnp.full(3, start)
        out = blx.hypergradient(problem, jnp.full(3, 0.5), y0, response, throw=False)
        assert out.result == blx.RESULTS.successful
        if name == "long steps":
            continue
        out = _unrolled_run(problem, response, y0, throw=False, certify=False)
        assert out.result == blx.RESULTS.successful


@pytest.mark.slow
def test_a_gradient_that_grows_at_first():
    """u^2 v^2 / 2 is too curved for this rate at its start, and not where it leads."""
    problem, y0 = _coupled(curvatures=(0.0, 0.0, 1.0), coupling=1.0), np.array([3, 0.01])
    y0 = jnp.array([*y0, 0.5])
    response = blx.Unrolled(optax.sgd(0.24), 5)
    x = jnp.full(3, 0.5)
    out = blx.hypergradient(problem, x, y0, response, throw=False)
    assert out.result == blx.RESULTS.successful
    assert problem.inner(x, out.y) > 2 * problem.inner(x, y0)
    out = _unrolled_run(problem, response, y0, throw=False, certify=False)
    assert out.result == blx.RESULTS.successful
    assert problem.inner(out.x, out.y) < problem.inner(out.x, y0)


@pytest.mark.slow
def test_a_warm_start_that_follows_x_far_away():
    """F = (y - 1)^2 with a rate that drives x to and fro, ever further."""
    response = blx.Unrolled(optax.sgd(0.45), 5)
    y0 = jnp.zeros(3)
    out = _unrolled_run(_coupled(), response, y0, 60, 1.2, throw=False, certify=False)
    assert jnp.max(jnp.abs(out.y)) > 4
    assert out.result == blx.RESULTS.successful


@pytest.mark.slow
def test_noisy_steps_are_not_judged():
    data = jnp.linspace(-3, 3, 16)

    def losses(x, y, batch, key):
        return 0.5 * (y[0] - x[0] - 10 * batch) ** 2

    problem = blx.FiniteSumProblem(losses, losses, data, data)
    response = blx.Unrolled(optax.sgd(1.9), 5, batch_size=2)
    x, y0 = jnp.ones(1), jnp.zeros(1)
    out = blx.hypergradient(problem, x, y0, response)
    # It has gone far, and uphill on all of the data.
    assert jnp.abs(out.y[0]) > 4
    assert problem.inner(x, out.y) > problem.inner(x, y0)
    out = _unrolled_run(problem, response, y0, certify=False)
    assert out.result == blx.RESULTS.successful


@pytest.mark.slow
def test_rates_that_are_learned_are_not_blamed():
    """From a rate that diverges to one that does not, by the hypergradient."""
    problem = blx.BilevelProblem(
        lambda x, y: jnp.log1p(jnp.sum(y**2)), lambda x, y: jnp.sum(y**2) + 0 * x[0]
    )
    response = blx.Unrolled(lambda x: optax.sgd(jnp.exp(x[0])), 5)
    x, y0 = jnp.array([np.log(3.0)]), jnp.array([1.0, 2.0])
    out = blx.hypergradient(problem, x, y0, response)
    assert problem.inner(x, out.y) > 1e6
    for _ in range(30):
        x = x - 0.02 * blx.hypergradient(problem, x, y0, response).gradient
    assert jnp.exp(x[0]) < 1


def test_descent_that_does_not_diverge():
    problem = blx.BilevelProblem(_curved.outer, lambda x, y: 1e6 + jnp.sum((y - x) ** 2))
    # From the minimum, where rounding decides which value is larger; and in one step.
    for solver in (blx.GradientDescent(0.9, 50), blx.GradientDescent(0.1, 1)):
        response = blx.Implicit(solver, blx.TruncatedCG(5), None)
        out = blx.hypergradient(problem, _x, _x + 1e-9, response)
        assert tree_allclose(out.gradient, 2 * (_x - 1), rtol=1e-6)


#
# Not finite
#

_RESPONSES = {
    "neumann": blx.Implicit(blx.Projection(), blx.Neumann(5, 0.1)),
    "pseudoinverse": exact,
    "cg": blx.Implicit(None, blx.TruncatedCG(5)),
    "lu": blx.Implicit(blx.Projection(), lx.LU()),
    "proximal": blx.Proximal(0.1, blx.Projection(), lx.Cholesky()),
    "nearest": blx.MinimumDisplacement(),
    "unrolled": blx.Unrolled(optax.sgd(0.1), 2),
}


def _parabola(x, y):
    return 0.5 * jnp.sum((y - x) ** 2)


_NOT_FINITE = {
    "F_y": (lambda x, y: jnp.sum(jnp.sqrt(y - y) + x), _parabola, "F_y"),
    "F": (lambda x, y: jnp.sum(jnp.log(y - 9)), _parabola, "the outer objective"),
    "f_y": (
        lambda x, y: jnp.sum(y**2),
        lambda x, y: _parabola(x, y) + jnp.sum(jnp.sqrt(y - y)),
        "the gradient of the inner objective in y",
    ),
}


# The response makes a difference where y is good and its derivative is not. Elsewhere
# one of each class is enough.
_QUICK = {"F_y": _RESPONSES, "F": ("pseudoinverse", "nearest"), "f_y": ("lu", "unrolled")}
_SLOW = {"F": ("proximal", "unrolled"), "f_y": ("cg", "proximal", "nearest")}


@pytest.mark.parametrize(
    "what, name",
    (
        *((what, name) for what, names in _QUICK.items() for name in names),
        *(
            pytest.param(what, name, marks=slow)
            for what, names in _SLOW.items()
            for name in names
        ),
    ),
)
def test_what_is_not_finite_is_named(what, name):
    outer, inner, said = _NOT_FINITE[what]
    problem, response = blx.BilevelProblem(outer, inner), _RESPONSES[name]
    match = f"NaN or infinity appeared. Not finite: .*{re.escape(said)}"
    with pytest.raises(eqx.EquinoxRuntimeError, match=match):
        blx.hypergradient(problem, _x, _x, response)
    out = blx.hypergradient(problem, _x, _x, response, throw=False)
    assert out.result == blx.RESULTS.nonfinite_step


def test_a_gradient_that_is_given_to_a_derivative():
    problem = blx.BilevelProblem(_curved.outer, _parabola)

    @eqx.filter_jit
    @jax.grad
    def total(x):
        y = blx.best_response(problem, x, x, blx.Implicit(blx.Projection(), lx.LU()))
        return jnp.sum(jnp.sqrt(y - y))

    with pytest.raises(eqx.EquinoxRuntimeError, match="what a linear solve .* was given"):
        total(_x)


@pytest.mark.parametrize(
    "equilibrium, pipeline",
    (
        (blx.ColdStart(), "minimum displacement"),
        pytest.param(blx.WarmStart(), "implicit", marks=slow),
        (blx.Optimistic(), "aggregation"),
    ),
)
def test_a_run_names_what_is_not_finite(equilibrium, pipeline):
    problem = blx.BilevelProblem(lambda x, y: jnp.sum(jnp.sqrt(y - y) + x), _parabola)
    with pytest.raises(eqx.EquinoxRuntimeError, match="At outer step 1.*F_y"):
        blx.solve(problem, equilibrium, _x, _x, pipeline=pipeline, num_steps=2)


@pytest.mark.slow
def test_an_x_that_runs_off():
    # The larger x, the better, and the flatter the inner problem.
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(jnp.exp(-y)),
        lambda x, y: jnp.sum(jax.nn.softplus(-y)) + jnp.exp(-x[0]) * jnp.sum(y**2),
    )
    x, y = jnp.zeros(1, jnp.float32), jnp.zeros(3, jnp.float32)
    match = "largest entry of x has grown from 0 to .*`project_x`.*penalty"
    implicit = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    descent = blx.GradientPipeline(implicit, optax.adam(4.0))
    with pytest.raises(eqx.EquinoxRuntimeError, match=match):
        blx.solve(problem, blx.WarmStart(), x, y, pipeline=descent, num_steps=400)
    # The default does not go where the inner solve fails.
    stays = blx.solve(problem, blx.WarmStart(), x, y, num_steps=100)
    assert np.all(np.diff(stays.history["value"]) <= 0)
    # It ends without a failure, and the certificate says where.
    said = str(stays.certificate)
    assert stays.certificate.residuals["outer"] > 1e-3
    for word in ("grown from 0 to", "`project_x`", "penalty", "entries of the history"):
        assert word in said
    bounded = blx.BilevelProblem(
        problem.outer, problem.inner, project_x=lambda x: jnp.clip(x, -3.0, 3.0)
    )
    held = blx.solve(bounded, blx.WarmStart(), x, y, num_steps=20)
    assert held.x == 3
    assert "has grown" not in str(held.certificate)


#
# Types
#


def _two_leaves(dtypes):
    return {k: jnp.zeros(2, d) for k, d in zip("ab", dtypes)}


def _square(u, x):
    return jnp.sum((u - x.astype(u.dtype)) ** 2).astype(jnp.float32)


_typed = blx.BilevelProblem(
    lambda x, y: _square(y["a"], 0 * x + 1) + _square(y["b"], 0 * x + 1),
    lambda x, y: _square(y["a"], x) + _square(y["b"], 2 * x),
)
_TYPES = {
    "f64, f32": (jnp.float64, jnp.float32),
    "bf16": (jnp.bfloat16, jnp.bfloat16),
    "f16": (jnp.float16, jnp.float16),
    "f32, bf16": (jnp.float32, jnp.bfloat16),
}
_DESCENT = blx.GradientDescent(0.2, 60)


_NO_FACTORISATION = {
    "unrolled": blx.Unrolled(optax.sgd(0.1), 50),
    "forward": blx.Unrolled(optax.sgd(0.1), 50, "forward"),
    "neumann": blx.Implicit(_DESCENT, blx.Neumann(30, 0.2)),
    "cg": blx.Implicit(_DESCENT, blx.TruncatedCG(5)),
}


@pytest.mark.parametrize(
    "name, types",
    grid(
        lambda name, types: name == "cg" or types in ("f64, f32", "bf16"),
        _NO_FACTORISATION,
        _TYPES,
    ),
)
def test_types_that_need_no_factorisation(name, types):
    x, y0 = jnp.asarray(_x, jnp.float32), _two_leaves(_TYPES[types])
    response = _NO_FACTORISATION[name]
    with jax.numpy_dtype_promotion("standard"):
        gradient = blx.hypergradient(_typed, x, y0, response).gradient
    rtol = 2e-2 if "16" in types else 1e-4
    assert tree_allclose(gradient, 2 * (_x - 1) + 4 * (2 * _x - 1), rtol=rtol)


@pytest.mark.parametrize("types", list(_TYPES))
def test_types_that_do(types):
    x, y0 = jnp.asarray(_x, jnp.float32), _two_leaves(_TYPES[types])
    lu = blx.Implicit(_DESCENT, lx.LU())
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(ValueError, match="several types|cannot be decomposed"):
            blx.hypergradient(_typed, x, y0, lu)
        if "16" in types:
            with pytest.raises(ValueError, match="cannot be decomposed. Cast the"):
                blx.hypergradient(_typed, x, y0, exact)
        else:
            gradient = blx.hypergradient(_typed, x, y0, exact).gradient
            truth = 2 * (_x - 1) + 4 * (2 * _x - 1)
            assert tree_allclose(gradient, truth, rtol=1e-5)


@pytest.mark.parametrize(
    "types,", grid(lambda types: types in ("f64, f32", "bf16"), _TYPES)
)
def test_a_run_in_each_type(types):
    pipeline = blx.GradientPipeline(blx.Unrolled(optax.sgd(0.1), 50), optax.sgd(0.1))
    x, y0 = jnp.asarray(_x, jnp.float32), _two_leaves(_TYPES[types])
    with jax.numpy_dtype_promotion("standard"):
        solution = blx.solve(
            _typed, blx.WarmStart(), x, y0, pipeline=pipeline, num_steps=60
        )
    # min (x - 1)^2 + (2 x - 1)^2: x = 3/5; and a certificate to the rounding of y.
    rounding = 2e-2 if "16" in types else 1e-3
    assert tree_allclose(solution.x, np.full(2, 0.6), rtol=rounding)
    assert solution.certificate.largest < 5 * rounding


#
# What is refused in words
#


def test_leaves_that_are_not_real():
    for leaf, said in (
        (_x.astype(complex), "real and the imaginary part as two leaves"),
        (jax.random.key(0), "a random key cannot be optimised"),
        (jnp.arange(2), "`.astype\\(float\\)`"),
    ):
        with pytest.raises(ValueError, match=said) as info:
            blx.hypergradient(_curved, leaf, _x, exact)
        assert ("astype" in str(info.value)) == ("astype" in said)


@pytest.mark.parametrize(
    "value, said",
    (
        ("high", r"\['loss'\]` is 'high', of type `str`"),
        (np.array([object()]), "of type `ndarray`"),
        (jax.random.key(0), "key_data"),
    ),
    ids=("string", "object", "key"),
)
def test_records_that_are_not_numbers(value, said):
    with pytest.raises(ValueError, match=f"(?s)pytree of numeric arrays.*{said}"):
        blx.solve(
            _curved,
            blx.WarmStart(),
            _x,
            _x,
            num_steps=2,
            record=lambda x, y, metrics: {"loss": value},
        )


@pytest.mark.slow
def test_solve_is_not_differentiated():
    pipeline = blx.GradientPipeline(blx.Unrolled(optax.sgd(0.1), 1), optax.sgd(0.1))

    def value(x, weight=1.0):
        problem = blx.BilevelProblem(
            lambda x, y: weight * jnp.sum((y - 1) ** 2), _parabola
        )
        return blx.solve(
            problem,
            blx.WarmStart(),
            x,
            _x,
            pipeline=pipeline,
            num_steps=2,
            certify=False,
        ).value

    calls = {
        "grad": lambda: jax.grad(value)(_x),
        "jit": lambda: jax.jit(jax.grad(value))(_x),
        "jvp": lambda: jax.jvp(value, (_x,), (_x,)),
        "closed over": lambda: jax.grad(lambda w: value(_x, w))(1.0),
        "closed over, forward": lambda: jax.jvp(lambda w: value(_x, w), (1.0,), (1.0,)),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match="`solve` cannot be differentiated.*`hyp"):
            call()


@pytest.mark.slow
def test_least_squares_solvers():
    A = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))

    def residual(x, y):
        return jnp.sinh(A @ y) - A @ x

    problem = blx.LeastSquaresProblem(_curved.outer, residual)
    solver = optx.LevenbergMarquardt(1e-10, 1e-10)
    ours = blx.hypergradient(problem, _x, _x, exact)
    theirs = blx.Implicit(solver, blx.Pseudoinverse())
    out = blx.hypergradient(problem, _x, _x, theirs)
    assert tree_allclose(out.gradient, ours.gradient, rtol=1e-6)
    with pytest.raises(ValueError, match="`LevenbergMarquardt` needs the residual"):
        blx.hypergradient(_curved, _x, _x, theirs)


def test_the_recipes_for_maml():
    """phi(x) = F(y_1), y_1 = x - t f'(x), with f = |y - 1|^2 and F = |y|^2."""
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(y**2), lambda x, y: jnp.sum((y - 1) ** 2)
    )
    one = blx.Unrolled(optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match=r"best_response\(problem, x, x, response\)"):
        blx.hypergradient(problem, _x, _x, one)
    truth = 2 * (_x - 0.2 * (_x - 1)) * 0.8
    first = jax.grad(lambda x: jnp.sum(blx.best_response(problem, x, x, one) ** 2))(_x)
    displaced = blx.BilevelProblem(
        lambda x, d: problem.outer(x, x + d), lambda x, d: problem.inner(x, x + d)
    )
    second = blx.hypergradient(displaced, _x, jnp.zeros(2), one).gradient
    assert tree_allclose(first, truth, rtol=1e-12)
    assert tree_allclose(second, truth, rtol=1e-12)


@pytest.mark.slow
def test_meshes_with_explicit_axes():
    kinds = jax.sharding.AxisType
    for kind in (kinds.Auto, kinds.Explicit):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            unrolled = blx.Unrolled(optax.sgd(0.1), 200)
            out = blx.hypergradient(_curved, _x, _x, unrolled)
            other = blx.hypergradient(_curved, _x, _x, exact)
            assert tree_allclose(other.gradient, out.gradient, rtol=1e-8)
            assert jax.typeof(other.gradient).sharding.mesh.axis_types == (kind,)
            if kind == kinds.Explicit:
                jitted = jax.jit(lambda x: blx.hypergradient(_curved, x, x, exact))
                with pytest.raises(ValueError, match="axis_types=.*AxisType.Auto"):
                    jitted(_x)
