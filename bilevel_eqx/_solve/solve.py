"""`solve`: a whole run as one program."""

import functools as ft
import os
import pathlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, ScalarLike

from .._arguments import as_rate, as_variables, check_count, check_positive, is_traced
from .._custom_types import typechecked, X, Y
from .._equilibrium.base import AbstractEquilibrium
from .._failure.results import first_failure, RESULTS
from .._failure.throw import throw_if_failed
from .._pipeline.base import AbstractPipeline
from .._pipeline.registry import check_pair, default_pipeline, pipeline_named
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .checkpoint import fingerprint, read, write
from .loop import Progress, run
from .solution import Solution


def record_metrics(x: PyTree, y: PyTree, metrics: dict[str, Any]) -> dict[str, Any]:
    """The default `record` of `solve`: the metrics of the pipeline."""
    return {name: value for name, value in metrics.items() if name != "result"}


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
    throw: bool = True,
) -> Solution[X, Y]:
    """Computes an equilibrium of a bilevel problem, and certifies it.

    The whole run is one compiled program. It can be vmapped over anything that is an
    array: initial points, keys, the arrays in the problem, the epsilon of a warm start,
    the rates of a pipeline.

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
    - `progress`: `True` prints a line at each entry of the history; a function of
        `(step, num_steps, metrics)` is called there instead. Keyword only argument.
    - `state`: the `state` of an earlier [`bilevel_eqx.Solution`][], to go on from it;
        `x0` and `y0` then only say what shapes to expect. Keyword only argument.
    - `checkpoint`: a file to save the run in as it goes, and to resume from if it is
        there: one that was killed gives the same answer to the last bit. It belongs to
        this run; that of one with other data, initial values or rates is refused. More
        `num_steps` than it was begun with are taken. Keyword only argument.
    - `checkpoint_every`: how many steps lie between two savings, a multiple of
        `save_every`. By default about a tenth of the run. Keyword only argument.
    - `throw`: whether a failure raises, or is returned as `result` with the last finite
        state and the history so far. Keyword only argument.

    **Returns:**

    A [`bilevel_eqx.Solution`][].

    **Raises:**

    A `ValueError`, before any work is done, for a problem or an argument that cannot be
    right (see [`bilevel_eqx.hypergradient`][]), for an equilibrium that the problem
    cannot have, or for one that the pipeline does not aim at. An
    `eqx.EquinoxRuntimeError`, unless `throw` is `False`, if a solve that the pipeline
    relies on fails, if the hypergradient can only be zero, if something is not finite
    (it says at which step), or if the tolerance is not reached.

    !!! Example

        ```python
        solution = blx.solve(problem, blx.WarmStart(), x0, y0, num_steps=100)
        print(solution.value, solution.certificate)
        ```
    """
    x0, y0 = as_variables(x0, "x0"), as_variables(y0, "y0")
    _check(problem, equilibrium, x0, y0)
    # Before any work is done, and outside of the program: here the numbers are known.
    equilibrium.check(problem, x0, y0)
    if isinstance(pipeline, str):
        pipeline = pipeline_named(pipeline, equilibrium, problem)
    elif pipeline is None:
        pipeline = default_pipeline(equilibrium, problem)
    check_pair(equilibrium, pipeline)
    check_count(num_steps, "num_steps", "solve")
    check_count(save_every, "save_every", "solve")
    if tolerance is not None:
        check_positive(tolerance, "tolerance", "solve")
        tolerance = as_rate(tolerance)
    if progress is True:
        progress = print_progress
    program = ft.partial(
        _solve if checkpoint is None else _solve_in_segments,
        problem,
        equilibrium,
        x0,
        y0,
        pipeline,
        num_steps,
        tolerance,
        jr.key(0) if key is None else key,
        record,
        save_every,
        progress or None,
        state,
    )
    if checkpoint is None:
        if checkpoint_every is not None:
            raise ValueError(
                "`solve(checkpoint_every=...)` says how often to save, and "
                "`checkpoint`, the file to save in, is missing."
            )
        solution, num_saved, figures = program()
    else:
        every = _segment_length(checkpoint_every, num_steps, save_every)
        solution, num_saved, figures = program(pathlib.Path(checkpoint), every)
    if not is_traced(num_saved):
        # A run that ended early has fewer entries than were set aside for it.
        kept = int(num_saved)
        history = jtu.tree_map(lambda h: h[:kept], solution.history)
        solution = eqx.tree_at(
            lambda s: s.history, solution, history, is_leaf=lambda leaf: leaf is None
        )
    if throw:
        solution = throw_if_failed(solution, solution.result, lambda: figures)
    return solution


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
    equilibrium.check_constraints(problem)


def print_progress(step: int, num_steps: int, metrics: dict[str, Any]) -> None:
    """The default line of `solve(..., progress=True)`."""
    figures = "  ".join(f"{k} {float(v):.3e}" for k, v in metrics.items())
    print(f"step {step:>{len(str(num_steps))}}/{num_steps}  {figures}", flush=True)


@typechecked
def _advance(
    problem: AbstractBilevelProblem,
    equilibrium: AbstractEquilibrium,
    x0: PyTree,
    y0: PyTree,
    pipeline: AbstractPipeline,
    num_steps: int,
    tolerance: ScalarLike | None,
    key: PRNGKeyArray,
    record: Callable,
    save_every: int,
    report: Callable | None,
    state: Any,
    done: ScalarLike = 0,
    total: int | None = None,
) -> tuple[Progress, PyTree, Int[Array, ""]]:
    """The steps of a run, or of a segment of one; what `_run.run` returns."""
    if state is None:
        state = pipeline.init(problem, equilibrium, x0, y0, key)
    return run(
        ft.partial(pipeline.step, problem, equilibrium),
        record,
        state,
        num_steps=num_steps,
        save_every=save_every,
        tolerance=tolerance,
        report=report,
        done=done,
        total=total,
    )


