"""The local picture of an inner problem whose minima are not a plane."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import bilevel_eqx as blx
from bilevel_eqx._solution_set.picture import picture


class _Curved(blx.AbstractBilevelProblem):
    """H depends on y, and B on both; x has several leaves, one of a narrower type."""

    mixing: jax.Array

    def inner(self, x, y):
        pulled = self.mixing @ y["a"] + jnp.sum(y["b"])
        shift, scale = x["shift"].astype(pulled.dtype), jnp.exp(x["scale"])
        return jnp.sum(jnp.cosh(pulled - jnp.sum(shift, axis=1))) * jnp.mean(scale)

    def outer(self, x, y):
        return jnp.sum(y["a"] ** 3) + jnp.sum(y["b"] * jnp.sum(x["shift"]))


def _problem(getkey, width):
    problem = _Curved(jr.normal(getkey(), (3, 4)))
    x = {
        "shift": jr.normal(getkey(), (3, width), jnp.float32) / width,
        "scale": jr.normal(getkey(), (2,)),
    }
    y = {"a": jr.normal(getkey(), (4,)), "b": jr.normal(getkey(), (2,))}
    return problem, x, y


@pytest.mark.parametrize("width", [2, 400])
def test_cross_derivative_by_its_rows(width, getkey):
    """B^T q, where B is a matrix and where x is too large for one."""
    problem, x, y = _problem(getkey, width)
    here, layout = picture(problem, x, y)
    assert (here.cross is None) == (width == 400)
    q = jr.normal(getkey(), (6,))

    def condition(x):
        gradient = jax.grad(problem.inner, argnums=1)(x, y)
        return jnp.vdot(layout.ravel(gradient), q)

    expected, found = jax.grad(condition)(x), here.cross_transposed(q)
    for name, rtol in (("shift", 1e-5), ("scale", 1e-12)):
        assert found[name].dtype == x[name].dtype
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("width", [2, 400])
def test_second_derivatives_along_the_set(width, getkey):
    """The two parts of a push are those of one vector at a time."""
    problem, x, y = _problem(getkey, width)
    here, _ = picture(problem, x, y)
    push = here.curvature_of_set(jr.normal(getkey(), (6,)))
    in_x, in_y = here.parts(push)
    v = jr.normal(getkey(), (6,))
    expected_x, expected_y = push(v)
    np.testing.assert_allclose(in_y.mv(v), expected_y, rtol=1e-12)
    np.testing.assert_allclose(in_x(v)["scale"], expected_x["scale"], rtol=1e-12)
    np.testing.assert_allclose(
        in_x(v)["shift"], expected_x["shift"], rtol=1e-4, atol=1e-6
    )


def test_hypergradient_does_not_depend_on_how_b_is_applied(getkey):
    """An x that is padded until B is no matrix has the same hypergradient."""
    mixing = jr.normal(getkey(), (3, 4))

    def inner(x, y):
        return jnp.sum(jnp.cosh(mixing @ y - x[:3])) + 0.1 * y @ y

    problem = blx.BilevelProblem(lambda x, y: jnp.sum(y**3), inner)
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    x = jr.normal(getkey(), (3,))

    @eqx.filter_jit
    def gradient(x):
        return blx.hypergradient(problem, x, jnp.zeros(4), response).gradient

    expected = gradient(x)
    padded = gradient(jnp.pad(x, (0, 1100)))
    np.testing.assert_allclose(padded[:3], expected, rtol=1e-10)
    np.testing.assert_array_equal(padded[3:], 0)
    t = 1e-5
    values = [
        problem.outer(x, blx.best_response(problem, x + d, jnp.zeros(4), response))
        for d in (t * jnp.eye(3)[0], -t * jnp.eye(3)[0])
    ]
    np.testing.assert_allclose((values[0] - values[1]) / (2 * t), expected[0], rtol=1e-6)
