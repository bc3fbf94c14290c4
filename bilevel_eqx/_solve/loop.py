"""The loop of a run: steps in blocks, with an entry of the history after each block."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree, ScalarLike

from .._compat import any_of_batch, traced_once
from .._equilibrium.base import AbstractEquilibrium
from .._failure.results import (
    figures_of,
    first_failure,
    no_figures,
    RESULTS,
    Verdict,
    verdict_where,
)
from .._pipeline.base import AbstractPipeline
from .._problem.base import AbstractBilevelProblem
from .._problem.batches import GivenBatches
from .._problem.finite_sum import AbstractFiniteSumProblem, OnBatches
from .._tree import all_finite, Rest, tree_arrays, tree_joined, tree_rest, where
from .split import Halves, split


# After how many steps, at least, what a failure would go back to is kept.
_ROUND = 64


class Run(eqx.Module):
    """What a run is of. None of it changes while the run goes on."""

    problem: AbstractBilevelProblem
    equilibrium: AbstractEquilibrium
    pipeline: AbstractPipeline
    tolerance: ScalarLike | None
    record: Callable
    # An array, and so no part of the program.
    save_every: Int[Any, ""]


class Start(eqx.Module):
    """Where a run starts: at a `state`, or at the one that the pipeline makes."""

    x: PyTree[Array]
    y: PyTree[Array]
    key: PRNGKeyArray
    state: Any


class Progress(eqx.Module):
    """Where a run is. After a failure, that is the last good step."""

    state: Any
    metrics: dict[str, Array]
    verdict: Verdict
    converged: Bool[Array, ""]
    num_steps: Int[Array, ""]

    @property
    def stopped(self) -> Bool[Array, ""]:
        return self.converged | self.verdict.failed


def begin(
    run: Run, start: Start, batches: GivenBatches | None = None
) -> tuple[Progress, PyTree[Array], Any]:
    """The progress before the first step; an entry of the history, which is blank; and
    the program of a step.
    """
    state = initial_state(run, start, batches)
    halves = _halves(run, state, batches)
    return *_first_progress(run, state, halves), halves.whole


def advance(
    run: Run,
    progress: Progress,
    history: PyTree[Array],
    until: Int[Array, ""],
    *,
    keep_metrics: int | None = None,
    batches: GivenBatches | None = None,
) -> tuple[Progress, PyTree[Array], PyTree[Array]]:
    """Takes steps until there are `until` of them, or the run has converged or failed.

    A run may be cut anywhere: the steps and the entries of the history are the same.

    **Arguments:**

    - `history`: room for an entry for every `save_every` steps of the whole run, those
        before `progress` among them.
    - `keep_metrics`: if given, the metrics at each entry are returned too, with room for
        so many of them.
    - `batches`: if given, those for each of the steps to be taken.

    **Returns:**

    The progress, the history, and the metrics at the entries that were added now.
    """
    halves = _halves(run, progress.state, batches)
    kept = None
    if keep_metrics is not None:
        kept = empty_history(halves.later, keep_metrics)
    return _advance(run, halves, progress, history, kept, until, None, batches)


def run_in_one(
    run: Run,
    start: Start,
    num_steps: int,
    num_entries: int,
    report: Callable[[Array, Array, dict[str, Array]], None] | None,
) -> tuple[Progress, PyTree[Array]]:
    """A whole run as one program, which calls `report` at each entry and at the end with
    whether there was a step since, the number of steps and the metrics.
    """
    state = initial_state(run, start)
    halves = _halves(run, state)
    progress, blank = _first_progress(run, state, halves)
    history = empty_history(blank, num_entries)
    return _advance(run, halves, progress, history, None, num_steps, report)[:2]


def empty_history(entry: PyTree, length: int) -> PyTree[Array]:
    """Room for entries like `entry`, of which only the shapes and types count."""
    return jtu.tree_map(lambda e: jnp.broadcast_to(_blank(e), (length, *e.shape)), entry)


def initial_state(run: Run, start: Start, batches: GivenBatches | None = None) -> Any:
    """The state before the first step."""
    state = start.state
    if state is None:
        problem = _on(run.problem, _pair(batches, jnp.array(0)))
        state = run.pipeline.init(problem, run.equilibrium, start.x, start.y, start.key)
    # The caller's arrays remain the caller's, and no type is weak: a loop's carry may
    # not be, and the program of a segment should be the same for all segments.
    return jtu.tree_map(lambda u: _own(u) if eqx.is_array(u) else u, state)


def _on(problem: AbstractBilevelProblem, pair) -> AbstractBilevelProblem:
    """The problem on the batches of a step, if those are given."""
    if pair is None:
        return problem
    assert isinstance(problem, AbstractFiniteSumProblem)
    return OnBatches(problem, *pair)


def _pair(batches: GivenBatches | None, count):
    return None if batches is None else batches.at(count)


def _first_progress(run: Run, state: Any, halves: Halves):
    progress = Progress(
        state,
        jtu.tree_map(_blank, halves.later),
        Verdict(RESULTS.successful, no_figures(state.x)),
        jnp.array(False),
        jnp.array(0, dtype=int),
    )
    entry = eqx.filter_eval_shape(_entry, run, state, progress.metrics)
    return progress, jtu.tree_map(_blank, entry)


class _Loop(eqx.Module):
    # How many steps have been taken by those elements of a batch that go on: the same
    # number for all of a batch.
    at: Int[Array, ""]
    progress: Progress
    history: PyTree[Array]
    kept: PyTree[Array]


def _advance(
    run, halves: Halves, progress: Progress, history, kept, until, report, batches=None
):
    """Three loops, one in the other.

    - Rounds of about `_ROUND` steps. After a failure the last good state is wanted. To
        keep it at every step would cost a pass over all variables each time. So a round
        that fails is undone, and in the next one as many of its steps as were good are
        taken again.
    - Blocks of `save_every` steps, each with an entry of the history. The counter of
        this loop and its condition are the same for all elements of a batch, so that
        under `vmap` the history is written once a block.
    - Steps. Here `vmap` selects, element by element, between the state before and the
        state after a step.
    """
    dynamic, static = eqx.partition(progress.state, eqx.is_array)
    progress = dataclasses.replace(progress, state=dynamic)
    # `div` and not `//`, which is a dozen operations more for negative numbers.
    blocks_in_round = jnp.maximum(1, _div(_ROUND, run.save_every))

    def run_block(loop: _Loop, limit, end, again) -> _Loop:
        before = loop.progress
        block = _div(loop.at, run.save_every)
        full = (block + 1) * run.save_every
        end = jnp.minimum(end, full)
        limit = jnp.minimum(limit, end)
        after = _take_steps(halves, before, limit, batches)
        some, metrics = after.num_steps > before.num_steps, after.metrics

        # A block that is cut short makes no entry.
        complete = some & (after.num_steps == full)

        def write(room, entry):
            if len(room) == 0:
                return room
            return room.at[block].set(where(complete, entry, room[block]))

        whole = eqx.combine(after.state, static)
        history, kept = loop.history, loop.kept
        history = jtu.tree_map(write, history, _entry(run, whole, metrics))
        if kept is not None:
            kept = jtu.tree_map(write, kept, metrics)
        if report is not None:
            # What is taken again was reported, but for the last step.
            new = ~again | (after.num_steps % run.save_every != 0)
            new = new & some & ~after.verdict.failed
            jax.debug.callback(report, new, after.num_steps, metrics)
        return _Loop(end, after, history, kept)

    def run_round(carry):
        loop, limit, failure = carry
        before = loop.progress
        end = (_div(loop.at, run.save_every) + blocks_in_round) * run.save_every
        end = jnp.minimum(end, until)
        loop = jax.lax.while_loop(
            lambda loop: _unfinished(loop.progress, jnp.minimum(limit, end)),
            lambda loop: run_block(loop, limit, end, failure.failed),
            loop,
        )
        after = loop.progress
        fails = after.verdict.failed
        limit = where(fails, after.num_steps, limit)
        failure = verdict_where(fails, after.verdict, failure)
        # Not `tree_where`, which would be a line of the program for each array.
        last_good = jax.lax.cond(fails, lambda: before, lambda: after)
        return dataclasses.replace(loop, progress=last_good), limit, failure

    until = jnp.asarray(until, progress.num_steps.dtype)
    loop = _Loop(progress.num_steps, progress, history, kept)
    loop, _, failure = jax.lax.while_loop(
        lambda carry: _unfinished(carry[0].progress, carry[1]),
        run_round,
        (loop, until, progress.verdict),
    )
    end = loop.progress
    end = dataclasses.replace(
        end,
        state=eqx.combine(end.state, static),
        verdict=verdict_where(failure.failed, failure, end.verdict),
    )
    return end, loop.history, loop.kept


def _div(count: Any, size: Any) -> Int[Array, ""]:
    """The quotient of two positive integers, rounded down."""
    count, size = jnp.asarray(count, int), jnp.asarray(size, int)
    return jax.lax.div(count, size)


def _unfinished(progress: Progress, end) -> Bool[Array, ""]:
    """Whether any element of a batch has steps to take."""
    return any_of_batch((progress.num_steps < end) & ~progress.stopped)


def _take_steps(
    halves: Halves,
    before: Progress,
    end: Int[Array, ""],
    batches: GivenBatches | None,
) -> Progress:
    """Steps until there are `end`, or the run has stopped, with the metrics of the last
    one that counts."""

    def unfinished(progress):
        return (progress.num_steps < end) & ~progress.stopped

    def take_step(before):
        argument = before.state, _pair(batches, before.num_steps)
        state, (verdict, converged), rest = halves.first(argument)
        good = ~verdict.failed
        # A first step may only evaluate the initial point, and then it does not count.
        counts = good & getattr(before.state, "started", True)
        converged = converged & counts
        num_steps = before.num_steps + counts.astype(before.num_steps.dtype)
        # The metrics of a step that nobody looks at are not computed, and what they are
        # computed from is not stored.
        is_last = counts & ((num_steps == end) | converged)
        metrics = jax.lax.cond(
            any_of_batch(is_last),
            lambda: halves.second(state, rest),
            lambda: before.metrics,
        )
        return Progress(state, metrics, verdict, converged, num_steps)

    return jax.lax.while_loop(unfinished, take_step, before)


def _halves(run: Run, state: Any, batches: GivenBatches | None = None) -> Halves:
    """The program of a step: what the next step needs, and the metrics."""
    dynamic, static = eqx.partition(state, eqx.is_array)
    arrays, rest = tree_arrays((run, static)), tree_rest((run, static))
    pair = jax.eval_shape(lambda: _pair(batches, jnp.array(0)))
    halves = split(*traced_once(_step, rest, arrays, dynamic, pair))
    return halves._replace(first=lambda argument: halves.first((arrays, *argument)))


@ft.partial(jax.jit, static_argnums=0)
def _step(rest: Rest, arrays: list, dynamic: Any, pair: Any):
    run, static = tree_joined(arrays, rest)
    new_state, metrics = run.pipeline.step(
        _on(run.problem, pair), run.equilibrium, eqx.combine(dynamic, static)
    )
    x, y = new_state.x, new_state.y
    verdict = metrics.get("result", RESULTS.successful)
    if not isinstance(verdict, Verdict):
        verdict = Verdict(verdict, figures_of(x, {}))
    finite = {"x": all_finite(x), "y": all_finite(y)}
    is_finite = RESULTS.where(
        finite["x"] & finite["y"], RESULTS.successful, RESULTS.nonfinite_step
    )
    verdict = Verdict(first_failure(verdict.result, is_finite), verdict.figures | finite)
    metrics = {k: jnp.asarray(v) for k, v in metrics.items() if k != "result"}
    converged = jnp.array(False)
    if run.tolerance is not None:
        # Both: when y lags behind, the hypergradient crosses zero in passing.
        outer, inner = metrics["outer_residual"], metrics["inner_residual"]
        converged = (outer <= run.tolerance) & (inner <= run.tolerance)
    return eqx.filter(new_state, eqx.is_array), (verdict, converged), metrics


def _entry(run: Run, state: Any, metrics: dict[str, Array]) -> PyTree[Array]:
    entry = run.record(state.x, state.y, metrics)
    return jtu.tree_map_with_path(_recorded, entry)


def _recorded(path: Any, leaf: Any) -> Array:
    try:
        array = jnp.asarray(leaf)
    except TypeError:
        array = None
    if array is None or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise ValueError(
            "`solve(record=...)` must return a pytree of numeric arrays, but "
            f"`record(x, y, metrics){jtu.keystr(path)}` is {leaf!r}, of type "
            f"`{type(leaf).__name__}`. Leave it out. (Of a random key, record "
            "`jax.random.key_data(key)`.)"
        )
    return array


def _blank(like) -> Array:
    """What stands where nothing was ever written."""
    missing = jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.full(like.shape, missing, like.dtype)


def _own(leaf) -> Array:
    """A copy, which may be donated, of a type that is not weak."""
    return jnp.array(leaf, dtype=leaf.dtype, copy=True)
