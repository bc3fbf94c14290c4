"""A run from outside of its program: in segments, between which the host has its say."""

import contextlib
import dataclasses
import functools as ft
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._compat import is_traced, looping, of_all_processes
from .._mesh import (
    on_mesh_of,
    placement,
    spans_processes,
    state_placed,
    tree_placed,
)
from .._problem.batches import GivenBatches
from .._tree import tree_arrays, tree_joined, tree_rest, tree_struct
from .checkpoint import Checkpoint
from .identity import identity_of, programs_of
from .interrupt import heed_interruption
from .loop import advance, begin, empty_history, Progress, Run, Start
from .report import AbstractReporter
from .stream import Stream


# How long a segment should take: Ctrl-C and the next line wait for its end.
SECONDS = 1.0


# By how much a segment may be longer than the one before: the first steps of a run can
# be much cheaper than the later ones. Not less, since each segment costs some
# milliseconds (a program allocates its memory anew), and short runs would feel it.
_GROWTH = 100


# A history that is shorter than this has room for a round number of entries, so that
# runs of various lengths are one program.
_ROUNDED_BYTES = 2**20


class End(NamedTuple):
    """Where a run has ended, and the wall-clock time of its compiling and its steps."""

    progress: Progress
    history: PyTree[Array]
    interrupted: bool
    seconds: dict[str, float]


@eqx.filter_jit
def _begin(
    run: Run,
    start: Start,
    identified: bool,
    batches: GivenBatches | None = None,
    variables: dict[str, PyTree] | None = None,
):
    """See `begin`. The digests of the programs are part of what is compiled: it is traced
    once for both. `variables` says how x and y lie on several devices."""
    progress, blank, step = begin(run, start, batches)
    state = state_placed(progress.state, variables)
    progress = dataclasses.replace(progress, state=state)
    return progress, blank, programs_of(run, start, progress, step) if identified else {}


# A segment writes over the progress and the history that it is given. They are the run's
# own: see `begin`.
@ft.partial(looping, donate="all-except-first")
def _segment(given, carry, room: int | None):
    (run_arrays, until, batches), run_rest, progress_rest, place = given
    run = tree_joined(run_arrays, run_rest)
    progress = tree_joined(carry[0], progress_rest)
    progress, history, kept = advance(
        run, progress, carry[1], until, keep_metrics=room, batches=batches
    )
    # Or the next segment would be another program.
    carry = tree_placed((tree_arrays(progress), history), place)
    return carry, kept, progress.stopped, progress.num_steps


