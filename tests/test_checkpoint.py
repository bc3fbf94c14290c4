"""Runs that survive: what is saved is what was there, and a killed run ends as others."""

import concurrent.futures
import fnmatch
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import signal
import stat
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import optimistix as optx
import pytest
from helpers import make_ridge, tree_allclose, tree_identical

import bilevel_eqx as blx
from bilevel_eqx._solve import segments
from bilevel_eqx._solve.checkpoint import Checkpoint
from bilevel_eqx._solve.identity import changes, identity_of


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
        "scalar": np.float32(1.5),
        "half": jnp.array([1.5, jnp.nan], jnp.bfloat16),
        "complex": jnp.array([1 + 2j]),
        "empty": jnp.zeros((0, 3)),
        "yes": jnp.array([True, False]),
        "result": blx.RESULTS.successful,
        "function": jnp.sin,
        "nothing": None,
        "number": 2.5,
        "whole number": -(2**62) - 1,
        "truth": True,
        "complex number": 1j,
    }
    numbers = ("number", "whole number", "truth", "complex number", "scalar")
    file = tmp_path / "state.blx"
    blx.save(file, state)
    zeros = {**state, "x": jnp.zeros(3), "key": jr.key(0), "half": 0 * state["half"]}
    zeros |= {name: type(state[name])(0) for name in numbers}
    loaded = blx.load(file, zeros)
    assert tree_identical(loaded, state)
    for name in numbers:
        assert loaded[name] == state[name] and type(loaded[name]) is type(state[name])
    assert loaded["function"] is jnp.sin
    assert jr.key_impl(loaded["keys"]) == jr.key_impl(state["keys"])
    # No other file is left beside it.
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_goes_on_from_a_loaded_state(tmp_path):
    def run(num_steps, **options):
        return _solve(num_steps, certify=False, **options).state

    blx.save(tmp_path / "state", run(4))
    state = blx.load(tmp_path / "state", like=run(1))
    assert tree_identical(run(6, state=state), run(10))


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
    with pytest.raises(ValueError, match="damaged: it is cut off"):
        blx.load(file, {"x": jnp.zeros(3), "n": 1})
    file.write_bytes(whole[: whole.index(b"leaves")])
    with pytest.raises(ValueError, match="damaged: its header"):
        blx.load(file, {"x": jnp.zeros(3), "n": 1})
    file.write_bytes(whole.replace(b'"format": 2', b'"format": 1'))
    with pytest.raises(ValueError, match="is of format 1, and this version .* format 2"):
        blx.load(file, {"x": jnp.zeros(3), "n": 1})
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="was not written by"):
        blx.load(file, {"x": jnp.zeros(3), "n": 1})
    with pytest.raises(ValueError, match="under `jax.jit`"):
        jax.jit(lambda x: blx.save(file, x))(jnp.zeros(2))


def test_a_failed_save_leaves_the_last_file(tmp_path, monkeypatch):
    file = tmp_path / "state"
    blx.save(file, jnp.array(1.0))

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
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


@pytest.mark.slow
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
            certify=False,
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
# Which run a checkpoint is of
#


class _Shifted(blx.AbstractPipeline):
    """Starts elsewhere, and then does what the pipeline in it does."""

    pipeline: blx.GradientPipeline
    shift: float

    def init(self, problem, equilibrium, x, y, key):
        return self.pipeline.init(problem, equilibrium, x + self.shift, y, key)

    def step(self, problem, equilibrium, state):
        return self.pipeline.step(problem, equilibrium, state)


class _Fields(blx.AbstractBilevelProblem):
    a: jax.Array
    b: jax.Array
    swapped: bool = eqx.field(default=False, static=True)

    def outer(self, x, y):
        a, b = (self.b, self.a) if self.swapped else (self.a, self.b)
        return jnp.sum(a * (y - b) ** 2)

    def inner(self, x, y):
        return jnp.sum((y - x) ** 2)


def _response(num_steps=2, rate=0.4):
    return blx.Unrolled(optax.sgd(rate), num_steps)


def _implicit(tolerance):
    inner_solver = optx.BFGS(rtol=tolerance, atol=tolerance)
    return blx.Implicit(inner_solver, blx.Pseudoinverse())


def _moves(response=None, optimiser=None):
    optimiser = optax.sgd(0.1) if optimiser is None else optimiser
    return blx.GradientPipeline(_response() if response is None else response, optimiser)


