"""What an unrolled response keeps of its steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import as_numpy, tree_allclose
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx._response.repeated import _chunks


SIZE, NUM_STEPS, RATE = 2000, 50, 0.1


class Separate(blx.AbstractBilevelProblem):
    """A problem for each entry, with a penalty that is an outer variable."""

    targets: Array
    bend: float = eqx.field(static=True)

    def outer(self, x, y):
        return jnp.sum((y - self.targets) ** 2)

    def inner(self, x, y):
        # The mixed derivative depends on y even without the bend, which makes the
        # curvature depend on it too.
        penalty = 0.5 * jnp.sum(jnp.exp(x) * (y - 1) ** 2)
        return penalty + self.bend * jnp.sum(jnp.cos(y))


def _problem(bend, dtype):
    x = jnp.linspace(-2, 1, SIZE, dtype=dtype)
    return Separate(jnp.linspace(0, 3, SIZE, dtype=dtype), bend), x, jnp.sin(3 * x)


def _by_hand(problem, x, y):
    """The hypergradient through gradient descent, an entry at a time, in float64. It
    carries dy/dx forward."""
    x, y, targets = map(as_numpy, (x, y, problem.targets))
    x, y, targets = (u.astype(np.float64) for u in (x, y, targets))
    slope = np.zeros_like(y)
    for _ in range(NUM_STEPS):
        curvature = np.exp(x) - problem.bend * np.cos(y)
        mixed = np.exp(x) * (y - 1)
        gradient = mixed - problem.bend * np.sin(y)
        y, slope = y - RATE * gradient, slope - RATE * (curvature * slope + mixed)
    return 2 * (y - targets) * slope


def _compiled(response, args):
    def gradient(problem, x, y):
        answer = response(problem, x, y)
        # Not `hypergradient`, whose program is twice as long.
        return answer.pullback(2 * (answer.y - problem.targets)).cotangent

    return jax.jit(gradient).lower(*args).compile()


budgets = {"all": 1.01, "increments": 0.55, "some": 0.49, "least": 0.001}


@pytest.mark.parametrize(
    "dtype, names",
    (
        (jnp.float32, ("increments", "some")),
        pytest.param(jnp.float32, ("all", "least"), marks=pytest.mark.slow),
        pytest.param(jnp.float64, tuple(budgets), marks=pytest.mark.slow),
    ),
)
def test_memory(dtype, names):
    """All steps, rounded increments of all, and some of the steps."""
    args = _problem(0.3, dtype)
    step = SIZE * jnp.dtype(dtype).itemsize + 100
    sgd = optax.sgd(jnp.asarray(RATE, dtype))
    expected = _by_hand(*args)
    eps = float(jnp.finfo(dtype).eps)
    # An increment is a hundredth of y. Rounded to 2^-12 of itself it is still above the
    # rounding of y, and in float64 far above.
    errors = {"all": 1e2 * eps, "increments": 1e-5 if dtype == jnp.float32 else 1e-9}
    # What is kept, in steps, less a few vectors for the step that is taken.
    bounds = {"all": (1.0, 1.3), "increments": (0.5, 0.8), "some": (0.35, 0.7)}
    bounds["least"] = (0.0, 2 * NUM_STEPS**-0.5 + 0.2)
    for name in names:
        memory = int(budgets[name] * NUM_STEPS * step)
        program = _compiled(blx.Unrolled(sgd, NUM_STEPS, memory=memory), args)
        found = program(*args)
        assert found.dtype == dtype
        error = np.linalg.norm(as_numpy(found) - expected) / np.linalg.norm(expected)
        assert error < errors.get(name, errors["all"]), (name, error)
        analysis = program.memory_analysis()
        assert analysis is not None
        kept = analysis.temp_size_in_bytes / (NUM_STEPS * step)
        smallest, largest = bounds[name]
        assert smallest < kept < largest, (name, kept)


@pytest.mark.slow
def test_t1_and_states_of_optimisers():
    """On a quadratic K steps are K Neumann terms, whatever is kept of them; and the trail
    of an optimiser with a state is the trail of that state too."""
    problem, x, y = _problem(0.0, jnp.float32)
    anchor = 0 * y
    end = blx.best_response(problem, x, anchor, blx.Unrolled(optax.sgd(RATE), NUM_STEPS))
    h = np.exp(as_numpy(x).astype(np.float64))
    # The minimum is 1, where the mixed derivative is zero; a step on the way it is -h
    # times what is left.
    left = (1 - RATE * h) ** NUM_STEPS
    assert tree_allclose(as_numpy(end), 1 - left, rtol=1e-5)
    expected = 2 * (1 - left - as_numpy(problem.targets))
    expected *= RATE * h * NUM_STEPS * (1 - RATE * h) ** (NUM_STEPS - 1)
    step = SIZE * 4
    for memory in (2 * step * NUM_STEPS, int(0.6 * step * NUM_STEPS), 1):
        response = blx.Unrolled(optax.sgd(RATE), NUM_STEPS, memory=memory)
        found = blx.hypergradient(problem, x, anchor, response).gradient
        assert tree_allclose(as_numpy(found), expected, rtol=1e-5)
    problem, x, y = _problem(0.3, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        for optimiser in (optax.sgd(RATE, momentum=0.9), optax.adam(RATE)):
            size = sum(u.size for u in jax.tree.leaves(optimiser.init(y))) + SIZE
            gradients = [
                blx.hypergradient(problem, x, y, response).gradient
                for response in (
                    blx.Unrolled(optimiser, NUM_STEPS, "reverse"),
                    blx.Unrolled(
                        optimiser, NUM_STEPS, memory=int(3.5 * size) * NUM_STEPS
                    ),
                )
            ]
            reverse, rounded = map(as_numpy, gradients)
            assert not np.array_equal(reverse, rounded)
            error = np.linalg.norm(reverse - rounded) / np.linalg.norm(reverse)
            assert error < 1e-5


def test_chunks():
    for num_steps in (1, 2, 3, 7, 50, 1000):
        least = 2 * num_steps**0.5 + 3
        for fitting in (0, 1, 10, 40, 70, num_steps, 10 * num_steps):
            num_chunks, size = _chunks(num_steps, fitting)
            rest = num_steps - num_chunks * size
            assert rest >= 0
            kept = num_chunks + (size if num_chunks else 0) + rest
            assert kept <= max(fitting, least)
            # Nor is memory left without use.
            assert kept >= min(fitting, num_steps) - 40
    assert _chunks(100, 100) == (0, 1)


def test_refusals():
    with pytest.raises(
        ValueError, match=r"`Unrolled\(memory=...\)` must be at least one"
    ):
        blx.Unrolled(optax.sgd(RATE), 3, memory=0)
