"""Classifiers of points in the plane."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import matplotlib.patheffects as effects
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.lines import Line2D

from ._axes import drawing, legend_below
from ._style import CLASS_COLOURS


def classifier(
    predict: Callable[[Float[Array, "m 2"]], Float[Array, "m c"]],
    points: Float[ArrayLike, "n 2"],
    labels: Int[ArrayLike, " n"],
    *,
    paths: Float[ArrayLike, "t k 2"] | None = None,
    path_labels: Int[ArrayLike, " k"] | Float[ArrayLike, "t k c"] | None = None,
    names: Sequence[str] | None = None,
    extent: float | None = None,
    resolution: int = 200,
    legend: bool = True,
    axes: Axes | None = None,
) -> Axes:
    """Draws the regions of a classifier in the plane, its data, and the paths of learned
    points, with a legend.

    **Arguments:**

    - `predict`: a function from points of shape `(m, 2)` to logits of shape `(m, c)`.
    - `points`: the data, of shape `(n, 2)`.
    - `labels`: their classes, integers of shape `(n,)`.
    - `paths`: the places of k learned points over time, of shape `(t, k, 2)`. Keyword
        only argument.
    - `path_labels`: their classes, integers of shape `(k,)`; or, if the labels are
        learned too, the weight of each class over time, of shape `(t, k, c)`. By default
        the classes in turn. Keyword only argument.
    - `names`: the names of the classes, for the legend. Keyword only argument.
    - `extent`: the square shown is from `-extent` to `extent`. By default all of the data
        and the ends of the paths are in it. Keyword only argument.
    - `resolution`: the number of grid points along each side. Keyword only argument.
    - `legend`: whether to draw the legend, below the axes. For one legend beside several
        axes see [`bilevel_eqx.plot.legend_handles`][]. Keyword only argument.
    - `axes`: matplotlib axes, by default those of a new figure. Keyword only argument.

    **Returns:**

    The axes.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    if extent is None:
        ends = points if paths is None else np.append(points, np.asarray(paths)[-1], 0)
        extent = 1.15 * float(np.max(np.abs(ends)))
    with drawing(axes, (3.4, 3.9)) as (ax,):
        decision_regions(ax, predict, extent=extent, resolution=resolution)
        data_points(ax, points, labels)
        if paths is not None:
            _paths(ax, np.asarray(paths), path_labels, 1 + int(labels.max()))
        if legend:
            handles = legend_handles(np.unique(labels), names, paths=paths is not None)
            legend_below(ax, handles=handles, ncols=2)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return ax


def legend_handles(
    classes: Sequence[int] | Int[ArrayLike, " c"],
    names: Sequence[str] | None = None,
    *,
    paths: bool = False,
    end: str = "end",
    learned: bool = False,
) -> list[Line2D]:
    """What the markers of this module mean, for the `handles` of a legend.

    **Arguments:**

    - `classes`: the classes of the data.
    - `names`: their names. By default `class 0`, ...
    - `paths`: whether there are paths of learned points. Keyword only argument.
    - `end`: what the end of a path is. Keyword only argument.
    - `learned`: whether there are learned points as large markers. Keyword only argument.
    """

    def handle(label: str, marker: str, size: float, **options: Any) -> Line2D:
        return Line2D([], [], ls="", marker=marker, ms=size, label=label, **options)

    handles = []
    for label in np.asarray(classes):
        name = f"class {label}" if names is None else names[label]
        colour, marker = CLASS_COLOURS[label], _marker(label)
        handles.append(handle(f"data, {name}", marker, 4, color=colour))
    if paths:
        handles.append(handle("learned point, start", "x", 5, color="0.3", mew=1.4))
        star = {"color": "0.75", "mec": "black", "mew": 0.7}
        handles.append(handle(f"learned point, {end}", "*", 9, **star))
    if learned:
        handles.append(handle("large: learned point", "o", 8, color="0.75", mec="black"))
    return handles