def _outer(target=1.0):
    return lambda x, y: jnp.sum((y - target) ** 2)


def _inner(scale=1.0):
    return lambda x, y: scale * jnp.sum((y - x) ** 2)


def _state(x):
    """Of a run that has taken two steps."""
    return _small(None, num_steps=2, x0=jnp.full(3, x)).state


_ARRAY = np.linspace(0, 1, 3)


def _small(file, *, equilibrium=None, outer=None, inner=None, x0=None, **options):
    """A run of which everything is made anew each time."""
    project_x = options.pop("project_x", None)
    problem = blx.BilevelProblem(
        _outer() if outer is None else outer,
        _inner() if inner is None else inner,
        project_x=project_x,
    )
    problem = options.pop("problem", problem)
    start = jnp.zeros(3) if x0 is None else x0
    options = {"num_steps": 4, "pipeline": _moves(), "certify": False, **options}
    equilibrium = blx.WarmStart() if equilibrium is None else equilibrium
    y0 = options.pop("y0", jnp.zeros(3, start.dtype))
    return blx.solve(problem, equilibrium, start, y0, checkpoint=file, **options)


class _Differences(eqx.Module):
    to: jax.Array

    def __call__(self, x, y, metrics):
        return x - self.to


def _tree(x, y, metrics):
    return {"x": x, "value": metrics["value"]}


_DATA = "the data in the program of the "


