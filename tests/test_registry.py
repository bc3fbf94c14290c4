"""The registry: ours, and a user's own concept and algorithm in it."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from helpers import toy_a, tree_allclose
from jaxtyping import Array, PRNGKeyArray

import bilevel_eqx as blx
from bilevel_eqx._pipeline import registry as _registry


toy = toy_a()


@pytest.fixture(autouse=True)
def restored_registry():
    """What a test registers is gone after it."""
    before = {kind: dict(entries) for kind, entries in _registry._registry.items()}
    yield
    _registry._registry.clear()
    _registry._registry.update(before)


#
# A concept and an algorithm such as a user would write: simultaneous play.
#


class Simultaneous(blx.AbstractEquilibrium):
    """Each player is at rest, given the other."""

    warm: ClassVar[bool] = True

    def certify(self, problem, x, y, y0):
        outer_x = jax.grad(problem.outer)(x, y)
        inner_y = jax.grad(problem.inner, argnums=1)(x, y)
        return blx.Certificate(
            "simultaneous play",
            {
                "leader": (jnp.abs(outer_x), "F_x = 0"),
                "follower": (jnp.linalg.norm(inner_y), "f_y = 0"),
            },
        )


class State(eqx.Module):
    x: Array
    y: Array
    key: PRNGKeyArray


class Descent(blx.AbstractPipeline):
    """Both players descend at once, with noise if it is asked for."""

    rate: float
    noise: float = 0.0

    def init(self, problem, equilibrium, x, y, key):
        return State(x, y, key)

    def step(self, problem, equilibrium, state):
        key, subkey = jr.split(state.key)
        outer_x = jax.grad(problem.outer)(state.x, state.y)
        inner_y = jax.grad(problem.inner, argnums=1)(state.x, state.y)
        x = state.x - self.rate * outer_x + self.noise * jr.normal(subkey)
        y = state.y - self.rate * inner_y
        metrics = {
            "outer_residual": jnp.abs(outer_x),
            "inner_residual": jnp.linalg.norm(inner_y),
        }
        return State(x, y, key), metrics


def _descent(equilibrium, problem):
    return Descent(0.5)


START = jnp.array(0.0), jnp.array([0.7, 0.4])


def _solve(num_steps=60, **kwargs):
    return blx.solve(toy, Simultaneous(), *START, num_steps=num_steps, **kwargs)


@pytest.mark.slow
def test_a_concept_of_ones_own():
    with pytest.raises(ValueError, match="No pipeline is registered for `Simultaneous`"):
        _solve()
    blx.register(Simultaneous, "descent", _descent)
    # Nash: the line w = x0 = x1, and x1 never moves.
    for kwargs in ({}, {"pipeline": "descent"}, {"pipeline": Descent(0.5)}):
        solution = _solve(**kwargs)
        assert tree_allclose(solution.x, 0.4, rtol=1e-10)
        assert tree_allclose(solution.y, jnp.array([0.4, 0.4]), rtol=1e-10)
        assert solution.certificate.largest < 1e-8
        assert set(solution.certificate.residuals) == {"leader", "follower"}
        assert set(solution.history) == {"outer_residual", "inner_residual"}
    solution = _solve(tolerance=1e-6)
    assert solution.stats["num_steps"] < 60
    # Which is no equilibrium of ours.
    assert blx.certify(toy, blx.WarmStart(), solution.x, solution.y).largest > 0.1


@pytest.mark.slow
def test_key():
    def run(**kwargs):
        pipeline = Descent(0.5, noise=0.1)
        return _solve(num_steps=3, pipeline=pipeline, **kwargs).x

    assert run(key=jr.key(1)) == run(key=jr.key(1))
    assert run(key=jr.key(1)) != run(key=jr.key(2))
    # There is a key without asking, and it is always the same one.
    assert run() == run() != run(key=jr.key(1))
    keys = jr.split(jr.key(3), 2)
    batch = jax.vmap(lambda key: run(key=key))(keys)
    assert tree_allclose(batch, jnp.stack([run(key=key) for key in keys]), rtol=1e-12)


def test_factory_is_given_the_equilibrium_and_the_problem():
    given = []

    def factory(equilibrium, problem):
        given.append((equilibrium, problem))
        return Descent(0.25)

    blx.register(Simultaneous, "descent", factory)
    equilibrium = Simultaneous()
    pipeline = blx.default_pipeline(equilibrium, toy)
    assert isinstance(pipeline, Descent) and pipeline.rate == 0.25
    assert given == [(equilibrium, toy)]


def test_factory_may_refuse():
    def factory(equilibrium, problem):
        raise ValueError("It serves only problems with a green light.")

    blx.register(Simultaneous, "fussy", factory)
    with pytest.raises(ValueError, match="green light"):
        _solve()


def test_defaults():
    def names(default):
        entries = blx.registered(Simultaneous)
        return [entry.name for entry in entries if entry.default == default]

    def rate():
        return blx.default_pipeline(Simultaneous(), toy).rate

    # The first is the default, until another one claims it.
    blx.register(Simultaneous, "a", lambda e, p: Descent(1.0))
    blx.register(Simultaneous, "b", lambda e, p: Descent(2.0))
    assert names(True) == ["a"] and names(False) == ["b"] and rate() == 1.0
    blx.register(Simultaneous, "c", lambda e, p: Descent(3.0), default=True)
    assert names(True) == ["c"] and names(False) == ["a", "b"] and rate() == 3.0
    # A name that is taken is replaced; the default stays the default.
    blx.register(Simultaneous, "c", lambda e, p: Descent(4.0))
    blx.register(Simultaneous, "b", lambda e, p: Descent(5.0))
    assert names(True) == ["c"] and rate() == 4.0
    assert len(blx.registered(Simultaneous)) == 3


def test_default_of_ours_can_be_replaced():
    march = blx.GradientPipeline(blx.Unrolled(optax.sgd(0.3), 2), optax.sgd(0.5))
    blx.register(blx.WarmStart, "march", lambda e, p: march, default=True)
    assert blx.default_pipeline(blx.WarmStart(), toy) is march
    # It is the type that is registered: every epsilon is served, and no other concept.
    assert blx.default_pipeline(blx.WarmStart(0.5), toy) is march
    assert blx.default_pipeline(blx.ColdStart(), toy) is not march
    entries = {entry.name: entry for entry in blx.registered(blx.WarmStart)}
    assert entries["march"].default and not entries["implicit"].default


def test_registered_prints():
    everything = blx.registered()
    assert {entry.equilibrium for entry in everything} >= {blx.ColdStart, blx.WarmStart}
    for kind in (blx.ColdStart, blx.WarmStart):
        entries = blx.registered(kind)
        assert [entry.equilibrium for entry in entries] == [kind] * len(entries)
        assert sum(entry.default for entry in entries) == 1
        for entry in entries:
            # Ours say where they are from and what they cost.
            assert entry.reference and entry.cost and entry.demands
    header, rule, *lines = str(everything).splitlines()
    for column in ("equilibrium", "pipeline", "cost", "demands", "from"):
        assert column in header
    assert set(rule) == {"-", " "} and len(lines) == len(everything)
    for line, entry in zip(lines, everything):
        cells = entry.equilibrium.__name__, entry.name, entry.cost, entry.reference
        assert all(cell in line for cell in cells)
        assert ("(default)" in line) == entry.default


def test_registered_prints_what_a_user_says():
    assert str(blx.registered(Simultaneous)) == "No pipelines are registered."
    blx.register(
        Simultaneous,
        "descent",
        _descent,
        reference="A paper, 2021",
        cost="two gradients",
        demands="patience",
    )
    (entry,) = blx.registered(Simultaneous)
    assert entry.factory is _descent and entry.default
    line = str(blx.registered(Simultaneous)).splitlines()[-1]
    assert line.split("  ")[:1] == ["Simultaneous"]
    for cell in ("descent (default)", "two gradients", "patience", "A paper, 2021"):
        assert cell in line
    assert "Simultaneous" in str(blx.registered())


def test_refusals_list_what_is_registered():
    blx.register(Simultaneous, "descent", _descent, cost="two gradients")
    with pytest.raises(ValueError) as info:
        _solve(pipeline="ascent")
    message = str(info.value)
    assert "No pipeline `ascent` is registered for `Simultaneous`" in message
    assert "solve(..., pipeline=...)" in message and "`register`" in message
    assert str(blx.registered()) in message
    # A name is looked up for the concept at hand.
    with pytest.raises(ValueError, match="No pipeline `descent` .* for `WarmStart`"):
        blx.solve(toy, blx.WarmStart(), *START, num_steps=1, pipeline="descent")


@pytest.mark.parametrize("kind", (blx.WarmStart(), blx.GradientPipeline, "WarmStart"))
def test_only_equilibria_can_be_registered_for(kind):
    # Other tests may have registered what they like: the page on extending does.
    before = [(entry.equilibrium, entry.name) for entry in blx.registered()]
    with pytest.raises(ValueError, match="takes the type of an equilibrium"):
        blx.register(kind, "descent", _descent)
    after = [(entry.equilibrium, entry.name) for entry in blx.registered()]
    assert after == before


def test_a_subclass_of_a_concept_is_served():
    class Warmer(blx.WarmStart):
        pass

    names = [entry.name for entry in blx.registered(Warmer)]
    assert names == [entry.name for entry in blx.registered(blx.WarmStart)]
    pipeline = blx.default_pipeline(Warmer(), toy)
    assert isinstance(pipeline, blx.GradientPipeline)
    # Its own entries come first, and replace those of the same name.
    blx.register(Warmer, names[0], lambda equilibrium, problem: Descent(0.1))
    assert isinstance(blx.default_pipeline(Warmer(), toy), Descent)
    assert isinstance(blx.default_pipeline(blx.WarmStart(), toy), blx.GradientPipeline)
