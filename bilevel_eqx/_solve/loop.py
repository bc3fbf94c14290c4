"""The loop of a run: steps in blocks, with an entry of the history after each block."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, ScalarLike

from .._failure.results import (
    figures_of,
    finite_or_not,
    first_failure,
    RESULTS,
    Verdict,
    verdict_where,
)
from .._tree import all_finite, tree_where


class Progress(eqx.Module):
    """Where a run is."""

    state: Any
    metrics: dict[str, Array]
    verdict: Verdict
    converged: Bool[Array, ""]
    num_steps: Int[Array, ""]

    @property
    def stopped(self) -> Bool[Array, ""]:
        return self.converged | self.verdict.failed


class _Loop(eqx.Module):
    block: Int[Array, ""]
    progress: Progress
    # Of a block that has failed and been undone: why, and how many steps were good.
    failure: Verdict
    num_good: Int[Array, ""]
    history: PyTree[Array]
    num_saved: Int[Array, ""]

    @property
    def retaking(self) -> Bool[Array, ""]:
        return self.failure.failed


def run(
    step: Callable[[Any], tuple[Any, dict[str, Any]]],
    record: Callable[[PyTree, PyTree, dict[str, Array]], PyTree],
    state: Any,
    *,
    num_steps: int,
    save_every: int,
    tolerance: ScalarLike | None,
    report: Callable[[int, int, dict[str, Array]], None] | None,
    done: ScalarLike = 0,
    total: int | None = None,
) -> tuple[Progress, PyTree[Array], Int[Array, ""]]:
    """Takes steps until there are enough of them, or the run has converged or failed.

    For the reports, these may be the steps that follow `done` others, out of a `total`.

    Returns where the run ended, its history, and how many entries of that were reached.
    """
    dynamic, static = eqx.partition(state, eqx.is_array)

    def combined(progress: Progress) -> Progress:
        state = eqx.combine(progress.state, static)
        return eqx.tree_at(lambda p: p.state, progress, state)

    def advance(progress: Progress, keep_metrics: bool) -> Progress:
        new_state, metrics = step(eqx.combine(progress.state, static))
        x, y = new_state.x, new_state.y
        verdict = metrics.get("result", RESULTS.successful)
        if not isinstance(verdict, Verdict):
            verdict = Verdict(verdict, figures_of(x, {}))
        verdict = Verdict(
            first_failure(verdict.result, finite_or_not((x, y))),
            verdict.figures | {"x": all_finite(x), "y": all_finite(y)},
        )
        metrics = {k: jnp.asarray(v) for k, v in metrics.items() if k != "result"}
        good = ~verdict.failed
        converged = jnp.array(False)
        if tolerance is not None:
            # Both: when y lags behind, the hypergradient crosses zero in passing.
            outer, inner = metrics["outer_residual"], metrics["inner_residual"]
            converged = good & (outer <= tolerance) & (inner <= tolerance)
        return Progress(
            eqx.filter(new_state, eqx.is_array),
            metrics if keep_metrics else progress.metrics,
            verdict,
            converged,
            progress.num_steps + good.astype(progress.num_steps.dtype),
        )

    def advance_if(active, progress: Progress, keep_metrics: bool) -> Progress:
        advance_ = ft.partial(advance, keep_metrics=keep_metrics)
        active = active & ~progress.stopped
        return jax.lax.cond(active, advance_, lambda p: p, progress)

    def entry(progress: Progress) -> PyTree[Array]:
        state = eqx.combine(progress.state, static)
        return jtu.tree_map(jnp.asarray, record(state.x, state.y, progress.metrics))

    # The run is a sequence of blocks of `save_every` steps, the last of which may be
    # shorter. The counter of the loop and its condition are the same for all elements
    # of a batch, so that under `vmap` the history is written once a block.
    #
    # After a failure the last good state is wanted. Keeping it at every step would cost
    # a pass over all variables each time; so a block that fails is undone instead, and
    # in the next round as many of its steps as were good are taken again.
    def unfinished(loop: _Loop):
        more = (loop.block * save_every < num_steps) | loop.retaking
        return eqxi.unvmap_any(more & ~loop.progress.stopped)

    def run_block(loop: _Loop) -> _Loop:
        before, retaking = loop.progress, loop.retaking
        remaining = jnp.maximum(0, num_steps - loop.block * save_every)
        length = jnp.minimum(save_every, remaining)
        length = jnp.where(retaking, loop.num_good, length)
        # The metrics of a step that nobody looks at are not computed.
        after = jax.lax.fori_loop(
            0,
            save_every - 1,
            lambda i, p: advance_if(i < length - 1, p, tolerance is not None),
            before,
        )
        after = advance_if(length > 0, after, True)

        fails = ~before.stopped & after.verdict.failed
        undone = tree_where(fails, before, after)
        # A block that is cut short, by the end or by convergence, makes no entry.
        taken = after.num_steps - before.num_steps
        complete = ~fails & ~retaking & (taken == save_every)
        history = loop.history
        if num_saves > 0:
            slot = jnp.minimum(loop.block, num_saves - 1)
            history = jtu.tree_map(
                lambda h, e: h.at[slot].set(jnp.where(complete, e, h[slot])),
                history,
                entry(undone),
            )
        if report is not None:
            callback = ft.partial(_report, report, total or num_steps)
            jax.debug.callback(callback, done + undone.num_steps, undone.metrics)
        return _Loop(
            loop.block + 1,
            eqx.tree_at(
                lambda p: p.verdict,
                undone,
                verdict_where(retaking, loop.failure, undone.verdict),
            ),
            verdict_where(fails & ~retaking, after.verdict, loop.failure),
            jnp.where(fails, after.num_steps - before.num_steps, loop.num_good),
            history,
            loop.num_saved + complete.astype(loop.num_saved.dtype),
        )

    zero = jnp.array(0)
    fine = Verdict(RESULTS.successful, figures_of(state.x, {}))
    before = Progress(dynamic, {}, fine, jnp.array(False), zero)
    metrics = jtu.tree_map(
        lambda s: jnp.full(s.shape, _blank(s.dtype), s.dtype),
        eqx.filter_eval_shape(advance, before, keep_metrics=True).metrics,
    )
    before = Progress(dynamic, metrics, fine, jnp.array(False), zero)
    num_saves = num_steps // save_every
    history = jtu.tree_map(
        lambda s: jnp.full((num_saves, *s.shape), _blank(s.dtype), s.dtype),
        eqx.filter_eval_shape(entry, before),
    )
    loop = _Loop(zero, before, fine, zero, history, zero)
    loop = jax.lax.while_loop(unfinished, run_block, loop)
    return combined(loop.progress), loop.history, loop.num_saved


def _blank(dtype):
    """What stands where nothing was ever written."""
    return jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else 0


def _report(report, num_steps, step, metrics):
    report(int(step), num_steps, metrics)