# What the one run has and the other has not, and what is said of it. Options are made
# when they are asked for, so that nothing is the same object by accident.
_others = {
    # Data that are closed over, or written in the code.
    "outer target": (
        lambda: {"outer": _outer(1.0)},
        lambda: {"outer": _outer(5.0)},
        _DATA + "outer objective changed",
    ),
    "closed-over JAX array": (
        lambda: {"inner": _inner(jnp.asarray(2.0))},
        lambda: {"inner": _inner(jnp.asarray(3.0))},
        _DATA + "inner objective changed",
    ),
    "closed-over NumPy array, in one bit": (
        lambda: {"outer": _outer(_ARRAY)},
        lambda: {"outer": _outer(np.nextafter(_ARRAY, 1.0))},
        _DATA + "outer objective changed",
    ),
    "data in the set of x": (
        lambda: {"project_x": lambda x: jnp.clip(x, 0.0, 3.0)},
        lambda: {"project_x": lambda x: jnp.clip(x, 0.0, 2.0)},
        "the data in the program of `project_x` changed",
    ),
    "array of record": (
        lambda: {"record": _Differences(jnp.zeros(3))},
        lambda: {"record": _Differences(jnp.ones(3))},
        "the values of `record` changed",
    ),
    "data in record": (
        lambda: {"record": lambda x, y, m: x - _ARRAY},
        lambda: {"record": lambda x, y, m: x - 2 * _ARRAY},
        "the data in the program of `record` changed",
    ),
    # Programs.
    "inner objective": (
        lambda: {"inner": lambda x, y: jnp.sum(jnp.cosh(y - x))},
        lambda: {"inner": lambda x, y: jnp.sum(jnp.cosh(x - y))},
        "the program of the inner objective changed",
    ),
    "branches of where": (
        lambda: {"outer": lambda x, y: jnp.sum(jnp.where(y > 1, y, x))},
        lambda: {"outer": lambda x, y: jnp.sum(jnp.where(y > 1, x, y))},
        "the program of the outer objective changed",
    ),
    "record": (
        lambda: {},
        lambda: {"record": _tree},
        "the program of `record` changed",
    ),
    "a set for x": (
        lambda: {"project_x": lambda x: x},
        lambda: {"project_x": lambda x: jnp.maximum(x, 0)},
        "the program of `project_x` changed",
    ),
    "fields that are swapped": (
        lambda: {"problem": _Fields(jnp.ones(3), jnp.ones(3))},
        lambda: {"problem": _Fields(jnp.ones(3), jnp.ones(3), swapped=True)},
        "the values of `problem.swapped` changed; the program of the outer objective",
    ),
    # Pipelines.
    "optimiser without leaves": (
        lambda: {"pipeline": _moves(None, optax.sgd(0.1))},
        lambda: {"pipeline": _moves(None, optax.sign_sgd(0.1))},
        "`pipeline.optimiser` changed",
    ),
    "rate": (
        lambda: {"pipeline": _moves(None, optax.sgd(0.1))},
        lambda: {"pipeline": _moves(None, optax.sgd(0.2))},
        "the values of `pipeline.optimiser` changed",
    ),
    "schedule of a rate": (
        lambda: {"pipeline": _moves(None, optax.sgd(lambda n: 0.1 / (n + 1)))},
        lambda: {"pipeline": _moves(None, optax.sgd(lambda n: 0.1 / (n + 2)))},
        "`pipeline.optimiser` changed",
    ),
    "optimiser": (
        lambda: {"pipeline": _moves(None, optax.sgd(0.1))},
        lambda: {"pipeline": _moves(None, optax.adam(0.1))},
        "the structure or the type of `pipeline.optimiser` changed",
    ),
    "length of a response": (
        lambda: {"pipeline": _moves(_response(2))},
        lambda: {"pipeline": _moves(_response(3))},
        "the values of `pipeline.response` changed",
    ),
    "tolerance of an inner solver": (
        lambda: {"pipeline": _moves(_implicit(1e-6))},
        lambda: {"pipeline": _moves(_implicit(1e-8))},
        "`pipeline.response` changed",
    ),
    "response": (
        lambda: {"pipeline": _moves(_implicit(1e-6))},
        lambda: {"pipeline": _moves(_response())},
        "`pipeline.response` changed",
    ),
    "class of the pipeline": (
        lambda: {},
        lambda: {"pipeline": _Shifted(_moves(), 0.0)},
        "`pipeline` was `GradientPipeline` and is `_Shifted`",
    ),
    "where it starts": (
        lambda: {"pipeline": _Shifted(_moves(), 0.0)},
        lambda: {"pipeline": _Shifted(_moves(), 1.0)},
        "the values of `pipeline.shift` changed",
    ),
    # Arguments.
    "save_every": (
        lambda: {"save_every": 1},
        lambda: {"save_every": 2},
        "`save_every` was `1` and is `2`",
    ),
    "tolerance": (
        lambda: {"tolerance": None, "throw": False},
        lambda: {"tolerance": 1e-3, "throw": False},
        "`tolerance` was `None` and is `0.001`",
    ),
    "equilibrium": (
        lambda: {"equilibrium": blx.WarmStart()},
        lambda: {"equilibrium": blx.ColdStart()},
        "`equilibrium` was `WarmStart` and is `ColdStart`",
    ),
    "epsilon": (
        lambda: {"equilibrium": blx.WarmStart(0.1)},
        lambda: {"equilibrium": blx.WarmStart(0.2)},
        "the values of `equilibrium.epsilon` changed",
    ),
    "x0": (
        lambda: {"x0": jnp.zeros(3)},
        lambda: {"x0": jnp.ones(3)},
        "the values of `x0` changed",
    ),
    "type": (
        lambda: {"x0": jnp.zeros(3)},
        lambda: {"x0": jnp.zeros(3, jnp.float32)},
        "the structure or the type of `x0` changed; the structure or the type of `y0`",
    ),
    "key": (
        lambda: {"key": jr.key(0)},
        lambda: {"key": jr.key(1)},
        "the values of `key` changed",
    ),
    "state": (
        lambda: {"state": _state(0.0)},
        lambda: {"state": _state(1.0)},
        "the values of `state` changed",
    ),
    "field": (
        lambda: {"problem": _Fields(jnp.ones(3), jnp.ones(3))},
        lambda: {"problem": _Fields(jnp.ones(3), jnp.zeros(3))},
        "the values of `problem.b` changed",
    ),
}


@pytest.fixture
def identity(monkeypatch):
    """The identity of a run of `_small`, without the run."""
    module = sys.modules["bilevel_eqx._solve.solve"]

    class Identified(Exception):
        pass

    def identify(run, start, num_steps, **_):
        *_, programs = eqx.filter_eval_shape(segments._begin, run, start, True)
        # As it is in a file.
        raise Identified(json.loads(json.dumps(identity_of(run, start, programs))))

    def identity(**options):
        with monkeypatch.context() as patch, pytest.raises(Identified) as caught:
            patch.setattr(module, "run_in_segments", identify)
            _small(None, **options)
        return caught.value.args[0]

    return identity


