"""A film of what a network has learned from points that move."""

import os
from collections.abc import Callable, Sequence

import equinox as eqx
import jax.tree_util as jtu
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes

from ._axes import drawing, legend_below
from ._planar import classifier, legend_handles


def distillation_gif(
    file: str | os.PathLike,
    predict: Callable[[PyTree, Float[Array, "m 2"]], Float[Array, "m c"]],
    weights: PyTree[Float[ArrayLike, "t ..."]],
    paths: Float[ArrayLike, "t k 2"],
    points: Float[ArrayLike, "n 2"],
    labels: Int[ArrayLike, " n"],
    *,
    path_labels: Int[ArrayLike, " k"] | Float[ArrayLike, "t k c"] | None = None,
    names: Sequence[str] | None = None,
    steps: Int[ArrayLike, " t"] | None = None,
    num_frames: int = 50,
    frames_per_second: float = 10,
    extent: float | None = None,
    resolution: int = 100,
    dots_per_inch: int = 80,
) -> Axes:
    """Saves a film, as a GIF: the regions of a network while the points that it is
    trained on move.

    The weights and the points are those of a history, from
    `solve(record=lambda x, y, metrics: {"weights": y, "points": x["points"]})`.

    **Arguments:**

    - `file`: the file, which is replaced if there is one.
    - `predict`: a function from weights and points of shape `(m, 2)` to logits of shape
        `(m, c)`, such as the method of [`bilevel_eqx.tasks.ConcentricRings`][].
    - `weights`: the weights over time, stacked along a leading axis.
    - `paths`: the places of the learned points over time, of shape `(t, k, 2)`.
    - `points`, `labels`: the data.
    - `path_labels`, `names`, `extent`, `resolution`: as for
        [`bilevel_eqx.plot.classifier`][]. Keyword only arguments.
    - `steps`: the outer step of each entry, for the title. By default the entries are
        counted. Keyword only argument.
    - `num_frames`: how many entries become a frame, at equal distances; all if there are
        fewer. Keyword only argument.
    - `frames_per_second`: the speed. Keyword only argument.
    - `dots_per_inch`: of a picture that is 3.4 inches wide. Keyword only argument.

    **Returns:**

    The axes, with the last frame.

    **Raises:**

    A `ValueError` if there are not as many weights as places, or none.
    """
    paths = np.asarray(paths)
    lengths = {len(leaf) for leaf in jtu.tree_leaves(weights)} | {len(paths)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            "`plot.distillation_gif`: `weights` and `paths` must have one entry for each "
            f"moment, along their first axis. Their lengths are {sorted(lengths)}."
        )
    if extent is None:
        # One for all frames.
        everything = np.append(np.asarray(points), paths.reshape(-1, 2), 0)
        extent = 1.1 * float(np.quantile(np.abs(everything), 0.995))
    steps = np.arange(1, len(paths) + 1) if steps is None else np.asarray(steps)
    shares = None if path_labels is None else np.asarray(path_labels)
    compiled = eqx.filter_jit(predict)
    handles = legend_handles(np.unique(np.asarray(labels)), names, paths=True, end="now")
    writer = PillowWriter(fps=frames_per_second)  # pyright: ignore
    count = min(num_frames, len(paths))
    entries = np.round(np.linspace(0, len(paths) - 1, count)).astype(int)
    # Not the style of a saved picture, whose tight box could change from frame to frame.
    with (
        drawing(None, (3.4, 3.9)) as (ax,),
        plt.rc_context({"savefig.bbox": None}),
        writer.saving(ax.figure, os.fspath(file), dots_per_inch),  # pyright: ignore
    ):
        for entry in entries:
            ax.clear()
            y = jtu.tree_map(lambda leaf, i=entry: leaf[i], weights)
            until = entry + 1
            classifier(
                lambda p, y=y: compiled(y, p),
                points,
                labels,
                paths=paths[:until],
                path_labels=shares[:until] if np.ndim(shares) == 3 else shares,  # pyright: ignore
                names=names,
                extent=extent,
                resolution=resolution,
                legend=False,
                axes=ax,
            )
            legend_below(ax, handles=handles, ncols=2)
            ax.set_title(f"outer step {steps[entry]:,}")
            writer.grab_frame()
            # The axes stay where they are in the first frame.
            ax.figure.set_layout_engine("none")  # pyright: ignore
    return ax
