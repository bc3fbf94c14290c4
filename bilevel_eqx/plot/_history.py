"""The course of a run."""

from collections.abc import Sequence

import jax.tree_util as jtu
import numpy as np
from matplotlib.axes import Axes

from .._failure.results import is_failure
from .._solve.solution import Solution
from ._axes import check_known, drawing
from ._style import CLASS_COLOURS


# With their units: those of the objectives are the user's.
_LABELS = {
    "value": "$F(x, y)$",
    "outer_residual": r"outer: $|dF/dx|$  [unit of $F$ / unit of $x$]",
    "inner_residual": r"inner: $|\nabla_y f|$  [unit of $f$ / unit of $y$]",
}


def history(solution: Solution, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Draws the history of a run over its steps: F, and below it the residuals of the
    algorithm.

    What `record` has returned is drawn if it is one number for each entry: names that end
    in `residual` below, on a logarithmic scale, and all others above. Of a batch of runs
    there is a curve for each.

    **Arguments:**

    - `solution`: a [`bilevel_eqx.Solution`][], also one of a batch.
    - `axes`: two matplotlib axes, or as many as there are panels. By default those of a
        new figure.

    **Returns:**

    The axes: the upper and the lower one, or the only one.

    **Raises:**

    A `ValueError` if there is nothing to draw.
    """
    check_known(solution, "plot.history")
    batch = np.ndim(solution.stats["num_steps"])
    series = _series(solution.history, batch)
    below = {k: v for k, v in series.items() if k.endswith("residual")}
    above = {k: v for k, v in series.items() if k not in below}
    panels = [panel for panel in (above, below) if panel]
    if not panels or all(v.shape[-1] == 0 for v in series.values()):
        raise ValueError(
            "`plot.history`: `solution.history` has no series of numbers to draw. Run "
            "`solve` without `record`, which keeps F and the residuals, or let `record` "
            "return a dictionary of numbers; and let `save_every` be at most `num_steps`."
        )
    every = int(np.ravel(solution.stats["save_every"])[0])
    colours = iter(CLASS_COLOURS * len(series))
    with drawing(axes, (4.6, 1.9 * len(panels) + 0.4), len(panels)) as drawn:
        for ax, panel in zip(drawn, panels):
            for name, values in panel.items():
                _curves(ax, values, every, _LABELS.get(name, name), next(colours))
            _describe(ax, panel, is_residuals=panel is below)
        drawn[0].set_title(_ending(solution))
        drawn[-1].set_xlabel("outer step")
        drawn[-1].locator_params(axis="x", integer=True)
    return drawn


def _series(tree, batch: int) -> dict[str, np.ndarray]:
    """What has one number for each entry, by its name."""
    series = {}
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if np.ndim(leaf) == batch + 1:
            name = jtu.keystr(path, simple=True, separator=".")
            series[name] = np.asarray(leaf, np.float64)
    return series


def _curves(ax: Axes, values: np.ndarray, every: int, label: str, colour: str) -> None:
    if np.all(values == 0):
        label += ", exactly zero"
    curves = values.reshape(-1, values.shape[-1])
    steps = every * np.arange(1, curves.shape[-1] + 1)
    for i, curve in enumerate(curves):
        # A few points are seen as points.
        marker = "o" if np.sum(np.isfinite(curve)) < 3 else None
        # One entry of the legend for all.
        named = label if i == 0 else None
        alpha = 1.0 if len(curves) == 1 else 0.6
        style = {"color": colour, "marker": marker, "ms": 4, "alpha": alpha}
        ax.plot(steps, curve, label=named, **style)


def _describe(ax: Axes, panel: dict[str, np.ndarray], is_residuals: bool) -> None:
    values = np.concatenate([np.ravel(v) for v in panel.values()])
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    falls_far = values.size > 0 and positive.size == values.size
    falls_far = falls_far and np.max(values) > 100 * np.min(values)
    if falls_far or (is_residuals and positive.size > 0):
        ax.set_yscale("log")
    if is_residuals:
        ax.set_ylabel("residual")
    elif list(panel) == ["value"]:
        ax.set_ylabel(r"$F(x, y)$  [unit of $F$]")
    if list(panel) != ["value"]:
        ax.legend()


def _ending(solution: Solution) -> str:
    failed = np.ravel(is_failure(solution.result))
    if failed.size > 1:
        return f"{failed.size} runs, {failed.size - failed.sum()} of them successful"
    steps = int(np.ravel(solution.stats["num_steps"])[0])
    value = float(np.ravel(solution.value)[0])
    how = "stopped by a failure" if failed[0] else "successful"
    return f"{how} after {steps:,} steps: $F$ = {value:.4g}"
