"""Certificates on some of the data, and how far they are from those on all of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import bilevel_eqx as blx


NUM, DIM = 2_000, 3


def losses(x, y, batch, key):
    # Of the mean of the targets: everything is known in closed form.
    return 0.5 * jnp.sum((y[None, :] - batch) ** 2, 1)


def make():
    """f = mean |y - t_i|^2 / 2 + exp(x) |y|^2 / 2, so that y = mean t / (1 + exp x)."""

    def sample(seed):
        scatter = 0.2 * jnp.arange(1.0, DIM + 1)[None, :]
        return 2 + scatter * jr.normal(jr.key(seed), (NUM, DIM))

    # Not parallel in the mean: F_y would then be zero at the answer, with all its terms.
    train = sample(0)
    validation = sample(1) + jnp.array([[4.0, -4.0, 0.0]])
    return blx.FiniteSumProblem(
        losses,
        losses,
        0.5 * validation,
        train,
        inner_penalty=lambda x, y: 0.5 * jnp.exp(x) * jnp.sum(y**2),
    )


@eqx.filter_jit
def estimates(problem, x, y, keys, num_samples):
    def one(key):
        found = blx.certify(
            problem, blx.WarmStart(), x, y, num_samples=num_samples, key=key
        )
        return found.residuals, found.standard_errors

    return jax.vmap(one)(keys)


@pytest.mark.slow
@pytest.mark.parametrize("off", (0.0, 0.3))
def test_twice_the_standard_error_covers_the_value_on_all_data(off):
    problem = make()
    train, validation = jnp.mean(problem.inner_data, 0), jnp.mean(problem.outer_data, 0)
    # F is stationary in x where (y - v) is orthogonal to y, with y = t / (1 + exp x).
    shrunk = jnp.vdot(train, validation) / jnp.vdot(train, train)
    x, y = jnp.log(1 / shrunk - 1) + off, shrunk * train * (1 + off)
    whole = blx.certify(problem, blx.WarmStart(), x, y)
    assert (whole.residuals["outer"] < 1e-10) == (off == 0)
    assert whole.standard_errors is None
    found, errors = estimates(problem, x, y, jr.split(jr.key(2), 200), 300)
    for name, value in whole.residuals.items():
        covered = np.abs(found[name] - value) <= 2 * errors[name] + 1e-12
        # With a probability of .95 at least 180 of 200 are covered, but for one in 500.
        assert np.mean(covered) >= 0.9, name
        # And no more is said than can be: the error is of the size of the scatter.
        scatter = np.std(np.asarray(found[name]))
        assert np.mean(errors[name]) <= 4 * scatter + 1e-12, name


def test_all_samples_are_all_data():
    problem, x, y = make(), jnp.array(0.3), jnp.ones(DIM)
    whole = blx.certify(problem, blx.WarmStart(), x, y)
    found = blx.certify(problem, blx.WarmStart(), x, y, num_samples=NUM, key=jr.key(0))
    assert found.standard_errors is not None
    for name, value in whole.residuals.items():
        assert np.isclose(found.residuals[name], value, rtol=1e-10)
        assert found.standard_errors[name] == 0
    assert "±" in str(found) and "±" not in str(whole)


def test_what_is_missing_is_named():
    problem, x, y = make(), jnp.array(0.3), jnp.ones(DIM)
    with pytest.raises(ValueError, match="the key is missing"):
        blx.certify(problem, blx.WarmStart(), x, y, num_samples=10)
    plain = blx.BilevelProblem(problem.outer, problem.inner)
    with pytest.raises(ValueError, match="a `BilevelProblem`, and the key is there"):
        blx.certify(plain, blx.WarmStart(), x, y, num_samples=10, key=jr.key(0))


@pytest.mark.parametrize("num_samples", (1, 3, 19))
def test_too_few_samples_for_an_error_are_refused(num_samples):
    x, y = jnp.array(0.3), jnp.ones(DIM)
    sentence = rf"num_samples={num_samples}\)`: .* of `problem.outer_data` .* least 20"

    def certified(num_inner, num_outer):
        problem = blx.FiniteSumProblem(
            losses, losses, jnp.ones((num_outer, DIM)), 2 * jnp.ones((num_inner, DIM))
        )
        concept, key = blx.WarmStart(), jr.key(0)
        return blx.certify(problem, concept, x, y, num_samples=num_samples, key=key)

    with pytest.raises(ValueError, match=sentence):
        certified(num_samples, 20)
    if num_samples == 3:
        # All of both levels: nothing is drawn, and the errors are zero.
        errors = certified(3, 2).standard_errors
        assert errors is not None and all(error == 0 for error in errors.values())


@pytest.mark.slow
def test_the_fewest_samples_cover():
    problem, x, y = make(), jnp.array(0.3), 0.8 * jnp.ones(DIM)
    whole = blx.certify(problem, blx.WarmStart(), x, y)
    found, errors = estimates(problem, x, y, jr.split(jr.key(3), 200), 20)
    for name, value in whole.residuals.items():
        covered = np.abs(found[name] - value) <= 2 * errors[name] + 1e-12
        assert np.mean(covered) >= 0.9, name
