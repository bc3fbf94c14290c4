"""Several concepts side by side, and the test for leakage."""

import functools
import re
import signal
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import (
    as_numpy,
    finite_difference_jvp,
    make_moving,
    moving_features,
    toy_a,
    tree_allclose,
    tree_dot,
)
from jaxtyping import Array

import bilevel_eqx as blx
import bilevel_eqx.tasks


toy = toy_a()


def test_compare():
    equilibria = (blx.Optimistic(), blx.WarmStart(1.0), blx.Stackelberg())
    out = blx.compare(toy, jnp.array(0.6), jnp.zeros(2), equilibria, num_steps=30)
    assert out.names == ("Optimistic()", "WarmStart(1)", "Stackelberg()")
    best, partly = out.figures["Optimistic()"], out.figures["WarmStart(1)"]
    expected = {"F": 0, "f": -0.5, "|x|": 1, "|y|": 2**0.5, "|y - y0|": 2**0.5}
    assert tree_allclose(best, expected, rtol=1e-6)
    expected = {"F": 5 / 18, "f": -1 / 18, "|x|": 1 / 3, "|y|": 1 / 3, "|y - y0|": 1 / 3}
    assert tree_allclose(partly, expected, rtol=1e-6)
    # Each is at its own equilibrium; the optimistic point happens to be the other's too.
    certificates = {
        k: {n: c.largest for n, c in r.items()} for k, r in out.certificates.items()
    }
    assert certificates["Optimistic()"]["Optimistic()"] < 1e-6
    assert certificates["WarmStart(1)"]["WarmStart(1)"] < 1e-6
    assert certificates["WarmStart(1)"]["Optimistic()"] > 1e-2
    # What cannot be had is said, and stops nothing.
    assert list(out.refused) == ["Stackelberg()"]
    assert "singular" in out.refused["Stackelberg()"]
    table = str(out)
    for cell in ("Optimistic()", "WarmStart(1)", "|y - y0|", "0.2778", "Stackelberg(): "):
        assert cell in table
    lines = table.splitlines()
    for rows in (lines[:3], lines[5:8]):
        assert len({len(line) for line in rows}) == 1
    assert max(map(len, lines[:8])) <= 88


@pytest.mark.slow
def test_compare_takes_pipelines_by_name():
    with pytest.raises(ValueError, match="Nonsense"):
        blx.compare(
            toy, jnp.array(0.6), jnp.zeros(2), pipelines={"Nonsense()": "implicit"}
        )
    sluggish = blx.GradientPipeline(
        blx.Implicit(blx.Projection(), blx.Pseudoinverse()), optax.sgd(1e-3)
    )
    out = blx.compare(
        toy,
        jnp.array(0.6),
        jnp.zeros(2),
        (blx.WarmStart(),),
        num_steps=2,
        pipelines={"WarmStart()": sluggish},
        tolerance=1e-6,
    )
    # The run that did not converge is there, and so is the reason.
    assert "WarmStart()" in out.solutions
    assert "stopped after step 2" in out.refused["WarmStart()"]


@pytest.mark.slow
@pytest.mark.parametrize("pressed", (0, 1))
def test_ctrl_c_ends_the_comparison(monkeypatch, pressed):
    """Ctrl-C in the first run, or in the second; none comes after it."""
    module = sys.modules["bilevel_eqx._trust.compare"]
    begun, presses = [], []

    def press(step, num_steps, metrics):
        # Once: to press twice is to insist, and several entries may come together.
        if len(begun) == pressed + 1 and not presses:
            presses.append(step)
            signal.raise_signal(signal.SIGINT)

    def solve(problem, equilibrium, *args, **options):
        begun.append(equilibrium)
        return blx.solve(problem, equilibrium, *args, progress=press, **options)

    monkeypatch.setattr(module, "solve", solve)
    equilibria = blx.WarmStart(), blx.WarmStart(1.0), blx.ColdStart()
    name = ("WarmStart()", "WarmStart(1)")[pressed]
    with pytest.raises(KeyboardInterrupt, match=re.escape(f"interrupted at `{name}`")):
        blx.compare(toy, jnp.array(0.6), jnp.zeros(2), equilibria, num_steps=3)
    assert begun == list(equilibria[: pressed + 1])


#
# Leakage
#


def _warm_solution():
    problem, x, y0 = make_moving()
    pipeline = blx.GradientPipeline(blx.Unrolled(optax.sgd(0.3), 1), optax.sgd(0.3))
    solution = blx.solve(
        problem, blx.WarmStart(), x, y0, pipeline=pipeline, num_steps=200
    )
    return problem, y0, solution


def _retrained(problem, x, y0):
    phi = as_numpy(moving_features(x))
    y0 = as_numpy(y0)
    y = y0 + phi * (float(problem.target) - phi @ y0) / (phi @ phi)
    return 0.5 * np.sum((y - 1) ** 2)


def test_retrain_gap():
    problem, y0, solution = _warm_solution()
    starts = 0.3 * jr.normal(jr.key(1), (4, 3))
    out = blx.retrain_gap(problem, solution, starts)
    expected = np.array([_retrained(problem, solution.x, start) for start in starts])
    assert tree_allclose(out.retrained, expected, rtol=1e-8)
    assert tree_allclose(out.value, problem.outer(solution.x, solution.y), rtol=1e-12)
    assert tree_allclose(out.gap, expected.mean() - float(out.value), rtol=1e-8)
    assert tree_allclose(out.spread, expected.std(), rtol=1e-8)
    assert jnp.max(out.inner_residuals) < 1e-10 and out.y.shape == (4, 3)
    assert "4 initialisations" in str(out)
    assert max(map(len, str(out).splitlines())) <= 88
    # From where the run started, without being told.
    one = blx.retrain_gap(problem, solution)
    assert tree_allclose(one.retrained[0], _retrained(problem, solution.x, y0), rtol=1e-8)
    assert one.spread == 0 and abs(float(one.gap)) > 1e-3
    # A function from keys, and another way of training.
    drawn = blx.retrain_gap(
        problem,
        solution,
        init=lambda key: 0.3 * jr.normal(key, (3,)),
        num_initialisations=3,
        key=jr.key(2),
        response=blx.Unrolled(optax.sgd(0.3), 300),
    )
    starts = jax.vmap(lambda key: 0.3 * jr.normal(key, (3,)))(jr.split(jr.key(2), 3))
    expected = [_retrained(problem, solution.x, start) for start in starts]
    assert tree_allclose(drawn.retrained, np.array(expected), rtol=1e-8)


