"""Whether one thing depends on another, read from its program."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_eqx._depends_on import depends_on, last_argument_matters
from bilevel_eqx._derivatives.second import hessian_depends_on_y
from bilevel_eqx._problem.base import BilevelProblem


A = np.arange(6.0).reshape(2, 3)


def _stopped(x, y):
    return jnp.sum(x) + jnp.sum(jax.lax.stop_gradient(y) ** 2)


def _cast(x, y):
    return jnp.sum(x) * y.astype(int).astype(float).sum()


def _unused(x, y):
    return {"x": x, "y": jnp.zeros(3)}


def _used(x, y):
    return {"x": x, "y": A @ y}


def _of_zero(x, y):
    # The derivative is zero at y = 0, but not everywhere.
    return jnp.sum(y**2)


def test_both_read_the_same():
    x, y = jnp.ones(2), jnp.zeros(3)
    for fn in (_stopped, _cast, _unused, _used, _of_zero):
        on_y = fn in (_used, _of_zero)
        assert depends_on(lambda y, fn=fn: fn(x, y), y) == on_y
        for _ in range(2):
            assert last_argument_matters(fn, x, y) == on_y
        within = jax.vmap(
            lambda y, fn=fn: float(last_argument_matters(fn, x, y)) + 0 * y[0]
        )
        assert within(y[None])[0] == float(on_y)


def _curved(factor, power):
    def inner(x, y):
        return jnp.sum(factor * (y - x) ** power)

    return BilevelProblem(lambda x, y: jnp.sum(y), inner)


def test_an_answer_is_that_of_its_problem():
    # The inner objectives share their code and their shapes.
    x, y = jnp.ones(()), jnp.ones(3)
    for power in (2, 3, 2):
        assert hessian_depends_on_y(_curved(1.0, power), x, y) == (power == 3)
    # They close over a value of the transformation.
    for power in (2, 3):

        def curvature(factor, power=power):
            for _ in range(2):
                answer = float(hessian_depends_on_y(_curved(factor, power), x, y))
            return factor + answer

        assert jax.vmap(curvature)(jnp.zeros(1))[0] == float(power == 3)
        assert jax.grad(curvature)(2.0) == 1


def test_it_is_traced_once():
    traced = []

    def inner(x, y):
        traced.append(None)
        return jnp.sum((y - x) ** 2)

    problem = BilevelProblem(lambda x, y: jnp.sum(y), inner)
    x, y = jnp.ones(()), jnp.ones(3)
    assert not hessian_depends_on_y(problem, x, y)
    number = len(traced)
    for _ in range(3):
        jax.jit(lambda x: float(hessian_depends_on_y(problem, x, y)) + x)(x)
    assert len(traced) == number
    # Other shapes are asked of anew.
    hessian_depends_on_y(problem, x, jnp.ones(2))
    assert len(traced) > number


class _Switch:
    """Something without a hash, which decides what the objective is."""

    __hash__ = None  # pyright: ignore

    def __init__(self, power):
        self.power = power


def _gradient(switch, y):
    return jax.grad(lambda y: jnp.sum(y**switch.power))(y)


def test_what_has_no_hash():
    switch, y = _Switch(1), jnp.ones(3)
    for power in (1, 2, 1):
        switch.power = power
        assert last_argument_matters(_gradient, switch, y) == (power == 2)