def run_in_segments(
    run: Run,
    start: Start,
    num_steps: int,
    *,
    checkpoint: Checkpoint | None,
    reporter: AbstractReporter,
    stream: Stream | None = None,
) -> End | None:
    """The whole run, from its start or from where the checkpoint says.

    Returns `None` if its values are not known now: something that the problem closes
    over is being transformed.
    """
    save_every = int(run.save_every)
    earlier = checkpoint if checkpoint is not None and checkpoint.exists() else None
    # What is resumed lies as what it would begin with does.
    variables = placement({"x": start.x, "y": start.y})
    begins = earlier is None or variables is not None
    starting = _begin if begins else ft.partial(eqx.filter_eval_shape, _begin)
    seconds = {"compile": 0.0, "run": 0.0}
    with reporter.compiling(), _timed(seconds, "compile"):
        first_batches = None if stream is None else stream.example()
        progress, blank, programs = starting(
            run, start, checkpoint is not None, first_batches, variables
        )
    if programs is None or _is_unknown(progress):
        return None
    identity = identity_of(run, start, programs) if checkpoint is not None else {}
    entries = None
    if earlier is not None:
        progress, entries, place = earlier.read(identity, num_steps, progress, blank)
        if stream is not None:
            stream.resume(place, int(progress.num_steps))
    saved = int(progress.num_steps)
    entry = tree_struct(blank)
    room = _room(entry, num_steps // save_every)
    history = _empty_history(entry, room)
    if entries is not None:
        history = jtu.tree_map(lambda h, e: h.at[: len(e)].set(e), history, entries)

    # All processes of a run must end it after the same step.
    together = spans_processes((run, start))

    def asked_to_end() -> bool:
        asked = interruption.requested
        return max(of_all_processes(int(asked))) > 0 if together else asked

    first = done = saved
    reporter.begins(first)
    stopped = bool(progress.stopped)
    run_arrays, run_rest = tree_arrays(run), tree_rest(run)
    arrays, progress_rest = tree_arrays(progress), tree_rest(progress)
    arrays, history = on_mesh_of((run_arrays, arrays), (arrays, history))
    place = placement((arrays, history))
    kept_room = room if reporter.wants_entries else None
    laid_out = placement((run_arrays, arrays)) or tree_struct((run_arrays, arrays))
    program = run_rest, progress_rest, room, kept_room, *jtu.tree_leaves(laid_out)
    pace = _pace_of(program)

    def metrics() -> dict[str, Any]:
        return jax.device_get(tree_joined(arrays, progress_rest).metrics)

    def save(entries: PyTree[Array]) -> None:
        assert checkpoint is not None
        place = None if stream is None else stream.place
        checkpoint.write(identity, tree_joined(arrays, progress_rest), entries, place)

    with heed_interruption() as interruption:
        while done < num_steps and not stopped and not asked_to_end():
            until, batches = pace.end(done, save_every), None
            # What would be left over for a short segment is taken now.
            if num_steps - until < (until - done) // 2:
                until = num_steps
            if stream is not None:
                until, batches = stream.end(done), stream.take(done)
                if batches is None:
                    break
            if checkpoint is not None:
                until = min(until, checkpoint.next(done))
            began = time.perf_counter()
            # A segment without a step is the time that compiling takes.
            compiles = until == done or (stream is not None and done == first)
            compiling = reporter.compiling if compiles else contextlib.nullcontext
            fetching = contextlib.nullcontext()
            if stream is not None:
                fetching = stream.fetching(until)
            spent_on = "compile" if compiles else "run"
            with compiling(), fetching, _timed(seconds, spent_on):
                (arrays, history), kept, stopped, num_steps_now = _segment(
                    (
                        (run_arrays, np.asarray(until), batches),
                        run_rest,
                        progress_rest,
                        place,
                    ),
                    (arrays, history),
                    kept_room,
                )
                if is_traced(stopped):
                    return None
                before, done = done, int(num_steps_now)
            pace.took(until - before, time.perf_counter() - began)
            stopped = bool(stopped)
            reporter.segment(kept, before, done, metrics)
            if checkpoint is not None and checkpoint.next(saved) <= done and not stopped:
                save(_first(history, done // save_every))
                saved = done
        interrupted = asked_to_end()
    progress = tree_joined(arrays, progress_rest)
    reporter.ends(progress, first, done, interrupted)
    history = _first(history, done // save_every)
    if checkpoint is not None and saved < done and not bool(progress.verdict.failed):
        save(history)
    if stream is not None and not (done == num_steps or stopped):
        if not interrupted:
            raise stream.ended(done)
    return End(progress, history, interrupted, seconds)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - began


class _Pace:
    """How many steps of a program take about `SECONDS`."""

    def __init__(self):
        # The first segment has no steps: it is there to be compiled.
        self.length = 0

    def end(self, done: int, save_every: int) -> int:
        """Where a segment ends that starts after `done` steps: where an entry of the
        history does, if there is one within."""
        # All processes of a distributed run must cut it in the same way, and each has a
        # clock of its own.
        if jax.process_count() > 1:
            return sys.maxsize
        end = done + self.length
        aligned = end - end % save_every
        return aligned if aligned > done else end

    def took(self, num_steps: int, seconds: float) -> None:
        if num_steps == 0:
            self.length = 1
            return
        length = num_steps * SECONDS / max(seconds, 1e-9)
        most = max(self.length, _GROWTH * num_steps)
        self.length = max(1, int(min(length, most)))


# The pace of the programs that have run, by all that makes one another program, so that
# the next run of one of them is not cut into short segments first.
@ft.lru_cache(maxsize=128)
def _pace_of(program: tuple) -> _Pace:
    return _Pace()


_empty_history = eqx.filter_jit(empty_history)


def _room(entry: PyTree[jax.ShapeDtypeStruct], num_entries: int) -> int:
    rounded = 2 ** max(4, (num_entries - 1).bit_length())
    size = sum(e.size * e.dtype.itemsize for e in jtu.tree_leaves(entry))
    return rounded if rounded * size <= _ROUNDED_BYTES else num_entries


@eqx.filter_jit
def _first(history: PyTree[Array], length: int) -> PyTree[Array]:
    return jtu.tree_map(lambda h: h[:length], history)


def _is_unknown(tree: PyTree) -> bool:
    return any(is_traced(leaf) for leaf in jtu.tree_leaves(tree))
