"""How a failure is raised: on a toy of which all that can fail is known beforehand."""

import os
import re
import subprocess
import sys
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import grid, tree_allclose

import bilevel_eqx as blx
from bilevel_eqx._failure.results import figures_of
from bilevel_eqx._failure.throw import throw_if_failed


def _bent(x):
    """3 x, or a failure that names -x, above one."""
    result = blx.RESULTS.where(
        x > 1, blx.RESULTS.negative_curvature, blx.RESULTS.successful
    )
    figures = jtu.Partial(figures_of, x, {"linear_curvature": -x})
    return throw_if_failed(3 * x, result, figures)


def _rough(x):
    """x, or another failure that names x, above one."""
    result = blx.RESULTS.where(
        x > 1, blx.RESULTS.linear_not_converged, blx.RESULTS.successful
    )
    return throw_if_failed(x, result, jtu.Partial(figures_of, x, {"linear_residual": x}))


def _bent_says(x):
    return f"their first step: .*The curvature is {-x:.3g}. Solve the inner problem"


def _rough_says(x):
    return f"did not converge. The linear solve ended with .* {x:.3g}. Give the linear"


_WAYS = {
    "plain": (lambda fn: fn, eqx.EquinoxRuntimeError),
    "jax.jit": (jax.jit, Exception),
    "filter_jit": (eqx.filter_jit, eqx.EquinoxRuntimeError),
    "jit in jit": (lambda fn: eqx.filter_jit(jax.jit(fn)), eqx.EquinoxRuntimeError),
    "vmap": (
        lambda fn: lambda x: jax.vmap(fn)(x[None])[0],
        eqx.EquinoxRuntimeError,
    ),
    "filter_jit of vmap of vmap": (
        eqx.filter_jit(lambda x: jax.vmap(jax.vmap(_bent))(x[None, None])[0, 0]),
        eqx.EquinoxRuntimeError,
    ),
    "grad": (lambda fn: lambda x: x * jax.grad(fn)(x), eqx.EquinoxRuntimeError),
    "filter_jit of grad": (
        lambda fn: eqx.filter_jit(lambda x: x * jax.grad(fn)(x)),
        eqx.EquinoxRuntimeError,
    ),
    "filter_jit of vmap of grad": (
        lambda fn: eqx.filter_jit(lambda x: x * jax.vmap(jax.grad(fn))(x[None])[0]),
        eqx.EquinoxRuntimeError,
    ),
}


@pytest.mark.parametrize("way", list(_WAYS))
def test_type_and_sentence(way):
    transform, error = _WAYS[way]
    fn = transform(_bent) if way != "filter_jit of vmap of vmap" else transform
    for x in (2.0, 7.0):
        with pytest.raises(error) as info:
            jax.block_until_ready(fn(jnp.array(x)))
        assert re.search(_bent_says(x), str(info.value))
    assert tree_allclose(fn(jnp.array(0.5)), np.array(1.5), rtol=1e-12)


def test_stack_of_the_user():
    def first_caller(x):
        return _bent(x)

    def second_caller(x):
        return _bent(x)

    both = eqx.filter_jit(lambda x, y: first_caller(x) + second_caller(y))
    good, bad = jnp.array(0.0), jnp.array(2.0)
    for x, y, caller, other in (
        (bad, good, "first_caller", "second_caller"),
        (good, bad, "second_caller", "first_caller"),
    ):
        with pytest.raises(eqx.EquinoxRuntimeError) as info:
            both(x, y)
        assert f"in {caller}\n" in str(info.value)
        assert f"in {other}\n" not in str(info.value)
        # Only what is inside of `filter_jit`, and nothing of ours.
        assert "test_stack_of_the_user\n" not in str(info.value)
        assert "throw.py" not in str(info.value)


@pytest.mark.parametrize("way", ("jax.jit", "filter_jit"))
def test_two_failures_in_one_program(way):
    transform, error = _WAYS[way]
    both = transform(lambda x, y: (_bent(x), _rough(y)))

    def said(x, y):
        with pytest.raises(error) as info:
            jax.block_until_ready(both(jnp.array(x), jnp.array(y)))
        text = str(info.value)
        return [
            re.search(says(value), text) is not None
            for says, value in ((_bent_says, x), (_rough_says, y))
        ]

    for i in range(2, 12):
        assert said(float(i), 0.5) == [True, False]
        assert said(0.5, float(i)) == [False, True]
        # One of them, and with its own number.
        assert sum(said(float(i), 2.0 * i)) == 1


