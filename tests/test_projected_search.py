"""Searches for outer variables in a convex set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_identical
from optax import projections

from bilevel_eqx._optimiser.descent import advance, Point
from bilevel_eqx._optimiser.projected_quasi_newton import _factors, ProjectedQuasiNewton
from bilevel_eqx._optimiser.spectral_projected_gradient import SpectralProjectedGradient


def _bfgs(steps, changes, scale):
    """(6.19) of Nocedal and Wright, pair by pair."""
    B = scale * np.eye(steps.shape[1])
    for s, r in zip(steps, changes):
        if s @ r > 0:
            Bs = B @ s
            B = B - np.outer(Bs, Bs) / (s @ Bs) + np.outer(r, r) / (s @ r)
    return B


def _pairs(num_pairs=3, n=6, seed=0):
    """Changes of x and of the gradient of a quadratic; the first pair is blank."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n))
    steps = rng.normal(size=(num_pairs, n))
    steps[0] = 0
    return steps, steps @ root @ root.T


def test_factors_are_those_of_bfgs():
    steps, changes = _pairs()
    gained, lost = _factors(jnp.asarray(steps), jnp.asarray(changes), jnp.asarray(0.7))
    B = 0.7 * np.eye(6) + gained.T @ gained - lost.T @ lost
    np.testing.assert_allclose(B, _bfgs(steps, changes, 0.7), rtol=0, atol=1e-12)
    np.testing.assert_allclose(B @ steps[-1], changes[-1], rtol=0, atol=1e-11)
    assert np.all(gained[0] == 0) and np.all(lost[0] == 0)


@pytest.mark.parametrize("bound", (0.05, np.inf))
def test_the_direction_minimises_the_model(bound):
    steps, changes = _pairs()
    scale = changes[-1] @ changes[-1] / (steps[-1] @ changes[-1])
    B, g = _bfgs(steps, changes, scale), np.random.default_rng(1).normal(size=6)
    # By many projected gradient steps of a safe length.
    d, length = np.zeros(6), 1 / np.linalg.eigvalsh(B)[-1]
    for _ in range(20_000):
        d = np.clip(d - length * (g + B @ d), -bound, bound)

    def model(d):
        return g @ d + 0.5 * d @ B @ d

    found = ProjectedQuasiNewton()._direction(
        (jnp.asarray(steps), jnp.asarray(changes)),
        jnp.ones(6),
        jnp.asarray(g),
        lambda u: jnp.clip(u, 1 - bound, 1 + bound),
    )
    assert (1 + 1e-9) * model(d) <= model(np.asarray(found)) <= 0.995 * model(d) < 0


_SETS = {
    "box": lambda x: projections.projection_box(x, -0.2, 0.3),
    "ball": lambda x: projections.projection_l2_ball(x, 0.5),
    "simplex": jax.numpy_dtype_promotion("standard")(projections.projection_simplex),
    "half-space": lambda x: projections.projection_halfspace(x, jnp.ones_like(x), 0.1),
}


def _quadratic(seed, n=20, condition=1e2, dtype=float):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    matrix = basis * np.geomspace(1 / condition, 1, n) @ basis.T
    return jnp.asarray(matrix, dtype), jnp.asarray(rng.normal(size=n), dtype)


def _searched(descent, project, quadratic, num_steps):
    """The last point, and how many were evaluated."""
    matrix, center = quadratic

    def evaluate(x):
        difference = x - center
        gradient = matrix @ difference
        value = 0.5 * jnp.vdot(difference, gradient)
        return Point(x, value, gradient, jnp.array(False), jnp.array(0))

    def step(carry, started):
        state, at, count = carry
        state, new = advance(
            descent, state, at, evaluate, project, lambda x: jnp.zeros(()), started
        )
        return (state, new, count + 1), None

    start = evaluate(jnp.zeros_like(center))
    carry = descent.init(start.x), start, jnp.array(0)
    started = jnp.arange(num_steps + 1) > 0
    (_, end, _), _ = jax.lax.scan(step, carry, started)
    return end


def _residual(end, project):
    """How far x is from x = P(x - gradient), which holds at the minimum alone."""
    return float(jnp.max(jnp.abs(end.x - project(end.x - end.gradient))))


@pytest.mark.parametrize("name", _SETS)
@pytest.mark.parametrize("descent", (ProjectedQuasiNewton(), SpectralProjectedGradient()))
def test_minima_in_sets(name, descent):
    project = _SETS[name]
    run = jax.jit(lambda quadratic: _searched(descent, project, quadratic, 60))
    end = run(_quadratic(0))
    assert jnp.max(jnp.abs(end.x - project(end.x))) < 1e-12
    # Only in the half-space are all directions but one free, as badly conditioned as they
    # are. Values know x to the root of their rounding, and which gradient steps come
    # nearer is a matter of the last bits.
    few, free = {
        ProjectedQuasiNewton: (1e-12, 1e-6),
        SpectralProjectedGradient: (1e-7, 1e-2),
    }[type(descent)]
    assert _residual(end, project) < (free if name == "half-space" else few)


def test_single_precision_and_a_batch():
    project = _SETS["box"]
    pairs = [_quadratic(seed, dtype=jnp.float32) for seed in range(3)]
    quadratics = jax.tree.map(lambda *u: jnp.stack(u), *pairs)

    def run(quadratic):
        return _searched(ProjectedQuasiNewton(), project, quadratic, 60)

    ends = jax.jit(jax.vmap(run))(quadratics)
    assert ends.x.dtype == jnp.float32
    for k in range(3):
        assert _residual(jax.tree.map(lambda u: u[k], ends), project) < 1e-5  # noqa: B023


def test_negative_curvature_is_not_learnt():
    model = jnp.zeros((3, 2)), jnp.zeros((3, 2))
    descent = ProjectedQuasiNewton(memory=3)
    step, change = jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0])
    assert tree_identical(descent._learnt(model, step, change), model)
    steps, changes = descent._learnt(model, step, -change)
    assert jnp.all(steps[-1] == step) and jnp.all(changes[-1] == -change)


def test_settings_are_checked():
    for name in "memory", "max_trials":
        with pytest.raises(ValueError, match=f"ProjectedQuasiNewton.*{name}|{name}"):
            ProjectedQuasiNewton(**{name: 0})