@pytest.mark.parametrize("name", _others)
def test_another_run_is_told(identity, name):
    one, other, said = _others[name]
    one, again, other = identity(**one()), identity(**one()), identity(**other())
    assert changes(one, again) == []
    for found, given in ((one, other), (other, one)):
        told = changes(found, given)
        # What has not changed is not named.
        assert len(told) == 1 + said.count(";")
    assert said in "; ".join(changes(one, other))


@pytest.mark.parametrize(
    "name", ("outer target", "optimiser without leaves", "record", "save_every")
)
def test_another_run_is_refused(tmp_path, name):
    """And the file is left alone, and taken by the same run, made anew."""
    one, other, said = _others[name]
    file = tmp_path / "run"
    solution = _small(file, **one())
    before = file.read_bytes()
    match = "is the checkpoint of another run: " + re.escape(said)
    with pytest.raises(ValueError, match=match):
        _small(file, **other())
    assert file.read_bytes() == before
    assert tree_identical(_small(file, **one()).state, solution.state)


@pytest.mark.slow
def test_another_target(tmp_path):
    """The closed form: x goes to the target by a factor a step."""
    file = tmp_path / "run"
    exact = blx.Implicit(blx.Projection(), blx.Pseudoinverse())

    def run(target):
        problem = blx.BilevelProblem(
            lambda x, y: 0.5 * jnp.sum((y - target) ** 2),
            lambda x, y: 0.5 * jnp.sum((y - x) ** 2),
        )
        moves = blx.GradientPipeline(exact, optax.sgd(0.1034))
        start = jnp.zeros(1)
        return blx.solve(
            problem,
            blx.WarmStart(),
            start,
            start,
            num_steps=20,
            pipeline=moves,
            checkpoint=file,
            certify=False,
        ).x

    assert abs(run(1.0)[0] - 0.887) < 1e-3
    with pytest.raises(ValueError, match="the data in .* outer objective changed"):
        run(5.0)
    file.unlink()
    fresh = run(5.0)
    assert tree_allclose(fresh, jnp.array([5 * (1 - (1 - 0.1034) ** 20)]), rtol=1e-10)
    assert abs(fresh[0] - 4.436) < 1e-3


def test_what_is_no_other_run(tmp_path):
    """How often it saves, what it prints and how long it is."""
    file = tmp_path / "run"
    _small(file, num_steps=3)
    steps = []
    longer = _small(
        file,
        num_steps=8,
        checkpoint_every=2,
        progress=lambda step, *_: steps.append(step),
        throw=False,
    )
    assert steps == [4, 5, 6, 7, 8]
    assert tree_identical(longer, _small(None, num_steps=8))
    for num_steps in (7, 1):
        match = rf"`solve\(num_steps={num_steps}\)`: the run in .*run` has taken 8 steps"
        with pytest.raises(ValueError, match=match):
            _small(file, num_steps=num_steps)


def test_other_versions_are_named(tmp_path):
    """Where they may be the reason, and only there."""
    file = tmp_path / "run"
    _small(file)
    _rewrite(file, lambda header: header["run"]["versions"].update(jax="0.1"))
    _small(file)
    said = "it was written with jax 0.1, and this is [0-9.]+, which may matter"
    with pytest.raises(ValueError, match=f"of the inner objective changed; {said}"):
        _small(file, inner=_inner(2.0))
    with pytest.raises(ValueError, match=r"the values of `x0` changed\. Remove"):
        _small(file, x0=jnp.ones(3))


def _elsewhere(call, **environment):
    """Runs a line in another process, where `this` is this module."""
    script = f"""
import sys
import jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import test_checkpoint as this
{call}
"""
    environment = {**os.environ, **environment}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def _default(file, *, num_steps):
    """A run with the linear solves of lineax in it."""
    problem, x0, y0 = make_ridge()
    options = {"certify": False, "num_steps": num_steps, "checkpoint": file}
    return blx.solve(problem, blx.ColdStart(), x0, y0, **options)


@pytest.mark.slow
def test_resumed_in_another_process(tmp_path):
    runs = {tmp_path / run.__name__: run for run in (_small, _default)}
    lines = (f"this.{r.__name__}({str(f)!r}, num_steps=4)" for f, r in runs.items())
    _elsewhere("\n".join(lines), PYTHONHASHSEED="123")
    for file, run in runs.items():
        assert tree_identical(run(file, num_steps=8), run(None, num_steps=8))