def _paths(axes: Axes, paths: np.ndarray, labels: Any, num_classes: int) -> None:
    """Each in the colour of its class, or the mean colour of its classes: grey where it
    is of all of them."""
    length, k, _ = paths.shape
    if labels is None:
        labels = np.arange(k) % num_classes
    shares = np.asarray(labels)
    if shares.ndim == 1:
        one_hot = np.eye(max(num_classes, 1 + int(shares.max())))[shares]
        shares = np.broadcast_to(one_hot, (length, *one_hot.shape))
    colours = np.array([to_rgb(c) for c in CLASS_COLOURS])[: shares.shape[-1]]
    for i in range(k):
        trajectory(axes, paths[:, i], shares[:, i] @ colours)


def _marker(label: int) -> str:
    return _MARKERS[label % len(_MARKERS)]


_MARKERS = "osD^v"


def decision_regions(
    axes: Axes,
    predict: Callable[[Float[Array, "m 2"]], Float[Array, "m c"]],
    *,
    extent: float,
    resolution: int = 200,
) -> None:
    """Colours the regions that a classifier assigns to each class.

    **Arguments:**

    - `axes`: matplotlib axes.
    - `predict`: a function from points of shape `(m, 2)` to logits of shape `(m, c)`.
    - `extent`: the square shown is from `-extent` to `extent`.
    - `resolution`: the number of grid points along each side.
    """
    side = jnp.linspace(-extent, extent, resolution)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    logits = np.asarray(predict(grid))
    classes = np.argmax(logits, axis=-1).reshape(resolution, resolution)
    tints = [_tint(colour, 0.22) for colour in CLASS_COLOURS[: logits.shape[-1]]]
    axes.pcolormesh(
        side,
        side,
        classes,
        cmap=ListedColormap(tints),
        vmin=-0.5,
        vmax=len(tints) - 0.5,
        shading="auto",
        rasterized=True,
        zorder=0,
    )
    if len(np.unique(classes)) > 1:
        levels = np.arange(logits.shape[-1] - 1) + 0.5
        axes.contour(side, side, classes, levels, colors="0.25", linewidths=0.7)
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")


def data_points(
    axes: Axes, points: Float[ArrayLike, "n 2"], labels: Int[ArrayLike, " n"], **kwargs
) -> None:
    """Draws points in the colours, and with the markers, of their classes.

    **Arguments:**

    - `axes`: matplotlib axes.
    - `points`: of shape `(n, 2)`.
    - `labels`: integers of shape `(n,)`.
    - `kwargs`: for `axes.scatter`.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    options = {"s": 7, "linewidths": 0.3, "edgecolors": "white", "zorder": 2} | kwargs
    for label in np.unique(labels):
        axes.scatter(
            *points[labels == label].T,
            color=CLASS_COLOURS[label],
            marker=_marker(label),
            **options,
        )


def trajectory(
    axes: Axes,
    path: Float[ArrayLike, "t 2"],
    colour: str | Float[ArrayLike, "t 3"],
    *,
    label: str | None = None,
) -> None:
    """Draws the path of a point, with a light colour and a cross at its start, and a full
    one and a star at its end.

    **Arguments:**

    - `axes`: matplotlib axes.
    - `path`: of shape `(t, 2)`.
    - `colour`: one colour, or one for each point of the path, of shape `(t, 3)`.
    - `label`: for the legend, where it names the star.
    """
    path = np.asarray(path)
    rgb = np.broadcast_to(
        to_rgb(colour) if isinstance(colour, str) else np.asarray(colour),
        (len(path), 3),
    )
    alpha = np.linspace(0.15, 0.9, len(path))[:, None]
    segments = np.stack([path[:-1], path[1:]], axis=1)
    rgba = np.concatenate([rgb, alpha], axis=1)[1:]
    axes.add_collection(
        LineCollection(list(segments), colors=rgba, linewidths=0.8, zorder=3)
    )
    outline = [effects.withStroke(linewidth=1.2, foreground="white")]
    axes.plot(
        *path[-1],
        "*",
        ms=11,
        color=rgb[-1],
        mec="black",
        mew=0.7,
        zorder=5,
        label=label,
    )
    axes.plot(*path[0], "x", ms=5, color=rgb[0], mew=1.4, zorder=4, path_effects=outline)


def _tint(colour: str, amount: float) -> tuple[float, float, float]:
    r, g, b = (1 - amount * (1 - channel) for channel in to_rgb(colour))
    return r, g, b
