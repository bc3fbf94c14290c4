"""The axes of a picture: the caller's, or new ones."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax.tree_util as jtu
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from .._compat import is_traced
from ._style import house_style


@contextlib.contextmanager
def drawing(
    axes: Any, size: tuple[float, float], num_rows: int = 1
) -> Iterator[list[Axes]]:
    """The axes that were given; or those of a new figure, one below the other, in the
    style of this package."""
    if axes is not None:
        yield _given(axes, num_rows)
        return
    with house_style():
        options = {"sharex": True, "squeeze": False, "layout": "constrained"}
        _, new = plt.subplots(num_rows, figsize=size, **options)
        yield list(new[:, 0])


def _given(axes: Any, num_rows: int) -> list[Axes]:
    given = [axes] if isinstance(axes, Axes) else list(np.ravel(axes))
    if len(given) != num_rows or not all(isinstance(a, Axes) for a in given):
        wanted = "one `Axes`" if num_rows == 1 else f"a sequence of {num_rows} `Axes`"
        raise ValueError(
            f"`bilevel_eqx.plot` draws this picture in {wanted}, and `axes` is {axes!r}. "
            "Without `axes` it makes a figure of its own."
        )
    return given


def legend_below(ax: Axes, points: float = 0, **options: Any) -> None:
    """A legend so many points below the axes, where it covers nothing."""
    assert ax.figure is not None
    shift = ScaledTranslation(0, -points / 72, ax.figure.dpi_scale_trans)  # pyright: ignore
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
    ax.legend(bbox_transform=ax.transAxes + shift, **place, **options)


def check_known(tree: Any, call: str) -> None:
    """Refuses to draw what has no numbers yet."""
    if any(is_traced(leaf) for leaf in jtu.tree_leaves(tree)):
        raise ValueError(
            f"`{call}` was called under `jax.jit` or `jax.vmap`, where there are no "
            "numbers to draw. Return the object, and draw it outside."
        )


def on_log_axis(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Sizes with zeros (and what is below) raised to a floor that is well below all
    others; and the floor."""
    values = np.abs(np.asarray(values, np.float64))
    positive = values[(values > 0) & np.isfinite(values)]
    floor = 0.1 * float(np.min(positive, initial=1.0))
    return np.where(values == 0, floor, values), floor
