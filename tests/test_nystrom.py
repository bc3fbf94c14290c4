"""Randomised low-rank inverses, preconditioned conjugate gradients, carried adjoints."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import as_numpy, Counter, CountingOperator, dtypes, tolerance, tree_allclose
from jaxtyping import Array

import bilevel_eqx as blx


SIZE, RANK, DAMPING = 30, 5, 0.1


def _low_rank(seed=0):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    values = np.concatenate([[9.0, 3.0, 1.0, 0.5, 0.2], np.zeros(SIZE - RANK)])
    return (vectors * values) @ vectors.T, rng.normal(size=SIZE)


def _operator(matrix, dtype):
    matrix = jnp.asarray(matrix, dtype)
    return lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)


@eqx.filter_jit
def _solve(operator, vector, solver):
    solution = lx.linear_solve(operator, vector, solver, throw=False)
    return solution.value, solution.result, solution.stats


@pytest.mark.parametrize("dtype", dtypes)
def test_exact_up_to_its_rank(dtype):
    """(H + rho I)^-1 b, also where the sketch has directions that H has not."""
    H, b = _low_rank()
    expected = np.linalg.solve(H + DAMPING * np.eye(SIZE), b)
    solver = blx.pipelines.Nystrom(RANK + 3, DAMPING)
    value, result, stats = _solve(_operator(H, dtype), jnp.asarray(b, dtype), solver)
    assert result == lx.RESULTS.successful
    assert value.dtype == stats["residual"].dtype == dtype
    assert tree_allclose(as_numpy(value), expected, rtol=10 * tolerance(dtype))
    assert stats["residual"] < 10 * tolerance(dtype)
    assert stats["smallest"] < 1e-3 * DAMPING


def test_says_what_is_wrong():
    H, b = map(jnp.asarray, _low_rank())
    indefinite = _operator(H - np.eye(SIZE), jnp.float64)
    few = blx.pipelines.Nystrom(1, 1e-3 * DAMPING)

    @jax.jit
    def solve(operators):
        # Both under `vmap`.
        return jax.vmap(lambda H: _solve(H, b, few))(operators)

    operators = jax.tree.map(
        lambda *u: jnp.stack(u), _operator(H, jnp.float64), indefinite
    )
    q, results, _ = solve(operators)
    assert (results == lx.RESULTS.stagnation).tolist() == [True, False]
    assert (results == lx.RESULTS.breakdown).tolist() == [False, True]
    assert np.all(np.isfinite(q))
    for kwargs, match in (
        ({"rank": 0, "damping": 1.0}, r"`Nystrom\(rank=...\)` must be at least one"),
        ({"rank": 2, "damping": 0.0}, r"`Nystrom\(damping=...\)` must be greater"),
    ):
        with pytest.raises(ValueError, match=match):
            blx.pipelines.Nystrom(**kwargs)
    with pytest.raises(ValueError, match="does not start from a guess"):
        blx.Implicit(None, blx.Neumann(3, 0.1), carry_adjoint=True)
    with pytest.raises(ValueError, match=r"`TruncatedCG\(preconditioner=...\)`"):
        blx.TruncatedCG(3, preconditioner=blx.Neumann(3, 0.1))  # pyright: ignore


def _products(H, b, solver, guess=None):
    counter = Counter()
    # Beyond that there is rounding: of the guess, times the condition number.
    options = {"rtol": 1e-10} | ({} if guess is None else {"y0": guess})
    operator = CountingOperator(jnp.asarray(H), counter)
    out = lx.linear_solve(operator, jnp.asarray(b), solver, options=options)
    return counter.read(), out.value, out.stats


@pytest.mark.slow
def test_preconditioned_and_guessed():
    """The same solution, in fewer steps."""
    low_rank, b = _low_rank()
    H = 1e3 * low_rank + np.diag(np.linspace(1, 1.2, SIZE))
    expected = np.linalg.solve(H, b)
    preconditioned = blx.TruncatedCG(
        SIZE, preconditioner=blx.pipelines.Nystrom(RANK, 1.0), refresh_every=3
    )
    operator = _operator(H, jnp.float64)

    @jax.jit
    def both(operator, b):
        options = {"rtol": 1e-6}
        solvers = blx.TruncatedCG(SIZE), preconditioned
        return [lx.linear_solve(operator, b, s, options=options) for s in solvers]

    plain, found = both(operator, jnp.asarray(b))
    assert tree_allclose(as_numpy(plain.value), expected, rtol=1e-4)
    assert tree_allclose(as_numpy(found.value), expected, rtol=1e-4)
    assert int(found.stats["num_steps"]) < int(plain.stats["num_steps"]) - 2
    # From the solution, or a multiple of it, there is nothing to do but one product.
    count, value, stats = _products(H, b, blx.TruncatedCG(SIZE), 7 * expected)
    assert (count, stats["num_steps"]) == (1, 0)
    assert tree_allclose(as_numpy(value), expected, rtol=1e-10)
    # A guess without meaning does no harm.
    for guess in (0 * expected, np.full(SIZE, np.nan), -1e6 * b[::-1]):
        count, value, _ = _products(H, b, blx.TruncatedCG(SIZE), guess)
        assert tree_allclose(as_numpy(value), expected, rtol=1e-8)


class Quadratic(blx.AbstractBilevelProblem):
    """y*(x) = H^-1 x."""

    matrix: Array
    target: Array

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.target) ** 2)

    def inner(self, x, y):
        return 0.5 * jnp.vdot(y, self.matrix @ y) - jnp.vdot(x, y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "with_inner_update", (False, pytest.param(True, marks=pytest.mark.slow))
)
def test_adjoint_is_carried(with_inner_update):
    """Where x stands still, two steps of conjugate gradients in each of the outer steps
    are many in the end."""
    rng = np.random.default_rng(1)
    matrix = np.diag(np.linspace(1, 30, SIZE))
    x, target = rng.normal(size=SIZE), rng.normal(size=SIZE)
    y = np.linalg.solve(matrix, x)
    expected = np.linalg.solve(matrix, y - target)
    problem = Quadratic(jnp.asarray(matrix), jnp.asarray(target))
    inner_update = blx.Unrolled(optax.sgd(0.01), 1) if with_inner_update else None
    solver = blx.TruncatedCG(
        2, preconditioner=blx.pipelines.Nystrom(2, 1.0), refresh_every=4
    )
    response = blx.Implicit(None, solver, carry_adjoint=True)
    pipeline = blx.GradientPipeline(response, optax.sgd(0.0), inner_update)
    start = jnp.asarray(x), jnp.asarray(y)

    @eqx.filter_jit
    def run(pipeline):
        concept = blx.WarmStart()
        state = pipeline.init(problem, concept, *start, jax.random.key(0))

        def step(state, _):
            state, _ = pipeline.step(problem, concept, state)
            return state, state.gradient

        return jax.lax.scan(step, state, length=40)

    last, gradients = run(pipeline)
    errors = np.linalg.norm(as_numpy(gradients) - expected, axis=1)
    errors /= np.linalg.norm(expected)
    assert errors[0] > 0.05
    assert errors[-1] < 1e-6
    carried = last.guess if with_inner_update else last.inner_state
    assert carried.age == 40
    assert tree_allclose(as_numpy(carried.adjoint), expected, rtol=1e-5)
