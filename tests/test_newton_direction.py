"""The direction of a truncated Newton step, against its closed forms."""

import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from bilevel_eqx._linalg.newton_direction import newton_direction


def direction(curvatures, downhill, radius=None):
    H = lx.DiagonalLinearOperator(jnp.asarray(curvatures))
    downhill = jnp.asarray(downhill)
    size = jnp.linalg.norm(downhill)
    radius = None if radius is None else jnp.asarray(radius)
    return np.asarray(newton_direction(H, downhill, size=size, radius=radius))


@pytest.mark.parametrize("radius", [None, jnp.inf, 100.0])
def test_newton_step(radius):
    step = direction([1.0, 4.0, 0.5], [1.0, -2.0, 3.0], radius)
    np.testing.assert_allclose(step, [1.0, -0.5, 6.0], rtol=1e-13)


@pytest.mark.parametrize("radius", [1e-6, 0.3, 2.0, 5.9])
def test_a_radius_ends_it_on_the_sphere(radius):
    curvatures, downhill = np.array([1.0, 4.0, 0.5]), np.array([1.0, -2.0, 3.0])
    step = direction(curvatures, downhill, radius)
    np.testing.assert_allclose(np.linalg.norm(step), radius, rtol=1e-13)

    def model(step):
        return curvatures @ step**2 / 2 - downhill @ step

    # At least as good as steepest descent within the sphere.
    length = downhill @ downhill / (curvatures @ downhill**2)
    length = min(length, radius / np.linalg.norm(downhill))
    assert model(step) <= model(length * downhill) + 1e-13


def test_negative_curvature():
    downhill = np.array([3.0, 4.0])
    # All the way to the sphere.
    np.testing.assert_allclose(direction([-2.0, -2.0], downhill, 10.0), 2 * downhill)
    np.testing.assert_allclose(direction([0.0, 0.0], downhill, 10.0), 2 * downhill)
    # Without one, as far as with a positive curvature of that size.
    for radius in (None, jnp.inf):
        step = direction([-2.0, -2.0], downhill, radius)
        np.testing.assert_allclose(step, downhill / 2)


def test_negative_curvature_after_a_step():
    """The first step sees positive curvature alone, and the second one goes on to the
    sphere, which lowers the model."""
    curvatures, downhill = np.array([3.0, -1.0]), np.array([1.0, 0.5])
    step = direction(curvatures, downhill, 50.0)
    np.testing.assert_allclose(np.linalg.norm(step), 50.0)
    # Along the second direction, of which the curvature is negative.
    first = downhill * (downhill @ downhill) / (curvatures @ downhill**2)
    assert curvatures @ (step - first) ** 2 < 0
    # Without a radius it stays at the first step.
    for radius in (None, jnp.inf):
        np.testing.assert_allclose(direction(curvatures, downhill, radius), first)