@pytest.mark.parametrize("way", ("plain", "jax.jit", "filter_jit"))
def test_threads_keep_their_sentences(way):
    transform, error = _WAYS[way]
    fails = transform(_bent), transform(_rough)
    numbers = np.arange(2.0, 32.0)
    wrong, barrier = [], threading.Barrier(4)

    def run(fn, says, offset):
        barrier.wait()
        for x in numbers + offset:
            try:
                jax.block_until_ready(fn(jnp.asarray(x)))
                wrong.append((x, "no error"))
            except error as e:
                if not re.search(says(x), str(e)):
                    wrong.append((x, str(e)))

    # Two threads run one program, and two another.
    threads = [
        threading.Thread(target=run, args=(fails[i % 2], says, 100 * i))
        for i, says in enumerate((_bent_says, _rough_says) * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


#
# EQX_ON_ERROR, which is read when Equinox is imported
#

_PROGRAM = """
import equinox as eqx, jax, jax.numpy as jnp, lineax as lx, optax
import bilevel_eqx as blx

problem = blx.BilevelProblem(
    lambda x, y: jnp.sum(y), lambda x, y: 0.5 * jnp.sum((y - x) ** 2)
)
# It makes half of the way, so that y is right where it starts at x.
response = blx.Implicit(blx.GradientDescent(0.5, 1), lx.Cholesky())

def hypergradient(anchor):
    return blx.hypergradient(problem, jnp.ones(()), anchor, response).gradient

def step(x):
    return blx.best_response(problem, x, jnp.zeros(()), response)

def run(y):
    pipeline = blx.GradientPipeline(blx.Unrolled(optax.sgd(0.5), 1), optax.sgd(0.1))
    solution = blx.solve(
        problem, blx.WarmStart(), y, y, pipeline=pipeline, num_steps=3, certify=False
    )
    return jnp.isfinite(solution.value)

bad, batch = jnp.zeros(()), jnp.arange(2.0)
calls = {
    "plain": lambda: hypergradient(bad),
    "jax.jit": lambda: jax.jit(hypergradient)(bad),
    "filter_jit": lambda: eqx.filter_jit(hypergradient)(bad),
    "vmap": lambda: eqx.filter_jit(jax.vmap(hypergradient))(batch),
    "grad": lambda: jax.jit(jax.grad(step))(batch[1]),
    "well": lambda: jax.jit(hypergradient)(batch[1]),
    "solve": lambda: run(batch[1]),
}
for name, call in calls.items():
    try:
        print(name, "returned", jax.block_until_ready(call()).tolist(), flush=True)
    except Exception as error:
        said = "The inner gradient has norm 0.5." in str(error)
        print(name, "raised", type(error).__name__, said, flush=True)
"""


def _run(on_error):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM],
        env={**os.environ, "EQX_ON_ERROR": on_error},
        # To the debugger.
        input="c\n" * 20,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


_EXPECTED = {
    "raise": """
        plain raised EquinoxRuntimeError True
        jax.jit raised JaxRuntimeError True
        filter_jit raised EquinoxRuntimeError True
        vmap raised EquinoxRuntimeError True
        grad raised JaxRuntimeError True
        well returned 1.0
        solve returned True
    """,
    # The one of a batch that is well stays so.
    "nan": """
        plain returned nan
        jax.jit returned nan
        filter_jit returned nan
        vmap returned [nan, 1.0]
        grad returned nan
        well returned 1.0
        solve returned True
    """,
    "off": """
        plain returned 1.0
        jax.jit returned 1.0
        filter_jit returned 1.0
        vmap returned [1.0, 1.0]
        grad returned 1.0
        well returned 1.0
        solve returned True
    """,
}


# An interpreter each. What raises is above, in this one.
@pytest.mark.slow
@pytest.mark.parametrize("on_error,", grid(lambda name: name == "nan", _EXPECTED))
def test_on_error(on_error):
    expected = [line.strip() for line in _EXPECTED[on_error].strip().splitlines()]
    assert _run(on_error).splitlines() == expected


@pytest.mark.slow
def test_on_error_breakpoint():
    # What Equinox does: it opens a debugger, and goes on with NaN. Its debugger cannot
    # stand inside of `vmap` or `grad` (JAX's error says so), and so ours cannot.
    runs = re.findall(r"(.*?)(\S+) returned (\S+)\n", _run("breakpoint"), re.DOTALL)
    said = {name: (before, value) for before, name, value in runs}
    for name in ("plain", "jax.jit", "filter_jit"):
        before, value = said[name]
        assert "Opening a breakpoint" in before
        assert "The inner gradient has norm 0.5." in before
        assert value == "nan"
    assert said["well"][1] == "1.0" and said["solve"][1] == "True"


@pytest.mark.slow
def test_adam_that_is_unrolled_where_a_gradient_is_zero():
    # A unit that never fires: the second moment of y[1] is zero, where a square root has
    # no slope.
    def inner(x, y):
        return 0.5 * (y[0] - x) ** 2 + jax.nn.relu(x * y[1] - 1.0)

    problem = blx.BilevelProblem(lambda x, y: jnp.sum(y**2), inner)
    x, y0 = jnp.array(1.0), jnp.zeros(2)

    pipeline = blx.GradientPipeline(blx.Unrolled(optax.adam(0.1), 2), optax.sgd(0.1))
    with pytest.raises(eqx.EquinoxRuntimeError, match="eps_root=1e-8"):
        blx.solve(problem, blx.WarmStart(), x, y0, pipeline=pipeline, num_steps=1)

    # One step of Adam from zero goes by rate m / (sqrt(v + eps_root) + eps), m = -x.
    one = blx.Unrolled(optax.adam(0.1, eps_root=1e-2, eps=0.0), 1)
    found = blx.hypergradient(problem, x, y0, one)

    def value(x):
        return (0.1 * x / jnp.sqrt(x**2 + 1e-2)) ** 2

    assert tree_allclose(found.value, value(x), rtol=1e-9)
    assert tree_allclose(found.gradient, jax.grad(value)(x), rtol=1e-9)
