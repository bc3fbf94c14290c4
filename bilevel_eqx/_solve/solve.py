"""`solve`: which run is meant, and how its end is said."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._arguments import (
    as_count,
    as_rate,
    as_variables,
    check_count,
    check_key,
    check_positive,
)
from .._compat import called_once, is_traced, not_differentiable
from .._custom_types import typechecked, X, Y
from .._derivatives.post_mortem import (
    has_grown,
    post_mortem,
    rests_at_kink,
    runs_off,
)
from .._equilibrium.base import (
    AbstractEquilibrium,
    amended,
    Certificate,
    certify as certify_,
    stated_cost,
)
from .._failure.results import first_failure, RESULTS
from .._failure.sentences import where_x_went
from .._failure.throw import throw_if_failed
from .._linalg.precision import in_full_precision_if_small
from .._mesh import check_mesh, on_auto_axes, spans_processes
from .._pipeline.base import AbstractPipeline
from .._pipeline.registry import check_pair, default_pipeline, pipeline_named
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .._problem.finite_sum import AbstractFiniteSumProblem
from .._tree import tree_max
from .bar import Bar, IN_PROGRAMS
from .checkpoint import Checkpoint
from .loop import Progress, Run, run_in_one, Start
from .report import AbstractReporter, Report, Silent, ToFunction
from .segments import run_in_segments
from .shared_checkpoint import SharedCheckpoint
from .solution import Solution
from .stream import Stream


def record_metrics(x: PyTree, y: PyTree, metrics: dict[str, Any]) -> dict[str, Any]:
    """The default `record` of `solve`: the metrics of the pipeline."""
    return {name: value for name, value in metrics.items() if name != "result"}


@on_auto_axes
@in_full_precision_if_small("y0")
def solve(
    problem: AbstractBilevelProblem[X, Y],
    equilibrium: AbstractEquilibrium,
    x0: X,
    y0: Y,
    *,
    pipeline: AbstractPipeline | str | None = None,
    num_steps: int,
    tolerance: ScalarLike | None = None,
    key: PRNGKeyArray | None = None,
    record: Callable[[X, Y, dict[str, Any]], PyTree] = record_metrics,
    save_every: int = 1,
    progress: bool | Callable[[int, int, dict[str, Any]], None] = False,
    state: Any = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    batches: Iterable | None = None,
    certify: bool = True,
    throw: bool = True,
) -> Solution[X, Y]:
    """Computes an equilibrium of a bilevel problem, and certifies it.

    A run is a compiled loop. Under `jax.jit` or `jax.vmap` the whole run is one program,
    which can be vmapped over anything that is an array: initial points, keys, the arrays
    in the problem, the epsilon of a warm start, the rates of a pipeline. Otherwise the
    loop runs in segments of about a second. Between two segments, progress is shown,
    checkpoints are written, and Ctrl-C is heeded. How a run is cut into segments does
    not change its answer.

    Ctrl-C ends the run at the end of the current segment. Then `KeyboardInterrupt` is
    raised, after the checkpoint is written if there is one; or, with `throw=False`, the
    solution so far is returned, and its `result` is `RESULTS.interrupted`. A second
    Ctrl-C raises as soon as Python runs again, which is at the latest at the end of the
    segment. This holds in the main thread, unless the program has a handler of its own
    for that signal.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `equilibrium`: which equilibrium is meant: [`bilevel_eqx.ColdStart`][],
        [`bilevel_eqx.WarmStart`][], ...
    - `x0`: the initial outer variables, a pytree of floating-point arrays.
    - `y0`: the initial inner variables, a pytree of floating-point arrays. For a cold
        start they are part of the question.
    - `pipeline`: the algorithm: a pipeline, or the name of a registered one. By default
        the one that the registry has for this equilibrium. Keyword only argument.
    - `num_steps`: the number of outer steps, or the largest number if there is a
        tolerance. Keyword only argument.
    - `tolerance`: if given, the run stops once the outer and the inner residual of the
        pipeline (norms of gradients) are both below it, and not reaching it is a
        failure. Keyword only argument.
    - `key`: a key for pipelines that draw random numbers. Keyword only argument.
    - `record`: a function of `(x, y, metrics)`, with a pytree of arrays as its value:
        what to keep for the history. By default the metrics: `value`,
        `outer_residual`, `inner_residual`. It is part of the program: define it once,
        since a new function compiles anew. Keyword only argument.
    - `save_every`: how many steps lie between two entries of the history. Keyword only
        argument.
    - `progress`: `True` shows a bar in a terminal or a notebook, and nothing where the
        output is neither: the step, the rate, the time left, F and the residuals, about
        once a second, and when it compiles. A function of `(step, num_steps, metrics)` is
        called instead, for each entry of the history and for the last step. Keyword only
        argument.
    - `state`: the `state` of an earlier [`bilevel_eqx.Solution`][], to go on from it;
        `x0` and `y0` then only say what shapes to expect. Keyword only argument.
    - `checkpoint`: a file to save the run in as it goes. If the file exists, the run is
        resumed from it, and the answer is that of an uninterrupted run, to the last bit.
        The checkpoint of another run is refused, with what has changed: an argument, a
        rate, the program of an objective or the data that it closes over, ...
        `num_steps` may be larger than in the interrupted run. Keyword only argument.
        If the arrays lie on devices of several processes, it is a folder that all of them
        share, and `orbax-checkpoint` must be installed.
    - `checkpoint_every`: how many steps lie between two savings, a multiple of
        `save_every`. By default about a tenth of the run. Keyword only argument.
    - `batches`: an iterator of pairs `(inner_batch, outer_batch)`, one for each step, for
        data that do not fit: samples like those of an
        [`bilevel_eqx.AbstractFiniteSumProblem`][], whose own data are then only for the
        certificate and the final value. They are cast to its types, which may not change
        a value but for its precision. `None` in all pairs takes all of its own data. The
        pairs of `save_every` steps are fetched and sent to the device together, by
        another thread, while the steps before them run. With a checkpoint, the iterator
        must have the methods `get_state` and `set_state`, as those of grain do; a
        generator cannot be resumed. Keyword only argument.
    - `certify`: whether to certify the answer. `False` saves the time of it (see
        [`bilevel_eqx.certify`][], which can be called later), and `certificate` is then
        `None`. Keyword only argument.
    - `throw`: whether a failure raises, or is returned as `result` with the last finite
        state and the history so far. Keyword only argument.

    **Returns:**

    A [`bilevel_eqx.Solution`][]. If x is not stationary at the end and has grown, a note
    of the certificate says that it may run off to infinity, and what to do. Outside of
    transformations another note says whether the inner steps through which a
    [`bilevel_eqx.GradientPipeline`][] differentiates go to and fro across a kink of the
    inner objective.

    **Raises:**

    A `ValueError`, before any work is done, for a problem or an argument that cannot be
    right (see [`bilevel_eqx.hypergradient`][]), for an equilibrium that the problem
    cannot have, or for one that the pipeline does not aim at; and once it is fetched for
    a pair of `batches` that is not like the data, or not like the first one. An
    `eqx.EquinoxRuntimeError`, unless `throw` is `False`, if a solve that the pipeline
    relies on fails, if the hypergradient can only be zero, if something is not finite
    (it says at which step), if the tolerance is not reached, or, outside of
    transformations, if the inner steps through which a `GradientPipeline` differentiates
    have diverged by the end of the run (see [`bilevel_eqx.Unrolled`][]). For the
    checkpoint, an `OSError`, before any work is done, if its folder does not exist
    (`FileNotFoundError`) or cannot be written in; a `FileExistsError` at a saving if
    another run has written the file meanwhile; and a `ValueError` if the file is
    damaged, is of another run, or has more steps than `num_steps`. A `KeyboardInterrupt`
    after Ctrl-C, unless `throw` is `False`.

    !!! Example

        ```python
        solution = blx.solve(problem, blx.WarmStart(), x0, y0, num_steps=100)
        print(solution.value, solution.certificate)
        ```
    """
    check_mesh((problem, x0, y0, key, pipeline))
    x0, y0 = as_variables(x0, "x0"), as_variables(y0, "y0")
    check_key(key, "solve")
    key = jr.key(0) if key is None else key
    _check(problem, equilibrium, x0, y0)
    # Before any work is done, and outside of the program: here the numbers are known.
    equilibrium.check(problem, x0, y0)
    if isinstance(pipeline, str):
        pipeline = pipeline_named(pipeline, equilibrium, problem)
    elif pipeline is None:
        pipeline = default_pipeline(equilibrium, problem)
    check_pair(equilibrium, pipeline)
    num_steps, save_every = as_count(num_steps), as_count(save_every)
    check_count(num_steps, "num_steps", "solve")
    check_count(save_every, "save_every", "solve")
    if tolerance is not None:
        check_positive(tolerance, "tolerance", "solve")
        tolerance = as_rate(tolerance)
    shared = spans_processes((problem, x0, y0))
    file = _checkpoint(checkpoint, checkpoint_every, num_steps, save_every, shared)
    reporter = _reporter(progress, num_steps, save_every)
    run = Run(problem, equilibrium, pipeline, tolerance, record, np.asarray(save_every))
    start = Start(x0, y0, key, state)
    stream = None
    if batches is not None:
        stream = _stream(batches, run, start, num_steps, save_every, file)
    end, diverged = None, False
    if not any(is_traced(leaf) for leaf in jtu.tree_leaves((run, start))):
        try:
            with contextlib.closing(reporter):
                end = run_in_segments(
                    run,
                    start,
                    num_steps,
                    checkpoint=file,
                    reporter=reporter,
                    stream=stream,
                )
        except RuntimeError as error:
            # JAX says this of reverse mode with respect to what the problem closes over,
            # because a segment writes over its arguments. Below it is refused.
            if "Array has been deleted" not in str(error):
                raise
    if end is not None:
        interrupted = np.asarray(end.interrupted)
        value, result, figures, grown = _conclude_alone(
            problem, tolerance, end.progress, interrupted, y0
        )
        last, history = end.progress, end.history
        if grown and not end.interrupted:
            diverged = bool(_diverged(problem, equilibrium, pipeline, last.state, y0))
        if diverged:
            if not last.verdict.failed:
                del figures["num_steps"]
            result = RESULTS.inner_diverged
    elif stream is not None:
        raise _no_stream()
    elif checkpoint is not None:
        raise ValueError(
            "`solve(checkpoint=...)` writes a file as it goes, and cannot do so under "
            "`jax.jit`, `jax.vmap` or `jax.grad`. Leave the checkpoint out there, or run "
            "the transformed function for fewer steps at a time and use "
            "`bilevel_eqx.save` in between."
        )
    else:
        report = IN_PROGRAMS if progress is True else progress or None
        last, history, value, result, figures = _in_one(
            run, start, num_steps, num_steps // save_every, report
        )
    solution = Solution(
        x=last.state.x,
        y=last.state.y,
        value=value,
        result=result,
        certificate=None,  # pyright: ignore
        history=history,
        stats={
            "num_steps": last.num_steps,
            "save_every": run.save_every,
            **last.metrics,
        },
        state=last.state,
    )
    if end is not None:
        solution = _with_seconds(solution, end.seconds)
    if throw and end is not None:
        # Before the certificate, which nobody would see.
        if end.interrupted:
            raise KeyboardInterrupt(
                _interruption(int(last.num_steps), num_steps, checkpoint)
            )
        throw_if_failed(
            solution,
            result,
            lambda: figures,
            lambda: _post_mortem(problem, x0, y0, last, diverged),
        )
    if certify:
        x, y = solution.x, solution.y
        if end is None:
            certificate = certify_(problem, equilibrium, x, y, y0=y0, x0=x0)
        else:
            began = time.perf_counter()
            with reporter.certifying(stated_cost(equilibrium, y0)):
                certificate = certify_(problem, equilibrium, x, y, y0=y0, x0=x0)
            seconds = {"certify": time.perf_counter() - began}
            solution = _with_seconds(solution, seconds)
        certificate = _with_where_x_went(certificate, x0, x, history)
        if end is not None and _at_kink(problem, equilibrium, pipeline, last.state):
            certificate = amended(certificate, [*certificate.notes, _AT_KINK])
        solution = dataclasses.replace(solution, certificate=certificate)
    if throw and end is None:
        solution = throw_if_failed(solution, result, lambda: figures)
    if any(is_traced(leaf) for leaf in jtu.tree_leaves(solution)):
        solution = not_differentiable(solution, _NO_DERIVATIVE)
    return solution


def _reporter(progress: Any, num_steps: int, save_every: int) -> AbstractReporter:
    if progress is True:
        # Of several processes one shows it.
        return Bar(num_steps) if jax.process_index() == 0 else Silent()
    return ToFunction(progress, num_steps, save_every) if progress else Silent()


def _with_seconds(solution: Solution, seconds: dict[str, float]) -> Solution:
    """The solution with wall-clock times in its `stats`. They are arrays, because other
    numbers would be part of the programs that the solution is passed to."""
    # Also where the value is that of a derivative, which is refused later.
    dtype = solution.value.dtype
    named = {f"{k}_seconds": np.asarray(v, dtype) for k, v in seconds.items()}
    return dataclasses.replace(solution, stats={**solution.stats, **named})


def _with_where_x_went(
    certificate: Certificate, x0: PyTree, x: PyTree, history: PyTree
) -> Certificate:
    """The certificate, with a note if x is not stationary and may run off to infinity.

    A search for better points ends there without a failure: F becomes flat, and at some
    point rounding decides.
    """
    outer = certificate.residuals.get("outer")
    if (
        outer is None
        or outer.ndim > 0
        or any(map(is_traced, jtu.tree_leaves((x, outer))))
    ):
        return certificate
    note = where_x_went(*_largest_entries(x0, x))
    # Not >, so that NaN is not stationary.
    if note == "" or float(outer) <= _STATIONARY:
        return certificate
    note = f"x is not stationary. {note}"
    values = history.get("value") if isinstance(history, dict) else None
    if values is not None and np.ndim(values) == 1:
        same = np.asarray(values)[::-1] == np.asarray(values)[-1:]
        count = int(np.argmin(np.append(same, False)))
        if count > 1:
            note += f" In the last {count} entries of the history F is the same."
    return amended(certificate, [*certificate.notes, note])


@called_once
def _at_kink(problem, equilibrium, pipeline, state) -> Bool[Array, ""] | bool:
    """Whether the inner steps that were differentiated go to and fro across a kink."""
    trail = pipeline.trail(problem, equilibrium, state)
    return False if trail is None else rests_at_kink(problem, state.x, trail)


@called_once
def _diverged(problem, equilibrium, pipeline, state, y0) -> Bool[Array, ""] | bool:
    """Whether the inner steps that were differentiated run off."""
    trail = pipeline.trail(problem, equilibrium, state)
    return False if trail is None else runs_off(problem, state.x, y0, trail)


_AT_KINK = (
    "the inner steps go to and fro across a kink of the inner objective, such as an L1 "
    "norm, a hinge or a ReLU has: their derivatives, and the hypergradients of this run, "
    "mean nothing. State the kink as a constraint (`project_y`), or smooth it"
)


@eqx.filter_jit
def _largest_entries(x0: PyTree, x: PyTree) -> tuple[Scalar, Scalar]:
    return tree_max(x0), tree_max(x)


# An x whose residual is below this may be large, and does not run off.
_STATIONARY = 1e-3


_NO_DERIVATIVE = (
    "`solve` cannot be differentiated: the derivative of an iteration that has converged "
    "is not that of its limit. For the derivative of the outer objective use "
    "`hypergradient`; for that of the inner variables, also with respect to data, use "
    "`best_response`. At an equilibrium, apply the implicit function theorem to its "
    "hypergradient."
)


@eqx.filter_jit
@typechecked
def _check(
    problem: AbstractBilevelProblem,
    equilibrium: AbstractEquilibrium,
    x0: PyTree,
    y0: PyTree,
) -> None:
    """Asks of the shapes alone, and so once for all that have the same."""
    check_problem(problem, x0, y0)
    equilibrium.check_kind(problem)


def _conclude(
    problem: AbstractBilevelProblem,
    tolerance: ScalarLike | None,
    end: Progress,
    interrupted: Bool[Any, ""] | None,
) -> tuple[Scalar, RESULTS, dict[str, Array]]:
    """The value, the result, and the figures for the sentence of a failure, which are
    those of the step that failed.
    """
    result = end.verdict.result
    if interrupted is not None:
        ctrl_c = RESULTS.where(interrupted, RESULTS.interrupted, RESULTS.successful)
        result = first_failure(result, ctrl_c)
    figures = {**end.verdict.figures, "num_steps": end.num_steps}
    if tolerance is not None:
        in_time = RESULTS.where(
            end.converged, RESULTS.successful, RESULTS.outer_max_steps_reached
        )
        result = first_failure(result, in_time)
        figures["last_outer_residual"] = end.metrics["outer_residual"]
        figures["last_inner_residual"] = end.metrics["inner_residual"]
    return problem.outer(end.state.x, end.state.y), result, figures


def _post_mortem(
    problem, x0: PyTree, y0: PyTree, last: Progress, diverged: bool
) -> dict[str, Array]:
    """What is found out at the last good step. Where the inner steps have run off, x may
    have followed them: then at the start."""
    x, y = last.state.x, last.state.y
    if diverged:
        return post_mortem(problem, x0 if has_grown(x0, x) else x, y0, y0)
    grown = {"first_x": tree_max(x0), "last_x": tree_max(x)}
    return grown | post_mortem(problem, x, y0, y)


@eqx.filter_jit
def _conclude_alone(
    problem: AbstractBilevelProblem,
    tolerance: ScalarLike | None,
    end: Progress,
    interrupted: Bool[Any, ""],
    y0: PyTree,
) -> tuple[Scalar, RESULTS, dict[str, Array], Bool[Array, ""]]:
    """The same, and whether y has grown so much that its solve may have diverged."""
    grown = has_grown(y0, end.state.y)
    return *_conclude(problem, tolerance, end, interrupted), grown


@eqx.filter_jit
def _in_one(
    run: Run, start: Start, num_steps: int, num_entries: int, report: Report | None
) -> tuple[Progress, PyTree, Scalar, RESULTS, dict[str, Array]]:
    """A whole run and its conclusion, as one program."""

    def call_back(fresh, step, metrics):
        # A run of a batch that has ended waits for the others.
        if fresh and report is not None:
            report(int(step), num_steps, metrics)

    end, history = run_in_one(
        run, start, num_steps, num_entries, None if report is None else call_back
    )
    if report is IN_PROGRAMS:
        jax.debug.callback(lambda _: IN_PROGRAMS.close(), end.num_steps)
    return end, history, *_conclude(run.problem, run.tolerance, end, None)


def _no_stream() -> ValueError:
    return ValueError(
        "`solve(batches=...)` asks an iterator as it goes, and cannot do so under "
        "`jax.jit`, `jax.vmap` or `jax.grad`. Put the data into the problem, and give "
        "the pipeline an `inner_batch` and an `outer_batch`."
    )


def _stream(
    batches: Iterable,
    run: Run,
    start: Start,
    num_steps: int,
    save_every: int,
    checkpoint: Checkpoint | None,
) -> Stream:
    if any(is_traced(leaf) for leaf in jtu.tree_leaves((run, start))):
        raise _no_stream()
    pipeline, problem = run.pipeline, run.problem
    name = type(pipeline).__name__
    if not isinstance(problem, AbstractFiniteSumProblem):
        raise ValueError(
            f"`solve(batches=...)`: `{type(problem).__name__}` does not say what its "
            "samples are. State the problem as a `FiniteSumProblem`."
        )
    # Of the pipeline itself: it may depend on its parts.
    if not getattr(pipeline, "admits_batches", False):
        raise ValueError(
            f"`solve(batches=...)`: `{name}` compares steps with each other, and with "
            "other samples in each it would compare the samples. Use `GradientPipeline` "
            "with `optax.adam`, `PenaltyDescent` or another pipeline that draws batches."
        )
    own = [n for n in ("inner_batch", "outer_batch") if getattr(pipeline, n, None)]
    if own:
        raise ValueError(
            f"`solve(batches=...)` gives the batches, and `{name}({own[0]}=...)` would "
            "draw others. Leave out one of the two."
        )
    saves = checkpoint is not None
    stream = Stream(batches, problem, start.key, num_steps, save_every, saves)
    if saves and not stream.has_state:
        raise ValueError(
            "`solve(batches=..., checkpoint=...)`: the iterator has no `get_state` and "
            "`set_state`, so that a run could not be resumed where it was. Use an "
            "iterator that has them, as those of grain do, or leave the checkpoint out."
        )
    return stream


def _checkpoint(
    path: str | os.PathLike | None,
    every: int | None,
    num_steps: int,
    save_every: int,
    shared: bool,
) -> Checkpoint | None:
    if path is None:
        if every is not None:
            raise ValueError(
                "`solve(checkpoint_every=...)` says how often to save, and "
                "`checkpoint`, the file to save in, is missing."
            )
        return None
    if every is None:
        every = save_every * max(1, round(num_steps / save_every / 10))
    every = as_count(every)
    check_count(every, "checkpoint_every", "solve")
    if every % save_every != 0:
        raise ValueError(
            f"`solve(checkpoint_every={every}, save_every={save_every})`: the first must "
            "be a multiple of the second, so that each saving is at an entry of the "
            "history."
        )
    return SharedCheckpoint(path, every) if shared else Checkpoint(path, every)


def _interruption(done: int, num_steps: int, checkpoint: str | os.PathLike | None) -> str:
    message = f"`solve` was interrupted after step {done} of {num_steps}. "
    if checkpoint is None:
        return message + (
            "Nothing of it was kept. With `throw=False` the solution so far is returned, "
            "and with `checkpoint=...` the run can be resumed."
        )
    return message + f"It is saved in `{checkpoint}`: the same call resumes it."
