"""Runs that survive: what is saved is what was there, and a killed run ends as others."""

import fnmatch
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import make_ridge, tree_identical

import bilevel_eqx as blx
from bilevel_eqx._solve import segments


momentum = optax.sgd(0.05, momentum=0.9)
pipeline = blx.GradientPipeline(
    blx.Unrolled(momentum, 2),
    optax.sgd(0.3, momentum=0.5),
    inner_update=blx.Unrolled(momentum, 1),
)


def _solve(num_steps, **options):
    problem, x0, y0 = make_ridge()
    options = {"pipeline": pipeline, **options}
    return blx.solve(problem, blx.WarmStart(), x0, y0, num_steps=num_steps, **options)


#
# save and load
#


def test_saved_is_loaded(tmp_path):
    state = {
        "x": jnp.arange(3.0),
        "single": jnp.ones((2, 1), jnp.float32),
        "key": jr.key(3),
        "keys": jr.split(jr.key(4, impl="rbg")),
        "old key": jr.PRNGKey(5),
        "count": jnp.array(7),
        "numpy": np.arange(2),
        "result": blx.RESULTS.successful,
        "function": jnp.sin,
        "nothing": None,
        "number": 2.5,
    }
    file = tmp_path / "state.blx"
    blx.save(file, state)
    zeros = {**state, "x": jnp.zeros(3), "key": jr.key(0), "number": 0.0}
    loaded = blx.load(file, zeros)
    assert tree_identical(loaded, state)
    assert loaded["number"] == 2.5
    assert loaded["function"] is jnp.sin
    assert jr.key_impl(loaded["keys"]) == jr.key_impl(state["keys"])
    # No other file is left beside it.
    assert list(tmp_path.iterdir()) == [file]


def test_goes_on_from_a_loaded_state(tmp_path):
    whole, first = _solve(10), _solve(4)
    blx.save(tmp_path / "state", first.state)
    state = blx.load(tmp_path / "state", like=_solve(1).state)
    assert tree_identical(_solve(6, state=state).state, whole.state)


def test_refused(tmp_path):
    file = tmp_path / "state"
    blx.save(file, {"x": jnp.zeros(3), "n": 1})
    with pytest.raises(ValueError, match=r"`\['x'\]: float64\[3\]` where .*float32\[3\]"):
        blx.load(file, {"x": jnp.zeros(3, jnp.float32), "n": 1})
    with pytest.raises(ValueError, match="it has 2 arrays, and 1 were expected"):
        blx.load(file, {"n": 1})
    with pytest.raises(FileNotFoundError):
        blx.load(tmp_path / "other", {"n": 1})
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="damaged: it ends before"):
        blx.load(file, {"x": jnp.zeros(3), "n": 1})
    file.write_bytes(whole[: whole.index(b"leaves")])
    with pytest.raises(ValueError, match="damaged: its header"):
        blx.load(file, {"x": jnp.zeros(3), "n": 1})
    file.write_bytes(whole.replace(b'"format": 1', b'"format": 0'))
    with pytest.raises(ValueError, match="is of format 0, and this version .* format 1"):
        blx.load(file, {"x": jnp.zeros(3), "n": 1})
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="was not written by"):
        blx.load(file, {"x": jnp.zeros(3), "n": 1})
    with pytest.raises(ValueError, match="under `jax.jit`"):
        jax.jit(lambda x: blx.save(file, x))(jnp.zeros(2))


def test_a_failed_save_leaves_the_last_file(tmp_path, monkeypatch):
    file = tmp_path / "state"
    blx.save(file, jnp.array(1.0))

    def interrupted(*args, **kwargs):
        args[0].write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(eqx, "tree_serialise_leaves", interrupted)
    with pytest.raises(KeyboardInterrupt):
        blx.save(file, jnp.array(2.0))
    monkeypatch.undo()
    assert blx.load(file, jnp.array(0.0)) == 1
    assert list(tmp_path.iterdir()) == [file]


#
# solve(checkpoint=...)
#


