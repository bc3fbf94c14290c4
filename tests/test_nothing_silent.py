"""Each failure, in each way of calling: it raises with a sentence that names the step,
the quantity and the way out, or is returned, and spoils nothing of its neighbours in a
batch.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import grid, tree_allclose

import bilevel_eqx as blx


GOOD, BAD = jnp.array(np.inf), jnp.array(0.25)
X, Y = jnp.array(0.0), jnp.array([2.0, 1.0, 1.0])
_BATCH = jnp.stack([GOOD, BAD, GOOD])


class _Cliff(blx.AbstractBilevelProblem):
    """Harmless up to an edge in x; beyond it the curvature is another."""

    edge: jax.Array
    beyond: float

    def outer(self, x, y):
        # The hypergradient is -1/2, whatever the curvature is.
        return -x + jnp.sum(y) / 6

    def inner(self, x, y):
        return 0.5 * jnp.sum(self._curvature(x) * (y - x) ** 2)

    def _curvature(self, x):
        c = jnp.where(x < self.edge, 1.0, self.beyond)
        return jnp.stack([jnp.ones(()), c, (1 + c) / 2])


class _Ellipse(blx.AbstractLeastSquaresProblem, _Cliff):
    """Its inner minima are a curve: a circle up to the edge, an ellipse beyond it. (A sum
    of squares: for other objectives the search would begin where it is to end.)"""

    def outer(self, x, y):
        return -0.5 * x + 0.0 * jnp.sum(y)

    def inner_residual(self, x, y):
        return (jnp.sum(self._curvature(x) * y**2) - 1) / 2**0.5


@dataclasses.dataclass(frozen=True)
class _Failure:
    response: blx.AbstractResponse
    beyond: float
    # What the sentence says of the quantity, and the way out.
    quantity: str
    remedy: str
    problem: type = _Cliff

    @functools.cached_property
    def pipeline(self):
        # Once, and so compiled once: two optimisers are not known to be equal.
        is_slow = isinstance(self.response, blx.MinimumDisplacement)
        response = _Astray() if is_slow else self.response
        return blx.GradientPipeline(response, optax.sgd(0.2))


def _conjugate_gradients_residual():
    """After two steps, which minimise over b and H b, with three curvatures."""
    H, b = np.diag([1.0, 4.0, 2.5]), np.ones(3)
    K = np.stack([b, H @ b], axis=1)
    q = K @ np.linalg.solve(K.T @ H @ K, K.T @ b)
    return np.linalg.norm(H @ (H @ q - b)) / np.linalg.norm(H @ b)


class _Astray(blx.AbstractResponse):
    """Selects at the edge as `MinimumDisplacement` does, which takes long to compile."""

    def init(self, problem, x, anchor):
        return None

    def __call__(self, problem, x, anchor, state=None):
        assert isinstance(problem, _Cliff)
        answer = blx.Unrolled(optax.sgd(1.0), 1)(problem, x, anchor)
        result = blx.RESULTS.where(
            x < problem.edge, blx.RESULTS.successful, blx.RESULTS.not_selected
        )
        stats = {**answer.stats, "displacement_residual": jnp.array(0.25)}
        return eqx.tree_at(lambda a: (a.result, a.stats), answer, (result, stats))

    def best_response(self, problem, x, anchor):
        raise NotImplementedError

    def reaches(self, problem, x, anchor):
        return True


# It is fast to compile.
_descent = blx.GradientDescent(0.4, 100)

_FAILURES = {
    "inner_not_converged": _Failure(
        blx.Implicit(blx.GradientDescent(1.0, 1), lx.Cholesky()),
        1e-3,
        r"The inner gradient has norm (?P<inner>[\d.e+-]+)\.",
        "Give the inner solver more steps",
    ),
    "not_selected": _Failure(
        blx.MinimumDisplacement(
            blx.GradientDescent(0.03, 1000), selection_steps=1, selection_tolerance=1e-9
        ),
        4.0,
        r"A share of (?P<displacement>[\d.e+-]+) of the displacement",
        r"`selection_steps=...`",
        _Ellipse,
    ),
    "neumann_diverged": _Failure(
        blx.Implicit(_descent, blx.Neumann(60, 0.6)),
        4.0,
        "an eigenvalue of about 4: a step size below 0.5 does not",
        r"Lower `Neumann\(step_size=...\)`",
    ),
    "negative_curvature": _Failure(
        blx.Implicit(None, blx.TruncatedCG(5)),
        -2.0,
        "The curvature is -",
        "use `Proximal` with an `epsilon` above",
    ),
    "linear_not_converged": _Failure(
        blx.Implicit(_descent, lx.CG(1e-12, 1e-12, max_steps=2)),
        4.0,
        f"relative residual of {_conjugate_gradients_residual():.3g}",
        "Give the linear solver more steps",
    ),
    "nonfinite_step": _Failure(
        blx.Unrolled(optax.sgd(1.0), 2),
        np.nan,
        "Not finite: y, the outer objective, the gradient",
        "Lower the outer learning rate",
    ),
}


def _hypergradient(name, edge, throw, x=0.5):
    failure = _FAILURES[name]
    problem = failure.problem(edge, failure.beyond)
    return blx.hypergradient(
        problem, jnp.asarray(x), Y, failure.response, throw=throw
    )  # fmt: skip


def _solve(name, edge, throw, **kwargs):
    # x is 0.1 after the first step, and 0.3, beyond the edge, after the third.
    failure = _FAILURES[name]
    problem = failure.problem(edge, failure.beyond)
    return blx.solve(
        problem,
        blx.ColdStart(),
        X,
        Y,
        pipeline=failure.pipeline,
        num_steps=5,
        save_every=2,
        throw=throw,
        certify=False,
        **kwargs,
    )


_ENTRIES = {"hypergradient": _hypergradient, "solve": _solve}
each_entry = pytest.mark.parametrize("entry", list(_ENTRIES))


def _arrays(out):
    # `jax.jit` returns nothing but arrays.
    return eqx.filter((out.value, out.y), eqx.is_array)


def _sentence(
    call: Callable[[], Any], error: type[Exception] = eqx.EquinoxRuntimeError
) -> str:
    with pytest.raises(error) as info:
        jax.block_until_ready(call())
    return str(info.value)


# What `solve` does with a failure does not depend on which it is.
each_failure_of_each_entry = pytest.mark.parametrize(
    "name, entry",
    grid(
        # A selection that stops short is in `test_selection.py`, too.
        lambda name, entry: (
            name == "nonfinite_step"
            or (entry == "hypergradient" and name != "not_selected")
        ),
        _FAILURES,
        _ENTRIES,
    ),
)


@pytest.mark.slow
@each_failure_of_each_entry
def test_says_what_where_and_what_to_do(name, entry):
    run, failure = _ENTRIES[entry], _FAILURES[name]

    def throw(edge):
        return _arrays(run(name, edge, True))

    message = blx.RESULTS[getattr(blx.RESULTS, name)].partition(". ")[0]
    pattern = f"{re.escape(message)}.*{failure.quantity}.*{failure.remedy}"
    if entry == "solve":
        pattern = f"At outer step 3: {pattern}"
    batched = eqx.filter_jit(jax.vmap(throw))
    sentences = [_sentence(lambda: throw(BAD))]
    # What a run, or `jit`, does with a failure does not depend on which it is.
    is_first = name == "inner_not_converged"
    is_batched = entry == "hypergradient" or is_first
    if is_first:
        # The sentence is somewhere in what XLA has to say.
        sentences.append(_sentence(lambda: jax.jit(throw)(BAD), Exception))
    if is_first and entry == "hypergradient":
        # `solve` takes long to compile, and is inside of `eqx.filter_jit` below.
        sentences.append(_sentence(lambda: eqx.filter_jit(throw)(BAD)))
    if is_batched:
        sentences.append(_sentence(lambda: batched(_BATCH)))
    numbers = []
    for sentence in sentences:
        found = re.search(pattern, sentence)
        assert found is not None, sentence
        numbers.append(found.groupdict())
    # It is the same number each time.
    assert all(number == numbers[0] for number in numbers)
    if is_batched:
        assert re.search(f"Element 1 of the batch: {pattern}", sentences[-1])
        assert "Element 0" not in sentences[-1] and "Element 2" not in sentences[-1]
        # Where nothing fails, nothing is said.
        jax.block_until_ready(batched(jnp.stack([GOOD] * 3)))


@each_failure_of_each_entry
def test_returned_and_the_others_unspoilt(name, entry):
    def run(edge):
        return _ENTRIES[entry](name, edge, False)

    batch = eqx.filter_jit(eqx.filter_vmap(run))(_BATCH)
    bad = batch.result == getattr(blx.RESULTS, name)
    good = batch.result == blx.RESULTS.successful
    assert bad.tolist() == [False, True, False]
    assert good.tolist() == [True, False, True]

    parts = (
        ("value", "y", "gradient") if entry == "hypergradient" else ("value", "x", "y")
    )
    for i, edge in enumerate(_BATCH):
        alone = run(edge)
        assert alone.result == (
            getattr(blx.RESULTS, name) if i == 1 else blx.RESULTS.successful
        )
        if entry == "hypergradient" and i == 1:
            continue
        for part in parts:
            values = jtu.tree_map(lambda u, i=i: u[i], getattr(batch, part))
            assert np.all(np.isfinite(values))
            assert tree_allclose(values, getattr(alone, part), rtol=1e-12)
    if entry == "solve":
        # The bad one ends at its last good step.
        assert batch.stats["num_steps"].tolist() == [5, 2, 5]
        assert tree_allclose(batch.x, np.array([0.5, 0.2, 0.5]), rtol=1e-6)


#
# The two that need no step to fail
#


@each_entry
def test_zero_hypergradient(entry):
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(y**2), lambda x, y: 0.5 * jnp.sum((y - x) ** 2)
    )

    def run(x, throw):
        if entry == "hypergradient":
            return blx.hypergradient(problem, x, Y, blx.Fixed(), throw=throw)
        pipeline = blx.GradientPipeline(blx.Fixed(), optax.sgd(0.2))
        return blx.solve(
            problem,
            blx.WarmStart(),
            x,
            Y,
            pipeline=pipeline,
            num_steps=1,
            certify=False,
            throw=throw,
        )

    def throw(x):
        return _arrays(run(x, True))

    batch = jnp.array([0.0, 1.0])
    # For `hypergradient` it is known before the program runs.
    error = ValueError if entry == "hypergradient" else Exception
    for call in (
        lambda: throw(X),
        lambda: jax.jit(throw)(X),
        lambda: eqx.filter_jit(eqx.filter_vmap(throw))(batch),
    ):
        sentence = _sentence(call, error)
        where = "" if entry == "hypergradient" else "At outer step 1: "
        assert f"{where}The hypergradient is exactly zero for all x" in sentence
        assert "Look for a `stop_gradient`" in sentence
    out = eqx.filter_jit(jax.vmap(lambda x: run(x, False).result._value))(batch)
    assert out.tolist() == 2 * [blx.RESULTS.zero_hypergradient._value.item()]


@pytest.mark.slow
def test_outer_max_steps_reached():
    def run(tolerance, throw):
        # It stays 1/2 from here.
        return _solve("inner_not_converged", GOOD, throw, tolerance=tolerance)

    def throw(tolerance):
        return _arrays(run(tolerance, True))

    tolerances = jnp.array([0.6, 0.1, 0.6])
    pattern = (
        "The outer and the inner residual did not both fall below `tolerance` within "
        "`num_steps` steps. After 5 outer steps the outer residual is 0.5 and the inner "
        "residual 0. Take more steps"
    )
    assert pattern in _sentence(lambda: throw(tolerances[1]))
    sentence = _sentence(lambda: eqx.filter_jit(jax.vmap(throw))(tolerances))
    assert f"Element 1 of the batch: {pattern}" in sentence
    batch = eqx.filter_jit(eqx.filter_vmap(lambda t: run(t, False)))(tolerances)
    failed = batch.result == blx.RESULTS.outer_max_steps_reached
    assert failed.tolist() == [False, True, False]
    for i, tolerance in enumerate(tolerances):
        alone = run(tolerance, False)
        assert tree_allclose(batch.x[i], alone.x, rtol=1e-12)
        assert tree_allclose(batch.value[i], alone.value, rtol=1e-12)


#
# Batches of batches, and derivatives
#


def _best_response(x):
    response = _FAILURES["inner_not_converged"].response
    return jnp.sum(blx.best_response(_Cliff(BAD, 1e-3), x, Y, response))


_INNER = r"The inner solve did not converge.*The inner gradient has norm"


def test_which_elements():
    # Beyond the edge is where it fails.
    x = jnp.array([[0.0, 3.0, 0.0], [0.0, 0.0, 4.0]])
    nested = eqx.filter_jit(jax.vmap(jax.vmap(_best_response)))
    sentence = _sentence(lambda: nested(x))
    found = re.findall(rf"Element (\(\d, \d\)) of the batch: {_INNER}", sentence)
    assert found == ["(0, 1)", "(1, 2)"]
    sentence = _sentence(lambda: nested(x + 3))
    assert sentence.count("Element") == 3
    assert "\n3 more elements of the batch failed." in sentence


_TRANSFORMS = {
    "grad": jax.grad,
    "jit": lambda fn: jax.jit(jax.grad(fn)),
    "vmap": lambda fn: lambda x: jax.vmap(jax.grad(fn))(x[None])[0],
    "of vmap": lambda fn: jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(fn)(x[None])))),
    "jvp": lambda fn: jax.jit(lambda x: jax.jvp(fn, (x,), (jnp.ones(()),))[1]),
    "checkpoint": lambda fn: jax.jit(jax.grad(jax.checkpoint(fn))),
    "scan": lambda fn: jax.jit(
        lambda x: jax.lax.scan(lambda c, x: (c, jax.grad(fn)(x)), 0, x[None])[1][0]
    ),
    "hessian": jax.hessian,
}


@pytest.mark.parametrize("name", list(_TRANSFORMS))
def test_in_a_derivative(name):
    """Which may have no use for the value: here it is linear in y."""
    derivative = _TRANSFORMS[name](_best_response)
    expected = 0.0 if name == "hessian" else 3.0
    sentence = _sentence(lambda: derivative(jnp.array(3.0)), Exception)
    assert re.search(_INNER, sentence)
    # Short of the edge y is x in each of the three entries.
    assert tree_allclose(derivative(jnp.array(0.125)), expected, rtol=1e-10)


#
# A second derivative that is NaN, where values and gradients are not
#


@jax.custom_jvp
def _one(u):
    return jnp.ones_like(u)


@_one.defjvp
def _(primals, tangents):
    return _one(*primals), jnp.nan * tangents[0]


@jax.custom_jvp
def _without_second_derivative(u):
    return u


@_without_second_derivative.defjvp
def _(primals, tangents):
    return primals[0], _one(primals[0]) * tangents[0]


@pytest.mark.parametrize("squares", (False, True))
@pytest.mark.parametrize("size", (6, pytest.param(1100, marks=pytest.mark.slow)))
def test_a_hessian_that_is_nan(size, squares):
    """A pseudoinverse of it is not zero, and no hypergradient is a success."""

    def outer(x, y):
        return 0.5 * jnp.sum((y - 1) ** 2) + 0.5 * jnp.sum(x**2)

    def residual(x, y):
        return y.at[3].set(_without_second_derivative(y[3])) - x[0]

    problem = blx.BilevelProblem(outer, lambda x, y: 0.5 * jnp.sum(residual(x, y) ** 2))
    if squares:
        problem = blx.LeastSquaresProblem(outer, residual)
    x, y = jnp.ones(1), jnp.full(size, 1.1)
    for solver in (blx.Pseudoinverse(), blx.TruncatedCG(5), blx.Neumann(5, 0.1)):
        response = blx.Implicit(None, solver, None)
        out = blx.hypergradient(problem, x, y, response, throw=False)
        assert out.result != blx.RESULTS.successful
        with pytest.raises(eqx.EquinoxRuntimeError, match="the Hessian of the inner"):
            blx.hypergradient(problem, x, y, response)
    certificate = blx.certify(problem, blx.WarmStart(), x, y)
    assert all(np.isnan(value) for value in certificate.residuals.values())