@pytest.mark.slow
def test_no_gap_after_a_cold_start():
    problem, x, y0 = make_moving()
    solution = blx.solve(problem, blx.ColdStart(), x, y0, num_steps=10)
    assert abs(float(blx.retrain_gap(problem, solution, y0).gap)) < 1e-12


class _Model(blx.AbstractBilevelProblem):
    """The inner variables are a model, which is a pytree that can be called."""

    data: Array

    def outer(self, x, y):
        return jnp.mean((jax.vmap(y)(self.data) - 1) ** 2)

    def inner(self, x, y):
        penalty = jnp.sum(y.weight**2) + jnp.sum(y.bias**2)
        return jnp.mean((jax.vmap(y)(self.data) - x) ** 2) + 0.1 * penalty


@pytest.mark.slow
def test_a_model_is_inner_variables():
    problem = _Model(jr.normal(jr.key(0), (5, 2)))
    x = jnp.array(0.5)
    models = [eqx.nn.Linear(2, 1, key=jr.key(i)) for i in range(3)]
    solution = blx.Solution(x, models[0], *([None] * 5), state=None)
    one = blx.retrain_gap(problem, solution, models[1])
    expected = blx.best_response(
        problem, x, models[1], blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    )
    assert np.isclose(one.retrained[0], problem.outer(x, expected), rtol=1e-10)
    # A stack of models, and a function that makes them.
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    assert blx.retrain_gap(problem, solution, stack).retrained.shape == (3,)
    drawn = blx.retrain_gap(problem, solution, init=lambda k: eqx.nn.Linear(2, 1, key=k))
    assert drawn.retrained.shape == (5,)
    # One of another structure is not called.
    with pytest.raises(ValueError, match="structure of the inner variables"):
        blx.retrain_gap(problem, solution, eqx.nn.Linear(2, 1, False, key=jr.key(0)))


@pytest.mark.slow
def test_what_retrain_gap_cannot_start_from():
    problem, _, solution = _warm_solution()
    with pytest.raises(ValueError, match="shapes of the inner variables"):
        blx.retrain_gap(problem, solution, jnp.zeros(4))
    with pytest.raises(ValueError, match="structure of the inner variables"):
        blx.retrain_gap(problem, solution, (jnp.zeros(3),))
    with pytest.raises(ValueError, match="solution"):
        blx.retrain_gap(problem, solution.x, jnp.zeros(3))
    without = blx.Solution(
        solution.x,
        solution.y,
        *([None] * 5),
        state=None,  # of a pipeline that has none
    )
    with pytest.raises(ValueError, match="the start of its inner variables"):
        blx.retrain_gap(problem, without)


#
# A nonlinear problem whose inner minima form a curved surface
#


@functools.cache
def _rings(num_hidden=1):
    # In one program, which compiles faster than its operations one at a time.
    return eqx.filter_jit(bilevel_eqx.tasks.rings)(
        jr.key(0),
        points_per_class=20,
        width=6,
        num_hidden=num_hidden,
        loss="squared",
        activation=jnp.tanh,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "equilibrium, num_steps",
    (
        (blx.ColdStart(), 40),
        # The points run away to where they have no more effect, and do so slowly.
        (blx.WarmStart(0.1), 60),
        (blx.Optimistic(), 30),
    ),
    ids=lambda part: type(part).__name__,
)
def test_rings(equilibrium, num_steps):
    problem, x0, y0 = _rings()
    # With all arguments that `solve` has: its certificate is then the same program.
    before = blx.certify(problem, equilibrium, x0, y0, y0=y0, x0=x0)
    after = blx.solve(problem, equilibrium, x0, y0, num_steps=num_steps)
    # A share is at most one.
    assert 30 * after.certificate.largest < before.largest
    assert any("local" in note for note in after.certificate.notes)
    if isinstance(equilibrium, blx.Optimistic):
        # Of all the weights that fit the two points, some fit the rings as well.
        assert problem.accuracy(after.y) > 0.95


@pytest.mark.slow
def test_the_worst_weights_for_the_rings():
    # On a curved S(x): the search for the worst point ends at one, to second order.
    problem, x0, y0 = _rings(num_hidden=2)
    pipeline = blx.pipelines.NullSpaceAscent(selection_steps=40)
    equilibrium = blx.Pessimistic(0.5)
    select = eqx.filter_jit(pipeline.select)
    worst = select(problem, equilibrium, x0, y0, y0)
    residuals = blx.certify(problem, equilibrium, x0, worst.y, y0=y0).residuals
    for name in ("inner", "ball", "selection", "curvature"):
        assert residuals[name] < 1e-6
    # And Danskin's gradient is that of its value, the moving center included.
    t_x = {"points": jr.normal(jr.key(1), (2, 2), jnp.float64)}
    slope = finite_difference_jvp(
        lambda x: select(problem, equilibrium, x, worst.y, y0).value, x0, t_x
    )
    assert np.isclose(slope, tree_dot(worst.gradient, t_x), rtol=1e-6)