@pytest.mark.parametrize("save_every, every", ((1, 4), (3, 6), (3, None)))
def test_segments_are_one_run(tmp_path, save_every, every):
    whole = _solve(20, save_every=save_every)
    options = {
        "save_every": save_every,
        "checkpoint": tmp_path / "run",
        "checkpoint_every": every,
    }
    assert tree_identical(_solve(20, **options), whole)
    # The file is of the end: nothing is left to do, and nothing is done.
    assert tree_identical(_solve(20, **options), whole)


def test_resumes_and_goes_further(tmp_path):
    options = {"checkpoint": tmp_path / "run", "checkpoint_every": 4}
    steps = []

    def report(step, total, metrics):
        steps.append((step, total))

    assert tree_identical(_solve(8, **options), _solve(8))
    longer = _solve(20, progress=report, **options)
    jax.effects_barrier()
    assert tree_identical(longer, _solve(20))
    assert steps == [(step, 20) for step in range(9, 21)]


def test_stops_where_it_would(tmp_path):
    """A run that converges, and one that fails, in a segment that is not the first."""
    problem, x0, y0 = make_ridge()
    exact = blx.Implicit(blx.Projection(), blx.Pseudoinverse())

    def run(optimiser, checkpoint):
        return blx.solve(
            problem,
            blx.ColdStart(),
            x0,
            y0,
            pipeline=blx.GradientPipeline(exact, optimiser),
            num_steps=400,
            tolerance=1e-2,
            checkpoint=checkpoint,
            checkpoint_every=None if checkpoint is None else 7,
            throw=False,
        )

    converges = optax.sgd(10.0)
    fails = optax.sgd(lambda count: jnp.where(count < 10, 0.1, 1e8))
    for name, optimiser in (("converges", converges), ("fails", fails)):
        whole = run(optimiser, None)
        assert 7 < whole.stats["num_steps"] < 400
        assert (whole.result == blx.RESULTS.successful) == (name == "converges")
        assert tree_identical(run(optimiser, tmp_path / name), whole)
        assert tree_identical(run(optimiser, tmp_path / name), whole)


def test_refuses_the_checkpoint_of_another_run(tmp_path):
    problem, x0, y0 = make_ridge()
    options = {"num_steps": 2, "checkpoint": tmp_path / "run", "pipeline": pipeline}
    blx.solve(problem, blx.WarmStart(), x0, y0, **options)
    for equilibrium, x in (
        (blx.WarmStart(), x0 + 1),
        (blx.WarmStart(0.1), x0),
        (blx.ColdStart(), x0),
    ):
        with pytest.raises(ValueError, match="is the checkpoint of another run"):
            blx.solve(problem, equilibrium, x, y0, **options)
    with pytest.raises(ValueError, match="cannot do so under `jax.jit`, `jax.vmap`"):
        jax.vmap(lambda x: blx.solve(problem, blx.WarmStart(), x, y0, **options).x)(
            x0[None]
        )
    with pytest.raises(ValueError, match="`checkpoint`, the file to save in, is missing"):
        _solve(2, checkpoint_every=1)
    with pytest.raises(ValueError, match="must be a multiple of the second"):
        _solve(4, save_every=2, checkpoint=tmp_path / "other", checkpoint_every=3)


#
# Killed
#

_SCRIPT = """
import sys, time
import jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {tests!r})
import test_checkpoint as this
import bilevel_eqx as blx

# Each save takes a while, so that some of the kills come in the middle of one.
import bilevel_eqx._solve.checkpoint as checkpoint
flush = checkpoint.os.fsync
checkpoint.os.fsync = lambda f: (flush(f), time.sleep(0.01))
solution = this._solve(200, checkpoint={file!r}, checkpoint_every=1)
blx.save({answer!r}, (solution.x, solution.y, solution.history, solution.state))
"""