#
# Damage
#


def _tree_of_many_kinds():
    return {
        "x": jnp.linspace(0.0, 1.0, 5),
        "single": jnp.ones((2, 1), jnp.float32),
        "key": jr.key(3),
        "count": jnp.array(7),
        "number": 2.5,
    }


def _damages(whole):
    """2,000 files with one bit flipped, all that are cut off, and longer ones."""
    chance = random.Random(0)
    for place in (chance.randrange(8 * len(whole)) for _ in range(2000)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)
    yield from (whole[:length] for length in range(len(whole)))
    yield from (whole + more for more in (b"\0", b"\n", b"more", whole))
    yield whole[:100] + whole[101:]
    yield whole[:-40] + whole[-40:][::-1]


_SENTENCE = (
    r"`.*state` (was not written by `bilevel_eqx.save`, or its first|is damaged: |"
    r"is of format ).*(remove it|start anew)"
)


def test_damage_is_noticed(tmp_path):
    file = tmp_path / "state"
    blx.save(file, _tree_of_many_kinds())
    whole = file.read_bytes()
    like = jtu.tree_map(lambda u: u, _tree_of_many_kinds())
    num_files = 0
    for damaged in _damages(whole):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=_SENTENCE) as caught:
            blx.load(file, like)
        assert type(caught.value) is ValueError
        num_files += 1
    assert num_files == 2000 + len(whole) + 6
    for other in (b"\x93NUMPY", b"{}", b"\0" * 1000, b"bilevel_eqx checkpoint\n"):
        file.write_bytes(other)
        with pytest.raises(ValueError, match=_SENTENCE):
            blx.load(file, like)
    file.write_bytes(whole)
    assert tree_identical(blx.load(file, like), _tree_of_many_kinds())


def _rewrite(file, change):
    """Changes the header, or the arrays, and makes the checksum right again."""
    first, line, arrays = file.read_bytes()[:-32].split(b"\n", 2)
    header = json.loads(line)
    changed = change(header)
    line = json.dumps(header if changed is None else changed).encode()
    whole = b"\n".join((first, line, arrays))
    file.write_bytes(whole + hashlib.sha256(whole).digest())


_HUGE = 10**12


def _lengthen(header):
    """As if the history had so many entries."""
    leaves = [re.sub(r"^(\.history.*)\[4", rf"\1[{_HUGE}", u) for u in header["leaves"]]
    assert leaves != header["leaves"]
    header |= {"saved": _HUGE, "leaves": leaves}


_malformed = {
    "not a dictionary": lambda header: [header],
    "no format": lambda header: header.pop("format") and None,
    **{
        f"{name} {value!r:.20}": lambda header, name=name, value=value: header.update(
            {name: value}
        )
        for name, values in {
            "format": (None, "2", [2], 3, -1, {}),
            "leaves": (None, 5, {}, [], [5], ["[1]: float64[-1]"], "text"),
            "run": (None, 5, [], {}, {"texts": 5}, {"values": {"`x0`": 5}}, "text"),
            "done": (None, "4", -1, True, 3, 4.0, _HUGE),
            "saved": (None, "4", -4, True, 3, 4.0, _HUGE),
        }.items()
        for value in values
    },
    **{
        f"no {name}": lambda header, name=name: header.pop(name) and None
        for name in ("leaves", "run", "done", "saved")
    },
    **{
        f"{kind} {value!r:.20}": lambda header, kind=kind, value=value: header[
            "run"
        ].update({kind: value})
        for kind in ("texts", "values", "programs", "versions", "parts")
        for value in (None, 5, [])
    },
    **{
        f"{name} {value!r}": lambda header, kind=kind, name=name, value=value: header[
            "run"
        ][kind].update({name: value})
        for kind, name in (
            ("texts", "`save_every`"),
            ("values", "`x0`"),
            ("versions", "jax"),
        )
        for value in (None, 5, [], [1, 2], {})
    },
    "no kind": lambda header: header["run"].pop("programs") and None,
    "no part": lambda header: header["run"]["values"].pop("`x0`") and None,
    "huge": _lengthen,
}


_usual = _moves()


@functools.cache
def _fields():
    return _Fields(jnp.ones(3), jnp.ones(3))


