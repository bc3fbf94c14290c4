"""Batches from an iterator on the host."""

import itertools
import threading

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import tree_allclose, tree_identical

import bilevel_eqx as blx
from bilevel_eqx._optimiser.lbfgs import LBFGS
from bilevel_eqx._problem.finite_sum import Batch, OnBatches
from bilevel_eqx._solve.stream import Stream


DIM = 3
X0, Y0 = jnp.array([0.1, -0.2, 0.3]), jnp.array([0.5, 0.4, -0.3])
KEY = jr.key(5)


def losses(x, y, batch, key):
    features, targets = batch
    kept = 1.0
    if key is not None:
        kept = jnp.where(jr.bernoulli(key, 0.5, targets.shape), 2.0, 0.0)
    return kept * (features @ y - targets) ** 2


def data(seed, size):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, DIM)), rng.normal(size=size)


problem = blx.FiniteSumProblem(
    losses,
    losses,
    data(0, 10),
    data(1, 10),
    inner_penalty=lambda x, y: jnp.sum(jnp.exp(x) * y**2),
)
pipeline = blx.GradientPipeline(blx.Unrolled(optax.sgd(0.1), 2), optax.sgd(0.1))


def pair(step):
    return data(2 * step, 4), data(2 * step + 1, 3)


def generator(num=1000):
    return (pair(step) for step in range(num))


class Resumable:
    """An iterator with the methods of grain's."""

    def __init__(self, as_bytes=False):
        self.step = 0
        self.as_bytes = as_bytes

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        return pair(self.step - 1)

    def get_state(self):
        return str(self.step).encode() if self.as_bytes else {"step": self.step}

    def set_state(self, state):
        self.step = int(state.decode() if self.as_bytes else state["step"])


def run(batches, num_steps=7, **settings):
    settings = {"pipeline": pipeline, "save_every": 3, "certify": False, **settings}
    return blx.solve(
        problem,
        blx.WarmStart(),
        X0,
        Y0,
        num_steps=num_steps,
        key=KEY,
        batches=batches,
        **settings,
    )


@pytest.mark.slow
def test_each_step_has_its_batches():
    state = pipeline.init(problem, blx.WarmStart(), X0, Y0, KEY)

    @jax.jit
    def stepped(inner, outer, count, state):
        keys = jr.split(jr.fold_in(KEY, count))
        on = OnBatches(
            problem,
            Batch(inner, jnp.full(4, 1 / 4), keys[0]),
            Batch(outer, jnp.full(3, 1 / 3), keys[1]),
        )
        return pipeline.step(on, blx.WarmStart(), state)[0]

    # The answer to x0 is on the batches of the first step.
    for count in (0, *range(7)):
        state = stepped(*pair(count), count, state)
    solution = run(generator())
    assert tree_allclose((solution.x, solution.y), (state.x, state.y), rtol=1e-12)
    # In chunks of other lengths they are the same.
    other = run(generator(), save_every=2)
    assert tree_identical((other.x, other.y), (solution.x, solution.y))
    assert len(other.history["value"]) == 3


def test_the_next_chunk_is_fetched_while_a_segment_runs():
    callers = []

    def observed():
        for step in range(7):
            callers.append(threading.current_thread() is threading.main_thread())
            yield pair(step)

    run(observed())
    # The first chunk has to be waited for.
    assert callers == [True] * 3 + [False] * 4


def test_all_data_of_a_level():
    pairs = ((None, outer) for _, outer in map(pair, itertools.count()))
    falling = blx.GradientPipeline(blx.Unrolled(optax.sgd(0.1), 2), optax.adam(0.1))
    assert np.isfinite(run(pairs, pipeline=falling).value)


@pytest.mark.parametrize("as_bytes", (False, True))
def test_a_run_is_resumed_with_the_next_batches(as_bytes, tmp_path):
    whole = run(Resumable(as_bytes), 8)
    file = tmp_path / "run.blx"
    run(Resumable(as_bytes), 4, checkpoint=file, checkpoint_every=3)
    resumed = run(Resumable(as_bytes), 8, checkpoint=file, checkpoint_every=3)
    assert tree_identical((whole.x, whole.y), (resumed.x, resumed.y))
    assert tree_identical(whole.history, resumed.history)


def test_an_iterator_that_ends_early(tmp_path):
    with pytest.raises(ValueError, match="ended after 5 pairs .* 3 of its 7 steps"):
        run(generator(5))
    with pytest.raises(ValueError, match="ended after 2 pairs"):
        run(generator(2))
    # It need not have more than it is asked for.
    assert run(generator(7)).stats["num_steps"] == 7


class Opaque(Resumable):
    def get_state(self):
        return object()