def test_killed_at_ten_random_moments(tmp_path):
    file, answer = tmp_path / "run", tmp_path / "answer"
    script = _SCRIPT.format(
        tests=str(pathlib.Path(__file__).parent), file=str(file), answer=str(answer)
    )
    # Without the compiler each time, there are more moments in the loop itself.
    cached = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    cached |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    moments = random.Random(0)

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **cached},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    for _ in range(10):
        process = start()
        seen = file.stat().st_mtime_ns if file.exists() else None
        while process.poll() is None and (
            not file.exists() or file.stat().st_mtime_ns == seen
        ):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    # They have not been at the end before the last of them.
    assert not answer.exists()
    assert start().wait() == 0
    whole = _solve(200)
    expected = whole.x, whole.y, whole.history, whole.state
    assert tree_identical(blx.load(answer, expected), expected)


#
# Segments and Ctrl-C
#


def _cut(monkeypatch, length):
    monkeypatch.setattr(
        segments._Pace, "end", lambda self, done, save_every: done + length
    )


def test_the_file_does_not_depend_on_the_cuts(tmp_path, monkeypatch):
    contents = []
    for length in (1, 3, 100):
        _cut(monkeypatch, length)
        file = tmp_path / str(length)
        whole = _solve(20, save_every=2, checkpoint=file, checkpoint_every=8)
        contents.append(file.read_bytes())
        # And of a run that is resumed.
        longer = _solve(30, save_every=2, checkpoint=file, checkpoint_every=8)
        contents[-1] += file.read_bytes()
        assert whole.history["value"].shape == (10,)
        assert longer.history["value"].shape == (15,)
    assert contents[0] == contents[1] == contents[2]


def test_interrupted_and_resumed(tmp_path, monkeypatch):
    """By Ctrl-C, in the middle of a block, and between two savings."""
    _cut(monkeypatch, 5)
    file = tmp_path / "run"
    options = {"save_every": 3, "checkpoint": file, "checkpoint_every": 15}

    def press(step, num_steps, metrics):
        if step == 9:
            signal.raise_signal(signal.SIGINT)

    match = f"after step 10 of 40. It is saved in `{file}`: the same call resumes it"
    with pytest.raises(KeyboardInterrupt, match=match):
        _solve(40, progress=press, **options)
    steps = []
    solution = _solve(
        40, progress=lambda step, total, metrics: steps.append(step), **options
    )
    assert steps == [*range(12, 40, 3), 40]
    assert tree_identical(solution, _solve(40, save_every=3))
    # With `throw=False`, what there is comes back, and the file is there too.
    file.unlink()
    solution = _solve(40, progress=press, throw=False, **options)
    assert solution.result == blx.RESULTS.interrupted
    assert solution.stats["num_steps"] == 10
    assert solution.history["value"].shape == (3,)
    assert tree_identical(_solve(40, **options), _solve(40, save_every=3))


#
# Where the file is
#


def test_a_missing_folder_is_noticed_first(tmp_path):
    def never(*_):
        raise AssertionError("a step was taken")

    file = tmp_path / "missing" / "run"
    with pytest.raises(FileNotFoundError, match=r"there is no folder `.*missing`"):
        _solve(20, checkpoint=file, progress=never)
    file.parent.mkdir()
    _solve(2, checkpoint=file)


def test_what_a_kill_leaves_is_removed(tmp_path, monkeypatch):
    file = tmp_path / "run[1]"
    left = tmp_path / "run[1].abc.unfinished"
    others = [tmp_path / "run1.abc.unfinished", tmp_path / "run[1].old"]
    for path in (left, *others):
        path.write_bytes(b"half of it")
    # The names are those that are given while writing.
    names = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(str(a)), replace(a, b)))
    _solve(2, checkpoint=file)
    assert sorted(tmp_path.iterdir()) == sorted([file, *others])
    assert all(fnmatch.fnmatch(n, str(tmp_path / "run?1?.*.unfinished")) for n in names)
    assert len(names) > 0


def test_a_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    link.symlink_to(real)
    for num_steps in (4, 8):
        solution = _solve(num_steps, checkpoint=link)
        assert link.is_symlink() and real.is_file() and not real.is_symlink()
        assert list((tmp_path / "elsewhere").iterdir()) == [real]
    assert tree_identical(solution, _solve(8))