def _same(file):
    """Always the same run, so that it is compiled once."""
    return _small(file, problem=_fields(), pipeline=_usual)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "run"
    _same(file)
    return file.read_bytes()


@pytest.mark.parametrize("name", _malformed)
def test_malformed(tmp_path, whole_file, name):
    """With a right checksum, so that nothing but the check of the field helps."""
    file = tmp_path / "run"
    file.write_bytes(whole_file)
    _rewrite(file, _malformed[name])
    with pytest.raises(ValueError, match=f"run`? .*({_ADVICE})") as caught:
        _same(file)
    assert type(caught.value) is ValueError


_ADVICE = "[Rr]emove it|start anew|another name|another problem"


def test_a_rewritten_file_is_a_file(tmp_path, whole_file):
    """Otherwise the test above would be one of the checksum."""
    file = tmp_path / "run"
    file.write_bytes(whole_file)
    _rewrite(file, lambda header: None)
    assert _same(file).stats["num_steps"] == 4


def test_arrays_of_another_size(tmp_path, whole_file):
    file = tmp_path / "run"
    for arrays in (b"", b"1234567", whole_file):
        first, line, _ = whole_file.split(b"\n", 2)
        whole = b"\n".join((first, line, arrays))
        file.write_bytes(whole + hashlib.sha256(whole).digest())
        with pytest.raises(ValueError, match=rf"damaged: it has {len(arrays)} bytes of"):
            _same(file)


def test_a_state_is_no_checkpoint_and_the_other_way_round(tmp_path, whole_file):
    file = tmp_path / "state"
    solution = _same(None)
    blx.save(file, solution.state)
    with pytest.raises(
        ValueError, match="written by `bilevel_eqx.save`, and is no check"
    ):
        _same(file)
    file.write_bytes(whole_file)
    with pytest.raises(ValueError, match="is of another structure"):
        blx.load(file, solution.state)
    with pytest.raises(ValueError, match="too large"):
        blx.save(file, {"number": 2**70})
    assert file.read_bytes() == whole_file


@pytest.mark.parametrize("exists", (False, True))
def test_data_that_are_traced(tmp_path, whole_file, exists):
    """What the problem closes over is not known, though all arguments are."""
    file = tmp_path / "run"
    if exists:
        file.write_bytes(whole_file)
    for transformation in (jax.jit, jax.grad, lambda fn: lambda t: jax.vmap(fn)(t[None])):

        @transformation
        def run(target):
            return jnp.sum(_small(file, outer=_outer(target)).x)

        with pytest.raises(ValueError, match="cannot do so under `jax.jit`, `jax.vmap`"):
            run(jnp.array(1.0))
    assert list(tmp_path.iterdir()) == [file] * exists


def test_reports_of_a_run_that_fails(tmp_path):
    """Each once, also the last one, and of a resumed run those that it has taken."""
    rates = jnp.array([0.1] * 9 + [jnp.inf])
    reported = []
    options = {
        "outer": lambda x, y: jnp.sum(jnp.sin(y)),
        "pipeline": _moves(None, optax.sgd(lambda count: rates[jnp.minimum(count, 9)])),
        "num_steps": 20,
        "progress": lambda step, num_steps, metrics: reported.append(step),
        "throw": False,
        "checkpoint_every": 4,
    }
    for expected in ([*range(1, 10)], [9]):
        reported.clear()
        failed = _small(tmp_path / "run", **options)
        assert failed.result == blx.RESULTS.nonfinite_step
        assert reported == expected


#
# Killed
#


def _take_80_steps(file, answer):
    # Each save takes a while, so that some of the kills come in the middle of one.
    flush = os.fsync
    os.fsync = lambda descriptor: (flush(descriptor), time.sleep(0.01))
    solution = _solve(80, checkpoint=file, checkpoint_every=1)
    blx.save(answer, (solution.x, solution.y, solution.history, solution.state))
    os._exit(0)


