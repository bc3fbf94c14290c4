"""The cheapest response for an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_numpy
from jaxtyping import Array

import bilevel_eqx as blx


class Quadratic(blx.AbstractBilevelProblem):
    """y*(x) = x / d, and the hypergradient is (y* - target) / d."""

    d: Array
    target: Array

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.target) ** 2)

    def inner(self, x, y):
        return 0.5 * jnp.sum(self.d * y**2) - jnp.vdot(x, y)


def _problem():
    rng = np.random.default_rng(0)
    # Each power of four up to the number of terms in a series is a program.
    d = np.geomspace(1, 10, 40)
    x, target = rng.normal(size=(2, d.size))
    problem = Quadratic(jnp.asarray(d), jnp.asarray(target))
    return problem, jnp.asarray(x), x / d, (x / d - target) / d


@pytest.mark.slow
def test_plan():
    problem, x, minimum, expected = _problem()
    y = jnp.asarray(minimum)
    found = blx.reports.plan(problem, x, y, error=1e-2)
    gradient = as_numpy(blx.hypergradient(problem, x, y, found.response).gradient)
    error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    (chosen,) = (m for m in found.measured if not m.verdict)
    assert error <= 1e-2
    assert abs(error - chosen.error) < 1e-6
    # The others that have the error are slower.
    others = [m for m in found.measured if m.error <= 1e-2]
    assert chosen.seconds == min(m.seconds for m in others)
    assert len(found.measured) == 5 and len(others) >= 2
    # The number of products is the fewest, to a tenth.
    (code,) = (m.code for m in found.measured if "CG(" in m.code and "pre" not in m.code)
    count = int(code.partition("TruncatedCG(")[2].partition(")")[0])
    fewer = blx.Implicit(None, blx.TruncatedCG(int(0.85 * count) - 1))
    cut = blx.hypergradient(problem, x, y, fewer, throw=False).gradient
    assert np.linalg.norm(cut - expected) > 1e-2 * np.linalg.norm(expected)
    assert "<- the plan" in str(found) and chosen.code in found.reason
    with pytest.raises(ValueError, match="in 1 bytes"):
        blx.reports.plan(problem, x, y, error=0.9, memory=1)


@pytest.mark.slow
def test_the_diagonal_is_found():
    """With curvatures of very different sizes, and nothing off the diagonal."""
    rng = np.random.default_rng(0)
    d = 10 ** rng.uniform(-4, 0, 400)
    x, target = rng.normal(size=(2, d.size))
    problem = Quadratic(jnp.asarray(d), jnp.asarray(target))
    found = blx.reports.plan(problem, jnp.asarray(x), jnp.asarray(x / d), error=1e-2)
    assert "Diagonal" in found.reason


@pytest.mark.slow
def test_plan_away_from_a_minimum():
    problem, x, _, expected = _problem()
    start = jnp.ones_like(x)
    found = blx.reports.plan(problem, x, start, error=1e-2)
    gradient = blx.hypergradient(problem, x, start, found.response).gradient
    error = np.linalg.norm(as_numpy(gradient) - expected) / np.linalg.norm(expected)
    assert error <= 1e-2
    assert "not an inner minimum" in found.reason


def test_refusals():
    problem, x, minimum, _ = _problem()
    y = jnp.asarray(minimum)
    with pytest.raises(ValueError, match=r"`plan\(error=...\)` must be greater than"):
        blx.reports.plan(problem, x, y, error=0.0)
    with pytest.raises(ValueError, match=r"`plan\(memory=...\)` must be at least one"):
        blx.reports.plan(problem, x, y, error=0.1, memory=0)
    with pytest.raises(ValueError, match="measures times"):
        jax.jit(lambda x: blx.reports.plan(problem, x, y, error=0.1).response)(x)
    confined = blx.BilevelProblem(problem.outer, problem.inner, project_y=jnp.abs)
    with pytest.raises(ValueError, match="without constraints"):
        blx.reports.plan(confined, x, y, error=0.1)