@pytest.mark.parametrize(
    "batches, settings, sentence",
    (
        (generator, {"checkpoint": "x.blx"}, "get_state"),
        (Opaque, {"checkpoint": "x.blx"}, "written as JSON"),
        (generator, {"pipeline": None}, "mini-batches"),
        (
            generator,
            {"pipeline": blx.GradientPipeline(pipeline.response, LBFGS())},
            "mini-batches",
        ),
        (
            generator,
            {
                "pipeline": blx.GradientPipeline(
                    pipeline.response, optax.sgd(0.1), outer_batch=2
                )
            },
            "would draw others",
        ),
        (
            generator,
            {"pipeline": blx.pipelines.NullSpaceDescent()},
            "aims at|compares steps",
        ),
        (lambda: iter([pair(0)[0]]), {}, "pairs|must be like"),
        (lambda: iter([1.0]), {}, "takes an iterator of pairs"),
        (lambda: iter([pair(0), (data(0, 5), data(1, 3)), pair(2)]), {}, "4 samples"),
        (lambda: iter([(pair(0)[0][0], None)]), {}, "must be like"),
        # A number is no column, though it has as little behind its leading axis.
        (
            lambda: iter([((pair(0)[0][0], np.array(1.0)), pair(0)[1])]),
            {},
            "must be like",
        ),
        (
            lambda: iter([pair(0), (None, pair(1)[1]), pair(2)]),
            {},
            "inner batch number 1 is `None`, but the first one was not",
        ),
        (
            lambda: iter([pair(0), (pair(1)[0], None), pair(2)]),
            {"save_every": 1},
            "outer batch number 1 is `None`, but the first one was not",
        ),
        (
            lambda: iter([(None, pair(0)[1]), pair(1)]),
            {},
            "inner batch number 1 is not `None`, but the first one was",
        ),
        (lambda: iter([(pair(0)[0], data(1, 0))]), {}, "number 0 has no samples"),
        (
            lambda: iter([((pair(0)[0][0] + 1j, pair(0)[0][1]), pair(0)[1])]),
            {},
            r"complex128 at `inner_batch\[0\]`, but `problem.inner_data\[0\]` has "
            "type float64",
        ),
    ),
)
def test_what_cannot_be_given_is_refused(
    batches, settings, sentence, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        run(batches(), **settings)


@pytest.mark.parametrize(
    "given, wanted, is_kept",
    (
        (np.array([0.5, 0.1], np.float32), np.uint8, False),
        (np.array([1.0, 2.0]), np.int32, False),
        (np.array([1, 0]), bool, False),
        (np.array([1j]), jnp.bfloat16, False),
        (np.array(["1.5"]), np.float64, False),
        (np.array([1.5], object), np.float64, False),
        # Of one kind, but these do not fit.
        (np.array([2**32]), np.int32, False),
        (np.array([-1]), np.uint8, False),
        (np.array([9, 0]), np.int32, True),
        (np.array([255]), np.uint8, True),
        (np.array([1.5]), np.float32, True),
        (np.array([1.5]), jnp.bfloat16, True),
        (np.array([1.5], jnp.bfloat16), np.float16, True),
        (np.array([3, 4]), np.float64, True),
        (np.array([True]), np.int32, True),
    ),
)
def test_no_cast_changes_the_values(given, wanted, is_kept):
    def losses(x, y, batch, key):
        return (y - batch.astype(y.dtype)) ** 2

    data = jnp.zeros(3, wanted)
    problem = blx.FiniteSumProblem(losses, losses, data, data)
    stream = Stream([(given, given)], problem, KEY, 1, 1, keeps_place=False)
    if is_kept:
        inner = stream.example().inner
        assert inner is not None and inner.dtype == wanted
        assert np.all(np.asarray(inner[0], given.dtype) == given)
    else:
        with pytest.raises(ValueError, match=f"type {given.dtype} at `inner_batch`"):
            stream.example()


def test_not_under_a_transformation():
    with pytest.raises(ValueError, match="jax.jit"):
        jax.jit(
            lambda x: (
                blx.solve(
                    problem,
                    blx.WarmStart(),
                    x,
                    Y0,
                    pipeline=pipeline,
                    num_steps=2,
                    batches=generator(),
                ).x
            )
        )(X0)


@pytest.mark.slow
def test_a_single_loop_takes_one_batch_a_step():
    def loop(**settings):
        sgd = optax.sgd(0.05)
        return blx.pipelines.SingleLoop(sgd, sgd, sgd, **settings)

    run = dict(num_steps=6, key=KEY, certify=False)
    out = blx.solve(
        problem, blx.WarmStart(), X0, Y0, pipeline=loop(), batches=generator(), **run
    )
    # The same by its formula.
    x, y, v = X0, Y0, jnp.zeros(DIM)
    for step in range(6):
        inner, outer = pair(step)
        keys = jr.split(jr.fold_in(KEY, step))
        drawn = OnBatches(
            problem,
            *(
                Batch(samples, jnp.full(len(samples[1]), 1 / len(samples[1])), key)
                for samples, key in zip((inner, outer), keys)
            ),
        )
        f_x, f_y = jax.grad(drawn.inner, (0, 1))(x, y)
        B_v, H_v = jax.jvp(lambda y: jax.grad(drawn.inner, (0, 1))(x, y), (y,), (v,))[1]
        F_x, F_y = jax.grad(drawn.outer, (0, 1))(x, y)
        x, y, v = x - 0.05 * (F_x + B_v), y - 0.05 * f_y, v - 0.05 * (H_v + F_y)
    assert tree_allclose((out.x, out.y, out.state.v), (x, y, v), rtol=1e-12)

    # What needs a batch again, or several in a step, cannot be given them so.
    for refused in (
        loop(estimator=blx.pipelines.SAGA()),
        loop(estimator=blx.pipelines.SARAH(2)),
        loop(inner_steps=2),
    ):
        with pytest.raises(ValueError, match="compares steps with each other"):
            blx.solve(
                problem,
                blx.WarmStart(),
                X0,
                Y0,
                pipeline=refused,
                batches=generator(),
                **run,
            )