def _run_and_kill(file, answer):
    """Ten processes that are killed, and one that is not."""
    file, answer = pathlib.Path(file), pathlib.Path(answer)
    moments = random.Random(0)

    def start():
        # A copy of this process has imported everything. JAX has not started here: of its
        # threads a copy would have none.
        assert len(os.listdir("/proc/self/task")) == 1
        process = os.fork()
        if process == 0:
            _take_80_steps(file, answer)
        return process

    for _ in range(10):
        process = start()
        seen = file.stat().st_mtime_ns if file.exists() else None
        while not file.exists() or file.stat().st_mtime_ns == seen:
            assert os.waitpid(process, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        # At most five more are saved in that time.
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
    # They have not been at the end before the last of them.
    assert not answer.exists()
    assert os.waitpid(start(), 0)[1] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_killed_at_ten_random_moments(tmp_path):
    file, answer = tmp_path / "run", tmp_path / "answer"
    # Without the compiler each time, there are more moments in the loop itself.
    cached = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    cached |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    _elsewhere(f"this._run_and_kill({str(file)!r}, {str(answer)!r})", **cached)
    whole = _solve(80)
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
    left = tmp_path / "run[1].0123abcd.unfinished"
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


def test_a_folder_that_cannot_be_written_in_is_noticed_first(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(segments, "_begin", never)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="that is a folder. Name a file in it"):
        _solve(20, checkpoint=tmp_path / "folder")
    if sys.platform == "linux":
        # Not even root may write there.
        with pytest.raises(OSError, match="no file can be written in `/proc`"):
            _solve(20, checkpoint="/proc/run")
    with pytest.raises(OSError, match="no file can be written in"):
        _solve(20, checkpoint=tmp_path / ("long" * 60))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        _solve(20, checkpoint=tmp_path / "folder" / "file" / "run")
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_runs_side_by_side(tmp_path):
    """Each clears up what is its own, and nothing that another one writes now."""
    names = "run", "run.blx", "run.2", "run.0123abcd", "run.0123abcd.unfinished", "a.run"
    live = [tmp_path / f"{name}.89abcdef.unfinished" for name in names]
    for i, name in enumerate(names):
        for path in live:
            path.write_bytes(b"half of it")
        Checkpoint(tmp_path / name, 1)
        assert sorted(tmp_path.iterdir()) == sorted(live[:i] + live[i + 1 :])


def test_two_runs_at_once_in_one_folder(tmp_path):
    """They start again and again, each while the other one writes."""
    state = {"x": jnp.arange(1000.0)}
    left = tmp_path / "run", tmp_path / "run.2"

    def write(path):
        for _ in range(100):
            Checkpoint(path, 1)
            blx.save(path, state)
            assert tree_identical(blx.load(path, state), state)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(write, left))
    assert sorted(tmp_path.iterdir()) == sorted(left)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions(tmp_path):
    """Those of a new file, and then what the user has made of them."""
    file, state = tmp_path / "state", jnp.zeros(2)

    def mode():
        return stat.S_IMODE(file.stat().st_mode)

    for mask, expected in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            file.unlink(missing_ok=True)
            blx.save(file, state)
            assert mode() == expected
            for kept in (0o640, 0o600, 0o444):
                file.chmod(kept)
                blx.save(file, state)
                assert mode() == kept
        finally:
            os.umask(before)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    link.symlink_to(real)
    for num_steps in (4, 8):
        solution = _solve(num_steps, checkpoint=link)
        assert link.is_symlink() and real.is_file() and not real.is_symlink()
        assert list((tmp_path / "elsewhere").iterdir()) == [real]
    assert tree_identical(solution, _solve(8))


def test_two_runs_that_write_one_file(tmp_path):
    path = tmp_path / "run.blx"

    def other(step, num_steps, metrics):
        # While this run is running another one of the same kind begins, saves and ends.
        if step == 4:
            _solve(4, checkpoint=path, checkpoint_every=2)
            others.append(path.read_bytes())

    for before in (False, True):
        others = []
        if before:
            # Of the same run, so that both of them begin with it.
            path.unlink()
            _solve(2, checkpoint=path, checkpoint_every=2)
        with pytest.raises(FileExistsError, match="another run has written this file"):
            _solve(6, checkpoint=path, checkpoint_every=6, progress=other)
        # The other one's file is left as it is.
        assert [path.read_bytes()] == others


def test_a_file_that_is_removed_is_written_anew(tmp_path):
    path = tmp_path / "run.blx"

    def remove(step, num_steps, metrics):
        path.unlink(missing_ok=True)

    whole = _solve(6, checkpoint=path, checkpoint_every=2, progress=remove)
    again = _solve(6, checkpoint=path, checkpoint_every=2)
    assert tree_identical(again.x, whole.x)
