"""Classifiers of points in the plane."""

from collections.abc import Callable

import jax.numpy as jnp
import matplotlib.patheffects as effects
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, to_rgb

from ._style import CLASS_COLOURS


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
    """Draws points in the colours of their classes.

    **Arguments:**

    - `axes`: matplotlib axes.
    - `points`: of shape `(n, 2)`.
    - `labels`: integers of shape `(n,)`.
    - `kwargs`: for `axes.scatter`.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    markers = "osD^v"
    options = {"s": 7, "linewidths": 0.3, "edgecolors": "white", "zorder": 2} | kwargs
    for label in np.unique(labels):
        axes.scatter(
            *points[labels == label].T,
            color=CLASS_COLOURS[label],
            marker=markers[label % len(markers)],
            **options,
        )


def trajectory(
    axes: Axes,
    path: Float[ArrayLike, "t 2"],
    colour: str | Float[ArrayLike, "t 3"],
    *,
    label: str | None = None,
) -> None:
    """Draws the path of a point, with a light colour at its start and a full one at its
    end.

    **Arguments:**

    - `axes`: matplotlib axes.
    - `path`: of shape `(t, 2)`.
    - `colour`: one colour, or one for each point of the path, of shape `(t, 3)`.
    - `label`: for the legend.
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
