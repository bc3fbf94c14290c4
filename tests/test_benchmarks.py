"""What the benchmarks read from the text of a compiled program."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest


PROGRAMS = Path(__file__).parent.parent / "benchmarks" / "_programs.py"


@pytest.fixture(scope="module")
def read_program():
    return runpy.run_path(str(PROGRAMS))["read_program"]


def _text(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


def test_loops(read_program):
    def search(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ x, x)

    def both(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(search(x)), None), x, None, length=7)[0]

    program = read_program(_text(both, jnp.eye(5)))
    whole, scan, loop = program.chain
    assert (whole.length, scan.length, loop.length) == (1, 7, None)
    assert len(program.loops) == len(scan.loops) == 1 and loop.loops == ()
    # The product of matrices, and the condition.
    assert loop.operations >= 2 and scan.operations >= 1
    steps = scan.operations + 3 * loop.operations
    assert program.total(3) == whole.operations + 7 * steps


def test_operations_are_counted(read_program):
    def products(x, length):
        for _ in range(length):
            x = x @ x
        return x

    counts = [
        read_program(_text(lambda x: products(x, length), jnp.eye(40))).operations
        for length in (1, 2, 5)
    ]
    assert counts[1] - counts[0] == 1 and counts[2] - counts[0] == 4


def test_callbacks_branches_and_decompositions(read_program):
    def call(x):
        return jax.pure_callback(lambda x: x, x, x)

    def step(x, _):
        x = jax.lax.cond(x[0, 0] > 0, lambda: call(jnp.sin(x)), lambda: jnp.cos(x))
        return jnp.linalg.eigh(x)[1], None

    def run(x):
        return jnp.linalg.eigh(jax.lax.scan(step, x, None, length=3)[0])[1]

    program = read_program(_text(run, jnp.eye(4)))
    (loop,) = program.loops
    assert (program.decompositions, loop.decompositions) == (1, 1)
    assert program.decompositions_anywhere == 2
    assert (program.callbacks, loop.callbacks) == (0, 1)
    assert (program.branches, loop.branches) == (0, 1)


def test_what_is_no_program(read_program):
    with pytest.raises(ValueError, match="not the text"):
        read_program("HloModule nothing\n")