def _conclude(
    problem: AbstractBilevelProblem,
    equilibrium: AbstractEquilibrium,
    y0: PyTree,
    tolerance: ScalarLike | None,
    end: Progress,
    history: PyTree,
) -> tuple[Solution, dict[str, Array]]:
    """The solution that a run has ended with, certified; and the figures for the
    sentence of a failure, which are those of a step that was undone.
    """
    result = end.verdict.result
    if tolerance is not None:
        in_time = RESULTS.where(
            end.converged, RESULTS.successful, RESULTS.outer_max_steps_reached
        )
        result = first_failure(result, in_time)
    x, y = end.state.x, end.state.y
    figures = {**end.verdict.figures, "num_steps": end.num_steps}
    if tolerance is not None:
        figures["last_outer_residual"] = end.metrics["outer_residual"]
        figures["last_inner_residual"] = end.metrics["inner_residual"]
    solution = Solution(
        x=x,
        y=y,
        value=problem.outer(x, y),
        result=result,
        certificate=equilibrium.certify(problem, x, y, y0),
        history=history,
        stats={"num_steps": end.num_steps, **end.metrics},
        state=end.state,
    )
    return solution, figures


@eqx.filter_jit
@typechecked
def _solve(
    problem: AbstractBilevelProblem,
    equilibrium: AbstractEquilibrium,
    x0: PyTree,
    y0: PyTree,
    pipeline: AbstractPipeline,
    num_steps: int,
    tolerance: ScalarLike | None,
    *rest,
) -> tuple[Solution, Int[Array, ""], dict[str, Array]]:
    end, history, num_saved = _advance(
        problem, equilibrium, x0, y0, pipeline, num_steps, tolerance, *rest
    )
    solution, figures = _conclude(problem, equilibrium, y0, tolerance, end, history)
    return solution, num_saved, figures


#
# In segments, with a file that says where the run is after each
#

_segment = eqx.filter_jit(_advance)


_finish = eqx.filter_jit(_conclude)


def _segment_length(every: int | None, num_steps: int, save_every: int) -> int:
    if every is None:
        every = save_every * max(1, round(num_steps / save_every / 10))
    check_count(every, "checkpoint_every", "solve")
    if every % save_every != 0:
        raise ValueError(
            f"`solve(checkpoint_every={every}, save_every={save_every})`: the first must "
            "be a multiple of the second, so that no entry of the history is cut in two."
        )
    return every


class _Segments(eqx.Module):
    """What a checkpoint holds."""

    end: Progress
    history: PyTree[Array]


def _solve_in_segments(
    problem: AbstractBilevelProblem,
    equilibrium: AbstractEquilibrium,
    x0: PyTree,
    y0: PyTree,
    pipeline: AbstractPipeline,
    num_steps: int,
    tolerance: ScalarLike | None,
    key: PRNGKeyArray,
    record: Callable,
    save_every: int,
    report: Callable | None,
    state: Any,
    path: pathlib.Path,
    every: int,
) -> tuple[Solution, Array, dict[str, Array]]:
    given = (problem, equilibrium, x0, y0, pipeline, key, state, tolerance)
    if any(is_traced(leaf) for leaf in jtu.tree_leaves(given)):
        raise ValueError(
            "`solve(checkpoint=...)` writes a file as it goes, and cannot do so under "
            "`jax.jit`, `jax.vmap` or `jax.grad`. Leave the checkpoint out there, or run "
            "the transformed function for fewer steps at a time and use "
            "`bilevel_eqx.save` in between."
        )
    segment = ft.partial(_segment, problem, equilibrium, x0, y0, pipeline)
    settings = tolerance, key, record, save_every, report
    names = type(equilibrium).__name__, type(pipeline).__name__
    run_mark = "/".join((*names, fingerprint(given)))
    done, saved, reached = 0, 0, None

    if path.exists():

        def like(header):
            if header.get("run") != run_mark:
                raise ValueError(
                    f"`{path}` is the checkpoint of another run: its data, initial "
                    "values, rates or equilibrium are not those given. Remove it to "
                    "start anew, or give another name."
                )
            end, history, _ = eqx.filter_eval_shape(segment, every, *settings, state)
            kept = jtu.tree_map(
                lambda h: jax.ShapeDtypeStruct((header["saved"], *h.shape[1:]), h.dtype),
                history,
            )
            return _Segments(end, kept)

        reached, header = read(path, like)
        done, saved = header["done"], header["saved"]

    while done < num_steps and (reached is None or not bool(reached.end.stopped)):
        length = min(every, num_steps - done)
        start = state if reached is None else reached.end.state
        end, history, num_saved = segment(
            length, *settings, start, jnp.asarray(done), num_steps
        )
        added = int(num_saved)
        history = jtu.tree_map(lambda h, added=added: h[:added], history)
        if reached is not None:
            history = jtu.tree_map(
                lambda u, v: jnp.concatenate([u, v]), reached.history, history
            )
        done, saved = done + int(end.num_steps), saved + added
        end = eqx.tree_at(lambda p: p.num_steps, end, jnp.asarray(done))
        reached = _Segments(end, history)
        if bool(end.verdict.failed):
            break
        write(path, reached, {"run": run_mark, "done": done, "saved": saved})

    assert reached is not None
    end, history = reached.end, reached.history
    solution, figures = _finish(problem, equilibrium, y0, tolerance, end, history)
    return solution, jnp.asarray(saved), figures
