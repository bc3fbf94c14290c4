"""Nothing grows with the number of calls: neither memory nor what is compiled."""

import gc
import os

import jax
import jax.monitoring
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import LinearBilevel, LinearLeastSquares, make_linear, project

import bilevel_eqx as blx
from bilevel_eqx._solve import segments


_compilations = 0


def _count(event, *_, **__):
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


# There is no public way to take a listener away again. This one costs nothing.
jax.monitoring.register_event_duration_secs_listener(_count)


def _arguments(seed, cls=LinearBilevel):
    """Other data, other variables, and a rate: a Python float, as a user would write."""
    problem, x, y = make_linear(cls, jnp.float64, seed)
    return problem, x, y, 0.1 + 0.01 * seed


def _sgd(rate):
    # An array: optax takes a Python float as part of the program.
    return optax.sgd(jnp.asarray(rate))


responses = {
    "neumann": lambda rate: blx.Implicit(blx.Projection(), blx.Neumann(5, rate)),
    "identity": lambda rate: blx.Implicit(None, blx.IdentityInverse(rate)),
    "descent": lambda rate: blx.Implicit(
        blx.GradientDescent(rate, 5), blx.Pseudoinverse(), tolerance=None
    ),
    "proximal": lambda rate: blx.Proximal(rate, blx.Projection(), lx.Cholesky()),
    "unrolled": lambda rate: blx.Unrolled(_sgd(rate), 3),
    "aggregated": lambda rate: blx.Aggregated(3, rate, rate, rate),
}


def _hypergradient(seed, name):
    problem, x, y, rate = _arguments(seed)
    return blx.hypergradient(problem, x, y, responses[name](rate)).gradient


def _best_response(seed, name):
    problem, x, y, rate = _arguments(seed)
    return blx.best_response(problem, x, y, responses[name](rate))


def _check_hypergradient(seed, _):
    problem, x, y, rate = _arguments(seed)
    candidates = [responses["neumann"](rate), responses["proximal"](rate)]
    blx.check_hypergradient(problem, x, y, candidates, key=jr.key(seed))
    return x


def _diagnose(seed, _):
    problem, x, y, _ = _arguments(seed)
    # At a minimum, as it asks to be.
    y = jnp.asarray(project(problem.features, x, y))
    return blx.diagnose(problem, x, y, key=jr.key(seed)).null_share


equilibria = {
    "warm": lambda rate: blx.WarmStart(),
    "partial": blx.WarmStart,
    "cold": lambda rate: blx.ColdStart(),
    "optimistic": lambda rate: blx.Optimistic(),
    "pessimistic": blx.Pessimistic,
}


def _certify(seed, name):
    problem, x, y, rate = _arguments(seed)
    return blx.certify(problem, equilibria[name](rate), x, y, y0=y).largest


def _solve(seed, name):
    problem, x, y, rate = _arguments(seed, LinearLeastSquares)
    return blx.solve(
        problem,
        equilibria[name](rate),
        x,
        y,
        pipeline=blx.GradientPipeline(responses["proximal"](rate), _sgd(rate)),
        num_steps=3,
        tolerance=1e-3 * rate,
        key=jr.key(seed),
        throw=False,
    ).value


calls = [
    *((_hypergradient, name) for name in responses),
    *((_best_response, name) for name in ("neumann", "proximal", "unrolled")),
    *((_certify, name) for name in equilibria),
    *((_solve, name) for name in ("warm", "partial", "cold")),
    (_check_hypergradient, "all"),
    (_diagnose, "all"),
]


@pytest.mark.parametrize(
    "call, name", calls, ids=lambda part: getattr(part, "__name__", part).strip("_")
)
def test_compilations(call, name):
    """Data, variables, rates, tolerances and keys are not part of the program."""
    before = _compilations
    first = call(0, name)
    assert _compilations > before
    before = _compilations
    others = [call(seed, name) for seed in (1, 2)]
    assert _compilations == before
    # And they were made use of.
    for other in others:
        assert not np.allclose(first, other, rtol=1e-6)


@pytest.mark.slow
def test_segments_are_one_program(monkeypatch):
    """Neither how a run is cut nor its length is part of the program."""
    problem, x, y, _ = _arguments(0)
    pipeline = blx.GradientPipeline(responses["unrolled"](0.1), optax.sgd(0.1))

    def run(length, num_steps, **options):
        monkeypatch.setattr(
            segments._Pace, "end", lambda self, done, save_every: done + length
        )
        before = segments._segment.plain._cached._cache_size()
        blx.solve(
            problem,
            blx.WarmStart(),
            x,
            y,
            pipeline=pipeline,
            num_steps=num_steps,
            certify=False,
            **options,
        )
        return segments._segment.plain._cached._cache_size() - before

    assert run(2, 9) == 1
    # `state` is of the same types as at the start.
    assert [run(*a) for a in ((1, 9), (100, 9), (3, 12), (100, 16))] == [0] * 4
    assert run(100, 14, save_every=2) == 0


def _resident():
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _live():
    # A collection also stops to track tuples of what is not tracked, one level at a time.
    for _ in range(5):
        gc.collect()
    arrays = jax.live_arrays()
    return len(arrays), sum(array.nbytes for array in arrays), len(gc.get_objects())


@pytest.mark.slow
def test_memory():
    """Hundreds of runs leave nothing behind: no array, no object, no page."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("the memory of a process is read from /proc")
    # The allocator has reached its size, and every cache its entries: also those of the
    # program that looks whether a run has diverged, which few of them need.
    for seed in range(300):
        _solve(seed, "warm")
    live, resident, compilations = _live(), _resident(), _compilations
    num_runs = 400
    for seed in range(num_runs):
        _solve(seed, "warm")
    num_arrays, num_bytes, num_objects = _live()
    assert _compilations == compilations
    assert (num_arrays, num_bytes) == live[:2]
    # One object a call would be ten times as many.
    assert num_objects - live[2] < num_runs / 10
    # A solution alone has some kilobytes; pages come and go in megabytes.
    assert _resident() - resident < num_runs * 8 * 2**10
